"""What needs a GPU. Collected only when named: ``nox -s gpu``, or ``pytest tests/gpu``.

Without one every test is skipped, and says what is missing.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from kvlayer.errors import UnsupportedError
from kvlayer.staging.kernels.build import Builder

collect_ignore = [] if find_spec("vllm") else ["test_gpu_vllm.py"]  # nox -s vllm-gpu has it


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    return None if named else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.may_skip("needs a GPU"))
            item.add_marker(pytest.mark.any_device)


@pytest.fixture(scope="session", autouse=True)
def device() -> int:
    """The number of a device that can be used."""
    torch = pytest.importorskip("torch")
    try:
        Builder(0)
    except UnsupportedError as exc:
        pytest.skip(str(exc))
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no CUDA device")
    return 0

"""vLLM as a GPU runs it, on a CPU: its schedulers, ranks, layouts and kernels' cache writes.

Nothing here is collected where vLLM is not installed, or unless it is named: session
``vllm-gpu-shaped`` has an environment with it, and with Triton in a folder of its own.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import shaped_triton
from zygote import Zygote

HAS_VLLM = find_spec("vllm") is not None

if HAS_VLLM:
    from kvlayer_vllm.bench.serving import ENVIRONMENT
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    if not HAS_VLLM:
        return
    os.environ.update(ENVIRONMENT)  # before anything imports the engine
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the engine's own, of which there are many
        import vllm.v1.engine.llm_engine  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the engine and its libraries warn of is theirs; what kvlayer does stays an error."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.filterwarnings("error:::kvlayer"), append=False)


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Any]:
    """``configs(setting)``: vLLM's configuration of it, made once."""
    from shaped_setting import Configs, Setting, model_of

    model = model_of(tmp_path_factory.mktemp("models") / "table")
    made: dict[Setting, Configs] = {}

    def find(setting: Setting) -> Configs:
        if setting not in made:
            made[setting] = Configs(setting, model)
        return made[setting]

    return find


@pytest.fixture(scope="session", autouse=True)
def zygotes() -> Iterator[dict[str, Zygote]]:
    """Fork engines, by the module of their roles. For every test, so that they import vLLM while
    the first ones run; none where there is no Triton."""
    roles = ("vllm_engine", "shaped_process") if shaped_triton.FOLDER in os.environ else ()
    forking = {name: Zygote(name) for name in roles}
    yield forking
    for each in forking.values():
        each.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, for engines that compute."""
    from kvlayer_vllm.bench.models import random_model

    return random_model(
        tmp_path_factory.mktemp("models") / "tiny",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=512,
    )

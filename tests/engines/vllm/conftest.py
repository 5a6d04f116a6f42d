"""The real engine on a CPU, small models, and what a scheduler would hand to the connector.

Nothing here is collected where vLLM is not installed: the session ``vllm`` has an environment with
it, the session ``tests`` has none.
"""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from kvlayer_vllm.bench.models import random_model
    from kvlayer_vllm.bench.serving import ENVIRONMENT

    os.environ.update(ENVIRONMENT)  # before anything imports the engine
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


TINY: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers."""
    return random_model(tmp_path_factory.mktemp("models") / "tiny", **TINY)


@pytest.fixture(scope="session")
def vllm_config(tiny: Path) -> Any:
    """vLLM's own configuration of that model."""
    from vllm import EngineArgs
    from vllm.config import KVTransferConfig

    return EngineArgs(
        model=str(tiny),
        dtype="float32",
        block_size=32,
        max_model_len=2048,
        distributed_executor_backend="uni",
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVLayerConnector",
            kv_connector_module_path="kvlayer_vllm",
            kv_role="kv_both",
        ),
    ).create_engine_config()


@pytest.fixture
def spec() -> Any:
    """``spec(kind, **changes)``: one of vLLM's descriptions of a layer's KV."""
    import torch
    from vllm.v1 import kv_cache_interface as interface

    def make(kind: str, **changes: Any) -> Any:
        fields: dict[str, Any] = {
            "block_size": 32,
            "num_kv_heads": 2,
            "head_size": 64,
            "dtype": torch.float32,
        }
        return getattr(interface, kind)(**{**fields, **changes})

    return make


@pytest.fixture
def kv_cache_config() -> Any:
    """``kv_cache_config((names, spec), ...)``: what the engine tells of its groups."""
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    def make(*groups: tuple[list[str], Any], **changes: Any) -> Any:
        found = [KVCacheGroupSpec(names, spec, **changes) for names, spec in groups]
        return KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=found)

    return make


@pytest.fixture
def request_of() -> Any:
    """``request_of(tokens, **fields)``: a request as the scheduler has it."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    def make(tokens: Any, **fields: Any) -> Any:
        return Request(
            request_id=fields.pop("request_id", "one"),
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=4),
            pooling_params=None,
            **fields,
        )

    return make


@pytest.fixture
def changed() -> Any:
    """``changed(config, "model_config", quantization="fp8")``: a view of a configuration."""

    def change(config: Any, part: str, **fields: Any) -> Any:
        inner = getattr(config, part)
        names = [name for name in dir(config) if name.endswith("_config")]
        copy = SimpleNamespace(**{name: getattr(config, name) for name in names})
        setattr(copy, part, _Over(inner, fields))
        return copy

    return change


class _Over:
    """An object with some attributes of its own in front of another's."""

    def __init__(self, inner: Any, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.fixture
def no_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of models are remembered below the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))

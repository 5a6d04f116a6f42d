"""What kvlayer cannot serve turns it off with one line, and every hook has an answer."""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvlayer.errors import ConfigError, UnsupportedError
from kvlayer_vllm import connector as connector_module
from kvlayer_vllm import engine as engine_module
from kvlayer_vllm.connector import KVLayerConnector
from kvlayer_vllm.engine import TESTED, check_loads, check_version, register
from kvlayer_vllm.messages import Answers, Step

PLUGIN = Path(__file__).parents[3] / "plugins" / "kvlayer-vllm"
NAMES = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]


@pytest.fixture
def make(vllm_config: Any, spec: Any, kv_cache_config: Any, changed: Any) -> Any:
    """``make(role, spec=..., part=..., **fields)``: a connector of a changed configuration."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole

    def build(role: str, *, held: Any = None, part: str = "", **fields: Any) -> KVLayerConnector:
        config = changed(vllm_config, part, **fields) if part else vllm_config
        groups = kv_cache_config((NAMES, held or spec("FullAttentionSpec")))
        return KVLayerConnector(config, KVConnectorRole[role], groups)

    return build


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Any:
    """What kvlayer told the engine's users, as warnings."""
    logger = logging.getLogger("vllm.kvlayer")
    logger.addHandler(caplog.handler)  # vLLM's logger may keep its records to itself, or not
    yield lambda: list(
        dict.fromkeys(
            each.getMessage()
            for each in caplog.records
            if (each.name, each.levelname) == (logger.name, "WARNING")
        )
    )
    logger.removeHandler(caplog.handler)


def check_off(connector: KVLayerConnector, request: Any) -> None:
    """It does nothing, and every hook has an answer."""
    assert not connector.is_on and connector.scheduler is None
    connector.on_new_request(request)
    assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
    connector.update_state_after_alloc(request, SimpleNamespace(), 0)
    step = connector.build_connector_meta(SimpleNamespace())
    assert isinstance(step, Step)
    connector.bind_connector_metadata(step)
    connector.handle_preemptions(step)
    connector.register_kv_caches({})
    connector.unregister_kv_caches()
    connector.restore_kv_caches()
    connector.start_load_kv(None)
    connector.wait_for_layer_load(NAMES[0])
    connector.save_kv_layer(NAMES[0], None, None)
    connector.wait_for_save()
    assert connector.get_transfer_results(set()).finished_sending == set()
    assert connector.get_block_ids_with_load_errors() == set()
    assert connector.build_connector_worker_meta() is None
    assert not connector.has_pending_push_work()
    connector.update_connector_output(SimpleNamespace(kv_connector_worker_meta=Answers(0)))
    assert connector.request_finished_all_groups(request, ([1],)) == (False, None)
    assert list(connector.take_events()) == [] and connector.reset_cache() is None
    connector.shutdown()


@pytest.mark.parametrize("role", ["SCHEDULER", "WORKER"])
@pytest.mark.parametrize("version", ["0.30.2", "0.34.0", "1.0.0", "unknown"])
def test_another_version_turns_it_off_with_one_line(
    role: str,
    version: str,
    make: Any,
    told: Any,
    request_of: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connector_module, "engine_version", lambda: version)
    check_off(make(role), request_of([1, 2, 3]))
    (line,) = told()
    outside = f"kvlayer is off: vLLM {version} is outside the tested range, 0.31 to 0.33"
    assert line.startswith(outside)


def test_the_tested_versions_are_accepted() -> None:
    check_version("0.31.0")
    check_version("0.32.1+cpu")
    check_version("0.33.0")
    with pytest.raises(UnsupportedError):
        check_version("0.3.2")


def test_the_range_that_doctor_reads_is_the_tested_one() -> None:
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    (first, (major, minor)) = TESTED
    expected = f"vllm>={first[0]}.{first[1]},<{major}.{minor + 1}"
    assert project["optional-dependencies"]["vllm"] == [expected]


@pytest.mark.parametrize("role", ["SCHEDULER", "WORKER"])
def test_a_group_that_cannot_be_carried_turns_it_off_by_its_name(
    role: str, make: Any, told: Any, request_of: Any
) -> None:
    import torch
    from vllm.v1.kv_cache_interface import MambaSpec

    state = MambaSpec(block_size=32, shapes=((4, 4),), dtypes=(torch.float32,))
    check_off(make(role, held=state), request_of([1, 2, 3]))
    (line,) = told()
    assert "kvlayer is off: kvlayer cannot carry KV group 0 (MambaSpec, 2 layers)" in line


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        (
            "parallel_config",
            {"decode_context_parallel_size": 2},
            "decode_context_parallel_size = 2",
        ),
        (
            "parallel_config",
            {"prefill_context_parallel_size": 2},
            "prefill_context_parallel_size = 2",
        ),
    ],
)
def test_ranks_that_share_out_a_prompts_tokens_turn_it_off(
    part: str, fields: dict[str, Any], message: str, make: Any, told: Any
) -> None:
    assert not make("SCHEDULER", part=part, **fields).is_on
    (line,) = told()
    assert message in line


def test_a_worker_that_is_off_turns_the_scheduler_off(
    make: Any, told: Any, request_of: Any
) -> None:
    connector = make("SCHEDULER")
    assert connector.is_on
    connector.bind_kv_cache_manager(SimpleNamespace(block_pool=None, reset_prefix_cache=None))
    check_off(connector, request_of([1, 2, 3]))
    (line,) = told()
    assert line.startswith("kvlayer is off: no worker of the engine has introduced itself: ")


def test_a_mistake_in_the_configuration_is_an_error(make: Any, vllm_config: Any) -> None:
    transfer = vllm_config.kv_transfer_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "kv_connector_extra_config", {"tokens_per_chunks": 1})
        with pytest.raises(ConfigError, match="tokens_per_chunk"):
            make("SCHEDULER")


@pytest.mark.parametrize("role", ["SCHEDULER", "WORKER"])
@pytest.mark.parametrize("loads", ["sync", "layerwise"])
def test_loads_that_a_step_waits_for_turn_it_off_by_name(
    loads: str,
    role: str,
    make: Any,
    told: Any,
    request_of: Any,
    vllm_config: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transfer = vllm_config.kv_transfer_config
    monkeypatch.setattr(transfer, "kv_connector_extra_config", {"loads": loads})
    check_off(make(role), request_of([1, 2, 3]))
    (line,) = told()
    assert line.startswith(f"kvlayer is off: loads = {loads!r} is not safe with vLLM 0.3")
    assert "vLLM issue 49250" in line


def test_loads_that_a_step_waits_for_are_served_from_the_version_on_that_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module, "RECOMPUTES_IN_STEP", (0, 32))
    check_loads("0.32.1+cpu", "sync")
    check_loads("0.31.0", "async")
    with pytest.raises(UnsupportedError, match=r"with vLLM 0\.31\.0"):
        check_loads("0.31.0", "layerwise")


def test_a_load_that_fails_is_computed_whatever_the_default(make: Any, vllm_config: Any) -> None:
    vllm_config.kv_transfer_config.kv_load_failure_policy = "fail"
    make("SCHEDULER")
    assert vllm_config.kv_transfer_config.kv_load_failure_policy == "recompute"


def test_the_connector_is_known_by_its_name() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    register()
    register()  # every process of the engine does
    found = KVConnectorFactory.get_connector_class_by_name("KVLayerConnector")
    assert found is KVLayerConnector

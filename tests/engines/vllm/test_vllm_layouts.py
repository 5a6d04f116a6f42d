"""What the adapter makes of an engine's KV tensors: forms, their names, layers of several kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm_desk import BLOCK, LAYERS, Desk

from kvlayer.errors import UnsupportedError
from kvlayer_vllm import layouts
from kvlayer_vllm.device_order import EngineStream
from kvlayer_vllm.groups import engine_groups
from kvlayer_vllm.hands import LocalHands
from kvlayer_vllm.layouts import caches_of, rank_layout
from kvlayer_vllm.lent_tensors import LentTensors
from kvlayer_vllm.moves import Save

PROMPT = list(range(3, 203))


def forms(config: Any, groups: Any, form: str, tensor: Any) -> list[str]:
    registered = dict.fromkeys(LAYERS, tensor)
    held = rank_layout(config, groups, form, registered, rank=0)
    caches_of(groups, held.layout, registered)
    return [each.form for each in held.layout.groups]


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ("auto", "native:vllm-cpu-vec-32"),
        ("native", "native:vllm-cpu-vec-32"),
        ("canonical", "canonical"),
    ],
)
def test_blocks_that_a_cpu_has_packed_are_kept_as_they_are_unless_it_is_said(
    form: str, named: str, vllm_config: Any, spec: Any, kv_cache_config: Any
) -> None:
    groups = engine_groups(vllm_config, kv_cache_config((LAYERS, spec("FullAttentionSpec"))))
    assert forms(vllm_config, groups, form, torch.zeros(4, 2, 32, 128)) == [named]


@pytest.mark.parametrize(
    ("form", "named"), [("auto", "canonical"), ("native", "native:vllm-nc-16")]
)
def test_latents_are_rows_on_a_cpu_too(
    form: str, named: str, vllm_config: Any, spec: Any, kv_cache_config: Any
) -> None:
    latent = spec("MLAAttentionSpec", num_kv_heads=1, head_size=576, block_size=16)
    groups = engine_groups(vllm_config, kv_cache_config((LAYERS, latent)))
    assert forms(vllm_config, groups, form, torch.zeros(4, 1, 16, 576)) == [named]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(4, 2, 32, 96), "expected kvdim extent 128, found 96"),
        (torch.zeros(4, 3, 32, 128), "expected head extent 2, found 3"),
        (torch.zeros(4, 2, 24, 128), "blocks that divide the scheduler's 32 tokens, found 24"),
        (torch.zeros(4, 2, 32, 128, dtype=torch.bfloat16), "expected dtype torch.float32"),
        (torch.zeros(4, 2, 128), "expected a KV tensor of"),
        ("no tensor", "expected a KV tensor of"),
        (None, "registered no KV tensor"),
    ],
)
def test_tensors_of_another_shape_turn_it_off_before_anything_is_stored(
    tensor: Any, message: str, vllm_config: Any, spec: Any, kv_cache_config: Any
) -> None:
    groups = engine_groups(vllm_config, kv_cache_config((LAYERS, spec("FullAttentionSpec"))))
    with pytest.raises(UnsupportedError, match=message):
        forms(vllm_config, groups, "canonical", tensor)


def test_a_cpus_fp8_blocks_are_kept_as_they_are_or_refused(
    vllm_config: Any, spec: Any, kv_cache_config: Any, changed: Any, monkeypatch: Any
) -> None:
    """vLLM chooses the packing by the model's dtype, and not by that of the bytes."""
    asked: list[Any] = []
    monkeypatch.setattr(layouts, "attention_isa", lambda *how: asked.append(how) or "vec")
    from vllm.v1.kv_cache_interface import get_kv_quant_mode

    config = changed(vllm_config, "cache_config", cache_dtype="fp8")
    fp8 = spec("FullAttentionSpec", dtype=torch.uint8, kv_quant_mode=get_kv_quant_mode("fp8"))
    groups = engine_groups(config, kv_cache_config((LAYERS, fp8)))
    assert groups[0].group.dtype == "fp8_e4m3"
    tensor = torch.zeros(4, 2, 32, 128, dtype=torch.uint8)
    assert forms(config, groups, "auto", tensor) == ["native:vllm-cpu-vec-32"]
    assert asked == [(vllm_config.model_config.dtype, 32, 64, "fp8")]
    with pytest.raises(UnsupportedError, match="nobody has compared how they are packed"):
        forms(config, groups, "canonical", tensor)


@pytest.mark.parametrize("device", ["rocm", "xpu"])
def test_another_device_is_refused_by_its_name(
    device: str, vllm_config: Any, spec: Any, kv_cache_config: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(layouts, "platform", lambda: device)
    groups = engine_groups(vllm_config, kv_cache_config((LAYERS, spec("FullAttentionSpec"))))
    with pytest.raises(UnsupportedError, match=f"cannot carry KV on {device}: the layouts of its"):
        forms(vllm_config, groups, "auto", torch.zeros(4, 2, 32, 128))


# -- layers of several kinds in one group of vLLM's ------------------------------------------------


@pytest.fixture
def uniform(spec: Any, kv_cache_config: Any) -> Any:
    """vLLM's one group of two layers, of which the second has heads twice as wide."""
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    found = UniformTypeKVCacheSpecs.from_specs(
        {
            LAYERS[0]: spec("FullAttentionSpec"),
            LAYERS[1]: spec("FullAttentionSpec", head_size=128),
        }
    )
    return kv_cache_config((LAYERS, found))


@pytest.fixture
def mixed(vllm_config: Any, uniform: Any, no_cache_home: None) -> Any:
    made: list[Desk] = []

    def make(**how: Any) -> Desk:
        made.append(Desk(vllm_config, uniform, widths={LAYERS[1]: 256}, **how))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("remote", [False, True], ids=["one process", "two"])
@pytest.mark.parametrize("form", ["auto", "canonical"])
def test_each_layer_of_a_group_of_several_kinds_is_stored_and_loaded(
    form: str, remote: bool, mixed: Any, request_of: Any
) -> None:
    desk = mixed(form=form, remote=remote)
    assert [each.table for each in desk.half._groups] == [0, 0]
    assert [each.group.head_size for each in desk.half._groups] == [64, 128]
    desk.answer(request_of(PROMPT), range(1, 8))
    before = [rows.clone() for rows in desk.rows(range(1, 7))]
    again = request_of(PROMPT, request_id="again")
    desk.half.arrived(again)
    assert desk.admit(again, range(20, 27)) == 6 * BLOCK
    desk.run()
    while desk.half._tracked["again"].load is not None:
        desk.run()
    assert all(map(torch.equal, before, desk.rows(range(20, 26))))


def test_a_view_has_the_slots_of_each_groups_own_table() -> None:
    slots: Any = ["of table 0", "of table 1"]
    lent = LentTensors([[], [], []], EngineStream("cpu"))
    view = LocalHands(lent, (0, 0, 1)).view(slots, Save("one"))
    assert [*view.slots] == ["of table 0", "of table 0", "of table 1"]


def test_routers_hear_of_such_a_group_once(
    mixed: Any, request_of: Any, vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import KVEventsConfig
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    monkeypatch.setattr(vllm_config, "kv_events_config", events)
    init_none_hash(sha256)
    desk = mixed()
    request = request_of(PROMPT, block_hasher=get_request_block_hasher(BLOCK, sha256))
    desk.answer(request, range(1, 8))
    told = [block for event in desk.half.take_events() for block in event.block_hashes]
    assert len(told) == len(set(told)) == 6

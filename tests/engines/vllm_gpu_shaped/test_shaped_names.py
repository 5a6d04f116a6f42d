"""What the KV of a GPU's backends is called: namespaces, forms, and by its name what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_engine import DeviceTensor
from shaped_groups import config_of, groups_of, held, kv_cache_of, names, on_a_gpu
from shaped_specs import KINDS, LAYERS, Kind, Tensors, full_spec

from kvlayer import Namespace
from kvlayer.errors import UnsupportedError
from kvlayer.memory.slab import Slab
from kvlayer.staging.cuda.stager import DeviceStager
from kvlayer_vllm.groups import engine_groups, refuse_parallel
from kvlayer_vllm.layouts import COMPARED, caches_of, rank_layout
from kvlayer_vllm.settings import Settings
from kvlayer_vllm.worker import WorkerHalf

BY_NAME = {kind.name: kind for kind in KINDS}
SAME_BYTES = [
    {
        "FLASH_ATTN bf16",
        "TRITON_ATTN bf16",
        "FLASHINFER bf16",
        "FLEX_ATTENTION bf16",
        "B12X bf16",
        "HPC_ATTN",
        "a hybrid's padded page",
    },
    {"FLASH_ATTN fp8", "FLASHINFER fp8"},
    {"FLASH_ATTN_DIFFKV", "TRITON_ATTN_DIFFKV"},
    {
        "TRITON_MLA bf16",
        "CUTLASS_MLA bf16",
        "FLASHMLA bf16",
        "FLASH_ATTN_MLA bf16",
        "FLASHINFER_MLA bf16",
        "FLASHMLA_SPARSE bf16",
        "FLASHINFER_MLA_SPARSE bf16",
    },
]
REFUSED = {"DeepSeek V4 sparse, 4 tokens an entry", "Mamba 2 state"}


def digest(kind: Kind, spec: Any = None) -> str:
    groups = tuple(each.group for each in groups_of(kind, spec))
    return Namespace(weights="sha256:" + "1" * 64, groups=groups, compute_dtype="bfloat16").digest


def test_kv_has_one_name_where_its_bytes_are_the_same_and_another_where_not() -> None:
    found: dict[str, set[str]] = {}
    for kind in KINDS:
        if kind.name not in REFUSED:
            found.setdefault(digest(kind), set()).add(kind.name)
    alone = {kind.name for kind in KINDS} - REFUSED - set().union(*SAME_BYTES)
    expected = [*SAME_BYTES, *({name} for name in alone)]
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, expected))


def quantised(cache: str) -> Kind:
    backend = "FLASHINFER" if cache.startswith("nvfp4") else "TRITON_ATTN"
    return Kind(cache, backend, lambda: full_spec(cache), cache=cache)


def test_quantisations_have_names_of_their_own() -> None:
    """vLLM's number for some of them is the same: of both NVFP4, of both names of e4m3."""
    caches = ["auto", "fp8", "fp8_e5m2", "int8_per_token_head", "fp8_per_token_head", "nvfp4"]
    caches += ["int4_per_token_head", "nvfp4_4over6", "turboquant_4bit_nc", "turboquant_k8v4"]
    kinds = [
        Kind(each, "TURBOQUANT", lambda each=each: full_spec(each), cache=each)
        if each.startswith("turbo")
        else quantised(each)
        for each in caches
    ]
    assert len({digest(kind) for kind in kinds}) == len(caches)
    # A checkpoint's own scheme: only the workers' configuration has another word for it then.
    by_checkpoint = Kind("by checkpoint", "TRITON_ATTN", lambda: full_spec("fp8"))
    same = {digest(each) for each in (quantised("fp8"), quantised("fp8_e4m3"), by_checkpoint)}
    assert len(same) == 1
    (of_rows,) = groups_of(quantised("fp8_per_token_head"))
    assert (of_rows.group.dtype, of_rows.group.quantisation) == ("int8", "fp8_per_token_head")


def forms(kind: Kind, form: str) -> dict[str, str]:
    """By layout."""
    return {
        layout.name: held(kind, Tensors(kind, layout), form).layout.groups[0].form
        for layout in kind.layouts()
        if layout.name not in ("BHLNC", "LHBNC", *kind.refused)
    }


@pytest.mark.parametrize("kind", [each for each in KINDS if each.name not in REFUSED], ids=str)
def test_rows_are_canonical_unless_it_is_said_and_pages_are_whole_blocks(kind: Kind) -> None:
    found = set(forms(kind, "auto").values())
    if kind.has_rows:
        assert found == {"canonical"}
    else:
        assert all(each.startswith("native:vllm-") for each in found)


def test_a_native_form_names_the_order_in_a_block_and_its_size() -> None:
    """And nothing that does not change a block: layers or blocks outermost are the same to it."""
    orders = {
        "LBNHC": "native:vllm-nhc-16",
        "LBHNC": "native:vllm-hnc-16",
        "BLHNC": "native:vllm-hnc-16",
        "BLNHC": "native:vllm-nhc-16",
    }
    assert forms(BY_NAME["FLASH_ATTN bf16"], "native") == orders
    one_head = set(forms(BY_NAME["FLASH_ATTN 1 KV head"], "native").values())
    assert one_head == {"native:vllm-nc-16"}
    assert set(forms(BY_NAME["FLASHMLA fp8"], "native").values()) == {"native:vllm-nc-64"}
    split = forms(BY_NAME["FLASHINFER block 256, kernel 64"], "native")
    assert split["LBNHC"] == "native:vllm-nhc-64"
    assert forms(BY_NAME["B12X bf16"], "native")["LBHNC"] == "native:vllm-knhc-64"


def test_tails_are_whole_blocks_only_where_blocks_are_stored_whole() -> None:
    for name, step in (("FLASHMLA bf16", 1), ("DeepSeek V3.2 indexer", 64)):
        kind = BY_NAME[name]
        rank = held(kind, Tensors(kind, kind.layouts()[0]), "auto").rank
        assert rank.native_step == step
        assert Settings.of({}).fitting(rank.native_step).tail_tokens == max(32, step)


def test_rows_go_through_the_pipeline_of_their_device() -> None:
    kind = BY_NAME["FLASH_ATTN fp8"]
    rank = held(kind, Tensors(kind, kind.layouts()[0]), "auto", tensor=DeviceTensor).rank
    assert isinstance(rank.make_stager()(rank.layout, Slab(1 << 20), 1), DeviceStager)


# -- several kinds in one group of vLLM's ----------------------------------------------------------


def test_an_indexers_keys_are_blocks_beside_the_rows_of_their_latents() -> None:
    """A model of DeepSeek V3.2's kind: one block table, two kinds of layers of the same numbers."""
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    latent, keys = BY_NAME["FLASHMLA_SPARSE fp8_ds_mla"], BY_NAME["DeepSeek V3.2 indexer"]
    indexers = [f"model.layers.{number}.self_attn.indexer.k_cache" for number in range(LAYERS)]
    layers = [name for pair in zip(names(), indexers, strict=True) for name in pair]
    specs = {name: latent.spec() if name in names() else keys.spec() for name in layers}
    called = {name: (latent if name in names() else keys).called() for name in layers}
    config = config_of(called, "fp8_ds_mla")
    merged = UniformTypeKVCacheSpecs(block_size=64, kv_cache_specs=specs)
    groups = engine_groups(config, kv_cache_of((layers, merged)))
    assert [each.layer_names for each in groups] == [(*indexers,), (*names(),)] or [
        each.layer_names for each in groups
    ] == [(*names(),), (*indexers,)]
    assert {each.table for each in groups} == {0}
    assert {each.group.quantisation for each in groups} == {"indexer", "fp8_ds_mla"}
    layout = latent.layouts()[0]
    views = [Tensors(latent, layout).views, Tensors(keys, layout).views]
    registered = dict(zip([*names(), *indexers], [*views[0], *views[1]], strict=True))
    with on_a_gpu():
        rank = rank_layout(config, groups, "auto", registered, rank=0)
        caches_of(groups, rank.layout, registered)
    by_name = {
        each.group.quantisation: lying.form
        for each, lying in zip(groups, rank.layout.groups, strict=True)
    }
    assert by_name == {"indexer": "native:vllm-nc-64", "fp8_ds_mla": "canonical"}


# -- refused by name -------------------------------------------------------------------------------


def test_every_backend_that_is_carried_is_compared_here() -> None:
    compared = {kind.called() for kind in KINDS if kind.name not in REFUSED}
    assert compared == COMPARED


@pytest.mark.parametrize("called", ["FLASHINFER_MLA_SPARSE_SM120", "TREE_ATTN", ""])
def test_a_backend_that_nobody_has_compared_is_refused_by_its_name(called: str) -> None:
    kind = BY_NAME["FLASHMLA bf16"]
    config = config_of({name: called for name in names() if called})
    groups = groups_of(kind)
    registered = dict(zip(names(), Tensors(kind, kind.layouts()[0]).views, strict=True))
    message = f"its attention backend is {called or 'not known'}"
    with on_a_gpu(), pytest.raises(UnsupportedError, match=message):
        rank_layout(config, groups, "auto", registered, rank=0)


@pytest.mark.parametrize(
    ("cache", "changes", "message"),
    [
        ("fp8_inc", {}, "keys and values of torch.uint8 kept as fp8_inc"),
        ("ultraquant_4bit", {"state_content_bytes": 80}, "kept as ultraquant_4bit"),
        ("auto", {"attention_chunk_size": 64}, "attention in chunks of 64 tokens"),
        ("auto", {"non_causal": True}, "attention that is not causal"),
        ("auto", {"tokens_per_state": 4}, "several tokens in one entry"),
        ("auto", {"num_head_slots": 2, "state_content_bytes": 77}, "keys and values of"),
    ],
)
def test_kv_without_words_is_refused_by_its_name(
    cache: str, changes: dict[str, Any], message: str
) -> None:
    config = config_of(dict.fromkeys(names(), "FLASH_ATTN"), cache)
    with pytest.raises(UnsupportedError, match=message):
        engine_groups(config, kv_cache_of((names(), full_spec(cache, **changes))))


def test_a_group_with_a_role_of_its_own_is_refused_by_it() -> None:
    from vllm.v1.kv_cache_interface import KVCacheGroupRole

    found = kv_cache_of((names(), full_spec("auto")))
    found.kv_cache_groups[0].role = KVCacheGroupRole.HISPARSE_INDEXER
    with pytest.raises(UnsupportedError, match="hisparse_indexer"):
        engine_groups(config_of(dict.fromkeys(names(), "FLASH_ATTN")), found)


@pytest.mark.parametrize("name", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_tokens_that_are_dealt_out_to_ranks_are_refused_by_name(name: str) -> None:
    config = SimpleNamespace(parallel_config=SimpleNamespace(**{name: 2}))
    with pytest.raises(UnsupportedError, match=f"{name} = 2"):
        refuse_parallel(config)


# -- scales that a backend makes late --------------------------------------------------------------


def test_what_is_loaded_before_the_first_step_keeps_its_scales() -> None:
    """vLLM fills the scales of all blocks with ones when a layer first finds them."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    kind = BY_NAME["TRITON_ATTN int8_per_token_head"]
    tensors = Tensors(kind, kind.layouts()[0])
    impls = [TritonAttentionImpl.__new__(TritonAttentionImpl) for _ in names()]
    config = config_of(dict.fromkeys(names(), kind.called()), kind.cache)
    for name, impl in zip(names(), impls, strict=True):
        config.compilation_config.static_forward_context[name].impl = impl
    with on_a_gpu():
        worker = WorkerHalf(config, kv_cache_of((names(), kind.spec())), Settings.of({}))
        worker.registered(dict(zip(names(), tensors.views, strict=True)))
    loaded = torch.randint_like(tensors.raw, -128, 127)
    tensors.raw.copy_(loaded)
    for impl, view in zip(impls, tensors.views, strict=True):
        impl._ensure_scale_caches(view)  # what its first step does
    assert torch.equal(tensors.raw, loaded)
    TritonAttentionImpl.__new__(TritonAttentionImpl)._ensure_scale_caches(tensors.views[0])
    assert not torch.equal(tensors.raw, loaded)  # one that was not asked in time


def test_a_layer_that_makes_its_scales_in_an_unknown_way_is_refused() -> None:
    kind = BY_NAME["TRITON_ATTN int8_per_token_head"]
    config = config_of(dict.fromkeys(names(), kind.called()), kind.cache, impl=object())
    registered = dict(zip(names(), Tensors(kind, kind.layouts()[0]).views, strict=True))
    with on_a_gpu():
        worker = WorkerHalf(config, kv_cache_of((names(), kind.spec())), Settings.of({}))
        with pytest.raises(UnsupportedError, match="when its scales are made is not known"):
            worker.registered(registered)

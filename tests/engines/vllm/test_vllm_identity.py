"""What names the KV of a vLLM engine and of a request, on vLLM's own objects."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm_desk import Desk

from kvlayer import AttentionKind, ModelConfig, Namespace, Salt, Scope
from kvlayer.errors import ConfigError, IdentityError, UnsupportedError
from kvlayer.identity.keys import ChunkChain
from kvlayer.identity.weights import weights_digest
from kvlayer_vllm.engine import engine_version
from kvlayer_vllm.groups import engine_groups
from kvlayer_vllm.identity import namespace_of, overrides_of, weights_of
from kvlayer_vllm.scopes import Digests, scope_of
from kvlayer_vllm.settings import Settings

NAMES = ["model.layers.1.self_attn.attn", "model.layers.0.self_attn.attn"]


@pytest.fixture
def groups(vllm_config: Any, spec: Any, kv_cache_config: Any) -> Any:
    return engine_groups(vllm_config, kv_cache_config((NAMES, spec("FullAttentionSpec"))))


def namespace(vllm_config: Any, groups: Any, **model: Any) -> Namespace:
    extra = {"model": model} if model else {}
    config = Settings.of(extra).fitting(32)
    return namespace_of(vllm_config, [each.group for each in groups], config, isa="vec")


def test_a_group_says_what_the_model_keeps(groups: Any) -> None:
    (found,) = groups
    assert found.layer_names == (NAMES[1], NAMES[0])  # in the model's order
    assert found.group.layers == (0, 1)
    assert found.group.kind is AttentionKind.MHA and found.group.dtype == "float32"
    assert (found.group.num_kv_heads, found.group.head_size) == (2, 64)
    assert found.group.rope == {"rope_theta": 10000.0, "rope_type": "default"}
    assert found.tokens_per_block == 32


@pytest.mark.usefixtures("no_cache_home")
def test_the_weights_are_the_files_not_the_name(
    vllm_config: Any, groups: Any, tiny: Path, tmp_path: Path, changed: Any
) -> None:
    assert weights_of(vllm_config) == weights_digest(tiny)
    same = tmp_path / "elsewhere"
    shutil.copytree(tiny, same)
    moved = changed(vllm_config, "model_config", model=str(same), served_model_name="another")
    assert namespace(moved, groups) == namespace(vllm_config, groups)
    weights = same / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert namespace(moved, groups) != namespace(vllm_config, groups)


def test_weights_that_no_file_holds_belong_to_the_process(vllm_config: Any, changed: Any) -> None:
    dummy = changed(vllm_config, "load_config", load_format="dummy")
    assert weights_of(dummy) != weights_of(dummy) and weights_of(dummy).startswith("process:")


def test_a_model_that_is_not_on_this_machine_must_be_stated(vllm_config: Any, changed: Any) -> None:
    far = changed(vllm_config, "model_config", model="nobody/nothing", revision=None)
    with pytest.raises(IdentityError, match="not on this machine") as caught:
        weights_of(far)
    assert "weights" in (caught.value.hint or "")
    assert weights_of(far, "sha256:" + "1" * 64) == "sha256:" + "1" * 64


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"quantization": "fp8"},
        {"hf_overrides": {"rope_parameters": {"rope_theta": 5.0}}},
    ],
)
def test_how_the_model_was_loaded_is_identity(
    change: dict[str, Any], vllm_config: Any, groups: Any, changed: Any
) -> None:
    import torch

    if "dtype" in change:
        change = {"dtype": getattr(torch, change["dtype"])}
    other = changed(vllm_config, "model_config", **change)
    assert namespace(other, groups) != namespace(vllm_config, groups)


def test_how_the_engine_runs_is_not_identity(vllm_config: Any, groups: Any, changed: Any) -> None:
    """Block size, batch sizes, names and hosts shape no byte of a canonical payload."""
    same = changed(vllm_config, "model_config", max_model_len=77, seed=9, served_model_name="x")
    same = changed(same, "cache_config", block_size=128)
    assert namespace(same, groups) == namespace(vllm_config, groups)
    assert overrides_of(vllm_config) == {}


def test_numerics_can_pin_the_build(vllm_config: Any, groups: Any) -> None:
    pinned = namespace(vllm_config, groups, numerics="engine")
    assert pinned.numerics.startswith(
        f"engine:vllm-{engine_version()}."
    ) and pinned.numerics.endswith(".vec")


def test_overrides_that_nothing_can_name_are_refused(vllm_config: Any, changed: Any) -> None:
    with pytest.raises(IdentityError, match="hf_overrides is a function"):
        overrides_of(changed(vllm_config, "model_config", hf_overrides=lambda config: config))


def test_scales_that_change_while_serving_are_refused(
    vllm_config: Any, groups: Any, changed: Any
) -> None:
    with pytest.raises(UnsupportedError, match="scales"):
        namespace(changed(vllm_config, "cache_config", calculate_kv_scales=True), groups)


# -- requests ----------------------------------------------------------------------------------


def names(scope: Scope, tokens: list[int]) -> tuple[list[bytes], list[str]]:
    chain = ChunkChain(tokens, scope, tokens_per_chunk=64, tokens_per_tail=8)
    return chain.hashes, [chain.zone(chain.span(i)) for i in range(len(chain))]


TOKENS = list(range(3, 259))


def test_a_plain_request_has_nobodys_scope(request_of: Any) -> None:
    scope = scope_of(request_of(TOKENS), Digests())
    assert scope is not None and names(scope, TOKENS) == names(Scope(), TOKENS)


def test_a_salted_request_meets_only_its_like(request_of: Any) -> None:
    adapters = Digests()
    one, two = (scope_of(request_of(TOKENS, cache_salt=salt), adapters) for salt in ("a", "b"))
    assert one is not None and two is not None and one.salts == (Salt("a"),)
    found = [names(scope, TOKENS) for scope in (one, two, Scope())]
    assert len({hashes[0] for hashes, _ in found}) == 3
    assert len({zones[0] for _, zones in found}) == 3


def test_an_image_is_named_from_the_token_on_where_it_stands(request_of: Any) -> None:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    def scope(*images: tuple[str, int]) -> Scope:
        features = [
            MultiModalFeatureSpec(
                data=None,
                modality="image",
                identifier=identifier,
                mm_position=PlaceholderRange(offset=at, length=8),
            )
            for identifier, at in images
        ]
        found = scope_of(request_of(TOKENS, mm_features=features), Digests())
        assert found is not None
        return found

    plain = names(Scope(), TOKENS)[0]
    cat, dog = (names(scope((each, 130)), TOKENS)[0] for each in ("cat", "dog"))
    assert cat[:2] == dog[:2] == plain[:2]  # before the image they are the same prompt
    assert len({cat[2], dog[2], plain[2]}) == 3
    assert names(scope(("cat", 130), ("dog", 200)), TOKENS)[0][3] != cat[3]


def test_an_adapter_is_named_by_its_files(
    request_of: Any, tmp_path: Path, no_cache_home: None
) -> None:
    from vllm.lora.request import LoRARequest

    def folder(name: str, content: bytes) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(content)
        return str(tmp_path / name)

    def scope(path: str, number: int = 1, name: str = "served") -> Scope:
        adapters = Digests()
        lora = LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)
        request = request_of(TOKENS, lora_request=lora)
        while (found := scope_of(request, adapters)) is None:
            pass  # made on a thread: the scheduler asks again in its next step
        adapters.close()
        return found

    one, two = folder("one", b"a" * 64), folder("two", b"b" * 64)
    same = folder("three", b"a" * 64)
    assert scope(one) == scope(same, 2, "other name") != scope(two)
    assert names(scope(one), TOKENS)[0][0] != names(Scope(), TOKENS)[0][0]


def test_an_adapter_that_nobody_can_read_is_neither_loaded_nor_stored(
    request_of: Any, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    adapters = Digests()
    lora = LoRARequest(lora_name="x", lora_int_id=1, lora_path=str(tmp_path / "nowhere"))
    request = request_of(TOKENS, lora_request=lora)

    def ask() -> Scope:
        while (found := scope_of(request, adapters)) is None:
            pass
        return found

    with pytest.raises(IdentityError, match="no model at"):
        ask()
    adapters.close()


# -- settings ----------------------------------------------------------------------------------


def test_the_extra_configuration_is_a_cache_and_two_words_of_the_adapters() -> None:
    settings = Settings.of(
        {
            "form": "canonical",
            "loads": "sync",
            "tokens_per_chunk": 128,
            "tiers": [{"url": "cpu://?capacity=1MiB"}],
            "model": {"weights": "sha256:" + "2" * 64},
        }
    )
    assert (settings.form, settings.loads) == ("canonical", "sync")
    assert settings.cache.tokens_per_chunk == 128 and len(settings.cache.tiers) == 1
    assert settings.cache.model == ModelConfig(weights="sha256:" + "2" * 64)


def test_a_file_gives_what_the_extra_configuration_leaves_open(tmp_path: Path) -> None:
    path = tmp_path / "kv.toml"
    path.write_text("tokens_per_chunk = 512\nlease_seconds = 7.0\n")
    settings = Settings.of({"config": str(path), "tokens_per_chunk": 64})
    assert settings.cache.tokens_per_chunk == 64 and settings.cache.lease_seconds == 7.0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"loads": "asink"}, "loads must be one of sync, layerwise, async, found 'asink'"),
        ({"form": "packed"}, "form must be one of"),
        ({"tokens_per_chunks": 3}, "tokens_per_chunk"),
    ],
)
def test_a_misspelt_word_is_an_error(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings.of(extra)


def test_native_tails_are_whole_blocks() -> None:
    assert Settings.of({}).fitting(32).tail_tokens == 32
    assert Settings.of({}).fitting(128).tail_tokens == 128
    assert Settings.of({}).fitting(1).tail_tokens == 32  # none is native
    assert Settings.of({"tokens_per_tail": 64}).fitting(32).tail_tokens == 64
    with pytest.raises(ConfigError, match="not a multiple of the engine's blocks"):
        Settings.of({"tokens_per_chunk": 96}).fitting(64)


def test_an_adapter_loaded_anew_from_the_same_path_is_another(
    request_of: Any, tmp_path: Path, no_cache_home: None
) -> None:
    from vllm.lora.request import LoRARequest

    weights = tmp_path / "adapter_model.safetensors"
    adapters = Digests()

    def scope(number: int) -> Any:
        lora = LoRARequest(lora_name="served", lora_int_id=number, lora_path=str(tmp_path))
        request = request_of(list(range(200)), lora_request=lora)
        while (found := scope_of(request, adapters)) is None:
            pass
        return found

    weights.write_bytes(b"a" * 64)
    first = scope(1)
    weights.write_bytes(b"b" * 65)
    assert scope(1) == first != scope(2)  # the engine still has the first in memory
    adapters.close()


def test_how_an_engine_was_told_to_see_images_is_identity(vllm_config: Any, changed: Any) -> None:
    """Its hash of an image leaves that out: all requests of one process are treated alike."""
    from vllm.config.multimodal import MultiModalConfig

    def overrides(**said: Any) -> Any:
        seen = MultiModalConfig(**said)
        return overrides_of(changed(vllm_config, "model_config", multimodal_config=seen))

    assert overrides() == overrides_of(vllm_config) == {}
    resized = [overrides(mm_processor_kwargs={"do_rescale": each}) for each in (True, False)]
    assert resized[0] != resized[1] and {} not in resized
    half = overrides(video_pruning_rate=0.5)
    assert half not in ({}, overrides(video_pruning_rate=0.25))
    assert half != overrides(video_pruning_rate=0.5, video_pruning_method="vidcom2")


def test_weights_that_are_replaced_while_serving_are_refused(
    vllm_config: Any, changed: Any, spec: Any, kv_cache_config: Any, no_cache_home: None
) -> None:
    replaced = changed(vllm_config, "weight_transfer_config", backend="nccl")
    with pytest.raises(UnsupportedError, match="weight_transfer_config"):
        Desk(replaced, kv_cache_config((NAMES, spec("FullAttentionSpec"))))


def test_an_engine_that_schedules_ahead_is_carried(
    vllm_config: Any, changed: Any, spec: Any, kv_cache_config: Any, no_cache_home: None
) -> None:
    ahead = changed(vllm_config, "scheduler_config", async_scheduling=True)
    at = Desk(ahead, kv_cache_config((NAMES, spec("FullAttentionSpec"))))
    assert at.half.is_open
    at.close()


def test_nothing_is_stored_of_an_adapter_that_was_replaced_in_place(
    desk: Any, request_of: Any, tmp_path: Path, no_cache_home: None
) -> None:
    """vLLM's own prefix cache names blocks by the adapter's path: later requests get old ones."""
    from vllm.lora.request import LoRARequest

    weights, at = tmp_path / "adapter_model.safetensors", desk()

    def asks(name: str, *, inplace: bool = False) -> Any:
        lora = LoRARequest("served", 1, str(tmp_path), load_inplace=inplace)
        return request_of(TOKENS[:200], request_id=name, lora_request=lora)

    def begins(request: Any, blocks: list[int], computed: int = 0) -> None:
        at.half.arrived(request)
        at.admit(request, blocks, computed)

    def ends(request: Any) -> None:
        at.run({request: 200 - request.num_computed_tokens})
        at.finish(request)

    def stored() -> int:
        return int(at.half.portal.cache.control.stats().tiers[0].objects)

    blocks = [*range(1, 9)]
    weights.write_bytes(b"a" * 64)
    first, running = asks("first"), asks("running")
    begins(first, blocks)
    ends(first)
    at.rest()
    before = stored()
    assert before > 0
    begins(running, [*range(11, 19)])
    weights.write_bytes(b"b" * 65)
    replaces = asks("replaces", inplace=True)
    begins(replaces, [*range(21, 29)])
    ends(replaces)
    ends(running)
    at.rest()
    late = asks("late")
    begins(late, blocks, 192)  # vLLM has found the first one's blocks
    ends(late)
    at.rest()
    assert stored() == before
    waiting = asks("waiting", inplace=True)
    at.half.arrived(waiting)
    at.half.reset()
    early = asks("early")
    begins(early, blocks)
    assert at.admit(waiting, [*range(11, 19)]) == 0
    ends(early)
    ends(waiting)
    at.rest()
    assert stored() == 0  # the one that waited replaced it after the reset
    at.half.reset()
    anew = asks("anew")
    begins(anew, blocks)
    ends(anew)
    at.rest()
    assert stored() > 0

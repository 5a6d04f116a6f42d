"""kvlayer as a tier of vLLM's own offload, under vLLM's own manager of tiers."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hang import HANG
from vllm_desk import LAYERS
from vllm_tiering import CHUNKS, Offload, content_of, folder_tier, key_of, spec_of, tier_of


@pytest.fixture
def offload(
    vllm_config: Any, kv_cache_config: Any, spec: Any, no_cache_home: None
) -> Iterator[Callable[..., Offload]]:
    """``offload(tiers, config=vllm_config, **options)``."""
    made: list[Offload] = []

    def make(*tiers: dict[str, Any], config: Any = None, **options: Any) -> Offload:
        groups = kv_cache_config((LAYERS, spec("FullAttentionSpec")))
        made.append(Offload(config or vllm_config, groups, tier_of(*tiers, **options)))
        return made[-1]

    yield make
    for each in made:
        each.close()


MEMORY = {"url": "cpu://?capacity=64MiB", "deadline_seconds": HANG}
SICK = {"url": "sick://", "deadline_seconds": HANG, "pause_seconds": 0.05}


@pytest.fixture
def ill(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What ``sick://`` is: in good health, and patient until :func:`falls_ill`."""
    from kvlayer.bench.sick import SickTier
    from kvlayer_vllm.tier import manager

    tier = SickTier.fresh()
    monkeypatch.setattr(manager, "BACKENDS", manager.BACKENDS.extended({"sick": tier}))
    return tier


def falls_ill(ill: Any, sickness: str, at: Offload, deadline: float) -> None:
    """Or is well again. With a deadline of seconds: a busy machine may miss a short one."""
    from kvlayer.bench.sick import Sickness

    at.tier._portal.subject.tiers[0].guard.deadline = deadline
    ill.sickness = Sickness(sickness)


def test_chunks_are_stored_and_promoted_by_a_fresh_manager(offload: Any, tmp_path: Path) -> None:
    first = offload(folder_tier(tmp_path))
    first.store([1, 2, 3])
    first.forget()
    assert first.found(2) == content_of(2, first.nbytes)
    second = offload(folder_tier(tmp_path))
    for number in (1, 2, 3):
        assert second.found(number) == content_of(number, second.nbytes)
    assert second.found(4) is None
    assert not len(second.tier._verdicts)


def test_no_copy_of_ours_is_made_and_the_rows_are_vllms(
    offload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a tier is lent lies in vLLM's shared region."""
    from kvlayer_backends.cpu import CpuBackend

    at = offload(MEMORY)
    whole = np.frombuffer(at._rows, np.uint8)
    begin, end = whole.ctypes.data, whole.ctypes.data + whole.nbytes
    seen: list[int] = []
    put, get = CpuBackend.put, CpuBackend.get

    async def putting(backend: Any, writes: Any) -> Any:
        seen.extend(_address(view) for write in writes for view in write.regions)
        return await put(backend, writes)

    async def getting(backend: Any, reads: Any) -> Any:
        seen.extend(_address(view) for read in reads for view in read.regions)
        return await get(backend, reads)

    monkeypatch.setattr(CpuBackend, "put", putting)
    monkeypatch.setattr(CpuBackend, "get", getting)
    at.store([1])
    at.forget()
    assert at.found(1) == content_of(1, at.nbytes)
    inside = [address for address in seen if begin <= address < end]
    assert len(inside) == 2, seen


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def _damaged(what: str, path: Path, other: Path) -> None:
    raw = bytearray(path.read_bytes())
    match what:
        case "payload":
            raw[-1000] ^= 1
            path.write_bytes(raw)
        case "header":
            raw[30] ^= 1
            path.write_bytes(raw)
        case "truncated":
            path.write_bytes(raw[: len(raw) // 2])
        case "empty":
            path.write_bytes(b"")
        case "another":
            path.write_bytes(other.read_bytes())
        case "zeros":
            path.write_bytes(bytes(len(raw)))
        case "folder":
            path.unlink()
            path.mkdir()
        case "gone":
            path.unlink()


@pytest.mark.parametrize(
    "what", ["payload", "header", "truncated", "empty", "another", "zeros", "folder", "gone"]
)
def test_a_damaged_chunk_is_a_miss_for_everybody_and_is_stored_again(
    what: str, offload: Any, tmp_path: Path
) -> None:
    from kvlayer_vllm.tier.naming import name_of

    at = offload(folder_tier(tmp_path))
    at.store([1, 2])
    at.forget()

    def file(number: int) -> Path:
        (found,) = tmp_path.rglob(f"{name_of(key_of(number)).hex()}-*.raw")
        return found

    _damaged(what, file(1), file(2))
    one, two = at.request(), at.request()
    assert at.found(1, one) is None  # found, promoted, and not there
    assert at.found(1, two) is None
    assert at.found(1, one) is None  # for as long as it asks
    assert at.found(2, one) == content_of(2, at.nbytes)
    at.over(one)
    at.over(two)
    at.store([1])
    at.forget()
    assert at.found(1) == content_of(1, at.nbytes)


def test_more_chunks_than_fit_go_through_the_tier(offload: Any, tmp_path: Path) -> None:
    at = offload(folder_tier(tmp_path))
    for number in range(3 * CHUNKS):
        at.store([number])
    for number in range(3 * CHUNKS):
        assert at.found(number) == content_of(number, at.nbytes)


@pytest.mark.parametrize("sickness", ["dead", "slow"])
def test_a_sick_tier_is_a_miss_and_holds_nobody_up(sickness: str, offload: Any, ill: Any) -> None:
    at = offload(SICK)
    at.store([1])
    at.forget()
    falls_ill(ill, sickness, at, ill.deadline)
    for _ in range(5):
        assert at.found(1) is None
    at.store([2])  # vLLM's host memory has it, whatever becomes of the tier
    assert at.found(2) == content_of(2, at.nbytes)
    falls_ill(ill, "healthy", at, HANG)
    while at.found(1) is None:  # it is tried again by itself
        at.step()
    at.forget()
    assert at.found(1) == content_of(1, at.nbytes)


def test_a_tier_that_hangs_in_a_load_is_told_to_stop_and_then_the_chunk_is_a_miss(
    offload: Any, ill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = offload(SICK)
    at.store([1])
    at.forget()
    asked = ill.contains

    async def contains(backend: Any, keys: Any) -> Any:
        found = await asked(backend, keys)
        falls_ill(ill, "dead", at, ill.deadline)  # from now on
        return found

    monkeypatch.setattr(ill, "contains", contains)
    assert at.found(1) is None
    assert at.found(1) is None


def changed_config(vllm_config: Any, part: str, **fields: Any) -> Any:
    config = copy.copy(vllm_config)
    setattr(config, part, copy.copy(getattr(config, part)))
    for name, value in fields.items():
        setattr(getattr(config, part), name, value)
    return config


def test_other_weights_hashes_or_dtypes_are_other_names(
    offload: Any, vllm_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = offload(folder_tier(tmp_path))
    at.store([1])
    others = [
        offload(folder_tier(tmp_path), model={"weights": "sha256:" + "1" * 64}),
        offload(folder_tier(tmp_path), model={"overrides": {"mine": 1}}),
        offload(
            folder_tier(tmp_path),
            config=changed_config(
                vllm_config, "cache_config", prefix_caching_hash_algo="sha256_cbor"
            ),
        ),
    ]
    monkeypatch.setenv("PYTHONHASHSEED", "7")  # another beginning of all hashes
    others.append(offload(folder_tier(tmp_path)))
    for other in others:
        assert other.tier._portal is not None
        assert other.found(1) is None
    monkeypatch.undo()
    assert offload(folder_tier(tmp_path)).found(1) == content_of(1, at.nbytes)


def test_hashes_that_begin_with_a_random_number_stay_in_the_process(
    offload: Any,
    vllm_config: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    from vllm.v1.core import kv_cache_utils

    def quick(value: Any) -> bytes:
        return repr(value).encode()[:16].ljust(16)

    monkeypatch.setattr("vllm.utils.hashing.get_hash_fn_by_name", lambda _: quick)
    monkeypatch.setattr(kv_cache_utils, "_NON_CRYPTO_HASH_FUNCTIONS", frozenset({quick}))
    with caplog.at_level("WARNING", "vllm.kvlayer"):
        shared = offload(folder_tier(tmp_path))
    assert "begin with a random number in each process" in caplog.text
    shared.store([1])
    shared.forget()
    assert shared.found(1) is None and not [*tmp_path.rglob("*.raw")]
    memory = offload(MEMORY)
    memory.store([1])
    memory.forget()
    assert memory.found(1) == content_of(1, memory.nbytes)


def test_hashes_that_begin_elsewhere_than_the_rule_says_turn_it_off(
    offload: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.v1.core import kv_cache_utils

    at = offload(MEMORY)
    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", b"somewhere else", raising=False)
    with caplog.at_level("WARNING", "vllm.kvlayer"):
        at.store([1])
    assert "begin elsewhere" in caplog.text
    at.forget()
    assert at.found(1) is None


def test_requests_with_adapters_stay_away(offload: Any, vllm_config: Any, request_of: Any) -> None:
    """vLLM names an adapter by name and place: two adapters, two salts, a name that is a salt."""
    from vllm.config import LoRAConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading import scheduler
    from vllm.lora.request import LoRARequest

    config = copy.copy(vllm_config)
    config.lora_config = LoRAConfig(max_lora_rank=8)
    at = offload(MEMORY, config=config)

    def arrives(name: str, **fields: Any) -> Any:
        request = request_of([1, 2, 3], request_id=name, **fields)
        return at.arrives(scheduler._create_req_context(request))

    plain, salted = arrives("plain"), arrives("salted", cache_salt="x")
    adapted = arrives("adapted", lora_request=LoRARequest("x", 1, "/x"))
    other = arrives("other", lora_request=LoRARequest("y", 2, "/y"))
    at.store([1], adapted)
    at.store([2], plain)
    at.store([3], salted)
    at.store([4], other)
    at.forget()
    assert at.found(1, plain) is None and at.found(1, adapted) is None
    assert at.found(4, salted) is None and at.found(4, other) is None
    assert at.found(2, adapted) is None and at.found(3, other) is None
    assert at.found(2, plain) == content_of(2, at.nbytes)
    assert at.found(3, salted) == content_of(3, at.nbytes)
    for context in (plain, salted, adapted, other):
        at.over(context)
    at.forget()
    untold = at.request()  # of some other maker: nobody said
    assert at.found(2, untold) is None
    at.over(untold)
    assert not at.tier._away


def test_mistakes_in_its_options_are_errors_when_the_engine_starts(
    offload: Any, tmp_path: Path
) -> None:
    from kvlayer.errors import ConfigError, UnknownSchemeError

    with pytest.raises(ConfigError, match="tier"):
        offload(folder_tier(tmp_path), teirs=1)
    with pytest.raises(UnknownSchemeError, match="flie"):
        offload({"url": "flie:///x"})
    with pytest.raises(ValueError, match="NOWHERE"):
        offload(MEMORY, locality="NOWHERE")
    assert offload(MEMORY, locality="LOCAL").tier.locality.name == "LOCAL"


def test_without_a_connector_it_is_off_and_says_why(
    vllm_config: Any,
    kv_cache_config: Any,
    spec: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    groups = kv_cache_config((LAYERS, spec("FullAttentionSpec")))
    made = spec_of(vllm_config, groups, tier_of(MEMORY))
    with caplog.at_level("WARNING", "vllm.kvlayer"):
        manager = made.get_manager()
    assert "kvlayer's tier is off: no connector of vLLM's has made this tier" in caplog.text
    manager.shutdown()


def test_shutting_down_waits_for_what_is_under_way_and_then_has_no_memory_of_vllms(
    offload: Any, ill: Any
) -> None:
    at = offload(SICK)
    falls_ill(ill, "dead", at, HANG)
    own = at.request()
    keys = [key_of(1)]
    at.manager.prepare_store(keys, own)
    at.manager.complete_store(keys, own)  # a job that does not end by itself
    assert at.tier._running == 1
    at.tier.shutdown()
    assert at.tier._running == 0
    (job,) = at.tier.get_finished_jobs()
    assert not job.success
    assert at.tier.lookup(key_of(2), own).name == "MISS"
    at.tier.submit_store(SimpleNamespace(
        job_id=99, keys=keys, chunk_ids=[0], is_promotion=False, req_context=own
    ))  # fmt: skip
    (late,) = at.tier.get_finished_jobs()
    assert (late.job_id, late.success) == (99, False)
    at.tier.shutdown()


def test_a_question_that_is_left_when_it_is_shut_down_is_asked_of_nobody(offload: Any) -> None:
    at = offload(MEMORY)
    own = at.request()
    assert at.tier.lookup(key_of(1), own).name == "RETRY"
    at.tier.shutdown()
    at.step()
    assert at.tier.lookup(key_of(1), own).name == "MISS"
    at.over(own)


def test_memory_that_a_tier_will_not_let_go_of_is_not_given_up(
    vllm_config: Any,
    kv_cache_config: Any,
    spec: Any,
    no_cache_home: None,
    ill: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shutting down says so, and vLLM then keeps what the tier may still touch."""
    go_on = threading.Event()
    seen = threading.Event()

    async def stubborn(backend: Any, writes: Any) -> Any:
        seen.set()
        while not go_on.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue
        return [None for _ in writes]

    monkeypatch.setattr(ill, "put", stubborn)
    groups = kv_cache_config((LAYERS, spec("FullAttentionSpec")))
    at = Offload(vllm_config, groups, tier_of(SICK, close_seconds=0.2))
    own = at.request()
    at.manager.prepare_store([key_of(1)], own)
    at.manager.complete_store([key_of(1)], own)
    assert seen.wait(HANG)
    with pytest.raises(RuntimeError, match="1 jobs of kvlayer's tier have not let go"):
        at.tier.shutdown()
    assert [*at.tier.get_finished_jobs()] == []
    go_on.set()

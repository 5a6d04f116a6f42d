"""A tier that hangs, fails, lies or breaks its contract costs a miss: never bytes, never a hang."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Self

import pytest
from caches import WEIGHTS, layout, tokens
from engine import Engine, same
from hang import HANG

from kvlayer import Cache, CacheConfig, Cause, KVLayerError, ModelConfig, TierConfig
from kvlayer.abc.backend import (
    Backend,
    Capability,
    DeleteResult,
    Hit,
    Listed,
    Miss,
    Read,
    ReadResult,
    SizeResult,
    Write,
    WriteResult,
)
from kvlayer.config.registry import BACKENDS
from kvlayer.errors import BackendError, BackendTimeoutError, NoRoomError
from kvlayer.identity.keys import ObjectKey
from kvlayer.testing.sim import VirtualTimeLoop, in_virtual_time
from kvlayer.urls import BackendURL


class Shelf(Backend):
    """Keeps objects in a dictionary, and misbehaves as its class attribute says."""

    scheme: ClassVar[str] = "shelf"
    capabilities = frozenset({Capability.SHARED})
    objects: ClassVar[dict[ObjectKey, bytes]] = {}
    fault: ClassVar[str] = ""
    calls: ClassVar[int] = 0

    @classmethod
    def from_url(cls, url: BackendURL, /) -> Self:
        return cls()

    async def open(self) -> None:
        await self._misbehave("open")

    async def aclose(self) -> None:
        await self._misbehave("aclose")

    async def describe(self, namespace: str, canonical: bytes, /) -> None:
        await self._misbehave("describe")

    async def _misbehave(self, call: str) -> None:
        type(self).calls += call not in ("open", "describe", "aclose")
        if self.fault == f"{call} hangs":
            await asyncio.Event().wait()
        while self.fault == f"{call} refuses to be cancelled":
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass
        if self.fault == f"{call} fails":
            raise BackendError("the shelf fell")
        if self.fault == f"{call} breaks its contract":
            raise ZeroDivisionError

    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        await self._misbehave("contains")
        return [len(self.objects[key]) if key in self.objects else None for key in keys]

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        await self._misbehave("get")
        results: list[ReadResult] = []
        for read in reads:
            stored = self.objects.get(read.key)
            if stored is None:
                results.append(Miss())
                continue
            if self.fault == "get reports an error":
                results.append(BackendError("unreadable"))
                continue
            if self.fault == "get lies":
                stored = stored[:-1] + bytes([stored[-1] ^ 1])
                stored = stored[:4200] + b"?" + stored[4201:]
            at = 0
            for region in read.regions:
                part = stored[at : at + region.nbytes]
                region[: len(part)] = part
                at += len(part)
            results.append(Hit(at))
        return results

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        await self._misbehave("put")
        if self.fault == "put reports an error":
            return [BackendError("full") for _ in writes]
        if self.fault == "put has no room":
            return [NoRoomError("full, and well") for _ in writes]
        for write in writes:
            self.objects[write.key] = b"".join(write.regions)
        return [None] * len(writes)

    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        await self._misbehave("delete")
        for key in keys:
            self.objects.pop(key, None)
        return [None] * len(keys)

    async def touch(self, keys: Sequence[ObjectKey], /) -> None:
        await self._misbehave("touch")

    async def list(self, prefix: str = "", /) -> AsyncIterator[Listed]:
        await self._misbehave("list")
        for key, stored in self.objects.items():
            yield Listed(key, len(stored), 0.0)


@pytest.fixture
def shelf() -> type[Shelf]:
    """A fresh shelf for one test."""
    return type("FreshShelf", (Shelf,), {"objects": {}, "fault": "", "calls": 0})


@asynccontextmanager
async def _open(
    shelf: type[Shelf],
    *,
    write: Any = "through",
    max_inflight: int = 4,
    host: str = "1MiB",
    **more: Any,
) -> AsyncIterator[Cache]:
    # Short only where it is meant to pass: a busy machine must not turn an error into a deadline.
    deadline = 0.05 if shelf.fault.endswith("hangs") or more.pop("hurry", False) else 30.0
    settings = CacheConfig(
        model=more.pop("model", ModelConfig(weights=WEIGHTS)),
        tiers=(
            TierConfig(url=f"cpu://?capacity={host}"),
            TierConfig(
                url="shelf://",
                write=write,
                deadline_seconds=deadline,
                max_inflight=max_inflight,
                pause_seconds=0.001,
                retries=0,
            ),
        ),
        tokens_per_chunk=16,
        **more,
    )
    backends = BACKENDS.extended({"shelf": shelf})
    async with Cache.open(settings, layout(), backends=backends) as cache:
        yield cache


async def _let_go(cache: Cache) -> None:
    """Some turns of the loop later nothing is held any more."""
    for _ in range(100):
        await asyncio.sleep(0)
    assert cache.control.stats().tiers[0].pinned_nbytes == 0
    assert cache.control.stats().inflight == 0


LOADS = {
    "get hangs": Cause.DEADLINE,
    "get fails": Cause.TIER_DOWN,
    "get breaks its contract": Cause.TIER_DOWN,
    "get reports an error": Cause.TIER_DOWN,
    "get lies": Cause.CORRUPT,
}


@pytest.mark.parametrize("fault", LOADS)
@pytest.mark.asyncio
async def test_a_load_from_a_faulty_tier_is_a_miss_with_its_cause(
    shelf: type[Shelf], fault: str
) -> None:
    engine, other = Engine(layout(), 32, 1), Engine(layout(), 32, 2)
    prompt, slots = tokens(64), engine.slots(64)
    async with _open(shelf, hurry=fault == "get hangs") as cache:
        await cache.store(prompt, engine.view(slots))
        while cache.control.stats().inflight:  # noqa: ASYNC110  # flush has a deadline
            await asyncio.sleep(0)
        assert await cache.control.evict(prompt[:32], tier="cpu") == 2
        shelf.fault = fault
        async with cache.lookup(prompt) as hit:
            report = await cache.retrieve(hit, other.view(slots))
        assert report.tokens == 0
        assert [failure.cause for failure in report.failed] == [LOADS[fault]]
        assert cache.control.stats().tiers[1].misses[LOADS[fault]] >= 1
        await _let_go(cache)
        assert cache.control.health().ok is (LOADS[fault] is Cause.CORRUPT)

        shelf.fault = ""  # it recovers without a restart
        while not cache.stack.lower[0].guard.serves:  # noqa: ASYNC110  # a probe finds out
            await asyncio.sleep(0)
        await cache.store(prompt, engine.view(slots))
        async with cache.lookup(prompt) as hit:
            assert (await cache.retrieve(hit, other.view(slots))).tokens == 64
        assert cache.control.health().ok
    assert same(engine.read(slots), other.read(slots))


STORES = ["put hangs", "put fails", "put breaks its contract", "put reports an error"]


@pytest.mark.parametrize("fault", STORES)
@pytest.mark.asyncio
async def test_a_store_to_a_faulty_tier_reports_it_and_serves_from_the_host(
    shelf: type[Shelf], fault: str
) -> None:
    engine, other = Engine(layout(), 32, 1), Engine(layout(), 32, 2)
    prompt, slots = tokens(64), engine.slots(64)
    shelf.fault = fault
    async with _open(shelf, close_seconds=0.05) as cache:
        report = await cache.store(prompt, engine.view(slots))
        assert report.stored == 4
        assert len(report.failed) == 4
        causes = {failure.cause for failure in report.failed}
        if fault == "put hangs":  # what waited behind it is refused
            assert Cause.DEADLINE in causes
            causes.discard(Cause.DEADLINE)
        assert causes <= {Cause.TIER_DOWN}
        async with cache.lookup(prompt) as hit:
            assert (await cache.retrieve(hit, other.view(slots))).tokens == 64
    assert same(engine.read(slots), other.read(slots))
    assert shelf.objects == {}


@pytest.mark.parametrize("fault", ["hangs", "fails", "breaks its contract"])
@pytest.mark.parametrize("call", ["contains", "touch", "list"])
@pytest.mark.asyncio
async def test_a_question_a_tier_does_not_answer_is_no_error(
    shelf: type[Shelf], call: str, fault: str
) -> None:
    engine = Engine(layout(), 32, 1)
    prompt, slots = tokens(64), engine.slots(64)
    shelf.capabilities = frozenset({Capability.SHARED, Capability.LIST})
    shelf.fault = f"{call} {fault}"
    async with _open(shelf) as cache:
        await cache.store(prompt, engine.view(slots))
        async with cache.lookup(prompt) as hit:
            assert hit.tokens == 64
        async with cache.lookup(tokens(64, 1)) as hit:
            assert hit.tokens == 0
        if call == "contains":
            explained = await cache.control.explain(tokens(64, 1))
            assert [miss.cause for miss in explained.misses] == [Cause.TIER_DOWN]


@in_virtual_time
async def test_a_tier_that_hangs_is_not_given_more_than_its_bound(shelf: type[Shelf]) -> None:
    engine = Engine(layout(), 64, 1)
    async with _open(shelf, close_seconds=0.05, hurry=True) as cache:
        shelf.fault = "put hangs"
        for seed in range(8):
            await cache.store(tokens(64, seed), engine.view(engine.slots(64, seed=seed)))
        assert shelf.calls <= 4  # max_inflight
        report = await cache.store(tokens(64, 9), engine.view(engine.slots(64)))
        assert {failure.cause for failure in report.failed} <= {Cause.BUSY, Cause.TIER_DOWN}
        assert len(report.failed) == 4
        async with cache.lookup(tokens(64, 9)) as hit:
            assert hit.tokens == 64
    assert shelf.objects == {}


@in_virtual_time
async def test_flush_does_not_wait_for_a_tier_that_hangs(shelf: type[Shelf]) -> None:
    engine = Engine(layout(), 32, 1)
    shelf.fault = "put hangs"
    async with _open(shelf, write="back", close_seconds=0.05) as cache:
        await cache.store(tokens(64), engine.view(engine.slots(64)))
        async with asyncio.timeout(HANG):
            await cache.flush()
        # One was being written, three waited for their turn and do so on.
        tier = cache.control.stats().tiers[1]
        assert (tier.misses, tier.queued) == ({Cause.DEADLINE: 1}, 3)
        assert not cache.control.health().ok


@in_virtual_time
async def test_flush_waits_past_the_deadline_while_a_tier_makes_progress(
    shelf: type[Shelf],
) -> None:
    class Slow(shelf):  # type: ignore[misc, valid-type]
        async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
            await asyncio.sleep(0.02)  # four in a row are longer than the deadline
            return await super().put(writes)

    engine = Engine(layout(), 32, 1)
    async with _open(Slow, write="back", max_inflight=1, hurry=True) as cache:
        await cache.store(tokens(128), engine.view(engine.slots(128)))
        began = asyncio.get_running_loop().time()
        await cache.flush()
        assert len(shelf.objects) == 8
        assert asyncio.get_running_loop().time() - began > 0.1  # twice the deadline


@pytest.mark.parametrize("write", ["through", "back", "demote"])
@in_virtual_time
async def test_a_store_does_not_wait_for_a_tier_that_takes_nothing(
    shelf: type[Shelf], write: str
) -> None:
    """One that is well, answers at once, and has no room: its answers are no progress."""
    engine, other = Engine(layout(), 64, 1), Engine(layout(), 64, 2)
    async with _open(shelf, write=write, host="32KiB") as cache:
        shelf.fault = "put has no room"
        for seed in range(4):  # four objects each, and eight fit
            slots = engine.slots(64, seed=seed)
            report = await cache.store(tokens(64, seed), engine.view(slots))
            assert (report.stored, report.dropped) == (4, 0)
        assert shelf.calls < 200  # not again and again
        async with cache.lookup(tokens(64, 3)) as hit:
            assert (await cache.retrieve(hit, other.view(slots))).tokens == 64
        assert same(engine.read(slots), other.read(slots))


@pytest.mark.parametrize("call", ["describe", "touch"])
@in_virtual_time
async def test_a_hint_that_hangs_does_not_keep_the_tiers_only_turn(
    shelf: type[Shelf], call: str
) -> None:
    engine = Engine(layout(), 32, 1)
    prompt, slots = tokens(64), engine.slots(64)
    shelf.fault = f"{call} hangs"
    async with _open(shelf, max_inflight=1, close_seconds=0.05) as cache:
        calls = cache.stack.lower[0].guard._calls
        hints = dict(calls)  # what was told when it opened
        await cache.store(prompt, engine.view(slots))
        hints |= calls
        assert hints  # the tier's only turn is taken
        async with asyncio.timeout(1):
            for hint in hints:
                await hint.ended()  # the hint's deadline passes
            shelf.fault = ""
            while len(shelf.objects) < 4:  # one write tries first, if the pause has passed
                await cache.store(prompt, engine.view(slots))
                await asyncio.sleep(0.001)
        assert (await cache.store(tokens(64, 1), engine.view(slots))).failed == ()
        assert len(shelf.objects) == 8


@pytest.mark.parametrize("call", ["open", "list", "contains", "touch", "describe", "aclose"])
def test_a_tier_that_refuses_to_be_cancelled_holds_nobody_up(shelf: type[Shelf], call: str) -> None:
    """Neither whoever waits for its answer nor the close; what it was told is left behind."""
    shelf.capabilities = frozenset({Capability.SHARED, Capability.LIST})
    shelf.fault = f"{call} refuses to be cancelled"

    async def use() -> None:
        engine = Engine(layout(), 32, 1)
        async with _open(shelf, hurry=True, close_seconds=0.05) as cache:
            await cache.store(tokens(64), engine.view(engine.slots(64)))
            async with cache.lookup(tokens(64)) as hit:
                assert hit.tokens == 64
            async with cache.lookup(tokens(64, 1)) as hit:
                assert hit.tokens == 0
            if call == "list":
                with pytest.raises(BackendError, match="did not say what it holds"):
                    await cache.control.clear()
            lower = cache.stack.lower[0]
        if call in ("list", "aclose"):
            words = {"list": "within 0.05 s", "aclose": "not closed: TimeoutError"}[call]
            assert words in lower.trouble

    loop = VirtualTimeLoop()  # asyncio.run would wait for what was left behind
    try:
        if call == "open":
            with pytest.raises(BackendTimeoutError, match="shelf did not open within"):
                loop.run_until_complete(asyncio.wait_for(use(), HANG))
        else:
            loop.run_until_complete(asyncio.wait_for(use(), HANG))
    finally:
        shelf.fault = ""  # it ends when it is cancelled once more
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@pytest.mark.parametrize("fault", ["hangs", "fails", "breaks its contract"])
@pytest.mark.asyncio
async def test_a_tier_that_cannot_be_closed_does_not_stop_the_close(
    shelf: type[Shelf], fault: str
) -> None:
    engine = Engine(layout(), 32, 1)
    shelf.fault = f"aclose {fault}"
    async with asyncio.timeout(HANG), _open(shelf, close_seconds=0.05) as cache:
        await cache.store(tokens(64), engine.view(engine.slots(64)))
    assert len(shelf.objects) == 4


@pytest.mark.asyncio
async def test_a_tier_that_does_not_open_in_time_is_an_error_that_names_it(
    shelf: type[Shelf],
) -> None:
    shelf.fault = "open hangs"
    with pytest.raises(BackendTimeoutError, match="shelf did not open within") as caught:
        async with asyncio.timeout(HANG), _open(shelf):
            pass
    assert caught.value.hint


@pytest.mark.parametrize("fault", ["hangs", "fails", "breaks its contract"])
@pytest.mark.parametrize("call", ["delete", "list"])
@pytest.mark.asyncio
async def test_a_tier_that_cannot_be_emptied_is_reported_and_the_others_are(
    shelf: type[Shelf], call: str, fault: str
) -> None:
    engine = Engine(layout(), 32, 1)
    shelf.capabilities = frozenset({Capability.SHARED, Capability.LIST})
    async with _open(shelf, hurry=fault == "hangs") as cache:
        await cache.store(tokens(64), engine.view(engine.slots(64)))
        await cache.recovered()
        await cache.flush()
        shelf.fault = f"{call} {fault}"
        async with asyncio.timeout(HANG):
            # What is known to be there is deleted even if the tier cannot list; host memory, too.
            left = "4 of 4 objects are left" if call == "delete" else "did not say what it holds"
            gone = 4 if call == "delete" else 8
            with pytest.raises(BackendError, match=f"^{gone} objects were removed.*{left}"):
                await cache.control.clear()
            assert not cache.control.health().ok
            if call == "delete":
                with pytest.raises(BackendError, match=left):
                    await cache.control.evict(tokens(64))
            else:
                await cache.control.evict(tokens(64))


@pytest.mark.asyncio
async def test_a_store_waits_for_what_another_store_is_writing_through(
    shelf: type[Shelf],
) -> None:
    began, gate = asyncio.Event(), asyncio.Event()

    class Gated(shelf):  # type: ignore[misc, valid-type]
        async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
            began.set()
            await gate.wait()
            return await super().put(writes)

    engine = Engine(layout(), 32, 1)
    view = engine.view(engine.slots(64))
    async with _open(Gated) as cache:
        first = asyncio.ensure_future(cache.store(tokens(64), view))
        await began.wait()
        second = asyncio.ensure_future(cache.store(tokens(64), view))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not second.done()
        gate.set()
        assert ((await first).stored, (await second).skipped) == (4, 4)
        assert len(shelf.objects) == 4


@pytest.mark.asyncio
async def test_a_tier_that_outlives_the_process_and_cannot_list_is_asked(
    shelf: type[Shelf],
) -> None:
    shelf.capabilities = frozenset({Capability.PERSISTENT})
    engine = Engine(layout(), 32, 1)
    async with _open(shelf) as cache:
        await cache.store(tokens(64), engine.view(engine.slots(64)))
    async with _open(shelf) as cache, cache.lookup(tokens(64)) as hit:
        assert hit.tokens == 64


@in_virtual_time  # or a probe that nobody waits for could be counted, too
async def test_a_lookup_waits_once_for_a_tier_that_does_not_answer(shelf: type[Shelf]) -> None:
    shelf.fault = "contains hangs"
    async with _open(shelf) as cache, cache.lookup(tokens(72)) as hit:
        assert hit.tokens == 0
        assert shelf.calls == 1


@pytest.mark.parametrize("fault", ["get fails", "get reports an error", "get lies"])
@pytest.mark.asyncio
async def test_what_one_tier_cannot_deliver_the_next_one_does(
    shelf: type[Shelf], fault: str
) -> None:
    second = type("SecondShelf", (Shelf,), {"objects": {}, "fault": "", "calls": 0})
    settings = CacheConfig(
        model=ModelConfig(weights=WEIGHTS),
        tiers=(
            TierConfig(url="cpu://?capacity=1MiB"),
            TierConfig(url="shelf://", write="through", deadline_seconds=30.0),
            TierConfig(url="second://", write="through", deadline_seconds=30.0),
        ),
        tokens_per_chunk=16,
    )
    engine, other = Engine(layout(), 32, 1), Engine(layout(), 32, 2)
    slots = engine.slots(64)
    backends = BACKENDS.extended({"shelf": shelf, "second": second})
    async with Cache.open(settings, layout(), backends=backends) as cache:
        await cache.store(tokens(64), engine.view(slots))
        await cache.control.evict(tokens(64), tier="cpu")
        shelf.fault = fault
        async with cache.lookup(tokens(64)) as hit:
            assert (await cache.retrieve(hit, other.view(slots))).tokens == 64
        second.fault = fault
        await cache.control.evict(tokens(64), tier="cpu")
        async with cache.lookup(tokens(64)) as hit:
            assert (await cache.retrieve(hit, other.view(slots))).tokens == 0
    assert same(engine.read(slots), other.read(slots))


@pytest.mark.parametrize(
    "says", [SystemExit(3), ValueError("?"), "many", True, float("nan"), None], ids=str
)
@in_virtual_time
async def test_figures_that_a_tier_cannot_give_are_none(shelf: type[Shelf], says: object) -> None:
    def figure(_: Shelf) -> object:
        if isinstance(says, BaseException):
            raise says
        return says

    class Vague(shelf):  # type: ignore[misc, valid-type]
        used_nbytes = capacity_nbytes = policies_replaced = left_unfinished = property(figure)

    async with _open(Vague) as cache:
        stats = cache.control.stats().tiers[1]
        assert (stats.used_nbytes, stats.capacity_nbytes) == (0, None)
        assert (stats.policies_replaced, stats.left_unfinished) == (0, 0)


@in_virtual_time
async def test_a_namespace_that_cannot_be_read_hides_no_other(shelf: type[Shelf]) -> None:
    described: dict[str, bytes] = {}

    class Described(shelf):  # type: ignore[misc, valid-type]
        async def describe(self, namespace: str, canonical: bytes, /) -> None:
            described[namespace] = canonical

        async def namespaces(self) -> dict[str, bytes]:
            return {"00" * 32: b"of a later release", **described}

    engine = Engine(layout(), 32)
    async with _open(
        Described, model=ModelConfig(weights=WEIGHTS, compute_dtype="float32")
    ) as cache:
        await cache.store(tokens(32), engine.view(engine.slots(32)))
        await cache.flush()
    async with _open(Described) as cache:
        (missed,) = (await cache.control.explain(tokens(32))).misses
        assert missed.cause is Cause.OTHER_NAMESPACE
        assert "compute_dtype" in missed.detail


@pytest.mark.parametrize(
    "error", [ConnectionError("refused"), TimeoutError("its own"), StopIteration(), SystemExit(3)]
)
@in_virtual_time
async def test_whatever_opening_a_tier_raises_is_an_error_of_ours(
    shelf: type[Shelf], error: BaseException
) -> None:
    class Shut(shelf):  # type: ignore[misc, valid-type]
        async def open(self) -> None:
            raise error

    with pytest.raises(KVLayerError, match=type(error).__name__):
        async with _open(Shut):
            pass

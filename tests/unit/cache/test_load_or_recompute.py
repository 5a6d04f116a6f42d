"""A tier is used while loading from it beats computing anew, and no request pays twice.

In virtual time: the tier takes exactly what it is told to, computing costs what was reported.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from caches import layout, tokens
from engine import Engine, same
from sick import DEADLINE, PAUSE, Patient, send_down, timed, ward

from kvlayer import Cache, Cause, KVLayout
from kvlayer.bench.sick import Sickness
from kvlayer.layout import NHD, STATE_BLOCKS, AttentionKind, GroupLayout, HitRule, KVGroup, KVView
from kvlayer.results import RetrieveReport
from kvlayer.testing.sim import in_virtual_time
from kvlayer.tier.guard.guard import Lane

RATE = 1000.0  # tokens per second: a chunk of 16 takes 16 ms, the prompt of 64 takes 64 ms
PROMPT = tokens(64)
ONE_AT_A_TIME = {"max_inflight": 2}  # a turn for reads, and one for writes
MEMORY = 60.0  # seconds that an estimate is believed


class Request:
    """Lookups and loads of one prompt into a second engine."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.engine, self.other = Engine(layout(), 32, 1), Engine(layout(), 32, 2)
        self.slots = self.engine.slots(64)

    async def hit(self) -> int:
        async with self.cache.lookup(PROMPT) as hit:
            return hit.tokens

    async def load(self, **how: Any) -> RetrieveReport:
        async with self.cache.lookup(PROMPT) as hit:
            report = await self.cache.retrieve(hit, self.other.view(self.slots), **how)
        read = self.slots[: report.tokens]
        assert same(self.engine.read(read), self.other.read(read))
        return report

    async def forget(self, *chunks: int) -> None:
        """Leave these chunks to the tier alone; all of them, if none is named."""
        await self.settled()
        planner = self.cache.stack.planner
        with planner.lock:
            path = planner.match(self.cache.chain(PROMPT, self.scope)).path()
            planner.evict([path[i] for i in chunks] if chunks else path, Cause.CLEARED, "")

    async def settled(self) -> None:
        await settled(self.cache)
        assert self.cache.control.stats().tiers[0].pinned_nbytes == 0

    @property
    def scope(self) -> Any:
        from kvlayer import Scope

        return Scope()


async def settled(cache: Cache) -> None:
    """Wait until nothing is in flight; leases that have run out are dropped."""
    while cache.stack.inflight:  # noqa: ASYNC110  # time is virtual
        await asyncio.sleep(0.01)
    async with cache.lookup(tokens(1)):
        pass


async def explained(cache: Cache) -> list[tuple[int, int, Cause]]:
    report = await cache.control.explain(PROMPT)
    return [(miss.start, miss.stop, miss.cause) for miss in report.misses]


def gets(patient: type[Patient]) -> int:
    return sum(name == "get" for name, _ in patient.calls)


@in_virtual_time
async def test_the_first_load_teaches_and_the_next_lookup_knows_better() -> None:
    """Nobody knows what computing costs: all is loaded. Then somebody says."""
    patient = Patient.fresh()
    async with ward(patient) as cache:
        request = Request(cache)
        await send_down(cache, [0], request.engine)
        patient.latency = 1.5
        seconds, report = await timed(request.load())
        assert (seconds, report.tokens) == (pytest.approx(1.5), 64)
        stats = cache.control.stats()
        assert stats.prefill_tokens_per_second is None
        assert stats.tiers[1].bytes_per_second == pytest.approx(4 * 4096 / 1.5)
        await request.forget()
        assert await request.hit() == 64
        cache.report_prefill(1000, 1000 / RATE)
        before = gets(patient)
        assert await request.hit() == 0
        seconds, report = await timed(request.load())
        assert (seconds, report.tokens, report.failed) == (0.0, 0, ())
        assert gets(patient) == before
        assert await explained(cache) == [(0, 64, Cause.SLOW)]
        details = [miss.detail for miss in (await cache.control.explain(PROMPT)).misses]
        assert details == ["computing it takes 0.016 s, which loading would not beat"]
        assert cache.control.health().ok  # slow is not ill


@in_virtual_time
async def test_a_tier_that_is_faster_than_computing_is_used_to_the_end() -> None:
    patient = Patient.fresh()
    async with ward(patient, prefill_tokens_per_second=RATE) as cache:
        request = Request(cache)
        await send_down(cache, [0], request.engine)
        patient.latency = 0.05
        for _ in range(3):
            seconds, report = await timed(request.load())
            assert (seconds, report.tokens) == (pytest.approx(0.05), 64)
            await request.forget()


@in_virtual_time
async def test_what_pays_for_many_chunks_does_not_pay_for_few() -> None:
    """Latency is paid once: 50 ms are worth 64 tokens, not the last 32."""
    patient = Patient.fresh()
    async with ward(patient, prefill_tokens_per_second=RATE) as cache:
        request = Request(cache)
        await send_down(cache, [0], request.engine)
        patient.latency = 0.05
        await request.load()
        await request.forget()
        assert await request.hit() == 64
        # The estimate has seen loads of one size: of half of it, it expects half the time.
        await request.load()
        await request.forget(2, 3)
        seconds, report = await timed(request.load())
        assert report.tokens == 32  # 25 ms were worth trying; 50 were not worth waiting for
        assert seconds == pytest.approx(0.032)
        await request.forget(2, 3)
        assert await request.hit() == 32
        assert await explained(cache) == [(32, 64, Cause.SLOW)]


@pytest.mark.parametrize(("latency", "hit"), [(0.03, 64), (0.1, 0)])
@in_virtual_time
async def test_host_memory_behind_a_slow_chunk_counts_when_it_is_worth_it(
    latency: float, hit: int
) -> None:
    patient = Patient.fresh()
    async with ward(patient) as cache:
        request = Request(cache)
        await send_down(cache, [0], request.engine)
        await request.load()
        await request.forget(0)
        patient.latency = latency
        await request.load()  # one chunk takes that long
        await request.forget(0)
        cache.report_prefill(1000, 1000 / RATE)
        # The first chunk alone would not be worth 30 ms; the three behind it make it so.
        assert await request.hit() == hit
        if not hit:
            assert await explained(cache) == [(0, 16, Cause.SLOW)]
        seconds, report = await timed(request.load())
        assert (seconds, report.tokens) == (pytest.approx(latency if hit else 0), hit)


@in_virtual_time
async def test_a_load_is_abandoned_when_it_has_cost_as_much_as_computing_would() -> None:
    patient = Patient.fresh()
    async with ward(patient, tier=ONE_AT_A_TIME, prefill_tokens_per_second=RATE) as cache:
        request = Request(cache)
        await send_down(cache, [0], request.engine)
        patient.latency = 0.03  # a chunk; computing it would take 0.016
        seconds, report = await timed(request.load())
        assert seconds == pytest.approx(0.064)  # as long as computing all of it
        assert report.tokens == 32  # what had arrived by then is used, and is right
        (failure,) = report.failed
        assert (failure.span.start, failure.cause) == (32, Cause.DEADLINE)
        assert "longer than it was worth" in failure.detail
        await request.settled()  # what was on its way has let go
        stats = cache.control.stats()
        assert (stats.leases, stats.tiers[1].orphans) == (0, 0)
        assert stats.tiers[0].used_nbytes == 2 * 4096
        assert stats.tiers[1].reads == "closed"  # something arrived: the tier is slow, not dead
        assert await request.hit() == 32  # what is in host memory
        assert await explained(cache) == [(32, 64, Cause.SLOW)]


@in_virtual_time
async def test_a_load_that_was_abandoned_before_anything_came_taught_something_too() -> None:
    patient = Patient.fresh()
    async with ward(patient, prefill_tokens_per_second=RATE) as cache:
        request = Request(cache)
        await send_down(cache, [0], request.engine)
        patient.falls(Sickness.DEAD)
        taken: list[float] = []
        for _ in range(20):
            taken.append((await timed(request.load()))[0])
            await asyncio.sleep(0.4)
        assert taken[0] == pytest.approx(0.064)
        assert sum(seconds > 0 for seconds in taken) == 1  # far from a deadline, and only once
        patient.falls(Sickness.HEALTHY)


@in_virtual_time
async def test_a_dead_tier_whose_loads_are_always_given_up_early_is_found_out() -> None:
    """Requests of different prompts, each with less patience than half a deadline."""
    patient = Patient.fresh()
    async with ward(patient) as cache:
        request = Request(cache)
        await send_down(cache, [0], request.engine)
        patient.falls(Sickness.DEAD)
        states = []
        for _ in range(6):
            await timed(request.load(deadline=0.01))
            states.append(cache.control.stats().tiers[1].reads)
            await request.settled()
        assert states == ["closed"] * 4 + ["open"] * 2
        (miss,) = (await cache.control.explain(PROMPT)).misses
        assert miss.cause is Cause.TIER_DOWN
        detail = cache.control.health().tiers[1].detail
        assert "nothing arrived while it was waited for" in detail
        patient.falls(Sickness.HEALTHY)
        await asyncio.sleep(2 * PAUSE)
        assert (await request.load()).tokens == 64
        assert cache.control.health().ok


@in_virtual_time
async def test_a_tier_that_became_fast_again_is_tried_when_the_estimate_is_forgotten() -> None:
    patient = Patient.fresh()
    async with ward(patient, prefill_tokens_per_second=RATE) as cache:
        request = Request(cache)
        await send_down(cache, [0], request.engine)
        patient.latency = 1.0
        await request.load()
        await request.settled()
        learnt = asyncio.get_running_loop().time()
        patient.latency = 0.0
        while await request.hit() == 0:  # noqa: ASYNC110  # as requests come
            await asyncio.sleep(1)
        assert asyncio.get_running_loop().time() - learnt == pytest.approx(MEMORY, abs=1.5)
        seconds, report = await timed(request.load())
        assert (seconds, report.tokens) == (0.0, 64)
        await request.forget()
        patient.latency = 0.01
        for _ in range(3):
            assert (await request.load()).tokens == 64
            await request.forget()


@in_virtual_time
async def test_a_prefetch_loads_at_any_price_and_what_it_learns_counts() -> None:
    """Nobody waits for it, so it has all the time a tier may take."""
    patient = Patient.fresh()
    async with ward(patient, prefill_tokens_per_second=RATE) as cache:
        request = Request(cache)
        await send_down(cache, [0], request.engine)
        patient.latency = 1.5
        await request.load()
        assert await request.hit() == 0
        seconds, report = await timed(_awaited(cache.prefetch(PROMPT, deadline=10)))
        assert (seconds, report.tokens) == (pytest.approx(1.5), 64)
        async with cache.lookup(PROMPT) as hit:
            assert hit.by_tier == {"cpu": 64, "sick": 0}
        await asyncio.sleep(11)
        await request.forget()
        patient.latency = 0.001
        for _ in range(30):  # the estimate follows what loads take now
            await _awaited(cache.prefetch(PROMPT, deadline=0.001))
            await asyncio.sleep(0.01)
            await request.load()
            await request.forget()
        assert await request.hit() == 64
        pin = await cache.control.pin(PROMPT, seconds=1)
        assert pin.tokens == 64


async def _awaited(job: Any) -> Any:
    return await job


@pytest.mark.parametrize("deadline", [0.0, 0.01, 0.5, 1.5, 5.0])
@in_virtual_time
async def test_a_caller_may_have_less_patience_than_the_tier_is_given(deadline: float) -> None:
    patient = Patient.fresh()
    async with ward(patient) as cache:
        request = Request(cache)
        await send_down(cache, [0], request.engine)
        patient.is_stubborn = True
        patient.falls(Sickness.DEAD)
        seconds, report = await timed(request.load(deadline=deadline))
        assert seconds == pytest.approx(min(deadline, DEADLINE))
        assert report.tokens == 0
        assert [failure.cause for failure in report.failed] == [Cause.DEADLINE]
        # Given most of its time, the tier has failed; given little, nobody knows.
        is_blamed = deadline >= DEADLINE / 2
        assert cache.stack.lower[0].guard.breaker(Lane.READS).is_closed is not is_blamed
        patient.falls(Sickness.HEALTHY)
        await request.settled()


@in_virtual_time
async def test_a_callers_deadline_ends_a_slow_load_at_what_has_arrived() -> None:
    patient = Patient.fresh()
    async with ward(patient, tier=ONE_AT_A_TIME) as cache:
        request = Request(cache)
        await send_down(cache, [0], request.engine)
        patient.latency = 0.3
        seconds, report = await timed(request.load(deadline=1.0))
        assert (seconds, report.tokens) == (pytest.approx(1.0), 48)
        await request.settled()
        assert (await request.load()).tokens == 64


# -- windows and states --------------------------------------------------------------------------


def hybrid() -> KVLayout:
    """Full attention, a window of 20 tokens and a state."""
    full = KVGroup(AttentionKind.MHA, (0, 3), "bfloat16", 2, 8)
    trailing: Any = {"hit_rule": HitRule.TRAILING}
    window = KVGroup(AttentionKind.MHA, (1, 4), "bfloat16", 2, 8, window_tokens=20, **trailing)
    state = KVGroup(
        AttentionKind.STATE, (2,), "float32", window_tokens=1, state_nbytes=64, **trailing
    )
    groups = [(full, NHD), (window, NHD), (state, STATE_BLOCKS)]
    return KVLayout(tuple(GroupLayout(group, axes, 4) for group, axes in groups))


class Hybrid:
    """A prompt of a hybrid model whose every object is on the tier."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.engine, self.other = Engine(hybrid(), 32, 1), Engine(hybrid(), 32, 2)
        self.slots = self.engine.slots(64)

    async def send_down(self) -> None:
        await self.cache.store(PROMPT, self.engine.view(self.slots))
        await self.evict(0, 1, 2, 3)

    async def evict(self, *chunks: int) -> None:
        """Take every group of these chunks out of host memory."""
        await settled(self.cache)
        planner = self.cache.stack.planner
        with planner.lock:
            for record in list(planner.directory.objects()):
                prompt = self.cache.chain(PROMPT, Request(self.cache).scope)
                if prompt.hashes.index(record.chunk.hash) in chunks:
                    planner.evict([record], Cause.CLEARED, "")

    async def load(self, **how: Any) -> int:
        view = KVView(self.other.caches, [self.slots] * 3)
        async with self.cache.lookup(PROMPT) as hit:
            tokens = (await self.cache.retrieve(hit, view, **how)).tokens
        read = self.slots[:tokens]
        theirs, mine = self.engine.read(read), self.other.read(read)
        assert same(theirs[:4], mine[:4])  # full attention: every token
        assert same([p[-20:] for p in theirs[4:]], [p[-20:] for p in mine[4:]])  # the window
        return tokens


@in_virtual_time
async def test_a_hybrid_hit_is_cut_where_its_shorter_window_is_there_and_worth_it() -> None:
    patient = Patient.fresh()
    async with ward(patient, kv=hybrid()) as cache:
        model = Hybrid(cache)
        await model.send_down()
        assert await model.load() == 64
        # Host memory has the first two chunks of full attention only: their windows and states
        # were not needed for the hit that ended later.
        await model.evict(2, 3)
        patient.latency = 0.03
        assert await model.load() == 64
        cache.report_prefill(1000, 1000 / RATE)
        await model.evict(2, 3)
        async with cache.lookup(PROMPT) as hit:
            assert hit.tokens == 64  # 30 ms for what takes 32 to compute
        patient.latency = 0.2
        await cache.prefetch(PROMPT, deadline=0.001)
        await asyncio.sleep(0.01)
        await model.evict(2, 3)
        assert await model.load() == 0  # a shorter one would need another window from the tier
        explanation = await cache.control.explain(PROMPT)
        assert {miss.cause for miss in explanation.misses} == {Cause.SLOW}


@in_virtual_time
async def test_a_hybrid_hit_whose_first_chunks_are_whole_in_host_memory_ends_there() -> None:
    patient = Patient.fresh()
    async with ward(patient, kv=hybrid()) as cache:
        model = Hybrid(cache)
        await cache.store(PROMPT, model.engine.view(model.slots))
        await model.evict(2, 3)
        patient.latency = 0.2
        await cache.prefetch(PROMPT, deadline=0.001)
        await asyncio.sleep(0.01)
        await model.evict(2, 3)
        cache.report_prefill(1000, 1000 / RATE)
        seconds, got = await timed(model.load())
        assert (seconds, got) == (0.0, 32)


@pytest.mark.parametrize("patience", [0.0, 0.02, 0.05, 0.07, 0.1, 0.2, 0.3, 1.0])
@in_virtual_time
async def test_a_hybrid_load_that_is_abandoned_leaves_a_correct_prefix(patience: float) -> None:
    """Whatever had arrived: ``Hybrid.load`` compares the bytes, the window's included."""
    patient = Patient.fresh()
    async with ward(patient, kv=hybrid(), tier=ONE_AT_A_TIME) as cache:
        model = Hybrid(cache)
        await model.send_down()
        patient.latency = 0.02
        got = await model.load(deadline=patience)
        assert got == (64 if patience > 7 * 0.02 else 0)  # 4 of full attention, 2, and a state
        await settled(cache)
        stats = cache.control.stats()
        assert (stats.tiers[0].pinned_nbytes, stats.leases) == (0, 0)

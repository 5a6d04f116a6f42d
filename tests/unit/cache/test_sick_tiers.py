"""A dead, slow or flapping tier costs one request one deadline, and those after it nothing.

All of it in virtual time: "nothing" is exactly nothing, and a deadline is exactly a deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from caches import layout, tokens
from engine import Engine, same
from sick import DEADLINE, PAUSE, Patient, send_down, timed, ward

from kvlayer import Cache, Cause
from kvlayer.bench.sick import Sickness
from kvlayer.events import Event, TierChanged
from kvlayer.results import TierStats
from kvlayer.testing.sim import in_virtual_time

ILL = [Sickness.DEAD, Sickness.SLOW, Sickness.FLAPPING]
SLACK = 1e-6  # of virtual seconds: sums of deadlines are rounded
REQUESTS = 60
EVERY = 0.4  # seconds from one request to the next


class Requests:
    """Requests of one kind; each call is the next request and returns its virtual seconds."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.engine, self.other = Engine(layout(), 32, 1), Engine(layout(), 32, 2)
        self.slots = self.engine.slots(64)
        self.number = 0
        self.got: list[int] = []

    def new(self) -> Any:
        """A prompt that no one has asked for."""
        self.number += 1
        return tokens(64, 1000 + self.number)

    async def lookup(self) -> None:
        async with self.cache.lookup(self.new()) as hit:
            self.got.append(hit.tokens)

    async def retrieve(self) -> None:
        """Of a prompt that only the tiers have."""
        prompt = tokens(64)
        await self._forget()
        async with self.cache.lookup(prompt) as hit:
            report = await self.cache.retrieve(hit, self.other.view(self.slots))
        self.got.append(report.tokens)
        read = self.slots[: report.tokens]
        assert same(self.engine.read(read), self.other.read(read))

    async def prefetch(self) -> None:
        await self._forget()
        await self.cache.prefetch(tokens(64), deadline=0.001)

    async def store(self) -> None:
        report = await self.cache.store(self.new(), self.engine.view(self.slots))
        assert report.stored == 4  # whatever becomes of it below
        self.got.append(4 - len(report.failed))

    async def _forget(self) -> None:
        async with self.cache.lookup(tokens(1)):
            pass  # leases that have run out are dropped at the next call
        with self.cache.stack.planner.lock:
            records = list(self.cache.stack.planner.directory.objects())
            self.cache.stack.planner.evict(records, Cause.CLEARED, "")


def serving(cache: Cache) -> bool:
    return all(tier.guard.serves for tier in cache.stack.lower)


def figures(cache: Cache, tier: int = 1) -> TierStats:
    return cache.control.stats().tiers[tier]


async def let_go(cache: Cache) -> None:
    """Nothing is in flight or held any more."""
    for _ in range(50):
        await asyncio.sleep(0.0001)  # less than any pause, and long enough for threads to end
    async with cache.lookup(tokens(1)):
        pass  # leases that have run out are dropped at the next call
    stats = cache.control.stats()
    assert (stats.tiers[0].pinned_nbytes, stats.inflight) == (0, 0)
    for tier in stats.tiers[1:]:
        assert (tier.inflight, tier.inflight_nbytes, tier.orphans) == (0, 0, 0)


KINDS: dict[str, Callable[[Requests], Callable[[], Awaitable[None]]]] = {
    "lookup": lambda requests: requests.lookup,
    "retrieve": lambda requests: requests.retrieve,
    "prefetch": lambda requests: requests.prefetch,
    "store": lambda requests: requests.store,
}


@pytest.mark.parametrize("is_stubborn", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sickness", ILL)
@in_virtual_time
async def test_a_request_pays_one_deadline_at_most_and_nothing_while_the_tier_is_left_alone(
    sickness: Sickness, kind: str, is_stubborn: bool
) -> None:
    patient = Patient.fresh()
    async with ward(patient) as cache:
        requests = Requests(cache)
        await send_down(cache, [0], requests.engine)
        patient.is_stubborn = is_stubborn
        patient.falls(sickness)
        request, paid = KINDS[kind](requests), 0
        lane = "writes" if kind == "store" else "reads"
        for _ in range(REQUESTS):
            before = getattr(figures(cache), lane)
            seconds, _ = await timed(request())
            # A store waits while its tier makes progress, and a deadline once it makes none.
            assert seconds <= DEADLINE * (2 if kind == "store" else 1) + SLACK
            if before == "open" and lane == "reads":
                assert seconds == 0.0
            paid += seconds > 0
            await asyncio.sleep(EVERY)
        # 60 requests in 24 seconds and more: one pays when it fails first, one per pause after.
        assert 1 <= paid <= 12
        patient.falls(Sickness.HEALTHY)
        await asyncio.sleep(61)  # the longest pause: used again without a restart
        if kind == "store":
            await request()  # writes are tried by writing
        assert serving(cache)
        seconds, _ = await timed(request())
        assert seconds == 0.0
        if kind == "retrieve":
            assert requests.got[-1] == 64
        if kind == "store":
            assert requests.got[-1] == 4
        await let_go(cache)
        assert cache.control.health().ok


@pytest.mark.parametrize("is_stubborn", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@in_virtual_time
async def test_two_dead_tiers_side_by_side_cost_one_deadline(kind: str, is_stubborn: bool) -> None:
    patients = [Patient.fresh("one"), Patient.fresh("two")]
    async with ward(*patients) as cache:
        requests = Requests(cache)
        await send_down(cache, [0], requests.engine)
        for patient in patients:
            patient.is_stubborn = is_stubborn
            patient.falls(Sickness.DEAD)
        request = KINDS[kind](requests)
        taken = [(await timed(request()))[0] for _ in range(10)]
        assert max(taken) <= DEADLINE + SLACK
        if kind in ("lookup", "store"):  # both are asked at once: the first request finds out all
            assert [seconds > 0 for seconds in taken] == [True] + [False] * 9
        else:  # the second tier is asked when the first one is known to be dead
            assert sum(seconds > 0 for seconds in taken) <= 2
            assert taken[-1] == 0
        for patient in patients:
            patient.falls(Sickness.HEALTHY)
        await let_go(cache)


@in_virtual_time
async def test_a_tier_that_lives_serves_beside_one_that_is_dead() -> None:
    dead, alive = Patient.fresh("dead"), Patient.fresh("alive")
    async with ward(dead, alive) as cache:
        requests = Requests(cache)
        await send_down(cache, [0], requests.engine)
        dead.falls(Sickness.DEAD)
        taken: list[float] = []
        for _ in range(5):
            taken.append((await timed(requests.retrieve()))[0])
            await asyncio.sleep(0.01)  # a call that is cancelled takes some turns to end
        assert taken == [pytest.approx(DEADLINE), 0, 0, 0, 0]
        assert requests.got == [0, 64, 64, 64, 64]
        dead.falls(Sickness.HEALTHY)


@pytest.mark.parametrize("sickness", [Sickness.DEAD, Sickness.SLOW])
@in_virtual_time
async def test_hits_do_not_count_what_only_a_dead_tier_holds_and_explain_says_so(
    sickness: Sickness,
) -> None:
    patient, events = Patient.fresh(), list[Event]()
    async with ward(patient, sinks=[events.append]) as cache:
        requests = Requests(cache)
        await send_down(cache, [0], requests.engine)
        assert (await cache.prefetch(tokens(64)[:32], deadline=1e9)).tokens == 32
        patient.falls(sickness)
        async with cache.lookup(tokens(64)) as hit:
            assert hit.by_tier == {"cpu": 32, "sick": 32}
            report = await cache.retrieve(hit, requests.other.view(requests.slots))
        assert report.tokens == 32
        assert [failure.cause for failure in report.failed] == [Cause.DEADLINE]
        await asyncio.sleep(0.01)
        async with cache.lookup(tokens(64)) as hit:
            assert hit.tokens == 32  # nobody plans with what cannot be had
            seconds, report = await timed(cache.retrieve(hit, requests.other.view(requests.slots)))
            assert (seconds, report.tokens, report.failed) == (0.0, 32, ())
        explained = await cache.control.explain(tokens(64))
        (miss,) = explained.misses
        assert (miss.start, miss.stop, miss.cause) == (32, 64, Cause.TIER_DOWN)
        assert f"not loaded within {DEADLINE} s" in cache.control.health().tiers[1].detail
        patient.falls(Sickness.HEALTHY)
        await asyncio.sleep(4 * PAUSE)
        async with cache.lookup(tokens(64)) as hit:
            assert hit.tokens == 64
        changes = [event for event in events if isinstance(event, TierChanged)]
        assert [event.ok for event in changes] == [False, True]


@in_virtual_time
async def test_what_only_a_dead_tier_has_is_computed_once_and_stored_in_memory() -> None:
    """Else every request for the prompt would compute it, as long as the tier is down."""
    patient = Patient.fresh()
    async with ward(patient) as cache:
        requests = Requests(cache)
        await send_down(cache, [0], requests.engine)
        again = requests.engine.view(requests.slots)
        assert (await cache.store(tokens(64), again)).skipped == 4
        patient.falls(Sickness.DEAD)
        await requests.lookup()
        await requests.retrieve()
        assert requests.got[-1] == 0 and not serving(cache)
        await asyncio.sleep(0.01)  # what hung has been let go of
        report = await cache.store(tokens(64), again)
        assert (report.stored, report.skipped, report.failed) == (4, 0, ())
        async with cache.lookup(tokens(64)) as hit:
            assert hit.by_tier == {"cpu": 64, "sick": 0}
            loaded = await cache.retrieve(hit, requests.other.view(requests.slots))
        assert loaded.tokens == 64
        assert same(requests.engine.read(requests.slots), requests.other.read(requests.slots))
        patient.falls(Sickness.HEALTHY)
        await asyncio.sleep(61)
        await requests.retrieve()  # host memory forgets it: the tier has what it had
        assert requests.got[-1] == 64
        await let_go(cache)


@in_virtual_time
async def test_stats_tell_what_is_in_flight_late_and_left_alone() -> None:
    patient = Patient.fresh()
    async with ward(patient, write="back") as cache:
        requests = Requests(cache)
        await send_down(cache, [0], requests.engine)
        well = figures(cache)
        assert (well.reads, well.writes, well.inflight, well.orphans) == ("closed", "closed", 0, 0)
        patient.is_stubborn = True
        patient.falls(Sickness.DEAD)
        loading = asyncio.ensure_future(requests.retrieve())
        await asyncio.sleep(DEADLINE / 2)
        busy = figures(cache)
        assert (busy.reads, busy.inflight, busy.orphans) == ("closed", 4, 0)
        assert busy.inflight_nbytes == 4 * 4096
        await loading
        late = figures(cache)
        # The request gave up the first object it waited for; the others it let go of.
        assert (late.reads, late.writes, late.inflight) == ("open", "closed", 4)
        assert late.orphans == 1
        assert late.misses[Cause.DEADLINE] == 1
        await asyncio.sleep(DEADLINE)
        assert figures(cache).orphans == 4  # and they did not let go
        assert cache.control.stats().tiers[0].used_nbytes == 4 * 4096  # what they fill is held
        await requests.store()
        await asyncio.sleep(DEADLINE + 0.1)
        stuck = figures(cache)
        assert (stuck.writes, stuck.orphans) == ("open", 8)
        patient.falls(Sickness.HEALTHY)
        await let_go(cache)
        back = figures(cache)
        assert (back.inflight_nbytes, back.orphans) == (0, 0)
        assert back.reads in ("open", "half-open")  # late answers are no sign of health
        await asyncio.sleep(70)
        await requests.store()
        await let_go(cache)
        assert (figures(cache).reads, figures(cache).writes) == ("closed", "closed")


@pytest.mark.parametrize("verb", ["lookup", "retrieve", "prefetch", "explain", "evict", "clear"])
@pytest.mark.parametrize("only", ["contains", "get", "delete"])
@in_virtual_time
async def test_requests_that_are_cancelled_early_leave_nothing_running_on_a_dead_tier(
    verb: str, only: str
) -> None:
    """Nobody stays to see a deadline missed, and the answers never come."""
    patient = Patient.fresh()
    async with ward(patient) as cache:
        requests = Requests(cache)
        await send_down(cache, [0], requests.engine)
        patient.only = frozenset({only})
        patient.falls(Sickness.DEAD)
        verbs: dict[str, Callable[[], Awaitable[Any]]] = {
            "lookup": requests.lookup,
            "retrieve": requests.retrieve,
            "prefetch": requests.prefetch,
            "explain": lambda: cache.control.explain(requests.new()),
            "evict": lambda: cache.control.evict(tokens(64)),
            "clear": cache.control.clear,
        }
        for _ in range(5):
            with suppress(TimeoutError):
                async with asyncio.timeout(DEADLINE / 10):
                    await verbs[verb]()
        await asyncio.sleep(3 * DEADLINE)  # a prefetch goes on: its own deadline comes first
        await let_go(cache)
        if (probe := cache.stack.lower[0].guard._probing) is not None:
            await asyncio.wait({probe})  # asks for nobody, and gives up by itself
        assert patient.running == 0
        patient.falls(Sickness.HEALTHY)


# -- writing back --------------------------------------------------------------------------------


@in_virtual_time
async def test_write_back_to_a_hung_tier_holds_no_more_than_its_bound_and_lets_all_go() -> None:
    """Host memory must not fill up with what waits for a tier that never takes it."""
    patient, bound = Patient.fresh(), 10 * 4096
    tier = {"max_inflight_bytes": bound, "max_inflight": 16}
    async with ward(patient, write="back", tier=tier, host="256KiB") as cache:
        requests = Requests(cache)
        patient.is_stubborn = True
        patient.falls(Sickness.DEAD)
        most = 0
        for _ in range(8):  # 32 objects of a page each, at once
            seconds, _ = await timed(requests.store())
            assert seconds == 0.0
            stats = cache.control.stats()
            most = max(most, stats.tiers[0].pinned_nbytes)
            assert stats.tiers[1].inflight_nbytes <= bound
        assert 4096 * 4 <= most <= bound
        assert figures(cache).misses == {}
        assert figures(cache).queued == 32 - most // 4096  # in host memory, and held by nobody
        await asyncio.sleep(DEADLINE + 0.001)
        assert figures(cache).writes == "open"
        assert patient.running == 4  # a quarter of the turns; what waited was let go of
        assert cache.control.stats().tiers[0].pinned_nbytes == 4 * 4096
        assert not cache.control.health().ok
        for _ in range(20):  # stored, and sent nowhere
            seconds, _ = await timed(requests.store())
            assert (seconds, requests.got[-1]) == (0.0, 0)
            assert cache.control.stats().tiers[0].pinned_nbytes == 4 * 4096
            await asyncio.sleep(EVERY)
        assert patient.running == 4
        assert patient.objects == {}
        patient.falls(Sickness.HEALTHY)
        await asyncio.sleep(61)  # one of those that wait tries, and the others follow
        await let_go(cache)
        assert figures(cache).writes == "closed"
        assert figures(cache).queued == 0
        assert len(patient.objects) > 32  # what was stored meanwhile, too
        await requests.store()
        await let_go(cache)
        assert requests.got[-1] == 4
        assert cache.control.health().ok


@in_virtual_time
async def test_a_trial_write_that_never_ends_leaves_the_next_pause_its_own() -> None:
    patient = Patient.fresh()
    async with ward(patient, write="back") as cache:
        requests = Requests(cache)
        patient.falls(Sickness.DEAD)
        puts = 0
        for _ in range(200):
            await requests.store()
            await asyncio.sleep(EVERY)
            puts = sum(name == "put" for name, _ in patient.calls)
        # 8 until a deadline was missed; then, in 80 seconds, one per pause of 1, 2, 4, 8, 16, 32 s
        # and a deadline: puts that are never answered do not hold their turns for ever.
        assert 8 + 4 <= puts <= 8 + 8
        patient.falls(Sickness.HEALTHY)
        await asyncio.sleep(61)
        await requests.store()
        await let_go(cache)
        assert figures(cache).writes == "closed"


@in_virtual_time
async def test_a_full_tier_still_serves_what_it_holds() -> None:
    patient = Patient.fresh()
    async with ward(patient) as cache:
        requests = Requests(cache)
        await send_down(cache, [0], requests.engine)
        patient.is_full = True
        for _ in range(10):
            await requests.store()
            assert requests.got.pop() == 0
            seconds, _ = await timed(requests.retrieve())
            assert (seconds, requests.got.pop()) == (0.0, 64)
        stats = figures(cache)
        assert (stats.writes, stats.reads) == ("open", "closed")
        # Errors on five objects open the breaker; what was begun by then fails, too.
        assert 4 + 5 <= sum(name == "put" for name, _ in patient.calls) <= 4 + 16
        patient.is_full = False
        await asyncio.sleep(2 * PAUSE)
        await requests.store()  # the first object tries, and the rest of this store is refused
        await requests.store()
        assert requests.got[-1] == 4
        assert figures(cache).writes == "closed"


@in_virtual_time
async def test_flushing_to_two_hung_tiers_takes_one_deadline() -> None:
    patients = [Patient.fresh("one"), Patient.fresh("two")]
    async with ward(*patients, write="back") as cache:
        requests = Requests(cache)
        for patient in patients:
            patient.falls(Sickness.DEAD)
        await requests.store()
        seconds, _ = await timed(cache.flush())
        assert seconds <= DEADLINE + SLACK
        assert {figures(cache, at).writes for at in (1, 2)} == {"open"}


# -- probes --------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_probe_takes_no_turn_and_is_paid_by_nobody() -> None:
    patient = Patient.fresh()
    async with ward(patient, tier={"max_inflight": 1}) as cache:
        requests = Requests(cache)
        await send_down(cache, [0], requests.engine)
        patient.falls(Sickness.DEAD)
        await requests.retrieve()
        for _ in range(100):
            seconds, _ = await timed(requests.retrieve())
            assert seconds == 0.0
            assert patient.running <= 1
            await asyncio.sleep(EVERY)
        asked = [at for name, at in patient.calls if name == "contains"]
        assert 3 <= len(asked) <= 8  # pauses of 1, 2, 4, 8, 16 s and a deadline each


@in_virtual_time
async def test_a_cache_closes_while_probes_writes_and_loads_hang() -> None:
    patient = Patient.fresh()
    async with ward(patient, write="back", close_seconds=1.0) as cache:
        requests = Requests(cache)
        await send_down(cache, [0], requests.engine)
        patient.falls(Sickness.DEAD)
        await requests.retrieve()
        await requests.store()
        await asyncio.sleep(PAUSE)
        loading = asyncio.ensure_future(requests.retrieve())
        await asyncio.sleep(0)
    await loading
    assert patient.running == 0
    scheduled = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
    assert [handle for handle in scheduled if not handle.cancelled()] == []
    assert asyncio.all_tasks() == {asyncio.current_task()}


@in_virtual_time
async def test_a_retry_stays_inside_the_deadline() -> None:
    patient = Patient.fresh()
    async with ward(patient, tier={"retries": 50}) as cache:
        requests = Requests(cache)
        patient.is_full = True
        seconds, _ = await timed(requests.store())
        assert seconds <= DEADLINE + SLACK

"""Lookups that are polled: at once where memory has the answer, pending while a tier is asked."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

import pytest
from caches import config, layout, stored_files, tokens
from engine import Engine, same
from hang import HANG

from kvlayer import Cache, Portal, Scope
from kvlayer.api.lookup import Lookup, LookupState
from kvlayer.errors import ClosedError, LayoutError, PendingError, TokensError, UnsupportedError
from kvlayer.events import Event, LookupDone
from kvlayer.results import Cause
from kvlayer.tier.planner.planner import Planner


@contextmanager
def busy(portal: Portal) -> Generator[None]:
    """The portal's loop does nothing while the block runs."""
    reached, go = threading.Event(), threading.Event()

    async def block(_: Cache) -> None:
        reached.set()
        go.wait(HANG)  # the point

    blocked = portal.submit(block)
    assert reached.wait(HANG)
    try:
        yield
    finally:
        go.set()
    blocked.wait(HANG)


async def stats(cache: Cache) -> tuple[int, int, int, int]:
    found = cache.control.stats()
    return found.lookups, found.asked_tokens, found.hit_tokens, found.leases


async def evict_host(cache: Cache) -> None:
    await cache.control.clear("cpu")


def stored(portal: Portal, count: int = 48, seed: int = 0) -> Engine:
    """An engine whose prompt ``seed`` the portal's cache has."""
    engine = Engine(layout(), 32, 1)
    slots = engine.slots(count, seed=seed)
    portal.call(Cache.store, tokens(count, seed), engine.view(slots))
    return engine


# -- in the caller's thread ------------------------------------------------------------------------


def test_what_memory_holds_is_found_while_the_loop_is_busy() -> None:
    with Portal.open(config(), layout()) as portal:
        stored(portal)
        with busy(portal):
            with portal.lookup([*tokens(48), 7]) as lookup:
                assert lookup.state is LookupState.HIT
                assert lookup.hit.tokens == lookup.wait(0).tokens == 48
                assert [span.stop for span in lookup.hit.spans] == [16, 32, 48]
                assert lookup.hit.by_tier == {"cpu": 48}
            with portal.lookup(tokens(48, 1)) as lookup:  # no tier below knows more
                assert lookup.state is LookupState.MISS
                assert lookup.hit.tokens == 0


def test_a_whole_hit_asks_no_shared_tier(tmp_path: Path) -> None:
    with Portal.open(config(tmp_path), layout()) as portal:
        stored(portal, 46)
        with busy(portal):
            with portal.lookup(tokens(46)) as lookup:  # two chunks and a tail of 14
                assert lookup.state is LookupState.HIT and lookup.hit.tokens == 46
            with portal.lookup(tokens(47)) as lookup:  # one token has no name
                assert lookup.state is LookupState.HIT and lookup.hit.tokens == 46
            with portal.lookup(tokens(48)) as lookup:
                assert lookup.state is LookupState.PENDING


def test_a_hit_says_how_much_of_it_lies_where(tmp_path: Path) -> None:
    with Portal.open(config(tmp_path), layout()) as portal:
        engine = stored(portal)
        portal.call(evict_host)
        with portal.lookup(tokens(48)[:32]) as half:  # brought back up
            portal.call(Cache.retrieve, half.wait(HANG), engine.view(range(32)))
        with portal.lookup(tokens(48)) as lookup:
            assert lookup.state is LookupState.HIT
            assert lookup.hit.by_tier == {"cpu": 32, "file": 16}


def test_a_hit_found_without_a_hop_is_loaded_with_one() -> None:
    with Portal.open(config(), layout()) as portal:
        engine = stored(portal)
        other = Engine(layout(), 32, 2)
        slots = other.slots(48, seed=5)
        with portal.lookup(tokens(48)) as lookup:
            report = portal.call(Cache.retrieve, lookup.hit, other.view(slots))
        assert report.tokens == 48
        assert same(other.read(slots), engine.read(engine.slots(48, seed=0)))


def test_a_lookup_pins_until_it_is_released() -> None:
    with Portal.open(config(), layout()) as portal:
        stored(portal)
        lookup = portal.lookup(tokens(48))
        portal.call(evict_host)
        with portal.lookup(tokens(48)) as again:
            assert again.hit.tokens == 48
        assert lookup.release()
        assert not lookup.release()
        portal.call(evict_host)
        with portal.lookup(tokens(48)) as gone:
            assert gone.state is LookupState.MISS
        assert portal.call(stats)[3] == 0


def test_a_lookup_that_nobody_releases_ends_with_its_lease() -> None:
    with Portal.open(config(lease_seconds=5.0), layout()) as portal:
        stored(portal)
        portal.lookup(tokens(48))
        assert portal.call(stats)[3] == 1
        planner = portal.cache.stack.planner
        now = planner._clock()
        planner._clock = lambda: now + 5.0
        with portal.lookup(tokens(48, 1)):  # whoever comes next drops it
            pass
        assert portal.call(stats)[3] == 0
        assert planner.host.pinned_nbytes == 0


def test_a_hit_whose_lease_ran_out_loads_what_is_still_there() -> None:
    with Portal.open(config(), layout()) as portal:
        stored(portal)
        other = Engine(layout(), 32, 2)
        lookup = portal.lookup(tokens(48))
        lookup.release()
        assert portal.call(Cache.retrieve, lookup.hit, other.view(range(48))).tokens == 48
        portal.call(evict_host)
        report = portal.call(Cache.retrieve, lookup.hit, other.view(range(48)))
        assert report.tokens == 0
        assert [failure.cause for failure in report.failed] == [Cause.VANISHED]


class _Interposed:
    """A lock that lets somebody else in each time it is really let go of."""

    def __init__(self, then: Callable[[], object]) -> None:
        self._lock = RLock()
        self._depth = 0
        self._then = then

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        last = not self._depth
        self._lock.release()
        if last:
            self._then()


def _clear(planner: Planner) -> None:
    """What the loop may do between two holds of the lock: give up all that is not pinned."""
    planner.evict(list(planner.directory.objects()), Cause.EVICTED, "meanwhile")


def test_nothing_goes_between_being_found_and_being_leased() -> None:
    with Portal.open(config(), layout()) as portal:
        engine = stored(portal)
        planner = portal.cache.stack.planner
        lock = planner.lock
        turns = 0

        def meanwhile() -> None:
            nonlocal turns
            turns += 1
            planner.lock = lock
            _clear(planner)
            planner.lock = interposed

        interposed: Any = _Interposed(meanwhile)
        with busy(portal):
            planner.lock = interposed
            lookup = portal.lookup(tokens(48))
            planner.lock = lock
        assert turns >= 1
        assert lookup.hit.tokens == 48
        other = Engine(layout(), 32, 2)
        assert portal.call(Cache.retrieve, lookup.hit, other.view(range(48))).tokens == 48
        assert same(other.read(range(48)), engine.read(engine.slots(48, seed=0)))
        lookup.release()


def test_a_retrieve_keeps_what_another_thread_releases_meanwhile() -> None:
    """The hit is let go of and its memory wanted at every moment of the load."""
    with Portal.open(config(), layout()) as portal:
        engine = stored(portal)
        planner = portal.cache.stack.planner
        lookup = portal.lookup(tokens(48))
        lock, loop = planner.lock, portal._ident
        turns = 0

        def meanwhile() -> None:
            nonlocal turns
            if threading.get_ident() != loop:
                return
            turns += 1
            planner.lock = lock
            other = threading.Thread(target=lookup.release)  # an engine's, as it may come
            other.start()
            other.join()
            _clear(planner)
            planner.lock = interposed

        interposed: Any = _Interposed(meanwhile)
        mine = Engine(layout(), 32, 2)

        async def load(cache: Cache) -> int:
            planner.lock = interposed
            try:
                return (await cache.retrieve(lookup.hit, mine.view(range(48)))).tokens
            finally:
                planner.lock = lock

        assert portal.call(load) == 48
        assert turns > 1
        assert same(mine.read(range(48)), engine.read(engine.slots(48, seed=0)))
        assert planner.host.extents.used == planner.host.pinned_nbytes == 0


# -- pending ---------------------------------------------------------------------------------------


def test_what_a_tier_must_be_asked_for_is_pending_until_it_has_answered(tmp_path: Path) -> None:
    with Portal.open(config(tmp_path), layout()) as writer:
        stored(writer)
    with Portal.open(config(tmp_path), layout()) as portal:
        with busy(portal):
            lookup = portal.lookup(tokens(48))
            assert lookup.state is LookupState.PENDING
            with pytest.raises(PendingError) as caught:
                _ = lookup.hit
            assert caught.value.hint
            with pytest.raises(PendingError):
                lookup.wait(0.001)
            assert lookup.state is LookupState.PENDING
        with lookup:
            assert lookup.wait(HANG).tokens == 48
            assert lookup.state is LookupState.HIT
            assert lookup.hit.by_tier == {"cpu": 0, "file": 48}
            engine = Engine(layout(), 32, 3)
            assert portal.call(Cache.retrieve, lookup.hit, engine.view(range(48))).tokens == 48
        with portal.lookup(tokens(48, 1)) as missed:
            assert missed.wait(HANG).tokens == 0
            assert missed.state is LookupState.MISS
        assert portal.call(stats) == (2, 96, 48, 0)


def test_a_pending_lookup_that_is_released_holds_nothing(tmp_path: Path) -> None:
    with Portal.open(config(tmp_path), layout()) as portal:
        stored(portal)
        portal.call(evict_host)
        with busy(portal):
            lookup = portal.lookup([*tokens(48), *tokens(16, 1)])
            assert lookup.state is LookupState.PENDING
            assert not lookup.release()
            assert lookup.state is LookupState.MISS
            assert lookup.wait(0).tokens == 0
        assert portal.call(stats) == (0, 0, 0, 0)
        assert not portal._tasks


def test_an_answer_that_comes_after_the_release_is_let_go_of(tmp_path: Path) -> None:
    with Portal.open(config(tmp_path), layout()) as portal:
        stored(portal)
        planner = portal.cache.stack.planner
        with portal.lookup(tokens(48)) as found:
            late = Lookup(planner, "")
            late.release()
            late.settle(found.hit)
            assert late.state is LookupState.MISS
            assert portal.call(stats)[3] == 0  # the lease went with it


def test_closing_answers_pending_lookups_as_misses(tmp_path: Path) -> None:
    with Portal.open(config(tmp_path), layout()) as portal:
        with busy(portal):
            lookup = portal.lookup(tokens(48))
            portal._leave(abandon=False)
            with pytest.raises(ClosedError):
                portal.lookup(tokens(48))
    assert lookup.state is LookupState.MISS
    assert lookup.wait(0).tokens == 0
    assert not lookup.release()


def test_a_lookup_that_breaks_is_a_miss_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Portal.open(config(tmp_path), layout()) as portal:

        async def broken(*_: object, **__: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(portal.cache.stack.finder, "lease", broken)
        with portal.lookup(tokens(48)) as lookup:
            assert lookup.wait(HANG).tokens == 0
            assert lookup.state is LookupState.MISS
            view = Engine(layout(), 32, 3).view(range(48))
            assert portal.call(Cache.retrieve, lookup.hit, view).tokens == 0
        assert "answered as a miss" in caplog.text and "ZeroDivisionError" in caplog.text


# -- named on the loop -----------------------------------------------------------------------------


def test_a_prompt_can_be_named_on_the_loop() -> None:
    seen: list[int] = []

    async def prompt() -> list[int]:
        seen.append(threading.get_ident())
        return tokens(48)

    with Portal.open(config(), layout()) as portal:
        engine = stored(portal)
        with busy(portal):
            lookup = portal.lookup_on_loop(prompt)
            assert lookup.state is LookupState.PENDING and not seen
        with lookup:
            assert lookup.wait(HANG).tokens == 48 and lookup.state is LookupState.HIT
            assert portal.call(stats) == (1, 48, 48, 1)
            other = Engine(layout(), 32, 2)
            assert portal.call(Cache.retrieve, lookup.hit, other.view(range(48))).tokens == 48
        assert same(other.read(range(48)), engine.read(engine.slots(48, seed=0)))
        assert seen == [portal._ident] and portal.call(stats)[3] == 0
        with portal.lookup_on_loop(prompt, scope=Scope.private("salt")) as salted:
            assert salted.wait(HANG).tokens == 0
    with pytest.raises(ClosedError):
        portal.lookup_on_loop(prompt)


def test_a_lookup_whose_prompt_is_awaited_is_given_up_with_its_release() -> None:
    began, ended = threading.Event(), threading.Event()

    async def prompt() -> list[int]:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    with Portal.open(config(), layout()) as portal:
        stored(portal)
        lookup = portal.lookup_on_loop(prompt)
        assert began.wait(HANG)
        assert not lookup.release() and lookup.state is LookupState.MISS
        assert ended.wait(HANG)
        assert portal.call(stats) == (0, 0, 0, 0)


@pytest.mark.parametrize("prompt", [[1.5], None])
def test_a_prompt_that_cannot_be_named_is_a_miss_and_says_so(
    prompt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken() -> Any:
        return prompt or 1 / 0

    with Portal.open(config(), layout()) as portal, portal.lookup_on_loop(broken) as lookup:
        assert lookup.wait(HANG).tokens == 0 and lookup.state is LookupState.MISS
        view = Engine(layout(), 32, 3).view(range(48))
        assert portal.call(Cache.retrieve, lookup.hit, view).tokens == 0
    assert "could not be named" in caplog.text
    assert ("TokensError" if prompt else "ZeroDivisionError") in caplog.text


# -- leased anew -----------------------------------------------------------------------------------


def test_a_lookup_is_renewed_in_the_callers_thread_and_asks_nobody(tmp_path: Path) -> None:
    asked = [*tokens(48), *tokens(16, 1)]  # its end is not stored: the tier is asked for it
    with Portal.open(config(tmp_path), layout()) as portal:
        engine = stored(portal)
        with portal.lookup(asked) as first:
            first.wait(HANG)
            with busy(portal), portal.renew(first) as second:
                assert first.release()
                assert second.state is LookupState.HIT and second.hit.tokens == 48
            other_end = [*tokens(48), *tokens(16, 2)]  # of this nothing has been said yet
            with pytest.raises(PendingError), busy(portal), portal.lookup(other_end) as pending:
                portal.renew(pending)
            assert portal.call(stats)[3] == 0
        second = portal.renew(first)
        portal.call(evict_host)
        other = Engine(layout(), 32, 2)
        assert second.hit.by_tier == {"cpu": 48, "file": 0}  # leased: it was not evicted
        assert portal.call(Cache.retrieve, second.hit, other.view(range(48))).tokens == 48
        assert same(other.read(range(48)), engine.read(engine.slots(48, seed=0)))
        second.release()
        assert portal.call(stats) == (1, 64, 48, 0)  # one request, however often it is leased
        assert portal.cache.stack.planner.host.pinned_nbytes == 0
    with pytest.raises(ClosedError):
        portal.renew(first)


def test_what_is_gone_is_renewed_as_a_miss() -> None:
    with Portal.open(config(), layout()) as portal:
        stored(portal)
        lookup = portal.lookup(tokens(48))
        lookup.release()
        portal.call(evict_host)
        with portal.renew(lookup) as again:
            assert again.state is LookupState.MISS
        with portal.renew(Lookup(portal.cache.stack.planner, "")) as never:
            assert never.state is LookupState.MISS


# -- counters and events ---------------------------------------------------------------------------


def test_events_of_lookups_in_any_thread_reach_sinks_on_the_loops(tmp_path: Path) -> None:
    seen: list[tuple[int, Event]] = []

    def sink(event: Event) -> None:
        if isinstance(event, LookupDone):
            seen.append((threading.get_ident(), event))

    with Portal.open(config(tmp_path), layout(), sinks=[sink]) as portal:
        stored(portal)
        for scope in (Scope(owner="a"), Scope(owner="b")):
            portal.lookup(tokens(48), scope=scope).release()
        portal.lookup(tokens(40, 1), scope=Scope(owner="c")).wait(HANG)
        portal.lookup(tokens(48), scope=Scope(owner="last"))  # nobody hops after it
    assert {ident for ident, _ in seen} == {portal._ident}
    told = [(e.owner, e.asked_tokens, e.hit_tokens) for _, e in seen if isinstance(e, LookupDone)]
    assert told == [("a", 48, 48), ("b", 48, 48), ("c", 40, 0), ("last", 48, 48)]
    assert all(e.seconds >= 0 for _, e in seen if isinstance(e, LookupDone))


def test_counters_are_exact_however_many_threads_look_up() -> None:
    with Portal.open(config(), layout()) as portal:
        stored(portal)

        def look() -> None:
            for _ in range(200):
                portal.lookup(tokens(32)).release()

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert portal.call(stats) == (800, 800 * 32, 800 * 32, 0)


# -- on the loop -----------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_scheduler_on_the_loop_polls_without_awaiting(tmp_path: Path) -> None:
    engine = Engine(layout(), 32, 1)
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.store(tokens(48), engine.view(range(48)))
        with cache.begin_lookup(tokens(48)) as lookup:
            assert lookup.state is LookupState.HIT
            assert (await lookup).tokens == 48
            assert (await cache.retrieve(lookup.hit, engine.view(range(48)))).tokens == 48
        pending = cache.begin_lookup([*tokens(48), *tokens(16, 1)])
        assert pending.state is LookupState.PENDING
        with pytest.raises(UnsupportedError, match="block the loop"):
            pending.wait(1.0)
        hit = await pending
        assert hit.tokens == 48 and pending.state is LookupState.HIT
        assert pending.release()
        dropped = cache.begin_lookup(tokens(48, 2))
        dropped.release()
        assert (await dropped).tokens == 0
        assert cache.control.stats().leases == 0
        with pytest.raises(TokensError):
            cache.begin_lookup([1.5])  # type: ignore[list-item]
        left = cache.begin_lookup(tokens(48, 3))
    assert left.state is LookupState.MISS
    with pytest.raises(ClosedError):
        cache.begin_lookup(tokens(48))


@pytest.mark.asyncio
async def test_another_loop_awaits_a_lookup_of_a_portal(tmp_path: Path) -> None:
    with Portal.open(config(tmp_path), layout()) as portal:
        stored(portal)
        with portal.lookup([*tokens(48), *tokens(16, 1)]) as lookup:
            assert (await lookup).tokens == 48
        job = portal.submit(Cache.flush)
        async with asyncio.timeout(HANG):
            await asyncio.wrap_future(job)


def test_a_hit_of_one_cache_is_refused_by_another() -> None:
    with Portal.open(config(), layout()) as one, Portal.open(config(), layout()) as two:
        engine = stored(one)
        with one.lookup(tokens(48)) as lookup, pytest.raises(LayoutError):
            two.call(Cache.retrieve, lookup.hit, engine.view(range(48)))


def test_a_forked_child_cannot_release_what_its_parent_leased() -> None:
    with Portal.open(config(), layout()) as portal:
        stored(portal)
        with portal.lookup(tokens(48)) as lookup:
            lookup._pid = os.getppid()  # as a child would see it
            assert not lookup.release()
            lookup._pid = os.getpid()
            assert portal.call(stats)[3] == 1


def test_damage_below_never_reaches_a_polled_hit(tmp_path: Path) -> None:
    with Portal.open(config(tmp_path), layout()) as writer:
        stored(writer)
    for path in stored_files(tmp_path):
        path.write_bytes(path.read_bytes()[:5000])
    with Portal.open(config(tmp_path), layout()) as portal:
        engine = Engine(layout(), 32, 4)
        with portal.lookup(tokens(48)) as lookup:
            assert lookup.wait(HANG).tokens == 48  # so far it is only a name
            report = portal.call(Cache.retrieve, lookup.hit, engine.view(range(48)))
        assert report.tokens == 0 and report.failed

"""Engine threads look up and lease while the loop's thread plans: the directory's lock, by seed.

The threads share a real cache's planner, whose lock is the schedule's. The loop's thread stores and
evicts in a host memory that is too small; what an engine's thread has leased must stay where it
is, with the bytes it had, until it is released.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from processes import CHUNK, opened
from world import PUBLIC, World, simulate

from kvlayer import Cache
from kvlayer.api import assembly, lookup, open_cache
from kvlayer.eviction import lists, lru, order
from kvlayer.results import Cause
from kvlayer.testing import invariants
from kvlayer.testing.schedule import Schedule
from kvlayer.tier import stack
from kvlayer.tier.planner import (
    directory,
    holdings,
    host,
    lease,
    lookup_planner,
    matcher,
    planner,
    store_planner,
    survey,
)
from kvlayer.tier.planner.records import HostState, ObjectRecord
from kvlayer.tier.transfer import finder

WATCHED = [
    directory,
    finder,
    holdings,
    host,
    lease,
    lists,
    lookup_planner,
    lru,
    order,
    lookup,
    matcher,
    assembly,
    open_cache,
    planner,
    stack,
    store_planner,
    survey,
]
LOOKUPS = 4
STORES = 5


def play_threads(seed: int) -> list[int]:
    """One schedule; the turns it took. Raises what its threads raise."""
    world, turns = World(seed, Path()), list[int]()

    async def whole() -> None:
        async with opened(world, pages=5) as process:
            cache = process.cache
            schedule = Schedule(seed, watched=WATCHED)
            real, cache.stack.planner.lock = cache.stack.planner.lock, schedule.lock()  # type: ignore[assignment]
            cache.parts._counting = schedule.lock()  # type: ignore[assignment]
            try:
                schedule.run(
                    lambda: _loop(cache, world, Random(seed)),
                    lambda: _engine(cache, world, schedule, Random(seed + 1)),
                    lambda: _engine(cache, world, schedule, Random(seed + 2)),
                )
            finally:
                cache.stack.planner.lock = real
                turns.extend(schedule.turns)
            stats = cache.control.stats()
            if stats.lookups != 2 * LOOKUPS:
                raise invariants.Broken(f"{2 * LOOKUPS} lookups, and {stats.lookups} counted")
            invariants.nothing_left(cache)
            invariants.no_wrong_bytes(cache, world.bytes_of)

    simulate(whole(), seed)
    return turns


def _loop(cache: Cache, world: World, chance: Random) -> None:
    """What the loop's thread does between two awaits: plan, fill, serve, evict, write down."""
    plans, slab = cache.stack.planner, cache.stack.objects.slab
    for _ in range(STORES):
        prompt = chance.choice(world.prompts)
        length = chance.randrange(CHUNK, 4 * CHUNK)
        world.learn(cache, prompt, length)
        chain = cache.chain(prompt.tokens[:length], PUBLIC)
        todo = plans.plan_store(chain, 0, tail=True, holds=lambda _group, _span: True)
        for slot in todo.gathers:
            expected = world.right[slot.span.hash]
            slab.view(slot.piece.offset, len(expected))[:] = expected
        plans.gathered(todo, ())
        plans.settle(chain, todo.gathers)
        if chance.random() < 0.3:
            plans.evict(plans.match(chain).path(), Cause.CLEARED, "to make room")
        invariants.accounts(plans)


def _engine(cache: Cache, world: World, schedule: Schedule, chance: Random) -> None:
    """What a scheduler's thread does: look up at once, keep it for a while, let go."""
    for _ in range(LOOKUPS):
        prompt = chance.choice(world.prompts)
        found = cache.lookups.begin(prompt.tokens, PUBLIC, _never, _tell)
        hit = found.hit
        assert hit.match is not None and hit.lease is not None
        _check_leased(cache, world, hit.match.path())
        for _ in range(3):
            schedule.switch()
            _check_leased(cache, world, hit.match.path())
        if chance.random() < 0.5:
            claimed = cache.stack.planner.claim(hit.match, hit.lease)
            found.release()
            _check_leased(cache, world, claimed.path())
            cache.stack.planner.unpin(claimed.path())
        else:
            found.release()


def _check_leased(cache: Cache, world: World, path: Sequence[ObjectRecord]) -> None:
    for record in path:
        if record.host is not HostState.READY:
            raise invariants.Broken(f"{record.key} is leased, and was evicted")
        expected = world.right[record.key.end_hash]
        if cache.stack.objects.slab.view(record.offset, len(expected)) != expected:
            raise invariants.Broken(f"{record.key} is leased, and its bytes have changed")


def _never(_work: Any) -> Any:
    raise AssertionError("host memory alone can answer, so nothing needs to be looked for")


def _tell(entry: Any) -> None:
    del entry  # a sink is told on the loop

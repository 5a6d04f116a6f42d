"""Promises about opening and closing, restarts, sharing, and the room a tier has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from itertools import chain
from typing import Any

from kvlayer.abc.backend import Capability, Hit, Miss
from kvlayer.errors import BackendError, ClosedError
from kvlayer.identity.keys import ObjectKey
from kvlayer.testing.loan import PAGE, noise
from kvlayer.testing.promise import Need, broken, expect, promise, same_bytes
from kvlayer.testing.suites.place import BackendPlace
from kvlayer.testing.trial import Trial, side_by_side

__all__ = ["LifetimePromises"]


class LifetimePromises(BackendPlace):
    """A backend lets go of everything, and keeps what it said it would keep."""

    @promise("Release everything once running calls have ended. Idempotent.")
    async def test_closing_twice_is_closing_once(self, trial: Trial) -> None:
        await trial.store(1, PAGE)
        await trial.close()
        await trial.backend.aclose()
        await self.build().aclose()  # nor does it mind never having been open

    @promise("Release everything once running calls have ended.")
    async def test_closing_waits_for_the_calls_that_run(self, trial: Trial) -> None:
        nbytes = self.large_nbytes // 4
        content = await trial.store(1, nbytes)
        calls: list[asyncio.Task[Any]] = [
            *(asyncio.create_task(trial.put(trial.key(n), content)) for n in range(2, 6)),
            *(asyncio.create_task(trial.get(trial.key(1), nbytes)) for _ in range(4)),
        ]
        for _ in range(3):
            await asyncio.sleep(0)
        await trial.close()
        for _ in range(10):  # what has ended inside may need a turn to say so
            await asyncio.sleep(0)
        running = sum(not call.done() for call in calls)
        expect(running, 0, "the number of calls that run on after aclose()")
        if Capability.PERSISTENT in trial.backend.capabilities:
            await self._keeps_what_it_said(trial, calls[:4], nbytes)
        for call in calls:
            error = call.exception()
            if error is not None and not isinstance(error, ClosedError):
                raise error
            if error is None and isinstance(call.result(), tuple):
                result, loan = call.result()
                if result == Hit(nbytes):
                    loan.holds(content, "an object that was read while the backend closed")
                elif isinstance(result, Hit):
                    broken(f"Hit({nbytes}), or an error", result)

    async def _keeps_what_it_said(
        self, trial: Trial, puts: list[asyncio.Task[Any]], nbytes: int
    ) -> None:
        await trial.reopen()
        sizes = await trial.backend.contains(trial.numbered(range(2, 6)))
        for number, (put, size) in enumerate(zip(puts, sizes, strict=True), start=2):
            if put.exception() is None and put.result() is None:
                expect(size, nbytes, f"the size of {number}, of which put() said it is stored,")

    @promise("The object was used after it was closed.")
    async def test_a_closed_backend_says_so(self, trial: Trial) -> None:
        await trial.store(1, PAGE)
        await trial.close()
        calls: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
            "get": lambda: trial.load(trial.key(1), PAGE),
            "put": lambda: trial.put(trial.key(2), bytes(PAGE)),
            "contains": lambda: trial.backend.contains([trial.key(1)]),
        }
        for name, call in calls.items():
            try:
                answer = await call()
            except (ClosedError, BackendError):
                continue
            except Exception as exc:  # noqa: BLE001  # of a backend's own making: the finding
                broken(f"ClosedError from {name}() of a closed backend", exc)
            is_refused = isinstance(answer, ClosedError | BackendError)
            if is_refused or (name != "put" and answer in (None, [None])):
                continue
            broken(f"ClosedError from {name}() of a closed backend", answer)

    @promise("Objects survive the process.", Need.PERSISTENT)
    async def test_objects_survive_a_restart(self, trial: Trial) -> None:
        contents = [await trial.store(n, PAGE * (1 + n)) for n in range(6)]
        await trial.delete(trial.numbered((4,)))
        await trial.reopen()
        sizes = await trial.backend.contains(trial.numbered(range(7)))
        expected = [PAGE * (1 + n) if n != 4 else None for n in range(6)]
        expect(sizes, [*expected, None], "contains() after a restart")
        for number in (0, 1, 2, 3, 5):
            found = await trial.load(trial.key(number), PAGE * (1 + number))
            same_bytes(found or b"", contents[number], f"object {number} after a restart")
        if trial.lists:
            listed = await trial.listed()
            left = {trial.key(n): PAGE * (1 + n) for n in (0, 1, 2, 3, 5)}
            expect(listed, left, "list() after a restart")

    @promise("Other processes may add and remove objects at any time.", Need.SHARED)
    async def test_what_one_instance_stores_the_other_finds(self, trial: Trial) -> None:
        other = await trial.another()
        key = trial.key(1)
        expect(await other.contains([key]), [None], "contains() before anybody stored it")
        content = await trial.store(1, 3 * PAGE)
        expect(await other.contains([key]), [3 * PAGE], "contains() of the other instance")
        found = await trial.load(key, 3 * PAGE, on=other)
        same_bytes(found or b"", content, "an object that another instance stored")
        result = await trial.put(key, noise(2, 3 * PAGE), on=other)
        expect(result, None, "the result of put() of what another instance stored")
        same_bytes(await trial.load(key, 3 * PAGE) or b"", content, "what was stored first")
        if trial.lists:
            listed = await trial.listed(on=other)
            expect(listed, {key: 3 * PAGE}, "list() of the other instance")

    @promise("Other processes may add and remove objects at any time.", Need.SHARED)
    async def test_what_one_instance_deletes_the_other_misses(self, trial: Trial) -> None:
        other = await trial.another()
        content = await trial.store(1, PAGE)
        same_bytes(await trial.load(trial.key(1), PAGE, on=other) or b"", content, "the object")
        await trial.delete([trial.key(1)])
        result, _ = await trial.get(trial.key(1), PAGE, on=other)
        expect(result, Miss(), "get() of what another instance deleted")
        expect(await other.contains([trial.key(1)]), [None], "contains() of the same")
        stored = await trial.put(trial.key(1), content, on=other)
        expect(stored, None, "the result of put() of what another instance deleted")
        same_bytes(await trial.load(trial.key(1), PAGE) or b"", content, "the object, put again")

    @promise("Release everything once running calls have ended.", Need.SHARED)
    async def test_closing_one_instance_leaves_the_other_open(self, trial: Trial) -> None:
        other = await trial.another()
        content = await trial.store(1, PAGE)
        await trial.close()
        same_bytes(await trial.load(trial.key(1), PAGE, on=other) or b"", content, "the object")
        await trial.store(2, PAGE, on=other)
        expect(await other.contains([trial.key(2)]), [PAGE], "contains() of the one left open")

    # -- room ------------------------------------------------------------------------------------

    @promise(
        "One with a capacity never holds more, and makes room for what is new.",
        Need.SMALL,
        Need.DISPOSABLE,
    )
    async def test_a_full_tier_stays_within_its_capacity(self, trial: Trial) -> None:
        capacity = self.small_capacity_nbytes
        nbytes = capacity // 16 // PAGE * PAGE
        for number in range(28):
            await trial.put(trial.key(number), noise(number, nbytes))
            await self._fits(trial, capacity, range(number + 1))
        batch = [trial.put(trial.key(n), noise(n, nbytes)) for n in range(100, 128)]
        await side_by_side(batch)
        await self._fits(trial, capacity, range(128))

    @promise(
        "While it still finds out what lies there, after open, it takes writes and may hold a "
        "sixteenth of the capacity more; writes beyond that wait.",
        Need.SMALL,
        Need.PERSISTENT,
        Need.DISPOSABLE,
    )
    async def test_a_full_tier_takes_writes_after_a_restart_and_stays_within_bounds(
        self, trial: Trial
    ) -> None:
        capacity = self.small_capacity_nbytes
        nbytes = capacity // 32 // PAGE * PAGE
        numbers = range(32)
        await side_by_side(trial.put(trial.key(n), noise(n, nbytes)) for n in numbers)
        await trial.reopen()
        for number in range(100, 132):
            stored = await trial.put(trial.key(number), noise(number, nbytes))
            expect(stored, None, "the result of put() to a full tier after a restart")
            held = range(100, number + 1)
            await self._fits(trial, capacity + capacity // 16, numbers, held)
        # More than may be exceeded was written: what lies there is known by now.
        await trial.put(trial.key(200), noise(200, nbytes))
        await self._fits(trial, capacity, numbers, range(100, 132), range(200, 201))

    async def _fits(self, trial: Trial, capacity: int, *numbers: range) -> None:
        sizes = await trial.backend.contains(trial.numbered(chain.from_iterable(numbers)))
        held = sum(size for size in sizes if isinstance(size, int))
        if not 0 < held <= capacity:
            broken(f"some bytes held, and {capacity} at most", f"{held}")

    @promise("Called on the loop with (key, bytes) of what was evicted, and the policy's name.",
             Need.SMALL, Need.DISPOSABLE)  # fmt: skip
    async def test_who_evicts_tells_the_owner(self, trial: Trial) -> None:
        told: dict[ObjectKey, int] = {}
        names: set[str] = set()

        def hear(gone: list[tuple[ObjectKey, int]], policy: str) -> None:
            asyncio.get_running_loop()
            told.update(gone)
            names.add(policy)

        trial.backend.on_evicted = hear
        nbytes = self.small_capacity_nbytes // 16 // PAGE * PAGE
        stored = [
            trial.key(number)
            for number in range(28)
            if await trial.put(trial.key(number), noise(number, nbytes)) is None
        ]
        sizes = await trial.backend.contains(stored)
        if not stored:  # who never evicts refuses what is too much, and no more than that
            broken("some of 28 objects to be stored in room for 16", "none was")
        gone = [key for key, size in zip(stored, sizes, strict=True) if size is None]
        untold = [key for key in gone if told.get(key) != nbytes]
        expect(untold, [], "objects that went, and of which the owner was not told with their size")
        expect(told.keys() - set(gone), set[ObjectKey](), "what it said was evicted, and is there")
        expect(all(names), True, "a name for each policy the owner is told of")

    @promise(
        "Names are content. Makes room for what is new.",
        Need.SMALL,
        Need.DISPOSABLE,
    )
    async def test_a_full_tier_serves_right_bytes_or_misses(self, trial: Trial) -> None:
        nbytes = self.small_capacity_nbytes // 16 // PAGE * PAGE

        async def one(number: int) -> None:
            content = noise(number, nbytes)
            await trial.put(trial.key(number), content)
            for other in (number, (number * 7) % 32):
                found = await trial.load(trial.key(other), nbytes)
                if found is not None:
                    same_bytes(found, noise(other, nbytes), f"object {other} of a full tier")

        for first in range(0, 32, 8):
            await side_by_side(one(first + n) for n in range(8))
        last = await trial.put(trial.key(99), noise(99, nbytes))
        expect(last, None, "the result of put() to a full tier where nothing else runs")
        found = await trial.load(trial.key(99), nbytes)
        same_bytes(found or b"", noise(99, nbytes), "what was stored last in a full tier")

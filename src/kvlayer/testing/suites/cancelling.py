"""Promises about lent memory, and about calls that are cancelled at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from itertools import count
from time import perf_counter
from typing import Any

from kvlayer.abc.backend import Hit, Miss, Read, Write
from kvlayer.testing.loan import PAGE, Loan, noise, only_young
from kvlayer.testing.promise import Need, broken, expect, promise, same_bytes
from kvlayer.testing.suites.place import BackendPlace
from kvlayer.testing.trial import Trial

__all__ = ["CancelPromises"]

_TURNS = (0, 1, 2, 3, 5, 8, 13)
_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
_SETTLE_SECONDS = 0.02  # for native code, which can touch memory without holding a view of it
_CANCELLED = 64
_REVOCATIONS = 6
_REVOKED_SECONDS = 0.1


class CancelPromises(BackendPlace):
    """Memory is the caller's again when a call returns, however it ends."""

    @promise("They belong to the caller, who may reuse them once get has returned.")
    async def test_memory_is_the_callers_again_when_a_call_returns(self, trial: Trial) -> None:
        content = noise(1, 4 * PAGE)
        with only_young():
            lent = [Loan(len(content), content) for _ in range(2)]
            await trial.backend.put(
                [Write(trial.key(n), loan.regions((1,))) for n, loan in enumerate(lent)]
            )
            for loan in lent:
                loan.poison()
                loan.take_back()
            into = [Loan(len(content)) for _ in range(3)]
            await trial.backend.get(
                [Read(trial.key(n), loan.regions((1,))) for n, loan in enumerate(into)]
            )
            for number, loan in enumerate(into):
                if number in (0, 1):
                    loan.holds(content, "an object whose memory was reused after put()")
                loan.poison()
                loan.take_back()
        await asyncio.sleep(_SETTLE_SECONDS)
        for loan in (*lent, *into):
            loan.is_poisoned_still()

    @promise("The call returns only once every buffer it was lent is untouched.")
    async def test_a_cancelled_get_has_let_go_of_its_memory(self, trial: Trial) -> None:
        nbytes = self.large_nbytes // 4
        content = await trial.store(1, nbytes)
        lent: list[Loan] = []

        def get() -> Coroutine[Any, Any, object]:
            lent.append(Loan(2 * nbytes))
            regions = lent[-1].regions((1, nbytes // PAGE - 1, 1))
            return trial.backend.get(
                [Read(trial.key(1), regions[:2]), Read(trial.key(1), regions[2:])]
            )

        with only_young():
            async for _ in _cancelled(get):
                lent[-1].poison()
                lent[-1].take_back()
        await asyncio.sleep(_SETTLE_SECONDS)
        for loan in lent:
            loan.is_poisoned_still()
        same_bytes(await trial.load(trial.key(1), nbytes) or b"", content, "the object, afterwards")

    @promise("The call returns only once every buffer it was lent is untouched.")
    async def test_a_cancelled_put_has_let_go_of_its_memory(self, trial: Trial) -> None:
        nbytes = self.large_nbytes // 4
        content = noise(1, nbytes)
        lent: list[Loan] = []

        def put() -> Coroutine[Any, Any, object]:
            lent.append(Loan(nbytes, content))
            return trial.backend.put([Write(trial.key(len(lent)), lent[-1].regions((1,)))])

        with only_young():
            async for _ in _cancelled(put):
                lent[-1].poison()
                lent[-1].take_back()
                if len(lent) == 1:
                    found = await trial.load(trial.key(1), nbytes)
                    same_bytes(found or b"", content, "an object whose put() nobody cancelled")
        for number in range(2, len(lent) + 1):
            found = await trial.load(trial.key(number), nbytes)
            if found is not None:
                same_bytes(found, content, "an object whose put() was cancelled")

    @promise("A cancelled get or put returns within 100 ms.", Need.REVOCABLE)
    async def test_a_revoked_call_returns_at_once(self, trial: Trial) -> None:
        nbytes = self.large_nbytes // 4
        content = await trial.store(1, nbytes)
        into, lent = Loan(nbytes), Loan(nbytes, content)
        calls: tuple[Callable[[], Coroutine[Any, Any, object]], ...] = (
            lambda: trial.backend.get([Read(trial.key(1), into.regions())]),
            lambda: trial.backend.put([Write(trial.key(next(numbers)), lent.regions())]),
        )
        numbers = count(2)
        for call in calls:
            took: list[float] = []
            for turns in range(_REVOCATIONS):
                task = asyncio.ensure_future(call())
                for _ in range(turns):
                    await asyncio.sleep(0)
                began = perf_counter()
                task.cancel()
                await asyncio.wait({task})
                if not task.cancelled():
                    task.result()
                elif turns:  # else it had not begun
                    took.append(perf_counter() - began)
            # The quickest: whatever else runs on the machine may hold up any of the others.
            if min(took, default=0.0) > _REVOKED_SECONDS:
                broken("a cancelled call to return within 100 ms", f"{min(took):.3f} s")

    @promise("Returns when no call uses it.", Need.INTRODUCED)
    async def test_withdrawn_memory_is_in_no_calls_hands(self, trial: Trial) -> None:
        nbytes = self.large_nbytes // 4
        content = await trial.store(1, nbytes)
        for turns in _TURNS[1:]:  # a call that has not begun uses nothing
            loan = Loan(nbytes)
            (region,) = loan.regions()
            await trial.backend.introduce(region)
            call = asyncio.ensure_future(trial.backend.get([Read(trial.key(1), (region,))]))
            for _ in range(turns):
                await asyncio.sleep(0)
            await trial.backend.withdraw(region)
            for _ in range(10):  # what has ended inside may need a turn to say so
                await asyncio.sleep(0)
            expect(call.done(), True, "an end of the call that used withdrawn memory")
            expect(call.result(), [Hit(nbytes)], "get() into introduced memory")
            loan.holds(content, "an object read into introduced memory")

    @promise("At any time while it is open. Memory that was not introduced is lent, too.")
    async def test_memory_comes_and_goes_at_any_time(self, trial: Trial) -> None:
        content = await trial.store(1, 3 * PAGE)
        pool, plain = Loan(6 * PAGE), Loan(3 * PAGE)
        (whole,) = pool.regions()
        await trial.backend.withdraw(whole)  # not known yet
        for _ in range(2):
            await trial.backend.introduce(whole)
            for loan, region in ((pool, whole[: 3 * PAGE]), (plain, plain.regions()[0])):
                loan.poison()
                (result,) = await trial.backend.get([Read(trial.key(1), (region,))])
                expect(result, Hit(3 * PAGE), "get() beside introduced memory, and inside")
                loan.holds(content, "an object")
            await trial.backend.withdraw(whole)
        (result,) = await trial.backend.get([Read(trial.key(1), (whole[3 * PAGE :],))])
        expect(result, Hit(3 * PAGE), "get() into memory that was withdrawn")

    @promise("Cancelling a call leaves every object whole or absent.")
    async def test_a_cancelled_put_leaves_each_object_whole_or_absent(self, trial: Trial) -> None:
        nbytes = self.large_nbytes // 8
        contents = [noise(n, nbytes) for n in range(3)]
        count = 0

        def put() -> Coroutine[Any, Any, object]:
            nonlocal count
            count += 1
            loans = [Loan(nbytes, content) for content in contents]
            keys = [trial.key(1000 * count + n) for n in range(3)]
            return trial.backend.put(
                [Write(key, loan.regions((1,))) for key, loan in zip(keys, loans, strict=True)]
            )

        async for _ in _cancelled(put):
            for n, content in enumerate(contents):
                key = trial.key(1000 * count + n)
                (size,) = await trial.backend.contains([key])
                expect(size in (None, nbytes), True, f"a size of {size} to be all or nothing")
                result, loan = await trial.get(key, nbytes)
                if size is None:
                    expect(result, Miss(), "get() of an object that is absent")
                    again = await trial.put(key, content)
                    expect(again, None, "the result of put() after a cancelled one")
                    result, loan = await trial.get(key, nbytes)
                expect(result, Hit(nbytes), "get() of an object that is there")
                loan.holds(content, "an object whose put() was cancelled")

    @promise("Cancelling a call leaves every object whole or absent.")
    async def test_a_cancelled_delete_leaves_each_object_whole_or_absent(
        self, trial: Trial
    ) -> None:
        keys = trial.numbered(range(4))

        async def delete() -> None:
            await trial.store_all(range(4), 4 * PAGE)
            sizes = await trial.backend.contains(keys)
            expect(sizes, [4 * PAGE] * 4, "contains() of what is about to be deleted")
            deleting.set()
            await trial.delete(keys)

        deleting = asyncio.Event()
        is_undisturbed = True
        async for _ in _cancelled(delete, deleting):
            if is_undisturbed:
                await trial.is_absent(keys, 4 * PAGE, "what was deleted, and nobody cancelled it,")
                is_undisturbed = False
            for n, key in enumerate(keys):
                (size,) = await trial.backend.contains([key])
                found = await trial.load(key, 4 * PAGE)
                expect(size, None if found is None else 4 * PAGE, "the size of what is left")
                if found is not None:
                    same_bytes(found, noise(n, 4 * PAGE), "what a cancelled delete() left")

    @promise("Cancelling a call leaves every object whole or absent, and the call returns.")
    async def test_after_many_cancelled_calls_the_backend_still_serves(self, trial: Trial) -> None:
        content = await trial.store(1, 2 * PAGE)
        for round_ in range(_CANCELLED):
            calls = [
                asyncio.create_task(trial.get(trial.key(1), 2 * PAGE)),
                asyncio.create_task(trial.put(trial.key(2 + round_), content)),
                asyncio.create_task(trial.backend.contains([trial.key(1)])),
            ]
            for _ in range(round_ % 4):
                await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
            for call in calls:
                if not call.cancelled():
                    call.result()
        same_bytes(
            await trial.load(trial.key(1), 2 * PAGE) or b"", content, "an object, afterwards"
        )
        expect(await trial.put(trial.key(1000), content), None, "the result of put(), afterwards")


async def _cancelled(
    work: Callable[[], Coroutine[Any, Any, object]], begun: asyncio.Event | None = None
) -> AsyncIterator[None]:
    """Run ``work`` again and again, cancelled later each time; yields when it has returned.

    Moments are turns of the loop, then shares of the time an undisturbed call takes, each with one
    and with two cancellations. They count from when ``begun`` is set.
    """
    began = perf_counter()
    await work()
    took = perf_counter() - began
    yield
    for cancellations in (1, 2):
        for moment in _moments(took):
            if begun is not None:
                begun.clear()
            task = asyncio.ensure_future(work())
            if begun is not None:
                await begun.wait()
            await moment(task)
            for _ in range(cancellations):
                task.cancel()
                await asyncio.sleep(0)
            await asyncio.wait({task})
            if not task.cancelled():
                task.result()  # it had ended before; whatever it raises is a finding
            del task  # with its frames, and what they refer to
            yield


def _moments(
    took: float,
) -> Iterator[Callable[[asyncio.Future[object]], Coroutine[Any, Any, None]]]:
    def turns(count: int) -> Callable[[asyncio.Future[object]], Coroutine[Any, Any, None]]:
        async def wait(task: asyncio.Future[object]) -> None:
            for _ in range(count):
                await asyncio.sleep(0)

        return wait

    def time(seconds: float) -> Callable[[asyncio.Future[object]], Coroutine[Any, Any, None]]:
        async def wait(task: asyncio.Future[object]) -> None:
            await asyncio.wait({task}, timeout=seconds)

        return wait

    yield from map(turns, _TURNS)
    yield from (time(took * share) for share in _SHARES)

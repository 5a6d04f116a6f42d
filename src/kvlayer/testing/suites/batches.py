"""Promises about batches and about calls that run side by side."""

from __future__ import annotations

import asyncio
from random import Random

from kvlayer.abc.backend import Hit, Miss, Read, Write
from kvlayer.errors import BackendError
from kvlayer.identity.keys import ObjectKey
from kvlayer.testing.loan import PAGE, Loan, noise
from kvlayer.testing.promise import Need, broken, expect, promise, same_bytes
from kvlayer.testing.suites.place import BackendPlace
from kvlayer.testing.trial import Trial, side_by_side

__all__ = ["BatchPromises"]

_TASKS = 48


class BatchPromises(BackendPlace):
    """Every item of a batch gets its own answer, in its own place, whoever else is asking."""

    @promise("Results align with inputs and carry the error.")
    async def test_a_batch_is_answered_in_its_own_order(self, trial: Trial) -> None:
        numbers = list(range(24))
        for number in numbers:
            await trial.store(number, PAGE * (1 + number % 3))
        asked = [n if n % 3 else n + 1000 for n in numbers] + [1, 2, 1]
        Random(7).shuffle(asked)  # noqa: S311  # the same order every time
        loans = [Loan(3 * PAGE) for _ in asked]
        reads = [Read(trial.key(n), loan.regions()) for n, loan in zip(asked, loans, strict=True)]
        results = await trial.backend.get(reads)
        expected = [Hit(PAGE * (1 + n % 3)) if n < 1000 else Miss() for n in asked]
        expect(results, expected, "the results of a shuffled get() with misses and repetitions")
        for number, loan, result in zip(asked, loans, results, strict=True):
            if isinstance(result, Hit):
                loan.holds(noise(number, result.nbytes), f"object {number} in a batch")
        sizes = await trial.backend.contains(trial.numbered(asked))
        expect(
            sizes,
            [each.nbytes if isinstance(each, Hit) else None for each in expected],
            "the results of a shuffled contains()",
        )

    @promise("Batches of objects in, aligned results out.")
    async def test_a_batch_of_writes_stores_every_one(self, trial: Trial) -> None:
        contents = [noise(n, PAGE * (1 + n % 3)) for n in range(24)]
        writes = [
            Write(trial.key(n), Loan(len(content), content).regions())
            for n, content in enumerate(contents)
        ]
        results = await trial.backend.put([*writes, writes[3]])
        expect(results, [None] * 25, "the results of put(), one key of which is named twice")
        for number, content in enumerate(contents):
            found = await trial.load(trial.key(number), len(content))
            same_bytes(found or b"", content, f"object {number} of a batch")

    @promise("Batches of objects in, aligned results out.")
    async def test_an_empty_batch_is_answered(self, trial: Trial) -> None:
        expect(await trial.backend.contains([]), [], "contains([])")
        expect(await trial.backend.get([]), [], "get([])")
        expect(await trial.backend.put([]), [], "put([])")
        await trial.delete([])
        await trial.backend.touch([])
        await trial.quarantine([])

    @promise("Batches of objects in, aligned results out.")
    async def test_a_batch_of_thousands_is_answered(self, trial: Trial) -> None:
        many = self.many_keys
        keys = trial.numbered(range(many))
        await trial.store(many - 1, PAGE)
        sizes = await trial.backend.contains(keys)
        expect(sizes, [None] * (many - 1) + [PAGE], f"contains() of {many} keys")
        loan = Loan(PAGE)
        results = await trial.backend.get([Read(key, loan.regions()) for key in keys])
        expect(results, [Miss()] * (many - 1) + [Hit(PAGE)], f"get() of {many} keys")
        await trial.backend.touch(keys)
        await trial.delete(keys)
        expect(await trial.backend.contains(keys[-1:]), [None], f"an object among {many} deleted")

    @promise("A batch never raises for one bad item.")
    async def test_a_bad_item_does_not_spoil_its_batch(self, trial: Trial) -> None:
        good, bad = trial.numbered((1, 2)), ObjectKey(f"{trial.namespace}/../not/a key")
        contents = [noise(number, PAGE) for number in (1, 2)]
        loans = [Loan(PAGE, content) for content in (*contents, bytes(PAGE))]
        keys = [good[0], bad, good[1]]
        trial.keys.add(bad)
        first, _, last = await trial.backend.put(
            [Write(key, loans[at].regions()) for key, at in zip(keys, (0, 2, 1), strict=True)]
        )
        expect([first, last], [None, None], "the results of put() beside a bad item")
        into = [Loan(PAGE) for _ in keys]
        reads = [Read(key, loan.regions()) for key, loan in zip(keys, into, strict=True)]
        first_read, _, last_read = await trial.backend.get(reads)
        expect([first_read, last_read], [Hit(PAGE)] * 2, "the results of get() beside a bad item")
        into[0].holds(contents[0], "the object before a bad item")
        into[2].holds(contents[1], "the object after a bad item")
        found = await trial.backend.contains(keys)
        expect([found[0], found[2]], [PAGE, PAGE], "contains() beside a bad item")
        await trial.delete(keys)
        await trial.is_absent(good, PAGE, "what was deleted beside a bad item")

    @promise("Results align with inputs and carry the error.", Need.SMALL, Need.DISPOSABLE)
    async def test_an_object_larger_than_the_tier_is_refused_as_a_value(self, trial: Trial) -> None:
        content = noise(1, PAGE)
        giant = Loan(self.small_capacity_nbytes + PAGE)
        results = await trial.backend.put(
            [
                Write(trial.key(1), Loan(PAGE, content).regions()),
                Write(trial.key(2), giant.regions()),
            ]
        )
        expect(len(results), 2, "the number of results of put() of 2 items")
        if not isinstance(results[1], BackendError):
            broken("BackendError for an object larger than the tier", results[1])
        expect(await trial.backend.contains(trial.numbered((1, 2))), [PAGE, None], "contains()")

    @promise("Calls may run concurrently on one event loop.")
    async def test_many_calls_at_once_are_each_answered(self, trial: Trial) -> None:
        async def one(number: int) -> None:
            content = noise(number, PAGE * (1 + number % 4))
            key = trial.key(number)
            expect(await trial.put(key, content), None, f"the result of put({number})")
            for pages in ((), (1,)):
                result, loan = await trial.get(key, len(content), pages=pages)
                expect(result, Hit(len(content)), f"get({number}) among {_TASKS} tasks")
                loan.holds(content, f"object {number}, read among {_TASKS} tasks,")
            sizes = await trial.backend.contains([trial.key(number + 1000), key])
            expect(sizes, [None, len(content)], f"contains({number}) among {_TASKS} tasks")
            if number % 3 == 0:
                await trial.delete([key])
                expect(await trial.backend.contains([key]), [None], f"{number} after delete()")

        await side_by_side(one(number) for number in range(_TASKS))

    @promise("Two writers of one key write the same bytes and the first wins.")
    async def test_of_many_writers_of_one_key_one_wins_whole(self, trial: Trial) -> None:
        contents = [noise(n, 16 * PAGE) for n in range(8)]
        results = await side_by_side(trial.put(trial.key(1), each) for each in contents)
        expect(results, [None] * 8, "the results of 8 writers of one key")
        found = await trial.load(trial.key(1), 16 * PAGE)
        if found not in contents:
            broken("the object that one of 8 writers wrote, whole", "a mixture, or nothing")
        same_bytes(await trial.load(trial.key(1), 16 * PAGE) or b"", found, "a second read")

    @promise("Keyed storage for immutable objects.")
    async def test_an_object_being_written_is_absent_or_whole(self, trial: Trial) -> None:
        content = noise(1, self.large_nbytes)
        key, last = trial.key(1), len(content) - PAGE
        writing = asyncio.create_task(trial.put(key, content))
        while not writing.done():
            await asyncio.sleep(0)  # contains() itself may never yield
            (size,) = await trial.backend.contains([key])
            if size is None:
                continue
            expect(size, len(content), "the size of an object that is visible while it is written")
            found = await trial.load(key, PAGE, offset=last)
            same_bytes(found or b"", content[last:], "the end of an object being written")
        expect(await writing, None, "the result of put()")
        found = await trial.load(key, PAGE, offset=last)
        same_bytes(found or b"", content[last:], "the end of an object that was written")

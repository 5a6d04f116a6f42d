"""Promises about what is removed, listed, hinted at and described."""

from __future__ import annotations

import asyncio
from hashlib import sha256
from time import time
from typing import cast

from kvlayer.abc.backend import Capability, Damaged, Hit
from kvlayer.errors import UnsupportedError
from kvlayer.identity.keys import ObjectKey, Part
from kvlayer.testing.loan import PAGE, noise
from kvlayer.testing.promise import Need, broken, expect, promise, same_bytes
from kvlayer.testing.suites.place import BackendPlace
from kvlayer.testing.trial import Trial

__all__ = ["KeepingPromises"]

_CLOCKS_APART_SECONDS = 86_400.0  # a store on another machine may have another clock


class KeepingPromises(BackendPlace):
    """Exactly what was named goes, and what stays is shown as it is."""

    @promise("Remove objects.")
    async def test_what_is_deleted_is_gone_and_nothing_else(self, trial: Trial) -> None:
        near = [
            trial.key(1, part=Part(0, (0, 4), (0, 20))),
            trial.key(1, part=Part(1, (0, 4), (0, 2))),
            trial.key(1, zone="0f" * 16),
            trial.key(2),
        ]
        for key in (trial.key(1), *near):
            expect(await trial.put(key, bytes(PAGE)), None, "the result of put()")
        await trial.delete([trial.key(1)])
        await trial.is_absent([trial.key(1)], PAGE, "a deleted object")
        sizes = await trial.backend.contains(near)
        expect(sizes, [PAGE] * len(near), "contains() of objects beside a deleted one")

    @promise("None for each that is gone, or was missing")
    async def test_deleting_what_is_missing_is_ignored(self, trial: Trial) -> None:
        await trial.store(1, PAGE)
        await trial.delete(trial.numbered((7, 1, 1, 8)))
        await trial.delete(trial.numbered((1,)))
        expect(await trial.backend.contains(trial.numbered((1,))), [None], "contains()")

    @promise("Remove objects: None for each that is gone, or was missing; else what prevented it.")
    async def test_a_deletion_answers_for_each_key(self, trial: Trial) -> None:
        await trial.store_all((1, 2, 3), PAGE)
        keys = trial.numbered((9, 2, 8, 1, 3))
        results = await trial.backend.delete(keys)
        expect(len(results), len(keys), "the number of results of delete()")
        sizes = await trial.backend.contains(keys)
        for key, result, size in zip(keys, results, sizes, strict=True):
            expect(size is None, result is None, f"{key} to be gone, after delete(): {result}")

    @promise("Store objects.")
    async def test_what_was_deleted_can_be_stored_again(self, trial: Trial) -> None:
        for number in (1, 2):
            await trial.store(number, 2 * PAGE)
        await trial.delete(trial.numbered((1, 2)))
        for number in (1, 2):
            content = await trial.store(number, 2 * PAGE)
            found = await trial.load(trial.key(number), 2 * PAGE)
            same_bytes(found or b"", content, "an object that was deleted and stored again")

    @promise("Take corrupt objects out of sight so that they are never offered again.",
             Need.DISPOSABLE)  # fmt: skip
    async def test_what_is_quarantined_is_never_offered_again(self, trial: Trial) -> None:
        for number in (1, 2):
            await trial.store(number, PAGE)
        await trial.quarantine([Damaged(key) for key in trial.numbered((1, 9))])
        await trial.is_absent(trial.numbered((1,)), PAGE, "a quarantined object")
        sizes = await trial.backend.contains(trial.numbered((2,)))
        expect(sizes, [PAGE], "contains() of an object beside a quarantined one")

    @promise("Never offered again.", Need.DISPOSABLE, Need.PERSISTENT)
    async def test_what_is_quarantined_stays_out_of_sight_after_a_restart(
        self, trial: Trial
    ) -> None:
        content = await trial.store(1, PAGE)
        same_bytes(await trial.load(trial.key(1), PAGE) or b"", content, "the object, before")
        await trial.quarantine([Damaged(trial.key(1))])
        await trial.reopen()
        await trial.is_absent(trial.numbered((1,)), PAGE, "an object quarantined before a restart")

    @promise("Only the bytes that were read go: an object that has another version by now was "
             "written anew and stays.", Need.DISPOSABLE)  # fmt: skip
    async def test_quarantine_takes_the_bytes_that_were_read(self, trial: Trial) -> None:
        key, content = trial.key(1), await trial.store(1, 2 * PAGE)
        before, _ = await trial.get(key, 2 * PAGE)
        if not isinstance(before, Hit) or before.version is None:
            expect(before, Hit(2 * PAGE), "get() of an object")
            return  # it cannot tell, and says so
        await trial.delete([key])
        await trial.store(1, 2 * PAGE)
        await trial.quarantine([Damaged(key, before.version)])
        now, loan = await trial.get(key, 2 * PAGE)
        expect(now, Hit(2 * PAGE), "get() of an object whose former bytes were quarantined")
        loan.holds(content, "an object whose former bytes were quarantined")
        if isinstance(now, Hit):
            await trial.quarantine([Damaged(key, now.version)])
        await trial.is_absent([key], 2 * PAGE, "a quarantined version")

    @promise("Objects to be read in place while the context lasts; aligned with keys.")
    async def test_what_is_lent_is_the_object_or_said_not_to_be(self, trial: Trial) -> None:
        contents = [await trial.store(n, 2 * PAGE) for n in (1, 2)]
        keys = trial.numbered((1, 9, 2))
        async with trial.backend.lend(keys) as lent:
            first, missing, second = lent
            expect(missing, None, "what is lent of an object that is absent")
            for each, content in zip((first, second), contents, strict=True):
                if each is not None:
                    same_bytes(b"".join(each.regions), content, "an object that is lent")
                    expect(all(r.readonly for r in each.regions), True, "lent memory as read-only")
            await trial.delete([trial.key(1)])
            await trial.put(trial.key(1), noise(3, 2 * PAGE))
            await trial.store(4, 2 * PAGE)
            later = b"" if first is None else b"".join(first.regions)
        if first is not None and first.was_held:
            same_bytes(later, contents[0], "an object that was deleted while it was lent")
        if second is not None:
            expect(second.was_held, True, "was_held of an object that nobody touched")

    @promise("Called on the loop with (key, bytes) of what the backend has found to be there "
             "without being asked.", Need.SHARED)  # fmt: skip
    async def test_what_it_says_was_stored_is_there(self, trial: Trial) -> None:
        told: dict[ObjectKey, int] = {}

        def hear(found: list[tuple[ObjectKey, int]]) -> None:
            asyncio.get_running_loop()
            told.update(found)

        trial.backend.on_stored = hear
        other = await trial.another()
        for number in range(3):
            await trial.store(number, (1 + number) * PAGE, on=other)
        for _ in range(10):  # what it has heard may need a turn to be told
            await asyncio.sleep(0)
        keys = sorted(told)
        expect(await trial.backend.contains(keys), [told[k] for k in keys], "contains() of those")

    @promise("Hint that objects were used, the most valuable last.")
    async def test_touching_changes_no_object(self, trial: Trial) -> None:
        content = await trial.store(1, PAGE)
        await trial.backend.touch(trial.numbered((9, 1, 1)))
        sizes = await trial.backend.contains(trial.numbered((1, 9)))
        expect(sizes, [PAGE, None], "contains() of a touched object, and of one that is not there")
        same_bytes(await trial.load(trial.key(1), PAGE) or b"", content, "a touched object")

    @promise("Every object whose key starts with prefix.", Need.LIST)
    async def test_a_listing_shows_every_object_once_with_its_size(self, trial: Trial) -> None:
        count = self.many_objects
        for first in range(0, count, 100):
            await trial.store_all(range(first, min(first + 100, count)), PAGE)
        await trial.store(count, 3 * PAGE)
        expected = {trial.key(n): PAGE for n in range(count)} | {trial.key(count): 3 * PAGE}
        found = await trial.listed()
        missing = expected.keys() - found.keys()
        expect(len(missing), 0, f"the number of objects missing from a list() of {len(expected)}")
        expect(found, expected, "key -> bytes in list()")
        keys = cast("list[object]", [*found])
        kinds = {type(key).__name__ for key in keys if not isinstance(key, ObjectKey)}
        expect(kinds, set[str](), "the types of listed keys that are no ObjectKey")

    @promise("Every object whose key starts with prefix.", Need.LIST)
    async def test_a_listing_keeps_to_its_prefix(self, trial: Trial) -> None:
        zone = "0f" * 16
        public, private = trial.key(1), trial.key(1, zone=zone)
        sibling = trial.key(1, part=Part(0, (0, 4), (0, 20)))
        everything: set[ObjectKey] = {public, private, sibling}
        for key in everything:
            await trial.put(key, bytes(PAGE))
        whole = trial.namespace
        wanted: dict[str, set[ObjectKey]] = {
            whole: everything,
            whole[:9]: everything,
            f"{whole}/0/": {public, sibling},
            f"{whole}/{zone}/": {private},
            str(public)[:100]: {public, sibling},
            str(public): {public},
            f"{whole}/1": set(),
            f"{public}x": set(),
        }
        for prefix, expected in wanted.items():
            found = await trial.listed(prefix)
            expect(sorted(found), sorted(expected), f"list({prefix!r})")
        missing = everything - set(await trial.listed(""))
        expect(missing, set[ObjectKey](), "what list('') leaves out")

    @promise("One stored object: its key, its encoded size in bytes, its last use (Unix seconds).",
             Need.LIST)  # fmt: skip
    async def test_a_listing_says_when_an_object_was_last_used(self, trial: Trial) -> None:
        await trial.store(1, PAGE)
        found = [listed async for listed in trial.backend.list(trial.namespace)]
        expect([listed.key for listed in found], [trial.key(1)], "the keys in list()")
        for listed in found:
            if abs(listed.used - time()) > _CLOCKS_APART_SECONDS:
                broken(f"about {time():.0f} for an object stored just now", listed.used)

    @promise("Every object whose key starts with prefix.", Need.LIST)
    async def test_what_stays_is_listed_whatever_comes_and_goes(self, trial: Trial) -> None:
        stays, goes = trial.numbered(range(40)), trial.numbered(range(100, 140))
        await trial.store_all((*range(40), *range(100, 140)), PAGE)
        found: list[ObjectKey] = []
        async for listed in trial.backend.list(trial.namespace):
            found.append(listed.key)
            if goes:
                await trial.delete([goes.pop()])
                await trial.store(1000 + len(goes), PAGE)
        missing = [key for key in stays if found.count(key) != 1]
        expect(missing, [], "objects that stayed and were not listed exactly once")

    @promise("Needs Capability.LIST.", Need.NO_LIST)
    async def test_who_cannot_list_says_so(self, trial: Trial) -> None:
        try:
            async for _ in trial.backend.list(trial.namespace):
                break
        except UnsupportedError:
            return
        broken("UnsupportedError from list() without Capability.LIST", "an answer")

    @promise("Remember what a namespace's digest stands for. The default forgets it.",
             Need.DISPOSABLE)  # fmt: skip
    async def test_a_description_is_remembered_as_it_was_or_forgotten(self, trial: Trial) -> None:
        for _ in range(2):
            await trial.backend.describe(trial.namespace, trial.canonical)
        known = await trial.backend.namespaces()
        for digest, canonical in known.items():
            expect(sha256(canonical).hexdigest(), digest, "the digest of a remembered description")
        if Capability.PERSISTENT in trial.backend.capabilities and trial.namespace in known:
            await trial.reopen()
            again = await trial.backend.namespaces()
            expect(again.get(trial.namespace), trial.canonical, "a description after a restart")

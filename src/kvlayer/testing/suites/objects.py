"""Promises about single objects: their bytes, sizes and names."""

from __future__ import annotations

import asyncio
import re
from functools import partial

from kvlayer.abc.backend import Hit, Miss, Read, Write
from kvlayer.config.registry import open_backend
from kvlayer.errors import BackendError, ConfigError
from kvlayer.identity.keys import Encoding, ObjectKey, Part
from kvlayer.testing.framed import framed
from kvlayer.testing.loan import PAGE, Loan, noise
from kvlayer.testing.promise import Need, broken, expect, promise, same_bytes
from kvlayer.testing.suites.place import BackendPlace
from kvlayer.testing.trial import Trial

__all__ = ["ObjectPromises"]

_ENCODINGS = ("3.raw", "22.raw", "2.raw-1", "2.zstd_1", "2.raw.aes")
_ZONES = ("0f" * 16, "f0" * 16)
_PARTS = (
    Part(1, (0, 4), (0, 2)),
    Part(0, (0, 40), (0, 2)),
    Part(0, (1, 4), (0, 2)),
    Part(0, (0, 4), (0, 20)),
    Part(0, (0, 4), (1, 2)),
    Part(0, (0, 4), None),
    Part(999_999_999, (0, 999_999_999), None),
    Part(0, (0, 4), (0, 2), "native:a"),
    Part(0, (0, 4), (0, 2), "native:ab"),
    Part(0, (0, 4), (0, 2), "native:a_b"),
    Part(0, (0, 4), (0, 2), "native:a-b:amx_16-2"),
)


class ObjectPromises(BackendPlace):
    """What was stored under a key is what is found under it, and under no other."""

    @promise("Keyed storage for immutable objects.")
    async def test_what_was_put_is_read_back_to_the_byte(self, trial: Trial) -> None:
        contents = [noise(1, PAGE), noise(2, 7 * PAGE), bytes(3 * PAGE), b"\xff\0\r\n" * PAGE]
        for number, content in enumerate(contents):
            key = trial.key(number)
            expect(await trial.put(key, content), None, "the result of put()")
            result, loan = await trial.get(key, len(content))
            expect(result, Hit(len(content)), f"get() of {len(content)} bytes")
            loan.holds(content, f"object {number}")

    @promise("One object to store: the concatenation of regions.")
    async def test_a_large_object_is_read_back_to_the_byte(self, trial: Trial) -> None:
        content = noise(1, self.large_nbytes)
        expect(await trial.put(trial.key(1), content, pages=(1,)), None, "the result of put()")
        result, loan = await trial.get(trial.key(1), len(content), pages=(1,))
        expect(result, Hit(len(content)), f"get() of {len(content)} bytes")
        loan.holds(content, "a large object")

    @promise("Fill each read's regions in order.")
    async def test_regions_are_one_object_however_it_is_cut(self, trial: Trial) -> None:
        content = noise(1, 9 * PAGE)
        cuts: tuple[tuple[int, ...], ...] = ((), (1,), (4, 5), (3, 1, 2, 3), (1,) * 9)
        for number, pages in enumerate(cuts):
            put = await trial.put(trial.key(number), content, pages=pages)
            expect(put, None, f"the result of put() from regions of {pages} pages")
            for other in cuts:
                result, loan = await trial.get(trial.key(number), len(content), pages=other)
                expect(result, Hit(len(content)), f"get() into regions of {other} pages")
                loan.holds(content, f"an object put as {pages} and read as {other} pages")

    @promise("One object to store: the concatenation of regions.")
    async def test_more_regions_than_a_system_call_takes_are_moved(self, trial: Trial) -> None:
        content = noise(1, self.many_regions * PAGE)
        ones = (1,) * self.many_regions
        expect(await trial.put(trial.key(1), content, pages=ones), None, "the result of put()")
        result, loan = await trial.get(trial.key(1), len(content), pages=ones)
        expect(result, Hit(len(content)), "get() into as many regions")
        loan.holds(content, "an object of many regions")

    @promise("Where to put an object's bytes from offset on.")
    async def test_a_read_starts_at_its_offset(self, trial: Trial) -> None:
        content = await trial.store(1, 6 * PAGE)
        for first in (1, 2, 5):
            result, loan = await trial.get(
                trial.key(1), (6 - first) * PAGE, offset=first * PAGE, pages=(1,)
            )
            expect(result, Hit((6 - first) * PAGE), f"get() from page {first} on")
            loan.holds(content[first * PAGE :], f"an object from page {first} on")
        result, loan = await trial.get(trial.key(1), 2 * PAGE, offset=PAGE)
        expect(result, Hit(2 * PAGE), "get() of two pages from the middle")
        loan.holds(content[PAGE : 3 * PAGE], "two pages from the middle")

    @promise("nbytes bytes were filled, fewer than asked only when the object ends there.")
    async def test_a_read_ends_with_the_object(self, trial: Trial) -> None:
        content = await trial.store(1, 3 * PAGE)
        for offset, left in ((0, 3), (1, 2), (2, 1), (3, 0), (4, 0), (900, 0)):
            result, loan = await trial.get(
                trial.key(1), 8 * PAGE, offset=offset * PAGE, pages=(1, 1, 2)
            )
            expect(result, Hit(left * PAGE), f"get() of 8 pages from page {offset} of 3")
            loan.holds(content[offset * PAGE :], f"what is left from page {offset} on")

    @promise("The object is not there.")
    async def test_a_miss_is_a_value(self, trial: Trial) -> None:
        result, _ = await trial.get(trial.key(1), PAGE)
        expect(result, Miss(), "get() of an object that was never stored")
        sizes = await trial.backend.contains([trial.key(1)])
        expect(sizes, [None], "contains() of an object that was never stored")

    @promise("Encoded size in bytes of each object, None for one that is absent.")
    async def test_contains_says_the_exact_size(self, trial: Trial) -> None:
        pages = (1, 2, 3, 16, 33)
        for number, count in enumerate(pages):
            await trial.store(number, count * PAGE)
        found = await trial.backend.contains(trial.numbered(range(len(pages))))
        expect(found, [count * PAGE for count in pages], "contains()")

    @promise("Storing a present key again succeeds and changes nothing.")
    async def test_a_present_object_is_not_written_again(self, trial: Trial) -> None:
        first = await trial.store(1, 2 * PAGE)
        for other in (noise(2, 2 * PAGE), noise(3, 5 * PAGE), noise(4, PAGE)):
            result = await trial.put(trial.key(1), other)
            expect(result, None, "the result of put() of a present key")
            sizes = await trial.backend.contains([trial.key(1)])
            expect(sizes, [2 * PAGE], "the size of the object that was there first")
            found = await trial.load(trial.key(1), 2 * PAGE)
            same_bytes(found or b"", first, "the object that was there first")

    @promise("Keyed storage for immutable objects.")
    async def test_keys_that_differ_anywhere_name_different_objects(self, trial: Trial) -> None:
        keys: list[ObjectKey] = [trial.key(1), trial.key(2)]
        keys += [trial.key(1, zone=zone) for zone in _ZONES]
        keys += [trial.key(1, part=part) for part in _PARTS]
        keys.append(trial.key(1, zone=_ZONES[0], part=_PARTS[5]))
        keys += [trial.key(1, tokens=tokens) for tokens in (1, 160, 999_999_999)]
        keys += [trial.key(1, encoding=Encoding.parse(each)) for each in _ENCODINGS]
        for number, key in enumerate(keys):
            expect(await trial.backend.contains([key]), [None], f"contains({key}), not stored yet")
            result = await trial.put(key, noise(number, PAGE))
            expect(result, None, f"the result of put({key})")
        for number, key in enumerate(keys):
            found = await trial.load(key, PAGE)
            same_bytes(found or b"", noise(number, PAGE), f"{key}, one of {len(keys)} alike,")

    @promise("nbytes bytes were filled, fewer than asked only when the object ends there.",
             Need.TRUNCATE)  # fmt: skip
    async def test_a_truncated_object_reads_short(self, trial: Trial) -> None:
        for number, left in enumerate((PAGE, PAGE + 7, PAGE - 1, 1, 0)):
            content = await trial.store(number, 4 * PAGE)
            self.truncate(trial.key(number), left)
            result, loan = await trial.get(trial.key(number), 4 * PAGE, pages=(1, 2))
            if isinstance(result, BackendError) or (left == 0 and result == Miss()):
                continue  # who notices that it is damaged may say so
            expect(result, Hit(left), f"get() of an object of which {left} bytes are left")
            loan.holds(content[:left], "a truncated object")
            sizes = await trial.backend.contains([trial.key(number)])
            expect(sizes, [left], "contains() of a truncated object")

    @promise("An object whose length contradicts its own header is no object", Need.TRUNCATE)
    async def test_an_object_cut_short_is_replaced(self, trial: Trial) -> None:
        content = framed(trial.key(1), noise(1, 4 * PAGE))
        for left in (3 * PAGE, PAGE, PAGE - 1, 7, 0):
            expect(await trial.put(trial.key(1), content), None, "the result of put()")
            self.truncate(trial.key(1), left)
            again = await trial.put(trial.key(1), content)
            expect(again, None, f"the result of put() of an object that was cut to {left} bytes")
            found = await trial.load(trial.key(1), len(content))
            same_bytes(found or b"", content, f"an object that was cut to {left} bytes and put")
        shorter = framed(trial.key(1), noise(2, 2 * PAGE))
        expect(await trial.put(trial.key(1), shorter), None, "the result of put() of a present key")
        found = await trial.load(trial.key(1), len(content))
        same_bytes(found or b"", content, "a whole object of another length")

    @promise("Each region is a contiguous memoryview of bytes, of any address and length")
    async def test_regions_may_lie_anywhere(self, trial: Trial) -> None:
        cuts = ((1, 4095, 4097, 511, 513), (PAGE - 7,), (PAGE, PAGE), (8, 8, 2 * PAGE))
        for number, cut in enumerate(cuts):
            content = noise(number, 5 * PAGE + number)
            lent = Loan(len(content), content, shift=(1, 8, 512, 0)[number])
            (stored,) = await trial.backend.put([Write(trial.key(number), lent.pieces(cut))])
            expect(stored, None, f"the result of put() from regions of {cut} bytes")
            for offset in (0, 1, PAGE, 2 * PAGE + 17):
                wanted = content[offset : offset + 3 * PAGE + 5]
                into = Loan(len(wanted), shift=(5, 64, 2048, 0)[number])
                read = Read(trial.key(number), into.pieces(cut[::-1]), offset)
                (result,) = await trial.backend.get([read])
                expect(result, Hit(len(wanted)), f"get() from byte {offset} on into such regions")
                into.holds(wanted, f"an object from byte {offset} on")
                into.guards_stand()

    @promise("landed, where it is given, may be called once this item's bytes are all there, with "
             "their number, on the thread that moved them and before get returns")  # fmt: skip
    async def test_what_landed_is_all_there(self, trial: Trial) -> None:
        contents = [await trial.store(n, (4 + n) * PAGE) for n in range(3)]
        loans = [Loan(6 * PAGE) for _ in range(4)]
        heard: list[tuple[int, int, bytes]] = []

        def land(number: int, nbytes: int) -> None:
            heard.append((number, nbytes, loans[number].content(nbytes)))
            loans[number].poison()  # it is somebody else's by now

        reads = [
            Read(trial.key(n), loan.regions(), landed=partial(land, n))
            for n, loan in enumerate(loans)
        ]
        results = await trial.backend.get(reads)
        told = len(heard)
        expect(results, [*(Hit(len(c)) for c in contents), Miss()], "the results of get()")
        for number, nbytes, content in heard:
            expect(nbytes, len(contents[number]) if number < 3 else None, "what landed, in bytes")
            same_bytes(content, contents[number], "an object, when it had landed")
        expect(len({number for number, *_ in heard}), told, "one call for each that landed")
        for _ in range(10):
            await asyncio.sleep(0)
        expect(len(heard), told, "the number of calls once get() had returned")
        for number, *_ in heard:
            loans[number].is_poisoned_still()

    @promise("They belong to the caller")
    async def test_a_read_writes_inside_its_regions_only(self, trial: Trial) -> None:
        await trial.store(1, 4 * PAGE)
        for nbytes in (PAGE, 2 * PAGE, 4 * PAGE, 6 * PAGE):
            result, loan = await trial.get(trial.key(1), nbytes, pages=(1,))
            expect(result, Hit(min(nbytes, 4 * PAGE)), f"get() of {nbytes} bytes")
            loan.guards_stand()

    @promise("The caller keeps them alive and unchanged until put returns.")
    async def test_a_put_leaves_the_callers_bytes_alone(self, trial: Trial) -> None:
        content = noise(1, 4 * PAGE)
        loan = Loan(len(content), content)
        results = await trial.backend.put([Write(trial.key(1), loan.regions((1,)))])
        expect(results, [None], "the results of put()")
        loan.holds(content, "the memory that put() was lent")
        loan.guards_stand()

    @promise("Raises ConfigError for an unknown option or a bad value.", Need.URL)
    async def test_an_unknown_option_is_a_config_error(self, trial: Trial) -> None:
        url = self.placed(self.url)
        odd = {f"{url}{'&' if '?' in url else '?'}no_such_option_for_kvlayer=1"}
        for given in (url, self.placed(self.small_url)):
            odd |= {re.sub(r"\bcapacity=[^&]*", "capacity=plenty", given)} - {given}
        for each in sorted(odd):
            try:
                open_backend(each, backends=self.backends)
            except ConfigError:
                continue
            broken(f"ConfigError for {each}", "it was accepted")

    @promise("Build an unopened backend. Touches neither network nor disk.", Need.DIRECTORY)
    async def test_building_a_backend_touches_nothing(self, trial: Trial) -> None:
        build, listing = self.built_elsewhere()
        build()
        expect(listing(), [], "what building left in its directory")

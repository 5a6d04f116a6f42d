"""The janitor's books: what lies on disk is never more than what is counted."""

from __future__ import annotations

from kvlayer.abc.backend import Write
from kvlayer.eviction.lru import PrefixLRU
from kvlayer.identity.keys import ObjectKey, ObjectName, Part
from kvlayer_backends.file.ledger import Ledger
from kvlayer_backends.file.victims import Eviction

OTHER, THIRD = (
    ObjectName.raw(ObjectKey.of("ab" * 32, "0", bytes([n] * 32), 16, Part(0, (0, 1), (0, 1))))
    for n in (1, 2)
)
KEY = ObjectName.raw(ObjectKey.of("ab" * 32, "0", bytes(32), 16, Part(0, (0, 1), (0, 1))))


def test_a_file_made_anew_while_its_old_self_was_evicted_stays_counted() -> None:
    ledger = Ledger(PrefixLRU, 100)
    ledger.create(KEY, 40, 1)
    (victim,) = ledger.take(40, 1, 0.0)
    ledger.granted_nbytes += 40
    # The thread has unlinked the file; another writer of the same key links its own right after,
    # and its end is booked before the eviction's.
    ledger.granted_nbytes -= 40
    ledger.create(KEY, 40, 2)
    ledger.settle([victim], Eviction(gone=[victim]))
    assert (ledger.used_nbytes, len(ledger)) == (40, 1)
    assert [victim.key for victim in ledger.take(1, 1, 0.0)] == [KEY]


def test_what_is_written_before_the_first_scan_begins_is_newer_than_what_it_finds() -> None:
    ledger = Ledger(PrefixLRU, 100)
    ledger.create(KEY, 40, 9)
    ledger.begin_scan()
    ledger.discover([(OTHER, 40, 5, b""), (THIRD, 40, 7, b"")], ledger.begin_run())
    ledger.sort(ledger.by_use())
    ledger.end_scan()
    assert [victim.key for victim in ledger.take(120, 1, 0.0)] == [OTHER, THIRD, KEY]


def test_an_evicted_file_is_forgotten() -> None:
    ledger = Ledger(PrefixLRU, 100)
    ledger.create(KEY, 40, 1)
    (victim,) = ledger.take(40, 1, 0.0)
    ledger.settle([victim], Eviction(gone=[victim]))
    assert (ledger.used_nbytes, len(ledger), ledger.take(1, 1, 0.0)) == (0, 0, [])


def test_what_was_spared_goes_in_the_order_in_which_it_was_used() -> None:
    """A victim that turned out to be in use: it is as recent as its last use, not as its name."""
    ledger = Ledger(PrefixLRU, 200)
    for at, key in enumerate((KEY, OTHER, THIRD)):
        ledger.create(key, 40, at + 1)
    victims = ledger.take(120, 1, 0.0)
    assert [victim.key for victim in victims] == [KEY, OTHER, THIRD]
    spared = {KEY: 30, OTHER: 10, THIRD: 20}
    ledger.settle(victims, Eviction(spared=[(each, spared[each.key]) for each in victims]))
    assert ledger.take(1, 1, 0.0) == []  # not named again before all are
    ledger.spare(spared)
    assert [victim.key for victim in ledger.take(120, 1, 0.0)] == [OTHER, THIRD, KEY]


def test_a_file_that_is_being_written_is_not_counted_twice() -> None:
    """Else what lies there would make room for bytes that are not there."""
    ledger = Ledger(PrefixLRU, 100)
    write = Write(OTHER, (memoryview(bytes(40)),))
    ledger.expect([write])
    ledger.granted_nbytes += 40
    ledger.begin_scan()
    ledger.discover([(OTHER, 40, 5, b"")], ledger.begin_run())
    assert ledger.used_nbytes == 40
    ledger.granted_nbytes -= 40
    ledger.create(OTHER, 40, 6, write)
    ledger.expect_no_more([write])
    ledger.discover([(OTHER, 40, 5, b"")], ledger.begin_run())
    assert (ledger.used_nbytes, len(ledger)) == (40, 1)


def test_what_is_found_takes_its_place_among_what_was_used_before_the_scan() -> None:
    ledger = Ledger(PrefixLRU, 100)
    ledger.add(KEY, 10, 10)
    ledger.add(OTHER, 10, 30)
    ledger.begin_scan()
    ledger.discover([(THIRD, 10, 20, b"")], ledger.begin_run())
    ledger.sort(ledger.by_use())
    ledger.end_scan()
    assert [victim.key for victim in ledger.take(30, 1, 0.0)] == [KEY, THIRD, OTHER]


def test_a_file_that_was_seen_while_a_write_of_it_failed_is_counted() -> None:
    """The write was cancelled, or found no room: the file lies there all the same."""
    ledger = Ledger(PrefixLRU, 100)
    write = Write(OTHER, (memoryview(bytes(40)),))
    ledger.expect([write])
    ledger.begin_scan()
    ledger.discover([(OTHER, 40, 5, b"")], ledger.begin_run())
    ledger.end_scan()
    assert ledger.used_nbytes == 0  # its room was granted, which this test leaves out
    ledger.expect_no_more([write])
    assert (ledger.used_nbytes, len(ledger)) == (40, 1)

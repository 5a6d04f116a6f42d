"""Promises: who stores a chunk, until when, and how much of it has come."""

from __future__ import annotations

from kvlayer.tier.planner.promises import Promises

A, B, C = b"a" * 32, b"b" * 32, b"c" * 32


def test_a_promise_is_found_by_each_of_its_chunks_until_these_are_there() -> None:
    promises = Promises()
    promise = promises.make("n", holder="me", until=10.0)
    for chunk in (A, B, C):
        promises.add(promise, chunk, "public" if chunk == A else "tenant")
    assert (promise.namespace, promise.holder) == ("n", "me")
    assert promise.hashes == {A: "public", B: "tenant", C: "tenant"}  # a salt may begin within it
    assert [promises.find("n", chunk, 9.9) for chunk in (A, B, C)] == [promise] * 3
    promises.end(promise, [A, B], kept=True)
    assert (promise.kept, [*promise.hashes], len(promises)) == (2, [C], 1)
    assert (promises.find("n", A, 0.0), promises.find("n", C, 0.0)) == (None, promise)
    promises.end(promise, [C], kept=False)
    assert (promise.kept, len(promises)) == (2, 0)  # what will not come is not kept


def test_what_has_ended_ends_once_and_what_was_never_promised_not_at_all() -> None:
    promises = Promises()
    promise = promises.make("n", holder="", until=10.0)
    promises.add(promise, A, "")
    promises.end(promise, [A, A, B], kept=True)
    promises.end(promise, [A], kept=True)
    assert (promise.kept, promise.hashes, len(promises)) == (1, {}, 0)


def test_who_promised_a_chunk_first_stays_the_one_to_ask() -> None:
    promises = Promises()
    first, second = (promises.make("n", holder=name, until=10.0) for name in "12")
    for promise in (first, second):
        promises.add(promise, A, "")
    assert promises.find("n", A, 0.0) is first
    promises.end(second, [A], kept=True)
    assert promises.find("n", A, 0.0) is first  # another's end takes nothing away
    promises.end(first, [A], kept=True)
    assert promises.find("n", A, 0.0) is None


def test_a_promise_whose_time_is_over_is_not_believed_and_says_so() -> None:
    promises = Promises()
    promise, told = promises.make("n", holder="", until=10.0), list[int]()
    promises.add(promise, A, "")
    promises.add(promise, B, "")
    promise.watch(lambda: told.append(1))
    assert promises.find("n", A, 9.999) is promise and told == []
    assert promises.find("n", A, 10.0) is None
    assert (told, promise.kept, len(promises)) == ([1], 0, 0)
    promise.changed()
    assert told == [1]  # who watches is told once

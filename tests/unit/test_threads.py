"""Threads that run blocking work: they end with their owner, however it goes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, wait
from traceback import clear_frames

import pytest
from hang import HANG

from kvlayer.runtime.offload import Offload
from kvlayer.runtime.threads import Threads


@pytest.fixture(autouse=True)
def leaves_no_thread() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(HANG)
        assert not thread.is_alive()


def test_threads_that_nobody_has_any_more_end() -> None:
    threads = Threads(2, "test")
    gate = threading.Event()
    works = [threads.submit(gate.wait, HANG) for _ in range(2)]
    started = list(threads._threads)
    assert len(started) == 2
    gate.set()
    assert all(work.result(HANG) for work in works)
    gone = weakref.ref(threads)
    assert all(thread.is_alive() for thread in started)  # idle, for more work
    del threads
    gc.collect()
    assert gone() is None
    for thread in started:
        thread.join(HANG)
        assert not thread.is_alive()


def test_what_was_queued_is_done_before_forgotten_threads_end() -> None:
    threads = Threads(1, "test")
    gate, done = threading.Event(), list[int]()
    threads.submit(gate.wait, HANG)
    last = [threads.submit(done.append, number) for number in range(3)][-1]
    del threads
    gc.collect()
    gate.set()
    last.result(HANG)
    assert done == [0, 1, 2]


def test_an_offload_that_was_never_closed_leaves_no_thread() -> None:
    offload = Offload(1, "test")
    offload.begin()
    assert offload._pool is not None
    (thread,) = offload._pool._threads
    del offload
    gc.collect()
    thread.join(HANG)
    assert not thread.is_alive()


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_refers_to_work_by_the_time_it_has_ended(fails: bool) -> None:
    """Who waits may close the memory at once that the work was lent."""

    class Work:
        def __call__(self) -> None:
            gate.wait(HANG)
            if fails:
                raise RuntimeError("as asked")

    gate, gone = threading.Event(), list[bool]()
    threads, work = Threads(1, "test"), Work()
    kept = weakref.ref(work)

    def ended(future: Future[None]) -> None:
        """On the thread, before it goes on: as who waits would see it who is woken at once."""
        if (error := future.exception()) is not None:
            clear_frames(error.__traceback__)
        gone.append(kept() is None)

    future = threads.submit(work)
    future.add_done_callback(ended)
    del work
    gate.set()
    wait([future], HANG)
    threads.end()
    assert gone == [True]


def test_threads_that_have_ended_are_told_so_once() -> None:
    threads = Threads(1, "test")
    threads.submit(int).result(HANG)
    assert threads.end() == 0
    queue = threads._queue
    del threads
    gc.collect()
    assert queue.empty()


def test_the_pool_does_not_wait_for_itself() -> None:
    """Work that holds the last reference to the pool drops it on the pool's own thread."""
    threads = Threads(1, "test")
    holder = [threads]
    gate = threading.Event()

    def work() -> None:
        gate.wait(HANG)
        holder.clear()
        gc.collect()

    future = threads.submit(work)
    del threads
    gate.set()
    assert future.result(HANG) is None
    assert holder == []

"""Threads that do not keep the process alive: what ``Offload`` runs its work on.

Those of ``concurrent.futures`` are waited for when the interpreter exits, without end where one of
them hangs in a system call. These are daemons; at exit they are waited for, but not for ever.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeAlias, TypeVar
from weakref import WeakSet, finalize

__all__ = ["NoThreadError", "Threads"]

P = ParamSpec("P")
T = TypeVar("T")

_EXIT_SECONDS = 5.0
"""What the end of the process waits for work that still runs: copies end in less."""

_Work: TypeAlias = tuple[Future[Any], list[Callable[[], Any]]]
"""The list holds one: whoever makes the call takes it, so that nothing else refers to it."""


class NoThreadError(RuntimeError):
    """The system starts no thread, and there is none."""


class Threads(Executor):
    """At most ``count`` daemon threads, each started when there is work for it.

    Goes on with the threads it has where the system gives it no more (memory, ``ulimit -u``).
    They end with :meth:`end`, or once nobody has this any more and what was queued is done.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._at_work: set[int] = set()
        """Idents of threads; each adds and discards its own."""
        self._has_ended = False
        # Threads know the queue and not this: whoever drops it without ending it drops them, too.
        self._forgotten = finalize(self, _tell, self._queue, self._threads)
        self._forgotten.atexit = False
        _open.add(self)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``fn`` on a thread.

        Raises ``RuntimeError`` once ended, and :class:`NoThreadError`; then ``fn`` is queued all
        the same, for a thread that may come.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._has_ended:
                raise RuntimeError(f"the threads of {self._name!r} have ended")
            self._queue.put((future, [partial(fn, *args, **kwargs)]))
            if self._idle.acquire(blocking=False) or len(self._threads) >= self._count:
                return future
            name = f"{self._name}_{len(self._threads)}"
            given = self._queue, self._idle, self._at_work
            thread = threading.Thread(target=_serve, args=given, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as exc:  # whoever lives will get to it
                if not self._threads:
                    raise NoThreadError(*exc.args) from exc
            else:
                self._threads.append(thread)
        return future

    def end(self, seconds: float | None = None) -> int:
        """Cancel what has not started, and wait for the rest; at most ``seconds``.

        Returns how many threads are still at work. Idempotent.
        """
        with self._lock:
            self._has_ended = True
            while True:
                try:
                    work = self._queue.get_nowait()
                except Empty:
                    break
                if work is not None:
                    work[0].cancel()
            self._forgotten.detach()
            _tell(self._queue, self._threads)
        until = None if seconds is None else time.monotonic() + seconds
        for thread in self._threads:
            thread.join(None if until is None else max(until - time.monotonic(), 0))
        stuck = len(self._at_work)
        if not stuck:
            for thread in self._threads:  # idle: told to end, and about to
                thread.join()
        return stuck

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """What ``Executor`` asks for: :meth:`end`."""
        self.end(None if wait else 0)


def _serve(queue: SimpleQueue[_Work | None], idle: threading.Semaphore, at_work: set[int]) -> None:
    ident = threading.get_ident()
    while True:
        try:
            work = queue.get_nowait()
        except Empty:
            idle.release()
            work = queue.get()
        if work is None:
            return
        at_work.add(ident)
        _do(*work)
        at_work.discard(ident)
        del work  # it may hold what the next waits for


def _tell(queue: SimpleQueue[_Work | None], threads: Sequence[threading.Thread]) -> None:
    """Every thread is to end behind what is queued."""
    for _ in threads:
        queue.put(None)


def _do(future: Future[Any], work: list[Callable[[], Any]]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work.pop()()  # let go of by the time the future says that it has ended
    except BaseException as exc:  # noqa: BLE001  # raised where the future is waited for
        future.set_exception(exc)
        del future  # the traceback refers to this frame
    else:
        future.set_result(result)


_open: WeakSet[Threads] = WeakSet()


def _at_exit() -> None:
    """Let running work end: a thread that is torn down inside a library may abort the process."""
    until = time.monotonic() + _EXIT_SECONDS
    for threads in list(_open):
        threads.end(max(until - time.monotonic(), 0))


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):  # a child has none of the threads, and their locks may be held
    os.register_at_fork(after_in_child=_open.clear)

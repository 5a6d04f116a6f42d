"""Work on a cache's loop as another thread sees it: poll it, wait for it a while, cancel it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from threading import get_ident
from typing import TypeVar

from kvlayer._values import waiting
from kvlayer.errors import ForkedError, PendingError, UnsupportedError

__all__ = ["Job"]

T = TypeVar("T")


class Job(Future[T]):
    """A ``concurrent.futures.Future`` of work that runs on a loop of another thread.

    ``done()`` polls, :meth:`wait` waits at most so long, ``concurrent.futures.wait`` waits for
    many. A result is there when the work has really ended; a job that was cancelled is done at
    once, and ``has_ended`` when its work is. Still running when its portal closes, it is cancelled.
    Thread-safe.
    """

    def __init__(self, loop_thread: int, stop: Callable[[Job[T]], None]) -> None:
        super().__init__()
        self._loop_thread = loop_thread
        self._stop = stop
        self._pid = os.getpid()
        self.has_ended = False
        """Whether the work is over, cancelled or not: what it was lent is let go."""

    def wait(self, seconds: float | None = None) -> T:
        """The result, or what the work raised; waits at most ``seconds`` (None: no limit).

        Raises ``PendingError`` when the time is up: the work goes on and can be waited for again
        or cancelled. Raises ``concurrent.futures.CancelledError`` for a cancelled job, and
        ``UnsupportedError`` on the loop's own thread, which waiting would block, and
        ``ForkedError`` in a forked child, where nobody works on it.
        """
        seconds = waiting("seconds", seconds)
        if get_ident() == self._loop_thread and not self.done():
            raise UnsupportedError(
                "waiting for a job would block the loop that runs it",
                hint="await the cache's own methods there, or poll job.done()",
            )
        if os.getpid() != self._pid and not self.done():
            raise ForkedError(
                f"the job was submitted in process {self._pid} and is waited for in {os.getpid()}",
                hint="open a portal in each process, after the fork",
            )
        try:
            return self.result(seconds)
        except TimeoutError:
            if self.done():  # the work's own, or it ended this very moment
                return self.result()
        raise PendingError(
            f"not done within {seconds or 0:g} s",
            hint="the work goes on: wait again, poll done(), or cancel()",
        )

    def cancel(self) -> bool:
        """Give the work up; False when it has ended already.

        The job counts as cancelled at once. The work ends some time after and lets go then of what
        it was lent: see ``has_ended``, or wait with ``concurrent.futures.wait([job])``.
        """
        if not super().cancel():
            return False
        self._stop(self)
        return True

    def answer(self, result: T) -> None:
        """The work ended well. For the loop that ran it."""
        self.has_ended = True
        if self.set_running_or_notify_cancel():
            self.set_result(result)

    def fail(self, error: BaseException) -> bool:
        """The work raised. False when nobody is going to see it. For the loop that ran it."""
        self.has_ended = True
        if not self.set_running_or_notify_cancel():
            return False
        self.set_exception(error)
        return True

    def drop(self) -> None:
        """The work was cancelled, or never began. For the loop that was to run it."""
        self.has_ended = True
        super().cancel()
        self.set_running_or_notify_cancel()

"""One call to a tier: from its admission until the tier has let go of what it was lent."""

from __future__ import annotations

import asyncio
from asyncio import CancelledError
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from enum import Enum
from math import inf
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

from kvlayer.results import Cause
from kvlayer.runtime.foreign import awaited

if TYPE_CHECKING:
    from kvlayer.tier.guard.guard import Guard
    from kvlayer.tier.guard.lane_queue import LaneQueue

__all__ = ["TierCall", "Ended", "Lane", "Refused", "Ride", "TaskRide"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Ended: TypeAlias = Callable[[T | None, BaseException | None], None]
"""Told how a ride ended: its result, or what it raised, ``CancelledError`` included."""


class Lane(Enum):
    """The two directions of a tier. A disk that is full still serves what it holds."""

    READS = "reads"
    WRITES = "writes"

    __hash__ = object.__hash__  # an enumeration's own is a call in Python, many times an object


class Refused(Exception):  # noqa: N818  # a refusal, not an error: callers turn it into a cause
    """The call was not made: ``cause`` is ``BUSY`` or ``TIER_DOWN``."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause
        self.detail = detail


class Ride(Protocol[T_co]):
    """Work that a call does once its turn has come, alone or together with others."""

    def begin(self, ended: Ended[T_co], /) -> None:
        """Begin, once. ``ended`` is called once, on the loop, when the tier has let go of all that
        this ride lent it; never from inside ``begin`` or ``cancel``.
        """
        ...

    def cancel(self) -> None:
        """Ask it to end soon: with ``CancelledError``, unless it ends by itself before."""
        ...


class TaskRide(Generic[T]):
    """A coroutine that rides alone, in a task of its own and the context it was made in."""

    __slots__ = ("_call", "_context", "_task")

    def __init__(self, call: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._call = call
        self._context = copy_context()
        self._task: asyncio.Task[T] | None = None

    def begin(self, ended: Ended[T], /) -> None:
        """See :meth:`Ride.begin`."""
        work = awaited(self._call)
        task = asyncio.get_running_loop().create_task(work, context=self._context)
        self._task = task

        def done(_: asyncio.Task[T]) -> None:
            error = CancelledError() if task.cancelled() else task.exception()
            ended(task.result() if error is None else None, error)

        task.add_done_callback(done)

    def cancel(self) -> None:
        """See :meth:`Ride.cancel`."""
        if self._task is not None:
            self._task.cancel()


class _State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    LEAVING = "leaving"
    """It gave its turn up before it came, and ends in the loop's next turn."""
    ENDED = "ended"


class TierCall(Generic[T]):
    """One call to a tier. It has *ended* once its outcome was booked, not merely known.

    The guard makes it, begins it when it is its turn, and books its end. It costs a task only if
    its ride does, and a future only if somebody waits. ``booked`` is for the guard to call.
    """

    __slots__ = (
        "_context",
        "_ended",
        "_error",
        "_expiry",
        "_guard",
        "_loop",
        "_result",
        "_ride",
        "_state",
        "began_at",
        "booked",
        "nbytes",
        "since",
        "turns",
        "was_late",
        "was_told_to_stop",
    )

    def __init__(
        self,
        ride: Ride[T],
        guard: Guard,
        turns: LaneQueue,
        *,
        booked: Callable[[TierCall[T]], None] | None,
        nbytes: int,
        loop: asyncio.AbstractEventLoop,
        now: float,
    ) -> None:
        self._ride = ride
        self._guard = guard
        self._loop = loop
        self._context: Context = copy_context()  # what is told when it ends is part of that request
        self._state = _State.WAITING
        self._result: T | None = None
        self._error: BaseException | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._ended: asyncio.Future[None] | None = None
        self.turns = turns
        """The lane it is in."""
        self.booked = booked
        self.nbytes = nbytes
        self.since = now
        """When it was admitted, by the loop's clock."""
        self.began_at = inf
        """When its turn came."""
        self.was_late = False
        """Whether a deadline passed before it ended."""
        self.was_told_to_stop = False

    @property
    def lane(self) -> Lane:
        return self.turns.lane

    @property
    def has_begun(self) -> bool:
        """Whether its turn has come."""
        return self.began_at < inf

    @property
    def has_ended(self) -> bool:
        return self._state is _State.ENDED

    def age(self) -> float:
        """Seconds since it was admitted. From any thread."""
        return max(self._loop.time() - self.since, 0.0)

    # -- for the guard -----------------------------------------------------------------------------

    def begin(self, now: float) -> None:
        """Its turn has come."""
        self._state = _State.RUNNING
        self.began_at = now
        try:
            self._ride.begin(self._over)
        except Exception as exc:  # noqa: BLE001  # its turn must come back
            self._loop.call_soon(self._over, None, exc)

    def refuse(self, error: BaseException) -> None:
        """It will not have a turn: it ends with ``error`` in the loop's next turn."""
        self._state = _State.LEAVING
        self._loop.call_soon(self._over, None, error)

    def _over(self, result: T | None, error: BaseException | None) -> None:
        self._result, self._error = result, error
        if self._expiry is not None:
            self._expiry.cancel()
        try:
            self._context.run(self._guard.book, self)
        except Exception as exc:  # noqa: BLE001  # whoever else rides along must end, too
            message = f"what books the end of a call ({self.lane.value}) raised"
            self._loop.call_exception_handler({"message": message, "exception": exc})
        finally:
            self._state = _State.ENDED
            if self._ended is not None:
                self._ended.set_result(None)

    # -- for whoever started it --------------------------------------------------------------------

    def cancel(self) -> None:
        """Ask it to stop. It ends when the backend has let go of what it was lent."""
        if self._state is _State.ENDED:
            return
        self.was_told_to_stop = True
        if self._state is _State.WAITING:
            self.turns.leave(self)
            self.refuse(CancelledError())
        elif self._state is _State.RUNNING:
            self._ride.cancel()
        self.left_alone()

    def left_alone(self, *, cancel: bool = False) -> None:
        """Nobody waits for it: it has a deadline from now on, and is cancelled then if asked."""
        if self._expiry is None and not self.has_ended:
            self._expiry = self._loop.call_later(self._guard.deadline, self._expire, cancel)

    def _expire(self, cancel: bool) -> None:
        self._guard.passed_over(self)
        if cancel:
            self.cancel()

    @property
    def error(self) -> BaseException | None:
        """What it raised, ``CancelledError`` included; None when there is a result."""
        return self._error

    @property
    def was_cancelled(self) -> bool:
        """Whether it ended by being cancelled, by whomever."""
        return isinstance(self._error, CancelledError)

    def result(self) -> T:
        """Its result. Raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # a ride that raised nothing has one

    async def ended(self, seconds: float | None = None) -> bool:
        """Wait until it has ended, at most ``seconds``. Cancelling the waiter leaves it alone."""
        if not self.has_ended:
            if self._ended is None:
                self._ended = self._loop.create_future()
            await asyncio.wait({self._ended}, timeout=seconds)
        return self.has_ended

"""Whether a tier is asked at all. Pure: the caller brings the time and the chance.

A circuit breaker after M. Nygard, "Release It!" (2nd ed., 2018), chapter 5: after one missed
deadline, or errors on several different objects in a row, nothing is asked for a pause; then one
trial decides. An error on the same object again is that object's, not the tier's. Every
further failure doubles the pause, and only a tier that has served for as long as it would be left
alone next gets a short pause again: one that flaps costs its users one deadline per pause.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from enum import StrEnum
from math import inf

__all__ = ["Breaker", "BreakerState"]

_MAX_ERRORS = 5
_PAUSE_SECONDS = 1.0
_MAX_PAUSE_SECONDS = 60.0


class BreakerState(StrEnum):
    """What a tier's users may do."""

    CLOSED = "closed"
    """Ask."""
    OPEN = "open"
    """Not ask: it would cost a deadline."""
    HALF_OPEN = "half-open"
    """Wait for the trial that is running."""


class Breaker:
    """One direction of one tier. ``jitter()`` gives numbers from 0 to 1."""

    def __init__(
        self,
        *,
        pause: float = _PAUSE_SECONDS,
        max_pause: float = _MAX_PAUSE_SECONDS,
        max_errors: int = _MAX_ERRORS,
        jitter: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.state = BreakerState.CLOSED
        self.reason = ""
        """Why it is not closed."""
        self.trial_at = 0.0
        """When it may be tried again, while it is open."""
        self._first_pause = pause
        self._max_pause = max_pause
        self._max_errors = max_errors
        self._jitter = jitter
        self._failed: set[Hashable] = set()
        """What failed since the last success: objects, and a mark for each error without one."""
        self._pause = pause
        """The next one."""
        self._closed_at = -inf

    @property
    def is_closed(self) -> bool:
        return self.state is BreakerState.CLOSED

    @property
    def is_half_open(self) -> bool:
        return self.state is BreakerState.HALF_OPEN

    def missed(self, now: float, reason: str) -> bool:
        """A deadline was missed, the costliest failure: open at once. Whether this opened it."""
        return self._open(now, reason)

    @property
    def failed_count(self) -> int:
        """Different objects that failed since the last success."""
        return len(self._failed)

    def failed(self, now: float, reason: str, about: Hashable = None) -> bool:
        """An error came back in time. Whether this opened it.

        ``about`` is the object that was asked for: it counts once, however often it fails. An error
        about none in particular counts each time.
        """
        if len(self._failed) < self._max_errors:
            self._failed.add(object() if about is None else about)
        if len(self._failed) < self._max_errors and self.state is not BreakerState.HALF_OPEN:
            return False
        return self._open(now, reason)

    @property
    def is_untroubled(self) -> bool:
        """Whether :meth:`succeeded` would change nothing."""
        is_quiet = self.state is BreakerState.CLOSED and not self._failed
        return is_quiet and self._pause == self._first_pause

    def succeeded(self, now: float) -> None:
        """A call of a user succeeded in time.

        The next pause is short again once that has been so for as long as the next pause is.
        """
        self._close(now)
        if now - self._closed_at >= self._pause:
            self._pause = self._first_pause

    def is_due(self, now: float) -> bool:
        """Whether it is time for the one trial."""
        return self.state is BreakerState.OPEN and now >= self.trial_at

    def try_now(self, now: float) -> bool:
        """Whether the caller may make the one trial; True makes it half-open.

        Whoever was told True owes a verdict: ``passed``, ``failed``, ``missed`` or ``untried``.
        """
        if not self.is_due(now):
            return False
        self.state = BreakerState.HALF_OPEN
        return True

    def passed(self, now: float) -> bool:
        """The trial succeeded; whether that closed it."""
        if not self.is_half_open:
            return False
        self._close(now)
        return True

    def untried(self) -> None:
        """The trial was called off: the next one may be made at once."""
        if self.is_half_open:
            self.state = BreakerState.OPEN

    def _close(self, now: float) -> None:
        if not self.is_closed:
            self._closed_at = now
        self._failed.clear()
        self.state, self.reason = BreakerState.CLOSED, ""

    def _open(self, now: float, reason: str) -> bool:
        if self.state is BreakerState.OPEN:
            return False  # a call from before it opened
        self.state, self.reason = BreakerState.OPEN, reason
        # Between half a pause and a whole one: many processes must not come back together.
        self.trial_at = now + self._pause * (0.5 + 0.5 * self._jitter())
        self._pause = min(2 * self._pause, self._max_pause)
        return True

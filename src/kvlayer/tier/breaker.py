"""Whether a tier is asked at all. Pure: the caller brings the time and the chance.

A circuit breaker after M. Nygard, "Release It!" (2nd ed., 2018), chapter 5: after one missed
deadline or several errors in a row nothing is asked for a pause; then one trial decides. Every
further failure doubles the pause, so a tier that flaps costs its users one deadline per pause.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

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
        self._errors = 0
        self._pause = pause

    @property
    def is_closed(self) -> bool:
        return self.state is BreakerState.CLOSED

    @property
    def is_half_open(self) -> bool:
        return self.state is BreakerState.HALF_OPEN

    def missed(self, now: float, reason: str) -> bool:
        """A deadline was missed, the costliest failure: open at once. Whether this opened it."""
        return self._open(now, reason)

    def failed(self, now: float, reason: str) -> bool:
        """An error came back in time. Whether this opened it."""
        self._errors += 1
        if self._errors < self._max_errors and self.state is not BreakerState.HALF_OPEN:
            return False
        return self._open(now, reason)

    def succeeded(self) -> None:
        """A call of a user succeeded in time: all is forgiven."""
        self._errors = 0
        self._pause = self._first_pause
        self.state, self.reason = BreakerState.CLOSED, ""

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

    def passed(self) -> bool:
        """The trial succeeded; whether that closed it.

        The pause stays as long as it was until a user's call succeeds.
        """
        if not self.is_half_open:
            return False
        self._errors = 0
        self.state, self.reason = BreakerState.CLOSED, ""
        return True

    def untried(self) -> None:
        """The trial was called off: the next one may be made at once."""
        if self.is_half_open:
            self.state = BreakerState.OPEN

    def _open(self, now: float, reason: str) -> bool:
        if self.state is BreakerState.OPEN:
            return False  # a call from before it opened
        self.state, self.reason = BreakerState.OPEN, reason
        # Between half a pause and a whole one: many processes must not come back together.
        self.trial_at = now + self._pause * (0.5 + 0.5 * self._jitter())
        self._pause = min(2 * self._pause, self._max_pause)
        return True

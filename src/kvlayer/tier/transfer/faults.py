"""What an error of a backend is to those who asked: a cause, and words."""

from __future__ import annotations

from kvlayer.errors import BackendError, BackendTimeoutError, NoRoomError
from kvlayer.results import Cause

__all__ = ["fault_of"]


def fault_of(error: BackendError) -> tuple[Cause, str]:
    if isinstance(error, NoRoomError):
        return Cause.NO_ROOM, str(error)
    is_late = isinstance(error, BackendTimeoutError)
    return Cause.DEADLINE if is_late else Cause.TIER_DOWN, str(error)

"""Stretches of time within which objects are told apart by depth, not by age. Pure."""

from __future__ import annotations

__all__ = ["Epochs"]

_SECONDS = 60.0
_AT_MOST_SECONDS = 600.0


class Epochs:
    """An epoch ends after a minute, when a prompt begins: not amid one, if it can be helped."""

    def __init__(self) -> None:
        self._began: float | None = None

    def begins(self, now: float, *, is_root: bool) -> bool:
        """Whether another epoch begins at ``now`` (seconds), with an object that is a root or not.

        The first call begins one; so does a clock that was set back.
        """
        age = None if self._began is None else now - self._began
        if age is not None and 0 <= age < (_SECONDS if is_root else _AT_MOST_SECONDS):
            return False
        self._began = now
        return True

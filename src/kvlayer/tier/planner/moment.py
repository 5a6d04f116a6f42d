"""When a decision is made: whoever decides is given it. Pure."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Moment"]


class Moment(NamedTuple):
    """One moment by two clocks, in seconds."""

    clock: float
    """The cache's: never set back. Deadlines of leases and promises are by it."""
    wall: float
    """Unix time: what is told to people, and until when objects are to be kept."""

"""What an engine has handed over is stored: a state to wait for, however long that takes."""

from __future__ import annotations

from threading import Event
from typing import Any

from kvlayer import Cache

__all__ = ["settled"]


def settled(half: Any) -> None:
    """Wait until every save of a scheduler's half has ended, and the tiers have what was stored.

    Blocks are let go of earlier, once they are gathered: by then a save may not have been counted
    yet, nor handed to the tiers, and a flush would not wait for it.
    """
    for save in tuple(half._stores._running):
        while not save.has_ended:
            Event().wait(0.001)
    half.portal.call(Cache.flush)

"""Writes that found no room: what follows them in a prompt would be of no use. Pure memory."""

from __future__ import annotations

from collections import OrderedDict

from kvlayer.abc.backend import Write
from kvlayer_backends.file.lineage import Lineage, Place

__all__ = ["Refusals"]

_REMEMBERED = 65_536


class Refusals:
    """Remembers the latest refused writes until their objects come after all."""

    def __init__(self, lineage: Lineage) -> None:
        self._lineage = lineage
        self._places: OrderedDict[Place, None] = OrderedDict()

    def add(self, write: Write) -> None:
        """There was no room for an object."""
        self._places[self._lineage.place(write)] = None
        if len(self._places) > _REMEMBERED:
            self._places.popitem(last=False)

    def is_behind(self, write: Write) -> bool:
        """Whether an object follows one that was refused and has not come since."""
        place = self._lineage.place_before(write)
        if place in self._places and self._lineage.is_there(place):
            del self._places[place]
        return place in self._places

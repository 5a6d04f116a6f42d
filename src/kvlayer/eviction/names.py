"""What a policy remembers of objects that have gone: their names, the latest last. Pure memory."""

from __future__ import annotations

from array import array

from kvlayer.eviction.lists import Lists

__all__ = ["GoneNames"]


class GoneNames:
    """A set of names (64 bits each) in the order in which they were added.

    Names, not rows: a row is another object's by the time its name is looked up. Some 90 bytes a
    name, and nothing that the garbage collector looks at.
    """

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._names = array("q")
        self._order = Lists()
        self._free = array("I")

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: int) -> bool:
        return name in self._places

    def add(self, name: int) -> None:
        """Remember a name as the latest."""
        self.discard(name)
        if self._free:
            place = self._free.pop()
            self._names[place] = name
        else:
            place = len(self._names)
            self._names.append(name)
            self._order.fit(len(self._names))
        self._places[name] = place
        self._order.append(0, (place,))

    def discard(self, name: int) -> bool:
        """Forget a name; whether it was known."""
        place = self._places.pop(name, None)
        if place is None:
            return False
        self._order.unlink((place,))
        self._free.append(place)
        return True

    def forget_oldest(self) -> None:
        """Forget the name that was added first, if there is any."""
        place = self._order.first()
        if place is not None:
            self.discard(self._names[place])

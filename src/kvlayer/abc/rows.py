"""The objects of one tier as numbers: what an eviction policy may know of them. Pure memory."""

from __future__ import annotations

from array import array

from kvlayer.retention import ORDINARY, Retention

__all__ = ["Rows"]


class Rows:
    """A table with a row for each object of a tier, in flat arrays.

    The tier hands out row numbers: they are dense, and a number that was given back is used again.
    A policy reads the columns and changes none. 33 bytes a row.
    """

    __slots__ = ("_free", "_keep_until", "_priorities", "first_tokens", "names", "nbytes", "tokens")

    def __init__(self) -> None:
        self.names = array("q")
        """Equal where a row is the same object as one that was there before, whatever its number.

        64 bits: two objects that share a name by chance are taken for one, which costs a policy a
        worse guess and nothing else.
        """
        self.nbytes = array("Q")
        """Bytes that the object takes of the tier."""
        self.first_tokens = array("I")
        """Where the object begins in its prompt; 0 where that is not known."""
        self.tokens = array("I")
        """How many tokens it covers; 0 where that is not known."""
        self._priorities = array("b")
        self._keep_until = array("d")
        self._free = array("I")

    def __len__(self) -> int:
        """Rows handed out and not given back."""
        return len(self.names) - len(self._free)

    @property
    def count(self) -> int:
        """One more than the highest number ever handed out: how long a column has to be."""
        return len(self.names)

    def take(
        self,
        name: int,
        nbytes: int,
        first_token: int = 0,
        tokens: int = 0,
        retention: Retention = ORDINARY,
    ) -> int:
        """Hand out a row, for one more object."""
        if self._free:
            row = self._free.pop()
            self.names[row] = name
            self.nbytes[row] = nbytes
            self.first_tokens[row] = first_token
            self.tokens[row] = tokens
            self.wish(row, retention)
            return row
        self.names.append(name)
        self.nbytes.append(nbytes)
        self.first_tokens.append(first_token)
        self.tokens.append(tokens)
        self._priorities.append(retention.priority)
        self._keep_until.append(retention.keep_until)
        return len(self.names) - 1

    def give_back(self, row: int) -> None:
        """The object has gone; its number will be another's."""
        self._free.append(row)

    def retention(self, row: int) -> Retention:
        """How long the object is worth keeping."""
        return Retention(self._priorities[row], self._keep_until[row])

    def wish(self, row: int, retention: Retention) -> None:
        """Set how long the object is worth keeping."""
        self._priorities[row] = retention.priority
        self._keep_until[row] = retention.keep_until

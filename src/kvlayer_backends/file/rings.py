"""Objects that are said to lead to themselves. Pure.

What comes before an object is said by a note beside its file. Notes of hashes make no ring, damaged
or forged ones may; then each of the ring is followed for ever, and none could ever go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from kvlayer_backends.file.lineage import Lineage

__all__ = ["Rings"]


class Rings:
    """Looks for rings a few rows at a time, and not again until more was learnt."""

    def __init__(self, lineage: Lineage) -> None:
        self._lineage = lineage
        self._search: Iterator[list[int]] | None = None
        self._learnt = 0
        """How much the lineage had been told when nothing was found last."""

    def open(self, waiting: Sequence[int], looks: int) -> list[int] | None:
        """Cut rings until there is a row that nothing follows any more: such rows.

        ``waiting``: by row, whether to look for a ring that it is in. Nothing where there is none;
        None after so many ``looks``: ask again.
        """
        lineage = self._lineage
        for _ in range(looks):
            if self._search is None:
                if self._learnt == lineage.learnt:
                    return []
                self._learnt = lineage.learnt
                self._search = self._found(row for row, waits in enumerate(waiting) if waits)
            ring = next(self._search, None)
            if ring is None:
                self._search = None
            elif ring and self._is_ring(ring):  # it may have changed since it was looked at
                self._search, self._learnt = None, -1  # there may be more
                if exposed := lineage.unlearn(ring[0]):
                    return exposed
        return None

    def _is_ring(self, ring: list[int]) -> bool:
        steps = zip(ring, [*ring[1:], ring[0]], strict=True)
        return all(other in self._lineage.before(row) for row, other in steps)

    def _found(self, rows: Iterable[int]) -> Iterator[list[int]]:
        """For each row that is looked at, the ring that it closes, or nothing."""
        done: set[int] = set()
        for start in list(rows):
            if start in done:
                continue
            done.add(start)
            path, on_path = [start], {start: 0}
            left = [iter(self._lineage.before(start))]
            while left:
                row = next(left[-1], None)
                if row is None:
                    left.pop()
                    del on_path[path.pop()]
                    continue
                yield path[on_path[row] :] if row in on_path else []
                if row not in done:
                    done.add(row)
                    on_path[row] = len(path)
                    path.append(row)
                    left.append(iter(self._lineage.before(row)))

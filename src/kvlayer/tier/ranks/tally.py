"""One move of several ranks: who has a share in which piece, and how it ended. Pure.

A piece is there when every rank with a share in it has reported; one rank's failure is everybody's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvlayer.errors import MessageError
from kvlayer.identity.keys import ObjectKey, Part
from kvlayer.results import Cause
from kvlayer.tier.messages import Outcome, Piece, Verb
from kvlayer.tier.planner import plan

__all__ = ["Tally", "shares"]


def shares(
    verb: Verb, pieces: Sequence[Piece], ranks: Sequence[Sequence[Part]]
) -> dict[int, list[Piece]]:
    """Which rank moves which pieces; ``ranks[r][g]`` is all that rank r holds of group g.

    A piece is gathered by the first rank that holds all of it (what is replicated is written once)
    and scattered by every rank that needs some of it.
    """
    found: dict[int, list[Piece]] = {}
    for piece in pieces:
        part = piece.key.part
        for rank, parts in enumerate(ranks):
            held = parts[part.group]
            if verb is Verb.SCATTER:
                if plan.accepts(held, part):
                    found.setdefault(rank, []).append(piece)
            elif plan.holds(held, part):
                found.setdefault(rank, []).append(piece)
                break
    return found


class Tally:
    """Counts the reports of one move. ``shared[r]``: the pieces that rank r has to move."""

    def __init__(self, pieces: Sequence[Piece], shared: Mapping[int, Sequence[Piece]]) -> None:
        self._left: dict[ObjectKey, set[int]] = {piece.key: set() for piece in pieces}
        """Who has not reported yet, by piece."""
        self._failed: dict[ObjectKey, Outcome] = {}
        for rank, its in shared.items():
            for piece in its:
                self._left[piece.key].add(rank)
        for key, left in self._left.items():
            if not left:  # nobody would ever say that it is there
                self._failed[key] = Outcome(key, Cause.RANK_DOWN, "no rank has a share in it")
        self._waiting = sum(len(left) for left in self._left.values())

    @property
    def is_done(self) -> bool:
        """Whether nobody's report is missing."""
        return not self._waiting

    def report(self, rank: int, outcomes: Sequence[Outcome]) -> None:
        """A rank has moved its share of some pieces, or failed to.

        Raises ``MessageError``, and counts nothing, for what that rank does not owe.
        """
        keys = [outcome.key for outcome in outcomes]
        strange = [key for key in keys if rank not in self._left.get(key, ())]
        if strange or len(set(keys)) != len(keys):
            raise MessageError(
                f"rank {rank} reports what it does not owe: {(strange or keys)[0]}",
                hint="send each completion once, as the rank made it",
            )
        for outcome in outcomes:
            self._left[outcome.key].discard(rank)
            self._waiting -= 1
            if not outcome.ok:
                self._failed.setdefault(outcome.key, outcome)

    def missed(self) -> list[Outcome]:
        """What some rank failed to move, in the order of the pieces. Final once it is done."""
        return [self._failed[key] for key in self._left if key in self._failed]

"""Stretches of bytes that a copy engine moves: joined where they meet. Pure arithmetic.

Always many at once, as arrays: a call may have ten thousand of them, and the link waits meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from kvlayer.staging.address import Strip
from kvlayer.staging.lazy import np
from kvlayer.staging.moves import Move, Transfer
from kvlayer.staging.slots import BlockRun, IntArray

__all__ = [
    "DirectSpans",
    "Parts",
    "Runs",
    "Spans",
    "direct_spans",
    "joins",
    "mean_nbytes",
    "row_range",
    "spans",
    "whole_layer",
]


class Runs(NamedTuple):
    """Copies: ``nbytes[i]`` bytes from address ``sources[i]`` to ``targets[i]``."""

    sources: Sequence[int]
    targets: Sequence[int]
    nbytes: Sequence[int]

    def and_then(self, later: Runs) -> Runs:
        """These, and others behind them."""
        return Runs(*([*mine, *other] for mine, other in zip(self, later, strict=True)))


class Parts(NamedTuple):
    """Stretches of bytes in parts, as arrays with an element per part."""

    whole: IntArray
    """Which of the stretches the part is of."""
    offsets: IntArray
    """Where in that it begins."""
    nbytes: IntArray


class Spans(NamedTuple):
    """Bytes of some memory, from ``firsts[i]`` to before ``stops[i]``, in order."""

    firsts: IntArray
    stops: IntArray

    def joined(self, gap: int) -> Spans:
        """Fewer spans: those at most ``gap`` bytes apart are one, with what is between them."""
        between = self.firsts[1:] - self.stops[:-1]
        cuts = joins((between >= 0) & (between <= gap))
        return Spans(self.firsts[cuts], self.stops[np.append(cuts[1:], len(self.firsts)) - 1])


class DirectSpans(NamedTuple):
    """What goes straight into a layer's cache, as arrays with an element per run."""

    tensors: IntArray
    sources: IntArray
    """First bytes, in the payload's layer."""
    targets: IntArray
    """First bytes, in the tensor."""
    nbytes: IntArray


def joins(is_joined: Any) -> IntArray:
    """Which elements begin a run, when element i + 1 continues element i where ``is_joined[i]``."""
    cuts: IntArray = np.flatnonzero(~np.concatenate(([False], is_joined)))
    return cuts


def whole_layer(nbytes: int) -> Spans:
    """All of a payload's layer of this many bytes."""
    return Spans(np.zeros(1, np.int64), np.full(1, nbytes))


def spans(strips: Sequence[Strip], rows: tuple[int, int], gap: int) -> Spans:
    """Which bytes of a payload's layer hold its rows from ``rows[0]`` to before ``rows[1]``."""
    first, stop = rows
    firsts = [
        strip.host.offset
        + first * strip.host.token
        + _steps(strip.planes, strip.host.plane, strip.heads, strip.host.head)
        for strip in strips
    ]
    sizes = [(stop - first) * strip.host.token for strip in strips]
    stops = [mine + size for mine, size in zip(firsts, sizes, strict=True)]
    return Spans(np.concatenate(firsts), np.concatenate(stops)).joined(gap)


def row_range(transfer: Transfer) -> tuple[int, int]:
    """The first row of the payload that moves, and one more than the last."""
    rows = transfer.strips[0].rows
    firsts = [run.row for run in transfer.runs.runs]
    stops = [run.row + len(run.ids) * rows for run in transfer.runs.runs]
    loose = transfer.runs.loose
    if loose is not None:
        firsts.append(int(loose.rows.min()))
        stops.append(int(loose.rows.max()) + 1)
    return (min(firsts), max(stops)) if firsts else (0, 0)


def _steps(count: int, step: int, inner: int, inner_step: int) -> IntArray:
    """Offsets of ``inner`` elements in each of ``count``."""
    found: IntArray = np.add.outer(np.arange(count) * step, np.arange(inner) * inner_step).ravel()
    return found


def mean_nbytes(moves: Iterable[Move]) -> int:
    """Bytes of the average run when these moves go straight into the cache; 0 where they cannot."""
    count = nbytes = 0
    known: dict[int, tuple[int, int]] = {}
    for move in moves:
        transfers = (
            [(move.same, len(move.layers))]
            if move.same is not None
            else [(transfer, 1) for _, _, transfer in move.layers]
        )
        for transfer, layers in transfers:
            found = known.get(id(transfer))
            if found is None:
                found = known[id(transfer)] = _count(transfer)
            if not found[0]:
                return 0
            count, nbytes = count + layers * found[0], nbytes + layers * found[1]
    return nbytes // count if count else 0


def _count(transfer: Transfer) -> tuple[int, int]:
    """Number and bytes of a layer's runs; (0, 0) where rows do not lie in whole blocks."""
    if transfer.runs.loose is not None:
        return 0, 0
    count = nbytes = 0
    for strip in (strip.whole_blocks() for strip in transfer.strips):
        if strip.rows > 1:
            return 0, 0
        for run in transfer.runs.runs:
            pieces = len(_pieces(strip, run))
            count += strip.planes * strip.heads * pieces
            nbytes += strip.planes * strip.heads * len(run.ids) * strip.row_nbytes
    return count, nbytes


def _pieces(strip: Strip, run: BlockRun) -> IntArray:
    """Where in the run a copy begins: at each block, or where the next is no neighbour."""
    if strip.cache.block != strip.row_nbytes:
        every: IntArray = np.arange(len(run.ids))
        return every
    return joins(np.diff(run.ids) == 1)


def direct_spans(transfer: Transfer) -> DirectSpans:
    """What goes straight into the cache of each layer, of a transfer that :func:`mean_nbytes`
    counts."""
    found: list[tuple[IntArray, ...]] = []
    for strip in (strip.whole_blocks() for strip in transfer.strips):
        host, cache = strip.host, strip.cache
        sources = host.offset + _steps(strip.planes, host.plane, strip.heads, host.head)
        targets = cache.offset + _steps(strip.planes, cache.plane, strip.heads, cache.head)
        for run in transfer.runs.runs:
            at = _pieces(strip, run)
            first = run.row * host.token + at * host.block
            nbytes = np.diff(at, append=len(run.ids)) * strip.row_nbytes
            count = len(sources) * len(at)
            found.append(
                (
                    np.full(count, strip.tensor),
                    np.add.outer(sources, first).ravel(),
                    np.add.outer(targets, run.ids[at] * cache.block).ravel(),
                    np.tile(nbytes, len(sources)),
                )
            )
    return DirectSpans(*(np.concatenate(column) for column in zip(*found, strict=True)))

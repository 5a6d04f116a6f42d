"""Stretches of bytes that a copy engine moves: joined where they meet. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from kvlayer.layout import LayerCache
from kvlayer.staging.moves import Move, Transfer
from kvlayer.staging.torch_view import tensors_of

__all__ = ["DirectSpans", "Run", "Spans", "direct_runs", "joined", "mean_nbytes", "spans"]

Spans = tuple[tuple[int, int], ...]
"""(first byte, number of bytes), in a payload's layer."""


DirectSpans = tuple[tuple[int, int, int, int], ...]
"""(tensor, first byte in the payload's layer, first byte in the tensor, number of bytes)."""


class Run(NamedTuple):
    """``nbytes`` bytes from address ``source`` to address ``target``."""

    source: int
    target: int
    nbytes: int


def joined(runs: Iterable[Run], gap: int = 0) -> Iterator[Run]:
    """The same copies in fewer runs: one that continues another in both memories joins it.

    Runs up to ``gap`` bytes apart are joined as well, and what lies between them is copied, too:
    both memories must have it to lose.
    """
    source = target = stop = 0
    for run in runs:
        between = run.source - stop
        if stop and 0 <= between <= gap and run.target - run.source == target - source:
            stop = run.source + run.nbytes
            continue
        if stop:
            yield Run(source, target, stop - source)
        source, target, stop = run.source, run.target, run.source + run.nbytes
    if stop:
        yield Run(source, target, stop - source)


def spans(transfer: Transfer, gap: int) -> Spans:
    """Which bytes of a payload's layer a scatter reads; stretches ``gap`` bytes apart are one."""
    first, stop = _row_range(transfer)
    runs = (
        Run(at, at, (stop - first) * strip.host.token)
        for strip in transfer.strips
        for plane in range(strip.planes)
        for head in range(strip.heads)
        for at in (
            strip.host.offset
            + plane * strip.host.plane
            + head * strip.host.head
            + first * strip.host.token,
        )
    )
    shifted = (Run(run.source + 1, run.target + 1, run.nbytes) for run in runs)  # 0 is no address
    return tuple((run.source - 1, run.nbytes) for run in joined(shifted, gap))


def _row_range(transfer: Transfer) -> tuple[int, int]:
    """The first row of the payload that moves, and one more than the last."""
    rows = transfer.strips[0].rows
    firsts = [run.row for run in transfer.runs.runs]
    stops = [run.row + len(run.ids) * rows for run in transfer.runs.runs]
    loose = transfer.runs.loose
    if loose is not None:
        firsts.append(int(loose.rows.min()))
        stops.append(int(loose.rows.max()) + 1)
    return (min(firsts), max(stops)) if firsts else (0, 0)


def mean_nbytes(moves: Iterable[Move]) -> int:
    """Bytes of the average run when these moves go straight into the cache; 0 where they cannot."""
    count = nbytes = 0
    known: dict[int, tuple[int, int]] = {}
    for move in moves:
        for _, _, transfer in move.layers:
            found = known.get(id(transfer))
            if found is None:
                found = known[id(transfer)] = _count(transfer)
            if not found[0]:
                return 0
            count, nbytes = count + found[0], nbytes + found[1]
    return nbytes // count if count else 0


def _count(transfer: Transfer) -> tuple[int, int]:
    """Number and bytes of a layer's runs; (0, 0) where rows do not lie in whole blocks."""
    if transfer.runs.loose is not None:
        return 0, 0
    count = nbytes = 0
    for strip in (strip.whole_blocks() for strip in transfer.strips):
        if strip.rows > 1:
            return 0, 0
        is_dense = strip.cache.block == strip.row_nbytes
        for run in transfer.runs.runs:
            pieces = len(run.stretches) if is_dense else len(run.ids)
            count += strip.planes * strip.heads * pieces
            nbytes += strip.planes * strip.heads * len(run.ids) * strip.row_nbytes
    return count, nbytes


def direct_runs(
    move: Move, host: int, caches: Sequence[LayerCache], known: dict[int, DirectSpans]
) -> Iterator[Run]:
    """Runs from the payload at address ``host`` straight into the cache.

    For moves of which :func:`mean_nbytes` is not 0. ``caches`` are the group's layers; ``known``
    keeps what is alike in all layers, by identity of the transfer.
    """
    for local, at, transfer in move.layers:
        found = known.get(id(transfer))
        if found is None:
            found = known[id(transfer)] = tuple(_direct_spans(transfer))
        firsts: list[int] = [tensor.data_ptr() for tensor in tensors_of(caches[local])]
        for tensor, source, target, nbytes in found:
            yield Run(host + at + source, firsts[tensor] + target, nbytes)


def _direct_spans(transfer: Transfer) -> Iterator[tuple[int, int, int, int]]:
    for strip in (strip.whole_blocks() for strip in transfer.strips):
        host, cache, nbytes = strip.host, strip.cache, strip.row_nbytes
        is_dense = cache.block == nbytes
        for plane in range(strip.planes):
            for head in range(strip.heads):
                source = host.offset + plane * host.plane + head * host.head
                target = cache.offset + plane * cache.plane + head * cache.head
                for run in transfer.runs.runs:
                    first = source + run.row * host.token
                    for position, block, count in run.stretches:
                        pieces = [(0, count)] if is_dense else [(at, 1) for at in range(count)]
                        for at, blocks in pieces:
                            yield (
                                strip.tensor,
                                first + (position + at) * host.block,
                                target + (block + at) * cache.block,
                                blocks * nbytes,
                            )

"""Which layers of which payloads share a slot of the ring, and which load together. Pure.

Layers lie in a slot as in their payload, so one copy moves as many as follow each other there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvlayer.layout import LoadedLayers
from kvlayer.staging.cuda.runs import mean_nbytes
from kvlayer.staging.cuda.runtime import ALIGNMENT
from kvlayer.staging.lazy import np
from kvlayer.staging.moves import Move, Transfer

__all__ = ["Fill", "LayerGroup", "Place", "layer_groups", "pack"]


class Place(NamedTuple):
    """Layers of one move, and where the first of them begins in a slot."""

    move: Move
    at: int

    def offset(self, layer_at: int) -> int:
        """Where in the slot a layer lies that begins at ``layer_at`` of the payload."""
        return self.at + layer_at - self.move.layers[0][1]


class Fill(NamedTuple):
    """What one slot holds at a time."""

    places: tuple[Place, ...]


class LayerGroup(NamedTuple):
    """Layers ``first..stop`` of KV group ``group``, of every payload of a call that has them."""

    group: int
    first: int
    stop: int
    moves: list[Move]
    tokens: tuple[int, int]
    is_direct: bool

    def told(self, event: int) -> LoadedLayers:
        """What an engine is told of it."""
        return LoadedLayers(self.group, (self.first, self.stop), self.tokens, event)


def pack(moves: Sequence[Move], slot_nbytes: int) -> Iterator[Fill]:
    """Moves in slots of this size, in order, cut between layers.

    A layer that is larger than a slot is alone in its fill: the caller has slots that hold it.
    """
    places: list[Place] = []
    used = 0
    for move in moves:
        layers, nbytes = move.layers, move.payload.layer_nbytes
        while layers:
            room = slot_nbytes - used
            count = _fitting(layers, nbytes, room)
            if not count and places:
                yield Fill(tuple(places))
                places, used = [], 0
                continue
            count = max(count, 1)
            place = Place(move.only(layers[:count]), used)
            places.append(place)
            used = _aligned(place.offset(layers[count - 1][1]) + nbytes)
            layers = layers[count:]
    if places:
        yield Fill(tuple(places))


def _fitting(layers: Sequence[tuple[int, int, Transfer]], nbytes: int, room: int) -> int:
    """How many of the layers lie within ``room`` bytes of the first one's beginning."""
    first = layers[0][1]
    if layers[-1][1] - first + nbytes <= room:
        return len(layers)
    count = 0
    for _, at, _ in layers:
        if at - first + nbytes > room:
            break
        count += 1
    return count


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT  # vectors of any width fit


def layer_groups(
    moves: Sequence[Move], *, tokens: tuple[int, int], sizes: Iterator[int], direct_nbytes: int
) -> list[LayerGroup]:
    """All moves by layers, in layer order: at a time as few layers as make so many bytes.

    ``sizes`` says how many, and does not end. The layers of a KV group go straight into the cache
    if their average run is at least ``direct_nbytes`` long.
    """
    found: list[LayerGroup] = []
    for group in dict.fromkeys(move.group for move in moves):
        mine = [move for move in moves if move.group == group]
        is_direct = mean_nbytes(mine) >= direct_nbytes
        nbytes = np.zeros(max(move.layers[-1][0] for move in mine) + 1, np.int64)
        for move in mine:
            nbytes[_locals(move)] += move.payload.layer_nbytes
        first, held = int(np.flatnonzero(nbytes)[0]), 0
        least = next(sizes)
        for local, each in enumerate(nbytes.tolist()):
            held += each
            if held and (held >= least or local == len(nbytes) - 1):
                cut = _cut(mine, first, local + 1)
                found.append(LayerGroup(group, first, local + 1, cut, tokens, is_direct))
                first, held, least = local + 1, 0, next(sizes)
    return found


def _cut(moves: Sequence[Move], first: int, stop: int) -> list[Move]:
    cut: list[Move] = []
    for move in moves:
        has = _locals(move)
        layers = move.layers[max(first - has.start, 0) : max(stop - has.start, 0)]
        if layers:
            cut.append(move.only(layers))
    return cut


def _locals(move: Move) -> slice:
    """The local caches of a move, which follow each other."""
    return slice(move.layers[0][0], move.layers[-1][0] + 1)

"""Which layers of which payloads share a slot of the ring, and what is launched for them. Pure.

Layers lie in a slot as in their payload, so one copy moves as many as follow each other there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from kvlayer.layout import KVView, LoadedLayers
from kvlayer.staging.address import Strip
from kvlayer.staging.cuda.runs import Run, Spans, joined, mean_nbytes, spans
from kvlayer.staging.cuda.runtime import ALIGNMENT
from kvlayer.staging.kernels.plan import Plan
from kvlayer.staging.kernels.tables import Layer, Piece
from kvlayer.staging.moves import Move, Transfer
from kvlayer.staging.torch_view import tensors_of

__all__ = ["Fill", "LayerGroup", "Place", "layer_groups", "pack", "plans_of", "reads", "writes"]


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
            place = Place(move._replace(layers=layers[:count]), used)
            places.append(place)
            used = _aligned(place.offset(layers[count - 1][1]) + nbytes)
            layers = layers[count:]
    if places:
        yield Fill(tuple(places))


def _fitting(layers: Sequence[tuple[int, int, Transfer]], nbytes: int, room: int) -> int:
    """How many of the layers lie within ``room`` bytes of the first one's beginning."""
    first = layers[0][1]
    count = 0
    for _, at, _ in layers:
        if at - first + nbytes > room:
            break
        count += 1
    return count


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT  # vectors of any width fit


def layer_groups(
    moves: Sequence[Move], tokens: tuple[int, int], *, least_nbytes: int, direct_nbytes: int
) -> list[LayerGroup]:
    """All moves by layers, as few layers at a time as make ``least_nbytes``; in layer order.

    The layers of a KV group go straight into the cache if their average run is at least
    ``direct_nbytes`` long.
    """
    found: list[LayerGroup] = []
    for group in dict.fromkeys(move.group for move in moves):
        mine = [move for move in moves if move.group == group]
        is_direct = mean_nbytes(mine) >= direct_nbytes
        nbytes: Counter[int] = Counter()
        for move in mine:
            for local, _, _ in move.layers:
                nbytes[local] += move.payload.layer_nbytes
        first, held = min(nbytes), 0
        for local in sorted(nbytes):
            held += nbytes[local]
            if held >= least_nbytes or local == max(nbytes):
                cut = _cut(mine, first, local + 1)
                found.append(LayerGroup(group, first, local + 1, cut, tokens, is_direct))
                first, held = local + 1, 0
    return found


def _cut(moves: Sequence[Move], first: int, stop: int) -> list[Move]:
    cut = [
        move._replace(layers=[layer for layer in move.layers if first <= layer[0] < stop])
        for move in moves
    ]
    return [move for move in cut if move.layers]


def plans_of(
    fill: Fill,
    slot: int,
    view: KVView,
    make: Callable[[Sequence[Strip], Sequence[Layer], Sequence[Piece]], Plan],
) -> list[Plan]:
    """The launches that fill or empty the slot at address ``slot``: one for each shape of places.

    ``make`` is ``gather_plan`` or ``scatter_plan``.
    """
    alike: dict[tuple[object, ...], tuple[Transfer, list[Layer], list[Piece]]] = {}
    for place in fill.places:
        by_transfer: dict[int, tuple[Transfer, list[tuple[int, int]]]] = {}
        for local, at, transfer in place.move.layers:
            by_transfer.setdefault(id(transfer), (transfer, []))[1].append((local, at))
        caches, first = view.caches[place.move.group], place.move.layers[0][1]
        for transfer, layers in by_transfer.values():
            key = (
                place.move.group,
                transfer.strips,
                transfer.runs.geometry,
                *((local, at - first) for local, at in layers),
            )
            if key not in alike:
                lying = [
                    Layer(tuple(t.data_ptr() for t in tensors_of(caches[local])), at - first)
                    for local, at in layers
                ]
                alike[key] = (transfer, lying, [])
            alike[key][2].append(Piece(transfer.runs, slot + place.at))
    return [make(transfer.strips, layers, pieces) for transfer, layers, pieces in alike.values()]


def writes(fill: Fill, slot: int, hosts: dict[int, int]) -> list[Run]:
    """The runs that take a gathered slot to host memory. ``hosts``: addresses by ``id(host)``."""
    runs = (
        Run(slot + place.offset(at), hosts[id(place.move.host)] + at, nbytes)
        for place in fill.places
        for nbytes in (place.move.payload.layer_nbytes,)
        for _, at, _ in place.move.layers
    )
    return list(joined(runs))


def reads(
    fill: Fill, slot: int, hosts: dict[int, int], known: dict[int, Spans], gap: int
) -> list[Run]:
    """The runs that bring a slot what is scattered from it, and at most ``gap`` bytes between.

    ``known`` keeps the spans of transfers, by identity, for as long as the transfers live.
    """

    def pieces() -> Iterator[Run]:
        for place in fill.places:
            host = hosts[id(place.move.host)]
            for _, at, transfer in place.move.layers:
                found = known.get(id(transfer))
                if found is None:
                    found = known[id(transfer)] = spans(transfer, gap)
                to = slot + place.offset(at)
                for offset, nbytes in found:
                    yield Run(host + at + offset, to + offset, nbytes)

    return list(joined(pieces(), gap))

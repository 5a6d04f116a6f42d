"""What a batch queues, fill by fill: copies between host memory and slots, and launches. Pure.

While it is worked out the link may stand still, so what fills have in common is worked out once for
a call, or once for a batch: mostly they differ in nothing but addresses. The tables of a batch are
one table, which takes one copy. Which slots it gets, it is told last.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeAlias, TypeVar, cast

from kvlayer.layout import KVView
from kvlayer.staging.address import Strip
from kvlayer.staging.cuda.fills import Fill, Place
from kvlayer.staging.cuda.runs import (
    DirectSpans,
    Parts,
    Runs,
    Spans,
    direct_spans,
    joins,
    row_range,
    spans,
    whole_layer,
)
from kvlayer.staging.cuda.runtime import ALIGNMENT
from kvlayer.staging.kernels.plan import CopyPlanes, Plan, Shape, are_whole, copy_shape
from kvlayer.staging.kernels.tables import VECTOR_NBYTES, Layer, packed, rows_of
from kvlayer.staging.lazy import np
from kvlayer.staging.moves import Move, Transfer
from kvlayer.staging.slots import IntArray, SlotRuns
from kvlayer.staging.torch_view import tensors_of

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

__all__ = ["Cut", "Program", "Programs"]

P = ParamSpec("P")
T = TypeVar("T")


Cut: TypeAlias = Callable[[IntArray, IntArray], Parts]
"""Cuts stretches of host memory, given addresses and bytes, where a copy must not go on."""


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """What is queued for some fills. ``launches`` has the plans of each fill, all with one table.

    The table and the plans count once :meth:`place` has said which slots they are of.
    """

    launches: list[list[Plan]]
    table: NDArray[uint8]
    _bases: NDArray[Any]
    _pieces: _InSlots
    _copies: _InSlots
    _hosts: list[int]
    _nbytes: list[int]
    _bounds: list[int]

    def place(self, slots: Sequence[int]) -> None:
        """Fill i uses the slot at address ``slots[i]``, a multiple of ``ALIGNMENT``."""
        self._bases[:] = self._pieces.addresses(slots)

    def copies(self, slots: Sequence[int], *, to_host: bool) -> list[Runs]:
        """The runs of each fill, between its slot and host memory."""
        ends = self._copies.addresses(slots).tolist(), self._hosts
        sources, targets = ends if to_host else ends[::-1]
        cuts = zip(self._bounds, self._bounds[1:], strict=False)
        return [Runs(sources[a:z], targets[a:z], self._nbytes[a:z]) for a, z in cuts]


class _InSlots(NamedTuple):
    """Places in slots, as arrays: of which fill, how far from the slot's beginning."""

    fills: IntArray
    offsets: IntArray

    def addresses(self, slots: Sequence[int]) -> IntArray:
        found: IntArray = np.array(slots, np.int64)[self.fills] + self.offsets
        return found


_Layers: TypeAlias = tuple[tuple[int, int], ...]
"""(local cache, first byte in the payload) of layers that follow each other."""


@dataclass(frozen=True, slots=True, eq=False)
class _Kind:
    """What transfers have in common, whatever layers they are of. Equal ones are one object."""

    strips: tuple[Strip, ...]
    is_whole: bool
    """A block is a row."""
    spans: Spans
    """What is copied of a payload's layer."""


class _Alike(NamedTuple):
    """What launches have in common that share their planes."""

    group: int
    kind: _Kind
    layers: _Layers
    """Bytes count from a place's beginning."""


class _Launch(NamedTuple):
    """A launch, but for its rows."""

    planes: CopyPlanes
    is_whole: bool
    """A block is a row."""
    is_wide: bool
    """Its vectors are the widest, whatever the rows."""


class _Section(NamedTuple):
    """What places have in common whose layers and kinds are equal."""

    spans: Spans
    """What is copied, counted from the place's beginning."""
    launches: list[_Launch]
    """One for each transfer. Equal ones are one object."""


class Programs:
    """Programs of one call, a gather or a scatter of ``view``.

    Of a scatter's payloads no more is copied than it reads, and up to ``gap`` bytes between. In any
    thread. What is kept is mostly found by identity: all that it is found by is made before the
    first program and lives as long, and of what two threads work out at once both use one.
    """

    def __init__(self, view: KVView, *, gather: bool, gap: int, cut: Cut | None) -> None:
        self._view = view
        self._gather = gather
        self._gap = 0 if gather else gap
        self._cut = cut
        self._known = _Known()
        self._kinds: dict[int, _Kind] = {}
        self._sections: dict[tuple[object, ...], _Section] = {}

    def of(self, fills: Sequence[Fill], hosts: Mapping[int, int]) -> Program:
        """``hosts``: addresses of host memory, by ``id(move.host)``."""
        sections = [[self._section(place.move) for place in fill.places] for fill in fills]
        launches, table, bases, pieces = self._launches(fills, sections)
        copies, host, nbytes = self._copies(fills, sections, hosts)
        bounds = np.searchsorted(copies.fills, np.arange(len(fills) + 1)).tolist()
        return Program(
            launches, table, bases, pieces, copies, host.tolist(), nbytes.tolist(), bounds
        )

    def straight(self, moves: Sequence[Move], hosts: Mapping[int, int]) -> Runs:
        """The runs from host memory straight into the cache, of moves of a direct layer group."""
        alike: dict[tuple[int, _Layers], list[tuple[int, DirectSpans]]] = {}
        for move in moves:
            for transfer, layers in self._parts(move):
                found = self._known.once(("direct", id(transfer)), direct_spans, transfer)
                alike.setdefault((move.group, layers), []).append((hosts[id(move.host)], found))
        sources: list[IntArray] = []
        targets: list[IntArray] = []
        nbytes: list[IntArray] = []
        for (group, layers), mine in alike.items():
            tensors = np.array([self._addresses(group, local) for local, _ in layers])
            ats = np.array([at for _, at in layers])
            first = np.concatenate([host + spans.sources for host, spans in mine])
            tensor = np.concatenate([spans.tensors for _, spans in mine])
            offset = np.concatenate([spans.targets for _, spans in mine])
            sources.append(np.add.outer(ats, first).ravel())
            targets.append((tensors[:, tensor] + offset).ravel())
            nbytes.append(np.tile(np.concatenate([spans.nbytes for _, spans in mine]), len(ats)))
        ends = np.concatenate(sources), np.concatenate(targets)
        parts = self._in_parts(ends[0], np.concatenate(nbytes))
        first, second = ((end[parts.whole] + parts.offsets).tolist() for end in ends)
        return Runs(first, second, parts.nbytes.tolist())

    # -- copies ------------------------------------------------------------------------------------

    def _copies(
        self,
        fills: Sequence[Fill],
        sections: Sequence[Sequence[_Section]],
        hosts: Mapping[int, int],
    ) -> tuple[_InSlots, IntArray, IntArray]:
        """Where in slots, where in host memory, how many bytes; in the order of fills."""
        found = [section.spans for mine in sections for section in mine]
        firsts = np.concatenate([each.firsts for each in found])
        nbytes = np.concatenate([each.stops for each in found]) - firsts
        starts = [
            (number, at, hosts[id(move.host)] + move.layers[0][1])
            for number, fill in enumerate(fills)
            for move, at in fill.places
        ]
        columns = np.repeat(np.array(starts, np.int64), [len(s.firsts) for s in found], axis=0)
        fill, at, host = columns[:, 0], columns[:, 1] + firsts, columns[:, 2] + firsts
        # Payloads may follow each other in both memories; in the next slot, nothing follows.
        follows = (host[1:] == host[:-1] + nbytes[:-1]) & (at[1:] == at[:-1] + nbytes[:-1])
        cuts = joins(follows)
        ends = np.append(cuts[1:], len(host)) - 1
        parts = self._in_parts(host[cuts], host[ends] + nbytes[ends] - host[cuts])
        which = cuts[parts.whole]
        return (
            _InSlots(fill[which], at[which] + parts.offsets),
            host[which] + parts.offsets,
            parts.nbytes,
        )

    def _in_parts(self, hosts: IntArray, nbytes: IntArray) -> Parts:
        if self._cut is not None:
            return self._cut(hosts, nbytes)
        return Parts(np.arange(len(hosts)), np.zeros(len(hosts), np.int64), nbytes)

    # -- launches ----------------------------------------------------------------------------------

    def _launches(
        self, fills: Sequence[Fill], sections: Sequence[Sequence[_Section]]
    ) -> tuple[list[list[Plan]], NDArray[uint8], NDArray[Any], _InSlots]:
        book = _Book()
        drafts: list[list[tuple[int, int, int, Shape]]] = []
        places: list[tuple[int, int]] = []
        for number, (fill, mine) in enumerate(zip(fills, sections, strict=True)):
            drafts.append([])
            for launch, runs, ats in _launched(fill.places, mine):
                key = ("rows", launch.is_whole, *map(id, runs))
                rows = self._known.once(key, rows_of, runs, whole_blocks=launch.is_whole)
                planes = launch.planes
                key = ("shape", id(planes), len(rows) if launch.is_wide else id(rows))
                shape = self._known.once(key, copy_shape, planes, rows, ALIGNMENT)
                drafts[-1].append((book.add(planes.planes), len(places), book.add(rows), shape))
                places += [(number, at) for at in ats]
        table, starts = packed((*book.arrays, np.empty(len(places), np.uint64)))
        first = starts[-1]
        kernel = "kv_gather" if self._gather else "kv_scatter"
        launches = [
            [
                Plan(
                    "copy", kernel, table, (starts[planes], first + 8 * base, starts[rows]), *shape
                )
                for planes, base, rows, shape in mine
            ]
            for mine in drafts
        ]
        columns = np.array(places, np.int64)
        bases = table[first : first + 8 * len(places)].view(np.uint64)
        return launches, table, bases, _InSlots(columns[:, 0], columns[:, 1])

    # -- what payloads have in common --------------------------------------------------------------

    def _section(self, move: Move) -> _Section:
        """What moves of some layers, and where: but for its rows and addresses, mostly known."""
        if move.same is not None:
            kinds: tuple[_Kind, ...] = (self._kind(move, move.same),)
        else:
            kinds = tuple(self._kind(move, transfer) for _, _, transfer in move.layers)
        local, at, _ = move.layers[0]
        key = kinds, move.group, id(move.payload), local, at, len(move.layers)
        found = self._sections.get(key)
        if found is None:
            found = self._sections.setdefault(key, self._make_section(move))
        return found

    def _make_section(self, move: Move) -> _Section:
        first = move.layers[0][1]
        parts = [(self._kind(move, transfer), layers) for transfer, layers in self._parts(move)]
        placed = sorted((at - first, kind.spans) for kind, layers in parts for _, at in layers)
        joined = Spans(
            np.concatenate([at + spans.firsts for at, spans in placed]),
            np.concatenate([at + spans.stops for at, spans in placed]),
        ).joined(self._gap)
        alike = [
            _Alike(move.group, kind, tuple((local, at - first) for local, at in layers))
            for kind, layers in parts
        ]
        return _Section(joined, [self._known.once(each, self._launch, each) for each in alike])

    def _kind(self, move: Move, transfer: Transfer) -> _Kind:
        found = self._kinds.get(id(transfer))
        if found is None:
            found = self._kinds.setdefault(id(transfer), self._make_kind(move, transfer))
        return found

    def _make_kind(self, move: Move, transfer: Transfer) -> _Kind:
        strips, runs = transfer.strips, transfer.runs
        is_whole = runs.loose is None and are_whole(strips)
        if self._gather:
            nbytes = move.payload.layer_nbytes
            copied = self._known.once(("layer", nbytes), whole_layer, nbytes)
        else:
            rows = row_range(transfer)
            copied = self._known.once(("rows", strips, rows), spans, strips, rows, self._gap)
        key = "kinds", strips, runs.geometry, is_whole, id(copied)
        return self._known.once(key, _Kind, strips, is_whole, copied)

    def _launch(self, alike: _Alike) -> _Launch:
        layers = [Layer(self._addresses(alike.group, local), at) for local, at in alike.layers]
        is_whole = alike.kind.is_whole
        planes = CopyPlanes.of(alike.kind.strips, layers, whole=is_whole)
        return _Launch(planes, is_whole, planes.width(ALIGNMENT) == VECTOR_NBYTES)

    def _parts(self, move: Move) -> list[tuple[Transfer, _Layers]]:
        """The move's layers by what moves in them."""
        if move.same is not None:
            local, at, transfer = move.layers[0]
            key = "layers", id(move.payload), local, at, len(move.layers)
            return [(transfer, self._known.once(key, _layers, move.layers))]
        return [
            (transfer, tuple((local, at) for local, at, other in move.layers if other is transfer))
            for transfer in _transfers(move)
        ]

    def _addresses(self, group: int, local: int) -> tuple[int, ...]:
        return self._known.once(("tensors", group, local), _addresses, self._view, group, local)


def _layers(layers: Sequence[tuple[int, int, Transfer]]) -> _Layers:
    return tuple((local, at) for local, at, _ in layers)


def _addresses(view: KVView, group: int, local: int) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors_of(view.caches[group][local]))


def _transfers(move: Move) -> list[Transfer]:
    """What moves in the layers, each once."""
    if move.same is not None:
        return [move.same]
    return [*{id(transfer): transfer for _, _, transfer in move.layers}.values()]


def _launched(
    places: Sequence[Place], sections: Sequence[_Section]
) -> list[tuple[_Launch, list[SlotRuns], list[int]]]:
    """The launches of a fill: of each piece its rows, and where it begins in the slot."""
    found: dict[int, tuple[_Launch, list[SlotRuns], list[int]]] = {}
    for (move, start), section in zip(places, sections, strict=True):
        for transfer, launch in zip(_transfers(move), section.launches, strict=True):
            _, runs, ats = found.setdefault(id(launch), (launch, [], []))
            runs.append(transfer.runs)
            ats.append(start)
    return [*found.values()]


class _Known:
    """What has been worked out, by keys. In any thread."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}

    def once(self, key: Hashable, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``work(*args, **kwargs)``, unless that is known under this key: everybody gets one."""
        if key in self._found:
            return cast(T, self._found[key])
        return cast(T, self._found.setdefault(key, work(*args, **kwargs)))


class _Book:
    """Arrays of one table, each in it once."""

    def __init__(self) -> None:
        self.arrays: list[NDArray[Any]] = []
        self._numbers: dict[int, int] = {}

    def add(self, array: NDArray[Any]) -> int:
        """The array's number."""
        number = self._numbers.setdefault(id(array), len(self.arrays))
        if number == len(self.arrays):
            self.arrays.append(array)
        return number

"""A call's copies, checked against view and layout: what moves in which layers, in which batches.

Everything is checked here before a byte moves. It runs on a thread, but holds the interpreter's
lock all the while, so what copies have in common is worked out once for a call, not per copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from kvlayer.abc.stager import HostCopy
from kvlayer.errors import LayoutError
from kvlayer.layout import AttentionKind, KVLayout, KVView
from kvlayer.payload import Payload
from kvlayer.staging.address import Overlap, Strip, overlap, strips
from kvlayer.staging.geometry import CacheGeometry
from kvlayer.staging.lazy import np
from kvlayer.staging.slots import (
    BlockRun,
    IntArray,
    SlotRuns,
    SlotTable,
    block_runs,
    slot_runs,
    state_runs,
)
from kvlayer.staging.steps import Step, gather_steps, scatter_steps
from kvlayer.staging.torch_view import slot_array

__all__ = ["Move", "Transfer", "batches", "growing", "in_model_order", "plan_moves"]


class Transfer:
    """What moves in every layer of one geometry, and how on the CPU: worked out once, when asked.

    Threads may ask at once; then both work out the same.
    """

    __slots__ = ("_gathers", "_scatters", "runs", "strips")

    def __init__(self, strips: tuple[Strip, ...], runs: SlotRuns) -> None:
        self.strips = strips
        self.runs = runs
        self._gathers: dict[int, list[Step]] = {}
        self._scatters: dict[int, list[Step]] = {}

    def gathers(self, strip: int) -> list[Step]:
        """The steps that gather the strip of this number."""
        if strip not in self._gathers:
            self._gathers[strip] = gather_steps(self.strips[strip], self.runs)
        return self._gathers[strip]

    def scatters(self, strip: int) -> list[Step]:
        """The steps that scatter the strip of this number."""
        if strip not in self._scatters:
            self._scatters[strip] = scatter_steps(self.strips[strip], self.runs)
        return self._scatters[strip]


class Move(NamedTuple):
    """One checked copy, or some layers of one.

    ``layers`` are (index of the local cache, byte offset in the payload, what moves), and follow
    each other in both. ``same`` is what moves in all of them, where that is one.
    """

    host: memoryview
    payload: Payload
    group: int
    layers: list[tuple[int, int, Transfer]]
    same: Transfer | None = None

    def only(self, layers: list[tuple[int, int, Transfer]]) -> Move:
        """The same copy of some of its layers."""
        return Move(self.host, self.payload, self.group, layers, self.same)


def plan_moves(
    layout: KVLayout,
    view: KVView,
    geometries: Sequence[Sequence[CacheGeometry]],
    copies: Sequence[HostCopy],
    *,
    gather: bool,
) -> Iterator[Move]:
    """Check ``copies`` one after the other; those that move nothing are left out.

    Raises ``LayoutError`` for one that does not fit. Waits for slots that lie on a device.
    """
    tables: dict[int, SlotTable] = {}
    shares: dict[int, Overlap] = {}  # by identity: payloads of one shape are mostly one object
    placed: dict[tuple[int, CacheGeometry], tuple[Strip, ...]] = {}
    states: set[tuple[int, int, int]] = set()
    for copy in copies:
        payload = copy.payload
        group = _check_copy(layout, view, copy, gather)
        shared = shares.get(id(payload))
        if shared is None:
            shared = shares[id(payload)] = overlap(layout.groups[group], payload)
        if gather:
            _check_share(copy, shared)
        if not shared.heads or not shared.layers or not copy.tokens:
            continue
        table = tables.get(group)
        if table is None:
            table = tables[group] = _slot_table(view, group, copies)
        # One object per shape, so identity will do; mostly there is one shape.
        mine = {
            id(geometries[group][local]): geometries[group][local] for local, _ in shared.layers
        }
        planned: dict[int, Transfer] = {}
        for key, geometry in mine.items():
            runs = _slot_runs(copy, table, geometry, gather=gather)
            place = id(payload), runs.geometry
            if place not in placed:
                placed[place] = strips(runs.geometry, payload, shared)
            planned[key] = Transfer(placed[place], runs)
        if payload.group.kind is AttentionKind.STATE:
            _check_states(copy, shared, planned.values(), states)
        if len(planned) == 1:
            (same,) = planned.values()
            layers = [(local, at, same) for local, at in shared.layers]
            yield Move(copy.host, payload, group, layers, same)
        else:
            layers = [(i, at, planned[id(geometries[group][i])]) for i, at in shared.layers]
            yield Move(copy.host, payload, group, layers)


def in_model_order(layout: KVLayout) -> list[tuple[int, int]]:
    """(group, local layer) of all layers, as the model computes them."""
    numbered = [
        (number, group, local)
        for group, held in enumerate(layout.groups)
        for local, number in enumerate(held.group.layers[slice(*held.layer_range)])
    ]
    return [(group, local) for _, group, local in sorted(numbered)]


def growing(first: int, most: int) -> Iterator[int]:
    """``first``, then twice as much each time, up to ``most``."""
    while True:
        yield min(first, most)
        first = min(2 * first, most)


def batches(moves: Sequence[Move], nbytes: Iterator[int]) -> list[list[Move]]:
    """Moves in groups of about so many bytes each, cut between layers; at least one group."""
    found: list[list[Move]] = [[]]
    room = next(nbytes)
    for move in moves:
        layers, each = move.layers, move.payload.layer_nbytes
        while layers:
            if room <= 0:
                found.append([])
                room = next(nbytes)
            count = -(-room // each)
            found[-1].append(move.only(layers[:count]))
            room -= len(layers[:count]) * each
            layers = layers[count:]
    return found


def _slot_table(view: KVView, group: int, copies: Sequence[HostCopy]) -> SlotTable:
    """The slots of all tokens that the group's copies move."""
    mine = [copy for copy in copies if copy.part.group == group and copy.tokens > 0]
    first = max(min(copy.first for copy in mine), 0)
    stop = max(copy.first + copy.tokens for copy in mine)
    return SlotTable(slot_array(view.slots[group], first, stop), first)


def _check_copy(layout: KVLayout, view: KVView, copy: HostCopy, gather: bool) -> int:
    """Group of a copy whose numbers make sense."""
    payload, group = copy.payload, copy.part.group
    if not 0 <= group < len(layout.groups):
        raise LayoutError(f"part {copy.part}: the layout has {len(layout.groups)} KV group(s)")
    if min(copy.first, copy.tokens, copy.skip) < 0:
        raise LayoutError(f"a copy cannot be negative: {copy}")
    if copy.first + copy.tokens > view.num_tokens:
        raise LayoutError(
            f"part {copy.part}: tokens {copy.first}..{copy.first + copy.tokens} of a view that "
            f"covers {view.num_tokens}"
        )
    if copy.skip + copy.tokens > payload.tokens or (gather and copy.tokens != payload.tokens):
        raise LayoutError(
            f"part {copy.part}: {copy.tokens} tokens after {copy.skip} skipped, of a payload "
            f"of {payload.tokens}",
            hint="a gather fills its payload; a scatter takes at most all of it",
        )
    if copy.host.nbytes < payload.nbytes or not copy.host.c_contiguous:
        raise LayoutError(
            f"part {copy.part}: needs {payload.nbytes} contiguous bytes of host memory, "
            f"found {copy.host.nbytes}"
        )
    if gather and copy.host.readonly:
        raise LayoutError(f"part {copy.part}: cannot gather into read-only host memory")
    return group


def _check_share(copy: HostCopy, shared: Overlap) -> None:
    payload = copy.payload
    canonical = payload.part.form == "canonical"
    if len(shared.layers) != payload.num_layers or (
        canonical and shared.heads != payload.num_heads
    ):
        raise LayoutError(
            f"part {copy.part} is not within the rank's layers and heads",
            hint="a rank stores only what it holds",
        )


def _check_states(
    copy: HostCopy,
    shared: Overlap,
    transfers: Iterable[Transfer],
    seen: set[tuple[int, int, int]],
) -> None:
    """A block holds one state. ``seen``: (group, local layer, block) of the copies before."""
    ids = {int(block) for each in transfers for run in each.runs.runs for block in run.ids}
    mine = {(copy.part.group, local, block) for local, _ in shared.layers for block in ids}
    if mine & seen:
        raise LayoutError(
            f"part {copy.part}: two payloads of one call end in block {min(ids)}, which holds the "
            "state after one token",
            hint="chunks and tails of a state group must end in blocks of their own: take chunks "
            "of tokens_per_block or more",
        )
    seen |= mine


def _check_held(copy: HostCopy, slots: IntArray) -> None:
    missing = np.count_nonzero(slots == -1)
    if missing:
        raise LayoutError(
            f"part {copy.part}: {missing} of {len(slots)} tokens to gather have no slot",
            hint="store only chunks the engine still holds",
        )


def _slot_runs(
    copy: HostCopy, table: SlotTable, geometry: CacheGeometry, *, gather: bool
) -> SlotRuns:
    payload, size = copy.payload, geometry.tokens_per_block
    canonical = payload.part.form == "canonical"
    if payload.group.kind is not AttentionKind.STATE and (canonical or copy.skip % size == 0):
        ids = table.blocks(copy.first, copy.tokens, geometry)
        if ids is not None and (canonical or payload.tokens % size == 0):
            row = copy.skip * geometry.rows_per_block // size
            return SlotRuns(geometry, (BlockRun(row, ids),), None)
    slots = table.slots(copy.first, copy.tokens)
    is_state = payload.group.kind is AttentionKind.STATE
    if gather:
        _check_held(copy, slots[-1:] if is_state else slots)
    if is_state:
        if copy.skip + copy.tokens != payload.tokens:
            raise LayoutError(
                f"part {copy.part}: a state belongs to the payload's last token, the copy ends "
                f"before it"
            )
        return state_runs(slots, geometry)
    if canonical:
        return slot_runs(slots, copy.skip, geometry)
    if payload.tokens % size or copy.skip % size:
        raise LayoutError(
            f"part {copy.part}: {payload.tokens} tokens, {copy.skip} skipped, are not whole blocks "
            f"of {size}",
            hint="chunks and tails of a native form are multiples of tokens_per_block",
        )
    return block_runs(slots, copy.skip // size, geometry)

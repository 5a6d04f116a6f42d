"""What a batch queues is what its copies ask for, over random layouts: addresses, widths, cuts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from engine import Engine
from gpu_layouts import random_copies, random_layout
from numpy.typing import NDArray

from kvlayer.abc.stager import HostCopy
from kvlayer.identity.keys import Part
from kvlayer.layout import NHD_BLOCK_FIRST, AttentionKind, KVGroup, KVLayout, KVView
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload
from kvlayer.staging.cuda.fills import Fill, Place, pack
from kvlayer.staging.cuda.pinned import PinnedSlab
from kvlayer.staging.cuda.programs import Programs
from kvlayer.staging.cuda.runs import Spans
from kvlayer.staging.kernels import tables
from kvlayer.staging.kernels.plan import Plan, gather_plan
from kvlayer.staging.kernels.tables import Layer, Piece
from kvlayer.staging.moves import plan_moves
from kvlayer.staging.torch_view import GeometryReader, tensors_of

BLOCKS = 24
SLOT = 1 << 40
Bytes = NDArray[np.int64]
"""``(n, 2)``: addresses of a byte on both sides of a move, by the address in the slot."""


def sorted_bytes(first: Any, second: Any, nbytes: Sequence[int] | int) -> Bytes:
    """Of stretches that begin at these addresses; the second ones are in the slot."""
    counts = np.broadcast_to(nbytes, np.shape(first)).astype(np.int64)
    inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    pairs = np.stack([np.repeat(end, counts) + inside for end in (first, second)], 1)
    found: Bytes = pairs[np.argsort(pairs[:, 1], kind="stable")]
    return found


def moved_by(plan: Plan) -> Bytes:
    """What a plan of ``copy.cu`` moves, (cache, slot), by its table; as wide as it may."""
    planes_at, bases_at, rows_at = plan.starts
    num_planes, num_rows, heads, *_, width = plan.numbers
    planes = plan.table[planes_at:][: num_planes * 64].view(np.dtype(tables._PLANE_FIELDS))
    rows = plan.table[rows_at:][: num_rows * 16].view(np.int32).reshape(-1, 4).astype(np.int64)
    bases = plan.table[bases_at:][: 8 * (int(rows[:, 2].max()) + 1)].view(np.int64)
    found: list[Bytes] = []
    for plane in planes:
        p = {name: int(plane[name]) for name in planes.dtype.names}
        for head in range(heads):
            cache = p["cache"] + rows[:, 0] * p["cache_block"] + rows[:, 1] * p["cache_row"]
            stage = bases[rows[:, 2]] + p["stage"] + rows[:, 3] * p["stage_row"]
            cache, stage = cache + head * p["cache_head"], stage + head * p["stage_head"]
            assert not (cache % width).any() and not (stage % width).any()
            found.append(sorted_bytes(cache, stage, p["row_nbytes"]))
    return together(found)


def together(parts: Sequence[Bytes]) -> Bytes:
    found: Bytes = np.concatenate(parts)
    return found[np.argsort(found[:, 1], kind="stable")]


def asked(fill: Fill, slot: int, view: KVView) -> Bytes:
    """What a fill is to move, each layer of each payload for itself."""
    found: list[Bytes] = []
    for place in fill.places:
        for local, at, transfer in place.move.layers:
            tensors = tensors_of(view.caches[place.move.group][local])
            layer = Layer(tuple(t.data_ptr() for t in tensors), 0)
            piece = Piece(transfer.runs, slot + place.offset(at))
            found.append(moved_by(gather_plan(transfer.strips, [layer], [piece])))
    return together(found)


def layers_of(fill: Fill, slot: int, hosts: dict[int, int]) -> Bytes:
    """(host, slot) of each byte of each layer."""
    found = [
        (hosts[id(place.move.host)] + at, slot + place.offset(at), place.move.payload.layer_nbytes)
        for place in fill.places
        for _, at, _ in place.move.layers
    ]
    return sorted_bytes(*map(np.array, zip(*found, strict=True)))


@pytest.mark.parametrize("part", range(4))
def test_a_program_moves_what_its_copies_ask_for(part: int, dose: Any) -> None:
    played, seeds = 0, range(part, dose(24, 2000), 4)
    for seed in seeds:
        rng = random.Random(seed)
        layout = random_layout(rng)
        engine, slab = Engine(layout, BLOCKS), Slab(1 << 20)
        tokens = 8 * rng.randint(2, 6)
        slots = engine.slots(tokens, seed=seed)
        is_gather = rng.random() < 0.5
        if not is_gather and all(g.form == "canonical" for g in layout.groups):
            for hole in rng.sample(range(tokens), tokens // 4):
                slots[hole] = -1
        view = KVView(engine.caches, [slots] * len(layout.groups))
        copies = random_copies(rng, layout, slab, tokens)
        planned = plan_moves(
            layout, view, GeometryReader(layout).read(view), copies, gather=is_gather
        )
        moves = [m for m in planned if m.layers[0][2].runs.runs or m.layers[0][2].runs.loose]
        if not moves:
            continue  # holes are all there is, and a stager makes no batch of nothing
        played += 1
        hosts = {id(move.host): np.frombuffer(move.host, np.uint8).ctypes.data for move in moves}
        nbytes = max(rng.choice([4096, 16384]), *(m.payload.layer_nbytes for m in moves), 0)
        fills = [*pack(moves, nbytes)]
        programs = Programs(view, gather=is_gather, gap=rng.choice([0, 100]), cut=None)
        again = programs.of(fills, hosts)  # whatever it keeps, the next is no other
        program = programs.of(fills, hosts)
        addresses = [SLOT + nbytes * 256 * at for at in range(len(fills))]
        for each in (again, program):
            each.place(addresses)
            copies = each.copies(addresses, to_host=is_gather)
            of_fills = zip(fills, addresses, each.launches, copies, strict=True)
            for fill, slot, plans, runs in of_fills:
                wanted = asked(fill, slot, view)
                assert np.array_equal(together([moved_by(plan) for plan in plans]), wanted), seed
                copied = sorted_bytes(*((runs[1], runs[0]) if is_gather else runs[:2]), runs[2])
                layers = layers_of(fill, slot, hosts)
                if is_gather:
                    assert np.array_equal(copied, layers), seed
                else:
                    needed = layers[np.isin(layers[:, 1], wanted[:, 1])]
                    assert np.array_equal(copied[np.isin(copied[:, 1], needed[:, 1])], needed), seed
                    held = copied[np.isin(copied[:, 1], layers[:, 1])]
                    assert np.array_equal(layers[np.isin(layers[:, 1], held[:, 1])], held), seed
    assert played > len(seeds) * 0.9


def test_launches_of_the_same_planes_are_as_wide_as_their_own_rows_allow() -> None:
    """Blocks of eight bytes: from even ones on, vectors are of sixteen."""
    group = KVGroup(AttentionKind.MHA, (0,), "int8", 1, 2)
    layout = KVLayout.single(group, NHD_BLOCK_FIRST, tokens_per_block=2, form="native:x")
    engine, slab = Engine(layout, BLOCKS), Slab(1 << 20)
    payload = Payload.of(group, Part(0, (0, 1), (0, 1), "native:x"), 2)
    copies = [HostCopy(payload, slab.view(at * 4096, payload.nbytes), at * 2, 2) for at in (0, 1)]
    slots = np.array([8, 9, 6, 7])
    for order in (slots, np.roll(slots, 2)):
        view = KVView(engine.caches, [order])
        geometries = GeometryReader(layout).read(view)
        moves = [*plan_moves(layout, view, geometries, copies, gather=True)]
        hosts = {id(move.host): np.frombuffer(move.host, np.uint8).ctypes.data for move in moves}
        fills = [Fill((Place(move, 0),)) for move in moves]
        program = Programs(view, gather=True, gap=0, cut=None).of(fills, hosts)
        program.place([SLOT, SLOT + 4096])
        wide = [plan.numbers[-1] for (plan,) in program.launches]
        base = tensors_of(engine.caches[0][0])[0].data_ptr() % 16
        assert base == 0 and wide == [16 if at % 4 == 0 else 8 for at in order[::2]]


def test_spans_are_joined_up_to_the_gap_and_no_further() -> None:
    apart = Spans(np.array([0, 110, 300]), np.array([100, 200, 301]))
    assert [each.tolist() for each in apart.joined(9)] == [[0, 110, 300], [100, 200, 301]]
    assert [each.tolist() for each in apart.joined(10)] == [[0, 300], [200, 301]]


def test_no_part_of_a_copy_lies_in_two_pieces_or_partly_in_one() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        address, piece = int(rng.integers(1000, 2000)), int(rng.integers(1, 90))
        nbytes = int(rng.integers(1, 400))
        slab = PinnedSlab(None, address, nbytes, piece_nbytes=piece)  # type: ignore[arg-type]
        starts = rng.integers(800, 2500, 20)
        sizes = rng.integers(1, 300, 20)
        parts = slab.cut(starts, sizes)
        for whole, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            mine = parts.whole == whole
            offsets, lengths = parts.offsets[mine], parts.nbytes[mine]
            assert offsets[0] == 0 and (lengths > 0).all()
            assert (offsets[1:] == offsets[:-1] + lengths[:-1]).all()
            assert offsets[-1] + lengths[-1] == size
            for first, last in zip(start + offsets, start + offsets + lengths - 1, strict=True):
                assert where(first, address, nbytes, piece) == where(last, address, nbytes, piece)


def where(at: int, address: int, nbytes: int, piece: int) -> int:
    """Which piece of the slab a byte is in: -1 before it, -2 behind it."""
    if at < address:
        return -1
    return -2 if at >= address + nbytes else (at - address) // piece

"""A stager for the blocks of vLLM's CPU attention: canonical in host memory, packed in the engine.

``kvlayer.staging`` copies rows; here the elements of a row lie apart, so whole blocks are taken,
unpacked or packed, and a block of which a copy covers only a part is read first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from kvlayer.abc.stager import HostCopy, Stager
from kvlayer.errors import LayoutError
from kvlayer.layout import KVLayout, KVView
from kvlayer.runtime.offload import Offload
from kvlayer.staging.address import Overlap, overlap
from kvlayer.staging.torch_view import GeometryReader, slot_array
from kvlayer_vllm.packing import check_isa, pack_k, pack_v, unpack_k, unpack_v

__all__ = ["PackedStager"]


class _Run(NamedTuple):
    """Tokens ``row ..`` of a payload that lie in ``blocks``, from token ``inside`` of the first."""

    row: int
    tokens: int
    inside: int
    blocks: NDArray[np.int64]

    def is_whole(self, size: int) -> bool:
        """Whether it begins and ends with a block."""
        return not (self.inside or self.tokens % size)


_Planned: TypeAlias = tuple[HostCopy, Overlap, list[_Run]]


class PackedStager(Stager):
    """Copies between canonical payloads and CPU tensors ``(block, head, token, K dim + V dim)``.

    ``isas[g]`` says how group g is packed. Copies run on ``threads`` threads, one payload after
    the other; beside what it is lent a call holds one layer of a payload for each of them.
    """

    def __init__(self, layout: KVLayout, isas: Sequence[str], *, threads: int = 2) -> None:
        for isa in isas:
            check_isa(isa)
        self._layout = layout
        self._isas = tuple(isas)
        self._reader = GeometryReader(layout)
        self._threads = threads
        self._offload = Offload(threads, "kvlayer-pack")

    def check(self, view: KVView) -> None:
        self._reader.read(view)

    async def gather(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        """See :class:`Stager`. ``LayoutError`` for a token without a slot."""
        await self._run(view, copies, _gather)

    async def scatter(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        """See :class:`Stager`. ``LayoutError`` for slots that are not in the order of a block."""
        await self._run(view, copies, _scatter)

    async def aclose(self) -> None:
        self._offload.close()

    async def _run(self, view: KVView, copies: Sequence[HostCopy], copy: Any) -> None:
        self._reader.read(view)
        planned = [self._planned(view, each, is_gather=copy is _gather) for each in copies]
        alone: list[_Planned] = []
        loose: list[_Planned] = []
        for each in planned:
            size = self._layout.groups[each[0].part.group].tokens_per_block
            is_whole = copy is _gather or all(run.is_whole(size) for run in each[2])
            (alone if is_whole else loose).append(each)
        # Copies that meet inside a block read it, change it and write it: one after the other.
        works = [partial(self._copy_all, view, [each], copy) for each in alone]
        works += [partial(self._copy_all, view, loose, copy)] if loose else []
        await self._offload.run_all(works)

    def _planned(self, view: KVView, copy: HostCopy, *, is_gather: bool) -> _Planned:
        """Check one copy before a byte of any moves."""
        held = self._layout.groups[copy.part.group]
        shared = overlap(held, copy.payload)
        slots = slot_array(view.slots[copy.part.group], copy.first, copy.first + copy.tokens)
        if is_gather and (slots < 0).any():
            raise LayoutError(f"part {copy.part}: tokens to gather have no slot")
        return copy, shared, list(_runs(slots, copy.skip, held.tokens_per_block))

    def _copy_all(self, view: KVView, planned: Sequence[_Planned], move: Any) -> None:
        for copy, shared, runs in planned:
            self._copy(view, copy, shared, runs, move)

    def _copy(
        self, view: KVView, copy: HostCopy, shared: Overlap, runs: Sequence[_Run], move: Any
    ) -> None:
        group = copy.part.group
        held, payload = self._layout.groups[group], copy.payload
        k_dim, v_dim = held.group.planes()
        heads = slice(shared.cache_head, shared.cache_head + shared.heads)
        k_nbytes = payload.num_heads * payload.tokens * k_dim * held.group.itemsize
        for local, at in shared.layers:
            cache: Any = view.caches[group][local]
            planes = [
                _rows(copy.host, at, (payload.num_heads, payload.tokens, k_dim), cache.dtype),
                _rows(
                    copy.host,
                    at + k_nbytes,
                    (payload.num_heads, payload.tokens, v_dim),
                    cache.dtype,
                ),
            ]
            there = slice(shared.host_head, shared.host_head + shared.heads)
            for run in runs:
                move(cache, [plane[there] for plane in planes], heads, run, self._isas[group])


def _rows(host: memoryview, at: int, shape: tuple[int, int, int], dtype: torch.dtype) -> Any:
    """``(head, token, dim)`` of a payload's plane that starts at byte ``at``."""
    count = shape[0] * shape[1] * shape[2]
    return torch.frombuffer(host, dtype=dtype, count=count, offset=at).view(shape)


def _split(packed: Any, k_dim: int) -> tuple[Any, Any]:
    """K and V of blocks ``(block, head, token, kvdim)``, each flat: a block's K comes before V."""
    blocks, heads, tokens, both = packed.shape
    flat = packed.reshape(blocks, heads, tokens * both)
    return flat[..., : tokens * k_dim], flat[..., tokens * k_dim :]


def _unpacked(packed: Any, k_dim: int, isa: str) -> tuple[Any, Any]:
    """Blocks as ``(head, token, dim)`` rows of all blocks, K and V."""
    tokens = packed.shape[2]
    k, v = _split(packed, k_dim)
    return tuple(
        rows.transpose(0, 1).flatten(1, 2)
        for rows in (unpack_k(k, isa, tokens), unpack_v(v, isa, tokens))
    )


def _ids(run: _Run) -> Any:
    make: Any = torch
    return make.from_numpy(run.blocks)


def _gather(cache: Any, planes: Sequence[Any], heads: slice, run: _Run, isa: str) -> None:
    packed = cache[_ids(run)][:, heads]
    found = _unpacked(packed, planes[0].shape[-1], isa)
    for plane, rows in zip(planes, found, strict=True):
        plane[:, run.row : run.row + run.tokens] = rows[:, run.inside : run.inside + run.tokens]


def _scatter(cache: Any, planes: Sequence[Any], heads: slice, run: _Run, isa: str) -> None:
    ids = _ids(run)
    size, k_dim = cache.shape[2], planes[0].shape[-1]
    new = [plane[:, run.row : run.row + run.tokens] for plane in planes]
    if not run.is_whole(size):
        rows = [part.clone() for part in _unpacked(cache[ids][:, heads], k_dim, isa)]
        for part, value in zip(rows, new, strict=True):
            part[:, run.inside : run.inside + run.tokens] = value
    else:
        rows = new
    k, v = (part.unflatten(1, (len(ids), size)).transpose(0, 1) for part in rows)
    both = torch.cat([pack_k(k, isa), pack_v(v, isa)], dim=-1)
    packed = both.view(len(ids), heads.stop - heads.start, *cache.shape[2:])
    if heads == slice(0, cache.shape[1]):
        cache[ids] = packed
    else:
        cache[ids, heads] = packed


def _runs(slots: NDArray[np.int64], first_row: int, size: int) -> Iterator[_Run]:
    """Stretches of tokens that are held, in the order in which they lie in whole blocks."""
    held = np.flatnonzero(slots >= 0)
    if not len(held):
        return
    for stretch in np.split(held, np.flatnonzero(np.diff(held) != 1) + 1):
        part = slots[stretch]
        inside = int(part[0] % size)
        place: NDArray[np.int64] = inside + np.arange(len(part))
        blocks = part[(place % size == 0) | (place == inside)] // size
        if not (part == blocks[place // size] * size + place % size).all():
            raise LayoutError(
                "slots must run through each block in order",
                hint="slot = block_id * tokens_per_block + offset, for consecutive tokens",
            )
        yield _Run(first_row + int(stretch[0]), len(part), inside, blocks)

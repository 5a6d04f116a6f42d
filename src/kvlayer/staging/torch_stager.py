"""The stager of every torch device: the CPU path, and the oracle for stagers of one device.

Copies run off the event loop in batches of tens of MiB, so that a cancelled call returns soon.
Importing this module imports neither numpy nor torch; making a ``TorchStager`` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from traceback import clear_frames
from typing import Any, NamedTuple, Protocol

from kvlayer._offload import Offload
from kvlayer.abc.stager import HostCopy, Stager
from kvlayer.errors import LayoutError
from kvlayer.layout import AttentionKind, KVLayout, KVView, Tensor
from kvlayer.staging.address import Overlap, Strip, overlap, strips
from kvlayer.staging.device_cache import DeviceCache, engine_order
from kvlayer.staging.geometry import CacheGeometry
from kvlayer.staging.host_cache import Bytes, HostCache
from kvlayer.staging.lazy import np
from kvlayer.staging.slots import IntArray, SlotRuns, block_runs, slot_runs, state_runs
from kvlayer.staging.torch_view import GeometryReader, slot_array, tensors_of

__all__ = ["TorchStager"]

_BATCH_NBYTES = 64 << 20


class _Cache(Protocol):
    """One tensor, opened for copies."""

    def gather(self, host: Bytes, at: int, strip: Strip, runs: SlotRuns) -> None: ...

    def scatter(self, host: Bytes, at: int, strip: Strip, runs: SlotRuns) -> None: ...


class _Layer(NamedTuple):
    """One layer of one copy: its tensors, where it starts in the payload, what moves."""

    tensors: Sequence[Tensor]
    at: int
    strips: tuple[Strip, ...]
    runs: SlotRuns


class _Move(NamedTuple):
    """One checked copy."""

    host: memoryview
    nbytes: int
    layers: list[_Layer]


class TorchStager(Stager):
    """Copies between payloads and paged torch tensors, on any torch device.

    Copies run on ``offload``, or on one thread of the stager's own. Host memory is not referenced
    any more when a call returns or raises (an exception's traceback holds no locals of the copy),
    so a slab can be closed. On devices the order is the engine's: copies follow what is queued on
    ``view.stream`` and are done when the call returns.

    Payloads must have the form the rank's layout declares. A state group's payload is the state
    after its last token, and lies at slot ``// tokens_per_block`` of that token.
    """

    def __init__(self, layout: KVLayout, *, offload: Offload | None = None) -> None:
        self._layout = layout
        self._reader = GeometryReader(layout)
        self._own_offload = Offload(1, "kvlayer-stage") if offload is None else None
        self._offload = offload or self._own_offload or Offload(1, "kvlayer-stage")

    def check(self, view: KVView) -> None:
        self._reader.read(view)

    async def gather(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        """See :class:`Stager`. ``LayoutError``, before any byte moved, for a copy that is not
        within the rank's share or names a token without a slot."""
        await self._run(view, copies, True)

    async def scatter(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        """See :class:`Stager`. ``LayoutError``, before any byte moved, for a copy that does not
        fit the layout, a slot outside the tensors, or native blocks that are not whole."""
        await self._run(view, copies, False)

    async def aclose(self) -> None:
        if self._own_offload is not None:
            self._own_offload.close()

    async def _run(self, view: KVView, copies: Sequence[HostCopy], gather: bool) -> None:
        try:
            rest = await self._offload.run(self._start, view, copies, gather)
            for batch in rest:
                await self._offload.run(self._copy, view, batch, gather)
        except BaseException as error:
            # Frames in the traceback would keep the host memory exported, and in a cycle.
            clear_frames(error.__traceback__)
            raise

    def _start(self, view: KVView, copies: Sequence[HostCopy], gather: bool) -> list[list[_Move]]:
        """Check everything, move the first batch, return the others."""
        with engine_order(_device(view), view.stream):  # slots may be on their way, too
            first, *rest = _batches([*self._moves(view, copies, gather)])
        self._copy(view, first, gather)
        return rest

    def _copy(self, view: KVView, moves: list[_Move], gather: bool) -> None:
        device = _device(view)
        opened: dict[int, _Cache] = {}
        with engine_order(device, view.stream):
            for move in moves:
                host = np.frombuffer(move.host, np.uint8, move.nbytes)
                for layer in move.layers:
                    for strip in layer.strips:
                        tensor = layer.tensors[strip.tensor]
                        cache = opened.get(id(tensor))
                        if cache is None:
                            cache = opened[id(tensor)] = self._open(tensor)
                        if gather:
                            cache.gather(host, layer.at, strip, layer.runs)
                        else:
                            cache.scatter(host, layer.at, strip, layer.runs)

    def _open(self, tensor: Tensor) -> _Cache:
        return HostCache(tensor) if tensor.device.type == "cpu" else DeviceCache(tensor)

    def _moves(self, view: KVView, copies: Sequence[HostCopy], gather: bool) -> Iterator[_Move]:
        geometries = self._reader.read(view)
        for copy in copies:
            group = self._check_copy(view, copy, gather)
            shared = overlap(self._layout.groups[group], copy.payload)
            if gather:
                _check_share(copy, shared)
            if not shared.heads or not shared.layers or not copy.tokens:
                continue
            slots = slot_array(view.slots[group], copy.first, copy.first + copy.tokens)
            if gather:
                _check_held(copy, slots)
            planned: dict[int, tuple[tuple[Strip, ...], SlotRuns]] = {}
            layers: list[_Layer] = []
            for local, at in shared.layers:
                geometry = geometries[group][local]  # one object per shape, so identity will do
                plan = planned.get(id(geometry))
                if plan is None:
                    runs = _slot_runs(copy, slots, geometry)
                    plan = strips(runs.geometry, copy.payload, shared), runs
                    planned[id(geometry)] = plan
                layers.append(_Layer(tensors_of(view.caches[group][local]), at, *plan))
            yield _Move(copy.host, copy.payload.nbytes, layers)

    def _check_copy(self, view: KVView, copy: HostCopy, gather: bool) -> int:
        """Group of a copy whose numbers make sense."""
        payload, group = copy.payload, copy.part.group
        if not 0 <= group < len(self._layout.groups):
            raise LayoutError(
                f"part {copy.part}: the layout has {len(self._layout.groups)} KV group(s)"
            )
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


def _device(view: KVView) -> Any:
    return tensors_of(view.caches[0][0])[0].device


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


def _check_held(copy: HostCopy, slots: IntArray) -> None:
    missing = np.count_nonzero(slots == -1)
    if missing:
        raise LayoutError(
            f"part {copy.part}: {missing} of {copy.tokens} tokens to gather have no slot",
            hint="store only chunks the engine still holds",
        )


def _slot_runs(copy: HostCopy, slots: IntArray, geometry: CacheGeometry) -> SlotRuns:
    payload, size = copy.payload, geometry.tokens_per_block
    if payload.group.kind is AttentionKind.STATE:
        if copy.skip + copy.tokens != payload.tokens:
            raise LayoutError(
                f"part {copy.part}: a state belongs to the payload's last token, the copy ends "
                f"before it"
            )
        return state_runs(slots, geometry)
    if payload.part.form == "canonical":
        return slot_runs(slots, copy.skip, geometry)
    if payload.tokens % size or copy.skip % size:
        raise LayoutError(
            f"part {copy.part}: {payload.tokens} tokens, {copy.skip} skipped, are not whole blocks "
            f"of {size}",
            hint="chunks and tails of a native form are multiples of tokens_per_block",
        )
    return block_runs(slots, copy.skip // size, geometry)


def _batches(moves: list[_Move]) -> list[list[_Move]]:
    """Moves in groups of about ``_BATCH_NBYTES``, at least one group."""
    batches: list[list[_Move]] = [[]]
    nbytes = 0
    for move in moves:
        if nbytes >= _BATCH_NBYTES:
            batches.append([])
            nbytes = 0
        batches[-1].append(move)
        nbytes += move.nbytes
    return batches

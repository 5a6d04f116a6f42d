"""The stager of an engine: its CUDA devices through pipelines, everything else through torch.

Which device an engine computes on is known from its first view. The pipeline of a device is made in
the background, because compiling kernels may take seconds; until then, and for good where it cannot
be made or fails, torch does the same work more slowly.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import repeat
from traceback import clear_frames
from typing import Any

from kvlayer.abc.stager import HostCopy, Landed, Stager
from kvlayer.errors import KVLayerError, UnsupportedError
from kvlayer.layout import KVLayout, KVView
from kvlayer.memory.slab import Slab
from kvlayer.runtime.offload import Offload, settled
from kvlayer.staging.copy_order import CopyOrder, CopyStreams
from kvlayer.staging.cuda.devices import Devices
from kvlayer.staging.cuda.fills import LayerGroup, layer_groups
from kvlayer.staging.cuda.pipeline import Call, Pipeline
from kvlayer.staging.cuda.runtime import cuda_errors
from kvlayer.staging.lazy import torch
from kvlayer.staging.moves import Move, batches, growing, in_model_order, plan_moves
from kvlayer.staging.torch_stager import TorchStager
from kvlayer.staging.torch_view import GeometryReader, tensors_of

__all__ = ["DeviceStager"]

_log = logging.getLogger(__name__)

_BATCH_NBYTES = 256 << 20
"""Queued at once: some 5 ms of a fast link. The next is queued by then: Python may be that late."""
_FIRST_NBYTES = 32 << 20
"""Of a call's first batch: until it has been worked out the link stands still. Others are larger
and larger, each worked out while the one before is under way."""


class DeviceStager(Stager):
    """Copies between payloads and paged torch tensors; those of a CUDA device at its link's speed.

    A call is one of ``threads`` threads' work, which all calls share: it queues a batch, and sleeps
    until the device has done the one before. Where more calls wait than there are threads they take
    turns. Cancelling starts no other batch, and returns once those that are queued have ended. The
    order is the engine's: copies follow ``view.ready``, or what is queued on ``view.stream`` when
    the call begins, and are done when it returns.

    ``slab`` is the host memory that payloads mostly lie in; it is pinned in the background once a
    CUDA device is used, and must stay mapped until ``aclose``. Payloads elsewhere are copied as
    pageable memory.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        slab: Slab | None = None,
        threads: int = 2,
        devices: Devices | None = None,
        torch_stager: Stager | None = None,
    ) -> None:
        self._layout = layout
        self._offload = Offload(threads, "kvlayer-stage")
        self._offload.begin()  # later the system may have no thread to give
        self._torch = torch_stager or TorchStager(layout, threads=threads, offload=self._offload)
        self._reader = GeometryReader(layout)
        self._slot_streams = CopyStreams()
        self._background = Offload(1, "kvlayer-cuda")
        self._devices = devices or Devices(slab)
        self._openings: dict[int, asyncio.Task[Pipeline | None]] = {}
        self._pinning: asyncio.Task[None] | None = None
        self._failed: set[int] = set()

    def check(self, view: KVView) -> None:
        self._reader.read(view)

    async def gather(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        """See :class:`Stager`. ``LayoutError`` as ``TorchStager.gather``."""
        pipeline = self._pipeline(view)
        if pipeline is None or not await self._piped(pipeline, view, copies, True):
            await self._torch.gather(view, copies)

    async def scatter(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        """See :class:`Stager`. ``LayoutError`` as ``TorchStager.scatter``."""
        pipeline = self._pipeline(view)
        if pipeline is None or not await self._piped(pipeline, view, copies, False):
            await self._torch.scatter(view, copies)

    async def scatter_layers(
        self, view: KVView, copies: Sequence[HostCopy], landed: Landed
    ) -> None:
        """As ``TorchStager``; a pipeline moves some layers at once, and tells of them together."""
        pipeline = self._pipeline(view)
        loop = asyncio.get_running_loop()

        def tell(group: LayerGroup) -> None:
            for local in range(group.first, group.stop):
                loop.call_soon_threadsafe(landed, group.group, local)

        if pipeline is None or not await self._piped(pipeline, view, copies, False, tell):
            await self._torch.scatter_layers(view, copies, landed)

    async def ready(self, device: int = 0) -> bool:
        """Wait until CUDA device ``device`` has its pipeline; False when it cannot have one."""
        return await asyncio.shield(self._opening(device)) is not None

    async def pinned(self) -> int:
        """Wait until the slab is pinned, as far as it can be; how many bytes are."""
        if self._pinning is not None:
            await asyncio.shield(self._pinning)
        return self._devices.pinned_nbytes

    async def aclose(self) -> None:
        """End what opens or pins, then free and unpin everything. No call may be running.

        Cancelled, it does so all the same before it raises: the slab must not be unmapped while it
        is pinned.
        """
        closing = asyncio.ensure_future(self._close())
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await settled(closing)
            raise

    async def _close(self) -> None:
        running = [*self._openings.values(), *filter(None, [self._pinning])]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        self._openings.clear()
        self._pinning = None
        await self._torch.aclose()
        self._offload.close()
        if running:
            await self._background.run(self._devices.close)
        self._background.close()

    # -- which device ------------------------------------------------------------------------------

    def _pipeline(self, view: KVView) -> Pipeline | None:
        """What serves the view's device by now; None where torch does."""
        device: Any = tensors_of(view.caches[0][0])[0].device
        if device.type != "cuda" or torch.version.hip or device.index in self._failed:
            return None
        opening = self._opening(device.index)
        return opening.result() if opening.done() else None

    def _opening(self, number: int) -> asyncio.Task[Pipeline | None]:
        if number not in self._openings:
            self._openings[number] = asyncio.get_running_loop().create_task(self._open(number))
        return self._openings[number]

    async def _open(self, number: int) -> Pipeline | None:
        try:
            pipeline = await self._background.run(self._devices.open, number)
        except Exception as exc:  # noqa: BLE001  # a broken CUDA says anything; torch works without
            self._give_up(number, exc)
            return None
        if self._pinning is None:
            self._pinning = asyncio.get_running_loop().create_task(self._pin())
        return pipeline

    async def _pin(self) -> None:
        while await self._background.run(self._devices.pin_next):
            pass

    def _give_up(self, number: int, error: Exception) -> None:
        """From now on the device is torch's."""
        if number in self._failed:
            return
        self._failed.add(number)
        cause = (
            f"{error}" if isinstance(error, KVLayerError) else f"{type(error).__name__}: {error}"
        )
        hint = f" ({error.hint})" if isinstance(error, KVLayerError) and error.hint else ""
        _log.warning(
            "cuda:%d: KV is copied by torch, which is slower and otherwise the same: %s%s",
            number,
            cause,
            hint,
        )

    # -- one call ----------------------------------------------------------------------------------

    async def _piped(
        self,
        pipeline: Pipeline,
        view: KVView,
        copies: Sequence[HostCopy],
        gather: bool,
        tell: Callable[[LayerGroup], None] | None = None,
    ) -> bool:
        """Whether the device did it; if not, nothing is in use any more."""
        failures: tuple[type[Exception], ...] = (UnsupportedError, *cuda_errors())
        call = pipeline.call(view, gather=gather)
        try:
            # No names for the batches: this frame would hold their memory while an error lives.
            if gather:
                await self._offload.run_over(
                    partial(pipeline.gather, call), self._stores(pipeline, call, copies)
                )
            else:
                await self._offload.run_over(
                    partial(pipeline.scatter, call, landed=tell),
                    self._loads(pipeline, call, copies, is_heard=tell is not None),
                )
        except failures as exc:
            clear_frames(exc.__traceback__)
            self._give_up(pipeline.number, exc)
            return False
        except BaseException as error:
            # As in TorchStager: frames in the traceback would keep the host memory exported.
            clear_frames(error.__traceback__)
            raise
        finally:
            pipeline.end(call)
        return True

    def _stores(
        self, pipeline: Pipeline, call: Call, copies: Sequence[HostCopy]
    ) -> Iterator[list[Move]]:
        """Check everything, then the batches."""
        moves = self._moves(call.view, copies, gather=True)
        if moves:
            pipeline.begin(call)
            yield from batches(moves, growing(_FIRST_NBYTES, _BATCH_NBYTES))

    def _loads(
        self, pipeline: Pipeline, call: Call, copies: Sequence[HostCopy], *, is_heard: bool = False
    ) -> Iterator[list[LayerGroup]]:
        """Check everything, then the batches: by layers where anybody hears of these.

        Otherwise payload by payload, which makes longer runs.
        """
        moves = self._moves(call.view, copies, gather=False)
        if not moves:
            return
        pipeline.begin(call)
        thresholds = pipeline.calibration
        tokens = (min(c.first for c in copies), max(c.first + c.tokens for c in copies))
        groups_of = partial(layer_groups, tokens=tokens, direct_nbytes=thresholds.direct_nbytes)
        if not is_heard and call.view.loaded is None:
            for batch in batches(moves, growing(_FIRST_NBYTES, _BATCH_NBYTES)):
                yield groups_of(batch, sizes=repeat(sys.maxsize))
            return
        most = thresholds.group_slots * thresholds.slot_nbytes
        groups = groups_of(moves, sizes=growing(_FIRST_NBYTES, most))
        turn = {layer: at for at, layer in enumerate(in_model_order(self._layout))}
        groups.sort(key=lambda group: turn[group.group, group.first])
        yield from _group_batches(groups)

    def _moves(self, view: KVView, copies: Sequence[HostCopy], *, gather: bool) -> list[Move]:
        """What there is to move, checked."""
        with self._slots_order(view):
            geometries = self._reader.read(view)
            planned = plan_moves(self._layout, view, geometries, copies, gather=gather)
            return [move for move in planned if _has_rows(move)]

    def _slots_order(self, view: KVView) -> AbstractContextManager[None]:
        """Slots in the device's memory are read behind the engine; only then the host waits."""
        if any(getattr(slots, "is_cuda", False) for slots in view.slots):
            return CopyOrder(view, self._slot_streams).copying()
        return nullcontext()


def _group_batches(groups: Sequence[LayerGroup]) -> list[list[LayerGroup]]:
    """Layer groups in batches that grow to about ``_BATCH_NBYTES``, in order."""
    found: list[list[LayerGroup]] = [[]]
    sizes = growing(_FIRST_NBYTES, _BATCH_NBYTES)
    room = next(sizes)
    for group in groups:
        if room <= 0:
            found.append([])
            room = next(sizes)
        found[-1].append(group)
        room -= sum(len(move.layers) * move.payload.layer_nbytes for move in group.moves)
    return found


def _has_rows(move: Move) -> bool:
    """Whether the engine has a slot for any of it; all layers of a move have the same slots."""
    runs = move.layers[0][2].runs
    return bool(runs.runs) or runs.loose is not None

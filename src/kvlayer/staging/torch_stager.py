"""The stager of every torch device: the CPU path, and the oracle for stagers of one device.

Copies run off the event loop in batches of tens of MiB, on a few threads at once, so that they
come near the memory's speed and a cancelled call returns soon. Importing this module imports
neither numpy nor torch; making a ``TorchStager`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import repeat
from traceback import clear_frames
from typing import Protocol, TypeAlias

from kvlayer.abc.stager import HostCopy, Landed, Stager
from kvlayer.layout import KVLayout, KVView, Tensor
from kvlayer.runtime.offload import Offload
from kvlayer.staging.copy_order import CopyOrder, CopyStreams
from kvlayer.staging.device_cache import DeviceCache
from kvlayer.staging.host_cache import HostCache
from kvlayer.staging.lazy import np
from kvlayer.staging.moves import Move, Transfer, batches, in_model_order, plan_moves
from kvlayer.staging.steps import Bytes
from kvlayer.staging.torch_view import GeometryReader, tensors_of

__all__ = ["TorchStager"]

_BATCH_NBYTES = 32 << 20
_LEAST_NBYTES = 4 << 20  # what is smaller is not worth another thread


class _Cache(Protocol):
    """One tensor, opened for copies to and from a payload's layer."""

    def gather(self, layer: Bytes, transfer: Transfer, strip: int) -> None: ...

    def scatter(self, layer: Bytes, transfer: Transfer, strip: int) -> None: ...


_Opened: TypeAlias = dict[int, _Cache]
"""The tensors a call has opened, by identity; its threads share them."""


class TorchStager(Stager):
    """Copies between payloads and paged torch tensors, on any torch device.

    The batches of a call run on ``offload``, or on ``threads`` threads of the stager's own,
    which all its calls share. A batch that fails, and cancelling, start no other batch; the call
    raises once those that run have ended. Host memory is not referenced any more when a call
    returns or raises (an exception's traceback holds no locals of the copy), so a slab can be
    closed. A CUDA device copies on a stream of the stager's own, behind what the view says: the
    engine's later work waits for no copy, and no copy waits for it. Any other device is waited for
    as a whole. Copies are done when the call returns.

    Beside the memory it is lent, a call holds on the CPU: a few times 8 bytes per token for its
    slots, and for each copy being moved and each thread 8 bytes per row of one layer. KV is only
    set aside where rows do not lie whole rows apart in the cache (K and V of uneven length in one
    tensor), or loosely (part of a block): 1 MiB per thread, or one block of a layer if that is
    more. On other devices one layer of a copy per thread is, in the device's memory.

    Payloads must have the form the rank's layout declares. A state group's payload is the state
    after its last token, and lies at slot ``// tokens_per_block`` of that token.
    """

    def __init__(
        self, layout: KVLayout, *, threads: int = 2, offload: Offload | None = None
    ) -> None:
        if threads < 1:
            raise ValueError(f"a stager needs at least one thread, found {threads}")
        self._layout = layout
        self._threads = threads
        self._reader = GeometryReader(layout)
        self._streams = CopyStreams()
        self._own_offload = Offload(threads, "kvlayer-stage") if offload is None else None
        if self._own_offload is not None:
            self._own_offload.begin()  # later the system may have no thread to give
        self._offload = offload or self._own_offload or Offload(threads, "kvlayer-stage")

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

    async def scatter_layers(
        self, view: KVView, copies: Sequence[HostCopy], landed: Landed
    ) -> None:
        """As :meth:`scatter`, one layer at a time, each on one thread."""
        opened: _Opened = {}
        order = CopyOrder(view, self._streams)
        try:
            moves = await self._offload.run(self._planned, view, order, copies, False)
            for group, local in in_model_order(self._layout):
                layer = [
                    move._replace(layers=[each for each in move.layers if each[0] == local])
                    for move in moves
                    if move.group == group
                ]
                await self._offload.run(self._copy, view, order, layer, opened, False)
                landed(group, local)
        except BaseException as error:
            clear_frames(error.__traceback__)  # as below
            raise
        finally:
            opened.clear()

    async def aclose(self) -> None:
        if self._own_offload is not None:
            self._own_offload.close()

    async def _run(self, view: KVView, copies: Sequence[HostCopy], gather: bool) -> None:
        opened: _Opened = {}
        order = CopyOrder(view, self._streams)
        try:
            rest = await self._offload.run(self._start, view, order, copies, opened, gather)
            works = [partial(self._copy, view, order, batch, opened, gather) for batch in rest]
            await self._offload.run_all(works)
        except BaseException as error:
            # Frames in the traceback would keep the host memory exported, and in a cycle.
            clear_frames(error.__traceback__)
            raise
        finally:
            opened.clear()

    def _start(
        self,
        view: KVView,
        order: CopyOrder,
        copies: Sequence[HostCopy],
        opened: _Opened,
        gather: bool,
    ) -> list[list[Move]]:
        """Check everything, move it if it is little, return the batches that are left."""
        moves = self._planned(view, order, copies, gather)
        nbytes = sum(len(move.layers) * move.payload.layer_nbytes for move in moves)
        share = max(min(-(-nbytes // self._threads), _BATCH_NBYTES), _LEAST_NBYTES)
        found = batches(moves, repeat(share))
        if len(found) > 1:
            return found
        self._copy(view, order, found[0], opened, gather)
        return []

    def _planned(
        self, view: KVView, order: CopyOrder, copies: Sequence[HostCopy], gather: bool
    ) -> list[Move]:
        with order.copying():  # slots may be on their way, too
            geometries = self._reader.read(view)
            return [*plan_moves(self._layout, view, geometries, copies, gather=gather)]

    def _copy(
        self,
        view: KVView,
        order: CopyOrder,
        moves: Sequence[Move],
        opened: _Opened,
        gather: bool,
    ) -> None:
        with order.copying():
            for move in moves:
                host = np.frombuffer(move.host, np.uint8, move.payload.nbytes)
                nbytes = move.payload.layer_nbytes
                for local, at, transfer in move.layers:
                    tensors = tensors_of(view.caches[move.group][local])
                    for number, strip in enumerate(transfer.strips):
                        tensor = tensors[strip.tensor]
                        cache = opened.get(id(tensor))
                        if cache is None:  # or both threads open it, and one of the two stays
                            cache = opened[id(tensor)] = self._open(tensor)
                        copy = cache.gather if gather else cache.scatter
                        copy(host[at : at + nbytes], transfer, number)

    def _open(self, tensor: Tensor) -> _Cache:
        return HostCache(tensor) if tensor.device.type == "cpu" else DeviceCache(tensor)

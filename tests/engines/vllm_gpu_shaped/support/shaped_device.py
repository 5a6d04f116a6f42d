"""What a rank computes on: its engine's stream, as far behind the scheduler as it likes.

``Behind`` computes in plain memory when it must. ``OnGpu`` is the stream of an engine on a
simulated GPU, where kvlayer's copies run on streams of their own through the pipeline of a CUDA
device, and nothing but events orders the two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeAlias

import fake_cupy
import numpy as np
import pytest
import torch
from gpu_engine import DeviceTensor, QueuedEvent, memory_of
from gpu_scenarios import SMALL, NoTorch
from gpu_sim import Access, Gpu

from kvlayer.abc.stager import HostCopy, Stager
from kvlayer.layout import KVLayout, KVView
from kvlayer.memory.slab import Slab
from kvlayer.staging.cuda.devices import Devices
from kvlayer.staging.cuda.stager import DeviceStager
from kvlayer_vllm import layouts

__all__ = ["Behind", "Device", "OnGpu", "SimulatedGpu", "blocks_of", "rows_of"]

Run: TypeAlias = Callable[[], None]


class Device(Protocol):
    """Runs what is queued in its order."""

    @property
    def is_idle(self) -> bool:
        """Whether what is queued would run at once."""
        ...

    def lent(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The engine's tensors, as the connector gets them."""
        ...

    def hooks_come(self) -> None:
        """The engine's thread is about to call the hooks of a step."""
        ...

    def queue(
        self, number: int, run: Run, reads: Sequence[Access], writes: Sequence[Access]
    ) -> None:
        """Something of step ``number`` that touches these rows."""
        ...

    def catch_up(self, number: int) -> None:
        """The device has run what was queued, up to step ``number``."""
        ...


class Behind:
    """Computes when it is told."""

    def __init__(self) -> None:
        self._queue: deque[tuple[int, Run]] = deque()

    @property
    def is_idle(self) -> bool:
        return not self._queue

    def lent(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors

    def hooks_come(self) -> None:
        """Nothing."""

    def queue(
        self, number: int, run: Run, reads: Sequence[Access], writes: Sequence[Access]
    ) -> None:
        self._queue.append((number, run))

    def catch_up(self, number: int) -> None:
        while self._queue and self._queue[0][0] <= number:
            self._queue.popleft()[1]()


class SimulatedGpu:
    """One device for all ranks of an engine, and what the adapter takes for torch's streams.

    It does everything when it is queued, and checks what is ordered before what: an access that
    nothing orders is found, whatever the bytes are.
    """

    def __init__(self) -> None:
        self.gpu = Gpu("race")
        self.current = 0
        """The stream of the thread whose hooks come."""

    @property
    def faults(self) -> list[str]:
        """Accesses that nothing orders, and what the device would have refused."""
        assert self.gpu.races is not None
        return [*self.gpu.faults, *self.gpu.races.found]

    def _current_stream(self) -> _Stream:
        """In the place of ``torch.cuda.current_stream``."""
        return _Stream(self.gpu, self.current)

    def stager(self, layout: KVLayout, slab: Slab) -> Stager:
        """The pipeline of a CUDA device."""
        with slab.view(0, slab.nbytes) as whole:
            self.gpu.watch(np.frombuffer(whole, np.uint8).ctypes.data, slab.nbytes)
        return _PinnedStager(
            layout,
            slab=slab,
            threads=1,
            devices=Devices(slab, SMALL, piece_nbytes=64 << 10),
            torch_stager=NoTorch(),
        )

    @contextmanager
    def installed(self) -> Generator[None]:
        """The adapter takes the engine for one on CUDA."""
        with fake_cupy.install(self.gpu), pytest.MonkeyPatch.context() as patch:
            patch.setattr(layouts, "platform", lambda: "cuda")
            patch.setattr(layouts, "attention_backend", lambda _config, _layer: "FLASH_ATTN")
            patch.setattr(torch.cuda, "current_stream", self._current_stream)
            yield


class _Stream(NamedTuple):
    """As far as the adapter knows torch's."""

    gpu: Gpu
    cuda_stream: int

    def record_event(self) -> QueuedEvent:
        event = self.gpu.new_event()
        self.gpu.record(event, self.cuda_stream)
        return QueuedEvent(self.gpu, event)


class OnGpu:
    """A rank's stream of ``on``."""

    def __init__(self, on: SimulatedGpu) -> None:
        self._on = on
        self._stream = on.gpu.new_stream()

    @property
    def is_idle(self) -> bool:
        return False

    def lent(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for each in tensors.values():
            self._on.gpu.lend(*memory_of(each))
        return {name: each.as_subclass(DeviceTensor) for name, each in tensors.items()}

    def hooks_come(self) -> None:
        self._on.current = self._stream

    def queue(
        self, number: int, run: Run, reads: Sequence[Access], writes: Sequence[Access]
    ) -> None:
        self._on.gpu.launch(self._stream, f"step {number}", run, lambda: (reads, writes))

    def catch_up(self, number: int) -> None:
        """It has, as far as bytes go. vLLM's thread would wait: here only events order anything."""


class _PinnedStager(DeviceStager):
    """Its first copy waits until all of the slab is pinned: others would wait for the host."""

    async def gather(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        await self._is_pinned()
        await super().gather(view, copies)

    async def scatter(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        await self._is_pinned()
        await super().scatter(view, copies)

    async def _is_pinned(self) -> None:
        assert await self.ready()
        await self.pinned()


def rows_of(tensor: torch.Tensor, blocks: Any, inside: Any) -> list[Access]:
    """Addresses of the rows of these tokens in a tensor of ``[block, head, token, row]``."""
    heads, per_head = tensor.shape[1], tensor.stride(1)
    at = np.asarray(blocks)[:, None] * tensor.stride(0) + np.arange(heads)[None, :] * per_head
    at = at + np.asarray(inside)[:, None] * tensor.stride(2)
    size = tensor.element_size()
    return [(tensor.data_ptr() + at.reshape(-1).astype(np.int64) * size, tensor.shape[3] * size)]


def blocks_of(tensor: torch.Tensor, blocks: Sequence[int]) -> list[Access]:
    """Addresses of whole blocks."""
    nbytes = tensor.stride(0) * tensor.element_size()
    return [(tensor.data_ptr() + np.array(blocks, np.int64) * nbytes, nbytes)]

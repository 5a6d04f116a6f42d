"""A stand-in for the slice of ``torch.cuda`` that torch's stager uses, over a simulated GPU.

``install`` puts it in place for the length of a block. A copy is one kernel on the thread's current
stream, which reads one end whole and writes the other.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from threading import local
from typing import Any

import numpy as np
import pytest
import torch
from gpu_engine import QueuedEvent, memory_of
from gpu_sim import Gpu

from kvlayer.staging.host_cache import HostCache
from kvlayer.staging.torch_stager import TorchStager

__all__ = ["install"]


class _Stream:
    """``torch.cuda.Stream``, or an ``ExternalStream``."""

    def __init__(self, gpu: Gpu, handle: int) -> None:
        self.gpu, self.cuda_stream = gpu, handle

    def record_event(self) -> QueuedEvent:
        event = self.gpu.new_event()
        self.gpu.record(event, self.cuda_stream)
        return QueuedEvent(self.gpu, event)

    def wait_event(self, event: Any) -> None:
        event.wait(self)

    def synchronize(self) -> None:
        self.gpu.synchronize_stream(self.cuda_stream)


class _Cache:
    """A tensor on the GPU: its copies are queued on the current stream."""

    def __init__(self, gpu: Gpu, current: local, tensor: Any) -> None:
        self._gpu, self._current = gpu, current
        self._cache = HostCache(tensor)
        start, nbytes = memory_of(tensor)
        self._whole = [(np.array([start]), nbytes)]

    def gather(self, layer: Any, transfer: Any, strip: int) -> None:
        self._queue("gather", layer, transfer, strip, self._whole, [])

    def scatter(self, layer: Any, transfer: Any, strip: int) -> None:
        self._queue("scatter", layer, transfer, strip, [], self._whole)

    def _queue(
        self, verb: str, layer: Any, transfer: Any, strip: int, reads: Any, writes: Any
    ) -> None:
        def run() -> None:
            getattr(self._cache, verb)(layer, transfer, strip)

        stream = self._current.stream.cuda_stream
        self._gpu.launch(stream, f"torch's {verb}", run, lambda: (reads, writes))


@contextmanager
def install(gpu: Gpu) -> Generator[list[_Stream]]:
    """The streams that torch has made meanwhile."""
    made: list[_Stream] = []
    current = local()

    def new(_device: Any, *, priority: int) -> _Stream:
        assert priority < 0, "of the pool that no engine takes streams from by default"
        made.append(_Stream(gpu, gpu.new_stream()))
        return made[-1]

    @contextmanager
    def on(stream: _Stream) -> Generator[None]:
        before, current.stream = getattr(current, "stream", None), stream
        try:
            yield
        finally:
            current.stream = before

    def opened(_stager: TorchStager, tensor: Any) -> HostCache | _Cache:
        is_host = tensor.device.type == "cpu"
        return HostCache(tensor) if is_host else _Cache(gpu, current, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", new)
        patch.setattr(torch.cuda, "ExternalStream", lambda handle, _device: _Stream(gpu, handle))
        patch.setattr(torch.cuda, "default_stream", lambda _device: _Stream(gpu, 0))
        patch.setattr(torch.cuda, "stream", on)
        patch.setattr(TorchStager, "_open", opened)
        yield made

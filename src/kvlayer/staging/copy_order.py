"""Where torch queues the copies of a call, and what of the engine's work they follow."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from kvlayer.device_event import DeviceEvent
from kvlayer.layout import KVView
from kvlayer.staging.lazy import torch
from kvlayer.staging.torch_view import tensors_of

__all__ = ["CopyOrder", "CopyStreams"]

_HIGH = -1  # lower is higher: as the pipeline's streams, copies go before what computes


class CopyStreams:
    """A stream of each CUDA device, for torch's copies alone; made when it is first needed.

    One for all calls, not one for each: torch keeps memory that was used on a stream for that
    stream. Threads may share this.
    """

    def __init__(self) -> None:
        self._of: dict[Any, Any] = {}

    def of(self, device: Any) -> Any:
        """The stream of a CUDA device: it waits for nothing but what it is told to wait for."""
        found = self._of.get(device)
        if found is None:  # of two threads one stream stays
            found = self._of.setdefault(device, torch.cuda.Stream(device, priority=_HIGH))
        return found


class CopyOrder:
    """The order of one call's copies: behind the engine's work, and beside what comes later.

    On a CUDA device copies follow ``view.ready``, or without it what is queued on ``view.stream``
    when :meth:`copying` is first entered. Any other device that queues work is waited for as a
    whole. A CPU queues nothing.
    """

    def __init__(self, view: KVView, streams: CopyStreams) -> None:
        self._device: Any = tensors_of(view.caches[0][0])[0].device
        self._stream = view.stream
        self._ready: DeviceEvent | None = view.ready
        self._streams = streams

    @contextmanager
    def copying(self) -> Generator[None]:
        """What torch queues inside follows the engine's work, and has ended when this is left.

        Enter it once before several threads do: the first decides what is followed.
        """
        if self._device.type == "cpu":
            yield
        elif self._device.type == "cuda":
            stream = self._streams.of(self._device)
            if self._ready is None:
                self._ready = _engine_stream(self._stream, self._device).record_event()
            with torch.cuda.stream(stream):
                stream.wait_event(self._ready)
                try:
                    yield
                finally:
                    stream.synchronize()
        else:
            module = torch.get_device_module(self._device)
            module.synchronize()
            try:
                yield
            finally:
                module.synchronize()


def _engine_stream(handle: int, device: Any) -> Any:
    cuda = torch.cuda
    return cuda.ExternalStream(handle, device) if handle else cuda.default_stream(device)

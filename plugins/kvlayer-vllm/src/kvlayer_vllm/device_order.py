"""What the engine has queued on its device, and copies of ours that follow it.

vLLM zeroes the blocks that it gives to a request, and copies those that it shares before somebody
writes to them, on the stream of its worker's thread: a load that comes earlier is wiped, and nobody
hears of it. A store that comes before its step has computed reads what was there before. So each
copy follows an event that a hook has recorded on that stream:

    load    in ``start_load_kv`` of the step that gives out its blocks: they are zeroed by then
    store   in the hook in which vLLM says that a step is over, or, by a rank in another process, in
            the first hook of the step that brings the order, which is a later one
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from kvlayer import KVView
from kvlayer.device_event import DeviceEvent

__all__ = ["NOTHING", "EngineStream", "Queued"]


class Queued(NamedTuple):
    """All that was on a stream by then."""

    stream: int = 0
    ready: DeviceEvent | None = None
    """As ``KVView.ready``; None on a CPU, where nothing is queued."""

    def followed_by(self, view: KVView) -> KVView:
        """The view, for copies that follow this."""
        if self.ready is None:
            return view
        return replace(view, stream=self.stream, ready=self.ready)


NOTHING = Queued()


class EngineStream:
    """The stream on which a worker computes. ``device`` is vLLM's word: ``cpu``, ``cuda``."""

    def __init__(self, device: str) -> None:
        self._is_queued = device != "cpu"
        self._stream: Any = None

    def note(self) -> None:
        """In each step, in a worker's hook: this is the thread that computes."""
        if self._is_queued:
            import torch

            self._stream = torch.cuda.current_stream()

    def queued(self) -> Queued:
        """What is queued by now on the stream that was noted last. In any thread of the process."""
        if not self._is_queued:
            return NOTHING
        return Queued(self._stream.cuda_stream, self._stream.record_event())

"""What a copy may follow on a device: see ``KVView.ready``."""

from __future__ import annotations

from typing import Any, Protocol

__all__ = ["DeviceEvent"]


class DeviceEvent(Protocol):
    """A recorded event of a CUDA device: ``torch.cuda.Event``.

    An object, not its raw handle: torch cannot make one from a handle, and needs one to wait.
    """

    @property
    def cuda_event(self) -> int:
        """Its raw handle."""
        ...

    def wait(self, stream: Any) -> None:
        """What is queued on this stream of torch's from now on follows the record."""
        ...

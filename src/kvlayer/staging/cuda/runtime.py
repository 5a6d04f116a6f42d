"""The slice of CUDA's runtime that the pipeline uses, as CuPy names it, and streams and events.

Handles are plain integers, so an engine's stream is used as it comes. The protocol is all that the
type checker, and a stand-in for CuPy in tests, need to know of CuPy.
"""

# Names are CUDA's.
# ruff: noqa: N802, N815

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple, Protocol, cast

__all__ = [
    "ALIGNMENT",
    "PORTABLE",
    "Event",
    "Recorded",
    "Runtime",
    "Stream",
    "cuda_errors",
    "cupy_runtime",
]

ALIGNMENT = 256
"""What an allocation begins on a multiple of: what lies in one at such a place is as aligned."""
PORTABLE = 1
"""``cudaHostAllocPortable``, ``cudaHostRegisterPortable``: pinned for every device."""

_NON_BLOCKING = 1  # cudaStreamNonBlocking: does not wait for the legacy default stream
_HIGHEST = -1000  # lower is higher; CUDA takes its own highest where a number is beyond
_EVENT_FLAGS = 1 | 2  # cudaEventBlockingSync: a waiting thread sleeps; cudaEventDisableTiming


class Runtime(Protocol):
    """``cupy.cuda.runtime``. Every call may raise ``CUDARuntimeError``."""

    memcpyHostToDevice: int
    memcpyDeviceToHost: int

    def getDeviceCount(self) -> int: ...
    def getDeviceProperties(self, device: int) -> Mapping[str, Any]: ...
    def driverGetVersion(self) -> int: ...
    def setDevice(self, device: int) -> None: ...

    def malloc(self, size: int) -> int: ...
    def free(self, ptr: int) -> None: ...
    def hostAlloc(self, size: int, flags: int) -> int: ...
    def freeHost(self, ptr: int) -> None: ...
    def hostRegister(self, ptr: int, size: int, flags: int) -> None: ...
    def hostUnregister(self, ptr: int) -> None: ...
    def memcpyAsync(self, dst: int, src: int, size: int, kind: int, stream: int) -> None: ...

    def streamCreateWithPriority(self, flags: int, priority: int) -> int: ...
    def streamDestroy(self, stream: int) -> None: ...
    def streamSynchronize(self, stream: int) -> None: ...
    def streamWaitEvent(self, stream: int, event: int) -> None: ...
    def eventCreateWithFlags(self, flags: int) -> int: ...
    def eventDestroy(self, event: int) -> None: ...
    def eventRecord(self, event: int, stream: int) -> None: ...
    def eventSynchronize(self, event: int) -> None: ...


class Stream:
    """A stream of the current device that waits for nothing but what it is told to wait for.

    Its kernels get multiprocessors before those of ordinary streams do, as these become free: they
    are short, and a link stands still while they wait. ``ptr`` is its handle, under the name by
    which CuPy asks for it when a kernel is launched.
    """

    __slots__ = ("_runtime", "ptr")

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.ptr = runtime.streamCreateWithPriority(_NON_BLOCKING, _HIGHEST)

    def wait(self, event: Event | Recorded) -> None:
        """What is queued from now on follows the last record of ``event`` before this call."""
        self._runtime.streamWaitEvent(self.ptr, event.ptr)

    def synchronize(self) -> None:
        """Block until everything queued so far has ended."""
        self._runtime.streamSynchronize(self.ptr)

    def close(self) -> None:
        self._runtime.streamDestroy(self.ptr)


class Recorded(NamedTuple):
    """An event that somebody else has made and recorded, by its handle."""

    ptr: int


class Event:
    """A point in a stream's order. One that was never recorded holds nobody up."""

    __slots__ = ("_runtime", "ptr")

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.ptr = runtime.eventCreateWithFlags(_EVENT_FLAGS)

    def record(self, stream: int) -> None:
        """Mark the end of what is queued on the stream of this handle (0: the default stream)."""
        self._runtime.eventRecord(self.ptr, stream)

    def synchronize(self) -> None:
        """Block until the last record has been passed. The thread sleeps, without the lock."""
        self._runtime.eventSynchronize(self.ptr)

    def close(self) -> None:
        self._runtime.eventDestroy(self.ptr)


def cupy_runtime() -> Runtime:
    """CuPy's runtime. A ``Builder`` has found out that there is one, and a device."""
    return cast("Runtime", import_module("cupy.cuda.runtime"))


def cuda_errors() -> tuple[type[Exception], ...]:
    """What a call into CUDA raises when it fails; nothing where there is no CuPy."""
    try:
        cuda: Any = import_module("cupy.cuda")
    except ImportError:
        return ()
    return (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError)

"""A stand-in for the slice of CuPy (and of ``cuda.bindings``) that staging uses.

``install`` puts it in place of the modules for the length of a block. Kernels run as NumPy on what
their tables say. ``Calls`` sees every call by the line of the product that makes it, and may drop
it or send it to another stream: so a test can take away one wait after the other.
"""

# Names are CUDA's.
# ruff: noqa: N802, N815

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import kernel_oracle
from emulator import kernels_of
from gpu_sim import FakeCudaError, Gpu

__all__ = ["Calls", "Mutant", "Site", "install", "place"]

_WRAPPERS = {"runtime.py", "copies.py", "tables.py", "marked", "_launch"}
"""Files and functions that others call to reach CUDA: the line in question is their caller's."""


@dataclass(frozen=True, order=True)
class Site:
    """A line of the pipeline that calls CUDA, what it calls, and for which stream."""

    what: str
    place: str
    stream: int = 0


class Mutant(NamedTuple):
    """Every call from one site goes to another stream of the pipeline, or is dropped."""

    site: Site
    stream: int | None


@dataclass
class Calls:
    """What was called from where, and what becomes of one of the calls.

    A site's stream is a number: of the pipeline's streams in the order they were made, -1 for
    any other.
    """

    mutant: Mutant | None = None
    seen: dict[Site, int] = field(default_factory=dict)
    streams: list[int] = field(default_factory=list)

    def __call__(self, what: str, stream: int) -> int | None:
        number = self.streams.index(stream) if stream in self.streams else -1
        site = Site(what, place(), number)
        self.seen[site] = self.seen.get(site, 0) + 1
        if self.mutant is None or site != self.mutant.site:
            return stream
        return None if self.mutant.stream is None else self.streams[self.mutant.stream]


def place() -> str:
    """The innermost function of the pipeline on the stack, and the line in it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        names = {path.name, frame.f_code.co_name}
        if path.parent.name == "cuda" and not names & _WRAPPERS:
            return f"{path.stem}.{frame.f_code.co_name}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


class _Runtime(ModuleType):
    """``cupy.cuda.runtime``."""

    memcpyHostToDevice = 1
    memcpyDeviceToHost = 2
    CUDARuntimeError = FakeCudaError

    def __init__(self, gpu: Gpu, calls: Calls, arch: tuple[int, int]) -> None:
        super().__init__("cupy.cuda.runtime")
        self._gpu, self._calls, self._arch = gpu, calls, arch

    def getDeviceCount(self) -> int:
        if not self._gpu.devices:
            raise FakeCudaError("cudaErrorInsufficientDriver: driver version is insufficient")
        return self._gpu.devices

    def getDeviceProperties(self, device: int) -> dict[str, Any]:
        major, minor = self._arch
        return {"name": b"Fake GPU", "major": major, "minor": minor}

    def driverGetVersion(self) -> int:
        return 13000

    def setDevice(self, device: int) -> None:
        self._gpu.device = device

    def malloc(self, size: int) -> int:
        return self._gpu.allocate(size, "device")

    def mallocManaged(self, size: int, flags: int) -> int:
        return self._gpu.allocate(size, "device")

    def free(self, ptr: int) -> None:
        self._gpu.free(ptr, "device")

    def hostAlloc(self, size: int, flags: int) -> int:
        return self._gpu.allocate(size, "pinned")

    def freeHost(self, ptr: int) -> None:
        self._gpu.free(ptr, "pinned")

    def hostRegister(self, ptr: int, size: int, flags: int) -> None:
        self._gpu.register(ptr, size)

    def hostUnregister(self, ptr: int) -> None:
        self._gpu.free(ptr, "registered")

    def memcpyAsync(self, dst: int, src: int, size: int, kind: int, stream: int) -> None:
        into = self._calls("copy", stream)
        if into is not None:
            self._gpu.copy(dst, src, size, into, to_host=kind == self.memcpyDeviceToHost)

    def streamCreateWithPriority(self, flags: int, priority: int) -> int:
        if flags != 1:
            raise FakeCudaError("a stream of the product must not wait for the default stream")
        handle = self._gpu.new_stream()
        self._calls.streams.append(handle)
        return handle

    def streamDestroy(self, stream: int) -> None:
        self._gpu.drop_stream(stream)

    def streamSynchronize(self, stream: int) -> None:
        if self._calls("synchronize", stream) is not None:
            self._gpu.synchronize_stream(stream)

    def streamWaitEvent(self, stream: int, event: int, flags: int = 0) -> None:
        into = self._calls("wait", stream)
        if into is not None:
            self._gpu.wait(into, event)

    def eventCreateWithFlags(self, flags: int) -> int:
        if not flags & 1:
            raise FakeCudaError("a thread that waits for an event of the product must sleep")
        return self._gpu.new_event()

    def eventDestroy(self, event: int) -> None:
        self._gpu.drop_event(event)

    def eventRecord(self, event: int, stream: int) -> None:
        into = self._calls("record", stream)
        if into is not None:
            self._gpu.record(event, into)

    def eventSynchronize(self, event: int) -> None:
        if self._calls("synchronize", self._gpu.recorded_on(event)) is not None:
            self._gpu.synchronize_event(event)


class _Module:
    """``cupy.RawModule``."""

    def __init__(self, gpu: Gpu, calls: Calls, code: str) -> None:
        self._gpu, self._calls, self._code = gpu, calls, code

    def get_function(self, name: str) -> Callable[..., None]:
        if name not in kernels_of(self._code):
            raise FakeCudaError(f"CUDA_ERROR_NOT_FOUND: {name}")

        def function(
            grid: tuple[int], block: tuple[int], args: Sequence[Any], *, stream: Any
        ) -> None:
            into = self._calls("launch", stream.ptr)
            if into is not None:
                kernel_oracle.launch(self._gpu, into, name, [int(a) for a in args])

        return function


class _Device:
    """``cupy.cuda.Device``."""

    def __init__(self, gpu: Gpu, number: int, arch: tuple[int, int]) -> None:
        self._gpu, self._number, self._before = gpu, number, gpu.device
        self.compute_capability = "{}{}".format(*arch)

    def __enter__(self) -> None:
        self._before, self._gpu.device = self._gpu.device, self._number

    def __exit__(self, *_: object) -> None:
        self._gpu.device = self._before


@contextmanager
def install(
    gpu: Gpu,
    *,
    calls: Calls | None = None,
    arch: tuple[int, int] = (9, 0),
    compiles: bool = True,
    batch: bool = True,
) -> Generator[Calls]:
    """CuPy on this GPU, until the block ends; with ``batch``, cuda-bindings as well."""
    calls = calls or Calls()
    runtime = _Runtime(gpu, calls, arch)

    def raw_module(*, code: str, options: tuple[str, ...], backend: str) -> _Module:
        if not compiles:
            raise FakeCudaError("nvrtc: error: invalid value for --gpu-architecture (-arch)")
        return _Module(gpu, calls, code)

    def memcpy_batch(
        dsts: list[int], srcs: list[int], sizes: list[int], count: int, *rest: Any
    ) -> tuple[int]:
        attributes, starts, number, stream = rest
        assert len(dsts) == len(srcs) == len(sizes) == count and (starts, number) == ([0], 1)
        assert attributes[0].srcAccessOrder == "stream"
        into = calls("copy", stream)
        gpu.counts["batches"] += 1
        try:
            for target, source, nbytes in zip(dsts, srcs, sizes, strict=True):
                if into is not None:
                    gpu.copy(target, source, nbytes, into, to_host=gpu.is_device(source))
        except FakeCudaError:
            return (999,)
        return (0,)

    cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    cupy.cuda, cupy.RawModule = cuda, raw_module  # type: ignore[attr-defined]
    cuda.runtime = runtime  # type: ignore[attr-defined]
    cuda.driver = SimpleNamespace(CUDADriverError=FakeCudaError)  # type: ignore[attr-defined]
    cuda.Device = lambda number: _Device(gpu, number, arch)  # type: ignore[attr-defined]
    bindings = ModuleType("cuda.bindings.runtime")
    bindings.cudaMemcpyBatchAsync = memcpy_batch  # type: ignore[attr-defined]
    bindings.cudaMemcpyAttributes = SimpleNamespace  # type: ignore[attr-defined]
    bindings.cudaMemcpySrcAccessOrder = SimpleNamespace(  # type: ignore[attr-defined]
        cudaMemcpySrcAccessOrderStream="stream"
    )
    found: dict[str, ModuleType | None] = {
        "cupy": cupy,
        "cupy.cuda": cuda,
        "cupy.cuda.runtime": runtime,
        "cuda.bindings.runtime": bindings if batch else None,
    }
    if batch:
        found |= {"cuda": ModuleType("cuda"), "cuda.bindings": ModuleType("cuda.bindings")}
    before = {name: sys.modules.get(name) for name in found}
    sys.modules.update(found)  # type: ignore[arg-type]
    try:
        yield calls
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module

"""CuPy whose calls do nothing and cost next to nothing: what is left is the product's own share."""

# Names are CUDA's.

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from ctypes import addressof, create_string_buffer
from types import ModuleType, SimpleNamespace
from typing import Any

from gpu_sim import FakeCudaError

__all__ = ["install"]

_QUIET = (
    "setDevice free freeHost hostRegister hostUnregister memcpyAsync streamDestroy "
    "streamSynchronize streamWaitEvent eventDestroy eventRecord eventSynchronize"
)


class _Device:
    compute_capability = "90"

    def __init__(self, number: int) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _nothing(*_: Any, **__: Any) -> None:
    pass


@contextmanager
def install() -> Generator[None]:
    """In place of CuPy, and of ``cuda.bindings``, until the block ends. Pinned memory is real."""
    next_address = 1 << 50
    kept: list[object] = []

    def somewhere(size: int, *_: int) -> int:
        nonlocal next_address
        next_address += -(-size // 512) * 512
        return next_address

    def pinned(size: int, _: int) -> int:
        kept.append(create_string_buffer(size + 512))
        return -(-addressof(kept[-1]) // 512) * 512  # type: ignore[arg-type]

    runtime: Any = ModuleType("cupy.cuda.runtime")
    vars(runtime).update(dict.fromkeys(_QUIET.split(), _nothing))
    runtime.memcpyHostToDevice, runtime.memcpyDeviceToHost = 1, 2
    runtime.CUDARuntimeError = FakeCudaError
    runtime.getDeviceCount = lambda: 1
    runtime.getDeviceProperties = lambda _: {"name": b"Null", "major": 9, "minor": 0}
    runtime.malloc, runtime.hostAlloc = somewhere, pinned
    runtime.streamCreateWithPriority = runtime.eventCreateWithFlags = somewhere
    cupy: Any = ModuleType("cupy")
    cupy.cuda = ModuleType("cupy.cuda")
    cupy.RawModule = lambda **_: SimpleNamespace(get_function=lambda _: _nothing)
    cupy.cuda.runtime, cupy.cuda.Device = runtime, _Device
    cupy.cuda.driver = SimpleNamespace(CUDADriverError=FakeCudaError)
    bindings: Any = ModuleType("cuda.bindings.runtime")
    bindings.cudaMemcpyBatchAsync = lambda *_: (0,)
    bindings.cudaMemcpyAttributes = SimpleNamespace
    bindings.cudaMemcpySrcAccessOrder = SimpleNamespace(cudaMemcpySrcAccessOrderStream=1)
    found = {
        "cupy": cupy,
        "cupy.cuda": cupy.cuda,
        "cupy.cuda.runtime": runtime,
        "cuda": ModuleType("cuda"),
        "cuda.bindings": ModuleType("cuda.bindings"),
        "cuda.bindings.runtime": bindings,
    }
    before = {name: sys.modules.get(name) for name in found}
    sys.modules.update(found)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module

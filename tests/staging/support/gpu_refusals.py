"""CUDA that refuses one call of a process's life, or that call and every later one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import fake_cupy
from gpu_sim import FakeCudaError, Gpu

__all__ = ["Refusals", "install"]


class Refusals:
    """Names of the calls made, in order. Call number ``at`` (from 1; 0: none) is refused.

    ``for_good`` is an error that sticks, as after an illegal access: the device's queues are lost,
    and it refuses whatever comes later.
    """

    def __init__(self, gpu: Gpu, at: int = 0, *, for_good: bool = False) -> None:
        self.names: list[str] = []
        self.places: list[str] = []
        """The product's lines that made the calls."""
        self._gpu, self._at, self._for_good = gpu, at, for_good

    @property
    def refused(self) -> str | None:
        """The call that was refused first."""
        return self.names[self._at - 1] if 0 < self._at <= len(self.names) else None

    def __call__(self, name: str) -> None:
        with self._gpu.lock:
            self.names.append(name)
            self.places.append(f"{name} {fake_cupy.place()}")
            count = len(self.names)
            if count == self._at or (self._for_good and 0 < self._at < count):
                if self._for_good:
                    self._gpu.forget()
                raise FakeCudaError(f"{name}, call {count}: refused")


@contextmanager
def install(gpu: Gpu, refusals: Refusals) -> Generator[None]:
    """``fake_cupy.install``, with every call into CUDA asking ``refusals`` first."""

    def asking(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*args: Any, **kwargs: Any) -> Any:
            refusals(name)
            return call(*args, **kwargs)

        return asked

    with fake_cupy.install(gpu):
        cupy: Any = sys.modules["cupy"]
        real, raw_module = sys.modules["cupy.cuda.runtime"], cupy.RawModule
        runtime: Any = ModuleType("cupy.cuda.runtime")
        for name in dir(type(real)):
            if not name.startswith("_"):
                found = getattr(real, name)
                is_call = callable(found) and not isinstance(found, type)
                setattr(runtime, name, asking(name, found) if is_call else found)

        def module(**options: Any) -> Any:
            made = raw_module(**options)
            get = made.get_function
            made.get_function = lambda name: asking("launch", get(name))
            return made

        cupy.RawModule, cupy.cuda.runtime = module, runtime
        bindings: Any = sys.modules["cuda.bindings.runtime"]
        bindings.cudaMemcpyBatchAsync = asking("batch", bindings.cudaMemcpyBatchAsync)
        sys.modules["cupy.cuda.runtime"] = runtime  # fake_cupy puts back what was there before
        yield

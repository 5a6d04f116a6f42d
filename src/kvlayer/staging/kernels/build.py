"""From the ``.cu`` files to functions of one CUDA device, through CuPy, which is imported late.

Each file is compiled when a kernel of it is first asked for: one or two seconds, after which CuPy's
own cache on disk answers (by source, options, architecture and compiler). Headers are put into a
file's text rather than included, because CuPy's cache does not look into includes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import Any, TypeAlias

from kvlayer.errors import UnsupportedError

__all__ = [
    "ARCHITECTURES",
    "MIN_ARCH",
    "OPTIONS",
    "SOURCES",
    "Builder",
    "Function",
    "kernel_source",
]

Function: TypeAlias = Callable[..., None]
"""``function(grid, block, args, stream=stream)``, as CuPy's kernels are called."""

SOURCES = ("copy", "rotate", "int8")
ARCHITECTURES = (80, 90, 100, 120)
"""Compute capabilities, times ten, that the kernels are compiled and checked for."""
MIN_ARCH = ARCHITECTURES[0]
# Contraction would round differently from the emulated kernels: fused steps are written as such.
# CuPy adds -ftz=true behind these: what is computed with treats subnormal float32 as zero.
OPTIONS = ("--std=c++17", "--fmad=false")
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"\n', re.MULTILINE)
_INSTALL = "pip install cupy-cuda13x (or cupy-cuda12x), or stage through torch"


@cache
def kernel_source(name: str) -> str:
    """One file of ``SOURCES`` with its headers put in, as one translation unit."""
    here = files("kvlayer.staging.kernels")
    put: set[str] = set()

    def text(file: str) -> str:
        return _INCLUDE.sub(included, (here / file).read_text("utf-8"))

    def included(match: re.Match[str]) -> str:
        file = match[1]
        if file in put:
            return ""
        put.add(file)
        return text(file).replace("#pragma once\n", "")

    return text(f"{name}.cu")


class Builder:
    """Kernels of one CUDA device. Modules are kept by source, options and architecture.

    Raises ``UnsupportedError`` where CUDA cannot be used: no CuPy, no driver or device, an
    architecture older than ``MIN_ARCH``. Not to be shared between threads while it builds.
    """

    def __init__(self, device: int = 0) -> None:
        self._device = device
        self._cupy = _import_cupy()
        self.arch = self._find_arch()
        self._modules: dict[str, Any] = {}
        self._functions: dict[tuple[str, str], Function] = {}

    def function(self, source: str, kernel: str) -> Function:
        """A kernel, built if need be. ``UnsupportedError`` where it does not compile."""
        found = self._functions.get((source, kernel))
        if found is None:
            found = self._functions[source, kernel] = self._build(source, kernel)
        return found

    def fingerprint(self, source: str) -> str:
        """Names what is built: source, options and architecture."""
        parts = (kernel_source(source), *OPTIONS, f"sm_{self.arch}")
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _build(self, source: str, kernel: str) -> Function:
        key = self.fingerprint(source)
        cupy = self._cupy
        try:
            with cupy.cuda.Device(self._device):
                module = self._modules.get(key)
                if module is None:
                    module = cupy.RawModule(
                        code=kernel_source(source), options=OPTIONS, backend="nvrtc"
                    )
                    self._modules[key] = module
                function: Function = module.get_function(kernel)
        except Exception as error:  # CuPy's compiler, NVRTC and the driver each have their own
            raise UnsupportedError(
                f"kernel {kernel} of {source}.cu does not build for sm_{self.arch}: "
                f"{_last_lines(error)}",
                hint="the CUDA runtime that CuPy uses must know this GPU; stage through torch "
                "until then",
            ) from error
        return function

    def _find_arch(self) -> int:
        cuda = self._cupy.cuda
        try:
            count = int(cuda.runtime.getDeviceCount())
        except cuda.runtime.CUDARuntimeError as error:
            raise UnsupportedError(
                f"no CUDA driver or device: {error}",
                hint="install an NVIDIA driver that is new enough for CuPy's CUDA, or stage "
                "through torch",
            ) from error
        if not 0 <= self._device < count:
            raise UnsupportedError(
                f"no CUDA device {self._device}: {count} found",
                hint="CUDA_VISIBLE_DEVICES says which devices a process sees",
            )
        arch = int(cuda.Device(self._device).compute_capability)
        if arch < MIN_ARCH:
            raise UnsupportedError(
                f"device {self._device} is sm_{arch}; the kernels need sm_{MIN_ARCH} or newer",
                hint="stage through torch on this device",
            )
        return arch


def _import_cupy() -> Any:
    try:
        return import_module("cupy")
    except ImportError as error:
        raise UnsupportedError(f"CuPy cannot be imported: {error}", hint=_INSTALL) from error
    except OSError as error:  # CuPy makes the folder of its cache while it is imported
        raise UnsupportedError(
            f"CuPy cannot be imported: {error}",
            hint="CUPY_CACHE_DIR names a folder in which CuPy may write, or stage through torch",
        ) from error


def _last_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[-3:]) or type(error).__name__

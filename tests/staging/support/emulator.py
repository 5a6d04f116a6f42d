"""The kernels' own sources, compiled for the CPU, behind the interface that launches want.

``Kernels(Emulator(folder)).launch(None, plan, table, blocks=...)`` runs a plan at once, in a chosen
order of threads, on memory that was registered; ``emulator.cpp`` says what it checks.
"""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvlayer.staging.kernels.build import kernel_source

__all__ = [
    "ORDERS",
    "Access",
    "Efficiency",
    "Emulator",
    "EmulatorError",
    "Memory",
    "kernels_of",
    "missing",
]

HERE = Path(__file__).parent
ORDERS = ("forward", "reverse", "random")
_FLAGS = ("-std=c++17", "-g1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing")
_SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
_ALIGNMENT = 256  # as device allocations have


class EmulatorError(AssertionError):
    """A kernel did what a GPU must not be asked to do."""


class Efficiency(NamedTuple):
    """Bytes that warps asked for, and the sectors (32 bytes) that brought or took them."""

    nbytes: int
    sectors: int

    @property
    def ratio(self) -> float:
        return self.nbytes / (32 * self.sectors)


class Access(NamedTuple):
    """What a kernel touched."""

    address: int
    nbytes: int
    stores: bool


def kernels_of(text: str) -> list[str]:
    """The kernels that a source defines, by the names that plans call them."""
    return re.findall(r"_KERNEL\(?\s*(kv_\w+)", text)


def missing() -> str | None:
    """Why there can be no emulator here, if so."""
    if shutil.which("g++") is None:
        return "needs g++"
    if platform.machine() != "x86_64":
        return "the emulator switches fibers by x86-64 instructions"
    return None


def sanitizer_libraries() -> str:
    """What a process must preload so that an emulator with sanitizers can be loaded into it."""
    found = (
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    )
    return " ".join(found)


class Emulator:
    """Kernels compiled into ``folder``; ``edit`` changes a source before it is compiled.

    ``order`` and ``seed`` say in which order blocks and threads run: see ``ORDERS``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sanitize: bool = False,
        edit: Callable[[str], str] | None = None,
        runtime: Path | None = None,
    ) -> None:
        self.order = "forward"
        self.seed = 0
        self._folder = folder
        self._edit = edit or str
        self._flags = (*_FLAGS, "-O1", *(_SANITIZERS if sanitize else ()))
        self.runtime = runtime or self._compile(HERE / "emulator.cpp", "emulator.o", "-c")
        self._libraries: dict[str, ctypes.CDLL] = {}
        self._lent: dict[int, int] = {}
        self._counting = self._logging = False

    def function(self, source: str, kernel: str) -> Callable[..., None]:
        """A kernel as CuPy would hand it out."""
        return partial(self._run, source, kernel)

    def lend(self, address: int, nbytes: int) -> None:
        """Let kernels touch this memory."""
        self._lent[address] = nbytes
        for library in self._libraries.values():
            library.emulator_register(ctypes.c_uint64(address), ctypes.c_uint64(nbytes))

    def take_back(self, address: int) -> None:
        """Let them touch it no more."""
        del self._lent[address]
        for library in self._libraries.values():
            library.emulator_unregister(ctypes.c_uint64(address))

    @contextmanager
    def sectors(self) -> Generator[dict[str, Efficiency]]:
        """Count sectors meanwhile. Filled in at the end: ``loads``, ``stores``, ``tables``."""
        found: dict[str, Efficiency] = {}
        self._each("emulator_count_sectors", 1)
        self._counting = True
        try:
            yield found
            total = np.zeros((3, 3), np.uint64)
            for library in self._libraries.values():
                counts = np.zeros((3, 3), np.uint64)
                library.emulator_counts(ctypes.c_void_p(counts.ctypes.data))
                total += counts
            for name, (_, sectors, nbytes) in zip(
                ("loads", "stores", "tables"), total.tolist(), strict=True
            ):
                found[name] = Efficiency(nbytes, sectors)
        finally:
            self._counting = False
            self._each("emulator_count_sectors", 0)

    @contextmanager
    def accesses(self) -> Generator[list[Access]]:
        """Log every access meanwhile. Filled in at the end."""
        found: list[Access] = []
        self._each("emulator_log_accesses", 1)
        self._logging = True
        try:
            yield found
            for library in self._libraries.values():
                entries = ctypes.POINTER(ctypes.c_uint64)()
                library.emulator_logged.restype = ctypes.c_uint64
                count = library.emulator_logged(ctypes.byref(entries))
                if count:
                    pairs = np.ctypeslib.as_array(entries, (count, 2)).tolist()
                    found += [Access(at, n >> 1, bool(n & 1)) for at, n in pairs]
        finally:
            self._logging = False
            self._each("emulator_log_accesses", 0)

    def _each(self, call: str, value: int) -> None:
        for library in self._libraries.values():
            getattr(library, call)(value)

    def _run(
        self,
        source: str,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        stream: Any = None,
    ) -> None:
        library = self._library(source)
        self._check_widths(library, kernel, args)
        arguments = (ctypes.c_uint64 * len(args))(*(int(value) for value in args))
        error = ctypes.create_string_buffer(500)
        failed = library.emulator_run(
            ctypes.cast(getattr(library, kernel), ctypes.c_void_p),
            *(grid[0], block[0], arguments, len(args)),
            ORDERS.index(self.order),
            ctypes.c_uint64(self.seed),
            *(error, len(error)),
        )
        if failed:
            raise EmulatorError(f"{kernel}: {error.value.decode()}")

    @staticmethod
    def _check_widths(library: ctypes.CDLL, kernel: str, args: Sequence[Any]) -> None:
        """A device reads the arguments from bytes that follow each other, so widths must agree."""
        if not kernel.startswith("kv_"):
            return  # a test's own, called with plain numbers
        widths = library[f"widths_of_{kernel}"]
        widths.restype = ctypes.c_char_p
        wanted, found = widths().decode(), "".join(str(value.itemsize) for value in args)
        if found != wanted:
            raise EmulatorError(f"{kernel} takes arguments of {wanted} bytes, found {found}")

    def _library(self, source: str) -> ctypes.CDLL:
        if source not in self._libraries:
            file = self._folder / f"{source}.cpp"
            text = self._edit(kernel_source(source))
            widths = (
                f'extern "C" const char* widths_of_{name}() {{ return emulated_widths({name}); }}\n'
                for name in kernels_of(text)
            )
            file.write_text(f'#include "emulator.hpp"\n{text}\n{"".join(widths)}')
            built = self._compile(file, f"{source}.so", "-shared", str(self.runtime))
            library = self._libraries[source] = ctypes.CDLL(str(built))
            for address, nbytes in self._lent.items():
                library.emulator_register(ctypes.c_uint64(address), ctypes.c_uint64(nbytes))
            library.emulator_count_sectors(int(self._counting))
            library.emulator_log_accesses(int(self._logging))
        return self._libraries[source]

    def _compile(self, file: Path, output: str, *more: str) -> Path:
        built = self._folder / output
        command = ["g++", *self._flags, "-Wall", "-Wno-unknown-pragmas", f"-I{HERE}", str(file)]
        done = subprocess.run(
            [*command, *more, "-o", str(built)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"g++ does not compile {file.name}: {done.stderr[:4000]}")
        return built


class Memory:
    """Memory of exactly so many bytes that kernels may touch: what lies behind it is not theirs.

    ``array`` are its bytes; ``address`` is a multiple of 256.
    """

    def __init__(self, emulator: Emulator, nbytes: int, *, fill: int | None = None) -> None:
        self._emulator = emulator
        pointer = ctypes.c_void_p()
        if _libc.posix_memalign(ctypes.byref(pointer), _ALIGNMENT, max(nbytes, 1)):
            raise MemoryError(nbytes)
        assert pointer.value is not None
        self.address: int = pointer.value
        self.nbytes = nbytes
        held = (ctypes.c_uint8 * nbytes).from_address(self.address)
        self.array: Any = np.frombuffer(held, np.uint8)
        if fill is not None:
            self.array[:] = fill
        emulator.lend(self.address, nbytes)

    def close(self) -> None:
        """Free it. Nothing that was made from ``array`` may be used after."""
        self._emulator.take_back(self.address)
        _libc.free(self.address)


# By the process, not by file: so that a preloaded sanitizer hands out the memory.
_libc = ctypes.CDLL(None)
_libc.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]

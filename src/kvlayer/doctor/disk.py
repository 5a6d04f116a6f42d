"""How fast a directory's disk is, and whether loading from it beats computing again."""

# Blocking on purpose: no loop runs. os calls, because their flags matter.
# ruff: noqa: PTH108

from __future__ import annotations

import errno
import mmap
import os
import secrets
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Lock

from kvlayer.doctor.configured import Place
from kvlayer.doctor.finding import Check, Finding
from kvlayer.doctor.machine import Machine
from kvlayer.doctor.place import direct_io, nearest_directory
from kvlayer.runtime.threads import Threads
from kvlayer.urls import format_bytes

__all__ = ["LLAMA_3_8B_NBYTES", "Speed", "measure", "speed"]

LLAMA_3_8B_NBYTES = 131_072
"""KV of one token of Llama-3-8B in bfloat16: K and V of 32 layers, 8 heads, 128 dimensions."""

_CHECK = Check(
    "disk",
    "a hit pays where loading a token takes less time than the engine takes to compute it again",
)
_BLOCK_NBYTES = 4 << 20
_SECONDS = 5.0
_HEED_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Speed:
    """Bytes per second of one file that several threads read and wrote."""

    read: float
    write: float
    nbytes: int
    """Bytes moved in each direction: less than was asked for where time ran out."""
    is_direct: bool
    """Whether they went past the page cache."""


def speed(
    machine: Machine,
    place: Place,
    nbytes: int,
    *,
    token_nbytes: int = LLAMA_3_8B_NBYTES,
    prefill_rate: float | None = None,
) -> Finding:
    """The speed of a place against a prefill rate in tokens per second, if one is known."""
    at = nearest_directory(place.path)
    if place.readonly:
        return _CHECK.unknown(f"{place.path} is not measured: the tier is read-only")
    space = machine.space(at)
    if space is not None and space.free_nbytes < 2 * nbytes:
        free = format_bytes(space.free_nbytes)
        return _CHECK.unknown(f"{place.path} is not measured: only {free} are free there")
    try:
        found = measure(at, nbytes, threads=place.threads, direct=place.direct != "off")
    except OSError as exc:
        return _CHECK.unknown(f"{place.path} is not measured: {exc.strerror or exc}")
    even = found.read / token_nbytes
    detail: dict[str, object] = {
        "path": place.path,
        "read_bytes_per_second": found.read,
        "write_bytes_per_second": found.write,
        "measured_nbytes": found.nbytes,
        "direct": found.is_direct,
        "threads": place.threads,
        "token_nbytes": token_nbytes,
        "break_even_tokens_per_second": even,
        "prefill_tokens_per_second": prefill_rate,
    }
    how = "past the page cache" if found.is_direct else "through the page cache"
    said = (
        f"{place.path} reads {found.read / 1e9:.2f} GB/s and writes {found.write / 1e9:.2f} GB/s "
        f"{how}: with {token_nbytes:,} bytes a token, loading is as fast as a prefill of "
        f"{even:,.0f} tokens/s"
    )
    if prefill_rate is None:
        return _CHECK.ok(f"{said}, and pays where prefill is slower", **detail)
    if prefill_rate > even:
        return _CHECK.warn(
            f"{said}; recomputing at {prefill_rate:,.0f} is faster than loading",
            "use a faster disk, or leave this tier out: its hits cost more than they save",
            **detail,
        )
    times = even / prefill_rate
    return _CHECK.ok(f"{said}, {times:,.1f} times the {prefill_rate:,.0f} of the engine", **detail)


def measure(
    directory: str, nbytes: int, *, threads: int, direct: bool = True, seconds: float = _SECONDS
) -> Speed:
    """Write ``nbytes`` to a file in ``directory`` and read them back, ``seconds`` each at most.

    The file has no name while it is used: however this ends, nothing stays. Raises ``OSError``.
    """
    is_direct = direct and _is_direct(directory)
    blocks = max(-(-nbytes // _BLOCK_NBYTES), 1)
    noise = secrets.token_bytes(_BLOCK_NBYTES)  # a disk that compresses must not look faster
    fd = _unnamed(directory, os.O_DIRECT if is_direct else 0)
    try:

        def write(number: int, block: mmap.mmap) -> None:
            block[:8] = number.to_bytes(8, "little")
            if os.pwritev(fd, [block], number * _BLOCK_NBYTES) != _BLOCK_NBYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def read(number: int, block: mmap.mmap) -> None:
            moved = os.preadv(fd, [block], number * _BLOCK_NBYTES)
            if moved != _BLOCK_NBYTES or int.from_bytes(block[:8], "little") != number:
                raise OSError(errno.EIO, "what was read is not what was written")

        started = time.monotonic()
        written = _each(range(blocks), write, threads, seconds, noise)
        if not is_direct:
            os.fsync(fd)  # or memory is measured
        wrote = time.monotonic() - started
        if not is_direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.monotonic()
        there = _each(written, read, threads, seconds, noise)
        took = time.monotonic() - started
    finally:
        os.close(fd)
    moved = len(there) * _BLOCK_NBYTES
    return Speed(moved / took, len(written) * _BLOCK_NBYTES / wrote, moved, is_direct)


def _each(
    numbers: Iterable[int],
    work: Callable[[int, mmap.mmap], None],
    threads: int,
    seconds: float,
    content: bytes,
) -> list[int]:
    """Do ``work`` for each number on ``threads`` threads while there is time; those done.

    Interrupted, it waits for the block each thread is at.
    """
    left, done = iter(numbers), list[int]()
    taking, stop = Lock(), Event()
    end = time.monotonic() + seconds

    def run() -> None:
        with mmap.mmap(-1, _BLOCK_NBYTES) as block:  # page-aligned, as O_DIRECT wants
            block[:] = content
            while not stop.is_set() and (not done or time.monotonic() < end):
                with taking:
                    number = next(left, None)
                if number is None:
                    return
                work(number, block)
                done.append(number)

    pool = Threads(threads, "kvlayer-doctor")
    try:
        running = [pool.submit(run) for _ in range(threads)]
        # Looking up now and then: an interrupt does not end a wait that was just begun.
        while wait(running, _HEED_SECONDS, FIRST_EXCEPTION).not_done:
            if any(each.done() and each.exception() for each in running):
                break
    finally:
        stop.set()
        pool.end()
    for each in running:
        each.result()
    return done


def _is_direct(directory: str) -> bool:
    path = f"{directory}/.kvlayer-doctor-{secrets.token_hex(8)}"
    try:
        return not direct_io(path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)


def _unnamed(directory: str, flags: int) -> int:
    """A new file that is gone when it is closed, also when the process is killed."""
    path = f"{directory}/.kvlayer-doctor-{secrets.token_hex(8)}"
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o600)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)

"""What bulk copies do to the event loop they run beside: how long it works, how late it gets."""

from __future__ import annotations

import asyncio
import mmap
import os
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, TypeAlias

from xxhash import xxh3_64_intdigest

from kvlayer.api.cache import Cache
from kvlayer.bench.heartbeat import Heartbeat
from kvlayer.bench.host import BLOCK, LLAMA, NBYTES_PER_TOKEN, prompt_of
from kvlayer.bench.measure import Row
from kvlayer.bench.objects import object_rows
from kvlayer.config.model import CacheConfig, ModelConfig, TierConfig
from kvlayer.layout import NHD, KVLayout, KVView
from kvlayer.staging.sample import Memcpy, paged_view

__all__ = ["LongestCallback", "loop_rows"]

_SOON = 0.001  # seconds a prefetch stays
_TURN = 500  # beats, then the other's turn
_ROUNDS = 3
_OBJECT_ROUNDS = 20
_FILE_THREADS = 8
_CHUNK = 256  # tokens, and an object
_WEIGHTS = "sha256:" + 64 * "0"  # what leaves the process must name its model

Watch: TypeAlias = Callable[[], AbstractContextManager[None]]
"""What is measured runs inside of it."""
_Traffic: TypeAlias = Callable[[Watch], Coroutine[Any, Any, None]]
_Bare: TypeAlias = Sequence[Callable[[], object]]


class LongestCallback:
    """CPU seconds that a loop's thread spent in its longest callback: a task's step, a timer."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def watching(self) -> Generator[None]:
        """Time the callbacks of every loop in this process."""
        handles: Any = asyncio.Handle  # a loop that runs already offers no other place to look
        run = handles._run

        def timed(handle: asyncio.Handle) -> None:
            started = time.thread_time()
            run(handle)
            self.seconds = max(self.seconds, time.thread_time() - started)

        handles._run = timed
        try:
            yield
        finally:
            handles._run = run


async def loop_rows(
    nbytes: int,
    *,
    samples: int = 10_000,
    rounds: int = _OBJECT_ROUNDS,
    directory: str | None = None,
) -> list[Row]:
    """``loop.callback.*`` and ``loop.wall.*`` beside host memory and a file tier, in seconds.

    About ``nbytes`` are moved over and over, by store and retrieve, or by flush and prefetch.
    ``loop.callback``: the longest callback's CPU seconds; it has no ceiling, 2 ms are the aim.
    ``loop.wall``: the 99th percentile of the time until the loop hears ``samples`` beats of another
    process, and of as many on a loop with nothing to do, while plain threads (as many) copy as
    much memory, or write, read and checksum files of as many bytes past the page cache.
    ``directory`` is where files go, by default the system's place for temporary ones. Then come
    ``loop.put.*`` and ``loop.get.*`` (:func:`~kvlayer.bench.objects.object_rows`).
    """
    tokens = max(nbytes // NBYTES_PER_TOKEN // _CHUNK, 1) * _CHUNK
    layout = KVLayout.single(LLAMA, NHD, tokens_per_block=BLOCK)
    view = paged_view(layout, tokens // BLOCK, seed=1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="kvlayer-bench-", dir=directory) as folder:
        for name, opened in (
            ("host", _host(layout, view, tokens)),
            ("file", _file(layout, view, tokens, folder)),
        ):
            async with opened as (traffic, bare):
                rows += await _measure(name, traffic, bare, samples)
        rows += await object_rows(rounds, Path(folder, "objects"))
    return rows


async def _measure(name: str, traffic: _Traffic, bare: _Bare, samples: int) -> list[Row]:
    longest = LongestCallback()
    await traffic(_nothing)
    for _ in range(_ROUNDS):
        await traffic(longest.watching)
    with Heartbeat() as ours, Heartbeat() as theirs:
        while len(theirs.late) < samples:
            turn = min(len(ours.late) + _TURN, samples)
            while len(ours.late) < turn:
                await traffic(ours.watching)
            with _beside(bare), theirs.watching():
                await theirs.taken(len(ours.late))
    return [
        Row(f"loop.callback.{name}", longest.seconds, "s"),
        Row(f"loop.wall.{name}", ours.percentile(99), "s", theirs.percentile(99)),
    ]


@asynccontextmanager
async def _host(
    layout: KVLayout, view: KVView, tokens: int
) -> AsyncGenerator[tuple[_Traffic, _Bare]]:
    """Store and retrieve through ``cpu://``, beside which: a memcpy in each staging thread."""
    moved = tokens * NBYTES_PER_TOKEN
    # Prompts take turns, and there is room for two: a store must always evict and copy.
    prompts = [prompt_of(tokens, seed) for seed in range(4)]
    config = CacheConfig(tiers=(TierConfig(url=f"cpu://?capacity={2 * moved}"),))
    async with Cache.open(config, layout) as cache:

        async def traffic(watch: Watch) -> None:
            prompts.append(prompts.pop(0))
            with watch():
                await asyncio.sleep(0)  # a callback is part of one operation, not of two
                stored = await cache.store(prompts[0], view)
                await asyncio.sleep(0)
                async with cache.lookup(prompts[0]) as hit:
                    retrieved = await cache.retrieve(hit, view)
            _check_moved(tokens, stored.stored * _CHUNK, retrieved.tokens)

        threads = config.staging_threads
        yield traffic, [Memcpy(moved // threads) for _ in range(threads)]


@asynccontextmanager
async def _file(
    layout: KVLayout, view: KVView, tokens: int, folder: str
) -> AsyncGenerator[tuple[_Traffic, _Bare]]:
    """Flush and prefetch through ``file://``, beside which: direct I/O in as many threads."""
    moved = tokens * NBYTES_PER_TOKEN
    prompt = prompt_of(tokens, 0)
    url = f"file://{folder}?threads={_FILE_THREADS}"
    config = CacheConfig(
        model=ModelConfig(weights=_WEIGHTS),
        tiers=(
            TierConfig(url=f"cpu://?capacity={2 * moved}"),
            TierConfig(url=url, deadline_seconds=60.0),
        ),
    )
    async with Cache.open(config, layout) as cache:

        async def traffic(watch: Watch) -> None:
            await cache.store(prompt, view)
            with watch():
                await asyncio.sleep(0)
                await cache.flush()
            await cache.control.evict(prompt, tier="cpu")
            with watch():
                await asyncio.sleep(0)
                loaded = await cache.prefetch(prompt, deadline=_SOON)
            _check_moved(tokens, loaded.tokens)
            await cache.control.evict(prompt)

        checking = Lock()
        per_thread = max(tokens // _CHUNK // _FILE_THREADS, 1)
        yield (
            traffic,
            [
                partial(_write_and_read, checking, f"{folder}/bare-{number}", per_thread)
                for number in range(min(_FILE_THREADS, tokens // _CHUNK))
            ],
        )


def _check_moved(tokens: int, *moved: int) -> None:
    if any(count != tokens for count in moved):
        raise RuntimeError(f"moved {moved} tokens instead of {tokens}: nothing was measured")


def _write_and_read(checking: Lock, path: str, count: int) -> None:
    """What one thread of a file tier does at best: ``count`` objects past the page cache.

    Each is checksummed before it is written and after it was read, one at a time of all threads.
    """
    direct = getattr(os, "O_DIRECT", 0)
    with mmap.mmap(-1, _CHUNK * NBYTES_PER_TOKEN) as memory:
        for number in range(count):
            with checking:
                xxh3_64_intdigest(memory)
            fd = os.open(f"{path}-{number}", os.O_RDWR | os.O_CREAT | os.O_TRUNC | direct)
            try:
                os.pwritev(fd, [memory], 0)
            finally:
                os.close(fd)
        for number in range(count):
            fd = os.open(f"{path}-{number}", os.O_RDONLY | direct)
            try:
                os.preadv(fd, [memory], 0)
            finally:
                os.close(fd)
            with checking:
                xxh3_64_intdigest(memory)
            os.unlink(f"{path}-{number}")  # noqa: PTH108  # as it was opened


@contextmanager
def _beside(bare: _Bare) -> Generator[None]:
    """Call each of ``bare`` again and again, on a thread of its own."""
    ended = Event()

    def repeat(work: Callable[[], object]) -> None:
        while not ended.is_set():
            work()

    threads = [Thread(target=repeat, args=(work,)) for work in bare]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@contextmanager
def _nothing() -> Generator[None]:
    yield

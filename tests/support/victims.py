"""What processes do that are killed, stopped or starved: roles for ``zygote.Zygote``.

A role is a coroutine function of JSON values that speaks to the test in lines on its standard
output and listens on its standard input.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock, Thread, get_ident
from typing import Any

import pytest
from caches import WEIGHTS, group, stored_files, tokens
from engine import Engine, same
from stacks import check_accounts

from kvlayer import Cache, CacheConfig, KVLayout, ModelConfig, TierConfig
from kvlayer.layout import NHD
from kvlayer.tier.transfer.named import Named
from kvlayer_backends.file import FileBackend

__all__ = ["COUNT", "OBJECTS", "debris", "engine", "file_tier", "held", "recover",
           "scrub", "settings", "starve", "store"]  # fmt: skip

COUNT = 70
"""Tokens of each prompt: four chunks and a tail."""
OBJECTS = 5
_CALLS = ("open", "stat", "pwritev", "utime", "link", "unlink", "mkdir", "close")
_PAGE = 4096


def held() -> KVLayout:
    """128 KiB to a chunk: large enough that a write takes a while."""
    return KVLayout.single(group(layers=8, heads=4, head_size=64), NHD, tokens_per_block=4)


def engine(seed: int) -> Engine:
    return Engine(held(), 64, seed)


def scrub(memory: Engine, slots: Any) -> None:
    """Forget what slots hold: what is there after a load must have come with it."""
    for cache in memory.caches[0]:
        cache[:, slots // 4] = 0


def settings(directory: str, *, options: str = "", host: str = "16MiB", **tier: Any) -> CacheConfig:
    url = f"file://{directory}?direct=auto{options}"
    below: dict[str, Any] = {"write": "through", "deadline_seconds": 300.0, **tier}
    return CacheConfig(
        model=ModelConfig(weights=WEIGHTS),
        tiers=(TierConfig(url=f"cpu://?capacity={host}"), TierConfig(url=url, **below)),
        tokens_per_chunk=16,
    )


def file_tier(cache: Cache) -> FileBackend:
    named = cache.stack.lower[0].backend
    assert isinstance(named, Named)
    backend = named.backend
    assert isinstance(backend, FileBackend)
    return backend


def say(line: object) -> None:
    os.write(1, f"{line}\n".encode())  # one call: a kill leaves a line whole or absent


def hear() -> str:
    return sys.stdin.readline().strip()


def strike(number: int, sign: int, names: Sequence[str] = _CALLS) -> None:
    """Send this process ``sign`` at its ``number``-th call to one of ``names`` from here on.

    A write that is hit has written half of its first region by then.
    """
    lock, left = Lock(), number

    def struck(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **named: Any) -> Any:
            nonlocal left
            with lock:
                left -= 1
                is_hit = left == 0
            if is_hit:
                if name == "pwritev":
                    fd, regions, offset = args
                    half = max(regions[-1].nbytes // 2 // _PAGE, 1) * _PAGE
                    call(fd, [*regions[:-1], regions[-1][:half]], offset)
                # To this thread: a stop that another one takes first lets this one go on a while.
                signal.pthread_kill(get_ident(), sign)
            return call(*args, **named)

        return instead

    for name in names:
        setattr(os, name, struck(name, getattr(os, name)))


async def store(
    directory: str,
    *,
    first: int,
    count: int,
    options: str = "",
    strike_at: int = 0,
    strike_call: str = "",
    sign: int = signal.SIGKILL,
    host: str = "16MiB",
    waits: bool = False,
) -> None:
    """Store prompts one after the other and say when each begins and when it is committed."""
    mine = engine(1)
    async with Cache.open(settings(directory, options=options, host=host), held()) as cache:
        await file_tier(cache).recovered()
        say("open")
        if waits:
            hear()
        if strike_at:
            strike(strike_at, sign, [strike_call] if strike_call else _CALLS)
        for seed in range(first, first + count):
            say(f"storing {seed}")
            slots = mine.slots(COUNT, seed=seed)
            report = await cache.store(tokens(COUNT, seed), mine.view(slots))
            assert report.failed == (), report
            say(f"stored {seed}")


def debris(directory: str, objects: Sequence[Path]) -> list[str]:
    """Files that are neither objects nor what a directory in use has beside them."""
    kept = {"namespace.msgpack", "janitor.lock", "lock"}
    every = (path for path in Path(directory, "v2").rglob("*") if path.is_file())
    return sorted(str(path) for path in every if path not in objects and path.name not in kept)


async def recover(directory: str, seeds: Sequence[int], options: str = "") -> None:
    """Open what somebody left behind, load everything, and say what there is."""
    mine, other = engine(1), engine(2)
    tokens_by_seed: dict[int, int] = {}
    wrong = 0
    async with Cache.open(settings(directory, options=options), held()) as cache:
        await cache.recovered()
        disk = file_tier(cache)
        assert disk.janitor is not None
        await disk.janitor.pass_()  # clears up after the dead; its first may have come before
        for seed in seeds:
            slots = mine.slots(COUNT, seed=seed)
            scrub(other, slots)
            async with cache.lookup(tokens(COUNT, seed)) as hit:
                report = await cache.retrieve(hit, other.view(slots))
            assert report.failed == (), report
            tokens_by_seed[seed] = report.tokens
            read = slots[: report.tokens]
            wrong += not same(mine.read(read), other.read(read))
        check_accounts(cache.stack.planner, idle=True)
        files = stored_files(Path(directory))
        say(
            json.dumps(
                {
                    "tokens": tokens_by_seed,
                    "wrong": wrong,
                    "is_janitor": disk.is_janitor,
                    "used_nbytes": disk.used_nbytes,
                    "on_disk_nbytes": sum(path.stat().st_size for path in files),
                    "objects": disk.objects,
                    "files": len(files),
                    "debris": debris(directory, files),
                    "writers": len(list(Path(directory, "v2", "tmp").iterdir())),
                }
            )
        )


def hoarded(least: int = 64 << 10) -> list[bytearray]:
    """All the memory that can still be had in blocks of ``least`` bytes and more."""
    hoard: list[bytearray] = []
    nbytes = 16 << 20
    while nbytes >= least:
        try:
            hoard.append(bytearray(nbytes))
        except MemoryError:
            nbytes //= 2
    return hoard


async def starve(directory: str) -> None:
    """Be allowed to map nothing more for a while, and say what requests got meanwhile."""
    import resource

    from ordeal import ordeal

    async with ordeal(Path(directory, "kv")) as kv:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * _PAGE, hard))
        hoard = hoarded()
        try:
            kv.is_starving = True
            with pytest.raises(RuntimeError, match="thread"):
                Thread(target=int).start()
            for seed in range(1, 4):
                await kv.load(seed)
            for seed in range(10, 16):
                await kv.store(seed)
            in_host = await kv.in_host(0)
        finally:
            hoard.clear()
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            kv.is_starving = False
        kv.compare()
        seconds = await kv.until(lambda: kv.loads(1))
        seconds += await kv.until(lambda: kv.stores(20))
        await kv.check_accounts()
        row = kv.row(recovered_seconds=round(seconds, 3))
        say(json.dumps({"in_host": in_host, "recovered": True, "row": row}))

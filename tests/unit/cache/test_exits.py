"""A process ends when it wants to: its own exit code, at once, in silence, leaving no debris."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from caches import config, layout, stored_files, tokens
from engine import Engine, same

from kvlayer import Cache

SUPPORT = str(Path(__file__).parents[2] / "support")
SECONDS = 300  # far more than it takes, far less than for ever

PRELUDE = """
import asyncio, os, signal, sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from caches import config, layout, tokens
from engine import Engine
from kvlayer import Cache, Portal

SETTINGS = config(Path(sys.argv[1]), write=WRITE, host="8MiB")
ENGINE = Engine(layout(), 512, 1)
LOADED = Engine(layout(), 512, 2)  # a load writes: never where a store that still runs reads
KEEP = []

def start(cache):
    # Stores, loads and prefetches, none of which has ended when this returns.
    async def load(prompt, slots):
        async with cache.lookup(prompt) as hit:
            await cache.retrieve(hit, LOADED.view(slots))
    for seed in range(6):
        slots = ENGINE.slots(512, seed=seed)
        KEEP.append(asyncio.ensure_future(cache.store(tokens(512, seed), ENGINE.view(slots))))
        KEEP.append(asyncio.ensure_future(load(tokens(64, 0), slots[:64])))
        KEEP.append(cache.prefetch(tokens(512, seed)))

async def first(cache):
    await cache.store(tokens(64, 0), ENGINE.view(ENGINE.slots(64)))
    await cache.control.evict(tokens(64, 0), tier="cpu")
"""

ENDS = {
    # name: (script, exit code, last line of stderr)
    "main returns while operations run": (
        """
async def main():
    async with Cache.open(SETTINGS, layout()) as cache:
        await first(cache)
        start(cache)
        await asyncio.sleep(TURNS)
asyncio.run(main())
""",
        0,
        "",
    ),
    "an exception in the block": (
        """
async def main():
    async with Cache.open(SETTINGS, layout()) as cache:
        await first(cache)
        start(cache)
        await asyncio.sleep(TURNS)
        raise ZeroDivisionError("mine")
asyncio.run(main())
""",
        1,
        "ZeroDivisionError: mine",
    ),
    "sys.exit in the block": (
        """
async def main():
    async with Cache.open(SETTINGS, layout()) as cache:
        await first(cache)
        start(cache)
        await asyncio.sleep(TURNS)
        sys.exit(3)
asyncio.run(main())
""",
        3,
        "",
    ),
    "an interrupt": (
        """
async def main():
    async with Cache.open(SETTINGS, layout()) as cache:
        await first(cache)
        start(cache)
        await asyncio.sleep(TURNS)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(1000)
asyncio.run(main())
""",
        -signal.SIGINT,
        "KeyboardInterrupt",
    ),
    "a cache that nobody closes": (
        """
async def main():
    opened = Cache.open(SETTINGS, layout())
    KEEP.append(opened)
    cache = await opened.__aenter__()
    await first(cache)
    start(cache)
    await asyncio.sleep(TURNS)
asyncio.run(main())
""",
        0,
        "",
    ),
    "a portal is left while work runs": (
        """
async def begin(cache):
    await first(cache)
    start(cache)
    await asyncio.sleep(TURNS)
with Portal.open(SETTINGS, layout()) as portal:
    portal.call(begin)
    for seed in range(20):
        portal.submit(Cache.store, tokens(512, seed), ENGINE.view(ENGINE.slots(512)))
""",
        0,
        "",
    ),
    "a portal and an exception": (
        """
async def begin(cache):
    await first(cache)
    start(cache)
    await asyncio.sleep(TURNS)
with Portal.open(SETTINGS, layout()) as portal:
    portal.call(begin)
    raise ZeroDivisionError("mine")
""",
        1,
        "ZeroDivisionError: mine",
    ),
}


def end(
    directory: Path, script: str, *, write: str = "through", turns: float = 0.0
) -> tuple[int, str]:
    """Exit code and stderr of a process that runs ``script`` in development mode."""
    text = PRELUDE.replace("WRITE", repr(write)) + script.replace("TURNS", repr(turns))
    child = subprocess.run(
        [sys.executable, "-X", "dev", "-c", text, str(directory), SUPPORT],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert child.stdout == ""
    # Development mode reports callbacks that take long, as imports do on a busy machine; and a
    # cache says what it left unwritten.
    noise = [
        line
        for line in child.stderr.splitlines(True)
        if not line.startswith("Executing <") and not line.endswith("they are lost to it\n")
    ]
    return child.returncode, "".join(noise)


# A process costs seconds: by turns.
WAYS = itertools.cycle([("through", 0.0), ("back", 0.01)])


@pytest.mark.parametrize(
    ("name", "write", "turns"), [(name, *way) for name, way in zip(ENDS, WAYS, strict=False)]
)
def test_a_process_ends_clean_whatever_still_runs(
    tmp_path: Path, name: str, write: str, turns: float
) -> None:
    script, code, last = ENDS[name]
    returned, noise = end(tmp_path, script, write=write, turns=turns)
    assert returned == code, noise
    if last:
        chained = noise.count("During handling of the above exception")  # asyncio.run's own
        assert noise.count("Traceback (most recent call last)") == 1 + chained, noise
        assert noise.rstrip().splitlines()[-1] == last, noise
        for complaint in ("never retrieved", "was destroyed", "Exception ignored", "Warning"):
            assert complaint not in noise
    else:
        assert noise == ""
    assert list((tmp_path / "v2" / "tmp").iterdir()) == []
    assert stored_files(tmp_path)  # the first store had been committed, or a flush did it


# An engine thread that never leaves its portal, and a script that forgets to.
ABANDONED = {
    "a daemon thread": """
ready = threading.Event()
def engine():
    with Portal.open(SETTINGS, layout()) as portal:
        async def begin(cache):
            await first(cache)
            start(cache)
        portal.call(begin)
        ready.set()
        threading.Event().wait()
threading.Thread(target=engine, daemon=True).start()
ready.wait()
""",
    "a portal that nobody closes": """
async def begin(cache):
    await first(cache)
    start(cache)
opened = Portal.open(SETTINGS, layout())
portal = opened.__enter__()
portal.call(begin)
""",
}


@pytest.mark.parametrize("name", ABANDONED)
@pytest.mark.asyncio
async def test_an_interpreter_that_exits_with_a_portal_open_does_not_wait_for_it(
    tmp_path: Path, name: str
) -> None:
    code, noise = end(tmp_path, ABANDONED[name])
    assert (code, noise) == (0, "")
    # What had been committed is whole; what was being written is cleared away by the next janitor.
    engine, other = Engine(layout(), 512, 1), Engine(layout(), 512, 2)
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.recovered()
        for seed in range(6):
            count = 64 if seed == 0 else 512
            slots = engine.slots(512, seed=seed)[:count] if seed else engine.slots(64)
            async with cache.lookup(tokens(count, seed)) as hit:
                report = await cache.retrieve(hit, other.view(slots))
            assert report.failed == ()
            read = slots[: report.tokens]
            assert same(engine.read(read), other.read(read))
        await cache.store(tokens(16, 99), engine.view(engine.slots(16)))
    assert list((tmp_path / "v2" / "tmp").iterdir()) == []

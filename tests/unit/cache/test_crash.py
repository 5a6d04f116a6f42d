"""A process killed in the middle of a store: what was committed is found, the rest is absent."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from caches import config, layout, stored_files, tokens
from engine import Engine, same

from kvlayer import Cache

CHILD = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from caches import config, layout, tokens
from engine import Engine
from kvlayer import Cache

async def main():
    engine = Engine(layout(), 64, 1)
    async with Cache.open(config(Path(sys.argv[1])), layout()) as cache:
        for seed in range(10_000):
            slots = engine.slots(64, seed=seed)
            report = await cache.store(tokens(64, seed), engine.view(slots))
            assert report.failed == ()
            print(seed, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("stores", [1, 3, 8])
@pytest.mark.asyncio
async def test_all_that_was_committed_before_a_kill_is_found_again(
    tmp_path: Path, stores: int
) -> None:
    support = str(Path(__file__).parents[2] / "support")
    child = subprocess.Popen(  # noqa: ASYNC220  # nothing else runs on this loop
        [sys.executable, "-c", CHILD, str(tmp_path), support], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child.stdout:
        committed = [int(child.stdout.readline()) for _ in range(stores)]
        child.send_signal(signal.SIGKILL)  # in the middle of the next store
        committed += [int(line) for line in child.stdout]
    assert child.wait() == -signal.SIGKILL

    engine, other = Engine(layout(), 64, 1), Engine(layout(), 64, 2)
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.recovered()
        for seed in range(len(committed) + 1):
            slots = engine.slots(64, seed=seed)
            async with cache.lookup(tokens(64, seed)) as hit:
                report = await cache.retrieve(hit, other.view(slots))
            assert report.tokens == (64 if seed in committed else hit.tokens)
            read = slots[: report.tokens]
            assert same(engine.read(read), other.read(read))
        disk = cache.control.stats().tiers[1]
        files = stored_files(tmp_path)
        assert disk.objects == len(files)
        assert disk.used_nbytes == sum(path.stat().st_size for path in files)
        lost = len(committed)
        slots = engine.slots(64, seed=lost)
        again = await cache.store(tokens(64, lost), engine.view(slots))
        assert (again.stored + again.skipped, again.failed) == (4, ())

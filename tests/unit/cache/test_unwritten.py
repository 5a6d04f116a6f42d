"""Nothing is lost in silence: what a tier has not got is written at the end, or is in the log."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from caches import config, layout, stored_files, tokens
from engine import Engine
from hang import HANG

from kvlayer import Cache
from kvlayer.tier.guard.guard import Lane


def lost(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "lost" in r.getMessage()]


async def stored_while_down(cache: Cache) -> None:
    """Four objects that wait for a tier which takes no writes for now."""
    engine = Engine(layout(), 64, 1)
    cache.stack.lower[0].guard.missed(Lane.WRITES, "late")
    await cache.store(tokens(64), engine.view(engine.slots(64)))
    assert cache.control.stats().tiers[1].queued == 4


@pytest.mark.asyncio
async def test_a_close_names_what_it_could_not_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Cache.open(config(tmp_path, write="back"), layout()) as cache:
        await stored_while_down(cache)
    (line,) = lost(caplog)
    assert "4 objects (16384 bytes)" in line
    assert "file" in line
    assert stored_files(tmp_path) == []


@pytest.mark.asyncio
async def test_a_block_left_by_an_exception_names_it_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        async with Cache.open(config(tmp_path, write="back"), layout()) as cache:
            await stored_while_down(cache)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert len(lost(caplog)) == 1


@pytest.mark.asyncio
async def test_a_close_that_wrote_all_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(layout(), 64, 1)
    with caplog.at_level(logging.WARNING):
        async with Cache.open(config(tmp_path, write="back"), layout()) as cache:
            await cache.store(tokens(64), engine.view(engine.slots(64)))
        del cache
        gc.collect()
    assert len(stored_files(tmp_path)) == 4
    assert caplog.records == []


CODE = """
import asyncio, sys, threading
sys.path[:0] = {path!r}
from pathlib import Path
from caches import config, layout, tokens
from engine import Engine
from kvlayer import Cache, Portal
from kvlayer.tier.guard.guard import Lane

engine = Engine(layout(), 64, 1)
view = engine.view(engine.slots(64))
settings = config(Path({folder!r}), write="back")
"""


def run(folder: Path, code: str) -> tuple[int, str]:
    """Status and what an interpreter of its own says."""
    ran = subprocess.run(
        [sys.executable, "-c", CODE.format(path=sys.path, folder=str(folder)) + code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return ran.returncode, ran.stdout + ran.stderr


def test_a_portal_nobody_closed_writes_what_is_queued_when_its_interpreter_ends(
    tmp_path: Path,
) -> None:
    code = "Portal.open(settings, layout()).call(Cache.store, tokens(64), view)"
    assert run(tmp_path, code) == (0, "")
    assert len(stored_files(tmp_path)) == 4


def test_a_portal_nobody_closed_names_what_it_could_not_write(tmp_path: Path) -> None:
    code = """
portal = Portal.open(settings, layout())
async def down(cache):
    cache.stack.lower[0].guard.missed(Lane.WRITES, "late")
portal.call(down)
portal.call(Cache.store, tokens(64), view)
"""
    status, said = run(tmp_path, code)
    assert status == 0
    assert said.count("4 objects (16384 bytes) were written to file: they are lost") == 1


def test_a_cache_that_was_never_closed_names_what_it_leaves(tmp_path: Path) -> None:
    """Its loop is gone by then: nothing can be written."""
    code = """
async def use():
    opened = Cache.open(settings, layout())
    cache = await opened.__aenter__()
    cache.stack.lower[0].guard.missed(Lane.WRITES, "late")
    await cache.store(tokens(64), view)
    return opened, cache
loop = asyncio.new_event_loop()
kept = loop.run_until_complete(use())
import os
if os.fork() == 0:
    sys.exit()  # a child that inherited it has lost nothing
os.wait()
"""
    status, said = run(tmp_path, code)
    assert status == 0
    assert said.count("4 objects (16384 bytes) were written to file: they are lost") == 1


@pytest.mark.asyncio
async def test_a_call_that_never_ends_does_not_keep_a_cache_from_closing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ends = asyncio.Event()

    async def stubborn() -> None:
        while not ends.is_set():
            try:
                await ends.wait()
            except asyncio.CancelledError:
                continue

    async with asyncio.timeout(HANG):
        async with Cache.open(config(tmp_path, close_seconds=0.05), layout()) as cache:
            cache.stack.lower[0].guard.start(stubborn)
            await asyncio.sleep(0)
    assert "1 calls to file did not end" in caplog.text
    ends.set()

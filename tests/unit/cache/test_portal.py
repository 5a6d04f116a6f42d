"""A cache used from threads that have no event loop."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import CancelledError, Future
from pathlib import Path

import pytest
from caches import config, layout, tokens
from engine import Engine, same
from hang import HANG

from kvlayer import Cache, KVView, Portal
from kvlayer.errors import CapacityError, ClosedError


async def _load(cache: Cache, prompt: object, view: KVView) -> int:
    async with cache.lookup(prompt) as hit:
        return (await cache.retrieve(hit, view)).tokens


def test_threads_store_and_load_through_one_portal(tmp_path: Path) -> None:
    engine = Engine(layout(), 64, 1)
    with Portal.open(config(tmp_path), layout()) as portal:
        failures: list[Exception] = []

        def work(seed: int) -> None:
            try:
                other = Engine(layout(), 64, seed + 2)
                slots = engine.slots(48, seed=seed)
                for _ in range(5):
                    portal.call(Cache.store, tokens(48, seed), engine.view(slots))
                    assert portal.call(_load, tokens(48, seed), other.view(slots)) == 48
                    assert same(engine.read(slots), other.read(slots))
            except Exception as exc:  # noqa: BLE001  # reported by the main thread
                failures.append(exc)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


def test_what_open_refuses_is_raised_in_the_callers_thread() -> None:
    before = set(threading.enumerate())
    with pytest.raises(CapacityError), Portal.open(config(host="100"), layout()):
        pass
    assert set(threading.enumerate()) <= before


def test_closing_cancels_what_runs_and_refuses_what_comes() -> None:
    started = threading.Event()
    ended = threading.Event()

    async def forever(cache: Cache) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with Portal.open(config(), layout()) as portal:
        future = portal.submit(forever)
        assert started.wait(HANG)
    assert ended.is_set()
    with pytest.raises(CancelledError):
        future.result()
    with pytest.raises(ClosedError):
        portal.call(Cache.flush)


def test_an_exception_in_the_block_is_the_callers_own() -> None:
    with pytest.raises(ZeroDivisionError), Portal.open(config(), layout()):
        raise ZeroDivisionError


def test_an_exception_of_the_work_reaches_its_caller() -> None:
    async def fail(cache: Cache) -> None:
        raise ZeroDivisionError

    with Portal.open(config(), layout()) as portal:
        with pytest.raises(ZeroDivisionError):
            portal.call(fail)
        portal.call(Cache.flush)  # and the portal lives on


def test_a_clean_close_flushes_what_was_stored(tmp_path: Path) -> None:
    engine = Engine(layout(), 32)
    view = engine.view(engine.slots(48))
    with Portal.open(config(tmp_path, write="back"), layout()) as portal:
        portal.call(Cache.store, tokens(48), view)
    with Portal.open(config(tmp_path, write="back"), layout()) as portal:
        assert portal.call(_load, tokens(48), view) == 48


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with Portal.open(config(tmp_path), layout()) as portal:
        engine = Engine(layout(), 32)
        portal.call(Cache.store, tokens(48), engine.view(engine.slots(48)))
    assert set(threading.enumerate()) <= before


class _Interrupted(Future[Portal]):
    """A future whose waiter is interrupted, as by Ctrl-C."""

    def result(self, timeout: float | None = None) -> Portal:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return super().result(timeout)


def test_an_interrupt_while_opening_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    monkeypatch.setattr("kvlayer.runtime.loop_thread.Future", _Interrupted)
    with pytest.raises(KeyboardInterrupt), Portal.open(config(tmp_path), layout()):
        pass
    for thread in threading.enumerate():
        if thread.name == "kvlayer-portal":  # whatever else it started has ended before it does
            thread.join(HANG)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_work_that_exits_is_its_own_callers_affair(error: type[BaseException]) -> None:
    async def leave(cache: Cache) -> None:
        raise error

    with Portal.open(config(), layout()) as portal:
        assert isinstance(portal.submit(leave).exception(HANG), error)
        with pytest.raises(error):
            portal.call(leave)
        portal.call(Cache.flush)  # the portal serves on


def test_a_portal_lives_without_a_block_for_engines_that_start_and_stop(tmp_path: Path) -> None:
    engine = Engine(layout(), 32)
    view = engine.view(engine.slots(48))
    portal = Portal.open(config(tmp_path, write="back"), layout())
    portal.call(Cache.store, tokens(48), view)
    portal.close()
    portal.close()
    again = Portal.open(config(tmp_path), layout())
    assert again.call(_load, tokens(48), view) == 48
    again.close(abandon=True)


def test_an_interpreter_that_exits_with_a_portal_open_ends_cleanly(tmp_path: Path) -> None:
    """Its pools of threads are gone by then, the tier below is being written to."""
    code = f"""
import sys, threading
sys.path[:0] = {sys.path!r}
from pathlib import Path
from caches import config, layout, tokens
from engine import Engine
from kvlayer import Cache, Portal

portal = Portal.open(config(Path({str(tmp_path)!r}), write="back"), layout())
engine = Engine(layout(), 256)
for seed in range(8):
    portal.call(Cache.store, tokens(480, seed), engine.view(engine.slots(480, seed=seed)))
portal.lookup([*tokens(480), 1, 2, 3])
portal.submit(Cache.flush)
print("leaves")
"""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "leaves\n", "")

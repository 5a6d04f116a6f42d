"""A whole small situation, constructed from a seed: a directory, a backend, callbacks, a clock.

A cache is driven through it by its public calls, and must keep what the first law says: never a
wrong byte, never a hang, no error but kvlayer's own, nothing held once all is over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
import types
from array import array
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch
from caches import WEIGHTS, layout
from engine import Engine, same
from warped import Outside, warp
from wayward import Wayward, raises

from kvlayer import Cache, CacheConfig, ModelConfig, Scope, TierConfig
from kvlayer.config.registry import BACKENDS, POLICIES
from kvlayer.config.source import load_config
from kvlayer.errors import KVLayerError
from kvlayer.testing import invariants
from kvlayer.testing.faults import Injected, given
from kvlayer.testing.memory import MemoryBackend
from kvlayer.testing.sim import run

__all__ = ["Situation", "play"]

DEADLINE = 1.0
LONGEST = 72
"""Tokens of a prompt: four chunks of 16 and a tail."""
WITHIN = 600.0
"""Virtual seconds for a call: far more than every deadline in a row."""
HANG = 240.0
"""Real seconds for a situation that takes one."""


class Truth:
    """Prompts with common beginnings, public and private, and the KV their tokens have."""

    def __init__(self, chance: Random) -> None:
        system = [chance.randrange(50_000) for _ in range(40)]
        scopes = [
            Scope(),
            Scope(),
            Scope.private("a", owner="a"),
            Scope.private("b", first_token=20),
        ]
        places: dict[object, int] = {}
        self.prompts: list[tuple[array[int], Scope, torch.Tensor]] = []
        for _ in range(6):
            shared = chance.choice([0, 16, 24, 40])
            own = [chance.randrange(50_000) for _ in range(LONGEST - shared)]
            tokens, scope = array("i", system[:shared] + own), chance.choice(scopes)
            slots: list[int] = []
            for at in range(LONGEST):
                salts = tuple(salt.value for salt in scope.salts if salt.first_token <= at)
                slots.append(places.setdefault((bytes(tokens[: at + 1]), salts), len(places)))
            self.prompts.append((tokens, scope, torch.tensor(slots)))
        self.engine = Engine(layout(), -(-len(places) // 4), chance.randrange(1 << 16))


class Request:
    """One prompt, or its beginning, and what is asked for it by a public call."""

    def __init__(self, cache: Cache, truth: Truth, memory: Engine, chance: Random) -> None:
        self.cache, self.truth, self.memory, self.chance = cache, truth, memory, chance
        tokens, self.scope, slots = chance.choice(truth.prompts)
        self.count = chance.choice([LONGEST, chance.randrange(1, LONGEST + 1)])
        self.tokens, self.slots = tokens[: self.count], slots[: self.count]
        self.told = raises(chance, 0.3)
        self.loaded = 0

    def drawn(self) -> Callable[[], Coroutine[Any, Any, None]]:
        """What is asked."""
        some = {self.store: 25, self.load: 35, self.prefetch: 5, self.pin: 3, self.explain: 4}
        more = {self.evict: 4, self.report: 4, self.clear: 1, self.cancelled: 10, self.pause: 8}
        shares = some | more
        return self.chance.choices([*shares], [*shares.values()])[0]

    async def store(self) -> None:
        await self.cache.store(
            self.tokens,
            self.truth.engine.view(self.slots),
            scope=self.scope,
            on_gathered=self.chance.choice([None, self.told]),
            patience=self.chance.choice([0.0, 1.0, 30.0, None]),
        )

    async def load(self) -> None:
        if self.chance.random() < 0.5:
            await self.cache.control.evict(self.tokens, tier="cpu", scope=self.scope)
        mine = torch.arange(LONGEST)
        for part in self.memory.caches[0]:
            part.zero_()
        async with self.cache.lookup(self.tokens, scope=self.scope) as hit:
            assert hit.tokens <= self.count
            report = await self.cache.retrieve(
                hit,
                self.memory.view(mine[: hit.tokens]),
                on_layer=self.chance.choice([None, self.told]),
                deadline=self.chance.choice([None, 0.5]),
            )
        assert report.tokens <= hit.tokens
        found = self.memory.read(mine[: report.tokens])
        assert same(found, self.truth.engine.read(self.slots[: report.tokens])), "wrong bytes"
        self.loaded += report.tokens

    async def prefetch(self) -> None:
        deadline = self.chance.choice([0.1, 5.0])
        job = self.cache.prefetch(self.tokens, scope=self.scope, deadline=deadline)
        await asyncio.wait({asyncio.ensure_future(job)}, timeout=self.chance.choice([0, 1, 60]))
        job.cancel()

    async def pin(self) -> None:
        control = self.cache.control
        control.unpin(await control.pin(self.tokens, scope=self.scope, seconds=1.0))

    async def explain(self) -> None:
        assert str(await self.cache.control.explain(self.tokens, scope=self.scope))

    async def evict(self) -> None:
        tier = self.chance.choice([None, "file"])
        await self.cache.control.evict(self.tokens, scope=self.scope, tier=tier)

    async def report(self) -> None:
        assert str(self.cache.control.stats()) and str(self.cache.control.health())
        self.cache.report_prefill(1000, self.chance.choice([1e-6, 10.0]))

    async def clear(self) -> None:
        await self.cache.control.clear()

    async def cancelled(self) -> None:
        work = self.chance.choice([self.store, self.load, self.prefetch])
        task = asyncio.ensure_future(work())
        for _ in range(self.chance.randrange(60)):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()

    async def pause(self) -> None:
        await asyncio.sleep(self.chance.choice([0.3, 3.0]))


class Situation:
    """One seed's; :func:`play` plays it."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.chance = Random(seed)
        folder.mkdir()
        self.root = folder / "kv"
        self.outside = Outside(folder / "outside")
        self.truth = Truth(self.chance)
        self.memory = Engine(layout(), LONGEST // 4, 7)
        self.log: list[Injected] = []
        self.said: list[str] = []
        """What was constructed and done, in order: a failure shows it."""
        self.counts: Counter[str] = Counter()

    # -- what is constructed ---------------------------------------------------------------------

    def config(self, *, sick: bool) -> CacheConfig:
        tiers = [
            TierConfig(url=f"cpu://?capacity={self.chance.choice(['24KiB', '64KiB', '1MiB'])}")
        ]
        capacity = self.chance.choice(["", "?capacity=96KiB", "?capacity=1MiB&interval=1"])
        below: dict[str, Any] = {
            "write": self.chance.choice(["through", "back", "demote"]),
            "deadline_seconds": DEADLINE,
            "pause_seconds": 0.2,
            "retries": self.chance.choice([0, 2]),
            "max_inflight": self.chance.choice([1, 4]),
        }
        tiers.append(TierConfig(url=f"file://{self.root}{capacity}", **below))
        if sick:
            tiers.insert(self.chance.choice([1, 2]), TierConfig(url="sick://", **below))
        return CacheConfig(
            model=ModelConfig(weights=WEIGHTS),
            tiers=tuple(tiers),
            tokens_per_chunk=16,
            close_seconds=5.0,
            lease_seconds=5.0,
            policy=self.chance.choice(POLICIES.names()),
        )

    def warp(self) -> None:
        self.said.append(warp(self.root, self.outside, self.chance))
        self.counts["constructed"] += 1

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Unix time as some other clock tells it, which may jump between any two looks."""
        jumps = self.chance.choice([[0], [0], [-1e9], [1e9], [0, 3600, -3600], [-1.8e9, 1e11]])
        real = time.time

        def told() -> float:
            return max(real() + self.chance.choice(jumps), 0.0)

        def told_ns() -> int:
            return int(told() * 1e9)

        other = types.SimpleNamespace(**{**vars(time), "time": told, "time_ns": told_ns})
        stands_for = {id(time): other, id(time.time): told, id(time.time_ns): told_ns}
        with ExitStack() as patched:
            for name, module in sorted(sys.modules.items()):
                if name.startswith(("kvlayer.", "kvlayer_backends.")) and ".testing" not in name:
                    for word in ("time", "time_ns"):
                        found = getattr(module, word, None)
                        if id(found) in stands_for:
                            value = stands_for[id(found)]
                            patched.enter_context(mock.patch.object(module, word, value))
            if jumps != [0]:
                self.said.append(f"a clock that is off by {jumps}")
            yield

    @contextmanager
    def process(self) -> Iterator[None]:
        """The process around it: umask, working directory, variables."""
        here, before = os.getcwd(), os.umask(self.chance.choice([0o022, 0o000, 0o077, 0o777]))
        variables = self.chance.choice([{}, {"TMPDIR": "/nowhere"}, {"HOME": "relative"}])
        if self.chance.random() < 0.2:
            away = self.root.parent / f"removed-{len(self.said)}"
            away.mkdir(mode=0o700)
            os.chmod(away, 0o700)
            os.chdir(away)
            away.rmdir()
            self.said.append("a working directory that is gone")
        try:
            with mock.patch.dict(os.environ, variables):
                yield
        finally:
            os.umask(before)
            os.chdir(here)

    def environment(self) -> None:
        """Variables as containers and people set them: a configuration, or an error of ours."""
        words = ["TIERS__0__URL", "TIERS__1__WRITE", "TOKENS_PER_CHUNK", "MODEL__WEIGHTS", "A__B"]
        words += ["SERVICE_HOST", "PORT", "CONFIG", "TIERS", "TIERS__-1__URL", "__", "POLICY"]
        values = [
            "",
            "0",
            "-1",
            "1e999",
            "nan",
            "tcp://10.0.0.1:80",
            "file://~",
            "cpu://",
            "[",
            "☃",
        ]
        values += [f"file://{self.root}", "cpu://?capacity=1MiB", "through", str(self.outside.file)]
        env: dict[str, str] = {}
        for _ in range(self.chance.randrange(1, 4)):
            before = self.chance.choice(["KVLAYER_", "KVLAYER__", "kvlayer_"])
            env[before + self.chance.choice(words)] = self.chance.choice(values)
        try:
            load_config(env=env)
        except KVLayerError as exc:
            self.said.append(f"a configuration: {exc}"[:200])
            self.counts["configurations refused"] += 1
        else:
            self.counts["configurations read"] += 1

    # -- what is done ----------------------------------------------------------------------------

    async def prepared(self) -> None:
        """A directory that an earlier process left."""
        async with Cache.open(self.config(sick=False), layout()) as cache:
            for tokens, scope, slots in self.truth.prompts:
                await cache.store(tokens, self.truth.engine.view(slots), scope=scope)
            await cache.flush()

    async def lived(self, *, is_sick: bool, is_warped: bool) -> None:
        """One process's life."""
        shelf = MemoryBackend(capabilities=BACKENDS.load("file").capabilities)
        share = self.chance.choice([0.05, 0.3]) if is_sick else 0.0
        sick = Wayward(shelf, self.chance, self.log, share=share, seconds=DEADLINE)
        backends = BACKENDS.extended({"sick": given(sick)})
        sinks = [raises(self.chance, 0.3)] if is_sick else []
        config = self.config(sick=is_sick)
        loop = asyncio.get_running_loop()
        try:
            async with Cache.open(config, layout(), backends=backends, sinks=sinks) as cache:
                self.counts["opened"] += 1
                for _ in range(self.chance.randrange(4, 16)):
                    if is_warped and self.chance.random() < 0.3:
                        self.warp()
                    if is_sick and self.chance.random() < 0.1:
                        sick.gossip()
                    began = loop.time()
                    await self._bounded(self._operation(cache))
                    invariants.answered(self.said[-1], loop.time() - began, within=WITHIN)
                    invariants.accounts(cache.stack.planner)
                sick.heal()
                await self._bounded(self._settled(cache))
                invariants.nothing_left(cache)
        except KVLayerError as exc:
            self.said.append(f"refused: {exc}"[:300])
            self.counts["refused"] += 1
        finally:
            sick.heal()
            for _ in range(20):  # what was left behind ends
                await asyncio.sleep(0)

    async def _bounded(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        done, _ = await asyncio.wait({task}, timeout=WITHIN)
        if not done:
            raise AssertionError(f"{self.said[-1]} hangs: {task.get_stack()}")
        task.result()

    async def _settled(self, cache: Cache) -> None:
        await cache.flush()
        until = asyncio.get_running_loop().time() + WITHIN / 2
        loop = asyncio.get_running_loop()
        while not self._is_idle(cache) and loop.time() < until:  # noqa: ASYNC110  # no word comes
            await asyncio.sleep(0.5)
        await asyncio.sleep(2 * cache.config.lease_seconds)
        async with cache.lookup(array("i", [1])):
            pass  # leases that have run out are dropped at the next call

    @staticmethod
    def _is_idle(cache: Cache) -> bool:
        stats = cache.control.stats()
        guards = [tier.guard for tier in cache.stack.lower]
        return not stats.inflight and not any(guard.orphans or guard.running for guard in guards)

    async def _operation(self, cache: Cache) -> None:
        request = Request(cache, self.truth, self.memory, self.chance)
        work = request.drawn()
        self.said.append(work.__name__)
        self.counts["operations"] += 1
        try:
            await work()
        except KVLayerError as exc:
            self.said[-1] += f": {type(exc).__name__}"
            self.counts["errors of ours"] += 1
        self.counts["tokens loaded"] += request.loaded

    def play(self) -> None:
        run(self.prepared())
        is_sick, is_warped = self.chance.choice([(True, False), (False, True), (True, True)])
        for _ in range(self.chance.randrange(1, 5) if is_warped else 0):
            self.warp()
        self.environment()
        with self.process(), self.clock():
            run(self.lived(is_sick=is_sick, is_warped=is_warped))
        run(self.lived(is_sick=False, is_warped=False))  # and who comes after it
        self.outside.check()


def play(seed: int, folder: Path) -> Situation:
    """Play one seed. Raises ``AssertionError`` with what was constructed, and the cause."""
    situation = Situation(seed, folder)
    errors: list[BaseException] = []

    def played() -> None:
        try:
            situation.play()
        except BaseException as exc:  # noqa: BLE001  # raised where the seed is known
            errors.append(exc)

    before, level = set(threading.enumerate()), logging.root.manager.disable
    logging.disable()  # thousands of tracebacks, which would keep what their frames refer to
    try:
        thread = threading.Thread(target=played, daemon=True)
        thread.start()
        thread.join(HANG)
    finally:
        logging.disable(level)
    story = f"seed {seed}: " + "; ".join([*situation.said, *(str(each) for each in situation.log)])
    if thread.is_alive():
        frame = sys._current_frames().get(thread.ident or 0)
        raise AssertionError(f"{story}\nhangs in {frame}")
    if errors:
        raise AssertionError(story) from errors[0]
    for left in set(threading.enumerate()) - before - {thread}:
        left.join(HANG)
        assert not left.is_alive(), f"{story}\nleaves the thread {left.name}"
    return situation

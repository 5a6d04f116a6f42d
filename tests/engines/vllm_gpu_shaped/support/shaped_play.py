"""A traffic by seed: prompts that share prefixes, twins, aborts, failed loads, too few blocks."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from functools import partial

from shaped_device import Behind, Device, OnGpu, SimulatedGpu
from shaped_engine import Engine
from shaped_faults import FAULTS, lifted
from shaped_gate import Gate, by_turns, in_memory
from shaped_setting import Configs

__all__ = ["Account", "play"]

_TURNS = 120
_PATIENCE = 4000  # turns in which an engine without arrivals must come to rest
_WORDS = 300


@dataclass(slots=True)
class Account:
    """What came of a seed."""

    seed: int
    steps: int = 0
    reads: int = 0
    """Rows that attention read, of one layer each."""
    loaded: int = 0
    """Bytes that the cache put into the engine's blocks."""
    failed: int = 0
    preempted: int = 0
    aborted: int = 0
    finished: int = 0
    stuck: int = 0
    """Requests given up because vLLM had no block for any of them: see ``Engine.is_stuck``."""
    faults: list[str] = field(default_factory=list[str])
    """What must not be: rows and answers that are wrong, blocks that nobody gave back."""


class _Traffic:
    """Prompts that are often like those before them."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._bases = [[rng.randrange(_WORDS) for _ in range(300)] for _ in range(3)]
        self.prompts: list[list[int]] = []

    def next(self, said: list[list[int]]) -> list[int]:
        """The next prompt: a twin of the last one, what was ``said`` and more, or a new one."""
        rng, chance = self._rng, self._rng.random()
        if self.prompts and chance < 0.3:
            prompt = self.prompts[-1]
        elif said and chance < 0.45:
            prompt = rng.choice(said) + self._words(1, 30)
        else:
            prompt = rng.choice(self._bases)[: rng.randrange(20, 200)] + self._words(0, 40)
        self.prompts.append(prompt[:280])
        return self.prompts[-1]

    def _words(self, least: int, most: int) -> list[int]:
        count = self._rng.randrange(least, most)
        return [self._rng.randrange(_WORDS) for _ in range(count)]


def play(configs: Configs, seed: int, *, fault: str = "") -> Account:
    """Play one seed on an engine of its own. ``fault``: what is broken on purpose."""
    rng = random.Random(seed)
    gate = Gate(random.Random(seed + 1), failing=rng.choice((0, 20, 50)))
    with ExitStack() as stack:
        device: Callable[[], Device] = Behind
        through, gpu = in_memory, None
        if configs.setting.is_gpu:
            gpu = SimulatedGpu()
            stack.enter_context(gpu.installed())
            device, through = partial(OnGpu, gpu), gpu.stager
        stack.enter_context(by_turns(gate, through))
        stack.enter_context(lifted())
        stack.enter_context(FAULTS[fault]() if fault else nullcontext())
        engine = Engine(configs, rng, device)
        with closing(engine), gate.guarding(*engine.loops):
            account, traffic = Account(seed), _Traffic(rng)
            _busy(engine, gate, rng, traffic, account)
            _rested(engine, gate, account)
            gate.failing = rng.choice((0, gate.failing))
            _audited(engine, gate, traffic, account)
            _settle(engine, gate, account)
        account.faults += [] if gpu is None else gpu.faults
    return account


def _busy(
    engine: Engine, gate: Gate, rng: random.Random, traffic: _Traffic, account: Account
) -> None:
    number, said = 0, list[list[int]]()

    def aborts(chance: float) -> None:
        if not engine.live or rng.random() >= chance:
            return
        names = list(engine.live)
        name = rng.choice((names[-1], names[-1], rng.choice(names)))
        said.append(engine.said(name))
        engine.abort(name)
        account.aborted += 1

    for _ in range(_TURNS):
        arrivals = rng.choice((0, 0, 1, 1, 2)) if len(engine.live) < 9 else 0
        for _ in range(arrivals):
            number += 1
            engine.ask(f"request-{number}", traffic.next(said), rng.randrange(1, 24))
        aborts(0.03)  # not scheduled yet
        engine.turn(lambda: aborts(0.1))
        for _ in range(rng.choice((0, 1, 1, 2))):
            gate.turn()


def _rested(engine: Engine, gate: Gate, account: Account) -> None:
    """No more arrivals: until nothing is under way."""
    for _ in range(_PATIENCE):
        if not engine.is_busy:
            return
        engine.turn()
        gate.turn()
        if engine.is_stuck:
            engine.abort(list(engine.live)[-1])
            account.stuck += 1
    raise AssertionError(f"the engine does not come to rest: {list(engine.live)} are not over")


def _audited(engine: Engine, gate: Gate, traffic: _Traffic, account: Account) -> None:
    """All that was stored is asked for: vLLM's own prefix cache has none of it."""
    assert engine.scheduler.reset_prefix_cache()
    distinct = {tuple(prompt): None for prompt in traffic.prompts}
    for number, prompt in enumerate(distinct):
        engine.ask(f"audit-{number}", prompt, 1)
        if number % 4 == 3:
            _rested(engine, gate, account)
    _rested(engine, gate, account)


def _settle(engine: Engine, gate: Gate, account: Account) -> None:
    half = engine.connector.scheduler
    account.steps, account.reads = engine.steps, engine.reads
    account.loaded = half.portal.cache.control.stats().tiers[0].loaded_nbytes
    account.failed, account.preempted = gate.failed, engine.preempted
    account.finished = engine.finished
    found = [f"read a wrong row: {each}" for each in engine.wrong_reads]
    found += [f"answered wrongly: {name}" for name in engine.wrong_answers]
    if engine.missing_blocks:
        found.append(f"blocks that nobody gave back: {engine.missing_blocks}")
    if half.tracked:
        found.append(f"requests that kvlayer still tracks: {half.tracked}")
    if engine.troubles:
        found.append(f"hooks that raised: {engine.troubles}")
    account.faults = found

"""Copies that wait for their turn: when the cache moves bytes is a seed's choice, not a thread's.

Inside :func:`by_turns` nothing of kvlayer's runs beside the test: work for threads is done on the
loop that asks for it, and the loops of scheduler and ranks stand still but for :meth:`Gate.turn`,
which lets one after the other run until it has nothing to do. Every copy between host memory and an
engine's tensors waits at the gate for some turns. So a seed plays the same hooks, copies and
failures each time.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvlayer.abc.stager import HostCopy, Stager
from kvlayer.layout import KVLayout, KVView
from kvlayer.memory.slab import Slab
from kvlayer.runtime.job import Job
from kvlayer.runtime.loop_thread import LoopThread
from kvlayer.runtime.offload import Offload
from kvlayer.staging.torch_stager import TorchStager
from kvlayer_vllm import layouts, moves, worker

__all__ = ["Gate", "by_turns", "in_memory"]


class CopyError(OSError):
    """A copy that fails half way, as a seed wants it."""


@dataclass(slots=True)
class _Waiting:
    turns: int
    go_on: asyncio.Future[None]


@dataclass(slots=True, eq=False)
class _Stand:
    """A loop that stands still between turns."""

    loop: asyncio.AbstractEventLoop | None = None
    waiting: list[_Waiting] = field(default_factory=list[_Waiting])
    stands: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


@dataclass
class Gate:
    """Where copies wait. ``slowest``: turns that one waits at most; ``failing``: loads of a
    hundred that fail half way."""

    rng: random.Random
    slowest: int = 4
    failing: int = 10
    failed: int = 0
    """Loads that failed so far."""
    _stands: list[_Stand] = field(default_factory=list[_Stand])
    _is_open: bool = False

    @contextmanager
    def guarding(self, *threads: LoopThread[Any]) -> Generator[None]:
        """These loops stand still: the scheduler's, and those of ranks elsewhere."""
        jobs = [self._guarded(thread) for thread in threads]
        try:
            yield
        finally:
            self._is_open = True
            for stand in self._stands:
                stand.go_on.set()
            for job in jobs:
                job.result()

    def _guarded(self, thread: LoopThread[Any]) -> Job[None]:
        stand = _Stand()
        job = thread.submit(self._stand, stand)
        stand.stands.wait()
        self._stands.append(stand)
        return job

    async def _stand(self, _: Any, stand: _Stand) -> None:
        stand.loop = asyncio.get_running_loop()
        while True:
            stand.stands.set()
            stand.go_on.wait()  # on purpose on the loop: nothing of it runs meanwhile
            stand.go_on.clear()
            for each in tuple(stand.waiting):
                each.turns -= 1
                if (each.turns <= 0 or self._is_open) and not each.go_on.done():
                    each.go_on.set_result(None)
            await _idle()
            if self._is_open:
                return

    def turn(self) -> None:
        """One turn passes; what may go on goes on until its loop has nothing to do."""
        for stand in self._stands:
            stand.stands.clear()
            stand.go_on.set()
            stand.stands.wait()

    async def passed(self) -> None:
        """Wait for one's turn, on the loop."""
        loop = asyncio.get_running_loop()
        stand = next((each for each in self._stands if each.loop is loop), None)
        if stand is None or self._is_open:
            return
        turns = self.rng.choice((0, 0, 1, self.rng.randint(1, self.slowest)))
        if not turns:
            return
        waiting = _Waiting(turns, loop.create_future())
        stand.waiting.append(waiting)
        try:
            await waiting.go_on
        finally:
            stand.waiting.remove(waiting)

    def fails(self) -> bool:
        """Whether the load at the gate is one that fails."""
        is_failing = self.rng.randrange(100) < self.failing
        self.failed += is_failing
        return is_failing


async def _idle() -> None:
    """Until nothing but this is ready on the loop."""
    loop: Any = asyncio.get_running_loop()
    await asyncio.sleep(0)
    while loop._ready:  # noqa: ASYNC110  # nobody tells when it is empty
        await asyncio.sleep(0)


class _GatedStager(Stager):
    """Copies as ``through`` does, when the gate says."""

    def __init__(self, through: Stager, gate: Gate) -> None:
        self._through, self._gate = through, gate

    def check(self, view: KVView) -> None:
        self._through.check(view)

    async def gather(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        await self._gate.passed()
        await self._through.gather(view, copies)

    async def scatter(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        await self._gate.passed()
        if self._gate.fails():
            await self._through.scatter(view, copies[: len(copies) // 2])
            raise CopyError("the device is gone, says the seed")
        await self._through.scatter(view, copies)

    async def aclose(self) -> None:
        await self._through.aclose()


async def _inline(_: Offload, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return work(*args, **kwargs)


async def _over_inline(
    _: Offload, work: Callable[[Iterator[Any]], object], items: Iterable[Any]
) -> None:
    work(iter(items))


async def _all_inline(_: Offload, works: Sequence[Callable[[], object]]) -> None:
    for work in works:
        work()


def in_memory(layout: KVLayout, _slab: Slab) -> Stager:
    """Copies rows as a GPU's backends keep them, in this process's memory."""
    return TorchStager(layout, threads=1)


@contextmanager
def by_turns(
    gate: Gate, through: Callable[[KVLayout, Slab], Stager] = in_memory
) -> Generator[None]:
    """kvlayer's copies wait at ``gate``, and whoever waits for one lets the turns pass."""

    def make(_isas: Sequence[str], layout: KVLayout, slab: Slab, _threads: int) -> Stager:
        return _GatedStager(through(layout, slab), gate)

    def wait(move: moves.Save | moves.Load) -> None:
        while not move.is_over:
            gate.turn()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Offload, "run", _inline)
        patch.setattr(Offload, "run_all", _all_inline)
        patch.setattr(Offload, "run_over", _over_inline)
        patch.setattr(layouts, "_make_stager", make)
        patch.setattr(moves.Save, "wait", wait)
        patch.setattr(moves.Load, "wait", wait)
        patch.setattr(worker, "_IDLE_SECONDS", 0.0)
        yield

"""Threads that run one at a time, in an order that follows from a seed.

Real threads, but only one of them has the turn; it may lose it at any bytecode of the files that
are watched, and has to give it up where it waits for one of the schedule's locks. A race that a
real machine shows once a month is a seed here, and the same one every time. Random walks over
schedules find most races that need few switches (S. Burckhardt et al., "A Randomized Scheduler
with Probabilistic Guarantees of Finding Bugs", ASPLOS 2010)::

    schedule = Schedule(seed, watched=[kvlayer.tier.planner.planner])
    planner.lock = schedule.lock()
    schedule.run(plan_stores, look_up, look_up)
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from random import Random
from types import FrameType, ModuleType, TracebackType
from typing import Any

__all__ = ["Deadlock", "Schedule", "TurnLock"]


class Deadlock(RuntimeError):  # noqa: N818  # what it is
    """Every thread that has not ended waits for a lock that another one holds."""


class _Over(BaseException):
    """The schedule has failed: this thread ends, too."""


class _Runner:
    """One thread. ``baton`` is free while it is the thread's turn."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.baton = threading.Lock()
        self.baton.acquire()
        self.waits_for: TurnLock | None = None
        self.has_ended = False

    @property
    def may_run(self) -> bool:
        return not self.has_ended and (self.waits_for is None or self.waits_for.owner is None)


class Schedule:
    """Runs threads in turns. Use it once.

    ``watched`` are the modules in which a thread may lose its turn, before any bytecode with
    probability ``share`` (drawn by default: few switches find some races, many find others).
    Threads must wait for each other by :meth:`lock` alone.
    """

    def __init__(
        self, seed: int, *, watched: Iterable[ModuleType] = (), share: float | None = None
    ) -> None:
        self._chance = Random(seed)  # noqa: S311  # a schedule, not a secret
        self._share = self._chance.choice((0.002, 0.008, 0.03)) if share is None else share
        self._files = {module.__file__ for module in watched}
        self._runners: list[_Runner] = []
        self._running: _Runner | None = None
        self._error: BaseException | None = None
        self.turns: list[int] = []
        """Whose turn it was: the schedule itself, to compare."""

    def lock(self) -> TurnLock:
        """A reentrant lock; stands in for ``threading.Lock`` and ``threading.RLock``."""
        return TurnLock(self)

    def run(self, *works: Callable[[], object]) -> None:
        """Run every work in a thread of its own until all have ended.

        Raises the first error of any, after which the others are ended at their next switch; and
        :class:`Deadlock`.
        """
        self._runners = [_Runner(number) for number in range(len(works))]
        threads = [
            threading.Thread(target=self._live, args=pair, daemon=True)
            for pair in zip(self._runners, works, strict=True)
        ]
        for thread in threads:
            thread.start()
        self._give_turn(self._chance.choice(self._runners))
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def switch(self) -> None:
        """Maybe lose the turn here. Does nothing in a thread that is not the schedule's."""
        mine = self._running
        if mine is None or not self._is_mine():
            return
        self._check()
        self._pass_on(mine)

    # -- turns -----------------------------------------------------------------------------------

    def _is_mine(self) -> bool:
        return getattr(threading.current_thread(), "_schedule", None) is self

    def _live(self, mine: _Runner, work: Callable[[], object]) -> None:
        setattr(threading.current_thread(), "_schedule", self)  # noqa: B010  # whose thread it is
        mine.baton.acquire()
        sys.settrace(self._called)
        try:
            self._check()
            work()
        except _Over:
            pass
        except BaseException as exc:  # noqa: BLE001  # raised by run, in the caller's thread
            self._error = self._error or exc
        finally:
            sys.settrace(None)
            mine.has_ended = True
            self._end()

    def _end(self) -> None:
        left = [each for each in self._runners if not each.has_ended]
        free = [each for each in left if each.may_run]
        if left and not free:
            self._error = self._error or Deadlock(_waiting(left))
        if left:  # after a deadlock each is woken in turn, to end
            self._give_turn(self._chance.choice(free or left))

    def _give_turn(self, runner: _Runner) -> None:
        self._running = runner
        self.turns.append(runner.number)
        runner.baton.release()

    def _pass_on(self, mine: _Runner) -> None:
        """Give the turn to any thread that may run, perhaps this one, and wait for the next."""
        free = [each for each in self._runners if each.may_run]
        if not free:
            self._error = self._error or Deadlock(_waiting(self._runners))
            raise _Over
        runner = self._chance.choice(free)
        if runner is not mine:
            self._give_turn(runner)
            mine.baton.acquire()
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise _Over

    def wait_for(self, lock: TurnLock) -> None:
        """Give up the turn until ``lock`` is free. For :class:`TurnLock`."""
        mine = self._running
        if mine is None or not self._is_mine():
            raise RuntimeError("a lock of the schedule, held in it, is wanted by a foreign thread")
        mine.waits_for = lock
        self._pass_on(mine)
        mine.waits_for = None

    def me(self) -> int:
        """The number of the running thread; -1 outside of the schedule."""
        return self._running.number if self._running is not None and self._is_mine() else -1

    # -- the interpreter's hook ------------------------------------------------------------------

    def _called(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        frame.f_trace_opcodes = True
        return self._stepped

    def _stepped(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "opcode" and self._chance.random() < self._share:
            self.switch()
        return self._stepped


def _waiting(runners: Iterable[_Runner]) -> str:
    names = [f"thread {r.number} waits for {r.waits_for!r}" for r in runners if not r.has_ended]
    return "; ".join(names)


class TurnLock:
    """A reentrant lock of a schedule: whoever would wait for it gives the turn to another."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._depth = 0
        self.owner: int | None = None
        """The thread that holds it."""

    def acquire(self) -> bool:
        """Take it, waiting for it if need be."""
        me = self._schedule.me()
        self._schedule.switch()
        while self.owner not in (None, me):
            self._schedule.wait_for(self)
        self.owner = me
        self._depth += 1
        return True

    def release(self) -> None:
        """Give it back. Raises ``RuntimeError`` in a thread that does not hold it."""
        if self.owner != self._schedule.me():
            raise RuntimeError("released by a thread that does not hold it")
        self._depth -= 1
        if not self._depth:
            self.owner = None
            self._schedule.switch()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<TurnLock of thread {self.owner}>"

"""The suite of an eviction policy: what any order of eviction must keep, whatever it prefers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from random import Random
from types import FrameType, ModuleType
from typing import Any, ClassVar

from kvlayer.abc.policy import EvictionPolicy
from kvlayer.abc.rows import Rows
from kvlayer.testing.promise import Promise, broken, expect, promise
from kvlayer.testing.suite import Suite

__all__ = ["PlayedPolicy", "PolicySuite"]

_SEEDS = 150
_STEPS = 40
_NAMES = 8


class PlayedPolicy:
    """A policy and all that it must know: what is there, and what of it is pinned.

    Objects are named by numbers of the caller's; each gets a row when it is admitted. What a policy
    must not be given is left out of the call, as a tier does.
    """

    def __init__(self, policy: type[EvictionPolicy]) -> None:
        self.rows = Rows()
        self.policy = policy(self.rows)
        self.resident: dict[int, int] = {}
        """Row by name."""
        self.pinned: set[int] = set()

    def store(self, path: Sequence[int]) -> None:
        """Some of these are new, others are stored again."""
        new = [name for name in path if name not in self.resident]
        for depth, name in enumerate(path):
            if name in new:
                self.resident[name] = self.rows.take(name, 4096, 16 * depth, 16)
        if new:
            self.policy.admit([self.resident[name] for name in new])
        if known := self._free(path):
            self.policy.refresh(known)

    def use(self, path: Sequence[int]) -> None:
        if free := self._free(path):
            self.policy.touch(free)

    def pin(self, path: Sequence[int]) -> None:
        if free := self._free(path):
            self.policy.pin(free)
        self.pinned.update(name for name in path if name in self.resident)

    def unpin(self, path: Sequence[int], *, used: bool) -> None:
        pinned = [name for name in path if name in self.pinned]
        self.pinned.difference_update(pinned)
        if pinned:
            self.policy.unpin([self.resident[name] for name in pinned], used=used)

    def lose(self, name: int, *, evicted: bool) -> None:
        """The object goes, to make room or because it was deleted."""
        if name in self.resident:
            self.pin([name])
            self.pinned.remove(name)
            row = self.resident.pop(name)
            self.policy.remove(row, evicted=evicted)
            self.rows.give_back(row)

    def _free(self, path: Sequence[int]) -> list[int]:
        free = [name for name in path if name in self.resident and name not in self.pinned]
        return [self.resident[name] for name in free]

    def may_go(self) -> set[int]:
        """One of these is the next victim, or nobody when there is none."""
        return set(self.resident) - self.pinned

    def victim(self) -> int | None:
        """The name of the next victim. Raises ``BrokenPromise`` for one that must not go."""
        row = self.policy.victim()
        if row is None:
            if self.may_go():
                broken(f"one of {len(self.may_go())} objects as the next victim", None)
            return None
        name = next((name for name in self.may_go() if self.resident[name] == row), None)
        if name is None:
            broken(f"one of the rows {sorted(self._free([*self.resident]))} or None", row)
        return name


class PolicySuite(Suite):
    """Set ``policy``. Which of several objects goes first is the policy's own affair::

    class TestFIFO(PolicySuite):
        policy = FIFO
    """

    policy: ClassVar[type[EvictionPolicy]]

    async def keep(self, promise: Promise, /) -> None:
        await promise.check(self, PlayedPolicy(self.policy))

    @promise("Built with the tier's rows; name is the configuration's policy.")
    async def test_it_has_a_name(self, played: PlayedPolicy) -> None:
        if not getattr(played.policy, "name", None):
            broken("a name, as the configuration spells it", getattr(played.policy, "name", None))

    @promise("The object to give up next, or None when nothing is evictable.")
    async def test_it_names_what_is_there_as_long_as_something_is(
        self, played: PlayedPolicy
    ) -> None:
        expect(played.victim(), None, "victim() of nothing")
        for first in range(0, 20, 5):
            played.store(range(first, first + 5))
        while played.resident:
            victim = played.victim()
            assert victim is not None
            played.lose(victim, evicted=True)
        expect(played.victim(), None, "victim() when all are gone")

    @promise("Changes nothing.")
    async def test_naming_a_victim_changes_nothing(self, played: PlayedPolicy) -> None:
        played.store(range(5))
        first = played.victim()
        for _ in range(5):
            expect(played.victim(), first, "victim(), asked again")

    @promise("A policy names those that are not pinned.")
    async def test_a_pinned_object_is_never_named(self, played: PlayedPolicy) -> None:
        played.store(range(6))
        played.pin([0, 2, 4])
        while (victim := played.victim()) is not None:
            played.lose(victim, evicted=True)
        expect(set(played.resident), {0, 2, 4}, "what is left when all but pinned ones are gone")

    @promise("Put pinned objects back into the order.")
    async def test_an_unpinned_object_may_go_again(self, played: PlayedPolicy) -> None:
        played.store(range(3))
        played.pin(range(3))
        expect(played.victim(), None, "victim() when all are pinned")
        for name, used in ((1, False), (2, True)):
            played.unpin([name], used=used)
            expect(played.victim(), name, f"victim() when one was unpinned, used={used}")
            played.pin([name])

    @promise("Forget a pinned object; its number will be another's.")
    async def test_a_removed_object_does_not_come_back(self, played: PlayedPolicy) -> None:
        played.store(range(3))
        for name, evicted in ((0, True), (1, False), (2, True)):
            played.lose(name, evicted=evicted)
        expect(played.victim(), None, "victim() when all are removed")
        played.store([0, 7])  # in rows that others had
        left = set[int]()
        while (victim := played.victim()) is not None:
            left.add(victim)
            played.lose(victim, evicted=False)
        expect(left, {0, 7}, "what is named when one came back and another came")

    @promise(
        "A policy knows an object from admit to remove. A policy names those that are not pinned."
    )
    async def test_any_calls_in_any_order_leave_it_knowing_what_is_there(
        self, played: PlayedPolicy
    ) -> None:
        for seed in range(_SEEDS):
            other = PlayedPolicy(type(played.policy))
            rng = Random(seed)  # noqa: S311  # reproducible
            for _ in range(_STEPS):
                _step(rng, other)
                other.victim()

    @promise("Every call costs O(1) per row, whatever the number of objects or pins.")
    async def test_a_call_costs_the_same_among_few_and_many(self, played: PlayedPolicy) -> None:
        few, many = _costs(type(played.policy), 10), _costs(type(played.policy), 3000)
        for call, cost in many.items():
            if cost > few[call] + 80:  # a branch more is a few; a walk would be thousands
                broken(
                    f"{call} to take some {few[call]} steps among 30 objects and among 9000", cost
                )

    @promise("Pure: no clock, no I/O.")
    async def test_it_looks_at_no_clock_and_opens_nothing(self, played: PlayedPolicy) -> None:
        def play() -> None:
            rng = Random(1)  # noqa: S311  # reproducible
            other = PlayedPolicy(type(played.policy))
            for _ in range(_STEPS):
                _step(rng, other)
                other.policy.victim()

        expect(_outside(play), set[str](), "the clocks, files and loops it touched")


def _step(rng: Random, played: PlayedPolicy) -> None:
    """One call that a tier could make, of any kind."""
    path = rng.sample(range(_NAMES), rng.randrange(1, 5))
    match rng.randrange(6):
        case 0 | 1:
            played.store(path)
        case 2:
            played.use(path)
        case 3:
            played.pin(path)
        case 4:
            played.unpin(path, used=rng.random() < 0.5)
        case _:
            played.lose(path[0], evicted=rng.random() < 0.5)


def _costs(policy: type[EvictionPolicy], count: int) -> dict[str, int]:
    """Python instructions and comparisons of each call, among ``count`` objects of every kind."""
    rows = Rows()
    tested = policy(rows)
    numbers = [_CountedRow(rows.take(n, 4096)) for n in range(3 * count)]
    tested.admit(numbers)
    tested.pin(numbers[: 2 * count])
    for row in numbers[count : 2 * count]:
        tested.remove(row, evicted=True)
        rows.give_back(row)
    free = numbers[2 * count :]
    new = [_CountedRow(rows.take(10**6, 4096))]
    return {
        "admit": _cost(lambda: tested.admit(new)),
        "touch": _cost(lambda: tested.touch(free[:1])),
        "refresh": _cost(lambda: tested.refresh(free[:1])),
        "pin": _cost(lambda: tested.pin(free[:1])),
        "unpin, used": _cost(lambda: tested.unpin(free[:1], used=True)),
        "pin, again": _cost(lambda: tested.pin(free[1:2])),
        "unpin": _cost(lambda: tested.unpin(free[1:2], used=False)),
        "victim": _cost(tested.victim),
        "pin, last": _cost(lambda: tested.pin(free[2:4])),
        "remove, evicted": _cost(lambda: tested.remove(free[2], evicted=True)),
        "remove": _cost(lambda: tested.remove(free[3], evicted=False)),
        "victim, again": _cost(tested.victim),
    }


class _CountedRow(int):
    """A row number that counts how often it is hashed or compared."""

    looks: ClassVar[int] = 0

    def __hash__(self) -> int:
        _CountedRow.looks += 1
        return int.__hash__(self)

    def __eq__(self, other: object) -> bool:
        _CountedRow.looks += 1
        return int.__eq__(self, other)


def _cost(work: Callable[[], object]) -> int:
    """No clock, so the same every time."""
    instructions = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal instructions
        frame.f_trace_opcodes = True
        instructions += event == "opcode"
        return trace

    _CountedRow.looks = 0
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return instructions + _CountedRow.looks


_OUTSIDE = frozenset(
    {"time", "datetime", "asyncio", "_asyncio", "io", "_io", "pathlib", "os", "posix", "socket"}
    | {"_socket", "select", "subprocess", "sqlite3", "logging"}
)
"""Modules of clocks, files, processes and loops."""


def _outside(work: Callable[[], object]) -> set[str]:
    """What of those ``work`` called, by any name and from anywhere: of this thread alone."""
    called: set[str] = set()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            module, name = str(frame.f_globals.get("__name__")), frame.f_code.co_qualname
        elif event == "c_call":
            owner = getattr(argument, "__self__", None)
            of = owner if isinstance(owner, ModuleType | type) else type(owner)
            module = argument.__module__ or getattr(of, "__module__", of.__name__)
            name = argument.__qualname__
        else:
            return
        if module.partition(".")[0] in _OUTSIDE or name in ("print", "input"):
            called.add(f"{module}.{name}")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(before)
    return called

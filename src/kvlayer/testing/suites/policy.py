"""The suite of an eviction policy: what any order of eviction must keep, whatever it prefers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from random import Random
from types import FrameType, ModuleType
from typing import Any, ClassVar

from kvlayer.abc.policy import EvictionPolicy
from kvlayer.keys import PUBLIC_ZONE, ObjectKey
from kvlayer.testing.promise import Promise, broken, expect, promise
from kvlayer.testing.suite import Suite
from kvlayer.testing.trial import PART

__all__ = ["KnownObjects", "PolicySuite", "policy_key"]

_SEEDS = 150
_STEPS = 40


def policy_key(number: int) -> ObjectKey:
    """One of any number of keys."""
    return ObjectKey.of("ab" * 32, PUBLIC_ZONE, sha256(b"%d" % number).digest(), 16, PART)


class KnownObjects:
    """What any policy has to know: what is there, what is pinned, what goes first.

    Called like a policy; :meth:`may_go` says whom it may name as its next victim.
    """

    def __init__(self) -> None:
        self.resident: set[ObjectKey] = set()
        self.pinned: dict[ObjectKey, bool] = {}
        """Pinned key -> whether it was demoted meanwhile."""
        self.demoted: list[ObjectKey] = []

    def admit(self, path: Sequence[ObjectKey]) -> None:
        self.resident |= set(path)
        self.touch(path)

    def touch(self, path: Sequence[ObjectKey]) -> None:
        self.demoted = [key for key in self.demoted if key not in path]

    def pin(self, key: ObjectKey) -> None:
        self.pinned.setdefault(key, False)
        self.touch([key])

    def unpin(self, path: Sequence[ObjectKey]) -> None:
        for key in path:
            if self.pinned.pop(key, False):
                self.demoted.append(key)
            else:
                self.touch([key])

    def demote(self, key: ObjectKey) -> None:
        if key not in self.resident:
            return
        if key in self.pinned:
            self.pinned[key] = True
        elif key not in self.demoted:
            self.demoted.append(key)

    def remove(self, key: ObjectKey) -> None:
        self.resident.discard(key)
        self.pinned.pop(key, None)
        self.touch([key])

    def may_go(self) -> set[ObjectKey]:
        """One of these, or nobody when there is none."""
        return set(self.demoted) or self.resident - self.pinned.keys()


class PolicySuite(Suite):
    """Set ``policy``. Which of several objects goes first is the policy's own affair::

    class TestFIFO(PolicySuite):
        policy = FIFO
    """

    policy: ClassVar[type[EvictionPolicy]]

    async def keep(self, promise: Promise, /) -> None:
        await promise.check(self, self.policy())

    @promise("Built without arguments; name is the configuration's policy.")
    async def test_it_has_a_name(self, policy: EvictionPolicy) -> None:
        if not getattr(policy, "name", None):
            broken("a name, as the configuration spells it", getattr(policy, "name", None))

    @promise("The object to give up next, or None when nothing is evictable.")
    async def test_it_names_what_is_there_as_long_as_something_is(
        self, policy: EvictionPolicy
    ) -> None:
        expect(policy.victim(), None, "victim() of nothing")
        keys = [policy_key(n) for n in range(20)]
        for first in range(0, 20, 5):
            policy.admit(keys[first : first + 5])
        left = set(keys)
        while left:
            victim = policy.victim()
            if victim is None or victim not in left:
                broken(f"one of {len(left)} objects that are left", victim)
            left.remove(victim)
            policy.remove(victim)
        expect(policy.victim(), None, "victim() when all are gone")

    @promise("Does not remove it.")
    async def test_naming_a_victim_changes_nothing(self, policy: EvictionPolicy) -> None:
        policy.admit([policy_key(n) for n in range(5)])
        first = policy.victim()
        for _ in range(5):
            expect(policy.victim(), first, "victim(), asked again")

    @promise("Never name this object until it is unpinned.")
    async def test_a_pinned_object_is_never_named(self, policy: EvictionPolicy) -> None:
        keys = [policy_key(n) for n in range(6)]
        policy.admit(keys)
        for key in keys[::2]:
            policy.pin(key)
        for key in keys[1::2]:
            victim = policy.victim()
            if victim in keys[::2]:
                broken("an object that is not pinned", victim)
            policy.remove(victim or key)
        expect(policy.victim(), None, "victim() when all that is left is pinned")

    @promise("Make pinned objects evictable again.")
    async def test_an_unpinned_object_may_go_again(self, policy: EvictionPolicy) -> None:
        keys = [policy_key(n) for n in range(3)]
        policy.admit(keys)
        for key in (*keys, keys[0]):  # pinning twice is the caller's to count
            policy.pin(key)
        expect(policy.victim(), None, "victim() when all are pinned")
        policy.unpin([keys[0]])
        expect(policy.victim(), keys[0], "victim() when one was unpinned")

    @promise("A key that is not known yet may be pinned: it is about to be admitted.")
    async def test_what_is_pinned_before_it_arrives_may_go_once_it_did_and_is_let_go(
        self, policy: EvictionPolicy
    ) -> None:
        keys = [policy_key(n) for n in range(2)]
        for key in keys:
            policy.pin(key)
        policy.admit(keys[:1])
        expect(policy.victim(), None, "victim() of a pinned object that arrived")
        policy.unpin(keys)
        expect(policy.victim(), keys[0], "victim() once it was unpinned")
        policy.remove(keys[0])
        expect(policy.victim(), None, "victim() when what is left never arrived")

    @promise(
        "Prefer this object over all others for eviction, in the order of these calls. "
        "A later use takes that back. A pinned object comes first once it is unpinned."
    )
    async def test_what_was_demoted_goes_first_in_its_order(self, policy: EvictionPolicy) -> None:
        keys = [policy_key(n) for n in range(6)]
        policy.admit(keys)
        policy.pin(keys[4])
        for number in (2, 4, 5):
            policy.demote(keys[number])
        expect(policy.victim(), keys[2], "victim(), the first that was demoted")
        policy.touch([keys[2]])
        expect(policy.victim(), keys[5], "victim() when the first that was demoted was used")
        policy.unpin([keys[4]])
        expect(policy.victim(), keys[5], "victim() when another was unpinned")
        policy.remove(keys[5])
        expect(policy.victim(), keys[4], "victim() when that one had been demoted")

    @promise("Unknown or pinned keys are ignored.")
    async def test_touching_what_is_unknown_or_pinned_is_ignored(
        self, policy: EvictionPolicy
    ) -> None:
        keys = [policy_key(n) for n in range(3)]
        policy.admit(keys[:2])
        policy.pin(keys[0])
        policy.touch([keys[2], keys[0]])
        policy.demote(keys[2])
        expect(policy.victim(), keys[1], "victim()")
        policy.remove(keys[1])
        expect(policy.victim(), None, "victim() of a pinned and an unknown key")

    @promise("Forget an object. Unknown keys are ignored.")
    async def test_a_removed_object_does_not_come_back(self, policy: EvictionPolicy) -> None:
        keys = [policy_key(n) for n in range(4)]
        policy.admit(keys[:3])
        policy.pin(keys[0])
        policy.demote(keys[1])
        for key in (*keys, keys[0]):
            policy.remove(key)
        policy.unpin([keys[0]])
        policy.touch(keys)
        expect(policy.victim(), None, "victim() when all are removed")
        policy.admit(keys[:1])
        expect(policy.victim(), keys[0], "victim() when one came back")

    @promise("A policy knows every object of its tier; pinned ones it never names.")
    async def test_any_calls_in_any_order_leave_it_knowing_what_is_there(
        self, policy: EvictionPolicy
    ) -> None:
        keys = [policy_key(n) for n in range(5)]
        for seed in range(_SEEDS):
            real, model = type(policy)(), KnownObjects()
            done: list[str] = []
            for call, argument in _steps(Random(seed), keys):  # noqa: S311  # reproducible
                done.append(f"{call}({_numbers(argument, keys)})")
                for each in (real, model):
                    getattr(each, call)(argument)
                victim, may_go = real.victim(), model.may_go()
                first = {model.demoted[0]} if model.demoted else may_go
                if victim not in first and (first or victim is not None):
                    broken(
                        f"one of {_numbers(sorted(first), keys) or 'nobody'} after "
                        f"{', '.join(done)}",
                        _numbers([victim] if victim else [], keys) or "nobody",
                    )

    @promise("Every call costs O(1) per key, whatever the number of objects or pins.")
    async def test_a_call_costs_the_same_among_few_and_many(self, policy: EvictionPolicy) -> None:
        few, many = _costs(type(policy), 10), _costs(type(policy), 3000)
        for call, cost in many.items():
            if cost > few[call] + 80:  # a branch more is a few; a walk would be thousands
                broken(
                    f"{call} to take some {few[call]} steps among 30 objects and among 9000", cost
                )

    @promise("Pure: no clock, no I/O.")
    async def test_it_looks_at_no_clock_and_opens_nothing(self, policy: EvictionPolicy) -> None:
        steps = list(_steps(Random(1), [policy_key(n) for n in range(5)]))  # noqa: S311  # reproducible

        def play() -> None:
            real = type(policy)()
            for call, argument in steps:
                getattr(real, call)(argument)
                real.victim()

        expect(_outside(play), set[str](), "the clocks, files and loops it touched")


def _steps(rng: Random, keys: Sequence[ObjectKey]) -> Iterator[tuple[str, Any]]:
    for _ in range(_STEPS):
        call = rng.choice(("admit", "admit", "touch", "unpin", "pin", "demote", "remove"))
        if call in ("pin", "demote", "remove"):
            yield call, rng.choice(keys)
        elif call == "unpin":  # in what order a path is let go is each policy's own affair
            yield call, [rng.choice(keys)]
        else:
            yield call, rng.sample(list(keys), rng.randrange(1, 5))


def _numbers(argument: ObjectKey | Sequence[ObjectKey], keys: Sequence[ObjectKey]) -> str:
    known = [argument] if isinstance(argument, str) else argument
    return " ".join(str(list(keys).index(ObjectKey(key))) for key in known)


def _costs(policy: type[EvictionPolicy], count: int) -> dict[str, int]:
    """Python instructions and key look-ups of each call, among ``count`` objects of every kind."""
    tested = policy()
    keys = [_CountedKey(policy_key(n)) for n in range(3 * count)]
    tested.admit(keys[: 2 * count])
    for key in keys[:count]:
        tested.pin(key)
    for key in keys[count : 2 * count]:
        tested.demote(key)
        tested.remove(key)
    tested.admit(keys[2 * count :])
    free = keys[2 * count :]
    return {
        "touch": _cost(lambda: tested.touch(free[:1])),
        "admit": _cost(lambda: tested.admit(free[:1])),
        "pin": _cost(lambda: tested.pin(free[0])),
        "unpin": _cost(lambda: tested.unpin(free[:1])),
        "demote": _cost(lambda: tested.demote(free[1])),
        "victim": _cost(tested.victim),
        "remove": _cost(lambda: tested.remove(free[1])),
        "victim, again": _cost(tested.victim),
    }


class _CountedKey(ObjectKey):
    """A key that counts how often it is looked up or compared."""

    __slots__ = ()
    lookups: ClassVar[int] = 0

    def __hash__(self) -> int:
        _CountedKey.lookups += 1
        return str.__hash__(self)

    def __eq__(self, other: object) -> bool:
        _CountedKey.lookups += 1
        return str.__eq__(self, other)


def _cost(work: Callable[[], object]) -> int:
    """No clock, so the same every time."""
    instructions = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal instructions
        frame.f_trace_opcodes = True
        instructions += event == "opcode"
        return trace

    _CountedKey.lookups = 0
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return instructions + _CountedKey.lookups


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

"""The order of a tier: demoted first, then by rank, then by the policy, whoever wrote that."""

from __future__ import annotations

import gc
import logging
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvlayer import Retention
from kvlayer.abc.policy import EvictionPolicy
from kvlayer.abc.rows import Rows
from kvlayer.eviction.arc import ARC
from kvlayer.eviction.lfu import LFU
from kvlayer.eviction.lru import LRU, PrefixLRU
from kvlayer.eviction.order import EvictionOrder
from kvlayer.retention import ORDINARY

ALL = (LRU, PrefixLRU, ARC, LFU)


def filled(policy: Callable[[Rows], EvictionPolicy] = LRU, count: int = 4) -> EvictionOrder:
    """Rows 0 to ``count - 1``, in this order of arrival."""
    order = EvictionOrder(policy)
    for n in range(count):
        assert order.add(n, 4096, first_token=16 * n, tokens=16) == n
    return order


def drained(order: EvictionOrder, now: float = 0.0) -> list[int]:
    """What goes, in this order, until nothing may go any more."""
    gone: list[int] = []
    while (row := order.victim(now)) is not None:
        assert row not in gone
        order.remove(row, evicted=True)
        gone.append(row)
    return gone


# -- demoted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ALL)
def test_what_was_demoted_goes_first_and_in_the_order_in_which_it_was(
    policy: type[EvictionPolicy],
) -> None:
    order = filled(policy, 5)
    for row in (3, 1, 4):
        order.demote(row)
    assert drained(order)[:3] == [3, 1, 4]


@pytest.mark.parametrize(
    "use",
    [
        lambda order: order.touch([1]),
        lambda order: order.refresh([1]),
        lambda order: (order.pin([1]), order.unpin([1], used=True)),
    ],
    ids=["used", "stored", "leased"],
)
def test_a_use_or_a_store_takes_demoting_back(use: Callable[[EvictionOrder], object]) -> None:
    order = filled()
    order.demote(1)
    use(order)
    assert drained(order) == [0, 2, 3, 1]


def test_what_was_demoted_while_it_was_pinned_goes_first_once_it_is_unpinned() -> None:
    order = filled()
    order.pin([2])
    order.demote(2)
    assert order.victim(0.0) == 0
    order.pin([2])  # pinning twice is the caller's to count
    order.touch([2])
    order.unpin([2], used=True)
    assert drained(order) == [2, 0, 1, 3]


def test_touching_and_storing_pass_over_what_is_pinned() -> None:
    order = filled()
    order.pin([1])
    order.touch([1, 0])
    order.refresh([1, 2])
    assert drained(order) == [3, 0, 2]
    order.unpin([1], used=False)
    assert drained(order) == [1]


def test_a_row_that_was_given_back_remembers_nothing() -> None:
    order = filled()
    order.demote(1)
    order.pin([2])
    order.demote(2)
    for row in (1, 2):
        order.remove(row, evicted=False)
    again = [order.add(n, 4096) for n in (7, 8)]
    assert sorted(again) == [1, 2]
    assert drained(order) == [0, 3, *again]
    assert order._demoted == 0


# -- retention -----------------------------------------------------------------------------------


def wished(*wishes: Retention, policy: type[EvictionPolicy] = LRU) -> EvictionOrder:
    order = EvictionOrder(policy)
    for n, wish in enumerate(wishes):
        order.add(n, 4096, first_token=16 * n, tokens=16, retention=wish)
    return order


@pytest.mark.parametrize("policy", ALL)
def test_the_lower_priority_goes_first_and_what_is_to_be_kept_last(
    policy: type[EvictionPolicy],
) -> None:
    order = wished(
        Retention(keep_until=50.0),
        Retention(priority=3),
        Retention(),
        Retention(priority=-1),
        Retention(priority=-3, keep_until=50.0),
        policy=policy,
    )
    assert drained(order, now=49.0) == [3, 2, 1, 4, 0]


def test_what_was_to_be_kept_counts_by_its_priority_once_its_time_has_come() -> None:
    order = wished(Retention(keep_until=50.0), Retention(), Retention(priority=1))
    assert order.victim(50.0) == 1
    assert order.victim(50.1) == 1  # recent among its equals: it was to be kept until now
    order.touch([1])
    assert drained(order, now=50.1) == [0, 1, 2]


def test_a_prompt_whose_time_has_come_still_loses_its_end_first() -> None:
    order = wished(*[Retention(keep_until=9.0)] * 5, policy=PrefixLRU)
    assert drained(order, now=10.0) == [4, 3, 2, 1, 0]


def test_what_is_pinned_or_demoted_when_its_time_comes_stays_so() -> None:
    kept = Retention(keep_until=9.0)
    order = wished(kept, kept, Retention())
    order.pin([0])
    order.demote(1)
    assert order.victim(10.0) == 1
    order.touch([1, 2])
    order.unpin([0], used=True)
    assert drained(order, now=10.0) == [1, 2, 0]


def test_of_several_requests_the_highest_wish_counts() -> None:
    order = wished(Retention(priority=-2), Retention(priority=2), Retention())
    order.refresh([0, 1, 2], Retention(priority=1))
    order.refresh([0, 1, 2], Retention(priority=-3))
    assert [order.rows.retention(row).priority for row in range(3)] == [1, 2, 1]
    assert drained(order) == [0, 2, 1]


def test_a_wish_of_nothing_lifts_what_was_to_go_first() -> None:
    order = wished(Retention(priority=-2), Retention())
    order.refresh([0])
    assert drained(order) == [1, 0]


def test_a_later_time_holds_and_an_earlier_one_changes_nothing() -> None:
    order = wished(Retention(keep_until=50.0), Retention())
    for until in (80.0, 60.0, 0.0):
        order.refresh([0], Retention(keep_until=until))
    assert order.rows.retention(0).keep_until == 80.0
    order.touch([1])
    for now, first in ((50.1, 1), (60.1, 1), (79.9, 1)):
        assert order.victim(now) == first
    order.remove(1, evicted=True)
    late = order.add(9, 4096)
    assert order.victim(80.1) == late  # both stand equal now, and 0 came down after it
    order.touch([late])
    assert order.victim(80.1) == 0


def test_what_was_to_be_kept_once_can_be_kept_again() -> None:
    order = wished(Retention(keep_until=9.0), Retention())
    order.touch([1])
    assert order.victim(20.0) == 1
    order.refresh([0], Retention(keep_until=30.0))
    order.touch([1])
    assert order.victim(20.0) == 1
    order.touch([1])
    assert order.victim(31.0) == 1  # 0 came down just now
    order.touch([1])
    assert order.victim(31.0) == 0


def test_a_clock_that_goes_back_makes_nothing_immortal() -> None:
    order = wished(Retention(keep_until=100.0), Retention())
    assert order.victim(200.0) == 1
    order.refresh([0], Retention(keep_until=100.0))
    order.touch([1])
    assert order.victim(0.0) == 0  # its time had come, whatever the clock says since
    order.refresh([0], Retention(keep_until=120.0))
    assert order.victim(0.0) == 1
    assert sorted(drained(order, now=121.0)) == [0, 1]


def test_times_of_what_has_gone_are_not_remembered() -> None:
    order = EvictionOrder(LRU)
    for n in range(5_000):
        row = order.add(n, 4096, retention=Retention(keep_until=1e9 + n))
        order.remove(row, evicted=False)
    assert len(order._times) < 200
    row = order.add(0, 4096)
    for n in range(5_000):
        order.refresh([row], Retention(keep_until=1e9 + n))
    assert len(order._times) < 200


def test_times_that_come_all_at_once_are_looked_at_in_slices() -> None:
    order = EvictionOrder(PrefixLRU)
    for n in range(5_000):
        order.add(n, 4096, retention=Retention(keep_until=9.0))
    order.victim(10.0)
    assert len(order._times) > 4_000
    assert sorted(drained(order, now=10.0)) == list(range(5_000))


# -- a policy that breaks its word ---------------------------------------------------------------


class Boo(BaseException):
    def __str__(self) -> str:
        raise RuntimeError("not even that can be said of it")


class Spoilt:
    """Whatever is no row."""

    def __repr__(self) -> str:
        raise RuntimeError("not even shown")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not even compared")

    __hash__ = None  # type: ignore[assignment]


RAISED = [ValueError("x"), Boo(), SystemExit(3), GeneratorExit(), StopIteration(), MemoryError()]
CALLS = ("__init__", "admit", "refresh", "touch", "pin", "unpin", "remove", "victim")


def breaking(method: str, breaks: Callable[[Any], object]) -> type[EvictionPolicy]:
    """An ``arc`` of which one method does something else."""

    def broken(self: Any, *args: Any, **more: Any) -> object:
        if method == "__init__":
            breaks(self)
        return breaks(self)

    return type("Breaking", (ARC,), {"name": "breaking", method: broken})


def raising(exc: BaseException) -> Callable[[Any], object]:
    def broken(self: Any) -> object:
        raise exc

    return broken


def exercise(order: EvictionOrder, known: list[int]) -> None:
    """Every call a tier makes."""
    order.touch(known[:2])
    order.refresh(known[1:3])
    order.pin(known[:3])
    order.unpin(known[:1], used=True)
    order.unpin(known[1:2], used=False)
    order.demote(known[3])
    order.victim(0.0)
    order.remove(known[4], evicted=True)
    order.remove(known[5], evicted=False)


@pytest.mark.parametrize("exc", RAISED, ids=lambda exc: type(exc).__name__)
@pytest.mark.parametrize("method", CALLS)
def test_a_policy_that_raises_is_replaced_and_nothing_is_forgotten(
    method: str, exc: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    order = EvictionOrder(breaking(method, raising(exc)))
    known = [order.add(n, 4096) for n in range(8)]
    with caplog.at_level(logging.ERROR):
        exercise(order, known)
        assert order.victim(0.0) == known[3]
    left = {0, 1, 3, 6, 7}  # 2 is pinned
    assert set(drained(order)) == left
    order.unpin([known[2]], used=True)
    assert drained(order) == [known[2]]
    assert (order.replaced, order.name) == (1, "prefix-lru")
    assert "prefix-lru takes its place" in caplog.text


@pytest.mark.parametrize(
    "named",
    [None, 99, -1, 2, True, 0.0, "row", Spoilt(), 10**30],
    ids=["nobody", "unknown", "negative", "pinned", "bool", "float", "text", "spoilt", "huge"],
)
def test_a_policy_that_names_what_it_must_not_is_replaced(named: object) -> None:
    order = EvictionOrder(breaking("victim", lambda self: named))
    for n in range(4):
        order.add(n, 4096)
    order.pin([1, 2])
    assert order.victim(0.0) in (0, 3)
    assert (order.replaced, order.name) == (1, "prefix-lru")


def test_a_policy_that_names_what_another_ranks_policy_orders_is_replaced() -> None:
    order = EvictionOrder(breaking("victim", lambda self: 0))
    order.add(0, 4096, retention=Retention(priority=3))
    order.add(1, 4096)
    assert order.victim(0.0) == 1
    assert order.replaced == 1


def test_nobody_is_the_right_answer_where_nothing_may_go() -> None:
    order = EvictionOrder(breaking("victim", lambda self: None))
    assert order.victim(0.0) is None
    order.add(0, 4096)
    order.pin([0])
    assert order.victim(0.0) is None
    assert order.replaced == 0


def test_a_keyboard_interrupt_is_the_users_and_passes() -> None:
    order = EvictionOrder(breaking("touch", raising(KeyboardInterrupt())))
    for n in range(4):
        order.add(n, 4096)
    with pytest.raises(KeyboardInterrupt):
        order.touch([1])
    assert sorted(drained(order)) == [0, 1, 2, 3]


def test_a_policy_is_replaced_for_all_ranks_at_once() -> None:
    order = EvictionOrder(breaking("touch", raising(ValueError())))
    wishes = [Retention(priority=n % 3, keep_until=9.0 * (n % 2)) for n in range(9)]
    for n, wish in enumerate(wishes):
        order.add(n, 4096, retention=wish)
    order.touch([0])
    ranks = [wishes[row].rank(0.0) for row in drained(order)]
    assert (ranks, order.replaced) == (sorted(ranks), 1)


@pytest.mark.parametrize("method", ["__init__", "admit", "pin", "remove"])
def test_a_policy_that_breaks_while_a_row_changes_its_rank_is_replaced(method: str) -> None:
    is_broken = [False]

    def broken(self: Any, *args: Any, **more: Any) -> None:
        if is_broken[0]:
            raise ValueError
        getattr(ARC, method)(self, *args, **more)

    order = EvictionOrder(type("Late", (ARC,), {"name": "late", method: broken}))
    for n in range(5):
        order.add(n, 4096)
    is_broken[0] = True
    order.refresh([2], Retention(priority=2))
    assert order.replaced == 1
    gone = drained(order)
    assert (sorted(gone), gone[-1]) == ([0, 1, 2, 3, 4], 2)


def test_a_replaced_policy_still_gives_up_ends_before_beginnings() -> None:
    order = EvictionOrder(breaking("victim", raising(ValueError())))
    for n in range(6):
        order.add(n, 4096, first_token=16 * n, tokens=16)
    assert drained(order) == [5, 4, 3, 2, 1, 0]


# -- cost ----------------------------------------------------------------------------------------


def test_an_object_costs_some_bytes_and_the_garbage_collector_nothing() -> None:
    count = 20_000
    gc.collect()
    before = len(gc.get_objects())
    tracemalloc.start()
    order = EvictionOrder(PrefixLRU)
    for n in range(count):
        order.add(n, 4096, first_token=16 * n, tokens=16)
    nbytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert nbytes < 90 * count
    assert len(gc.get_objects()) - before < 100


# -- any calls in any order ----------------------------------------------------------------------


class OrderMachine(RuleBasedStateMachine):
    """The order against what any order has to know."""

    policy: type[EvictionPolicy] = PrefixLRU

    def __init__(self) -> None:
        super().__init__()
        self.order = EvictionOrder(self.policy)
        self.rows: dict[int, int] = {}
        self.wishes: dict[int, Retention] = {}
        self.expired: set[int] = set()
        """Names whose time has come."""
        self.pinned: set[int] = set()
        self.demoted: list[int] = []
        self.now = 0.0

    paths = st.lists(st.integers(0, 7), min_size=1, max_size=4, unique=True)
    retentions = st.one_of(
        st.just(ORDINARY),
        st.builds(
            Retention, st.integers(-3, 3), st.sampled_from([0.0, 5.0, 10.0, 15.0, 20.0, 30.0])
        ),
    )

    def known(self, path: Sequence[int]) -> list[int]:
        return [name for name in path if name in self.rows]

    def take_back(self, names: Sequence[int]) -> None:
        self.demoted = [n for n in self.demoted if n not in names or n in self.pinned]

    @rule(path=paths, wish=retentions)
    def store(self, path: list[int], wish: Retention) -> None:
        for name in path:
            if name not in self.rows:
                self.rows[name] = self.order.add(name, 4096, retention=wish)
                self.wishes[name] = wish
            else:
                joined = self.wishes[name].joined(wish)
                if joined.keep_until > self.wishes[name].keep_until:
                    self.expired.discard(name)
                self.wishes[name] = joined
        self.order.refresh([self.rows[name] for name in path], wish)
        self.take_back(path)

    @rule(path=paths)
    def use(self, path: list[int]) -> None:
        self.order.touch([self.rows[name] for name in self.known(path)])
        self.take_back(path)

    @rule(path=paths)
    def pin(self, path: list[int]) -> None:
        names = self.known(path)
        self.order.pin([self.rows[name] for name in names])
        self.take_back(names)
        self.pinned.update(names)

    @rule(path=paths, used=st.booleans())
    def unpin(self, path: list[int], used: bool) -> None:
        names = [name for name in path if name in self.pinned]
        self.order.unpin([self.rows[name] for name in names], used=used)
        self.pinned.difference_update(names)
        first = [name for name in names if name in self.demoted]
        self.demoted = [name for name in self.demoted if name not in first] + first

    @rule(name=st.integers(0, 7))
    def demote(self, name: int) -> None:
        if name in self.rows:
            self.order.demote(self.rows[name])
            if name not in self.demoted:
                self.demoted.append(name)

    @rule(name=st.integers(0, 7), evicted=st.booleans())
    def remove(self, name: int, evicted: bool) -> None:
        if name in self.rows:
            self.order.remove(self.rows.pop(name), evicted=evicted)
            self.pinned.discard(name)
            self.expired.discard(name)
            self.demoted = [n for n in self.demoted if n != name]

    @rule(seconds=st.integers(1, 12))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @invariant()
    def the_victim_is_one_of_those_that_go_first(self) -> None:
        self.expired |= {n for n in self.rows if self.wishes[n].keep_until < self.now}
        free = self.rows.keys() - self.pinned
        first = [name for name in self.demoted if name in free]
        ranks = {n: self.wishes[n].rank(self.now if n in self.expired else 0.0) for n in free}
        least = {name for name in free if ranks[name] == min(ranks.values())}
        row = self.order.victim(self.now)
        if not free:
            assert row is None
        elif first:
            assert row == self.rows[first[0]]
        else:
            assert row in {self.rows[name] for name in least}

    @invariant()
    def what_is_demoted_is_counted(self) -> None:
        """Without any, no path has to be looked through for them."""
        assert self.order._demoted == len(self.demoted)

    @invariant()
    def nothing_was_replaced_and_all_is_known(self) -> None:
        assert self.order.replaced == 0
        assert len(self.order) == len(self.rows)

    def teardown(self) -> None:
        self.order.unpin([self.rows[name] for name in self.pinned], used=False)
        assert sorted(drained(self.order, 99.0)) == sorted(self.rows.values())


class ARCMachine(OrderMachine):
    policy = ARC


class LFUMachine(OrderMachine):
    policy = LFU


class ReplacedMachine(OrderMachine):
    """The same with a policy that breaks at once."""

    policy = breaking("victim", raising(ValueError()))

    @invariant()
    def nothing_was_replaced_and_all_is_known(self) -> None:
        assert len(self.order) == len(self.rows)


TestOrder = OrderMachine.TestCase
TestOrder.settings = settings(max_examples=100, stateful_step_count=40)
TestOrderARC = ARCMachine.TestCase
TestOrderARC.settings = settings(max_examples=50, stateful_step_count=40)
TestOrderLFU = LFUMachine.TestCase
TestOrderLFU.settings = settings(max_examples=50, stateful_step_count=40)
TestOrderReplaced = ReplacedMachine.TestCase
TestOrderReplaced.settings = settings(max_examples=50, stateful_step_count=40)

"""Leases: a pin ends when it is given back or when its time has come, and only once."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlayer.errors import ConfigError
from kvlayer.eviction.lru import PrefixLRU
from kvlayer.identity.keys import Part, Span
from kvlayer.results import OwnerStats
from kvlayer.tier.planner.directory import Directory
from kvlayer.tier.planner.host import HostTier
from kvlayer.tier.planner.lease import LeaseTable
from kvlayer.tier.planner.records import ObjectRecord

PART = Part(0, (0, 4), (0, 2))


class Small:
    """Three ready objects and the leases on them."""

    def __init__(self) -> None:
        self.directory = Directory([PART])
        self.host = HostTier(3 * 4096, PrefixLRU, self.directory)
        self.leases = LeaseTable(self.host)
        self.records: list[ObjectRecord] = []
        for n in range(3):
            found = self.directory.ensure(
                "ab" * 32, Span(0, 16, sha256(b"%d" % n).digest()), "0", PART
            )
            assert self.host.reserve(found, 4096, [], 0.0)
            self.host.commit([found])
            self.host.let_go([found])
            self.records.append(found)

    @property
    def pins(self) -> list[int]:
        return [r.pins for r in self.records]


@pytest.fixture
def small() -> Small:
    return Small()


def test_a_lease_pins_until_it_is_released(small: Small) -> None:
    lease = small.leases.grant(small.records[:2], owner="me", deadline=10.0)
    assert small.pins == [1, 1, 0]
    assert small.leases.holds(lease.number)
    assert len(small.leases) == 1
    assert small.leases.release(lease.number)
    assert small.pins == [0, 0, 0]
    assert not small.leases.holds(lease.number)


def test_a_lease_is_released_once(small: Small) -> None:
    lease = small.leases.grant(small.records, owner="me", deadline=10.0)
    other = small.leases.grant(small.records, owner="you", deadline=10.0)
    assert small.leases.release(lease.number)
    assert not small.leases.release(lease.number)
    assert small.pins == [1, 1, 1]
    assert small.leases.holds(other.number)
    assert not small.leases.release(12345)


def test_a_lease_ends_at_its_deadline_and_not_before(small: Small) -> None:
    lease = small.leases.grant(small.records, owner="me", deadline=10.0)
    assert small.leases.expire(9.999) == []
    assert small.leases.holds(lease.number)
    assert small.leases.expire(10.0) == [lease]
    assert small.pins == [0, 0, 0]


def test_releasing_an_expired_lease_says_so_and_unpins_nothing(small: Small) -> None:
    lease = small.leases.grant(small.records, owner="me", deadline=1.0)
    other = small.leases.grant(small.records, owner="you", deadline=99.0)
    small.leases.expire(1.0)
    assert not small.leases.release(lease.number)
    assert small.pins == [1, 1, 1]
    assert small.leases.holds(other.number)


def test_a_released_lease_does_not_expire(small: Small) -> None:
    lease = small.leases.grant(small.records, owner="me", deadline=1.0)
    small.leases.grant(small.records, owner="you", deadline=1.0)
    small.leases.release(lease.number)
    assert [gone.owner for gone in small.leases.expire(2.0)] == ["you"]
    assert small.pins == [0, 0, 0]


def test_clearing_releases_every_lease(small: Small) -> None:
    for _ in range(3):
        small.leases.grant(small.records, owner="me", deadline=1.0)
    small.leases.clear()
    assert small.pins == [0, 0, 0]
    assert len(small.leases) == 0
    assert small.leases.expire(99.0) == []


def test_an_empty_lease_is_a_lease(small: Small) -> None:
    lease = small.leases.grant([], owner="me", deadline=1.0)
    assert small.leases.holds(lease.number)
    assert small.leases.release(lease.number)


@pytest.mark.parametrize("deadline", [float("inf"), float("nan")])
def test_a_lease_without_an_end_is_refused_and_pins_nothing(small: Small, deadline: float) -> None:
    with pytest.raises(ConfigError, match="needs a deadline"):
        small.leases.grant(small.records, owner="me", deadline=deadline)
    assert small.pins == [0, 0, 0]
    assert len(small.leases) == 0


def test_owners_are_told_apart(small: Small) -> None:
    assert small.leases.owners() == {}
    small.leases.grant(small.records[:2], owner="me", deadline=1.0)
    small.leases.grant(small.records[1:], owner="me", deadline=2.0)
    yours = small.leases.grant(small.records[1:2], owner="you", deadline=2.0)
    assert small.leases.owners() == {"me": OwnerStats(2, 4 * 4096), "you": OwnerStats(1, 4096)}
    small.leases.expire(1.0)
    small.leases.release(yours.number)
    assert small.leases.owners() == {"me": OwnerStats(1, 2 * 4096)}


def test_a_lease_on_what_is_not_in_host_memory_holds_no_bytes(small: Small) -> None:
    small.directory.add_tier(small.records[1], 1)
    small.host.drop(small.records[1])
    small.leases.grant(small.records[:2], owner="me", deadline=1.0)
    assert small.leases.owners() == {"me": OwnerStats(1, 4096)}


def test_leases_released_long_before_their_deadline_leave_nothing_behind(small: Small) -> None:
    last = small.leases.grant(small.records, owner="me", deadline=6.0)
    kept = small.leases.grant(small.records, owner="me", deadline=5.0)
    for n in range(10_000):
        lease = small.leases.grant(small.records, owner="you", deadline=1e9 - n)
        small.leases.release(lease.number)
    assert len(small.leases._deadlines) < 100
    assert small.leases.expire(4.0) == []
    assert small.leases.expire(5.0) == [kept]
    assert small.leases.expire(6.0) == [last]
    assert small.pins == [0, 0, 0]


@given(
    steps=st.lists(
        st.tuples(st.just("grant"), st.integers(0, 20), st.integers(0, 7))
        | st.tuples(st.just("expire"), st.integers(0, 20), st.just(0))
        | st.tuples(st.just("release"), st.integers(0, 12), st.just(0)),
        max_size=30,
    )
)
def test_pins_are_the_live_leases_whatever_happened(steps: list[tuple[str, int, int]]) -> None:
    small = Small()
    live: dict[int, tuple[float, int]] = {}
    for what, number, mask in steps:
        if what == "grant":
            path = [r for i, r in enumerate(small.records) if mask >> i & 1]
            lease = small.leases.grant(path, owner="", deadline=float(number))
            assert lease.number not in live
            live[lease.number] = (float(number), mask)
        elif what == "expire":
            due = {n for n, (deadline, _) in live.items() if deadline <= number}
            gone = small.leases.expire(float(number))
            assert {lease.number for lease in gone} == due
            assert [lease.deadline for lease in gone] == sorted(lease.deadline for lease in gone)
            for n in due:
                del live[n]
        else:
            assert small.leases.release(number) == (live.pop(number, None) is not None)
        assert small.pins == [sum(m >> i & 1 for _, m in live.values()) for i in range(3)]
        assert len(small.leases) == len(live)

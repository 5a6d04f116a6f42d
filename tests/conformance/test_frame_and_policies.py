"""The frame and the policies keep their promises; liars of either kind fail exactly one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from kvlayer.abc.policy import EvictionPolicy
from kvlayer.codec.frame import HEADER_NBYTES, FrameError, check_frame, write_header
from kvlayer.keys import ObjectKey
from kvlayer.results import Cause
from kvlayer.testing import FrameSuite, PolicySuite, Suite
from kvlayer.tier.arc import ARC
from kvlayer.tier.evict import LRU, PrefixLRU


class TestFrame(FrameSuite):
    pass


class TestLRU(PolicySuite):
    policy = LRU


class TestPrefixLRU(PolicySuite):
    policy = PrefixLRU


class TestARC(PolicySuite):
    policy = ARC


def broken_in(suite: Suite) -> list[str]:
    return [v.promise.name for v in suite.run() if not v.is_good]


# -- policies ------------------------------------------------------------------------------------


class Nameless(LRU):
    name = ""


class ForgetsTheOldest(LRU):
    """Of a crowd it drops the first, as a bounded queue would."""

    def admit(self, path: Sequence[ObjectKey], /) -> None:
        super().admit(path)
        if len(self._order) > 15:
            self._order.popitem(last=False)


class RemovesItsVictim(LRU):
    """Right as long as its caller removes it at once, too."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def admit(self, path: Sequence[ObjectKey], /) -> None:
        self.asked = 0
        super().admit(path)

    def touch(self, path: Sequence[ObjectKey], /) -> None:
        self.asked = 0
        super().touch(path)

    def victim(self) -> ObjectKey | None:
        self.asked += 1
        if self.asked < 4 or len(self._order) != 5 or self._first or self._pinned:
            return super().victim()
        return list(self._order)[1]


class WalksOverPins(LRU):
    def victim(self) -> ObjectKey | None:
        for _ in self._pinned:
            pass
        return super().victim()


class LooksAtTheClock(LRU):
    def touch(self, path: Sequence[ObjectKey], /) -> None:
        monotonic()
        super().touch(path)


class WritesAJournal(LRU):
    def demote(self, key: ObjectKey, /) -> None:
        with Path("/dev/null").open("w") as journal:
            journal.write(key)
        super().demote(key)


class UnpinsWhatIsStoredAgain(LRU):
    """No single promise stores a prompt again while a move holds it; the random calls do."""

    def admit(self, path: Sequence[ObjectKey], /) -> None:
        for key in path:
            if self._pinned.get(key) is False:
                del self._pinned[key]
        super().admit(path)


POLICY_LIARS: dict[type[EvictionPolicy], str] = {
    Nameless: "it has a name",
    ForgetsTheOldest: "it names what is there as long as something is",
    RemovesItsVictim: "naming a victim changes nothing",
    WalksOverPins: "a call costs the same among few and many",
    LooksAtTheClock: "it looks at no clock and opens nothing",
    WritesAJournal: "it looks at no clock and opens nothing",
    UnpinsWhatIsStoredAgain: "any calls in any order leave it knowing what is there",
}


@pytest.mark.parametrize("liar", POLICY_LIARS, ids=lambda liar: liar.__name__)
def test_a_lying_policy_fails_exactly_the_promise_it_breaks(liar: type[EvictionPolicy]) -> None:
    class Asked(PolicySuite):
        policy = liar

    assert broken_in(Asked()) == [POLICY_LIARS[liar]]


class CountsPins(LRU):
    """Keeps what was pinned twice when it was unpinned once."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[ObjectKey, int] = {}

    def pin(self, key: ObjectKey, /) -> None:
        self.count[key] = self.count.get(key, 0) + 1
        super().pin(key)

    def unpin(self, path: Sequence[ObjectKey], /) -> None:
        for key in path:
            self.count[key] = self.count.get(key, 1) - 1
            if self.count[key] <= 0:
                super().unpin([key])


class NamesPinned(LRU):
    def pin(self, key: ObjectKey, /) -> None: ...


class DemotesNothing(LRU):
    def demote(self, key: ObjectKey, /) -> None: ...


class RemembersTheRemoved(LRU):
    def remove(self, key: ObjectKey, /) -> None:
        if key in self._pinned:
            return
        super().remove(key)


class ForgetsEarlyPins(LRU):
    """What was pinned before it arrived is free as soon as it does."""

    def pin(self, key: ObjectKey, /) -> None:
        if key in self._order or key in self._first:
            super().pin(key)


class TakesInWhatIsTouched(LRU):
    def touch(self, path: Sequence[ObjectKey], /) -> None:
        super().touch(path)
        for key in path:
            if key not in self._order and key not in self._pinned:
                self._order[key] = None


ALSO_RANDOM: dict[type[EvictionPolicy], str] = {
    CountsPins: "an unpinned object may go again",
    NamesPinned: "a pinned object is never named",
    ForgetsEarlyPins: "what is pinned before it arrives may go once it did and is let go",
    TakesInWhatIsTouched: "touching what is unknown or pinned is ignored",
    DemotesNothing: "what was demoted goes first in its order",
    RemembersTheRemoved: "a removed object does not come back",
}
"""Random calls find whatever a single promise finds; it says which."""


@pytest.mark.parametrize("liar", ALSO_RANDOM, ids=lambda liar: liar.__name__)
def test_the_random_calls_find_what_the_promise_it_breaks_finds(
    liar: type[EvictionPolicy],
) -> None:
    class Asked(PolicySuite):
        policy = liar

    found = broken_in(Asked())
    assert ALSO_RANDOM[liar] in found
    assert "any calls in any order leave it knowing what is there" in found


def test_every_promise_of_a_policy_has_a_liar() -> None:
    lied_about = {*POLICY_LIARS.values(), *ALSO_RANDOM.values()}
    assert lied_about == {promise.name for promise in PolicySuite.promises()}


# -- the frame -----------------------------------------------------------------------------------


def keeps_the_page(header: memoryview, payload_bytes: memoryview, **what: Any) -> None:
    before = bytes(header)
    write_header(header, payload_bytes, **what)
    used = 24 + int.from_bytes(header[12:16], "little")
    header[used:] = before[used:]


def pads_the_slot(header: memoryview, payload_bytes: memoryview, **what: Any) -> None:
    write_header(header, payload_bytes, **what)
    rest = payload_bytes[what["payload"].body_nbytes :]
    rest[:] = bytes(rest.nbytes)


def ignoring(*causes: Cause) -> Callable[..., None]:
    def check(*args: Any, **what: Any) -> None:
        try:
            check_frame(*args, **what)
        except FrameError as exc:
            if exc.cause not in causes:
                raise

    return check


def trusts_the_first_segment(
    header: memoryview, payload_bytes: memoryview, filled: int, **what: Any
) -> None:
    try:
        check_frame(header, payload_bytes, filled, **what)
    except FrameError as exc:
        if "checksum of layers" not in exc.detail or "layers 0.." in exc.detail:
            raise


def skips_the_maps_checksum(
    header: memoryview, payload_bytes: memoryview, filled: int, **what: Any
) -> None:
    """What names, counts and cuts are right is as it was written, it says."""
    try:
        check_frame(header, payload_bytes, filled, **what)
    except FrameError as exc:
        if "header's checksum" not in exc.detail or b"created" not in bytes(header):
            raise


def believes_lengths(
    header: memoryview, payload_bytes: memoryview, filled: int, **what: Any
) -> None:
    length = int.from_bytes(header[12:16], "little")
    if filled == HEADER_NBYTES + payload_bytes.nbytes and length > HEADER_NBYTES:
        raise MemoryError(length)
    check_frame(header, payload_bytes, filled, **what)


def fails_on_another_version(
    header: memoryview, payload_bytes: memoryview, filled: int, **what: Any
) -> None:
    """Takes what it cannot read for damage, as an older build would in a mixed fleet."""
    try:
        check_frame(header, payload_bytes, filled, **what)
    except FrameError as exc:
        raise FrameError(
            Cause.CORRUPT if exc.cause is Cause.FOREIGN_VERSION else exc.cause, exc.detail
        ) from None


KEPT: list[object] = []


def keeps_a_view(header: memoryview, payload_bytes: memoryview, filled: int, **what: Any) -> None:
    check_frame(header, payload_bytes, filled, **what)
    KEPT[:] = [payload_bytes[:1]]


def repairs(header: memoryview, payload_bytes: memoryview, filled: int, **what: Any) -> None:
    check_frame(header, payload_bytes, filled, **what)
    payload_bytes[0] ^= 1


FRAME_LIARS: dict[str, tuple[dict[str, Callable[..., None]], str]] = {
    "repairs": ({"check_frame": repairs}, "what was written is accepted and unchanged"),
    "keeps the page": (
        {"write_header": keeps_the_page},
        "nothing of a pages former content is written",
    ),
    "pads the slot": (
        {"write_header": pads_the_slot},
        "nothing of a pages former content is written",
    ),
    "ignores a short read": (
        {"check_frame": ignoring(Cause.TRUNCATED)},
        "a frame cut anywhere is refused",
    ),
    "trusts the first segment": (
        {"check_frame": trusts_the_first_segment},
        "a flipped bit of the payload is corrupt",
    ),
    "skips the map's checksum": (
        {"check_frame": skips_the_maps_checksum},
        "a flipped bit of the header is refused",
    ),
    "fails on another version": (
        {"check_frame": fails_on_another_version},
        "another version is foreign",
    ),
    "ignores the key": (
        {"check_frame": ignoring(Cause.MISPLACED)},
        "another objects frame is misplaced",
    ),
    "believes lengths": ({"check_frame": believes_lengths}, "noise is refused and never an error"),
    "keeps a view": ({"check_frame": keeps_a_view}, "it keeps no view of what it was given"),
}


@pytest.mark.parametrize("lie", FRAME_LIARS)
def test_a_lying_frame_fails_exactly_the_promise_it_breaks(lie: str) -> None:
    functions, name = FRAME_LIARS[lie]
    asked = type("Asked", (FrameSuite,), {k: staticmethod(f) for k, f in functions.items()})
    assert broken_in(asked()) == [name]


def test_every_promise_of_a_frame_has_a_liar() -> None:
    assert {name for _, name in FRAME_LIARS.values()} == {p.name for p in FrameSuite.promises()}

"""The frame and the policies keep their promises; liars of either kind fail exactly one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from codecs_of_tests import Doubles, Shrinks

from kvlayer.abc.policy import EvictionPolicy
from kvlayer.abc.rows import Rows
from kvlayer.codec.frame import HEADER_NBYTES, FrameError
from kvlayer.eviction.arc import ARC
from kvlayer.eviction.lfu import LFU
from kvlayer.eviction.lru import LRU, PrefixLRU
from kvlayer.results import Cause
from kvlayer.testing import FrameSuite, PolicySuite, Suite
from kvlayer.testing.loan import noise
from kvlayer.tier.transfer.coding import encode, verify


class TestFrame(FrameSuite):
    pass


class TestDoubled(FrameSuite):
    codec = Doubles()


class TestShrunk(FrameSuite):
    codec = Shrinks()


class TestLRU(PolicySuite):
    policy = LRU


class TestPrefixLRU(PolicySuite):
    policy = PrefixLRU


class TestARC(PolicySuite):
    policy = ARC


class TestLFU(PolicySuite):
    policy = LFU


def broken_in(suite: Suite) -> list[str]:
    return [v.promise.name for v in suite.run() if not v.is_good]


# -- policies ------------------------------------------------------------------------------------


class Counted(LRU):
    """Knows by itself what it orders, so that a liar can go by it."""

    def __init__(self, rows: Rows, /) -> None:
        super().__init__(rows)
        self.ordered: dict[int, None] = {}
        self.pinned: set[int] = set()

    def admit(self, path: Sequence[int], /) -> None:
        super().admit(path)
        self.ordered |= dict.fromkeys(path)

    def pin(self, path: Sequence[int], /) -> None:
        super().pin(path)
        for row in path:
            self.ordered.pop(row, None)
        self.pinned.update(path)

    def unpin(self, path: Sequence[int], /, *, used: bool) -> None:
        super().unpin(path, used=used)
        self.pinned.difference_update(path)
        self.ordered |= dict.fromkeys(path)

    def remove(self, row: int, /, *, evicted: bool) -> None:
        super().remove(row, evicted=evicted)
        self.pinned.discard(row)


class Nameless(LRU):
    name = ""


class ForgetsTheOldest(Counted):
    """Of a crowd it drops the first, as a bounded queue would."""

    def victim(self) -> int | None:
        return None if len(self.ordered) > 15 else super().victim()


class ForgetsItsVictim(Counted):
    """Right as long as its caller gives it up at once, too."""

    def __init__(self, rows: Rows, /) -> None:
        super().__init__(rows)
        self.asked = 0

    def admit(self, path: Sequence[int], /) -> None:
        super().admit(path)
        self.asked = 0

    def victim(self) -> int | None:
        self.asked += 1
        if self.asked < 3 or len(self.ordered) != 5 or self.pinned:
            return super().victim()
        return next(row for row in self.ordered if row != super(Counted, self).victim())


class WalksOverPins(Counted):
    def victim(self) -> int | None:
        for _ in self.pinned:
            pass
        return super().victim()


class LooksForItsRow(Counted):
    """A list that is searched: no instruction of Python says so."""

    def refresh(self, path: Sequence[int], /) -> None:
        super().refresh(path)
        for row in path:
            [*self.ordered][::-1].index(row)


class LooksAtTheClock(LRU):
    def touch(self, path: Sequence[int], /) -> None:
        monotonic()
        super().touch(path)


class WritesAJournal(LRU):
    def unpin(self, path: Sequence[int], /, *, used: bool) -> None:
        with Path("/dev/null").open("w") as journal:
            journal.write(str(path))
        super().unpin(path, used=used)


class UnpinsWhatIsStoredBesideIt(Counted):
    """No single promise stores something while a move holds another; the random calls do."""

    def refresh(self, path: Sequence[int], /) -> None:
        super().refresh(path)
        if len(self.pinned) == 1 and len(self.ordered) > 2:
            super().unpin(list(self.pinned), used=False)


POLICY_LIARS: dict[type[EvictionPolicy], str] = {
    Nameless: "it has a name",
    ForgetsTheOldest: "it names what is there as long as something is",
    ForgetsItsVictim: "naming a victim changes nothing",
    WalksOverPins: "a call costs the same among few and many",
    LooksForItsRow: "a call costs the same among few and many",
    LooksAtTheClock: "it looks at no clock and opens nothing",
    WritesAJournal: "it looks at no clock and opens nothing",
    UnpinsWhatIsStoredBesideIt: "any calls in any order leave it knowing what is there",
}


@pytest.mark.parametrize("liar", POLICY_LIARS, ids=lambda liar: liar.__name__)
def test_a_lying_policy_fails_exactly_the_promise_it_breaks(liar: type[EvictionPolicy]) -> None:
    class Asked(PolicySuite):
        policy = liar

    assert broken_in(Asked()) == [POLICY_LIARS[liar]]


class NamesPinned(LRU):
    def pin(self, path: Sequence[int], /) -> None: ...

    def unpin(self, path: Sequence[int], /, *, used: bool) -> None: ...


class KeepsOneThatNobodyUsed(Counted):
    """What is unpinned stays pinned when nobody has used it."""

    def unpin(self, path: Sequence[int], /, *, used: bool) -> None:
        if used:
            super().unpin(path, used=used)


class RemembersTheRemoved(Counted):
    """A number that is another's is still taken for the one before."""

    def __init__(self, rows: Rows, /) -> None:
        super().__init__(rows)
        self.deleted: set[int] = set()

    def remove(self, row: int, /, *, evicted: bool) -> None:
        super().remove(row, evicted=evicted)
        if not evicted:
            self.deleted.add(row)

    def victim(self) -> int | None:
        row = super().victim()
        return None if row in self.deleted else row


ALSO_RANDOM: dict[type[EvictionPolicy], str] = {
    NamesPinned: "a pinned object is never named",
    KeepsOneThatNobodyUsed: "an unpinned object may go again",
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


def keeps_the_page(*args: Any, **what: Any) -> tuple[memoryview, ...]:
    before = bytes(args[3][:HEADER_NBYTES])
    header, *body = encode(*args, **what)
    used = 24 + int.from_bytes(header[12:16], "little")
    header[used:] = before[used:]
    return header, *body


def pads_the_slot(*args: Any, **what: Any) -> tuple[memoryview, ...]:
    slot = args[2][0]
    rest = slot[args[1].body_nbytes :]
    rest[:] = bytes(rest.nbytes)
    return encode(*args, **what)


def keeps_the_padding(*args: Any, **what: Any) -> tuple[memoryview, ...]:
    payload, scratch = args[1], args[3]
    before = noise(3, payload.nbytes - payload.body_nbytes)
    lent = encode(*args, **what)
    if before:
        scratch[scratch.nbytes - len(before) :] = before
    return lent


def ignoring(*causes: Cause) -> Callable[..., None]:
    def check(*args: Any, **what: Any) -> None:
        try:
            verify(*args, **what)
        except FrameError as exc:
            if exc.cause not in causes:
                raise

    return check


def trusts_the_first_segment(*args: Any, **what: Any) -> None:
    try:
        verify(*args, **what)
    except FrameError as exc:
        if "checksum of layers" not in exc.detail or "layers 0.." in exc.detail:
            raise


def skips_the_maps_checksum(*args: Any, **what: Any) -> None:
    """What names, counts and cuts are right is as it was written, it says."""
    try:
        verify(*args, **what)
    except FrameError as exc:
        if "header's checksum" not in exc.detail or b"created" not in bytes(args[2]):
            raise


def believes_lengths(*args: Any, **what: Any) -> None:
    _, _, header, regions, filled = args
    length = int.from_bytes(header[12:16], "little")
    if filled == HEADER_NBYTES + regions[0].nbytes and length > HEADER_NBYTES:
        raise MemoryError(length)
    verify(*args, **what)


def fails_on_another_version(*args: Any, **what: Any) -> None:
    """Takes what it cannot read for damage, as an older build would in a mixed fleet."""
    try:
        verify(*args, **what)
    except FrameError as exc:
        raise FrameError(
            Cause.CORRUPT if exc.cause is Cause.FOREIGN_VERSION else exc.cause, exc.detail
        ) from None


KEPT: list[object] = []


def keeps_a_view(*args: Any, **what: Any) -> None:
    verify(*args, **what)
    KEPT[:] = [args[3][0][:1]]


def repairs(*args: Any, **what: Any) -> None:
    verify(*args, **what)
    args[3][0][0] ^= 1


FRAME_LIARS: dict[str, tuple[dict[str, Callable[..., object]], str]] = {
    "repairs": ({"read_object": repairs}, "what was written is accepted and unchanged"),
    "keeps the page": (
        {"write_object": keeps_the_page},
        "nothing of a pages former content is written",
    ),
    "pads the slot": (
        {"write_object": pads_the_slot},
        "nothing of a pages former content is written",
    ),
    "keeps the padding": (
        {"write_object": keeps_the_padding},
        "nothing of a pages former content is written",
    ),
    "ignores a short read": (
        {"read_object": ignoring(Cause.TRUNCATED)},
        "a frame cut anywhere is refused",
    ),
    "trusts the first segment": (
        {"read_object": trusts_the_first_segment},
        "a flipped bit of the payload is corrupt",
    ),
    "skips the map's checksum": (
        {"read_object": skips_the_maps_checksum},
        "a flipped bit of the header is refused",
    ),
    "fails on another version": (
        {"read_object": fails_on_another_version},
        "another version is foreign",
    ),
    "ignores the key": (
        {"read_object": ignoring(Cause.MISPLACED)},
        "another objects frame is misplaced",
    ),
    "believes lengths": ({"read_object": believes_lengths}, "noise is refused and never an error"),
    "keeps a view": ({"read_object": keeps_a_view}, "it keeps no view of what it was given"),
}


@pytest.mark.parametrize("lie", FRAME_LIARS)
def test_a_lying_frame_fails_exactly_the_promise_it_breaks(lie: str) -> None:
    functions, name = FRAME_LIARS[lie]
    asked = type("Asked", (FrameSuite,), {k: staticmethod(f) for k, f in functions.items()})
    assert broken_in(asked()) == [name]


def test_every_promise_of_a_frame_has_a_liar() -> None:
    assert {name for _, name in FRAME_LIARS.values()} == {p.name for p in FrameSuite.promises()}

"""A backend seen by key: it hears names, its owner keys, and of foreign ones nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from hashlib import sha256
from traceback import format_exception
from typing import Any

import pytest

from kvlayer._masked import Mask
from kvlayer.abc.backend import Damaged, Hit, Listed, Miss, Read, Write
from kvlayer.errors import BackendError, NoRoomError
from kvlayer.identity.keys import Encoding, ObjectKey, ObjectName, Part
from kvlayer.testing.loan import PAGE
from kvlayer.testing.memory import MemoryBackend
from kvlayer.tier.transfer.named import ListedAs, Named

PART = Part(0, (0, 3), (0, 2))


def key(number: int) -> ObjectKey:
    return ObjectKey.of("ab" * 32, "0", sha256(b"%d" % number).digest(), 16, PART)


def foreign(number: int) -> ObjectName:
    return ObjectName.made(key(number), Encoding(3, "raw"))


class Lister:
    """What a listing of the backend below gives."""

    def __init__(self, entries: list[Any]) -> None:
        self.entries = entries

    async def __call__(self, prefix: str = "", /) -> AsyncIterator[Any]:
        for entry in self.entries:
            yield entry


@pytest.fixture
def named() -> Named:
    return Named(MemoryBackend())


def page(fill: int = 0) -> memoryview:
    return memoryview(bytearray([fill]) * PAGE)


@pytest.mark.asyncio
async def test_every_call_goes_under_the_name_of_this_builds_encoding(named: Named) -> None:
    assert await named.put([Write(key(1), (page(7),))]) == [None]
    assert list(named.objects) == [f"{key(1)}/2.raw"]
    assert await named.contains([key(1), key(2)]) == [PAGE, None]
    into = page()
    hit, miss = await named.get([Read(key(1), (into,)), Read(key(2), (page(),))])
    assert (hit, miss, into) == (Hit(PAGE), Miss(), page(7))
    await named.touch([key(1)])
    assert isinstance(hit, Hit)
    assert await named.quarantine([Damaged(key(1), hit.version)]) == [None]
    assert await named.contains([key(1)]) == [None]
    await named.put([Write(key(1), (page(7),))])
    assert await named.delete([key(1), key(2)]) == [None, None]
    assert list(named.objects) == []


@pytest.mark.asyncio
async def test_an_object_in_another_encoding_is_another_object(named: Named) -> None:
    named.objects[foreign(1)] = bytes(PAGE)
    assert await named.contains([key(1)]) == [None]
    await named.delete([key(1)])
    assert list(named.objects) == [foreign(1)]


@pytest.mark.asyncio
async def test_a_listing_gives_keys_and_counts_what_it_leaves_out(
    named: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [
        Listed(ObjectName.raw(key(1)), 1, 2.0),
        Listed(foreign(2), 3, 4.0),
        Listed(key(3), 5, 6.0),  # no name at all
        "no entry",
    ]
    monkeypatch.setattr(named.backend, "list", Lister(entries))
    assert [entry async for entry in named.list()] == [ListedAs(key(1), 1, 2.0, 1), "no entry"]
    assert named.foreign == 2
    encoding = foreign(2).rpartition("/")[2]
    assert named.foreign_encodings == {encoding: 1, str(key(3).part): 1}


def test_what_comes_and_goes_is_told_by_key_and_of_others_nothing() -> None:
    below = MemoryBackend()
    named = Named(below)
    told: list[Any] = []
    assert below.on_evicted is not None and below.on_stored is not None
    below.on_evicted([(ObjectName.raw(key(1)), 5)], "nobody listens yet")
    named.on_evicted = lambda gone, policy: told.append((gone, policy))
    named.on_stored = told.append
    below.on_evicted([(ObjectName.raw(key(1)), 5), (foreign(2), 6)], "lru")
    below.on_evicted([(foreign(2), 6)], "lru")
    below.on_stored([(foreign(3), 7), (ObjectName.raw(key(4)), 8)])
    assert told == [([(key(1), 5)], "lru"), [(key(4), 8)]]


def test_it_is_what_it_stands_for() -> None:
    below = MemoryBackend()
    named = Named(below)
    assert (named.scheme, named.capabilities) == (below.scheme, below.capabilities)
    assert named.objects is below.objects
    assert not hasattr(named, "nothing_of_the_kind")


HIDDEN = "hunter2hunter2"
CALLS: dict[str, Any] = {
    "open": lambda named: named.open(),
    "aclose": lambda named: named.aclose(),
    "contains": lambda named: named.contains([key(1)]),
    "get": lambda named: named.get([Read(key(1), (page(),))]),
    "put": lambda named: named.put([Write(key(1), (page(),))]),
    "delete": lambda named: named.delete([key(1)]),
    "quarantine": lambda named: named.quarantine([Damaged(key(1))]),
    "touch": lambda named: named.touch([key(1)]),
    "describe": lambda named: named.describe("ab" * 32, b""),
    "namespaces": lambda named: named.namespaces(),
    "introduce": lambda named: named.introduce(page()),
    "withdraw": lambda named: named.withdraw(page()),
    "list": lambda named: anext(named.list()),
}


def refusing(call: str, error: BaseException, *, is_late: bool) -> Named:
    """A backend whose ``call`` raises: at once, or when it is awaited."""

    async def late(*_: object) -> None:
        raise error

    def at_once(*_: object) -> None:
        raise error

    backend = MemoryBackend()
    setattr(backend, call, late if is_late and call != "list" else at_once)
    return Named(backend, Mask(f"mine://host?endpoint={HIDDEN}&capacity=1GiB"))


@pytest.mark.parametrize("is_late", [True, False])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.asyncio
async def test_no_error_of_a_backend_says_what_its_url_must_not(call: str, is_late: bool) -> None:
    ours = NoRoomError(f"no room at {HIDDEN}", hint=f"is {HIDDEN} up?")
    ours.transient = True
    with pytest.raises(NoRoomError, match=r"no room at \*\*\*") as caught:
        await CALLS[call](refusing(call, ours, is_late=is_late))
    assert caught.value.transient
    assert HIDDEN not in "".join(format_exception(caught.value))
    theirs = ConnectionError("refused")
    theirs.__cause__ = OSError(f"connecting to {HIDDEN}")
    with pytest.raises(BackendError, match="refused") as caught_theirs:
        await CALLS[call](refusing(call, theirs, is_late=is_late))
    assert HIDDEN not in "".join(format_exception(caught_theirs.value))
    plain = ConnectionError("of 1GiB nothing is left")
    with pytest.raises(ConnectionError) as caught_plain:
        await CALLS[call](refusing(call, plain, is_late=is_late))
    assert caught_plain.value is plain


@pytest.mark.parametrize("call", ["contains", "get", "put", "delete", "quarantine"])
@pytest.mark.asyncio
async def test_no_error_in_an_answer_does_either(call: str) -> None:
    named = Named(MemoryBackend(), Mask(f"mine://host?endpoint={HIDDEN}"))

    async def answers(*_: object) -> list[object]:
        return [BackendError(f"{HIDDEN} is full"), None]

    setattr(named.backend, call, answers)
    error, other = await CALLS[call](named)
    assert isinstance(error, BackendError)
    assert (str(error), other) == ("*** is full", None)


class OwnError(BackendError):
    """With arguments of its own."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"{host}:{port} is gone")


def test_a_mask_leaves_what_is_no_secret() -> None:
    mask = Mask(
        f"m://?a=1234567&b=8GiB&c=true&d=short&e=prefix-lru&f={HIDDEN}",
        public=frozenset({"prefix-lru"}),
    )
    said = f"1234567 8GiB true short prefix-lru {HIDDEN}"
    assert mask.text(said) == "1234567 8GiB true short prefix-lru ***"
    assert not Mask("file:///kv?capacity=1GiB")
    own = mask.cleaned(OwnError(HIDDEN, 80))
    assert str(own) == "OwnError: ***:80 is gone"
    untouched = OwnError("host", 80)
    assert mask.cleaned(untouched) is untouched

"""A promise: one sentence of a contract, and the code that finds out whether it is kept."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn, Protocol, TypeVar

__all__ = ["Broken", "Hung", "Need", "Promise", "broken", "expect", "promise", "same_bytes"]

S = TypeVar("S")
T = TypeVar("T")


class Need(StrEnum):
    """What a promise can only be looked at with. The value says so in a report."""

    LIST = "the backend does not list (Capability.LIST)"
    NO_LIST = "the backend lists (Capability.LIST)"
    PERSISTENT = "objects do not outlive the process (Capability.PERSISTENT)"
    SHARED = "the backend is not shared (Capability.SHARED)"
    REVOCABLE = "calls cannot be revoked (Capability.REVOCABLE)"
    INTRODUCED = "introduced memory means nothing to it (introduce)"
    URL = "it is not built from a URL"
    DIRECTORY = "its URL names no fresh directory ({directory})"
    SMALL = "no small tier to fill (small_url, with a capacity)"
    TRUNCATE = "nothing can shorten a stored object (truncate)"
    DISPOSABLE = "it cannot be undone, and the tier may hold what others need"


class Broken(AssertionError):  # noqa: N818  # what the promise is
    """A promise was not kept."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}; found {found}")
        self.expected = expected
        self.found = found


class Hung(Broken):
    """A promise was not kept in time. ``where`` shows what still waits."""

    def __init__(self, where: str) -> None:
        super().__init__("an answer in bounded time", "none; what still waits:\n" + where)


@dataclass(frozen=True, slots=True)
class Promise:
    """``check`` raises :class:`Broken`, or whatever the tested thing raises, if it is not kept.

    ``contract`` quotes the sentence that ``check`` holds the tested thing to.
    """

    name: str
    contract: str
    check: Callable[[Any, Any], Coroutine[Any, Any, None]]
    needs: tuple[Need, ...] = ()

    def __str__(self) -> str:
        return self.name


class PromiseTest(Protocol):
    """A test method that was declared as a promise."""

    promise: Promise

    def __call__(self, suite: Any, /) -> None: ...


def promise(
    contract: str, *needs: Need
) -> Callable[[Callable[[Any, S], Coroutine[Any, Any, None]]], Callable[[Any], None]]:
    """Declare a coroutine method ``test_...(self, subject)`` of a suite as a promise.

    It becomes a plain method without arguments, which any runner of tests can call: whatever the
    mode of an asyncio plugin, the suite brings a loop of its own.
    """

    def declare(check: Callable[[Any, S], Coroutine[Any, Any, None]]) -> Callable[[Any], None]:
        name = check.__name__.removeprefix("test_").replace("_", " ")
        declared = Promise(name, " ".join(contract.split()), check, needs)

        def test(self: Any) -> None:
            __tracebackhide__ = True
            self.verify(declared)

        test.__name__, test.__qualname__ = check.__name__, check.__qualname__
        test.__module__, test.__doc__ = check.__module__, check.__doc__ or declared.contract
        test.promise = declared  # type: ignore[attr-defined]
        return test

    return declare


def broken(expected: str, found: object) -> NoReturn:
    """Say that a promise is broken."""
    __tracebackhide__ = True
    raise Broken(expected, found if isinstance(found, str) else repr(found))


def expect(found: T, expected: T, what: str) -> None:
    """Raise :class:`Broken` unless ``found == expected``; ``what`` says of what."""
    __tracebackhide__ = True
    if found != expected:
        raise Broken(f"{what} to be {_short(expected)}", _short(found))


def same_bytes(found: bytes | bytearray | memoryview, expected: bytes, what: str) -> None:
    """Raise :class:`Broken` unless the bytes are equal, naming the first that is not."""
    __tracebackhide__ = True
    found = bytes(found)  # compared by memcmp; a memoryview would be, element by element
    if found == expected:
        return
    if len(found) != len(expected):
        raise Broken(f"{len(expected)} bytes of {what}", f"{len(found)} bytes")
    at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    raise Broken(
        f"the {len(expected)} bytes of {what} as they were written",
        f"byte {at} is {found[at]:#04x}, not {expected[at]:#04x}",
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:280]}... ({len(text)} characters)"

"""A backend whose every answer is constructed to be wrong, and what foreign code may raise.

Beside :mod:`kvlayer.testing.lying`, whose lies are plausible: here counts, types and sizes are not.
It keeps the one rule that nobody can check from outside: lent memory is let alone once a call has
returned.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Sequence
from random import Random
from typing import Any

from kvlayer.abc.backend import Backend, Hit, Listed, Miss, Read, Write
from kvlayer.errors import BackendError, BackendUnavailableError
from kvlayer.identity.keys import ObjectKey
from kvlayer.testing.faults import Injected, Wrapper

__all__ = ["Wayward", "raised", "raises"]


class Own(BaseException):
    """Somebody's own way out."""


class Mute(Exception):  # noqa: N818  # as people name them
    """An error that cannot even be printed."""

    def __str__(self) -> str:
        raise ZeroDivisionError


_KINDS: tuple[Callable[[], BaseException], ...] = (
    lambda: SystemExit(3),
    GeneratorExit,
    lambda: asyncio.CancelledError("made up"),
    lambda: Own("x" * 5000),
    Mute,
    lambda: StopIteration(1),
    StopAsyncIteration,
    RecursionError,
    MemoryError,
    TimeoutError,
    lambda: OSError(errno.EIO, "I/O\nerror"),
    lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    lambda: BaseExceptionGroup("two", [SystemExit(1), KeyError("a")]),
    lambda: BackendError("the shelf fell"),
    lambda: BackendUnavailableError("not now"),
)


def raised(chance: Random) -> BaseException:
    """What foreign code raises; ``KeyboardInterrupt``, which is the user's, is not among it."""
    return chance.choice(_KINDS)()


def raises(chance: Random, share: float) -> Callable[..., None]:
    """A callback that raises a ``share`` of the time, whatever it is called with."""

    def callback(*_: object) -> None:
        if chance.random() < share:
            raise raised(chance)

    return callback


class Wayward(Wrapper):
    """A ``share`` of its calls goes wrong in a way that is drawn; one in four of those is late."""

    def __init__(
        self, inner: Backend, chance: Random, log: list[Injected], *, share: float, seconds: float
    ) -> None:
        super().__init__(inner, chance, log)
        self.share = share
        self.seconds = seconds
        self.cured = asyncio.Event()

    def heal(self) -> None:
        """Answer rightly from now on, and what hangs, too."""
        self.is_ill = False
        self.cured.set()

    async def around(self, call: str, work: Callable[[], Any]) -> Any:
        if not self.strikes(self.share):
            return await work()
        match self.chance.randrange(8):
            case 0:
                error = raised(self.chance)
                self.note(call, type(error).__name__)
                raise error
            case 1:
                self.note(call, "late")
                await asyncio.sleep(self.seconds * self.chance.choice([0.5, 1.5, 4.0]))
                return await work()
            case 2:
                self.note(call, "never")
                await self.cured.wait()
                return await work()
            case 3:
                self.note(call, "refusing")
                while not self.cured.is_set():
                    try:
                        await self.cured.wait()
                    except asyncio.CancelledError:
                        pass
                return await work()
            case _:
                return self._spoilt(call, await work())

    def _spoilt(self, call: str, answer: Any) -> Any:
        """Another answer, of another type or length; or a right one with something wrong in it."""
        items = list(answer) if isinstance(answer, list) else []
        at = self.chance.randrange(len(items)) if items else 0
        wrong = self.chance.choice(
            [
                *(None, 5, "yes", b"", {}, ..., True, object()),
                *(items[1:], items * 2, [*items, None], tuple(items), iter(items), set[int]()),
                *([[each] for each in items], [None] * (len(items) + 1), [raised(self.chance)]),
                *(self._one(items, at) for _ in range(12)),
            ]
        )
        self.note(call, f"answers {type(wrong).__name__}")
        return wrong

    def _one(self, items: list[Any], at: int) -> list[Any]:
        """The right answer with one item that is none."""
        nbytes = items[at].nbytes if items and isinstance(items[at], Hit) else 8192
        odd: Any = self.chance.choice(
            [
                *(None, -1, 0, 1, 2**70, 1.5, float("nan"), True, "8192", b"8192", [8192], ...),
                *(Hit(0), Hit(-1), Hit(nbytes + 1), Hit(nbytes - 1), Hit(2**70), Hit(1 << 12)),
                *(Hit("8192"), Hit(None), Hit(8192.0)),  # type: ignore[arg-type]
                *(Miss, Miss(), BackendError, BackendError("no"), ZeroDivisionError("x")),
                Listed("a", 1, 0.0),  # type: ignore[arg-type]
                raised(self.chance),
            ]
        )
        return [*items[:at], odd, *items[at + 1 :]]

    # -- with more, or less, than was asked -------------------------------------------------------

    async def put(self, writes: Sequence[Write], /) -> Any:
        kept = list(writes)
        if kept and self.strikes(self.share / 2):
            at = self.chance.randrange(len(kept))
            write = kept[at]
            raw = b"".join(bytes(region) for region in write.regions)
            other = self.chance.choice(
                [raw + b"more", raw + bytes(4096), raw[:-1], raw[: len(raw) // 2], raw[:100], b""]
            )
            self.note("put", f"keeps {len(other)} bytes of {len(raw)}", write.key)
            memory = memoryview(bytearray(other))
            kept[at] = Write(write.key, (memory,), write.first_token, write.tokens)
        return await super().put(kept)

    async def get(self, reads: Sequence[Read], /) -> Any:
        if reads and self.strikes(self.share / 2):
            self.note("get", "another object's bytes, or noise", reads[0].key)
            for region in reads[0].regions:
                region[:] = self.chance.randbytes(region.nbytes)
            rest = await super().get(reads[1:]) if len(reads) > 1 else []
            return [Hit(reads[0].nbytes), *rest]
        return await super().get(reads)

    async def list(self, prefix: str = "", /) -> AsyncIterator[Any]:  # type: ignore[override]
        async for listed in super().list(prefix):
            if self.strikes(self.share / 4):
                self.note("list", "lists nonsense")
                match self.chance.randrange(5):
                    case 0:
                        yield self.chance.choice([None, 5, "key", listed.key, Listed("a/b", 1, 0)])
                    case 1:
                        for _ in range(3000):
                            yield listed
                    case 2:
                        raise raised(self.chance)
                    case 3:
                        await self.cured.wait()
                    case _:
                        yield Listed(ObjectKey(str(listed.key)[::-1]), -5, float("nan"))
            yield listed

    def gossip(self) -> None:
        """Tell the owner of objects that never were, that are, and of what is no object."""
        known = [ObjectKey("ab/cd"), *getattr(self.inner, "objects", {})]
        told: Any = [(self.chance.choice(known), self.chance.choice([0, 8192, 2**70]))]
        self.note("on_stored", "gossip")
        for hook, more in ((self.on_stored, ()), (self.on_evicted, ("gossip",))):
            if hook is not None and self.chance.random() < 0.5:
                hook(told, *more)

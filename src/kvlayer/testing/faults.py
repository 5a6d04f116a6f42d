"""Backends that stand in front of another one and spoil it: slow, flaky, late, dying.

One that lies is in :mod:`~kvlayer.testing.lying`.

All compose, draw from a source of chance that the test seeds, and write down what they did::

    log: list[Injected] = []
    chance = random.Random(seed)
    tier = Dying(Slow(MemoryBackend(), chance, log), chance, log)
    backends = BACKENDS.extended({"sick": given(tier)})

Each obeys the contract of :class:`~kvlayer.abc.backend.Backend` in what it does not spoil; only
:class:`Trespassing` breaks the rule on lent memory, for tests that must notice. They keep time by
the running loop. ``is_ill = False`` heals one: what it has begun it still ends its way.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any, ClassVar, Self, TypeAlias, TypeVar

from kvlayer.abc.backend import (
    Backend,
    Damaged,
    DeleteResult,
    Listed,
    Read,
    ReadResult,
    SizeResult,
    Write,
    WriteResult,
)
from kvlayer.errors import BackendError, BackendUnavailableError, UnsupportedError
from kvlayer.identity.keys import ObjectKey
from kvlayer.urls import BackendURL

__all__ = [
    "Dying",
    "Flaky",
    "Injected",
    "Late",
    "Slow",
    "Trespassing",
    "Wrapper",
    "given",
    "tally",
]

T = TypeVar("T")
_Told: TypeAlias = Callable[[list[tuple[ObjectKey, int]], str], None] | None


@dataclass(frozen=True, slots=True)
class Injected:
    """One fault: when by the loop's clock, in which call, and what was done to it."""

    at: float
    call: str
    fault: str
    key: ObjectKey | None = None


def tally(log: Iterable[Injected]) -> dict[str, int]:
    """How often each fault was injected, as ``fault in call``; the most frequent first."""
    return dict(Counter(f"{each.fault} in {each.call}" for each in log).most_common())


def given(backend: Backend, scheme: str = "sick") -> type[Backend]:
    """A class whose ``from_url`` hands out ``backend``, for ``BACKENDS.extended({scheme: ...})``.

    Whatever the URL says; use it for one cache. ``scheme`` is what reports call the tier.
    """
    setattr(backend, "scheme", scheme)  # noqa: B010  # of this one, not of its class

    def from_url(cls: type[Backend], url: BackendURL, /) -> Backend:
        return backend

    name = f"Given{type(backend).__name__}"
    return type(name, (type(backend),), {"from_url": classmethod(from_url), "scheme": scheme})


class Wrapper(Backend):
    """In front of ``inner``: passes everything on. A subclass spoils some of it.

    ``chance`` is what it draws from; ``log`` gets what it does.
    """

    scheme: ClassVar[str] = "wrapped"

    def __init__(self, inner: Backend, chance: Random, log: list[Injected] | None = None) -> None:
        self.inner = inner
        self.chance = chance
        self.log: list[Injected] = [] if log is None else log
        self.capabilities = inner.capabilities
        self.is_ill = True
        """Whether it spoils anything from now on."""

    @classmethod
    def from_url(cls, url: BackendURL, /) -> Self:
        raise UnsupportedError(
            f"{cls.__name__} stands in front of another backend and has no URL",
            hint="build it, and register kvlayer.testing.faults.given(it)",
        )

    def note(self, call: str, fault: str, key: ObjectKey | None = None) -> None:
        """Write a fault down."""
        self.log.append(Injected(asyncio.get_running_loop().time(), call, fault, key))

    def strikes(self, share: float) -> bool:
        """Whether a fault of this probability comes now."""
        return self.is_ill and self.chance.random() < share

    async def around(self, call: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Carry out one call of ``inner``. What stands here comes before and after any call."""
        return await work()

    # ``on_evicted`` is a variable of the interface: whoever sets it means the backend that evicts.
    @property
    def on_evicted(self) -> _Told:
        return self.inner.on_evicted

    @on_evicted.setter
    def on_evicted(self, told: _Told) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.inner.on_evicted = told

    async def open(self) -> None:
        await self.inner.open()

    async def aclose(self) -> None:
        await self.inner.aclose()

    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        return await self.around("contains", lambda: self.inner.contains(keys))

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        return await self.around("get", lambda: self.inner.get(reads))

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        return await self.around("put", lambda: self.inner.put(writes))

    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        return await self.around("delete", lambda: self.inner.delete(keys))

    async def quarantine(self, items: Sequence[Damaged], /) -> list[DeleteResult]:
        return await self.around("quarantine", lambda: self.inner.quarantine(items))

    async def touch(self, keys: Sequence[ObjectKey], /) -> None:
        await self.around("touch", lambda: self.inner.touch(keys))

    async def describe(self, namespace: str, canonical: bytes, /) -> None:
        await self.around("describe", lambda: self.inner.describe(namespace, canonical))

    async def namespaces(self) -> Mapping[str, bytes]:
        return await self.around("namespaces", self.inner.namespaces)

    async def list(self, prefix: str = "", /) -> AsyncIterator[Listed]:
        await self.around("list", _nothing)
        async for listed in self.inner.list(prefix):
            yield listed


async def _nothing() -> None:
    """Nothing to wait for."""


class Slow(Wrapper):
    """Every call takes between ``seconds[0]`` and ``seconds[1]`` longer, before or after it."""

    def __init__(
        self,
        inner: Backend,
        chance: Random,
        log: list[Injected] | None = None,
        *,
        seconds: tuple[float, float] = (0.0, 0.01),
    ) -> None:
        super().__init__(inner, chance, log)
        self.seconds = seconds

    async def around(self, call: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if not self.is_ill:
            return await work()
        seconds = self.chance.uniform(*self.seconds)
        before = seconds * self.chance.choice((0.0, 0.5, 1.0))
        self.note(call, "delayed")
        await asyncio.sleep(before)
        result = await work()
        await asyncio.sleep(seconds - before)
        return result


class Flaky(Wrapper):
    """Of all calls a ``share`` raises, and of all items of a batch a ``share`` fails alone.

    ``errors`` are drawn from; by default one that may pass and one that will not. A write that is
    said to have failed was carried out in every second case, as when the answer was lost.
    """

    def __init__(
        self,
        inner: Backend,
        chance: Random,
        log: list[Injected] | None = None,
        *,
        share: float = 0.1,
        errors: Sequence[Callable[[str], Exception]] = (BackendUnavailableError, BackendError),
    ) -> None:
        super().__init__(inner, chance, log)
        self.share = share
        self.errors = errors

    async def around(self, call: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if not self.strikes(self.share):
            return await work()
        error = self.chance.choice(self.errors)
        self.note(call, f"raised {getattr(error, '__name__', 'an error')}")
        raise error("injected: the call failed")

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        results = await super().get(reads)
        return [self._spoiled("get", r.key, at) for r, at in zip(reads, results, strict=True)]

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        failed = {w.key: self._spoiled("put", w.key, None) for w in writes}
        is_done = self.chance.random() < 0.5
        todo = [w for w in writes if is_done or failed[w.key] is None]
        done = iter(await super().put(todo))
        results = {w.key: next(done) for w in todo}
        return [failed[w.key] or results[w.key] for w in writes]

    def _spoiled(self, call: str, key: ObjectKey, result: T) -> T | BackendError:
        if not self.strikes(self.share):
            return result
        errors = [e for e in self.errors if isinstance(e, type) and issubclass(e, BackendError)]
        error: type[BackendError] = self.chance.choice(errors or [BackendUnavailableError])
        self.note(call, f"answered {error.__name__}", key)
        return error("injected: the item failed")


class Late(Wrapper):
    """A ``share`` of reads and writes is carried out ``seconds`` after it was asked for.

    As a thread in a system call, it is deaf to being cancelled: the call returns when the bytes
    have landed, and raises ``CancelledError`` then. Put ``seconds`` past a deadline.
    """

    def __init__(
        self,
        inner: Backend,
        chance: Random,
        log: list[Injected] | None = None,
        *,
        share: float = 0.2,
        seconds: tuple[float, float] = (1.0, 3.0),
    ) -> None:
        super().__init__(inner, chance, log)
        self.share = share
        self.seconds = seconds

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        if not self.strikes(self.share):
            return await super().get(reads)
        self.note("get", "landed late", reads[0].key if reads else None)
        return await self._deaf(self._get_later(self._lent_reads(reads)))

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        if not self.strikes(self.share):
            return await super().put(writes)
        self.note("put", "landed late", writes[0].key if writes else None)
        return await self._deaf(self._put_later(self._lent_writes(writes)))

    def _lent_reads(self, reads: Sequence[Read]) -> Sequence[Read]:
        return reads

    def _lent_writes(self, writes: Sequence[Write]) -> Sequence[Write]:
        return writes

    async def _get_later(self, reads: Sequence[Read]) -> list[ReadResult]:
        await asyncio.sleep(self.chance.uniform(*self.seconds))
        return await super().get(reads)

    async def _put_later(self, writes: Sequence[Write]) -> list[WriteResult]:
        await asyncio.sleep(self.chance.uniform(*self.seconds))
        return await super().put(writes)

    async def _deaf(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for ``work`` whatever happens to the waiter."""
        task = asyncio.ensure_future(work)
        was_cancelled = False
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError:
                was_cancelled = True
        if was_cancelled:
            task.exception()
            raise asyncio.CancelledError
        return task.result()


class Trespassing(Late):
    """Breaks the rule on lent memory: a call that is cancelled returns at once, and its bytes land
    later all the same, wherever that is by then. A test that uses it must fail.
    """

    @cached_property
    def _running(self) -> set[asyncio.Task[Any]]:
        return set()

    def _lent_reads(self, reads: Sequence[Read]) -> Sequence[Read]:
        # Views of its own, as a pointer is: they outlive what the lender releases.
        return [Read(r.key, tuple(map(memoryview, r.regions)), r.offset) for r in reads]

    def _lent_writes(self, writes: Sequence[Write]) -> Sequence[Write]:
        return [Write(w.key, tuple(map(memoryview, w.regions))) for w in writes]

    async def _deaf(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def aclose(self) -> None:
        if self._running:
            await asyncio.wait(self._running)
        await super().aclose()


class Dying(Wrapper):
    """Lives for a while, answers nothing for a while, and comes back; again and again.

    It lives ``lives`` seconds (drawn between the two) from its first call on, is dead for ``dies``
    seconds, and so on, ``deaths`` times at most. A call that meets its death, before or after it
    was carried out, is answered when it comes back (a share of ``answers``), or never: then only
    cancelling ends it.
    """

    def __init__(
        self,
        inner: Backend,
        chance: Random,
        log: list[Injected] | None = None,
        *,
        lives: tuple[float, float] = (0.0, 2.0),
        dies: tuple[float, float] = (0.5, 5.0),
        deaths: int = 1,
        answers: float = 0.5,
    ) -> None:
        super().__init__(inner, chance, log)
        self.lives = lives
        self.dies = dies
        self.deaths = deaths
        self.answers = answers
        self._is_dead = False
        self._turns_at: float | None = None
        """When it dies or comes back."""

    @property
    def is_dead(self) -> bool:
        """Whether it answers nothing now."""
        now = asyncio.get_running_loop().time()
        if self._turns_at is None:
            self._turns_at = now + self.chance.uniform(*self.lives)
        while now >= self._turns_at and (self._is_dead or self.deaths):
            self._is_dead = not self._is_dead
            self.deaths -= self._is_dead
            self._turns_at += self.chance.uniform(*(self.dies if self._is_dead else self.lives))
        return self._is_dead and self.is_ill

    async def around(self, call: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        await self._survive(call, "died before")
        result = await work()
        await self._survive(call, "died after")
        return result

    async def _survive(self, call: str, fault: str) -> None:
        if not self.is_dead:
            return
        self.note(call, fault)
        if self.chance.random() >= self.answers:
            await asyncio.get_running_loop().create_future()  # nobody will
        while self.is_dead:
            assert self._turns_at is not None
            await asyncio.sleep(max(self._turns_at - asyncio.get_running_loop().time(), 0.001))

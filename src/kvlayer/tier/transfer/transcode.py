"""Objects coded anew on the tier they lie on: the new one is put and verified, then the old goes.

Whatever happens in between, the object is there, in one encoding or in both: who finds both may do
it again, and ends with one. It decides nothing: which objects, and when, is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from kvlayer.abc.backend import Damaged, Miss, Read, Version, Write
from kvlayer.codec.frame import FrameError
from kvlayer.errors import BackendError
from kvlayer.identity.keys import Part
from kvlayer.memory.arena import Arena
from kvlayer.payload import Payload
from kvlayer.results import Cause
from kvlayer.runtime.foreign import awaited, words
from kvlayer.tier.messages import Outcome
from kvlayer.tier.planner.copies import copy_of
from kvlayer.tier.transfer.checks import Checks
from kvlayer.tier.transfer.coding import checksum
from kvlayer.tier.transfer.encodings import Coding
from kvlayer.tier.transfer.faults import fault_of
from kvlayer.tier.transfer.relay import End, Relayed

__all__ = ["Transcode"]

_GONE = "the tier no longer has it"


class _Failed(Exception):  # noqa: N818  # an outcome
    """It ends here. ``version``: of the bytes that are no such object."""

    def __init__(self, cause: Cause, detail: str, version: Version = None) -> None:
        super().__init__(detail)
        self.cause = cause
        self.detail = detail
        self.version = version


class _Found(NamedTuple):
    """One copy of an object, verified: its payload, where it lies in scratch, and its bytes."""

    payload: memoryview
    digest: int
    nbytes: int
    version: Version


class _Room(NamedTuple):
    """Scratch for one object: two frames, and what each is decoded into."""

    old: memoryview
    old_body: memoryview
    new: memoryview
    new_body: memoryview

    @classmethod
    def cut(cls, memory: memoryview, frame: int, half: int) -> _Room:
        old, new = memory[:half], memory[half:]
        return cls(old[:frame], old[frame:], new[:frame], new[frame:])


class Transcode:
    """Codes through ``arena``, an object at a time. The caller bounds how long that takes."""

    def __init__(
        self,
        arena: Arena,
        checks: Checks,
        shape: Callable[[Part, int], Payload],
        *,
        wall_clock: Callable[[], float],
        build: str,
    ) -> None:
        self._arena = arena
        self._checks = checks
        self._shape = shape
        self._wall_clock = wall_clock
        self._build = build

    async def run(self, objects: Sequence[Relayed], tier: End, to: int = 0) -> list[Outcome]:
        """Leave objects in one encoding, number ``to`` of the tier's; aligned outcomes.

        What lies there in that already is verified, and what there is of it in others goes. After
        a failure nothing has gone but what was found not to be the object. Cancelled, it returns
        when the backend has let go of the scratch.
        """
        return [await self._outcome(each, tier, to) for each in objects]

    async def _outcome(self, each: Relayed, tier: End, to: int) -> Outcome:
        payload = self._shape(each.key.part, each.key.tokens)
        frame = max(coding.frame_nbytes(payload) for coding in tier.codings)
        total = 2 * (frame + payload.nbytes)
        if total > self._arena.nbytes:
            detail = f"it needs {total} bytes of scratch, of {self._arena.nbytes} there are"
            return Outcome(each.key, Cause.NO_ROOM, detail)
        while (scratch := self._arena.take([total])) is None:
            await self._arena.given_back()
        try:
            (memory,) = scratch.parts
            work = _Work(self, each, payload, tier, _Room.cut(memory, frame, total // 2))
            nbytes = await work.to(tier.codings[to])
            return Outcome(each.key, nbytes=nbytes, copy=copy_of(to + 1, nbytes))
        except _Failed as failed:
            return Outcome(each.key, failed.cause, failed.detail, version=failed.version)
        except BackendError as exc:
            return Outcome(each.key, *fault_of(exc))
        finally:
            scratch.give_back()

    async def on_thread(self, work: Callable[[], None], nbytes: int) -> None:
        """What reads or codes bytes. Raises what it raises."""
        await self._checks.run(work, nbytes)

    def coded(
        self, coding: Coding, each: Relayed, payload: Payload, body: memoryview, into: memoryview
    ) -> tuple[memoryview, ...]:
        """The object as it will lie there."""
        return coding.frame(
            each.key,
            payload,
            (body,),
            into,
            first_token=each.first_token,
            created=self._wall_clock(),
            build=self._build,
            parent=each.parent,
        )


class _Work:
    """One object."""

    def __init__(
        self,
        owner: Transcode,
        each: Relayed,
        payload: Payload,
        tier: End,
        room: _Room,
    ) -> None:
        self._owner = owner
        self._each = each
        self._payload = payload
        self._tier = tier
        self._room = room

    async def to(self, target: Coding) -> int:
        """Bytes that the object takes now. Raises :class:`_Failed` and ``BackendError``."""
        others = [coding for coding in self._tier.codings if coding is not target]
        found, trouble = await self._source(others)
        if found is not None:
            await self._put(target, found)
        try:
            new = await self._read(target, self._room.new, self._room.new_body)
        except _Failed as failed:
            if failed.cause.is_damage:  # else it would stand in the way of a right one for ever
                await self._aside(target, failed.version)
            raise
        if new is None:
            raise trouble or _Failed(Cause.VANISHED, _GONE)
        if found is not None and new.digest != found.digest:
            await self._aside(target, new.version)
            raise _Failed(Cause.CORRUPT, f"coded as {target.encoding} it is another object")
        names = [self._tier.name(self._each.key, coding) for coding in others]
        for error in await awaited(partial(self._tier.backend.delete, names)) if names else ():
            if error is not None:
                raise error
        return new.nbytes

    async def _source(self, others: Sequence[Coding]) -> tuple[_Found | None, _Failed | None]:
        """The first copy in another encoding that is the object; what was wrong with the others."""
        trouble: _Failed | None = None
        for coding in others:
            try:
                found = await self._read(coding, self._room.old, self._room.old_body)
            except _Failed as failed:
                trouble = failed
                continue
            if found is not None:
                return found, None
        return None, trouble

    async def _read(self, coding: Coding, frame: memoryview, spare: memoryview) -> _Found | None:
        """The object in one encoding, verified; None where it is not there."""
        each, payload = self._each, self._payload
        read = Read(self._tier.name(each.key, coding), (frame[: coding.frame_nbytes(payload)],))
        (answer,) = await awaited(partial(self._tier.backend.get, [read]))
        if isinstance(answer, BackendError):
            raise answer
        if isinstance(answer, Miss):
            return None
        found: list[_Found] = []

        def unpack() -> None:
            first, filled = each.first_token, answer.nbytes
            body = coding.unpack(each.key, payload, frame, spare, first_token=first, filled=filled)
            found.append(_Found(body, checksum((body,)), filled, answer.version))

        try:
            await self._owner.on_thread(unpack, answer.nbytes)
        except FrameError as exc:
            raise _Failed(exc.cause, exc.detail, answer.version) from None
        except Exception as exc:  # noqa: BLE001  # a codec's: no evidence against the object
            raise _Failed(Cause.TIER_DOWN, words(exc)) from None
        return found[0]

    async def _put(self, target: Coding, found: _Found) -> None:
        each, payload, made = self._each, self._payload, list[tuple[memoryview, ...]]()

        def code() -> None:
            made.append(self._owner.coded(target, each, payload, found.payload, self._room.new))

        try:
            await self._owner.on_thread(code, payload.nbytes)
        except Exception as exc:  # noqa: BLE001  # a codec's: it costs this object only
            raise _Failed(Cause.TIER_DOWN, f"not coded: {words(exc)}") from None
        write = Write(
            self._tier.name(each.key, target),
            made[0],
            each.first_token,
            payload.tokens,
            each.retention,
            each.parent,
        )
        (error,) = await awaited(partial(self._tier.backend.put, [write]))
        if error is not None:
            raise error

    async def _aside(self, target: Coding, version: Version) -> None:
        """Take what was put out of sight: it must not be served."""
        damaged = Damaged(self._tier.name(self._each.key, target), version)
        (error,) = await awaited(partial(self._tier.backend.quarantine, [damaged]))
        if error is not None:
            raise error

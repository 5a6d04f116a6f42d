"""Frames from one lower tier to another as they are: verified on the way, never decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from kvlayer.abc.backend import Backend, Hit, Read, Write
from kvlayer.codec.frame import FrameError
from kvlayer.errors import BackendError
from kvlayer.identity.keys import ObjectKey, ObjectName, Part
from kvlayer.memory.arena import Arena
from kvlayer.payload import Payload
from kvlayer.results import Cause
from kvlayer.retention import ORDINARY, Retention
from kvlayer.runtime.foreign import awaited
from kvlayer.tier.messages import Outcome
from kvlayer.tier.transfer.checks import Checks
from kvlayer.tier.transfer.encodings import Coding
from kvlayer.tier.transfer.faults import fault_of

__all__ = ["End", "Relay", "Relayed"]


class Relayed(NamedTuple):
    """An object to be relayed, and what a tier is told of one that is written: see ``Write``."""

    key: ObjectKey
    first_token: int
    retention: Retention = ORDINARY
    parent: bytes = b""


class End(NamedTuple):
    """One of the two tiers: its backend, and the encodings that it holds."""

    backend: Backend
    codings: Sequence[Coding]

    def name(self, key: ObjectKey, coding: Coding) -> ObjectKey:
        """What the backend knows the object by: it knows itself what it writes."""
        is_written = coding.encoding == self.codings[0].encoding
        return key if is_written else ObjectName.made(key, coding.encoding)


class Relay:
    """Moves frames through ``arena``. The caller bounds how long that takes."""

    def __init__(self, arena: Arena, checks: Checks, shape: Callable[[Part, int], Payload]) -> None:
        self._arena = arena
        self._checks = checks
        self._shape = shape

    async def run(self, objects: Sequence[Relayed], source: End, target: End) -> list[Outcome]:
        """Relay objects in an encoding that both tiers hold; an outcome for each, in order.

        What lies on ``source`` in an encoding that ``target`` does not hold is missed as foreign.
        Cancelled, it returns when the backends have let go of the scratch.
        """
        outcomes: dict[ObjectKey, Outcome] = {}
        held = {coding.encoding for coding in target.codings}
        for coding in source.codings:
            left = [each for each in objects if each.key not in outcomes]
            if coding.encoding not in held:
                outcomes |= await self._foreign(left, source, coding)
                continue
            while left:
                count, moved = await self._some(left, source, target, coding)
                outcomes |= moved
                left = left[count:]
        gone = "the tier no longer has it"
        return [outcomes.get(o.key) or Outcome(o.key, Cause.VANISHED, gone) for o in objects]

    async def _foreign(
        self, objects: Sequence[Relayed], source: End, coding: Coding
    ) -> dict[ObjectKey, Outcome]:
        names = [source.name(each.key, coding) for each in objects]
        sizes = await awaited(partial(source.backend.contains, names)) if names else []
        detail = f"it is coded as {coding.encoding}, which the other tier does not hold"
        return {
            each.key: Outcome(each.key, Cause.FOREIGN_VERSION, detail)
            for each, size in zip(objects, sizes, strict=True)
            if isinstance(size, int)
        }

    async def _some(
        self, objects: Sequence[Relayed], source: End, target: End, coding: Coding
    ) -> tuple[int, dict[ObjectKey, Outcome]]:
        """As many as there is scratch for: how many those are, and how they went.

        One that is not there in this encoding has no outcome.
        """
        payloads = [self._shape(each.key.part, each.key.tokens) for each in objects]
        sizes = [coding.frame_nbytes(payload) for payload in payloads]
        if sizes[0] > self._arena.nbytes:
            detail = f"it needs {sizes[0]} bytes of scratch, of {self._arena.nbytes} there are"
            return 1, {objects[0].key: Outcome(objects[0].key, Cause.NO_ROOM, detail)}
        while (scratch := self._arena.take(sizes)) is None:
            await self._arena.given_back()
        try:
            frames = scratch.parts
            reads = [
                Read(source.name(each.key, coding), (frame,))
                for each, frame in zip(objects, frames, strict=False)
            ]
            answers = await awaited(partial(source.backend.get, reads))
            asked = objects[: len(frames)]
            outcomes = {
                each.key: _failed(each.key, answer)
                for each, answer in zip(asked, answers, strict=True)
                if isinstance(answer, BackendError)
            }
            arrived = [
                (each, payload, frame, answer.nbytes)
                for each, payload, frame, answer in zip(
                    asked, payloads[: len(frames)], frames, answers, strict=True
                )
                if isinstance(answer, Hit)
            ]
            writes: list[Write] = []

            def check() -> None:
                for each, payload, frame, filled in arrived:
                    try:
                        nbytes = coding.check(each.key, payload, each.first_token, frame, filled)
                    except FrameError as exc:
                        outcomes[each.key] = Outcome(each.key, exc.cause, exc.detail)
                        continue
                    name = target.name(each.key, coding)
                    writes.append(
                        Write(
                            name,
                            (frame[:nbytes],),
                            each.first_token,
                            payload.tokens,
                            each.retention,
                            each.parent,
                        )
                    )

            await self._checks.run(check, sum(sizes[: len(frames)]))
            errors = await awaited(partial(target.backend.put, writes)) if writes else []
            written = [each for each, *_ in arrived if each.key not in outcomes]
            for each, write, error in zip(written, writes, errors, strict=True):
                well = Outcome(each.key, nbytes=write.nbytes)
                outcomes[each.key] = well if error is None else _failed(each.key, error)
            return len(frames), outcomes
        finally:
            scratch.give_back()


def _failed(key: ObjectKey, error: BackendError) -> Outcome:
    return Outcome(key, *fault_of(error))

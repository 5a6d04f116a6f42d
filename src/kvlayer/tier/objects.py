"""The storage half of moving: objects between the slab and the lower tiers. Decides nothing.

It knows the slab and the backends; objects come to it as :class:`~kvlayer.tier.messages.Piece` and
leave as :class:`~kvlayer.tier.messages.Outcome`. What enters the process is verified here, once.
Nothing above knows how an object is coded.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from kvlayer._offload import Offload
from kvlayer.abc.backend import (
    Backend,
    Damaged,
    DeleteResult,
    Hit,
    Miss,
    Read,
    SizeResult,
    Version,
    Write,
)
from kvlayer.codec.frame import HEADER_NBYTES, FrameError, check_frame, write_header
from kvlayer.errors import BackendError, BackendTimeoutError, UnsupportedError
from kvlayer.keys import ObjectKey, Part
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload
from kvlayer.results import Cause
from kvlayer.tier.messages import Outcome, Piece
from kvlayer.tier.retry import Retry

__all__ = ["Objects"]


class Objects:
    """Moves pieces for one slab. ``backends[0]`` is None: tier 0 is the slab itself.

    ``retries[t]`` says how often tier t is tried again after a transient error; not at all by
    default.
    """

    def __init__(
        self,
        slab: Slab,
        backends: Sequence[Backend | None],
        *,
        shape: Callable[[Part, int], Payload],
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        build: str,
        retries: Sequence[int] = (),
    ) -> None:
        self._slab = slab
        self._backends = tuple(backends)
        self._shape = shape
        self._clock = clock
        self._wall_clock = wall_clock
        self._build = build
        self._retries = [Retry(n) for n in retries or [0] * len(self._backends)]
        # One thread: it is several times faster than a disk, and two would leave the loop of a
        # small machine no core.
        self._checks = Offload(1, "kvlayer-check")
        self._headers = _HeaderPages()

    @property
    def slab(self) -> Slab:
        """The host memory it moves to and from. The planner says who may touch what of it."""
        return self._slab

    def begin(self) -> None:
        """Start a thread for checks: later the system may have none to give."""
        self._checks.begin()

    def close(self) -> None:
        """Wait for running checks and end their threads. Backends are the caller's."""
        self._checks.close()

    async def contains(self, tier: int, keys: Sequence[ObjectKey]) -> list[SizeResult]:
        """What a tier says of each of ``keys``. Raises ``BackendError``."""
        return await self._retries[tier].batch(self._backend(tier).contains, keys)

    async def put(self, tier: int, piece: Piece) -> Outcome:
        """Frame one object and put it on a tier. Failures are outcomes."""
        started = self._clock()
        payload = self._shape(piece.key.part, piece.num_tokens)
        view = self._slab.view(piece.offset, payload.nbytes)
        header = self._headers.take()
        padding = payload.nbytes - payload.body_nbytes
        view[payload.body_nbytes :] = bytes(padding)  # a slot's former content stays here
        try:
            await self._checks.run(
                write_header,
                header,
                view,
                key=piece.key,
                payload=payload,
                first_token=piece.first_token,
                created=self._wall_clock(),
                build=self._build,
            )
            write = Write(
                piece.key, (header, view), piece.first_token, piece.num_tokens, piece.retention
            )
            call = self._backend(tier).put
            (error,) = await self._retries[tier].batch(call, [write])
        except BackendError as exc:
            error = exc
        finally:
            self._headers.give(header)
            view.release()
        seconds = self._clock() - started
        if error is not None:
            return Outcome(piece.key, _cause(error), str(error), 0, seconds)
        return Outcome(piece.key, None, "", payload.nbytes, seconds)

    async def get(self, tier: int, piece: Piece) -> Outcome:
        """Read one object into its slot and verify it. Failures are outcomes, never wrong bytes."""
        started = self._clock()
        payload = self._shape(piece.key.part, piece.num_tokens)
        view = self._slab.view(piece.offset, payload.nbytes)
        header = self._headers.take()
        cause: Cause | None = None
        detail = ""
        version: Version = None
        try:
            call = self._backend(tier).get
            (result,) = await self._retries[tier].batch(call, [Read(piece.key, (header, view))])
            if isinstance(result, Hit):
                version = result.version
                await self._checks.run(
                    check_frame,
                    header,
                    view,
                    result.nbytes,
                    key=piece.key,
                    payload=payload,
                    first_token=piece.first_token,
                )
            elif isinstance(result, Miss):
                cause, detail = Cause.VANISHED, "the tier no longer has it"
            else:
                cause, detail = _cause(result), str(result)
        except BackendError as exc:
            cause, detail = _cause(exc), str(exc)
        except FrameError as exc:
            cause, detail = exc.cause, exc.detail
        finally:
            self._headers.give(header)
            view.release()
        seconds = self._clock() - started
        nbytes = 0 if cause is not None else payload.nbytes
        return Outcome(piece.key, cause, detail, nbytes, seconds, version)

    async def quarantine(self, tier: int, item: Damaged) -> None:
        """Take a damaged object out of sight. Raises ``BackendError``."""
        (error,) = await self._retries[tier].batch(self._backend(tier).quarantine, [item])
        if error is not None:
            raise error

    async def probe(self, tier: int, key: ObjectKey) -> None:
        """Ask a tier for one object's header, there or not. Raises ``BackendError``."""
        header = self._headers.take()
        try:
            (size,) = await self._backend(tier).contains([key])
            (answer,) = await self._backend(tier).get([Read(key, (header,))])
        finally:
            self._headers.give(header)
        for result in (size, answer):
            if isinstance(result, BackendError):
                raise result

    async def delete(self, tier: int, keys: Sequence[ObjectKey]) -> list[DeleteResult]:
        """Remove objects from a tier; of each, what prevented it. Raises ``BackendError``."""
        return await self._retries[tier].batch(self._backend(tier).delete, keys)

    async def touch(self, tier: int, keys: Sequence[ObjectKey]) -> None:
        """Tell a tier that objects were used, the most valuable last. Raises ``BackendError``."""
        await self._retries[tier].call(partial(self._backend(tier).touch, keys))

    async def introduce(self, tier: int) -> None:
        """Tell a tier of host memory, which it forgets when it closes. Raises ``BackendError``."""
        await self._backend(tier).introduce(self._slab.view(0, self._slab.nbytes))

    async def describe(self, tier: int, namespace: str, canonical: bytes) -> None:
        """Tell a tier what a namespace's digest stands for. Raises ``BackendError``."""
        await self._retries[tier].call(partial(self._backend(tier).describe, namespace, canonical))

    async def namespaces(self, tier: int) -> Mapping[str, bytes]:
        """What namespaces a tier knows of. Raises ``BackendError``."""
        return await self._retries[tier].call(self._backend(tier).namespaces)

    def _backend(self, tier: int) -> Backend:
        backend = self._backends[tier]
        if backend is None:
            raise UnsupportedError(f"tier {tier} is host memory, not a backend")
        return backend


def _cause(error: BackendError) -> Cause:
    return Cause.DEADLINE if isinstance(error, BackendTimeoutError) else Cause.TIER_DOWN


class _HeaderPages:
    """Page-aligned 4 KiB buffers for frame headers, reused."""

    _BATCH = 16

    def __init__(self) -> None:
        self._free: list[memoryview] = []

    def take(self) -> memoryview:
        if not self._free:
            pages = memoryview(mmap.mmap(-1, HEADER_NBYTES * self._BATCH))
            step = HEADER_NBYTES
            self._free += [pages[at : at + step] for at in range(0, len(pages), step)]
        return self._free.pop()

    def give(self, page: memoryview) -> None:
        self._free.append(page)

"""The storage half of moving: objects between the slab and the lower tiers. Decides nothing.

It knows the slab and the backends; objects come to it as :class:`~kvlayer.tier.messages.Piece` and
leave as :class:`~kvlayer.tier.messages.Outcome`. What enters the process is verified here, once.
Nothing above knows how an object is coded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from kvlayer.abc.backend import Backend, Capability, Damaged, DeleteResult, Read, SizeResult
from kvlayer.codec.frame import HEADER_NBYTES
from kvlayer.errors import BackendError, UnsupportedError
from kvlayer.identity.keys import ObjectKey, ObjectName, Part
from kvlayer.memory.arena import Arena
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload
from kvlayer.retention import ORDINARY, Retention
from kvlayer.tier.guard.retry import Retry
from kvlayer.tier.messages import Outcome, Piece
from kvlayer.tier.transfer.batch import Batcher, Job, Lending
from kvlayer.tier.transfer.checks import Checks
from kvlayer.tier.transfer.encodings import Coding, Raw
from kvlayer.tier.transfer.relay import End, Relay, Relayed
from kvlayer.tier.transfer.transcode import Transcode
from kvlayer.tier.transfer.transfer import Arenas, OtherVersion, Transfers

__all__ = ["Item", "Lending", "Objects"]

_CHECK_THREADS = 1  # several times faster than a disk, and two would leave the loop no core
_CHECK_NBYTES = 64 << 20


class Item(NamedTuple):
    """One object and the memory it is in, or goes to: any number of regions, of any alignment.

    They are ``payload.body_nbytes`` bytes in all: what a tier pads an object with never lies there.
    ``lending`` says until when they may be used. ``parent`` is the end hash of what comes right
    before it in its prompt, empty where that is nothing or not known.
    """

    key: ObjectKey
    payload: Payload
    first_token: int
    regions: tuple[memoryview, ...]
    lending: Lending = Lending.HELD
    retention: Retention = ORDINARY
    parent: bytes = b""


@dataclass(slots=True, eq=False)
class _Tier:
    """What belongs to one backend."""

    backend: Backend
    retry: Retry
    codings: Sequence[Coding]
    is_revocable: bool
    reads: Batcher
    writes: Batcher


class Objects:
    """Moves objects for one slab, in batches. ``backends[0]`` is None: tier 0 is the slab itself.

    ``retries[t]`` says how often tier t is tried again after a transient error; not at all by
    default. ``codings[t]``: the encoding that tier t writes, and which others it may hold; raw by
    default. Memory that is lent for the call is lent on to revocable backends only: others get a
    copy, so that the caller may leave at any time. Everything on one loop.
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
        codings: Sequence[Sequence[Coding]] = (),
    ) -> None:
        self._slab = slab
        self._shape = shape
        self._clock = clock
        half = slab.scratch_nbytes // 2
        self._arenas = Arenas(Arena(slab.scratch(0, half)), Arena(slab.scratch(half, half)))
        self._checks = Checks(_CHECK_THREADS, _CHECK_NBYTES)
        self._relay = Relay(self._arenas.writes, self._checks, shape)
        self._transcode = Transcode(
            self._arenas.writes, self._checks, shape, wall_clock=wall_clock, build=build
        )

        def tier(backend: Backend, retry: Retry, codings: Sequence[Coding]) -> _Tier:
            transfers = Transfers(
                backend,
                retry,
                self._arenas,
                self._checks,
                codings=codings,
                clock=clock,
                wall_clock=wall_clock,
                build=build,
            )
            revocable = Capability.REVOCABLE in backend.capabilities
            reads, writes = Batcher(transfers.read, clock), Batcher(transfers.write, clock)
            return _Tier(backend, retry, codings, revocable, reads, writes)

        self._tiers = [
            None if backend is None else tier(backend, Retry(count), some)
            for backend, count, some in zip(
                backends,
                retries or [0] * len(backends),
                codings or [(Raw(),)] * len(backends),
                strict=True,
            )
        ]

    @property
    def slab(self) -> Slab:
        """The host memory it moves to and from. The planner says who may touch what of it."""
        return self._slab

    def begin(self) -> None:
        """Start a thread for checks: later the system may have none to give."""
        self._checks.begin()

    def close(self) -> None:
        """Wait for running checks and end their threads. Backends are the caller's. Idempotent."""
        self._checks.close()
        for arena in self._arenas:
            arena.close()

    # -- slab or anybody's memory <-> lower tiers ------------------------------------------------

    async def contains(self, tier: int, keys: Sequence[ObjectKey]) -> list[SizeResult]:
        """What a tier says of each of ``keys``. Raises ``BackendError``."""
        its = self._of(tier)
        return await its.retry.batch(its.backend.contains, keys)

    async def put(self, tier: int, item: Item) -> Outcome:
        """Put one object on a tier, framed. Failures are outcomes."""
        return await self.writing(tier, item).outcome()

    async def get(self, tier: int, item: Item) -> Outcome:
        """Bring one object from a tier and verify it. Failures are outcomes, never wrong bytes.

        After a failure the memory may hold anything.
        """
        return await self.reading(tier, item).outcome()

    def writing(self, tier: int, item: Piece | Item) -> Job:
        """:meth:`put`, to begin when its turn comes: with what else begins then it travels."""
        its = self._of(tier)
        return self._job(its, its.writes, item)

    def reading(self, tier: int, item: Piece | Item, encoding: int = 0) -> Job:
        """:meth:`get`, to begin when its turn comes: with what else begins then it travels.

        ``encoding``: in which of the tier's the object is said to lie, from 1 on; it is asked for
        in that first. 0: nobody said.
        """
        its = self._of(tier)
        return self._job(its, its.reads, item, encoding)

    def _job(self, its: _Tier, batcher: Batcher, item: Piece | Item, encoding: int = 0) -> Job:
        if isinstance(item, Piece):
            payload = self._shape(item.key.part, item.num_tokens)
            return Job(
                batcher,
                item.key,
                payload,
                item.first_token,
                lambda: (self._slab.view(item.offset, payload.nbytes),),
                is_ours=True,
                copies=False,
                retention=item.retention,
                parent=item.parent,
                encoding=encoding,
            )
        nbytes = sum(region.nbytes for region in item.regions)
        if nbytes != item.payload.body_nbytes:
            raise ValueError(f"{item.key}: {nbytes} bytes, expected {item.payload.body_nbytes}")
        return Job(
            batcher,
            item.key,
            item.payload,
            item.first_token,
            lambda: item.regions,
            is_ours=False,
            copies=item.lending is Lending.CALL and not its.is_revocable,
            retention=item.retention,
            parent=item.parent,
            encoding=encoding,
        )

    async def relay(self, objects: Sequence[Relayed], source: int, target: int) -> list[Outcome]:
        """Move objects between two lower tiers as they lie there: verified, not decoded.

        Where both hold the encoding; else the outcome is ``FOREIGN_VERSION``. Raises
        ``BackendError`` when a tier fails as a whole.
        """
        ends = [End(self._of(t).backend, self._of(t).codings) for t in (source, target)]
        return await self._relay.run(objects, *ends)

    async def transcode(self, objects: Sequence[Relayed], tier: int, to: int = 0) -> list[Outcome]:
        """Code objects anew where they lie, in encoding number ``to`` of the tier's: put, verified,
        then the old one deleted.

        Whatever ends it, each is there in one encoding or in both, and doing it again leaves one.
        The new copy is the most recent of its tier. Who calls tells the directory of the outcomes'
        ``copy``. Raises ``BackendError`` when the tier fails as a whole.
        """
        its = self._of(tier)
        return await self._transcode.run(objects, End(its.backend, its.codings), to)

    async def quarantine(self, tier: int, item: Damaged) -> None:
        """Take a damaged object out of sight. Raises ``BackendError``."""
        if isinstance(item.version, OtherVersion):
            name = ObjectName.made(item.key, item.version.encoding)
            item = Damaged(name, item.version.version)
        (error,) = await self._of(tier).retry.batch(self._of(tier).backend.quarantine, [item])
        if error is not None:
            raise error

    async def probe(self, tier: int, key: ObjectKey) -> None:
        """Ask a tier for one object's header, there or not. Raises ``BackendError``."""
        backend = self._of(tier).backend
        header = memoryview(bytearray(HEADER_NBYTES))  # the arena may be all in use
        (size,) = await backend.contains([key])
        (answer,) = await backend.get([Read(key, (header,))])
        for result in (size, answer):
            if isinstance(result, BackendError):
                raise result

    async def delete(self, tier: int, keys: Sequence[ObjectKey]) -> list[DeleteResult]:
        """Remove objects from a tier; of each, what prevented it. Raises ``BackendError``."""
        its = self._of(tier)
        return await its.retry.batch(its.backend.delete, keys)

    async def touch(self, tier: int, keys: Sequence[ObjectKey]) -> None:
        """Tell a tier that objects were used, the most valuable last. Raises ``BackendError``."""
        its = self._of(tier)
        await its.retry.call(partial(its.backend.touch, keys))

    async def introduce(self, tier: int) -> None:
        """Tell a tier of host memory, which it forgets when it closes. Raises ``BackendError``."""
        await self._of(tier).backend.introduce(self._slab.whole())

    async def describe(self, tier: int, namespace: str, canonical: bytes) -> None:
        """Tell a tier what a namespace's digest stands for. Raises ``BackendError``."""
        its = self._of(tier)
        await its.retry.call(partial(its.backend.describe, namespace, canonical))

    async def namespaces(self, tier: int) -> Mapping[str, bytes]:
        """What namespaces a tier knows of. Raises ``BackendError``."""
        its = self._of(tier)
        return await its.retry.call(its.backend.namespaces)

    def _of(self, tier: int) -> _Tier:
        its = self._tiers[tier]
        if its is None:
            raise UnsupportedError(f"tier {tier} is host memory, not a backend")
        return its

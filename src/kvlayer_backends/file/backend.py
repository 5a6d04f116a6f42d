"""``file://``: the backend itself. Decides nothing and blocks nowhere; threads touch the disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import ClassVar, Self

from kvlayer.abc.backend import (
    Backend,
    Capability,
    Damaged,
    DeleteResult,
    Hit,
    Listed,
    Miss,
    Read,
    ReadResult,
    SizeResult,
    Write,
    WriteResult,
)
from kvlayer.abc.policy import PolicyMaker
from kvlayer.config.local_directory import local_directory
from kvlayer.config.registry import POLICIES
from kvlayer.errors import ClosedError
from kvlayer.identity.keys import ObjectKey
from kvlayer.urls import BackendURL
from kvlayer_backends.file import descriptions
from kvlayer_backends.file.batches import spread
from kvlayer_backends.file.calls import Calls
from kvlayer_backends.file.faults import explain, readonly
from kvlayer_backends.file.janitor import Janitor
from kvlayer_backends.file.ledger import Ledger
from kvlayer_backends.file.listing import counted, read
from kvlayer_backends.file.notes import Aside
from kvlayer_backends.file.options import FileOptions
from kvlayer_backends.file.room import Evicted
from kvlayer_backends.file.site import Site
from kvlayer_backends.file.uses import Uses
from kvlayer_backends.file.writing import put

__all__ = ["FileBackend"]


class FileBackend(Backend):
    """Objects as files under ``root``, shared with any number of processes on this host.

    Batches of reads and writes run concurrently; a batch is taken for a path, root first, when it
    comes to what is worth keeping. One janitor per directory keeps it under ``capacity``: see
    :class:`Janitor` for how exactly. ``policy`` makes the eviction policy; by default the
    registered one that ``options`` names.
    """

    scheme: ClassVar[str] = "file"
    capabilities: frozenset[Capability] = frozenset(
        {Capability.LIST, Capability.PERSISTENT, Capability.SHARED}
    )

    def __init__(
        self,
        root: str,
        options: FileOptions | None = None,
        *,
        policy: PolicyMaker | None = None,
    ) -> None:
        self.root = root
        self.options = options or FileOptions()
        self.on_evicted: Evicted | None = None
        """Called on the loop with what the janitor evicted (key, bytes) and its policy's name."""
        self._policy = policy
        self._uses = Uses()
        self._site: Site | None = None
        self._calls: Calls[Site] = Calls(f"file://{root}")
        self._opening = asyncio.Lock()

    @classmethod
    def from_url(cls, url: BackendURL, /) -> Self:
        return cls(local_directory(url), url.into(FileOptions))

    async def open(self) -> None:
        """Make the directory ready and stand for janitor; does not wait for the recovery scan.

        Raises ``BackendError`` naming the directory when it cannot be used, leaving nothing behind;
        it may be opened again then. Opening twice does nothing.
        """
        async with self._opening:
            if self._calls.has_ended:
                raise ClosedError(f"file://{self.root} was closed", hint="build a new backend")
            if self._calls.has_begun:
                return
            policy = self._policy or POLICIES.load_option("policy", self.options.policy)
            site = Site(self.root, self.options, policy, self._evicted)
            await site.open()
            self._site = site
            self._calls.begin(site)

    async def aclose(self) -> None:
        async with self._opening:
            if self._calls.is_foreign:
                return  # the parent's: its threads are not here, and its files are not ours
            is_idle = False
            try:
                await self._calls.end()
                is_idle = True
            finally:
                if self._site is not None and not is_idle:
                    self._site.abandon()  # cancelled: a call hangs
            if self._site is not None:
                await self._site.aclose()

    # -- objects ---------------------------------------------------------------------------------

    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        with self._calls.running() as site:
            sizes = await site.meta.run(site.files.sizes, keys)
        hidden = site.quarantine.hidden
        return [None if key in hidden else n for key, n in zip(keys, sizes, strict=True)]

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        with self._calls.running() as site:
            counts = not self.options.readonly
            uses = [
                stamp if counts and self._uses.is_new(read.key) else None
                for read, stamp in zip(reads, self._uses.stamps(len(reads)), strict=True)
            ]
            results = await self._get(site, reads, uses)
            used = [
                (read.key, stamp)
                for read, stamp, result in zip(reads, uses, results, strict=True)
                if stamp is not None and isinstance(result, Hit)
            ]
            self._count_use(used)
            return results

    async def _get(
        self, site: Site, reads: Sequence[Read], uses: Sequence[int | None]
    ) -> list[ReadResult]:
        """Small objects in one hop, one after the other; large ones on several threads at once."""
        results: list[ReadResult] = [Miss()] * len(reads)

        def fill(some: Iterable[int]) -> None:
            for at in some:
                results[at] = site.files.read(reads[at], uses[at])

        hidden = site.quarantine.hidden
        todo = [(at, read.nbytes) for at, read in enumerate(reads) if read.key not in hidden]
        await spread(site.bulk, fill, todo)
        return results

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        with self._calls.running() as site:
            if site.janitor is None:
                return [readonly("put", self.root) for _ in writes]
            return await put(site, site.janitor, writes, self._uses.stamps(len(writes)))

    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        with self._calls.running() as site:
            janitor = site.janitor
            if janitor is None:
                return [readonly("delete", self.root) for _ in keys]
            gone: list[ObjectKey] = []
            try:
                return await site.meta.run(site.files.delete, keys, gone)
            finally:
                janitor.lost(gone)
                site.quarantine.hidden.difference_update(gone)

    async def quarantine(self, items: Sequence[Damaged], /) -> list[DeleteResult]:
        """Move damaged objects to ``v2/quarantine``, where the newest 16 stay, each with a note.

        What can be neither moved nor deleted is hidden from this process. Never fails for a file.
        """
        with self._calls.running() as site:
            janitor = site.janitor
            if janitor is None:
                site.quarantine.hidden.update(item.key for item in items)
                return [None] * len(items)
            gone: set[ObjectKey] = set()
            aside: list[Aside] = []
            try:
                answers = await site.meta.run(site.quarantine.take, items, gone, aside)
                # First: for a moment they count twice, never nowhere.
                await janitor.weigh_quarantine()
                await site.notes.write(aside)
            except OSError as exc:  # of the weighing: the next pass does it
                return [explain(exc, "weigh the quarantine of", self.root) for _ in items]
            finally:
                janitor.lost(gone)
            return answers

    async def touch(self, keys: Sequence[ObjectKey], /) -> None:
        with self._calls.running() as site:
            janitor = site.janitor
            if janitor is None or not keys:
                return
            path = keys[::-1]  # root first: the most valuable came last
            stamps = self._uses.stamps(len(path))
            self._uses.touched(path)
            janitor.used(path, stamps)
            await site.meta.run(site.files.use, path, stamps)

    async def describe(self, namespace: str, canonical: bytes, /) -> None:
        with self._calls.running() as site:
            if site.janitor is not None:
                site.files.descriptions[namespace] = canonical
                await site.meta.run(site.files.describe, namespace)

    async def namespaces(self) -> Mapping[str, bytes]:
        with self._calls.running() as site:
            try:
                return await site.meta.run(descriptions.read_all, site.paths)
            except OSError as exc:
                raise explain(exc, "list", self.root) from None

    # -- what the tier above asks for its statistics ---------------------------------------------

    @property
    def janitor(self) -> Janitor | None:
        """This process's candidate for the office, in office or not; None when read-only."""
        return None if self._site is None else self._site.janitor

    @property
    def is_janitor(self) -> bool:
        """Whether this backend counts, evicts and clears up for everyone in its directory."""
        return self._ledger is not None

    @property
    def _ledger(self) -> Ledger | None:
        return None if self.janitor is None else self.janitor.ledger

    @property
    def policies_replaced(self) -> int:
        """How often the eviction policy broke its contract and was replaced, in this office."""
        return 0 if self._ledger is None else self._ledger.order.replaced

    @property
    def used_nbytes(self) -> int:
        """Bytes counted toward the capacity; 0 where this backend is not the janitor."""
        return 0 if self._ledger is None else self._ledger.used_nbytes

    @property
    def objects(self) -> int:
        """Objects counted; 0 where this backend is not the janitor."""
        return 0 if self._ledger is None else len(self._ledger)

    @property
    def left_unfinished(self) -> int:
        """Objects that processes which died had begun to write, cleared away by this one."""
        return 0 if self.janitor is None else self.janitor.left_unfinished

    @property
    def capacity_nbytes(self) -> int | None:
        """The limit, None when there is none."""
        return self.options.capacity or None

    async def recovered(self) -> None:
        """Wait until everything that lay in the directory at open is counted.

        At once where this backend is not the janitor.
        """
        if self.janitor is not None:
            await self.janitor.recovered()

    # -- inside ----------------------------------------------------------------------------------

    def _count_use(self, used: Sequence[tuple[ObjectKey, int]]) -> None:
        if self.janitor is not None and used:
            self.janitor.used([key for key, _ in used], [stamp for _, stamp in used])

    def _evicted(self, gone: list[tuple[ObjectKey, int]], policy: str) -> None:
        if self.on_evicted is not None:
            self.on_evicted(gone, policy)

    async def list(self, prefix: str = "", /) -> AsyncIterator[Listed]:
        """Every object whose key starts with ``prefix``, other processes' too.

        What is added or removed meanwhile may or may not be seen. Raises ``BackendError`` in the
        end when not everything could be read.
        """
        with self._calls.running() as site:
            janitor = site.janitor
        is_counted = janitor is not None and janitor.ledger is not None
        batches = counted(janitor, prefix) if janitor and is_counted else read(site, prefix)
        try:
            async with aclosing(batches):
                async for batch in batches:
                    for listed in batch:
                        if listed.key not in site.quarantine.hidden:
                            yield listed
                    await asyncio.sleep(0)
                    self._calls.check()
        except OSError as exc:
            raise explain(exc, "list", self.root) from None

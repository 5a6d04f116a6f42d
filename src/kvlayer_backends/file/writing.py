"""How a batch of writes goes: room is made for all of it, and one job writes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvlayer.abc.backend import Write, WriteResult
from kvlayer.errors import BackendError, NoRoomError
from kvlayer_backends.file.batches import spread
from kvlayer_backends.file.janitor import Janitor
from kvlayer_backends.file.objects import Outcome
from kvlayer_backends.file.site import Site

__all__ = ["put"]


async def put(
    site: Site, janitor: Janitor, writes: Sequence[Write], stamps: Sequence[int]
) -> list[WriteResult]:
    """Write objects, each with its time of use (ns), unless they are there already."""
    batch = _Batch(site, janitor, writes, stamps, [])
    batch.results += [janitor.room.is_too_large(write) for write in writes]
    todo = [at for at, error in enumerate(batch.results) if error is None]
    if not janitor.room.has_room(sum(writes[at].nbytes for at in todo)):
        # Only what is not there yet may push others out: look before room is made.
        todo = await batch.absent(todo)
    await batch.write(todo)
    batch.count_use([at for at, error in enumerate(batch.results) if error is None])
    return batch.results


@dataclass(slots=True)
class _Batch:
    site: Site
    janitor: Janitor
    writes: Sequence[Write]
    stamps: Sequence[int]
    results: list[WriteResult]

    def count_use(self, some: Sequence[int]) -> None:
        keys = [self.writes[at].key for at in some]
        self.janitor.used(keys, [self.stamps[at] for at in some])

    async def absent(self, todo: Sequence[int]) -> list[int]:
        """Those of ``todo`` that are not there. The others are counted, and used."""
        site, writes = self.site, self.writes
        found = await site.meta.run(site.files.present, [writes[at] for at in todo])
        absent: list[int] = []
        present: list[int] = []
        for at, status in zip(todo, found, strict=True):
            if status is None or writes[at].key in site.quarantine.hidden:
                absent.append(at)
            else:
                self.janitor.found(writes[at], *status)
                present.append(at)
        self.count_use(present)  # before room is made: what was just stored again should not go
        return absent

    async def write(self, todo: Sequence[int]) -> None:
        """Write ``todo`` in one job, or, where there is no room for all, first its first half."""
        room = self.janitor.room
        if not todo:
            return
        granted = await room.grant([self.writes[at] for at in todo])
        if isinstance(granted, NoRoomError) and len(todo) > 1:
            half = len(todo) // 2
            await self.write(todo[:half])
            await self.write(todo[half:])
            return
        if isinstance(granted, BackendError):
            for at in todo:
                self.results[at] = granted
                room.refused(self.writes[at], granted)
            return
        hidden = self.site.quarantine.hidden
        outcomes = {at: Outcome(replaces=self.writes[at].key in hidden) for at in todo}

        def work(some: Iterable[int]) -> None:
            for at in some:
                self.site.files.write(self.writes[at], self.stamps[at], outcomes[at])

        sizes = [(at, self.writes[at].nbytes) for at in todo]
        try:
            if self.site.files.fsync:  # each waits for the medium: on as many threads as there are
                await spread(self.site.bulk, work, sizes, 0)
            else:
                await spread(self.site.bulk, work, sizes)
        finally:
            for at, outcome in outcomes.items():
                if granted is not None:
                    room.settle(granted, self.writes[at], self.stamps[at], outcome)
                if outcome.created:
                    hidden.discard(self.writes[at].key)
        for at, outcome in outcomes.items():
            self.results[at] = outcome.error

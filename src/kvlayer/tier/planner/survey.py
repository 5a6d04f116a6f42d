"""What the Planner tells of its state: for statistics, removal and explanations. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from kvlayer._steps import SLICE, Steps
from kvlayer.identity.keys import ChunkChain, ObjectKey, Span
from kvlayer.results import OwnerStats
from kvlayer.tier.planner.journal import Loss
from kvlayer.tier.planner.records import HostState, ObjectRecord
from kvlayer.tier.planner.tables import Tables

__all__ = ["Account", "Counts", "Survey"]


class Counts(NamedTuple):
    """How much there is. ``held``: objects known on each lower tier, ``held_nbytes`` what they take
    there, as far as is known; the rest is of the host.
    """

    held: Mapping[int, int]
    held_nbytes: Mapping[int, int]
    objects: int
    used_nbytes: int
    capacity_nbytes: int
    pinned_nbytes: int
    policies_replaced: int
    leases: int
    owners: Mapping[str, OwnerStats]


class Account(NamedTuple):
    """What is known of one span, as far as whoever asks may be told."""

    covers: Sequence[tuple[ObjectRecord, ...] | None]
    """By group, what serves it."""
    is_own: bool
    is_filling: bool
    loss: Loss | None
    elsewhere: str | None
    divergent: int | None
    beside: str | None
    """Another namespace in which this cache has it."""


class Survey(Tables):
    """Reads what others change. In any thread."""

    def counts(self, lower: Iterable[int]) -> Counts:
        """How much there is in host memory and on the ``lower`` tiers. Constant time."""
        with self.lock:
            extents, tiers = self.host.extents, [*lower]
            return Counts(
                {tier: self.directory.held(tier) for tier in tiers},
                {tier: self.directory.held_nbytes(tier) for tier in tiers},
                len(self.host),
                extents.used,
                extents.capacity,
                self.host.pinned_nbytes,
                self.host.order.replaced,
                len(self.leases),
                self.leases.owners(),
            )

    def served(self) -> list[str]:
        """The namespaces that requests have used, at most 64: the latest."""
        with self.lock:
            return list(self._holdings.served)

    def account(self, chain: ChunkChain, span: Span) -> Account:
        """What is known of a span of a prompt, and what became of it."""
        with self.lock:
            record = self._matcher.record(chain, span)
            objects = () if record is None else record.objects
            is_own = self.journal.is_own(chain, span)
            return Account(
                [None] * len(self._groups) if record is None else self.directory.covers_of(record),
                is_own,
                is_own and any(found.host is HostState.FILLING for found in objects),
                self.journal.loss(chain, span),
                self.journal.elsewhere(chain, span.start // chain.chunk_step),
                self.journal.divergence(chain, span.start),
                self._beside(chain, span),
            )

    def _beside(self, chain: ChunkChain, span: Span) -> str | None:
        for record in self.directory.every_ending(span.hash):
            other = chain.named_in(record.namespace)
            is_same = (record.tokens, record.zone) == (span.tokens, chain.zone(span))
            if is_same and record.namespace != chain.namespace and self.journal.is_own(other, span):
                return record.namespace
        return None

    def known(self, chain: ChunkChain) -> Steps[list[ObjectRecord]]:
        """The objects of a prompt's full chunks, and of the tails at its end."""
        records: list[ObjectRecord] = []
        for at in range(0, len(chain) + 1, SLICE):
            stop = min(at + SLICE, len(chain))
            spans = chain.spans(stop, at)
            if stop == len(chain):
                spans += chain.tails(stop)
            with self.lock:
                for span in spans:
                    record = self._matcher.record(chain, span)
                    records += () if record is None else record.objects
            if stop < len(chain):
                yield
        return records

    def on_tiers(self, tiers: Sequence[int]) -> Steps[dict[int, list[ObjectKey]]]:
        """The names of all that is known on each of some lower tiers."""
        found: dict[int, dict[ObjectKey, None]] = {tier: {} for tier in tiers}
        with self.lock:
            ends = self.directory.ends()
        for records in self._sliced(ends):
            for record in records:
                for tier in tiers:
                    if record.tiers >> tier & 1:
                        found[tier][record.key] = None
                record.drop_key()
            yield
        return {tier: [*keys] for tier, keys in found.items()}

    def resident(self) -> Steps[list[ObjectRecord]]:
        """What is in host memory, or on its way there, in the order in which it came."""
        found: list[ObjectRecord] = []
        with self.lock:
            ends = self.directory.active_ends()
        for records in self._sliced(ends):
            found += [record for record in records if record.host is not HostState.ABSENT]
            yield
        return found

    def _sliced(self, ends: Sequence[bytes]) -> Iterator[list[ObjectRecord]]:
        """The objects of spans with these ends, a slice for each hold of the lock."""
        for at in range(0, len(ends), SLICE):
            with self.lock:
                some = ends[at : at + SLICE]
                chunks = [chunk for end in some for chunk in self.directory.every_ending(end)]
                records = [found for chunk in chunks for found in chunk.objects]
            yield records

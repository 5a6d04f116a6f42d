"""Every metric family that kvlayer exposes: its name, kind, labels and meaning. Plain values.

Names follow Prometheus' conventions (base units; a counter is exposed with ``_total``). Each family
also has the label ``cache``. docs/observability.md has the same list for people, and a test that
compares a scrape with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from kvlayer.results import Health, Stats, TierStats

if TYPE_CHECKING:
    from kvlayer.api.cache import Cache

__all__ = [
    "COUNTERS",
    "HISTOGRAMS",
    "OWNER_COUNTERS",
    "SCRAPED",
    "Family",
    "Reading",
    "Scraped",
]


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """A metric family. ``labels`` come after ``cache``; all have few values."""

    name: str
    help: str
    labels: tuple[str, ...] = ()


# -- what events are counted into ------------------------------------------------------------------

LOOKUPS = Family("kvlayer_lookups", "Lookups that answered, by how much they found.", ("outcome",))
LOOKUP_ASKED = Family("kvlayer_lookup_asked_tokens", "Tokens that lookups asked for.")
LOOKUP_HIT = Family(
    "kvlayer_lookup_hit_tokens", "Tokens that lookups found, by where they lay.", ("tier",)
)
STORE_SPANS = Family(
    "kvlayer_store_spans", "Chunks and tails of stores, by what became of them.", ("outcome",)
)
STORE_BYTES = Family("kvlayer_store_bytes", "Payload bytes gathered from engines.")
RETRIEVE_TOKENS = Family(
    "kvlayer_retrieve_tokens", "Tokens loaded into engines, by where they lay.", ("tier",)
)
RETRIEVE_BYTES = Family(
    "kvlayer_retrieve_bytes", "Payload bytes scattered into engines, by where they lay.", ("tier",)
)
PREFETCH_TOKENS = Family("kvlayer_prefetch_tokens", "Tokens that prefetches brought into memory.")
FAILURES = Family(
    "kvlayer_failures",
    "Spans that a store, retrieve or prefetch reported as failed.",
    ("operation", "tier", "cause"),
)
TRANSFERS = Family(
    "kvlayer_transfers", "Objects moved between host memory and a tier.", ("tier", "direction")
)
TRANSFER_FAILURES = Family(
    "kvlayer_transfer_failures",
    "Objects that could not be moved between host memory and a tier.",
    ("tier", "direction", "cause"),
)
TRANSFER_BYTES = Family(
    "kvlayer_transfer_bytes",
    "Payload bytes moved between host memory and a tier.",
    ("tier", "direction"),
)
EVICTED_OBJECTS = Family(
    "kvlayer_evicted_objects", "Objects that left a tier to make room.", ("tier", "policy")
)
EVICTED_BYTES = Family(
    "kvlayer_evicted_bytes", "Bytes of objects that left a tier to make room.", ("tier", "policy")
)
QUARANTINED = Family(
    "kvlayer_quarantined_objects", "Damaged objects taken out of sight.", ("tier", "cause")
)
TIER_CHANGES = Family("kvlayer_tier_changes", "Times a tier went up or down.", ("tier", "state"))

COUNTERS = (
    LOOKUPS,
    LOOKUP_ASKED,
    LOOKUP_HIT,
    STORE_SPANS,
    STORE_BYTES,
    RETRIEVE_TOKENS,
    RETRIEVE_BYTES,
    PREFETCH_TOKENS,
    FAILURES,
    TRANSFERS,
    TRANSFER_FAILURES,
    TRANSFER_BYTES,
    EVICTED_OBJECTS,
    EVICTED_BYTES,
    QUARANTINED,
    TIER_CHANGES,
)

LOOKUP_SECONDS = Family("kvlayer_lookup_seconds", "Seconds until a lookup answered.")
STORE_SECONDS = Family("kvlayer_store_seconds", "Seconds until a store returned.")
RETRIEVE_SECONDS = Family("kvlayer_retrieve_seconds", "Seconds until a retrieve returned.")
PREFETCH_SECONDS = Family("kvlayer_prefetch_seconds", "Seconds until a prefetch ended.")
TRANSFER_SECONDS = Family(
    "kvlayer_transfer_seconds",
    "Seconds an object took to move, where it arrived.",
    ("tier", "direction"),
)

HISTOGRAMS = (LOOKUP_SECONDS, STORE_SECONDS, RETRIEVE_SECONDS, PREFETCH_SECONDS, TRANSFER_SECONDS)

OWNER_ASKED = Family(
    "kvlayer_owner_asked_tokens", "Tokens an owner's lookups asked for.", ("owner",)
)
OWNER_HIT = Family("kvlayer_owner_hit_tokens", "Tokens an owner's lookups found.", ("owner",))
OWNER_STORED = Family(
    "kvlayer_owner_stored_bytes", "Payload bytes an owner's stores gathered.", ("owner",)
)
OWNER_LOADED = Family(
    "kvlayer_owner_loaded_bytes", "Payload bytes an owner's retrieves loaded.", ("owner",)
)

OWNER_COUNTERS = (OWNER_ASKED, OWNER_HIT, OWNER_STORED, OWNER_LOADED)
"""Only where owners are asked for."""


# -- what is read at a scrape ----------------------------------------------------------------------


_DIGITS = 12  # of the namespace's digest: enough to tell deployments apart


@dataclass(frozen=True, slots=True)
class Reading:
    """What one open cache says at a scrape."""

    namespace: str
    """The digest's first digits: caches share KV exactly where the whole digests are equal."""
    stats: Stats
    health: Health

    @classmethod
    def of(cls, cache: Cache) -> Reading:
        """What ``cache`` says now. From any thread; raises whatever a backend's own figures do."""
        return cls(cache.namespace.digest[:_DIGITS], cache.control.stats(), cache.control.health())


Samples: TypeAlias = Iterable[tuple[tuple[str, ...], float]]
"""The values of a family's labels, and the figure."""


@dataclass(frozen=True, slots=True)
class Scraped:
    """A family that is read from a cache when somebody scrapes."""

    family: Family
    read: Callable[[Reading], Samples]
    is_counter: bool = False


def _cache(name: str, meaning: str, read: Callable[[Stats], float]) -> Scraped:
    return Scraped(Family(name, meaning), lambda reading: [((), read(reading.stats))])


def _tier(name: str, meaning: str, read: Callable[[TierStats], float | None]) -> Scraped:
    """A figure of every tier; None where a tier does not know it."""

    def samples(reading: Reading) -> Samples:
        for tier in reading.stats.tiers:
            if (value := read(tier)) is not None:
                yield (tier.name,), value

    return Scraped(Family(name, meaning, ("tier",)), samples)


def _up(reading: Reading) -> Samples:
    return [((tier.name,), float(tier.ok)) for tier in reading.health.tiers]


def _misses(reading: Reading) -> Samples:
    for tier in reading.stats.tiers:
        for cause, count in tier.misses.items():
            yield (tier.name, cause), count


# A figure that Stats or TierStats gains is one line here and one row in docs/observability.md.
SCRAPED = (
    Scraped(
        Family("kvlayer_cache_info", "Always 1: an open cache and its namespace.", ("namespace",)),
        lambda reading: [((reading.namespace,), 1)],
    ),
    _cache("kvlayer_leases", "Prefixes held by lookups, pins, prefetches.", lambda s: s.leases),
    _cache("kvlayer_inflight_calls", "Calls to tiers that run or wait.", lambda s: s.inflight),
    Scraped(
        Family("kvlayer_prefill_tokens_per_second", "Tokens a second that the engine computes."),
        lambda reading: [
            ((), rate) for rate in [reading.stats.prefill_tokens_per_second] if rate is not None
        ],
    ),
    _tier("kvlayer_tier_objects", "Objects a tier is known to hold.", lambda t: t.objects),
    _tier("kvlayer_tier_used_bytes", "Bytes in use.", lambda t: t.used_nbytes),
    _tier("kvlayer_tier_capacity_bytes", "Bytes a tier may hold.", lambda t: t.capacity_nbytes),
    _tier("kvlayer_tier_pinned_bytes", "Bytes that must stay.", lambda t: t.pinned_nbytes),
    _tier("kvlayer_tier_inflight_calls", "Calls that run or wait.", lambda t: t.inflight),
    _tier("kvlayer_tier_inflight_bytes", "Payload they move.", lambda t: t.inflight_nbytes),
    _tier("kvlayer_tier_orphan_calls", "Calls past their deadline.", lambda t: t.orphans),
    _tier("kvlayer_tier_policies_replaced", "Broken policies.", lambda t: t.policies_replaced),
    _tier(
        "kvlayer_tier_oldest_call_seconds",
        "Age of the call that has not ended for longest.",
        lambda t: t.oldest_call_seconds,
    ),
    _tier("kvlayer_tier_reads_admitted", "1 while it is asked.", lambda t: t.reads == "closed"),
    _tier("kvlayer_tier_writes_admitted", "1 while it is written.", lambda t: t.writes == "closed"),
    _tier("kvlayer_tier_load_latency_seconds", "What any load takes.", lambda t: t.latency_seconds),
    _tier(
        "kvlayer_tier_load_bytes_per_second",
        "Bytes a second of loads.",
        lambda t: t.bytes_per_second,
    ),
    Scraped(Family("kvlayer_tier_up", "1 unless the last call failed.", ("tier",)), _up),
    Scraped(
        Family(
            "kvlayer_tier_misses",
            "Times a tier did not serve or take what it should have.",
            ("tier", "cause"),
        ),
        _misses,
        is_counter=True,
    ),
)

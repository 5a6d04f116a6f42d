"""Events as Prometheus metrics: counters and histograms per tier and cause, gauges at a scrape.

Needs the extra ``kvlayer-core[prometheus]``; prometheus_client is imported when a sink is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING

from kvlayer.errors import ConfigError, UnsupportedError
from kvlayer.telemetry import families
from kvlayer.telemetry.counting import EventCounter
from kvlayer.telemetry.families import Family
from kvlayer.telemetry.scrape import Scrape

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Histogram
    from prometheus_client.registry import Collector

    from kvlayer.api.cache import Cache

__all__ = ["SECONDS_BUCKETS", "PrometheusSink"]

SECONDS_BUCKETS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025),
    *(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
"""Upper bounds of the histograms, in seconds: from a lookup in memory to a deadline missed."""

OTHERS = "(others)"
"""The ``owner`` of all that came after the bound was reached."""


class PrometheusSink(EventCounter):
    """A sink for one cache, as the label ``cache`` of every metric.

    The metrics join ``registry`` (default: ``prometheus_client.REGISTRY``) and stay there. Several
    caches of one process either have registries of their own or share one: :meth:`sibling` makes
    the sink of the next cache. :meth:`watch` adds the gauges, which no event carries.

    ``owners`` is how many owners of requests get counters of their own, the first that come; the
    rest are ``(others)``. 0, the default, names none: every label has few values then, and nothing
    of a request is shown. ``buckets`` are the histograms' upper bounds in seconds.

    Thread-safe. Raises ``UnsupportedError`` without prometheus_client, and ``ConfigError`` when
    the registry has metrics of these names already.
    """

    def __init__(
        self,
        cache: str = "default",
        *,
        registry: CollectorRegistry | None = None,
        owners: int = 0,
        buckets: Sequence[float] = SECONDS_BUCKETS,
    ) -> None:
        if owners < 0:
            raise ConfigError(f"owners must be at least 0, found {owners}")
        self._metrics = _Metrics(registry, buckets, with_owners=owners > 0)
        self._join(cache, owners)

    def _join(self, cache: str, owners: int) -> None:
        self.cache = cache
        self._max_owners = owners
        self._owners: set[str] = set()
        self._owners_lock = Lock()
        self._children: dict[tuple[Family, tuple[str, ...]], Counter] = {}
        self._timers: dict[tuple[Family, tuple[str, ...]], Histogram] = {}
        self._metrics.name(cache)

    def sibling(self, cache: str) -> PrometheusSink:
        """The sink of another cache, in the same metrics. Raises ``ConfigError`` for a name twice.

        It counts owners as this one does, up to as many of its own.
        """
        made = object.__new__(PrometheusSink)
        made._metrics = self._metrics
        made._join(cache, self._max_owners)
        return made

    def watch(self, cache: Cache) -> None:
        """Show gauges of ``cache`` at every scrape until it closes; it is not kept alive.

        Raises ``ConfigError`` while another open cache is watched through this sink.
        """
        if not self._metrics.scrape.watch(self.cache, cache):
            raise ConfigError(
                f"the sink of cache {self.cache!r} watches another open cache",
                hint="give each cache a sink of its own: sink.sibling('name')",
            )

    # -- one figure each -------------------------------------------------------------------------

    def add(self, family: Family, amount: float, *labels: str) -> None:
        child = self._children.get((family, labels))
        if child is None:  # finding a child by its labels costs more than counting
            child = self._metrics.counters[family].labels(self.cache, *labels)
            self._children[family, labels] = child
        child.inc(amount)

    def observe(self, family: Family, seconds: float, *labels: str) -> None:
        child = self._timers.get((family, labels))
        if child is None:
            child = self._metrics.histograms[family].labels(self.cache, *labels)
            self._timers[family, labels] = child
        child.observe(seconds)

    def own(self, owner: str, family: Family, amount: float) -> None:
        if not self._max_owners:
            return
        if owner not in self._owners:
            with self._owners_lock:
                if len(self._owners) < self._max_owners:
                    self._owners.add(owner)
        self.add(family, amount, owner if owner in self._owners else OTHERS)


class _Metrics:
    """What a registry holds once for all caches that share it."""

    def __init__(
        self, registry: CollectorRegistry | None, buckets: Sequence[float], *, with_owners: bool
    ) -> None:
        try:
            from prometheus_client import REGISTRY, Counter, Histogram
        except ModuleNotFoundError as exc:
            if exc.name != "prometheus_client":
                raise
            raise UnsupportedError(
                "metrics need the package prometheus_client, which is not installed",
                hint="install kvlayer-core[prometheus]",
            ) from exc
        self._names: set[str] = set()
        self.scrape = Scrape()
        counters = families.COUNTERS + (families.OWNER_COUNTERS if with_owners else ())
        # Built without a registry and registered after: a clash leaves nothing half there.
        self.counters = {
            each: Counter(each.name, each.help, ("cache", *each.labels), registry=None)
            for each in counters
        }
        self.histograms = {
            each: Histogram(
                each.name, each.help, ("cache", *each.labels), registry=None, buckets=buckets
            )
            for each in families.HISTOGRAMS
        }
        self._register(REGISTRY if registry is None else registry)

    def _register(self, registry: CollectorRegistry) -> None:
        joined: list[Collector] = []
        try:
            metrics: list[Collector] = [*self.counters.values(), *self.histograms.values()]
            for each in (*metrics, self.scrape):
                registry.register(each)
                joined.append(each)
        except ValueError as exc:
            for each in joined:
                registry.unregister(each)
            raise ConfigError(
                f"the registry has metrics of these names already: {exc}",
                hint="share them: sink.sibling('name'); or give this sink a registry of its own",
            ) from exc

    def name(self, cache: str) -> None:
        """Take a label. Raises ``ConfigError`` when it is taken."""
        if cache in self._names:
            raise ConfigError(
                f"there is a sink for cache {cache!r} already",
                hint="use that sink again for a cache that is reopened; otherwise another name",
            )
        self._names.add(cache)

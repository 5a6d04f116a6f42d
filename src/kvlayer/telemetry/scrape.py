"""What is read from open caches when somebody scrapes: gauges, and the misses of each tier."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from kvlayer.errors import ClosedError, ForkedError
from kvlayer.telemetry.families import SCRAPED, Reading

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from kvlayer.api.cache import Cache

__all__ = ["Scrape"]

_log = logging.getLogger(__name__)


class Scrape:
    """A collector of prometheus_client. Called on any thread, whatever the caches are doing.

    It takes constant time and only the Planner's lock, for a moment. A cache that has closed is
    left out, and so is one whose backend cannot be asked; neither fails the application's scrape.
    """

    def __init__(self) -> None:
        self._caches: dict[str, weakref.ref[Cache]] = {}

    def watch(self, name: str, cache: Cache) -> bool:
        """Read ``cache`` from now on. False when an open cache is watched under this name."""
        known = self._caches.get(name)
        before = None if known is None else known()
        if before is not None and before is not cache and _read(name, before) is not None:
            return False
        self._caches[name] = weakref.ref(cache)
        return True

    def describe(self) -> Iterable[Metric]:
        """The families without figures: the registry finds clashes without asking any cache."""
        return _metrics({})

    def collect(self) -> Iterable[Metric]:
        """The families with what every open cache says now."""
        caches = {name: reference() for name, reference in tuple(self._caches.items())}
        readings = {name: _read(name, cache) for name, cache in caches.items() if cache is not None}
        return _metrics({name: said for name, said in readings.items() if said is not None})


def _metrics(readings: Mapping[str, Reading]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    for each in SCRAPED:
        made = CounterMetricFamily if each.is_counter else GaugeMetricFamily
        labels = ("cache", *each.family.labels)
        metric = made(each.family.name, each.family.help, labels=labels)
        for name, reading in readings.items():
            for values, figure in each.read(reading):
                metric.add_metric((name, *values), figure)
        yield metric


def _read(name: str, cache: Cache) -> Reading | None:
    """What a cache says now; None when it has nothing to say."""
    try:
        return Reading.of(cache)
    except (ClosedError, ForkedError):
        return None
    except Exception:  # noqa: BLE001  # a backend's own figures; other metrics must not suffer
        _log.exception("the figures of cache %r could not be read", name)
        return None

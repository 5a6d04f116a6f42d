"""kvlayer's figures in vLLM's statistics: collected beside the cache, logged and shown by vLLM.

The scheduler's connector hands over what has been counted since its last step; vLLM carries it to
whichever process logs and answers scrapes. Families and their meaning are the core's
(``kvlayer.telemetry.families``), under vLLM's prefix and with its labels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import Any, TypeAlias, cast

from kvlayer import Cache
from kvlayer.telemetry import families
from kvlayer.telemetry.counting import EventCounter
from kvlayer.telemetry.families import Family, Reading
from kvlayer.telemetry.prometheus import SECONDS_BUCKETS
from kvlayer_vllm.engine import KVConnectorPromMetrics, KVConnectorStats

__all__ = ["CUT_STORES", "HELD_BLOCKS", "Figures", "PromMetrics", "StatsSink"]

_log = logging.getLogger("vllm.kvlayer")  # below vLLM's, so that its users see it

CUT_STORES = Family(
    "kvlayer_cut_stores",
    "Stores cut short: they would hold too many of the engine's blocks.",
)
HELD_BLOCKS = Family("kvlayer_held_blocks", "Blocks of the engine that stores hold and read.")
"""Of this adapter alone, beside the core's families."""

_READ_SECONDS = 1.0  # gauges cost a lock and are scraped every few seconds at most
_MOST_TIMES = 4096  # of one family between two steps: an engine that idles sends nothing

Sums: TypeAlias = dict[str, float]
"""By a family's name and its labels' values, joined by tabs: what crosses processes is plain."""


def _key(family: Family, labels: Sequence[str]) -> str:
    return "\t".join((family.name, *labels))


class Figures(KVConnectorStats):
    """What was counted in some interval: ``counters``, ``seconds`` of operations, ``gauges``.

    ``data`` is plain, so that it can be sent; several intervals and engines add up by
    :meth:`aggregate`.
    """

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data if data is not None else {})
        if not self.data:
            self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.data = {"counters": {}, "seconds": {}, "gauges": {}}

    def is_empty(self) -> bool:
        """Whether there is nothing to say."""
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> Figures:
        """Add a later interval to this one. Returns itself."""
        counters = cast("Sums", self.data["counters"])
        for key, amount in cast("Sums", other.data["counters"]).items():
            counters[key] = counters.get(key, 0) + amount
        seconds = cast("dict[str, list[float]]", self.data["seconds"])
        for key, times in cast("dict[str, list[float]]", other.data["seconds"]).items():
            seconds.setdefault(key, []).extend(times)
        self.data["gauges"].update(other.data["gauges"])
        return self

    def reduce(self) -> dict[str, int | float]:
        """One line of vLLM's log: what the interval came to."""
        took = self._times(families.RETRIEVE_SECONDS)
        return {
            "kvlayer lookups": int(self.total(families.LOOKUPS)),
            "tokens asked": int(self.total(families.LOOKUP_ASKED)),
            "tokens found": int(self.total(families.LOOKUP_HIT)),
            "tokens loaded": int(self.total(families.RETRIEVE_TOKENS)),
            "MB loaded": round(self.total(families.RETRIEVE_BYTES) / 1e6, 3),
            "ms per load": round(sum(took) / len(took) * 1e3, 3) if took else 0.0,
            "MB stored": round(self.total(families.STORE_BYTES) / 1e6, 3),
            "failures": int(self.total(families.FAILURES)),
        }

    def total(self, family: Family, *labels: str) -> float:
        """A counter's sum over all values of the labels that are not given."""
        start = _key(family, labels)
        counters = cast("Sums", self.data["counters"])
        return sum(n for key, n in counters.items() if key == start or key.startswith(start + "\t"))

    def _times(self, family: Family) -> list[float]:
        found: list[float] = self.data["seconds"].get(family.name, [])
        return found


class StatsSink(EventCounter):
    """Counts a cache's events until somebody takes the sums. Thread-safe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = Lock()
        self._figures = Figures()
        self._read_at = -_READ_SECONDS
        self._counted: Sums = {}
        """Counters that are read, as they were last."""

    def add(self, family: Family, amount: float, *labels: str) -> None:
        key = _key(family, labels)
        with self._lock:
            counters = cast("Sums", self._figures.data["counters"])
            counters[key] = counters.get(key, 0) + amount

    def observe(self, family: Family, seconds: float, *labels: str) -> None:
        with self._lock:
            times: list[float] = self._figures.data["seconds"].setdefault(_key(family, labels), [])
            if len(times) < _MOST_TIMES:
                times.append(seconds)

    def store_cut(self) -> None:
        """A store was cut short."""
        self.add(CUT_STORES, 1)

    def take(self, cache: Cache, *, held_blocks: int = 0) -> Figures | None:
        """What happened since it was taken last; None for nothing. Gauges once a second.

        ``held_blocks``: of the engine's, now.

        Raises what a backend's own figures raise, and then what was counted is still there.
        """
        reading: Reading | None = None
        if self._clock() - self._read_at >= _READ_SECONDS:
            self._read_at = self._clock()
            reading = Reading.of(cache)
        with self._lock:
            taken, self._figures = self._figures, Figures()
        if reading is not None:
            self._add_read(reading, taken)
            taken.data["gauges"][HELD_BLOCKS.name] = float(held_blocks)
        return None if taken.is_empty() else taken

    def _add_read(self, reading: Reading, into: Figures) -> None:
        for each in families.SCRAPED:
            for labels, value in each.read(reading):
                key = _key(each.family, labels)
                if not each.is_counter:
                    into.data["gauges"][key] = float(value)
                elif grown := value - self._counted.get(key, 0):
                    into.data["counters"][key] = grown
                    self._counted[key] = value


class PromMetrics(KVConnectorPromMetrics):
    """The families as metrics of vLLM's, in the process that is scraped.

    Names have ``vllm:`` in front: vLLM unregisters by it what an earlier engine of the same process
    has left, and an application's own ``PrometheusSink`` does not meet them.
    """

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        read = [(each.family, each.is_counter) for each in families.SCRAPED]
        counted = [*families.COUNTERS, *(family for family, is_counter in read if is_counter)]
        shown = [family for family, is_counter in read if not is_counter]
        counted.append(CUT_STORES)
        shown.append(HELD_BLOCKS)
        self._metrics: dict[str, Any] = {}
        for family in counted:
            self._make(self._counter_cls, family)
        for family in families.HISTOGRAMS:
            self._make(self._histogram_cls, family, buckets=list(SECONDS_BUCKETS))
        for family in shown:
            self._make(self._gauge_cls, family, multiprocess_mode="mostrecent")
        self._children: dict[tuple[int, str], Any] = {}
        self._is_broken = False

    def _make(self, kind: Any, family: Family, **more: Any) -> None:
        self._metrics[family.name] = kind(
            name=f"vllm:{family.name}",
            documentation=family.help,
            labelnames=[*self._labelnames, *family.labels],
            **more,
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what an engine's :class:`Figures` hold. Never raises: vLLM's output loop calls it."""
        try:
            for key, amount in transfer_stats_data["counters"].items():
                self._child(engine_idx, key).inc(amount)
            for key, times in transfer_stats_data["seconds"].items():
                child = self._child(engine_idx, key)
                for seconds in cast("Iterable[float]", times):
                    child.observe(seconds)
            for key, value in transfer_stats_data["gauges"].items():
                self._child(engine_idx, key).set(value)
        except Exception:  # noqa: BLE001  # metrics are never worth a request
            if not self._is_broken:
                self._is_broken = True
                _log.exception("some of kvlayer's metrics are missing from here on (told once)")

    def _child(self, engine_idx: int, key: str) -> Any:
        child = self._children.get((engine_idx, key))
        if child is None:  # finding a child by its labels costs more than counting
            name, *labels = key.split("\t")
            values = [*self.per_engine_labelvalues[engine_idx], *labels]
            child = self._children[engine_idx, key] = self._metrics[name].labels(*values)
        return child

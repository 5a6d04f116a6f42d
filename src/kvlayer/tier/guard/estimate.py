"""How long a load will take, learnt from those before it. Pure: the caller brings the time.

Seconds are modelled as ``latency + bytes / bandwidth`` and fitted by least squares in which every
new load weighs more than the ones before it. What is not known costs nothing: it is tried, and
known then. What was learnt long ago is forgotten, so that a tier which was slow gets its chance.
"""

from __future__ import annotations

__all__ = ["Estimate", "Rate"]

_KEEP = 0.9  # of the weight of all before, when a new load is seen: about the last ten count
_MEMORY_SECONDS = 60.0
_TICK = 1e-9  # no clock that measured less can be believed


class Estimate:
    """Seconds that loads of a tier take, by their bytes."""

    def __init__(self, *, memory_seconds: float = _MEMORY_SECONDS) -> None:
        self._memory = memory_seconds
        self._seen_at = 0.0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self.latency = 0.0
        """Seconds that a load takes whatever its size."""
        self.bandwidth: float | None = None
        """Bytes per second beyond that; None while nothing is known."""

    def observe(self, nbytes: int, seconds: float, now: float) -> None:
        """A load of ``nbytes`` took ``seconds``, waiting for its turn included."""
        if nbytes <= 0 or seconds <= 0:
            return
        if now - self._seen_at > self._memory:
            self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._seen_at = now
        x, y = float(nbytes), seconds
        self._weight = _KEEP * self._weight + 1
        self._x = _KEEP * self._x + x
        self._y = _KEEP * self._y + y
        self._xx = _KEEP * self._xx + x * x
        self._xy = _KEEP * self._xy + x * y
        self._fit()

    def _fit(self) -> None:
        n, x, y = self._weight, self._x, self._y
        spread = n * self._xx - x * x
        slope = (n * self._xy - x * y) / spread if spread > 1e-6 * n * self._xx else 0.0
        latency = (y - slope * x) / n
        if slope <= 0 or latency < 0:  # all of one size, or noise: a line through the origin
            slope, latency = y / x, 0.0
        self.latency, self.bandwidth = latency, 1 / slope

    def seconds(self, nbytes: int, now: float) -> float:
        """What a load of ``nbytes`` will take; 0 while nothing (recent) is known."""
        if not nbytes or self.bandwidth is None or now - self._seen_at > self._memory:
            return 0.0
        return self.latency + nbytes / self.bandwidth


class Rate:
    """Tokens per second of an engine's prefill, as it reports them."""

    def __init__(self, tokens_per_second: float = 0.0) -> None:
        self._tokens = tokens_per_second
        self._seconds = 1.0 if tokens_per_second else 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """A prefill of ``tokens`` took ``seconds``."""
        if tokens > 0 and seconds > 0:
            self._tokens = _KEEP * self._tokens + tokens
            self._seconds = _KEEP * self._seconds + max(seconds, _TICK)

    @property
    def tokens_per_second(self) -> float | None:
        """None while nothing is known: then everything is worth loading."""
        return self._tokens / self._seconds if self._seconds else None

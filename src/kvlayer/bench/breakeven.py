"""Load or recompute: from which prefill rate on a tier is slower than the engine itself. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvlayer.bench.measure import Row

__all__ = ["BreakEven", "break_evens"]


@dataclass(frozen=True, slots=True)
class BreakEven:
    """What a tier delivers to the engine, as a prefill rate."""

    tier: str
    rows: tuple[str, ...]
    """The figures it follows from; the slowest of them decides."""
    bytes_per_s: float
    bytes_per_token: int
    prefill_rate: float | None = None
    """Tokens per second that the engine computes, if it was told."""

    @property
    def tokens_per_s(self) -> float:
        """An engine that prefills faster than this should recompute rather than load."""
        return self.bytes_per_s / self.bytes_per_token

    @property
    def speedup(self) -> float | None:
        """How many times faster loading is than recomputing; None without a prefill rate."""
        return None if self.prefill_rate is None else self.tokens_per_s / self.prefill_rate

    def as_dict(self) -> dict[str, object]:
        """What the JSON report holds."""
        speedup = self.speedup
        return {
            "tier": self.tier,
            "rows": list(self.rows),
            "bytes_per_token": self.bytes_per_token,
            "tokens_per_s": self.tokens_per_s,
            "prefill_rate": self.prefill_rate,
            "loading_pays": None if speedup is None else speedup > 1,
        }

    def __str__(self) -> str:
        line = f"{self.tier}: recomputing is faster above {self.tokens_per_s:,.0f} tokens/s"
        if self.prefill_rate is None or self.speedup is None:
            return line
        rate = f"{self.prefill_rate:,.0f} tokens/s"
        if self.speedup > 1:
            return f"{line}; at {rate} loading is {self.speedup:.1f}x faster"
        return (
            f"{line}; at {rate} RECOMPUTING IS {1 / self.speedup:.1f}x FASTER: do not load from "
            "this tier"
        )


_INTO_ENGINE = "host.retrieve.canonical"
_PATHS = {"cpu": (_INTO_ENGINE,), "file": ("file.read.cold", _INTO_ENGINE)}
"""The moves on the way from each tier into the engine. They overlap: the slowest one decides."""


def break_evens(
    rows: Sequence[Row], bytes_per_token: int, prefill_rate: float | None
) -> list[BreakEven]:
    """One for each tier whose own move was measured. Latency is left out: prompts are long."""
    rates = {row.name: row.value for row in rows}
    found: list[BreakEven] = []
    for tier, path in _PATHS.items():
        if path[0] in rates:
            known = tuple(name for name in path if name in rates)
            slowest = min(rates[name] for name in known)
            found.append(BreakEven(tier, known, slowest, bytes_per_token, prefill_rate))
    return found

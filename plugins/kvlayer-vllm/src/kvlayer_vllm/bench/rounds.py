"""Engines that take turns, and the rows that come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeAlias

from kvlayer.bench.measure import Row
from kvlayer_vllm.bench.kinds import KINDS, TIERS

__all__ = ["Ask", "Figures", "as_dicts", "measured", "rows_of"]

Ask: TypeAlias = Callable[[int], Mapping[str, Any]]
"""An engine: the ``Answer``, as a dict, of its prompt of so many tokens."""


@dataclass(slots=True)
class Figures:
    """Of one engine and one length: the answer that was computed, and those that were loaded."""

    cold: Mapping[str, Any]
    hits: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])

    def hit(self, what: str) -> float:
        """The median of the hits' ``seconds`` or ``cpu_seconds``."""
        return float(median(hit[what] for hit in self.hits))

    @property
    def loaded_tokens(self) -> int:
        """Prompt tokens that no hit has computed."""
        return int(min(hit["cached"] for hit in self.hits))


def measured(engines: Mapping[str, Ask], lengths: Sequence[int], rounds: int) -> dict[int, Any]:
    """For each length the :class:`Figures` of each engine, by its kind.

    Each round asks every engine once, and begins with another one: what disturbs the machine
    disturbs all of them. One engine works at a time.
    """
    found: dict[int, dict[str, Figures]] = {}
    for length in lengths:
        figures = {kind: Figures(engines[kind](length)) for kind in engines}
        for number in range(rounds):
            first = number % len(engines)
            kinds = list(engines)
            for kind in kinds[first:] + kinds[:first]:
                figures[kind].hits.append(engines[kind](length))
        found[length] = figures
    return found


def rows_of(model: str, found: Mapping[int, Mapping[str, Figures]]) -> list[Row]:
    """``ttft.MODEL.TIER.LENGTH`` in CPU seconds, and the same with ``.wall`` in wall seconds.

    The ceiling is vLLM's prefix cache, whose KV nobody has to move.
    """
    rows: list[Row] = []
    for length, figures in found.items():
        for tier in TIERS:
            name, own, top = f"ttft.{model}.{tier}.{length}", figures[tier], figures[KINDS[0]]
            cpu, wall = "cpu_seconds", "seconds"
            rows.append(Row(name, own.hit(cpu), "s", top.hit(cpu)))
            rows.append(Row(f"{name}.wall", own.hit(wall), "s", top.hit(wall)))
    return rows


def as_dicts(model: str, found: Mapping[int, Mapping[str, Figures]]) -> list[dict[str, Any]]:
    """For each engine and length what the rows do not say."""
    return [
        {
            "name": f"{model}.{kind}.{length}",
            "cold": own.cold["cpu_seconds"],
            "cold_wall": own.cold["seconds"],
            "loaded_tokens": own.loaded_tokens,
            # bf16 has near ties, and a hit may answer otherwise: vLLM's prefix cache as well.
            "same_output": all(hit["tokens"] == own.cold["tokens"] for hit in own.hits),
            "hits": [[hit["cpu_seconds"], hit["seconds"]] for hit in own.hits],
        }
        for length, figures in found.items()
        for kind, own in figures.items()
    ]

"""Engines that take turns, and the rows that come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol, TypeAlias

from kvlayer.bench.measure import Row
from kvlayer_vllm.bench.kinds import FILES, KINDS, TIERS

__all__ = ["Ask", "Engine", "Figures", "as_dicts", "measured", "rows_of", "stages"]

Ask: TypeAlias = Callable[[int], Mapping[str, Any]]
"""An engine: the ``Answer``, as a dict, of its prompt of so many tokens."""


class Engine(Protocol):
    """An engine that can be ended, more than once."""

    def __call__(self, length: int, /) -> Mapping[str, Any]: ...

    def close(self) -> None: ...


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


def measured(
    engines: Mapping[str, Ask],
    lengths: Sequence[int],
    rounds: int,
    before: Mapping[int, Mapping[str, Figures]] | None = None,
) -> dict[int, dict[str, Figures]]:
    """For each length the :class:`Figures` of each engine, by its kind.

    Each round asks every engine once, and begins with another one: what disturbs the machine
    disturbs all of them. One engine works at a time. ``before``: of engines that computed these
    prompts and left their KV to these, for which the first answer is a hit.
    """
    found: dict[int, dict[str, Figures]] = {}
    for length in lengths:
        figures = {
            kind: Figures(engines[kind](length) if before is None else before[length][kind].cold)
            for kind in engines
        }
        for number in range(rounds):
            first = number % len(engines)
            kinds = list(engines)
            for kind in kinds[first:] + kinds[:first]:
                figures[kind].hits.append(engines[kind](length))
        found[length] = figures
    return found


def stages(
    start: Callable[[str], Engine], lengths: Sequence[int], rounds: int
) -> Iterator[tuple[str, dict[int, dict[str, Figures]]]]:
    """What each tier costs in the engine that computed the prompts (``""``), in one beside it that
    reads the same files (``".shared"``), and in one that is started when those have ended
    (``".restart"``). ``start`` makes an engine of a kind.
    """
    with ExitStack() as stack:

        def started(kind: str) -> Engine:
            engine = start(kind)
            stack.callback(engine.close)
            return engine

        first = {kind: started(kind) for kind in KINDS}
        found = measured(first, lengths, rounds)
        yield "", found
        for kind in TIERS:
            if kind not in FILES:
                first[kind].close()  # nothing is left of it, and its memory is wanted
        top = {KINDS[0]: first[KINDS[0]]}
        beside = {kind: started(kind) for kind in FILES}
        yield ".shared", measured(top | beside, lengths, rounds, found)
        for kind in FILES:
            first[kind].close()
            beside[kind].close()
        again = {kind: started(kind) for kind in FILES}
        yield ".restart", measured(top | again, lengths, rounds, found)


def rows_of(model: str, found: Mapping[int, Mapping[str, Figures]], where: str = "") -> list[Row]:
    """``ttft.MODEL.TIER.LENGTH`` in CPU seconds, and the same with ``.wall`` in wall seconds.

    ``where`` follows the tier's name.

    The ceiling is vLLM's prefix cache, whose KV nobody has to move.
    """
    rows: list[Row] = []
    for length, figures in found.items():
        top = figures[KINDS[0]]
        for tier, own in figures.items():
            if own is top:
                continue
            name = f"ttft.{model}.{tier}{where}.{length}"
            cpu, wall = "cpu_seconds", "seconds"
            rows.append(Row(name, own.hit(cpu), "s", top.hit(cpu)))
            rows.append(Row(f"{name}.wall", own.hit(wall), "s", top.hit(wall)))
    return rows


def as_dicts(
    model: str, found: Mapping[int, Mapping[str, Figures]], where: str = ""
) -> list[dict[str, Any]]:
    """For each engine and length what the rows do not say."""
    return [
        {
            "name": f"{model}.{kind}{where}.{length}",
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

"""The benchmark of the time to first token: engines that take turns, and the rows of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kvlayer_vllm.bench.__main__ import LENGTHS
from kvlayer_vllm.bench.kinds import FILES, KINDS, TIERS
from kvlayer_vllm.bench.rounds import Ask, Figures, as_dicts, measured, rows_of, stages

SHORT = (80, 208)
BLOCK = 32


class Asked:
    """An engine of the benchmark, forked from one that has imported vLLM."""

    def __init__(self, zygote: Any, model: Path, kind: str, directory: Path) -> None:
        names = {"model": str(model), "kind": kind, "directory": str(directory)}
        self.victim = zygote.start("measure", **names)
        assert self.victim.told() == "ready"

    def __call__(self, length: int) -> Mapping[str, Any]:
        self.victim.say(json.dumps(length))
        found: Mapping[str, Any] = self.victim.told()
        return found


@pytest.fixture(scope="module")
def found(
    zygote: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[int, dict[str, Figures]]]:
    directory = tmp_path_factory.mktemp("bench")
    engines: dict[str, Ask] = {kind: Asked(zygote, tiny, kind, directory) for kind in KINDS}
    yield measured(engines, SHORT, rounds=2)
    for engine in engines.values():
        assert isinstance(engine, Asked)
        assert engine.victim.end() == 0


def test_every_tier_and_length_has_its_row_beside_the_prefix_cache_of_the_run(
    found: dict[int, dict[str, Figures]],
) -> None:
    rows = {row.name: row for row in rows_of("tiny", found)}
    names = [f"ttft.tiny.{tier}.{length}" for length in SHORT for tier in TIERS]
    assert list(rows) == [name + end for name in names for end in ("", ".wall")]
    for length in SHORT:
        for tier in TIERS:
            row = rows[f"ttft.tiny.{tier}.{length}"]
            assert (row.unit, row.ceiling) == ("s", found[length]["prefix"].hit("cpu_seconds"))
            assert row.value == found[length][tier].hit("cpu_seconds") > 0
            wall = rows[f"{row.name}.wall"]
            assert wall.ceiling == found[length]["prefix"].hit("seconds")


def test_every_engine_computes_a_prompt_once_and_has_as_much_of_it_afterwards(
    found: dict[int, dict[str, Figures]],
) -> None:
    for length in SHORT:
        usable = (length - 1) // BLOCK * BLOCK
        for kind in KINDS:
            of_kind = found[length][kind]
            assert (kind, of_kind.cold["cached"]) == (kind, 0)
            assert (kind, [hit["cached"] for hit in of_kind.hits]) == (kind, [usable, usable])
    assert [each["loaded_tokens"] for each in as_dicts("tiny", found)] == [64] * len(KINDS) + [
        192
    ] * len(KINDS)


def test_no_length_gives_a_connector_more_than_the_prefix_cache_has() -> None:
    assert all(length % BLOCK for length in LENGTHS)


def test_engines_take_turns_and_another_one_begins_each_round() -> None:
    asked: list[tuple[str, int]] = []

    def engine(kind: str) -> Ask:
        def ask(length: int) -> Mapping[str, Any]:
            asked.append((kind, length))
            return {"cached": 0, "cpu_seconds": 1.0, "seconds": 1.0, "tokens": []}

        return ask

    measured({kind: engine(kind) for kind in ("a", "b", "c")}, [7, 9], rounds=2)
    turns = "abc" + "abc" + "bca"
    assert asked == [(kind, length) for length in (7, 9) for kind in turns]


class Played:
    """An engine that answers what a table says, and tells what was done with it."""

    def __init__(self, kind: str, told: list[str], figure: float) -> None:
        self._kind = kind
        self._told = told
        self._figure = figure

    def __call__(self, length: int, /) -> Mapping[str, Any]:
        return {"cached": 0, "cpu_seconds": self._figure, "seconds": 1.0, "tokens": []}

    def close(self) -> None:
        self._told.append(f"{self._kind} ends")


def test_files_are_read_by_an_engine_beside_the_first_and_by_one_after_it() -> None:
    told: list[str] = []

    def start(kind: str) -> Played:
        told.append(f"{kind} starts")
        return Played(kind, told, float(len(told)))

    found = {where: figures[7] for where, figures in stages(start, [7], rounds=1)}
    starts, ends = [f"{kind} starts" for kind in FILES], [f"{kind} ends" for kind in FILES]
    own, rest = [f"{kind} starts" for kind in KINDS], told[len(KINDS) :]
    assert told[: len(KINDS)] == own and rest[:2] == ["cpu ends", "native ends"]
    assert rest[2:5] == starts and sorted(rest[5:11]) == sorted(ends * 2) and rest[11:14] == starts
    assert list(found) == ["", ".shared", ".restart"]
    assert list(found[""]) == list(KINDS)
    for where in (".shared", ".restart"):
        assert list(found[where]) == [KINDS[0], *FILES]
        for kind in FILES:  # other engines, which have not computed the prompt
            assert found[where][kind].cold == found[""][kind].cold
            assert found[where][kind].hit("cpu_seconds") != found[""][kind].hit("cpu_seconds")
        names = [row.name for row in rows_of("tiny", {7: found[where]}, where)]
        assert names[::2] == [f"ttft.tiny.{kind}{where}.7" for kind in FILES]

"""Every parser of bytes from outside: only documented errors, bounded memory and time, round trips.

Every run replays the corpus and damaged copies of it. A campaign fuzzes each parser for ten minutes
with libFuzzer, guided by coverage (``KVLAYER_FUZZ_SECONDS`` for other seconds), two at a time.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fuzz_targets
import pytest
from fuzz_targets import TARGETS, HangError, Target, UnboundedError, examine

SEED = int(os.environ.get("KVLAYER_SEED", "1"))  # read here: tests see no such variable
FUZZ_SECONDS = float(os.environ.get("KVLAYER_FUZZ_SECONDS", "600"))
CORPUS = Path(__file__).parent / "corpus"
SCRIPT = Path(fuzz_targets.__file__).with_name("fuzz_process.py")
AT_ONCE = 2
MAX_CORPUS_NBYTES = 200_000


@pytest.fixture
def tracing() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def inputs(parser: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / parser).iterdir())]


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("parser", TARGETS)
def test_the_corpus_is_parsed_or_refused_within_bounds(parser: str) -> None:
    accepted = [examine(TARGETS[parser], given) for given in inputs(parser)]
    assert any(accepted) and not all(accepted), "a corpus that reaches half a parser tests half"


def damaged(corpus: list[bytes], rng: random.Random, most: int) -> bytes:
    """One input, with parts of itself or of another moved, doubled, cut or flipped."""
    given = bytearray(rng.choice(corpus))
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        start = rng.randrange(len(given) + 1)
        stop = min(start + rng.choice([1, 1, 2, 4, 16, 64]), len(given))
        match rng.randrange(5):
            case 0:
                given[start:stop] = rng.randbytes(stop - start)
            case 1:
                del given[start:stop]
            case 2:
                given[start:start] = given[start:stop] * rng.choice([1, 2, 50])
            case 3:
                other = rng.choice(corpus)
                at = rng.randrange(len(other) + 1)
                given[start:stop] = other[at : at + rng.randrange(64)]
            case _ if start < len(given):
                given[start] ^= 1 << rng.randrange(8)
    return bytes(given[:most])


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("parser", TARGETS)
def test_damaged_inputs_are_parsed_or_refused_within_bounds(parser: str, dose: Any) -> None:
    rng, corpus, target = random.Random(SEED), inputs(parser), TARGETS[parser]
    for _ in range(dose(100, 2_000)):
        given = damaged(corpus, rng, target.max_len)
        try:
            examine(target, given)
        except BaseException as exc:
            exc.add_note(f"the input: {given!r}")
            raise


def guided(parser: str, seconds: float, folder: Path) -> dict[str, float]:
    """Fuzz one parser in a process of its own; its figures. Fails with what was found."""
    corpus = folder / parser
    corpus.mkdir()
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            parser,
            str(corpus),
            str(CORPUS / parser),
            f"-max_total_time={seconds:.0f}",
            "-print_final_stats=1",
            f"-artifact_prefix={folder}/{parser}-",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=10 * seconds + 600,
        check=False,
    )
    found = [(path.name, path.read_bytes()) for path in folder.glob(f"{parser}-*")]
    assert done.returncode == 0, f"{parser}: {found}\n{done.stderr[-5000:]}"
    said = r"^accepted (\d+) of (\d+) in (\d+) CPU seconds$"
    accepted, looked_at, cpu = map(int, re.findall(said, done.stderr, re.MULTILINE)[-1])
    return {
        "seconds": float(re.findall(r"in (\d+) second", done.stderr)[-1]),
        "cpu_seconds": cpu,
        "inputs": int(re.findall(r"number_of_executed_units: (\d+)", done.stderr)[-1]),
        "accepted_of_a_thousand": round(1000 * accepted / looked_at),
        "coverage": int(re.findall(r"cov: (\d+)", done.stderr)[-1]),
        "corpus": len([*corpus.iterdir()]),
        "found": len(found),
    }


def test_every_parser_has_a_corpus_and_a_campaign_fuzzes_it(
    tmp_path: Path, dose: Any, figures: Any
) -> None:
    seconds = dose(0, FUZZ_SECONDS)
    parsers = [*TARGETS] if seconds else []  # a campaign's alone: the fuzzer is 35 MB to install
    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = pool.map(lambda parser: guided(parser, seconds, tmp_path), parsers)
        for parser, row in zip(parsers, done, strict=True):
            figures(f"fuzz.{parser}", **row)
    assert len([*CORPUS.iterdir()]) == len(TARGETS)


# -- the bounds bite -----------------------------------------------------------------------------


@pytest.mark.usefixtures("tracing")
def test_a_parser_that_allocates_out_of_proportion_is_found() -> None:
    greedy = Target(lambda given: bool(bytearray(given[0] << 20)))
    assert examine(greedy, b"\x01")
    with pytest.raises(UnboundedError):
        examine(greedy, b"\x10")


@pytest.mark.usefixtures("tracing")
def test_a_parser_that_never_ends_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_targets, "CPU_SECONDS", 0.05)

    def hang(_: bytes) -> bool:
        while True:
            pass

    with pytest.raises(HangError):
        examine(Target(hang), b"")


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) < MAX_CORPUS_NBYTES

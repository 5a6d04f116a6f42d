"""Processes that are stopped while others share their directory: nobody waits, nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from victims import COUNT
from zygote import Victim, Zygote

SEED = int(os.environ.get("KVLAYER_SEED", "1"))
CALLS = 200


def is_stopped(victim: Victim) -> bool:
    state = Path(f"/proc/{victim.pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "T"


def stored(victim: Victim) -> list[int]:
    heard: list[str] = []
    while (line := victim.line()) is not None:
        assert line, "a process hangs"
        heard.append(line)
    return [int(line.split()[1]) for line in heard if line.startswith("stored")]


def unfinished(directory: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in directory.glob("v2/tmp/*/*.part")}


@pytest.mark.parametrize("options", ["", "&capacity=1MiB"])
def test_a_janitor_stopped_anywhere_in_a_store_holds_nobody_up_and_goes_on_after(
    tmp_path: Path, zygote: Zygote, dose: Any, figures: Any, options: str
) -> None:
    rng, wanted, worst = random.Random(SEED), dose(2, 20), 0.0
    stops = tries = wrong = 0
    while stops < wanted:
        tries += 1
        assert tries < 40 * wanted, "stops do not land in stores any more"
        shared = {"directory": str(tmp_path / str(tries)), "options": options}
        janitor = zygote.start(
            "store",
            first=0,
            count=6,
            strike_at=rng.randrange(1, CALLS),
            sign=signal.SIGSTOP,
            **shared,
        )
        assert janitor.line() == "open"
        if not janitor.stops():
            stored(janitor)
            assert janitor.end() == 0
            continue
        stops += 1
        # The same prompts, the one that the janitor is writing among them.
        began = time.monotonic()
        other = zygote.start("store", first=0, count=8, **shared)
        assert stored(other) == list(range(8))
        assert other.end() == 0
        worst = max(worst, time.monotonic() - began)
        assert is_stopped(janitor)
        janitor.signal(signal.SIGCONT)
        stored(janitor)  # it may have stored some before it was stopped, all the same
        assert janitor.end() == 0
        found = zygote.ask("recover", seeds=list(range(8)), **shared)
        wrong += found["wrong"]
        assert (found["wrong"], found["debris"], found["writers"]) == (0, [], 1)
        assert (found["used_nbytes"], found["objects"]) == (
            found["on_disk_nbytes"],
            found["files"],
        )
        if options:
            assert 0 < found["used_nbytes"] <= 1 << 20
        else:
            assert set(found["tokens"].values()) == {COUNT}
    figures(
        f"faults.stopped_janitor{'_of_a_full_tier' if options else ''}",
        seed=SEED,
        stops_in_stores=stops,
        others_8_stores_worst_seconds=round(worst, 3),
        wrong=wrong,
    )


def test_the_unfinished_file_of_a_stopped_process_is_left_to_it(
    tmp_path: Path, zygote: Zygote, figures: Any
) -> None:
    """It looks like a dead one's; its lock says that it lives."""
    shared = {"directory": str(tmp_path)}
    writer = zygote.start(
        "store",
        first=0,
        count=1,
        strike_call="pwritev",
        strike_at=2,
        sign=signal.SIGSTOP,
        **shared,
    )
    assert writer.line() == "open"
    assert writer.stops()
    before = unfinished(tmp_path)
    assert sum(before.values()) > 0
    other = zygote.start("store", first=0, count=2, **shared)
    assert stored(other) == [0, 1]
    assert other.end() == 0
    assert unfinished(tmp_path) == before
    writer.signal(signal.SIGCONT)
    assert stored(writer) == [0]
    assert writer.end() == 0
    found = zygote.ask("recover", seeds=[0, 1], **shared)
    assert (found["wrong"], found["debris"]) == (0, [])
    assert set(found["tokens"].values()) == {COUNT}
    figures(
        "faults.stopped_in_a_write", unfinished_nbytes=sum(before.values()), wrong=found["wrong"]
    )

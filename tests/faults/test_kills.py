"""Processes killed in the middle of stores: what was committed is found again, and nothing else.

``KVLAYER_SEED`` says where the kills land, as far as the kernel's scheduler lets it.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from victims import COUNT, OBJECTS
from zygote import Victim, Zygote

SEED = int(os.environ.get("KVLAYER_SEED", "1"))
STORES = 6
PER_DIRECTORY = 8
CALLS = 200  # of the system, in which six stores and what the background does meanwhile end


class Directory:
    """A shared directory over many kills: what was begun in it, and what was committed."""

    def __init__(self, path: Path, zygote: Zygote, options: str = "") -> None:
        self.path = path
        self.options = options
        self.begun = 0
        self.committed: set[int] = set()
        self.wrong = self.leaked_nbytes = 0
        """Over all examinations; each asserts that there is none."""
        self._zygote = zygote

    def start(self, **strike: int) -> Victim:
        """A process that stores prompts nobody has stored here."""
        victim = self._zygote.start(
            "store",
            directory=str(self.path),
            first=self.begun,
            count=STORES,
            options=self.options,
            **strike,
        )
        assert victim.line() == "open"
        return victim

    def killed_in(self, lines: Iterator[str]) -> int | None:
        """Take down what a process said until it was killed: the store it died in, if any."""
        inside: int | None = None
        for line in lines:
            verb, _, number = line.partition(" ")
            seed = int(number)
            self.begun = max(self.begun, seed + 1)
            if verb == "stored":
                self.committed.add(seed)
            inside = None if verb == "stored" else seed
        return inside

    def examine(self) -> dict[str, Any]:
        """What a new process finds; asserts that the accounts are exact and nothing is wrong."""
        found: dict[str, Any] = self._zygote.ask(
            "recover",
            directory=str(self.path),
            seeds=list(range(self.begun)),
            options=self.options,
        )
        self.wrong += found["wrong"]
        self.leaked_nbytes += abs(found["used_nbytes"] - found["on_disk_nbytes"])
        assert found["is_janitor"]
        assert found["wrong"] == 0
        assert found["debris"] == [] and found["writers"] == 1
        assert (found["used_nbytes"], found["objects"]) == (found["on_disk_nbytes"], found["files"])
        return found


def lines(victim: Victim) -> Iterator[str]:
    while (line := victim.line()) is not None:
        assert line, "a process hangs"
        yield line


def at_a_system_call(directory: Directory, rng: random.Random) -> int | None:
    """Kill a process by its own hand, at a call to the system: a write is half done then."""
    victim = directory.start(strike_at=rng.randrange(1, CALLS))
    inside = directory.killed_in(lines(victim))
    assert victim.end() in (0, -signal.SIGKILL)
    return inside


def at_a_moment(directory: Directory, rng: random.Random) -> int | None:
    """Kill a process at a moment of a store that nothing in it has chosen."""
    victim = directory.start()
    heard: list[str] = []
    wanted, seconds = f"storing {directory.begun + rng.randrange(STORES)}", rng.random() * 0.02
    while not heard or heard[-1] != wanted:
        heard.append(victim.line() or "")
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and (line := victim.line(left)):
        heard.append(line)
    victim.signal(signal.SIGKILL)
    inside = directory.killed_in(iter([*heard, *lines(victim)]))
    assert victim.end() in (0, -signal.SIGKILL)
    return inside


@pytest.mark.parametrize("kill", [at_a_system_call, at_a_moment])
def test_all_that_was_committed_before_a_kill_is_found_again_and_nothing_leaks(
    tmp_path: Path, zygote: Zygote, dose: Any, figures: Any, kill: Any
) -> None:
    rng, wanted, kills, tries = random.Random(SEED), dose(4, 60), 0, 0
    directory = Directory(tmp_path / "0", zygote)
    committed = partial = wrong = lost = leaked = 0
    while kills < wanted:
        tries += 1
        assert tries < 40 * wanted, "kills do not land in stores any more"
        inside = kill(directory, rng)
        kills += inside is not None
        found = directory.examine()
        tokens = {int(seed): count for seed, count in found["tokens"].items()}
        gone = [seed for seed in directory.committed if tokens[seed] != COUNT]
        lost += len(gone)
        assert not gone, f"prompts were committed and are not there: {gone}"
        if inside is not None:
            partial += 0 < tokens[inside] < COUNT
        if tries % PER_DIRECTORY == 0 or kills == wanted:
            committed += len(directory.committed) * OBJECTS
            wrong, leaked = wrong + directory.wrong, leaked + directory.leaked_nbytes
            directory = Directory(tmp_path / str(tries), zygote)
    figures(
        f"faults.kill_{kill.__name__}",
        seed=SEED,
        kills_in_stores=kills,
        kills_in_all=tries,
        objects_committed=committed,
        stores_half_there=partial,
        wrong=wrong,
        lost=lost,
        leaked_nbytes=leaked,
    )


def test_a_kill_while_room_is_made_leaves_the_capacity_exact(
    tmp_path: Path, zygote: Zygote, dose: Any, figures: Any
) -> None:
    rng, wanted, kills = random.Random(SEED + 1), dose(2, 20), 0
    capacity = 1 << 20  # of seven chunks and some tails: a store has to evict from the second on
    directory = Directory(tmp_path, zygote, f"&capacity={capacity}")
    while kills < wanted:
        kills += at_a_system_call(directory, rng) is not None
        found = directory.examine()
        assert found["used_nbytes"] <= capacity
        # What is on disk is served, unless what comes before it in its prompt is gone.
        assert sum(found["tokens"].values()) <= found["files"] * 16
    last = directory.start()  # and the next process evicts and stores on
    assert directory.killed_in(lines(last)) is None and last.end() == 0
    found = directory.examine()
    assert capacity // 2 < found["used_nbytes"] <= capacity
    assert found["tokens"][str(directory.begun - 1)] == COUNT
    figures(
        "faults.kill_while_evicting",
        seed=SEED,
        kills_in_stores=kills,
        wrong=directory.wrong,
        leaked_nbytes=directory.leaked_nbytes,
    )


def test_a_process_goes_on_beside_one_that_is_killed(
    tmp_path: Path, zygote: Zygote, dose: Any, figures: Any
) -> None:
    """Two store the same prompts in one directory; one of them, by turns its janitor, is killed."""
    rng, wanted, kills, tries = random.Random(SEED + 2), dose(2, 20), 0, 0
    directory = Directory(tmp_path, zygote)
    while kills < wanted:
        tries += 1
        assert tries < 40 * wanted, "kills do not land in stores any more"
        strikes = [{"strike_at": rng.randrange(1, CALLS)}, {}]
        both = [directory.start(**strike) for strike in strikes[:: 1 if tries % 2 else -1]]
        heard = [[*lines(victim)] for victim in both]
        inside = [directory.killed_in(iter(each)) for each in heard]
        codes = {victim.end() for victim in both}
        assert codes <= {0, -signal.SIGKILL} and 0 in codes
        kills += inside != [None, None]
        found = directory.examine()
        assert len(directory.committed) == directory.begun  # by the one that went on
        assert set(found["tokens"].values()) == {COUNT}
    figures(
        "faults.kill_beside_another",
        seed=SEED,
        kills_in_stores=kills,
        wrong=directory.wrong,
        lost=directory.begun - len(directory.committed),
    )

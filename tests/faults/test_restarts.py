"""A well filled directory is opened again, after a clean end and after a kill."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from restarting import NBYTES, on_disk
from sparse import fill, names
from zygote import Zygote

from kvlayer_backends.file.paths import Paths

FITS, MORE = 8, 24
"""Objects written while it is listed, for which there is room; and after that, for which it has to
be made."""


@pytest.fixture
def restarting() -> Iterator[Zygote]:
    forking = Zygote("restarting")
    yield forking
    forking.close()


def test_a_full_directory_serves_at_once_and_loses_nothing(
    tmp_path: Path, restarting: Zygote, dose: Any, figures: Any
) -> None:
    """Three processes one after the other: the first ends cleanly, the second is killed."""
    count = dose(20_000, 1_000_000)
    fill(tmp_path, count, nbytes=NBYTES)
    paths = Paths(str(tmp_path))
    stored = [os.path.basename(paths.object(key)) for key in names(count + 3 * (FITS + MORE))]
    capacity = (count + FITS) * NBYTES
    was_there = set(stored[:count])
    oldest = 0
    for turn, end in enumerate(("closed", "killed", "closed")):
        first = count + turn * (FITS + MORE)
        process = restarting.start(
            "serve",
            directory=str(tmp_path),
            capacity=capacity,
            first=first,
            fits=FITS,
            more=MORE,
        )
        found = process.told(dose(300.0, 3600.0))
        assert found["is_janitor"] and not found["refused"]
        assert found["was_unlisted"]
        if end == "killed":
            process.signal(signal.SIGKILL)
            assert process.end() == -signal.SIGKILL
        else:
            process.say("end")
            assert process.end() == 0
        there = on_disk(tmp_path)
        # Nothing is lost: what is not there has made room, and was used longest ago.
        written = set(stored[first : first + FITS + MORE])
        before, was_there = was_there, set(there)
        gone = len(before | written) - len(there)
        assert was_there == (before | written).difference(stored[oldest : oldest + gone])
        oldest += gone
        # And the capacity is right.
        assert sum(there.values()) == found["used_nbytes"] == capacity
        assert len(there) == found["objects"]
        # In one scan: each object was looked at once, what was written meanwhile at most.
        assert len(before) <= found["looks"] <= len(before) + FITS
        row = {k: found[k] for k in ("accepted_seconds", "listed_seconds")}
        figures(f"faults.restart_{turn}", objects=len(before), ended=end, **row)

"""Files a process may open, against what its tiers need."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvlayer.doctor.descriptors import descriptors
from kvlayer.doctor.finding import Status
from kvlayer.doctor.machine import Machine

if TYPE_CHECKING:
    from conftest import Build  # type: ignore[import-not-found]


def limits(files: str) -> dict[str, str]:
    return {"/proc/self/limits": f"Max open files            {files}    65536     files\n"}


@pytest.mark.parametrize(
    ("files", "threads", "expected"),
    [
        ("65536", [8], Status.OK),
        ("unlimited", [8], Status.OK),
        ("1024", [8], Status.WARN),  # enough for kvlayer, few for a server
        ("80", [8], Status.BAD),
        ("80", [], Status.WARN),
        ("5000", [8000], Status.BAD),
    ],
)
def test_too_few_descriptors_for_the_tiers_will_not_work(
    machine: Build, files: str, threads: list[int], expected: Status
) -> None:
    assert descriptors(machine(limits(files)), threads).status is expected


def test_descriptors_may_be_unknown(machine: Build) -> None:
    assert descriptors(machine(), [8]).status is Status.UNKNOWN


def test_this_machine_has_a_limit_or_none() -> None:
    assert descriptors(Machine(), [8]).status is not Status.UNKNOWN

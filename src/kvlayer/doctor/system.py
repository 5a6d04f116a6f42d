"""Python, the platform, the CPUs and the clocks this process has."""

from __future__ import annotations

import platform
import re
import sys
import time
from dataclasses import dataclass

from kvlayer.doctor.cgroup import cpu_quota
from kvlayer.doctor.finding import Check, Finding
from kvlayer.doctor.machine import Machine

__all__ = ["Clocks", "clocks", "cpus", "python"]

_PYTHON = Check(
    "python",
    "kvlayer is tested with memfd, O_DIRECT and flock of 64-bit Linux; elsewhere the slab is "
    "anonymous memory and files are buffered, untested",
)
_CPUS = Check(
    "cpus",
    "one event loop, the threads of each disk tier and the engine share them; with fewer than two, "
    "copies stall the loop that answers lookups",
)
_CLOCK = Check(
    "clock",
    "file systems record the last use of an object by the wall clock: with a wrong one the wrong "
    "objects are evicted",
)

_RANGE = "[0-9]{1,9}(?:-[0-9]{1,9})?"
_ALLOWED = re.compile(rf"^Cpus_allowed_list:\s*({_RANGE}(?:,{_RANGE})*)\s*$", re.MULTILINE)
_STEP_SECONDS = 1.0  # less is a time daemon's daily work
_BUILT = 1_735_689_600  # 2025-01-01: this software did not exist before


def python() -> Finding:
    """The interpreter and the system it runs on."""
    system, bits = platform.system(), 64 if sys.maxsize > 2**32 else 32
    detail: dict[str, object] = {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": system,
        "release": platform.release(),
        "machine": platform.machine(),
        "bits": bits,
    }
    found = (
        f"{platform.python_implementation()} {platform.python_version()}, {bits} bits, on "
        f"{system} {platform.release()} {platform.machine()}"
    )
    if system != "Linux" or bits != 64:
        return _PYTHON.warn(found, "serve from 64-bit Linux", **detail)
    return _PYTHON.ok(found, **detail)


def cpus(machine: Machine) -> Finding:
    """How many CPUs this process may use, and for how much of the time."""
    status = machine.text("/proc/self/status") or ""
    listed = _ALLOWED.search(status)
    if listed is None:
        return _CPUS.unknown("this system does not say which CPUs may be used")
    allowed = _count(listed[1])
    quota = cpu_quota(machine)
    usable = allowed if quota is None else min(allowed, quota)
    share = "without a quota" if quota is None else f"with a quota of {quota:g} CPUs' time"
    found = f"{allowed} CPU{'s' * (allowed != 1)} may be used, {share}"
    detail: dict[str, object] = {"allowed": allowed, "quota": quota, "usable": usable}
    if usable < 2:
        advice = "give the process two CPUs or more (affinity, the container's limit)"
        return _CPUS.warn(found, advice, **detail)
    return _CPUS.ok(found, **detail)


def _count(listed: str) -> int:
    """``0-3,8`` -> 5."""
    ends = [part.split("-") for part in listed.split(",")]
    return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)


@dataclass(frozen=True, slots=True)
class Clocks:
    """Both clocks at one moment, in seconds."""

    wall: float
    monotonic: float

    @classmethod
    def now(cls) -> Clocks:
        return cls(time.time(), time.monotonic())


def clocks(before: Clocks, now: Clocks) -> Finding:
    """Whether wall time is plausible, and passed like monotonic time between two moments."""
    passed = now.monotonic - before.monotonic
    gained = now.wall - before.wall - passed
    detail: dict[str, object] = {"passed_seconds": passed, "gained_seconds": gained}
    if passed < 0 or now.wall < _BUILT or abs(gained) > _STEP_SECONDS:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now.wall))
        return _CLOCK.warn(
            f"it says {stamp} UTC and gained {gained:+.1f} s in {passed:.1f} s",
            "let a time daemon keep the clock (chrony, systemd-timesyncd)",
            **detail,
        )
    return _CLOCK.ok(f"it kept pace with the monotonic clock for {passed:.1f} s", **detail)

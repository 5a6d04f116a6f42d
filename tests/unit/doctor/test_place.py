"""A directory is tried with real files, which are gone afterwards, and judged by what happened."""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from kvlayer.doctor import place as module
from kvlayer.doctor import releases
from kvlayer.doctor.configured import Place
from kvlayer.doctor.finding import Finding, Status
from kvlayer.doctor.machine import Machine, Space
from kvlayer.doctor.place import direct_io, examine

if TYPE_CHECKING:
    from conftest import Build, Fake  # type: ignore[import-not-found]

GIB = 1 << 30
OBJECT = 32 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.fixture
def fake(machine: Build, disk: Path) -> Fake:
    """A machine whose disk has 10 GiB free, and inodes for a million files."""
    fake = machine({"/proc/self/mountinfo": "22 1 0:1 / / rw - ext4 /dev/vda rw\n"})
    fake.spaces[str(disk)] = Space(20 * GIB, 10 * GIB, 1_000_000)
    return fake


def looked(machine: Machine, place: Place) -> dict[str, Finding]:
    """Findings by check; nothing of the look is left in the directory."""
    found = list(examine(machine, place, OBJECT))
    above = Path(module.nearest_directory(place.path))
    assert [entry.name for entry in above.iterdir() if "doctor" in entry.name] == []
    by_check = {finding.check: finding for finding in found}
    assert len(by_check) == len(found)
    for finding in found:
        assert finding.detail["path"] == place.path
        assert bool(finding.advice) == (finding.status in (Status.WARN, Status.BAD))
    return by_check


def test_this_disk_is_fine(disk: Path) -> None:
    found = looked(Machine(), Place(str(disk)))
    assert set(found) == {
        *("file-system", "directory", "o-direct", "hard-links", "flock", "file-times"),
        *("space", "releases", "inodes"),
    }
    for check in ("directory", "hard-links", "flock", "file-times", "space", "releases", "inodes"):
        assert found[check].status is Status.OK, found[check]


def test_a_directory_that_is_not_there_yet_is_judged_by_the_one_above_and_not_made(
    fake: Fake, disk: Path
) -> None:
    found = looked(fake, Place(str(disk / "not" / "yet"), capacity=GIB))
    assert found["directory"].status is Status.OK
    assert found["directory"].detail["tried"] == str(disk)
    assert found["space"].status is Status.OK
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("below", ["", "/below/it"])
def test_a_file_in_the_way_will_not_work(fake: Fake, disk: Path, below: str) -> None:
    (disk / "file").write_text("x")
    found = looked(fake, Place(f"{disk}/file{below}"))
    assert {check: f.status for check, f in found.items()} == {"directory": Status.BAD}
    assert f"{disk}/file is not a directory" in found["directory"].found


def test_the_root_is_a_directory(machine: Build) -> None:
    findings = examine(machine(), Place("/", readonly=True), OBJECT)
    assert [f.status for f in findings if f.check == "directory"] == [Status.OK]


def test_a_directory_that_cannot_be_written_will_not_work(fake: Fake) -> None:
    found = looked(fake, Place("/proc/self/kvlayer"))  # nobody may write there, root included
    assert found["directory"].status is Status.BAD
    assert "space" not in found


def test_a_read_only_tier_is_not_written_to(
    fake: Fake, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.tempfile, "TemporaryDirectory", None)  # would fail if it were used
    found = looked(fake, Place(str(disk), readonly=True))
    assert {check: f.status for check, f in found.items()} == {
        "file-system": Status.OK,
        "directory": Status.OK,
    }
    (absent,) = looked(fake, Place(str(disk / "absent"), readonly=True)).values()
    assert absent.status is Status.BAD
    assert "does not exist" in absent.found


@pytest.mark.parametrize(
    ("kind", "expected", "said"),
    [
        ("ext4", Status.OK, "ext4"),
        ("xfs", Status.OK, "xfs"),
        ("tmpfs", Status.WARN, "it is memory"),
        ("overlay", Status.WARN, "a container's own layer"),
        ("nfs4", Status.WARN, "another machine"),
        ("fuse.sshfs", Status.WARN, "another machine"),
    ],
)
def test_the_kind_of_file_system_is_named(
    machine: Build, disk: Path, kind: str, expected: Status, said: str
) -> None:
    fake = machine({"/proc/self/mountinfo": f"22 1 0:1 / / rw - {kind} /dev/vda rw\n"})
    found = looked(fake, Place(str(disk)))["file-system"]
    assert (found.status, found.detail["kind"]) == (expected, kind)
    assert said in found.found


def test_a_link_is_followed_to_the_file_system_it_leads_to(machine: Build, disk: Path) -> None:
    mounts = f"22 1 0:1 / / rw - ext4 x rw\n23 22 0:2 / {disk} rw - xfs y rw\n"
    (disk.parent / "link").symlink_to(disk)
    found = looked(machine({"/proc/self/mountinfo": mounts}), Place(str(disk.parent / "link")))
    assert found["file-system"].detail["kind"] == "xfs"


def test_what_is_not_said_is_unknown(machine: Build, disk: Path) -> None:
    found = looked(machine(), Place(str(disk)))
    assert found["file-system"].status is Status.UNKNOWN
    assert found["space"].status is Status.UNKNOWN


# -- O_DIRECT --------------------------------------------------------------------------------------


def refusing(monkeypatch: pytest.MonkeyPatch, number: int = errno.EINVAL) -> None:
    """A file system without O_DIRECT; like some kernels it makes the file before it refuses."""
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777, **more: int) -> int:
        fd = real(path, flags & ~os.O_DIRECT, mode, **more)
        if flags & os.O_DIRECT:
            os.close(fd)
            raise OSError(number, os.strerror(number))
        return fd

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize(("wanted", "expected"), [("auto", Status.WARN), ("on", Status.BAD)])
def test_without_o_direct_only_a_tier_that_insists_will_not_work(
    fake: Fake, disk: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, expected: Status
) -> None:
    refusing(monkeypatch)
    found = looked(fake, Place(str(disk), direct=wanted))["o-direct"]
    assert (found.status, found.detail["works"]) == (expected, False)


def test_any_other_error_is_the_directorys(
    fake: Fake, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(monkeypatch, errno.ENOSPC)
    found = looked(fake, Place(str(disk)))
    assert found["directory"].status is Status.BAD
    assert "No space left" in found["directory"].found


def test_the_probe_is_really_direct_and_reads_what_it_wrote(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: list[int] = []
    real_open, real_read = os.open, os.preadv

    def note(path: str, wanted: int, mode: int) -> int:
        flags.append(wanted)
        return real_open(path, wanted & ~os.O_DIRECT, mode)  # works on any disk a test runs on

    monkeypatch.setattr(os, "open", note)
    assert direct_io(f"{disk}/one") == ""
    assert flags[0] & os.O_DIRECT
    assert (disk / "one").stat().st_size == 4096
    assert (disk / "one").read_bytes() != bytes(4096)

    def lie(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = real_read(fd, buffers, offset)
        memoryview(buffers[0])[0] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", lie)
    assert direct_io(f"{disk}/two") == "what was read is not what was written"


def test_without_the_flag_there_is_no_direct_io(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    assert "no O_DIRECT" in direct_io(f"{disk}/one")


# -- links, locks, times ---------------------------------------------------------------------------


def test_without_hard_links_it_works_less_well(
    fake: Fake, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert looked(fake, Place(str(disk)))["hard-links"].status is Status.WARN


def test_locks_that_bind_nobody_will_not_work(
    fake: Fake, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    found = looked(fake, Place(str(disk)))["flock"]
    assert found.status is Status.BAD
    assert "locked again" in found.found


def test_locks_that_are_not_there_will_not_work(
    fake: Fake, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    found = looked(fake, Place(str(disk)))["flock"]
    assert found.status is Status.BAD
    assert "No locks available" in found.found


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
def test_a_file_server_with_another_clock_is_a_warning(
    fake: Fake, disk: Path, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    real = module.time.time
    monkeypatch.setattr(module.time, "time", lambda: real() + ahead)
    assert looked(fake, Place(str(disk)))["file-times"].status is Status.WARN


# -- room ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [
        (None, Status.OK),  # nobody said
        (0, Status.WARN),  # until the disk is full
        (10 * GIB, Status.OK),
        (10 * GIB + 1, Status.WARN),
    ],
)
def test_a_tier_larger_than_its_disk_is_a_warning(
    fake: Fake, disk: Path, capacity: int | None, expected: Status
) -> None:
    assert looked(fake, Place(str(disk), capacity=capacity))["space"].status is expected


def test_what_the_tier_holds_already_counts_as_room(fake: Fake, disk: Path) -> None:
    (disk / "v2" / "ab").mkdir(parents=True)
    (disk / "v2" / "ab" / "object").write_bytes(bytes(4096))
    found = looked(fake, Place(str(disk), capacity=10 * GIB + 4096))["space"]
    assert (found.status, found.detail["held_nbytes"]) == (Status.OK, 4096)
    found = looked(fake, Place(str(disk), capacity=10 * GIB + 4097))["space"]
    assert found.status is Status.WARN


def test_what_other_releases_hold_is_no_room_for_this_one(fake: Fake, disk: Path) -> None:
    (disk / "v1").mkdir()
    (disk / "v1" / "object").write_bytes(bytes(4096))
    found = looked(fake, Place(str(disk), capacity=10 * GIB + 1))["space"]
    assert (found.status, found.detail["held_nbytes"]) == (Status.WARN, 0)


def test_all_releases_are_added_up_and_the_old_one_can_be_removed(fake: Fake, disk: Path) -> None:
    place = Place(str(disk))
    assert looked(fake, place)["releases"].status is Status.OK
    for version, pages in {"v1": 3, "v2": 2, "v3": 1, "vendor": 9, "v0": 9}.items():
        (disk / version / "ab").mkdir(parents=True)
        (disk / version / "ab" / "object").write_bytes(bytes(4096 * pages))
    found = looked(fake, place)["releases"]
    assert found.status is Status.WARN
    assert found.detail["held_nbytes"] == {"v1": 12288, "v2": 8192, "v3": 4096}
    assert "together 24 KiB" in found.found
    assert found.advice.endswith(f"rm -r {shlex.quote(str(disk / 'v1'))}")
    assert (disk / "v1" / "ab" / "object").exists()  # it only says so
    shutil.rmtree(disk / "v1")
    found = looked(fake, place)["releases"]
    assert found.status is Status.OK
    assert "later releases" in found.found


def test_a_directory_too_large_to_count_in_time_is_not_blamed(
    fake: Fake, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (disk / "v2").mkdir()
    (disk / "v2" / "object").write_bytes(bytes(4096))
    clock = iter([0.0, 0.0, 9.0])  # it is late after the second folder
    monkeypatch.setattr(releases, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    found = looked(fake, Place(str(disk), capacity=19 * GIB))["space"]
    assert (found.status, found.detail["held_is_all"]) == (Status.OK, False)
    assert "at least 4 KiB" in found.found


@pytest.mark.parametrize(
    ("inodes", "expected"), [(320, Status.OK), (319, Status.WARN), (None, Status.OK)]
)
def test_too_few_inodes_for_the_objects_is_a_warning(
    fake: Fake, disk: Path, inodes: int | None, expected: Status
) -> None:
    fake.spaces[str(disk)] = Space(20 * GIB, 10 * GIB, inodes)
    found = looked(fake, Place(str(disk), capacity=10 * GIB))["inodes"]
    assert found.status is expected

"""Small real disks that fill up, freeze, slow down, turn read-only and die on command.

An ext4 file system in a file, mounted through a loop device: it takes root, and a kernel that lets
root mount. Where that is not so, :func:`disk` skips the test.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest
from hang import HANG

__all__ = ["Disk", "disk"]

# linux/fs.h and fs/ext4/ext4.h
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878
_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, b"\x02\x00\x00\x00"
_BLKIO = Path("/sys/fs/cgroup/blkio")  # version 1; direct I/O is charged to who asks for it


class Disk:
    """A mounted file system of its own."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.point = folder / "disk"
        self.point.mkdir()
        self._images = (folder / f"image{number}" for number in count())
        self._nbytes = nbytes
        self._is_mounted = False
        self.replace()

    def replace(self) -> None:
        """A new disk, mounted. Raises ``CalledProcessError`` where that is not allowed."""
        self._image = next(self._images)  # an old one is busy for as long as files on it are open
        with self._image.open("wb") as file:
            file.truncate(self._nbytes)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", str(self._image))
        self.mount()

    def mount(self) -> None:
        _run("mount", "-o", "loop", str(self._image), str(self.point))
        self._is_mounted = True

    def unmount(self) -> None:
        """Take it away; also while it is frozen or in use."""
        if self._is_mounted:
            with suppress(OSError):
                self.thaw()
            _run("umount", "-l", str(self.point))
            self._is_mounted = False

    @property
    def free_nbytes(self) -> int:
        status = os.statvfs(self.point)
        return status.f_bavail * status.f_frsize

    @contextmanager
    def filled(self, leaving: int) -> Iterator[None]:
        """Somebody else fills the disk, but for ``leaving`` bytes."""
        ballast = self.point / "ballast"
        fd = os.open(ballast, os.O_WRONLY | os.O_CREAT)
        try:
            os.posix_fallocate(fd, 0, self.free_nbytes - leaving)
            yield
        finally:
            os.close(fd)
            ballast.unlink()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Whoever writes hangs in the kernel until it thaws, marks of use included."""
        self._control(_FIFREEZE, b"\0" * 4)
        try:
            yield
        finally:
            self.thaw()

    def thaw(self) -> None:
        self._control(_FITHAW, b"\0" * 4)

    @contextmanager
    def immutable(self, *folders: Path) -> Iterator[None]:
        """Nobody may make or remove files in ``folders``, root neither."""
        names = [str(folder) for folder in folders]
        _run("chattr", "+i", *names)
        try:
            yield
        finally:
            _run("chattr", "-i", *names)

    def turn_read_only(self) -> None:
        """What ext4 does on its own after an error of the disk. Unmounting ends it."""
        _run("mount", "-o", "remount,abort", str(self.point))

    def die(self) -> None:
        """Every access is an I/O error from now on. Unmounting ends it."""
        self._control(_SHUTDOWN, _NO_LOG_FLUSH)

    @contextmanager
    def throttled(self, bytes_per_second: int) -> Iterator[None]:
        """For this process the disk moves no more than that, either way. Skips where it cannot."""
        if not (_BLKIO / "cgroup.procs").exists():
            pytest.skip("no blkio control group (version 1) to slow a disk down with")
        device = os.stat(self.point).st_dev
        rule = f"{os.major(device)}:{os.minor(device)} {bytes_per_second}"
        home = _blkio_group()
        group = _BLKIO / f"kvlayer-tests-{os.getpid()}"
        with ExitStack() as undo:
            group.mkdir()
            undo.callback(group.rmdir)
            for way in ("read", "write"):
                (group / f"blkio.throttle.{way}_bps_device").write_text(rule)
            undo.callback((home / "cgroup.procs").write_text, str(os.getpid()))
            (group / "cgroup.procs").write_text(str(os.getpid()))
            yield

    def _control(self, request: int, argument: bytes) -> None:
        fd = os.open(self.point, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, request, argument)
        finally:
            os.close(fd)


@contextmanager
def disk(folder: Path, nbytes: int = 48 << 20) -> Iterator[Disk]:
    """A disk that is gone afterwards. Skips where file systems cannot be mounted."""
    try:
        mounted = Disk(folder, nbytes)
    except (OSError, subprocess.CalledProcessError) as exc:
        pytest.skip(f"cannot mount a file system here: {getattr(exc, 'stderr', '') or exc}")
    try:
        yield mounted
    finally:
        mounted.unmount()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=HANG)


def _blkio_group() -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if "blkio" in names.split(","):
            return _BLKIO / path.lstrip("/")
    return _BLKIO

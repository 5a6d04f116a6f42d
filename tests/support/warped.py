"""A directory of stored objects into which somebody has put things that do not belong there.

Every construction is one that a crash, a backup, an administrator or another user of the machine
can leave: kinds of files, modes, owners, links, times, names, lengths, headers with good checksums.
None forges an object: whoever may write the directory can write what he likes into it.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from xxhash import xxh3_64_intdigest

from kvlayer._pack import pack, unpack
from kvlayer.codec.frame import HEADER_NBYTES, MAGIC, VERSION

__all__ = ["WARPS", "Outside", "header_with", "warp"]

_NOBODY = 65534
_TIMES = (0, 1, -1, 2**31, 2**33, 10**18, -(10**9))  # nanoseconds and seconds alike
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**32, 2**64 - 1, -(2**63), 1.5, float("nan"), float("inf")),
    *("", "x" * 3000, "\n", "../../../etc/passwd", b"", b"\xff" * 3000, [], [[]], {}, {"a": 1}),
)


class Outside:
    """What lies beside the directory, and is nobody's business: it stays as it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.file = folder / "precious.raw"
        self.file.write_bytes(b"precious" * 1024)
        self.nested = folder / "nested"
        self.nested.mkdir()
        (self.nested / "precious.raw").write_bytes(b"precious")
        self._before = self._seen()

    def _seen(self) -> dict[str, tuple[int, int, bytes]]:
        found: dict[str, tuple[int, int, bytes]] = {}
        for path in sorted(self.folder.rglob("*")):
            status = path.lstat()
            raw = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            found[str(path)] = (status.st_mode, status.st_uid, raw)
        return found

    def check(self) -> None:
        seen = self._seen()
        changed = {
            name for name in {*seen, *self._before} if seen.get(name) != self._before.get(name)
        }
        assert not changed, f"outside the directory something was changed: {sorted(changed)}"


def warp(root: Path, outside: Outside, chance: Random) -> str:
    """Construct one thing in the directory ``root``; what it was, in words."""
    what = chance.choice(WARPS)
    places = _places(root, what)
    if not places:
        return f"{what.__name__}: no place"
    place = chance.choice(places)
    with suppress(OSError, shutil.Error):  # the cache works there, too, and something was there
        what(place, outside, chance)
    return f"{what.__name__} {place.relative_to(root.parent)}"


def _places(root: Path, what: Callable[..., None]) -> list[Path]:
    """Where it may stand: of most in files, of some in folders; everything counts, locks, too."""
    every = [root]
    for folder, folders, files in os.walk(root):
        every += (Path(folder, name) for name in (*folders, *files))
    every.sort()
    if what in _OF_OBJECTS:
        return [path for path in every if _is_object(path)]
    if what in _OF_FOLDERS:
        return [path for path in every if path.is_dir() and not path.is_symlink()]
    if what in _OF_FILES:
        return [path for path in every if _is_file(path)]
    return every[1:]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file() and not path.is_symlink()
    except OSError:  # a loop of links
        return False


def _is_object(path: Path) -> bool:
    """One that may still be read and copied: some are sparse, and long."""
    with suppress(OSError):
        return path.name.endswith(".raw") and _is_file(path) and path.stat().st_size < 1 << 20
    return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# -- headers ---------------------------------------------------------------------------------------


def header_with(fields: dict[str, Any], *, version: int = VERSION, flags: int = 0) -> bytes:
    """A page with these fields, and a checksum that is right."""
    try:
        body = pack(fields)[: HEADER_NBYTES - 24]
    except (OverflowError, ValueError):
        body = b"\xc1"  # what no value begins with
    prefix = struct.pack("<8sHHI", MAGIC, version, flags, len(body))
    page = prefix + struct.pack("<Q", xxh3_64_intdigest(prefix + body)) + body
    return page + bytes(HEADER_NBYTES - len(page))


def _fields(raw: bytes) -> dict[str, Any]:
    """Of a header; none where something else was constructed there before."""
    try:
        found = unpack(raw[24 : 24 + int.from_bytes(raw[12:16], "little")])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def field_of_a_header(path: Path, _: Outside, chance: Random) -> None:
    raw = path.read_bytes()
    fields = _fields(raw)
    name = chance.choice(sorted(map(str, fields)) or ["name"])
    rows: Any = fields.get("segments")
    match chance.randrange(4):
        case 0:
            fields.pop(name, None)
        case 1 if isinstance(rows, list) and rows and isinstance(rows[0], list) and rows[0]:
            rows[0][chance.randrange(len(rows[0]))] = chance.choice(_VALUES)
        case 2:
            fields["must"] = chance.choice([["later"], ["seal", "later"], "later", None])
        case _:
            fields[name] = chance.choice(_VALUES)
    version = chance.choice([VERSION, VERSION, VERSION, VERSION + 1, 0, 65535])
    path.write_bytes(header_with(fields, version=version) + raw[HEADER_NBYTES:])


def bits_of_a_file(path: Path, _: Outside, chance: Random) -> None:
    raw = bytearray(path.read_bytes())
    if raw:
        raw[chance.choice([0, 8, 12, len(raw) - 1, chance.randrange(len(raw))]) % len(raw)] ^= 64
        path.write_bytes(raw)


def contents_exchanged(path: Path, _: Outside, chance: Random) -> None:
    others = [each for each in path.parent.parent.rglob("*.raw") if _is_object(each)]
    other = chance.choice(others)
    mine, theirs = path.read_bytes(), other.read_bytes()
    at = chance.choice([0, HEADER_NBYTES])
    path.write_bytes(mine[:at] + theirs[at:])
    other.write_bytes(theirs[:at] + mine[at:])


def length_of_a_file(path: Path, _: Outside, chance: Random) -> None:
    size = path.stat().st_size
    half = size // 2
    os.truncate(
        path,
        max(
            chance.choice([0, 1, 100, 4095, 4096, half, size - 1, size + 1, size + 4096, 1 << 31]),
            0,
        ),
    )


def garbage_in_a_file(path: Path, _: Outside, chance: Random) -> None:
    path.write_bytes(chance.choice([b"", b"\0" * 5000, b"{}", chance.randbytes(300), b"9" * 400]))


def another_encoding(path: Path, _: Outside, chance: Random) -> None:
    name = path.name.removesuffix(".2.raw")
    other = chance.choice([".3.raw", ".2.zstd", ".2.raw.raw", ".2.raw~", ".99999999999.raw", ".2."])
    shutil.copy(path, path.with_name(name + other))


def name_of_an_object(path: Path, _: Outside, chance: Random) -> None:
    stem = path.name
    names = [stem.upper(), f".{stem}", stem.replace("-16", "-0"), stem.replace("-16", "-9" * 30)]
    names += [stem.replace("g0", "g7"), f"x{stem[1:]}", "..raw", "\n.raw", "\udcff.raw", "a" * 250]
    shutil.copy(path, path.with_name(chance.choice(names)))


def object_in_another_folder(path: Path, _: Outside, chance: Random) -> None:
    folder = path.parent.with_name(chance.choice(["zz", "00", "ab" * 16, "...", "tmp"]))
    folder.mkdir(exist_ok=True)
    shutil.copy(path, folder / path.name)


# -- kinds of files --------------------------------------------------------------------------------


def replaced_by_a_fifo(path: Path, _: Outside, chance: Random) -> None:
    _remove(path)
    os.mkfifo(path)


def replaced_by_a_folder(path: Path, _: Outside, chance: Random) -> None:
    _remove(path)
    path.mkdir()
    if chance.random() < 0.5:
        (path / "something").write_text("in it")


def replaced_by_a_file(path: Path, _: Outside, chance: Random) -> None:
    _remove(path)
    path.write_bytes(b"a file")


def replaced_by_a_link(path: Path, outside: Outside, chance: Random) -> None:
    _remove(path)
    target = chance.choice(
        [
            outside.file,
            outside.nested,
            path,
            Path("nowhere"),
            Path("/dev/zero"),
            Path("/proc/self/mem"),
        ]
    )
    path.symlink_to(target)


def moved_and_linked(path: Path, outside: Outside, chance: Random) -> None:
    away = outside.folder.with_name(f"away-{chance.randrange(1 << 30)}")
    shutil.move(path, away)
    path.symlink_to(away)


def replaced_by_a_socket(path: Path, _: Outside, chance: Random) -> None:
    _remove(path)
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.open(path.parent, os.O_RDONLY)
        try:  # a socket's path is short
            bound.bind(f"/proc/self/fd/{here}/{path.name[:90]}")
        finally:
            os.close(here)


def a_second_name(path: Path, outside: Outside, chance: Random) -> None:
    os.link(path, path.with_name(f"{path.name[:200]}.{chance.randrange(1000)}"))


def gone(path: Path, _: Outside, chance: Random) -> None:
    _remove(path)


# -- modes, owners, times --------------------------------------------------------------------------


def mode(path: Path, _: Outside, chance: Random) -> None:
    if not path.is_symlink():  # or what it leads to, outside, would be changed
        path.chmod(chance.choice([0, 0o400, 0o777, 0o1777, 0o4755, 0o666, 0o070]))


def owner(path: Path, _: Outside, chance: Random) -> None:
    if os.geteuid() == 0:
        os.chown(path, chance.choice([_NOBODY, -1]), _NOBODY, follow_symlinks=False)


def times(path: Path, _: Outside, chance: Random) -> None:
    with suppress(OverflowError, OSError):
        os.utime(path, ns=(chance.choice(_TIMES), chance.choice(_TIMES)), follow_symlinks=False)


def much_that_is_foreign(path: Path, outside: Outside, chance: Random) -> None:
    for number in range(200):
        name = chance.choice(["junk", "x" * 200, "9", ".hidden", "tmp", "quarantine", "-rf", " "])
        with suppress(FileExistsError, OSError):
            place = path / f"{name}{number}"
            chance.choice(
                [place.mkdir, place.touch, lambda at=place: at.symlink_to(outside.nested)]
            )()


_OF_OBJECTS = (
    *(field_of_a_header, contents_exchanged, another_encoding, name_of_an_object),
    object_in_another_folder,
)
_OF_FILES = (bits_of_a_file, length_of_a_file, garbage_in_a_file, a_second_name)
_OF_FOLDERS = (much_that_is_foreign,)
WARPS: Sequence[Callable[[Path, Outside, Random], None]] = (
    *(_OF_OBJECTS * 2),
    *_OF_FILES,
    *_OF_FOLDERS,
    *(replaced_by_a_fifo, replaced_by_a_folder, replaced_by_a_file, replaced_by_a_link),
    *(moved_and_linked, replaced_by_a_socket, gone, mode, owner, times),
)

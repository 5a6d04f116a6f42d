"""Nothing is believed because it lies there: owner, mode and kind of every file and folder."""

from __future__ import annotations

import ast
import os
import shutil
import socket
from collections.abc import Callable
from mmap import mmap
from pathlib import Path

import pytest

import kvlayer_backends
from kvlayer.abc.backend import Damaged, Hit, Miss, Read, Write
from kvlayer.errors import BackendError
from kvlayer.eviction.lru import PrefixLRU
from kvlayer.identity.keys import ObjectKey, ObjectName, Part
from kvlayer_backends.file import FileBackend, FileOptions, disk
from kvlayer_backends.file.descriptions import NAME
from kvlayer_backends.file.paths import Paths
from kvlayer_backends.file.quarantine import KEPT

PAGE = 4096
KEY = ObjectName.raw(ObjectKey.of("ab" * 32, "0", bytes(range(32)), 16, Part(0, (0, 4), (0, 8))))
NOBODY = 65534
CHANGES = ["delete", "evict", "get", "touch", "quarantine", "describe", "sweep"]


def backend(root: Path, **more: object) -> FileBackend:
    options = FileOptions(**{"interval": 3600.0, **more})  # type: ignore[arg-type]
    return FileBackend(str(root), options, policy=PrefixLRU)


def page(fill: int = 0) -> memoryview:
    memory = memoryview(mmap(-1, PAGE))
    memory[:] = bytes([fill]) * PAGE
    return memory


def link(path: Path) -> None:
    target = path.with_name("elsewhere")
    target.write_bytes(bytes(PAGE))
    path.symlink_to(target)


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        folder = os.open(path.parent, os.O_PATH)
        unix.bind(f"/proc/self/fd/{folder}/s")  # a socket's path is short
        path.with_name("s").rename(path)
        os.close(folder)


def foreign(path: Path) -> None:
    path.write_bytes(bytes(PAGE))
    os.chown(path, NOBODY, NOBODY)


def open_to_all(path: Path) -> None:
    path.write_bytes(bytes(PAGE))
    path.chmod(0o666)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
NO_OBJECTS = [
    pytest.param(os.mkfifo, id="FIFO"),
    pytest.param(link, id="link"),
    pytest.param(dangling, id="dangling link"),
    pytest.param(listening, id="socket"),
    pytest.param(os.mkdir, id="folder"),
    pytest.param(foreign, id="another user's", marks=needs_root),
    pytest.param(open_to_all, id="open to all"),
]


@pytest.mark.asyncio
@pytest.mark.parametrize("make", NO_OBJECTS)
async def test_what_is_no_file_of_this_user_is_no_object_and_gives_way(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = Path(Paths(str(tmp_path)).object(KEY))
    async with backend(tmp_path) as files:
        await files.put([Write(KEY, (page(1),))])
        path.unlink()
        make(path)
        assert await files.contains([KEY]) == [None]
        memory = page(7)
        assert await files.get([Read(KEY, (memory,))]) == [Miss()]
        assert bytes(memory) == bytes([7]) * PAGE
    async with backend(tmp_path) as files:
        assert [listed async for listed in files.list()] == []
        assert files.objects == 0
        assert await files.put([Write(KEY, (page(2),))]) == [None]
        assert await files.get([Read(KEY, (memory,))]) == [Hit(PAGE)]
        assert bytes(memory) == bytes([2]) * PAGE
        assert not path.is_symlink() and path.stat().st_uid == os.geteuid()
        assert (files.objects, files.used_nbytes) == (1, PAGE)


@pytest.mark.asyncio
@pytest.mark.parametrize("make", NO_OBJECTS)
async def test_what_is_no_file_of_this_user_describes_nothing(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "v2" / KEY.namespace / NAME
    async with backend(tmp_path) as files:
        await files.describe(KEY.namespace, b"what it is")
        path.unlink()
        make(path)
        assert await files.namespaces() == {}


@pytest.mark.asyncio
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
async def test_all_that_is_made_is_closed_to_others(tmp_path: Path, umask: int) -> None:
    root = tmp_path / "deep" / "kv"
    root.parent.mkdir()
    before = os.umask(umask)
    try:
        async with backend(root) as files:
            await files.describe(KEY.namespace, b"what it is")
            assert await files.put([Write(KEY, (page(),)), Write(ObjectKey("x"), (page(),))])
            made = [p.lstat() for p in (root / "v2", *(root / "v2").rglob("*"))]
            await files.quarantine([(KEY, None)])  # type: ignore[list-item]
            made += [p.lstat() for p in (root / "v2").rglob("*")]
    finally:
        os.umask(before)
    assert len(made) > 12
    assert {status.st_mode & 0o077 for status in made} == {0}
    assert not root.stat().st_mode & 0o022


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", [0o701, 0o710, 0o720, 0o702, 0o755, 0o777])
@pytest.mark.parametrize("readonly", [False, True])
async def test_a_folder_that_is_open_to_others_is_refused(
    tmp_path: Path, mode: int, readonly: bool
) -> None:
    (tmp_path / "v2").mkdir()
    (tmp_path / "v2").chmod(mode)
    with pytest.raises(BackendError, match=f"mode {mode:04o}; expected") as caught:
        await backend(tmp_path, readonly=readonly).open()
    assert str(tmp_path / "v2") in str(caught.value) and "chmod" in (caught.value.hint or "")
    (tmp_path / "v2").chmod(0o700)
    async with backend(tmp_path) as files:
        assert await files.put([Write(KEY, (page(),))]) == [None]


@needs_root
@pytest.mark.asyncio
@pytest.mark.parametrize("inner", ["v2", "v2/tmp", "v2/janitor.lock"])
async def test_what_another_user_made_first_is_refused(tmp_path: Path, inner: str) -> None:
    async with backend(tmp_path):
        pass
    os.chown(tmp_path / inner, NOBODY, NOBODY)
    with pytest.raises(BackendError, match=f"user {NOBODY}") as caught:
        await backend(tmp_path).open()
    assert "chown" in (caught.value.hint or "")


@pytest.mark.asyncio
@pytest.mark.parametrize("inner", ["v2", "v2/tmp", "v2/janitor.lock"])
async def test_a_link_in_the_place_of_ours_is_refused(tmp_path: Path, inner: str) -> None:
    root = tmp_path / "kv"
    async with backend(root):
        pass
    (root / inner).rename(tmp_path / "elsewhere")
    (root / inner).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BackendError):
        await backend(root).open()


@pytest.mark.asyncio
async def test_a_namespace_or_shard_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    async with backend(root) as files:
        assert await files.put([Write(KEY, (page(),))]) == [None]
    shard = Path(Paths(str(root)).object(KEY)).parent
    for folder in (shard, shard.parent):
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
        async with backend(root, capacity=PAGE) as files:
            await files.recovered()
            assert files.objects == 0
            assert [listed async for listed in files.list()] == []
        folder.unlink()
        (tmp_path / "elsewhere").rename(folder)


def test_every_call_to_the_disk_goes_through_one_door() -> None:
    """What opens, looks, lists, makes or removes by name is called in ``disk`` only."""
    doors = {"open", "listdir", "scandir", "stat", "lstat", "walk", "mkdir", "makedirs", "link",
             "rename", "replace", "unlink", "remove", "rmdir", "symlink", "mkfifo", "truncate",
             "chmod", "chown", "access"}  # fmt: skip
    found: list[str] = []
    package = Path(kvlayer_backends.__file__).parent
    for path in sorted(package.rglob("*.py")):
        if path == Path(disk.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.func if isinstance(node, ast.Call) else None
            is_os = (
                isinstance(name, ast.Attribute)
                and isinstance(name.value, ast.Name)
                and name.value.id in ("os", "shutil", "io", "aiofiles", "Path", "pathlib")
                and name.attr in doors
            )
            is_plain = isinstance(name, ast.Name) and name.id in ("open", "Path")
            if name is not None and (is_os or is_plain):
                found.append(f"{path.relative_to(package)}:{name.lineno}")
    assert found == []


@pytest.mark.parametrize("path", ["/a" * 3000, "/" + "a" * 300, "/a/" + "b" * 5000 + "/c"])
@pytest.mark.asyncio
async def test_a_path_longer_than_any_is_an_error_of_ours(tmp_path: Path, path: str) -> None:
    with pytest.raises(BackendError, match="ENAMETOOLONG"):
        await FileBackend(f"{tmp_path}{path}").open()


@pytest.mark.asyncio
async def test_folders_are_made_however_many_are_missing(tmp_path: Path) -> None:
    root = f"{tmp_path}{'/a' * 300}"
    async with FileBackend(root):
        assert os.path.isdir(root)


@pytest.mark.asyncio
@pytest.mark.parametrize("depth", [1, 2, 3], ids=["shard", "namespace", "v2"])
@pytest.mark.parametrize(
    "kind", ["link", pytest.param("another user's", marks=needs_root), "open to all"]
)
async def test_nothing_is_written_into_a_folder_that_is_not_this_users_own(
    tmp_path: Path, depth: int, kind: str
) -> None:
    """Least of all through a link, into wherever that leads."""
    root, elsewhere = tmp_path / "kv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = Path(Paths(str(root)).object(KEY)).parents[depth - 1]
    async with backend(root) as files:
        await files.recovered()  # no pass removes the empty folder
        assert await files.put([Write(KEY, (page(1),))]) == [None]
        assert await files.delete([KEY]) == [None]
        shutil.rmtree(folder, ignore_errors=True)
        if kind == "link":
            folder.symlink_to(elsewhere)
        else:
            folder.mkdir()
            if kind == "open to all":
                folder.chmod(0o777)
            else:
                os.chown(folder, NOBODY, NOBODY)
        (result,) = await files.put([Write(KEY, (page(2),))])
        assert isinstance(result, BackendError) and "expected a folder of user" in str(result)
        assert result.hint
        assert files._site is not None
        files._site.scratch.close()  # as where somebody has deleted it
        (result,) = await files.put([Write(KEY, (page(2),))])
        assert isinstance(result, BackendError) and "expected a folder of user" in str(result)
        await files.describe(KEY.namespace, b"what it is")
        await files.quarantine([Damaged(KEY)])
        assert [*elsewhere.rglob("*")] == [] == [*folder.rglob("*")]
        assert await files.contains([KEY]) == [None]
        assert (files.objects, files.used_nbytes) == (0, 0)


@pytest.mark.asyncio
@pytest.mark.parametrize("depth", [1, 2], ids=["shard", "namespace"])
@pytest.mark.parametrize("what", CHANGES)
async def test_nothing_is_changed_behind_a_link(tmp_path: Path, depth: int, what: str) -> None:
    """A folder with the same names in it lies elsewhere, and a link in the folder's place."""
    root, elsewhere = tmp_path / "kv", tmp_path / "elsewhere"
    folder = Path(Paths(str(root)).object(KEY)).parents[depth - 1]
    other = ObjectName.raw(
        ObjectKey.of("cd" * 32, "0", bytes(range(1, 33)), 16, Part(0, (0, 4), (0, 8)))
    )
    async with backend(root, capacity=PAGE) as files:
        await files.recovered()
        assert await files.put([Write(KEY, (page(1),))]) == [None]
        if what == "sweep":
            Path(Paths(str(root)).object(KEY)).unlink()
            assert files.janitor is not None
            files.janitor.lost([KEY])
        folder.rename(elsewhere)
        folder.symlink_to(elsewhere)
        before = {p: (p.lstat().st_mtime_ns, p.is_dir() or p.read_bytes()) for p in _all(elsewhere)}
        if what == "delete":
            (error,) = await files.delete([KEY])
            assert isinstance(error, BackendError) and "symbolic link" in str(error) and error.hint
        elif what == "evict":
            assert await files.put([Write(other, (page(2),))]) == [None]
            assert (files.objects, files.used_nbytes) == (1, PAGE)
        elif what == "get":
            await files.get([Read(KEY, (page(),))])
        elif what == "touch":
            await files.touch([KEY])
        elif what == "quarantine":
            await files.quarantine([Damaged(KEY)])
            assert await files.contains([KEY]) == [None]  # hidden
        elif what == "describe":
            await files.describe(KEY.namespace, b"what it is")
        else:
            assert files.janitor is not None
            await files.janitor.pass_()
        after = {p: (p.lstat().st_mtime_ns, p.is_dir() or p.read_bytes()) for p in _all(elsewhere)}
        assert after == before and folder.is_symlink()


@pytest.mark.asyncio
@pytest.mark.parametrize("what", ["delete", "evict", "quarantine", "pass", "touch"])
async def test_another_directory_in_the_place_of_an_open_one_loses_nothing(
    tmp_path: Path, what: str
) -> None:
    """Who may write in the root can put a link to the user's other directory there."""
    ours, other = tmp_path / "ours", tmp_path / "other"
    part = Part(0, (0, 4), (0, 8))
    hashes = [bytes([n]) * 32 for n in (1, 2, 3)]
    keys = [ObjectName.raw(ObjectKey.of("cd" * 32, "0", each, 16, part)) for each in hashes]
    async with backend(other) as files:
        assert await files.put([Write(key, (page(1),)) for key in keys[:2]]) == [None, None]
        damaged = Path(Paths(str(other)).quarantine)
        damaged.mkdir(mode=0o700)
        for n in range(2 * KEPT):
            (damaged / f"{n:013d}").write_bytes(b"evidence")
    before = {p: (p.lstat().st_mtime_ns, p.is_dir() or p.read_bytes()) for p in _kept(other)}
    async with backend(ours, capacity=PAGE) as files:
        await files.recovered()
        assert await files.put([Write(keys[0], (page(1),))]) == [None]
        (ours / "v2").rename(tmp_path / "away")
        (ours / "v2").symlink_to(other / "v2")
        if what == "delete":
            (error,) = await files.delete([keys[0]])
            assert isinstance(error, BackendError) and "symbolic link" in str(error) and error.hint
        elif what == "evict":
            (error,) = await files.put([Write(keys[2], (page(2),))])
            assert isinstance(error, BackendError) and "symbolic link" in str(error)
        elif what == "quarantine":
            await files.quarantine([Damaged(keys[0])])
        elif what == "touch":
            await files.touch([keys[0]])
        else:
            assert files.janitor is not None
            with pytest.raises(OSError, match="symbolic link"):
                await files.janitor.pass_()
    after = {p: (p.lstat().st_mtime_ns, p.is_dir() or p.read_bytes()) for p in _kept(other)}
    assert after == before


def _kept(root: Path) -> list[Path]:
    """What a directory holds, but for its lock and the unfinished files of processes."""
    passing = {"tmp", "janitor.lock"}
    return [p for p in _all(root / "v2") if not passing & {*p.relative_to(root).parts}]


def _all(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))

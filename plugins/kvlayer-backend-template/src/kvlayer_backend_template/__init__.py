"""``sqlite:///path/to/file``: objects as rows of one SQLite database. Copy it and change it."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from time import time
from typing import ClassVar, Self, TypeVar

from kvlayer.abc.backend import (
    Backend,
    Capability,
    DeleteResult,
    Hit,
    Listed,
    Miss,
    Read,
    ReadResult,
    SizeResult,
    Write,
    WriteResult,
    contradicts_header,
)
from kvlayer.abc.offload import Offload
from kvlayer.errors import BackendError, ClosedError, ConfigError
from kvlayer.identity.keys import ObjectKey
from kvlayer.urls import BackendURL

__all__ = ["SQLiteBackend"]

A = TypeVar("A")
R = TypeVar("R")

_TABLE = """CREATE TABLE IF NOT EXISTS objects
    (key TEXT PRIMARY KEY, content BLOB NOT NULL, used REAL NOT NULL)"""
_FROM = "SELECT key, length(content), used FROM objects WHERE key >= ? AND key < ? ORDER BY key"
_ROWS = 500  # of a listing, in memory at once
_PATIENCE_SECONDS = 20.0  # with another process that writes


class SQLiteBackend(Backend):
    """One file for any number of processes; one thread, which takes one call after the other.

    It never evicts: it grows until the disk is full.
    """

    scheme: ClassVar[str] = "sqlite"
    capabilities = frozenset({Capability.LIST, Capability.PERSISTENT, Capability.SHARED})

    def __init__(self, path: str) -> None:
        self._path = path
        self._thread = Offload(1, "kvlayer-sqlite")
        self._db: sqlite3.Connection | None = None

    @classmethod
    def from_url(cls, url: BackendURL, /) -> Self:
        if url.options or url.host or not url.path.strip("/"):
            message = f"sqlite:// takes an absolute path and no options, found {url}"
            raise ConfigError(message, hint="write sqlite:///path/to/kv.sqlite")
        return cls(url.path)

    # -- what runs on the thread: everything that touches the file ---------------------------------

    def _connect(self) -> None:
        db = sqlite3.connect(
            self._path, timeout=_PATIENCE_SECONDS, isolation_level=None, check_same_thread=False
        )
        self._db = db
        db.execute("PRAGMA journal_mode = WAL")  # readers and the writer do not wait for each other
        db.execute("PRAGMA synchronous = OFF")  # a power failure may cost what can be recomputed
        db.execute(_TABLE)

    def _read(self, db: sqlite3.Connection, reads: Sequence[Read]) -> list[ReadResult]:
        return [self._read_one(db, read) for read in reads]

    def _read_one(self, db: sqlite3.Connection, read: Read) -> ReadResult:
        query = "SELECT substr(content, ?, ?) FROM objects WHERE key = ?"
        try:
            row = db.execute(query, (read.offset + 1, read.nbytes, read.key)).fetchone()
            if row is None:
                return Miss()
            db.execute("UPDATE objects SET used = ? WHERE key = ?", (time(), read.key))
        except sqlite3.Error as exc:  # a value: the rest of the batch may be fine
            return self._error(exc)
        at, content = 0, memoryview(row[0] or b"")  # SQLite has NULL for no bytes
        for region in read.regions:  # lent memory: filled here, and kept nowhere
            part = content[at : at + region.nbytes]
            region[: part.nbytes] = part
            at += part.nbytes
        if read.landed is not None:
            read.landed(at)  # its bytes are there: the caller checks them on this thread
        return Hit(at)

    def _write(self, db: sqlite3.Connection, writes: Sequence[Write]) -> list[WriteResult]:
        return [self._write_one(db, write) for write in writes]

    def _write_one(self, db: sqlite3.Connection, write: Write) -> WriteResult:
        row = (write.key, b"".join(write.regions), time())
        try:
            # The first wins, unless it was cut short.
            if not db.execute("INSERT OR IGNORE INTO objects VALUES (?, ?, ?)", row).rowcount:
                self._replace_damaged(db, *row)
        except sqlite3.Error as exc:
            return self._error(exc)
        return None

    def _replace_damaged(
        self, db: sqlite3.Connection, key: ObjectKey, content: bytes, used: float
    ) -> None:
        look = "SELECT substr(content, 1, 4096), length(content) FROM objects WHERE key = ?"
        head, nbytes = db.execute(look, (key,)).fetchone() or (b"", 0)
        if contradicts_header(head or b"", nbytes):
            mend = "UPDATE objects SET content = ?, used = ? WHERE key = ? AND length(content) = ?"
            db.execute(mend, (content, used, key, nbytes))

    def _sizes(self, db: sqlite3.Connection, keys: Sequence[ObjectKey]) -> list[SizeResult]:
        query = "SELECT length(content) FROM objects WHERE key = ?"
        rows = [db.execute(query, (key,)).fetchone() for key in keys]
        return [None if row is None else row[0] for row in rows]

    def _delete(self, db: sqlite3.Connection, keys: Sequence[ObjectKey]) -> list[DeleteResult]:
        db.executemany("DELETE FROM objects WHERE key = ?", [(key,) for key in keys])
        return [None] * len(keys)

    def _use(self, db: sqlite3.Connection, keys: Sequence[ObjectKey]) -> None:
        db.executemany("UPDATE objects SET used = ? WHERE key = ?", [(time(), key) for key in keys])

    def _rows(
        self, db: sqlite3.Connection, between: tuple[str, str]
    ) -> list[tuple[str, int, float]]:
        return db.execute(_FROM, between).fetchmany(_ROWS)

    # -- the interface -----------------------------------------------------------------------------

    async def open(self) -> None:
        try:
            await self._thread.run(self._connect)
        except sqlite3.Error as exc:
            raise self._error(exc) from None

    async def aclose(self) -> None:
        db, self._db = self._db, None  # calls that begin from now on are refused
        if db is not None:
            await self._thread.run(db.close)  # behind the calls that run
        self._thread.close()

    async def _run(self, work: Callable[[sqlite3.Connection, A], R], on: A) -> R:
        """Not ``asyncio.to_thread``, which returns from a cancellation while memory is in use."""
        if self._db is None:
            raise ClosedError("sqlite:// is not open")
        try:
            return await self._thread.run(work, self._db, on)
        except sqlite3.Error as exc:
            raise self._error(exc) from None

    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        return await self._run(self._sizes, keys)

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        return await self._run(self._read, reads)

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        return await self._run(self._write, writes)

    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        return await self._run(self._delete, keys)

    async def touch(self, keys: Sequence[ObjectKey], /) -> None:
        await self._run(self._use, keys)

    async def list(self, prefix: str = "", /) -> AsyncIterator[Listed]:
        start, end = prefix, f"{prefix}\U0010ffff"
        while rows := await self._run(self._rows, (start, end)):
            for key, nbytes, used in rows:
                yield Listed(ObjectKey(key), nbytes, used)
            start = f"{rows[-1][0]}\0"  # the next key there can be

    def _error(self, exc: sqlite3.Error) -> BackendError:
        error = BackendError(f"sqlite://{self._path}: {exc}")
        error.transient = "locked" in str(exc)
        return error

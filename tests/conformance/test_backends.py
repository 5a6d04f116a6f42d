"""Our backends and the template keep every promise, each in the ways it can be set up."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing

from kvlayer.config.registry import BACKENDS
from kvlayer.identity.keys import ObjectKey
from kvlayer.testing import BackendSuite
from kvlayer_backend_template import SQLiteBackend
from kvlayer_backends.file.paths import Paths


class Small(BackendSuite):
    """Fewer of everything than a stranger gets: `nox -s template` runs the full sizes."""

    large_nbytes = 2 << 20
    many_objects = 250
    many_keys = 1024


class TestCpu(Small):
    url = "cpu://?capacity=64MiB"
    small_url = "cpu://?capacity=512KiB"


class TestFile(Small):
    url = "file://{directory}?capacity=1GiB"
    small_url = "file://{directory}?capacity=512KiB"

    def truncate(self, key: ObjectKey, nbytes: int, /) -> None:
        os.truncate(Paths(str(self.directory)).object(key), nbytes)


class TestFileThroughThePageCache(TestFile):
    url = "file://{directory}?direct=off"
    small_url = "file://{directory}?direct=off&capacity=512KiB&policy=arc"


class TestTemplate(Small):
    backends = BACKENDS.extended({"sqlite": SQLiteBackend})
    url = "sqlite://{directory}/kv.sqlite"

    def truncate(self, key: ObjectKey, nbytes: int, /) -> None:
        with closing(sqlite3.connect(self.directory / "kv.sqlite")) as db, db:
            cut = "UPDATE objects SET content = substr(content, 1, ?) WHERE key = ?"
            db.execute(cut, (nbytes, key))

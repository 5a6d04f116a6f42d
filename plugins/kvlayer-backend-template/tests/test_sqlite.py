"""The kit's suite on SQLite: everything but the last method is all a backend needs."""

from __future__ import annotations

import sqlite3
from contextlib import closing

from kvlayer.identity.keys import ObjectKey
from kvlayer.testing import BackendSuite


class TestSQLite(BackendSuite):
    url = "sqlite://{directory}/kv.sqlite"

    def truncate(self, key: ObjectKey, nbytes: int, /) -> None:
        """Damage an object behind the backend's back, so that short ones are tested, too."""
        with closing(sqlite3.connect(self.directory / "kv.sqlite")) as db, db:
            cut = "UPDATE objects SET content = substr(content, 1, ?) WHERE key = ?"
            db.execute(cut, (nbytes, key))

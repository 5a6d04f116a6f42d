"""The portal's figures, each beside its ceiling. Their size is no test."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kvlayer.bench.portal import portal_rows

pytestmark = pytest.mark.torch


def test_the_portals_rows_have_their_ceilings_and_leave_nothing_behind() -> None:
    before = set(threading.enumerate())
    rows = asyncio.run(portal_rows(1))
    assert [(row.name, row.unit) for row in rows] == [
        ("portal.hop", "s"),
        ("portal.batch64", "s"),
        ("portal.lookup", "s"),
    ]
    for row in rows:
        assert row.value > 0
        assert row.ceiling is not None and row.ceiling > 0
    assert set(threading.enumerate()) <= before

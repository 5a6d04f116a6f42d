"""Events in the log: the right level, one line, no secrets."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from caches import config, layout, stored_files, tokens
from engine import Engine

from kvlayer import Cache, Scope
from kvlayer.telemetry.log import LogSink


@pytest.mark.asyncio
async def test_a_damaged_object_is_a_warning_and_the_rest_is_quiet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(layout(), 32)
    view = engine.view(engine.slots(32))
    scope = Scope.private("hunter2", owner="request-7")
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.store(tokens(32), view, scope=scope)
    for path in stored_files(tmp_path):
        path.write_bytes(b"")
    caplog.set_level(logging.DEBUG, "kvlayer")
    async with Cache.open(config(tmp_path), layout(), sinks=[LogSink()]) as cache:
        async with cache.lookup(tokens(32), scope=scope) as hit:
            await cache.retrieve(hit, view)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings and all("quarantined (empty" in text for text in warnings)
    assert any("retrieve: 0 of 32 tokens" in r.getMessage() for r in caplog.records)
    assert any("for request-7" in r.getMessage() for r in caplog.records)
    assert "hunter2" not in caplog.text
    assert all(hasattr(r, "kvlayer") for r in caplog.records if r.name == "kvlayer")

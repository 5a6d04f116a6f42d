"""Events in the log: the right level, one line, no secrets."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import get_args

import pytest
from caches import config, layout, stored_files, tokens
from engine import Engine

from kvlayer import Cache, Scope
from kvlayer.events import (
    CacheRebound,
    Event,
    LookupDone,
    ObjectQuarantined,
    ObjectsEvicted,
    ObjectsRemoved,
    ObjectsStored,
    PrefetchDone,
    RequestStarted,
    RetrieveDone,
    StoreDone,
    TierChanged,
    TransferDone,
    TransferStarted,
)
from kvlayer.identity.keys import ObjectKey, Span
from kvlayer.results import Cause, Failure
from kvlayer.telemetry.log import LogSink

KEY = ObjectKey(f"{'a' * 64}/0/{'b' * 64}/g0.l0-1.canonical")
FAILED = (Failure(Span(0, 16, b"\x01" * 32), Cause.DEADLINE, "file", "not loaded within 2 s"),)

SAID: list[tuple[Event, int, str]] = [
    (
        CacheRebound(before="ab" * 32, now="cd" * 32, stopped=2),
        logging.INFO,
        "rebound: from abababababab to cdcdcdcdcdcd, 2 requests stopped",
    ),
    (
        RequestStarted(operation="store", owner="ann", tokens=48, request=7),
        logging.DEBUG,
        "store: 48 tokens, request 7 for ann",
    ),
    (
        TransferStarted(tier="file", direction="load", key=KEY, nbytes=5),
        logging.DEBUG,
        f"load file: begins, {KEY}",
    ),
    (
        LookupDone(
            owner="ann",
            asked_tokens=48,
            hit_tokens=32,
            seconds=0.002,
            by_tier={"cpu": 0, "file": 32},
        ),
        logging.DEBUG,
        "lookup: 32 of 48 tokens (32 from file) in 2.0 ms for ann",
    ),
    (
        StoreDone(owner="", stored=2, skipped=1, dropped=0, failed=(), nbytes=5, seconds=0.001),
        logging.DEBUG,
        "store: 2 new, 1 known, 0 dropped in 1.0 ms",
    ),
    (
        StoreDone(owner="", stored=0, skipped=0, dropped=3, failed=(), nbytes=0, seconds=0.001),
        logging.INFO,
        "store: 0 new, 0 known, 3 dropped in 1.0 ms",
    ),
    (
        StoreDone(owner="", stored=1, skipped=0, dropped=0, failed=FAILED, nbytes=0, seconds=2.0),
        logging.INFO,
        "store: 1 new, 0 known, 0 dropped in 2000.0 ms; on file: deadline: not loaded within 2 s",
    ),
    (
        RetrieveDone(owner="", asked_tokens=32, tokens=32, failed=(), nbytes=9, seconds=0.001),
        logging.DEBUG,
        "retrieve: 32 of 32 tokens in 1.0 ms",
    ),
    (
        RetrieveDone(
            owner="ann",
            asked_tokens=32,
            tokens=16,
            failed=(Failure(Span(16, 32, b"\x01" * 32), Cause.VANISHED),),
            nbytes=9,
            seconds=0.001,
            by_tier={"cpu": 16, "file": 0},
        ),
        logging.INFO,
        "retrieve: 16 of 32 tokens (16 from cpu) in 1.0 ms for ann; vanished",
    ),
    (
        PrefetchDone(owner="ann", asked_tokens=32, tokens=32, failed=(), seconds=0.001),
        logging.DEBUG,
        "prefetch: 32 of 32 tokens in 1.0 ms for ann",
    ),
    (
        PrefetchDone(owner="", asked_tokens=32, tokens=0, failed=FAILED, seconds=0.001),
        logging.INFO,
        "prefetch: 0 of 32 tokens in 1.0 ms; on file: deadline: not loaded within 2 s",
    ),
    (
        TransferDone(tier="file", direction="load", key=KEY, nbytes=2_000_000, seconds=0.1),
        logging.DEBUG,
        f"load file: 2.0 MB {KEY}",
    ),
    (
        TransferDone(
            tier="file", direction="store", key=KEY, nbytes=0, seconds=0.1, cause=Cause.BUSY
        ),
        logging.INFO,
        f"store file: busy {KEY}",
    ),
    (
        ObjectsStored(tier="cpu", keys=(KEY, KEY), nbytes=8192),
        logging.DEBUG,
        "cpu: 2 objects gathered",
    ),
    (
        ObjectsRemoved(tier="file", keys=(KEY,)),
        logging.DEBUG,
        "file: 1 objects removed by request",
    ),
    (
        ObjectsEvicted(tier="cpu", policy="lru", keys=(KEY, KEY), nbytes=8192),
        logging.DEBUG,
        "cpu: lru evicted 2 objects",
    ),
    (
        ObjectQuarantined(tier="file", key=KEY, cause=Cause.EMPTY, detail="0 bytes"),
        logging.WARNING,
        f"file: quarantined (empty: 0 bytes) {KEY}",
    ),
    (
        TierChanged(tier="file", ok=False, detail="OSError: no such device"),
        logging.WARNING,
        "file is down: OSError: no such device",
    ),
    (
        TierChanged(tier="file", ok=True, detail="a call succeeded"),
        logging.INFO,
        "file serves again: a call succeeded",
    ),
]


@pytest.mark.parametrize(("event", "level", "line"), SAID, ids=lambda x: type(x).__name__)
def test_each_event_is_one_line_at_its_level_with_its_fields_beside(
    event: Event, level: int, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "kvlayer")
    LogSink()(event)
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (level, line)
    fields = record.kvlayer  # type: ignore[attr-defined]
    assert fields["event"] == type(event).__name__
    assert set(fields) - {"event"} == {field.name for field in dataclasses.fields(event)}
    json.dumps(fields, default=repr)  # plain values, for a formatter that writes JSON


def test_every_kind_of_event_is_among_them() -> None:
    assert {type(event) for event, _, _ in SAID} == set(get_args(Event))


def test_what_a_tier_or_an_owner_says_cannot_start_a_line_of_its_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink = LogSink()
    caplog.set_level(logging.DEBUG, "kvlayer")
    sink(TierChanged(tier="file", ok=False, detail="bad\nERROR forged\x1b[31m \u2028 é"))
    sink(LookupDone(owner="x\r\ny", asked_tokens=1, hit_tokens=0, seconds=0.0))
    first, second = (record.getMessage() for record in caplog.records)
    assert first == r"file is down: bad\nERROR forged\x1b[31m \u2028 é"
    assert second.endswith(r"for x\r\ny")


def test_below_the_loggers_level_no_sentence_is_made() -> None:
    logger = logging.getLogger("kvlayer.test.silent")
    logger.setLevel(logging.ERROR)
    LogSink(logger)(object())  # type: ignore[arg-type]
    logger.setLevel(logging.DEBUG)
    with pytest.raises(TypeError):  # as soon as it is looked into
        LogSink(logger)(object())  # type: ignore[arg-type]


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

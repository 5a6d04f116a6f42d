"""Events reach every listener in order, and no listener reaches the serving path."""

from __future__ import annotations

import logging
from dataclasses import FrozenInstanceError

import pytest

from kvlayer.events import Emitter, Event, LookupDone, ObjectQuarantined, TierChanged
from kvlayer.identity.keys import ObjectKey
from kvlayer.results import Cause

LOOKUP = LookupDone(owner="me", asked_tokens=10, hit_tokens=8, seconds=0.1)
TIER = TierChanged(tier="file", ok=False, detail="no such device")


def test_every_sink_hears_every_event_in_order() -> None:
    heard: list[tuple[str, Event]] = []
    emit = Emitter([lambda e: heard.append(("one", e)), lambda e: heard.append(("two", e))])
    emit(LOOKUP)
    emit(TIER)
    assert heard == [("one", LOOKUP), ("two", LOOKUP), ("one", TIER), ("two", TIER)]


def test_an_emitter_without_sinks_is_false_so_that_nothing_is_computed() -> None:
    assert not Emitter()
    assert not Emitter([])
    assert Emitter([lambda _: None])
    Emitter()(LOOKUP)


def test_a_sink_that_raises_is_dropped_with_one_line_and_the_others_hear_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard: list[Event] = []

    def broken(_: Event) -> None:
        raise ZeroDivisionError

    emit = Emitter([broken, heard.append])
    with caplog.at_level(logging.ERROR, logger="kvlayer"):
        emit(LOOKUP)
        emit(TIER)
    assert heard == [LOOKUP, TIER]
    assert len(caplog.records) == 1
    assert "sink raised ZeroDivisionError" in caplog.text
    assert emit.foreign.costs()["sink"].errors == 1


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit()])
def test_a_sink_that_wants_to_leave_leaves_alone(error: BaseException) -> None:
    def leaves(_: Event) -> None:
        raise error

    heard: list[Event] = []
    emit = Emitter([leaves, heard.append])
    emit(LOOKUP)
    emit(TIER)
    assert heard == [LOOKUP, TIER]
    assert emit.foreign.costs()["sink"].errors == 1


def test_an_emitter_whose_last_sink_was_dropped_is_false(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: Event) -> None:
        raise ValueError("deaf")

    emit = Emitter([broken])
    emit(LOOKUP)
    assert not emit
    assert len(caplog.records) == 1


def test_a_request_to_stop_is_no_failure_of_a_sink() -> None:
    def stop(_: Event) -> None:
        raise KeyboardInterrupt

    emit = Emitter([stop])
    with pytest.raises(KeyboardInterrupt):
        emit(LOOKUP)
    assert emit


def test_the_callers_list_of_sinks_is_its_own() -> None:
    sinks: list[object] = []
    emit = Emitter(sinks)  # type: ignore[arg-type]
    sinks.append(print)
    assert not emit


def test_two_emitters_do_not_meet() -> None:
    one: list[Event] = []
    two: list[Event] = []
    Emitter([one.append])(LOOKUP)
    Emitter([two.append])(TIER)
    assert (one, two) == ([LOOKUP], [TIER])


def test_events_are_values() -> None:
    key = ObjectKey(f"{'a' * 64}/0/{'b' * 64}/g0.l0-1.canonical")
    events = [
        ObjectQuarantined(tier="file", key=key, cause=Cause.CORRUPT, detail="x") for _ in range(2)
    ]
    assert events[0] == events[1]
    assert hash(events[0]) == hash(events[1])
    with pytest.raises(FrozenInstanceError):
        events[0].tier = "other"  # type: ignore[misc]

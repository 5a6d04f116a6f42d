"""Events as log records: one line each, for people; the fields ride along for machines."""

from __future__ import annotations

import dataclasses
import logging

from kvlayer.events import (
    Event,
    LookupDone,
    ObjectQuarantined,
    ObjectsEvicted,
    RetrieveDone,
    StoreDone,
    TierChanged,
    TransferDone,
)
from kvlayer.results import Failure

__all__ = ["LogSink"]


class LogSink:
    """A sink that logs every event to ``logger`` (default: ``kvlayer``).

    Damage and a tier that goes down are warnings, a failed transfer or a shortened load is
    information, everything else is debugging. ``record.kvlayer`` holds the event's fields. Keys
    are logged; tokens and salts never are, events do not carry them.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger("kvlayer")

    def __call__(self, event: Event) -> None:
        level = _level(event)
        if self._logger.isEnabledFor(level):
            fields = {"event": type(event).__name__, **dataclasses.asdict(event)}
            self._logger.log(level, "%s", _sentence(event), extra={"kvlayer": fields})


def _level(event: Event) -> int:
    match event:
        case ObjectQuarantined() | TierChanged(ok=False):
            return logging.WARNING
        case TierChanged():
            return logging.INFO
        case TransferDone(cause=cause) if cause is not None:
            return logging.INFO
        case StoreDone(failed=failed) | RetrieveDone(failed=failed) if failed:
            return logging.INFO
        case _:
            return logging.DEBUG


def _sentence(event: Event) -> str:  # noqa: PLR0911  # one sentence per kind of event
    match event:
        case LookupDone():
            return _timed(f"lookup: {event.hit_tokens} of {event.asked_tokens} tokens", event)
        case StoreDone():
            counts = f"{event.stored} new, {event.skipped} known, {event.dropped} dropped"
            return _timed(f"store: {counts}", event) + _first(event.failed)
        case RetrieveDone():
            counts = f"{event.tokens} of {event.asked_tokens} tokens"
            return _timed(f"retrieve: {counts}", event) + _first(event.failed)
        case TransferDone():
            ended = f"{event.nbytes / 1e6:.1f} MB" if event.cause is None else event.cause
            return f"{event.direction} {event.tier}: {ended} {event.detail} {event.key}"
        case ObjectsEvicted():
            return f"{event.tier}: {event.policy} evicted {len(event.keys)} objects"
        case ObjectQuarantined():
            return f"{event.tier}: quarantined ({event.cause}: {event.detail}) {event.key}"
        case TierChanged():
            return f"{event.tier} {'serves again' if event.ok else 'is down'}: {event.detail}"


def _timed(said: str, event: LookupDone | StoreDone | RetrieveDone) -> str:
    owner = f" for {event.owner}" if event.owner else ""
    return f"{said} in {event.seconds * 1e3:.1f} ms{owner}"


def _first(failed: tuple[Failure, ...]) -> str:
    return f"; {failed[0].cause} on {failed[0].tier}: {failed[0].detail}" if failed else ""

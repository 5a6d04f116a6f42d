"""Events as log records: one line each, for people; the fields ride along for machines."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

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
from kvlayer.results import Cause, Failure

__all__ = ["LogSink"]


class LogSink:
    """A sink that logs every event to ``logger`` (default: ``kvlayer``). Thread-safe.

    Damage and a tier that goes down are warnings; a tier that comes back, a failed transfer and
    what a request was not given are information; everything else is debugging. The message is one
    line: control characters in what tiers and applications say are escaped. ``record.kvlayer``
    holds the event's fields. Keys and owners are logged; tokens and salts never are, events do not
    carry them.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger("kvlayer")

    def __call__(self, event: Event) -> None:
        level = _level(event)
        if self._logger.isEnabledFor(level):
            fields = {"event": type(event).__name__, **dataclasses.asdict(event)}
            self._logger.log(level, "%s", _line(_sentence(event)), extra={"kvlayer": fields})


def _level(event: Event) -> int:
    match event:
        case ObjectQuarantined() | TierChanged(ok=False):
            return logging.WARNING
        case TierChanged() | CacheRebound():
            return logging.INFO
        case TransferDone(cause=cause) if cause is not None:
            return logging.INFO
        case StoreDone(dropped=dropped, failed=failed):
            return logging.INFO if dropped or failed else logging.DEBUG
        case RetrieveDone(failed=failed) | PrefetchDone(failed=failed):
            return logging.INFO if failed else logging.DEBUG
        case _:
            return logging.DEBUG


def _sentence(event: Event) -> str:  # noqa: C901, PLR0911, PLR0912  # one per kind of event
    match event:
        case RequestStarted():
            owner = f" for {event.owner}" if event.owner else ""
            return f"{event.operation}: {event.tokens} tokens, request {event.request}{owner}"
        case TransferStarted():
            return f"{event.direction} {event.tier}: begins, {event.key}"
        case LookupDone():
            counts = f"{event.hit_tokens} of {event.asked_tokens} tokens{_places(event.by_tier)}"
            return _timed(f"lookup: {counts}", event)
        case StoreDone():
            counts = f"{event.stored} new, {event.skipped} known, {event.dropped} dropped"
            return _timed(f"store: {counts}", event) + _first(event.failed)
        case RetrieveDone():
            counts = f"{event.tokens} of {event.asked_tokens} tokens{_places(event.by_tier)}"
            return _timed(f"retrieve: {counts}", event) + _first(event.failed)
        case PrefetchDone():
            counts = f"{event.tokens} of {event.asked_tokens} tokens"
            return _timed(f"prefetch: {counts}", event) + _first(event.failed)
        case TransferDone(cause=None):
            return f"{event.direction} {event.tier}: {event.nbytes / 1e6:.1f} MB {event.key}"
        case TransferDone():
            return f"{event.direction} {event.tier}: {_why(event.cause, event.detail)} {event.key}"
        case ObjectsStored():
            return f"{event.tier}: {len(event.keys)} objects gathered"
        case ObjectsRemoved():
            return f"{event.tier}: {len(event.keys)} objects removed by request"
        case ObjectsEvicted():
            return f"{event.tier}: {event.policy} evicted {len(event.keys)} objects"
        case ObjectQuarantined():
            return f"{event.tier}: quarantined ({_why(event.cause, event.detail)}) {event.key}"
        case CacheRebound():
            stopped = f", {event.stopped} requests stopped" if event.stopped else ""
            return f"rebound: from {event.before[:12]} to {event.now[:12]}{stopped}"
        case TierChanged():
            return f"{event.tier} {'serves again' if event.ok else 'is down'}: {event.detail}"


def _timed(said: str, event: LookupDone | StoreDone | RetrieveDone | PrefetchDone) -> str:
    owner = f" for {event.owner}" if event.owner else ""
    return f"{said} in {event.seconds * 1e3:.1f} ms{owner}"


def _places(by_tier: Mapping[str, int]) -> str:
    places = ", ".join(f"{tokens} from {tier}" for tier, tokens in by_tier.items() if tokens)
    return f" ({places})" if places else ""


def _first(failed: tuple[Failure, ...]) -> str:
    if not failed:
        return ""
    where = f"on {failed[0].tier}: " if failed[0].tier else ""
    return f"; {where}{_why(failed[0].cause, failed[0].detail)}"


def _why(cause: Cause | None, detail: str) -> str:
    return f"{cause}: {detail}" if detail else f"{cause}"


def _line(text: str) -> str:
    """``text`` on one line: an error of a tier, or an owner, may hold a newline."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

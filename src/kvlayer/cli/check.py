"""``kvlayer check URL``: the promises of a backend, asked of a live one."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from kvlayer._version import version
from kvlayer.abc.backend import Capability
from kvlayer.cli.main import EXIT_BAD
from kvlayer.cli.report_path import ReportPath
from kvlayer.config.registry import open_backend
from kvlayer.errors import ConfigError, KVLayerError
from kvlayer.testing.bounded import run_bounded, seconds
from kvlayer.testing.loan import PAGE
from kvlayer.testing.promise import Hung, Need
from kvlayer.testing.suite import Outcome, Verdict
from kvlayer.testing.suites.backend import BackendSuite
from kvlayer.testing.trial import Trial
from kvlayer.urls import BackendURL, parse_bytes, shown_url

__all__ = ["check"]

FORMAT = 1
"""Of the report; a field less or other is a new one."""
_LARGEST_SMALL_NBYTES = 256 << 20
_SMALLEST_NBYTES = 256 << 10
_ROOM_NBYTES = 64 << 20


@click.command()
@click.argument("url")
@click.option("--json", "path", type=ReportPath(), help="Write every verdict here.")
@click.option(
    "--disposable",
    is_flag=True,
    help="Nothing in the tier is worth keeping: also try what cannot be undone (quarantine, "
    "descriptions, filling a tier of up to 256 MiB).",
)
@click.option("--only", metavar="WORDS", default="", help="Only promises whose name has WORDS.")
@click.option(
    "--seconds",
    "limit",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="What does not answer by then hangs.",
)
def check(*, url: str, path: Path | None, disposable: bool, only: str, limit: float) -> None:
    """Hold the backend behind URL to its contract, one line a promise.

    Objects are stored in namespaces nobody else has and deleted again. Exits with 1 when a promise
    is broken, or when the backend cannot be opened or written. An object of 16 MiB must fit.
    """
    parsed = BackendURL.parse(url)
    suite = _suite(parsed, limit, disposable=disposable)
    promises = [each for each in suite.promises() if only in each.name]
    if not promises:
        raise ConfigError(
            f"no promise has {only!r} in its name", hint="leave --only out to see all of them"
        )
    _begin(suite, limit)
    able = ", ".join(sorted(suite.capabilities)) or "no capabilities"
    click.echo(f"{shown_url(suite.url)}  ({able})\n")
    began = perf_counter()
    verdicts: list[Verdict] = []
    for each in promises:
        verdicts.append(suite.judge(each))
        click.echo(parsed.masked("\n".join(_lines(verdicts[-1]))))
        if not verdicts[-1].is_good:
            _sweep(suite, limit)
    took = perf_counter() - began
    click.echo(f"\n{_summary(verdicts)}; {took:.1f} seconds")
    more = sum(each.found == Need.DISPOSABLE for each in verdicts)
    if more:
        click.echo(f"--disposable, where nothing in it is worth keeping, tries {more} more")
    if path is not None:
        report = _report(url, suite, verdicts, took)
        text = parsed.masked(json.dumps(report, indent=2))
        path.write_text(f"{text}\n", encoding="utf-8")
    if all(each.outcome is Outcome.NOT_RUN for each in verdicts):
        raise ConfigError(
            f"none of {len(verdicts)} promises can be asked of this backend",
            hint="each line says why; a longer list is asked without --only",
        )
    if not _is_kept(verdicts):
        _leave(hangs=any(each.outcome is Outcome.HUNG for each in verdicts))


def _begin(suite: BackendSuite, limit: float) -> None:
    """Open it and store one object: what cannot be opened or written is one error, not fifty."""
    try:
        run_bounded(lambda: _answers(suite), seconds(limit))
    except KVLayerError:
        raise
    except Hung as exc:
        click.echo(
            f"error: {shown_url(suite.url)} does not answer within {limit:g} seconds", err=True
        )
        click.echo(exc.found, err=True)
        _leave(hangs=True)
    except Exception:  # noqa: BLE001  # of the backend's own making: the promises say it better
        return


async def _answers(suite: BackendSuite) -> None:
    async with Trial.opened(suite.build, clears=True) as trial:
        refused = await trial.put(trial.key(0), bytes(PAGE))
        if refused is not None:
            trial.keys.clear()  # nor can they be deleted, as likely as not
            raise refused


def _sweep(suite: BackendSuite, limit: float) -> None:
    """Delete what a broken promise may have left; say so where that fails, too."""
    keys = sorted(suite.stored)

    async def sweep() -> None:
        async with suite.build() as cleaner:
            await cleaner.delete(keys)

    try:
        run_bounded(sweep, seconds(limit))
    except Exception as exc:  # noqa: BLE001  # of a backend that is broken already
        namespace = keys[0].namespace if keys else "none"
        click.echo(f"          up to {len(keys)} objects of the namespace {namespace} stay: {exc}")


def _suite(url: BackendURL, limit: float, *, disposable: bool) -> BackendSuite:
    own = not open_backend(url).capabilities & {Capability.PERSISTENT, Capability.SHARED}
    capacity = parse_bytes(url.options.get("capacity", "0"))
    can_be_filled = _SMALLEST_NBYTES <= capacity <= _LARGEST_SMALL_NBYTES

    class Live(BackendSuite):
        is_disposable = disposable or own  # what is only this process's holds nothing yet
        deadline_seconds = limit
        small_url = url.text if can_be_filled else ""

    Live.url = url.text
    if capacity and capacity < _ROOM_NBYTES:
        raise ConfigError(
            f"a capacity of {capacity} bytes is too small to look at",
            hint="the largest object tried is 16 MiB, and several calls run at once: 64MiB will do",
        )
    return Live()


def _is_kept(verdicts: list[Verdict]) -> bool:
    """Something was asked, and all of it is kept."""
    found = {each.outcome for each in verdicts}
    return Outcome.KEPT in found and all(each.is_good for each in verdicts)


def _leave(*, hangs: bool) -> None:
    """Exit with 1, past threads where some hang: the interpreter would wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    if hangs:
        os._exit(EXIT_BAD)
    sys.exit(EXIT_BAD)


_WIDTH = 100


def _lines(verdict: Verdict) -> Iterator[str]:
    """A line for what is kept; for the rest the contract, what was expected and what was found."""
    said = verdict.outcome if verdict.is_good else verdict.outcome.upper()
    head = f"{said:8}  {verdict.promise.name}"
    if verdict.outcome is Outcome.NOT_RUN:
        head += f": {verdict.found}"
    yield head
    if not verdict.is_good:
        yield from _wrapped("contract: ", verdict.promise.contract)
        yield from _wrapped("expected: ", verdict.expected)
        first, *more = verdict.found.splitlines() or [""]
        yield from _wrapped("found:    ", first)
        yield from (f"            {line}" for line in more)
        yield from (f"            {line}" for line in verdict.trace.splitlines()[-6:])


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"          {head}",
        subsequent_indent=" " * 20,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _summary(verdicts: list[Verdict]) -> str:
    counts = _counts(verdicts).items()
    return ", ".join(f"{n} {outcome}" for outcome, n in counts if n or outcome is Outcome.KEPT)


def _counts(verdicts: list[Verdict]) -> dict[Outcome, int]:
    return {outcome: sum(each.outcome is outcome for each in verdicts) for outcome in Outcome}


def _report(url: str, suite: BackendSuite, verdicts: list[Verdict], took: float) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for each in verdicts:
        row = {k: v for k, v in asdict(each).items() if k != "promise"}
        row["seconds"] = round(each.seconds, 4)
        rows.append({"promise": each.promise.name, "contract": each.promise.contract, **row})
    return {
        "format": FORMAT,
        "kvlayer": version(),
        "url": shown_url(url),
        "capabilities": sorted(suite.capabilities),
        "disposable": suite.is_disposable,
        "ok": _is_kept(verdicts),
        "seconds": round(took, 1),
        "counts": {outcome.value: n for outcome, n in _counts(verdicts).items()},
        "verdicts": rows,
    }

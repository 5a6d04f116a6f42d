"""``kvlayer bench``: figures of this machine, each beside its ceiling."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from kvlayer.bench.breakeven import break_evens
from kvlayer.bench.gpu import gpu_rows
from kvlayer.bench.groups import GROUPS, Ask, Group
from kvlayer.bench.machine import describe, file_system
from kvlayer.bench.measure import Row
from kvlayer.bench.report import picture, table
from kvlayer.cli.report_path import ReportPath
from kvlayer.errors import ConfigError, UnsupportedError
from kvlayer.staging.cuda import calibration
from kvlayer.urls import parse_bytes

__all__ = ["bench", "gpu"]

_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
_QUIET_SECONDS = 2.0  # between two lines that say what goes on
_LLAMA_3_8B = 131_072  # bytes of KV a token: 32 layers, 8 heads of 128, K and V, bf16


@click.group(invoke_without_command=True)
@click.option("--json", "path", type=ReportPath(), help="Write the rows to a file.")
@click.option("--plot", type=ReportPath(), help="Write a picture to a .svg file.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([group.name for group in GROUPS]),
    help="Measure this group of rows; may be given several times.",
)
@click.option("--size", default="1GiB", show_default=True, help="Bytes moved at a time.")
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(1), help="Samples.")
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False, writable=True),
    help="Where files are written, in a directory of their own; the current one by default.",
)
@click.option(
    "--prefill-rate",
    type=click.FloatRange(0, min_open=True),
    help="Tokens/s that your engine computes: say whether loading beats it.",
)
@click.option(
    "--bytes-per-token",
    default=_LLAMA_3_8B,
    show_default=True,
    type=click.IntRange(1),
    help="KV of your model; Llama-3-8B's in bf16 by default.",
)
@click.pass_context
def bench(
    ctx: click.Context,
    *,
    path: Path | None,
    plot: Path | None,
    only: tuple[str, ...],
    size: str,
    rounds: int,
    directory: Path | None,
    prefill_rate: float | None,
    bytes_per_token: int,
) -> None:
    """Measure what kvlayer does, interleaved with the most that this machine can do.

    Medians of wall time. On a busy machine trust the ratios, not the figures. docs/benchmarks.md
    says what each row is.
    """
    if ctx.invoked_subcommand is not None:
        return
    if plot is not None and plot.suffix != ".svg":
        raise ConfigError(f"--plot writes SVG, found {plot.name!r}", hint="name it figures.svg")
    nbytes = parse_bytes(size)
    place = directory or Path.cwd()
    groups = [group for group in GROUPS if not only or group.name in only]
    groups = _possible(groups, place, nbytes, is_asked=directory is not None)
    with TemporaryDirectory(prefix="kvlayer-bench-", dir=place) as scratch:
        ask = Ask(nbytes, rounds, Path(scratch), _Progress())
        rows = asyncio.run(_measure(groups, ask))
    machine = {**describe(), "file_system": file_system(place)}
    evens = break_evens(rows, bytes_per_token, prefill_rate)
    for line in table(rows):
        click.echo(line)
    if evens:
        click.echo(f"\nload or recompute, at {bytes_per_token:,} bytes of KV a token:")
        for even in evens:
            click.echo(f"  {even}")
    if path is not None:
        report = {
            "machine": machine,
            "results": [row.as_dict() for row in rows],
            "break_even": [even.as_dict() for even in evens],
        }
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        title = f"kvlayer bench: share of the ceiling, {machine['model'] or machine['machine']}"
        plot.write_text(picture(rows, title), encoding="utf-8")


@bench.command()
@click.option("--device", default=0, show_default=True, type=click.IntRange(0), help="Which GPU.")
@click.option("--json", "path", type=ReportPath(), help="Write the rows to a file.")
@click.option("--size", default="1GiB", show_default=True, help="Bytes moved at a time.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Samples.")
@click.option("--save/--no-save", default=True, show_default=True, help="Keep the thresholds.")
def gpu(*, device: int, path: Path | None, size: str, rounds: int, save: bool) -> None:
    """Measure a CUDA device, and keep the thresholds that stores and loads on it go by."""
    found = asyncio.run(gpu_rows(device, parse_bytes(size), rounds))
    for line in table(found.rows):
        click.echo(line)
    click.echo(f"\n{found.kind}:")
    for name, value in asdict(found.calibration).items():
        click.echo(f"  {name} {value:,}")
    if save:
        kept = calibration.save(found.kind, found.calibration)
        click.echo(f"kept in {kept}" if kept else "not kept: this user has no directory for it")
    if path is not None:
        report = {
            "machine": describe(),
            "device": found.kind,
            "calibration": asdict(found.calibration),
            "results": [row.as_dict() for row in found.rows],
        }
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _possible(groups: Sequence[Group], place: Path, nbytes: int, *, is_asked: bool) -> list[Group]:
    """The groups that can be measured here; says which are left out, and why.

    Raises ``ConfigError`` where a person asked for what cannot be, ``UnsupportedError`` when
    nothing is left.
    """
    left = list(groups)
    if find_spec("torch") is None:
        left = _without("torch is not installed", left, [group for group in left if group.torch])
    disk = [group for group in left if group.disk]
    if disk and (kind := file_system(place)) in _MEMORY:
        if is_asked:
            raise ConfigError(
                f"{place} is a {kind}: its figures would be those of memory",
                hint="give --dir a directory on a disk",
            )
        left = _without(f"the current directory is a {kind} (--dir names another)", left, disk)
    elif disk and shutil.disk_usage(place).free < 2.2 * nbytes:
        raise ConfigError(
            f"{place} has {shutil.disk_usage(place).free} bytes free; twice --size and a little "
            "more is needed",
            hint="lower --size, or give --dir a directory on another disk",
        )
    if not left:
        raise UnsupportedError(
            "nothing is left to measure", hint="install torch, which caches need to open"
        )
    return left


def _without(why: str, groups: Sequence[Group], missing: Sequence[Group]) -> list[Group]:
    if missing:
        click.echo(f"{why}: left out: {', '.join(group.name for group in missing)}", err=True)
    return [group for group in groups if group not in missing]


async def _measure(groups: Sequence[Group], ask: Ask) -> list[Row]:
    rows: list[Row] = []
    for group in groups:
        click.echo(f"{group.name} ...", err=True)
        rows += await group.rows(ask)
    return rows


class _Progress:
    """Lines on stderr, one every two seconds at most."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()

    def __call__(self, text: str) -> None:
        now = self._clock()
        if now - self._last >= _QUIET_SECONDS:
            self._last = now
            click.echo(f"  {text}", err=True)

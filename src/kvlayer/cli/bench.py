"""``kvlayer bench``: figures of this machine, each beside its ceiling."""

from __future__ import annotations

import asyncio
import json
import os
import platform
from importlib.util import find_spec
from pathlib import Path

import click

from kvlayer.bench.hashing import hash_rows
from kvlayer.bench.host import host_rows, lookup_rows
from kvlayer.bench.loop import loop_rows
from kvlayer.bench.measure import Row
from kvlayer.urls import parse_bytes

__all__ = ["bench"]


@click.command()
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the rows to a file.")
@click.option("--size", default="256MiB", show_default=True, help="Bytes moved at a time.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Samples.")
def bench(path: Path | None, size: str, rounds: int) -> None:
    """Measure naming, lookup and host copies, interleaved with their physical ceilings.

    Medians; wall time. On a busy machine trust the ratios, not the figures.
    """
    rows = asyncio.run(_measure(parse_bytes(size), rounds))
    for line in _table(rows):
        click.echo(line)
    if path is not None:
        machine = {
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
        }
        report = {"machine": machine, "results": [row.as_dict() for row in rows]}
        path.write_text(json.dumps(report, indent=2) + "\n")


async def _measure(nbytes: int, rounds: int) -> list[Row]:
    click.echo("naming prompts ...", err=True)
    rows = await hash_rows(rounds)
    if find_spec("torch") is None:
        click.echo("torch is not installed: lookups and host copies are left out", err=True)
        return rows
    click.echo("looking prompts up ...", err=True)
    rows += await lookup_rows(rounds)
    click.echo(f"moving {nbytes} bytes between blocks and host memory ...", err=True)
    rows += await host_rows(nbytes, rounds)
    click.echo("watching the event loop beside such copies ...", err=True)
    return rows + await loop_rows(nbytes, samples=2_000 * rounds)


def _table(rows: list[Row]) -> list[str]:
    lines = [f"{'figure':24}{'value':>14}{'ceiling':>14}{'ratio':>8}"]
    for row in rows:
        ceiling = "" if row.ceiling is None else _amount(row.ceiling, row.unit)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(f"{row.name:24}{_amount(row.value, row.unit):>14}{ceiling:>14}{ratio:>8}")
    return lines


def _amount(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e6:.0f} us"
    if unit == "B/s":
        return f"{value / 1e9:.2f} GB/s"
    return f"{value / 1e6:.1f} M{unit}"

"""``kvlayer doctor``: whether this machine and this installation will serve, and how well."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click

from kvlayer.cli.main import EXIT_BAD
from kvlayer.doctor.disk import LLAMA_3_8B_NBYTES
from kvlayer.doctor.examination import Examination
from kvlayer.doctor.finding import Finding, Status
from kvlayer.doctor.machine import Machine
from kvlayer.errors import ConfigError
from kvlayer.urls import parse_bytes

__all__ = ["doctor"]


def _size(ctx: click.Context, param: click.Parameter, text: str) -> int:
    try:
        return parse_bytes(text)
    except ConfigError as exc:
        raise click.BadParameter(f"{exc}; {exc.hint}", ctx, param) from None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object for machines.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="The TOML file to read; otherwise KVLAYER_CONFIG may name one.",
)
@click.option(
    "--dir",
    "directories",
    multiple=True,
    type=click.Path(),
    help="A directory to look at beside those of the configuration. May be repeated.",
)
@click.option(
    "--size",
    default="256MiB",
    show_default=True,
    callback=_size,
    help="Bytes to write and read on each disk; 0 measures no disk.",
)
@click.option(
    "--prefill-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Tokens per second the engine computes: says whether loading from disk beats that.",
)
@click.option(
    "--bytes-per-token",
    default=LLAMA_3_8B_NBYTES,
    show_default=True,
    type=click.IntRange(1),
    help="KV of one token, all layers. The default is Llama-3-8B in bfloat16.",
)
def doctor(
    *,
    as_json: bool,
    config: Path | None,
    directories: tuple[str, ...],
    size: int,
    prefill_rate: float | None,
    bytes_per_token: int,
) -> None:
    """Look at the machine, the configuration, the plugins and the disks.

    Exits with 1 when something will not work; warnings do not count. Nothing that is written
    stays.
    """
    examination = Examination(
        machine=Machine(),
        config=config,
        directories=directories,
        probe_nbytes=size,
        token_nbytes=bytes_per_token,
        prefill_rate=prefill_rate,
    )
    found: list[Finding] = []
    for finding in examination.run(partial(click.echo, err=True)):
        found.append(finding)
        if not as_json:
            click.echo("\n".join(_lines(finding)))
    is_fine = all(finding.status is not Status.BAD for finding in found)
    if as_json:
        report = {"ok": is_fine, "findings": [finding.as_dict() for finding in found]}
        click.echo(json.dumps(report, indent=2))
    else:
        click.echo(f"\n{_summary(found)}")
    if not is_fine:
        sys.exit(EXIT_BAD)


_INDENT = 24
_WIDTH = 100


def _lines(finding: Finding) -> Iterator[str]:
    """A line for what is fine; for the rest also why it matters and what to do."""
    head = f"{finding.status:9}{finding.check:{_INDENT - 9}}"
    yield from _wrapped(head, finding.found)
    if finding.status in (Status.WARN, Status.BAD):
        yield from _wrapped(" " * _INDENT + "why: ", finding.why)
        yield from _wrapped(" " * _INDENT + "do:  ", finding.advice)


def _wrapped(head: str, text: str) -> list[str]:
    indent = " " * (_INDENT if len(head) <= _INDENT else _INDENT + 5)
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _summary(found: list[Finding]) -> str:
    count = {status: sum(each.status is status for each in found) for status in Status}
    warnings = count[Status.WARN]
    said = f"{count[Status.OK]} fine, {warnings} warning{'s' * (warnings != 1)}"
    if count[Status.UNKNOWN]:
        said += f", {count[Status.UNKNOWN]} unknown"
    bad = count[Status.BAD]
    return f"{said}, {bad} that will not work" if bad else f"{said}; everything will work"

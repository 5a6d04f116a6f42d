"""Which plugins are installed, who ships them, and whether each can be imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any

from kvlayer.config.registry import ADAPTERS, BACKENDS, CODECS, COMMANDS, POLICIES, Plugin, Registry
from kvlayer.doctor.finding import Check, Finding
from kvlayer.errors import PluginError

__all__ = ["GROUPS", "plugins"]

_CHECK = Check(
    "plugins", "a plugin is imported when it is first used: what is broken fails only then"
)

GROUPS: tuple[Registry[Any], ...] = (BACKENDS, CODECS, POLICIES, ADAPTERS, COMMANDS)


def plugins() -> list[Finding]:
    """One finding for each plugin that cannot be used; one for all where there is none.

    Imports backends, codecs, policies and commands. Of an engine adapter only its package is
    looked for: importing it would import the engine.
    """
    troubles = [each for registry in GROUPS for each in _troubles(registry)]
    installed = [(each.group, plugin) for each in GROUPS for plugin in each.installed()]
    if troubles:
        return troubles
    owners = sorted({str(plugin) for _, plugin in installed})
    return [
        _CHECK.ok(
            f"{len(installed)} plugins can be used, from {', '.join(owners)}",
            plugins=[
                {"group": group, "name": plugin.name, "from": str(plugin)}
                for group, plugin in installed
            ],
        )
    ]


def _troubles(registry: Registry[Any]) -> Iterator[Finding]:
    owners: dict[str, list[Plugin]] = {}
    for plugin in registry.installed():
        owners.setdefault(plugin.name, []).append(plugin)
    for name, claims in owners.items():
        who = [str(plugin) for plugin in claims]
        try:
            if registry is ADAPTERS and len(claims) == 1:
                _look_for(registry, claims[0])
            else:
                with redirect_stdout(sys.stderr):  # what a stranger's module prints is no answer
                    registry.load(name)
        except PluginError as exc:
            advice = exc.hint or "repair or uninstall it"
            yield _CHECK.bad(str(exc), advice, group=registry.group, name=name, claims=who)


def _look_for(registry: Registry[Any], plugin: Plugin) -> None:
    package = plugin.target.partition(":")[0].partition(".")[0]
    if find_spec(package) is None:
        raise PluginError(
            f"the {registry.noun} {plugin.name!r} of {plugin} has no package {package!r}",
            hint=f"repair or uninstall {plugin.distribution}",
        )

"""The pages name everything there is: files, configuration keys, URL options, causes, events."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from kvlayer import errors, events
from kvlayer.config.model import CacheConfig, ModelConfig, TierConfig
from kvlayer.results import Cause
from kvlayer_backends.cpu import CpuOptions
from kvlayer_backends.file.options import FileOptions

ROOT = Path(__file__).parents[2]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["kvlayer", "kvlayer_backends"])
def test_the_tree_names_every_file(package):
    after = page("architecture.md").split("\n## The tree\n", 1)[1]
    named = set(re.findall(r"\w+", after.split("```")[1]))
    modules = {path.stem for path in (ROOT / "src" / package).rglob("*.py")}
    assert {name for name in modules if not name.startswith("__")} - named == set()


def test_every_configuration_key_is_documented_with_its_default():
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.+?) \|", page("configuration.md"), re.MULTILINE))
    known = {"model.": ModelConfig(), "tiers.": TierConfig(url="cpu://"), "": CacheConfig()}
    for prefix, config in known.items():
        for spec in fields(config):
            default = getattr(config, spec.name)
            if spec.name in ("model", "tiers"):
                continue
            shown = rows[prefix + spec.name]
            if isinstance(default, bool):
                default = str(default).lower()
            if default and spec.name != "url":
                assert shown == f"`{default}`", spec.name


@pytest.mark.parametrize("options", [CpuOptions, FileOptions])
def test_every_option_of_a_url_is_documented(options):
    scheme = options.__name__.removesuffix("Options").lower()
    after = page("configuration.md").split(f"\n`{scheme}://", 1)[1]
    named = set(re.findall(r"^\| `(\w+)`", after.split("\n\n`")[0].split("\n## ")[0], re.MULTILINE))
    assert named == {spec.name for spec in fields(options)}


@pytest.mark.parametrize("cause", Cause)
def test_every_cause_is_explained(cause):
    assert f"`{cause}`" in page("api.md").split("\n## Causes\n")[1].split("\n## ")[0]


def test_every_event_and_error_is_listed():
    listed = page("api.md")
    names = {event.__name__ for event in get_args(events.Event)} | set(errors.__all__)
    names -= {"BackendTimeoutError", "BackendUnavailableError"}  # kinds of BackendError
    assert {name for name in names if f"`{name}`" not in listed} - {"KVLayerError"} == set()

"""Plugins are listed from metadata, imported on first use, and named when they are at fault."""

from __future__ import annotations

import sys

import pytest

from kvlayer.abc.backend import Backend
from kvlayer.abc.policy import EvictionPolicy
from kvlayer.config.registry import ADAPTERS, BACKENDS, COMMANDS, POLICIES, Plugin, open_backend
from kvlayer.errors import ConfigError, PluginError, UnknownSchemeError


class _Remembering(Backend):
    """A backend that keeps the URL it was built from and does nothing."""

    scheme = "remember"

    def __init__(self, url):
        self.url = url

    @classmethod
    def from_url(cls, url, /):
        return cls(url)

    async def open(self):
        raise AssertionError("open_backend must not open")

    async def aclose(self): ...

    async def contains(self, keys, /):
        return [None for _ in keys]

    async def get(self, reads, /):
        return []

    async def put(self, writes, /):
        return []

    async def delete(self, keys, /): ...


REMEMBERING = BACKENDS.extended({"remember": _Remembering})


def test_the_built_in_backends_register_like_anybody_elses():
    built_in = {p.name: p for p in BACKENDS.installed() if p.distribution == "kvlayer-core"}
    assert built_in.keys() == {"cpu", "file"}
    assert built_in["file"].target == "kvlayer_backends.file.backend:FileBackend"


@pytest.mark.parametrize("registry", [BACKENDS, POLICIES, COMMANDS], ids=lambda r: r.group)
def test_everything_the_core_announces_can_be_loaded(registry):
    names = [p.name for p in registry.installed() if p.distribution == "kvlayer-core"]
    assert names
    for name in names:
        registry.load(name)


def test_a_loaded_plugin_is_what_its_group_holds():
    assert issubclass(BACKENDS.load("file"), Backend)
    policy = POLICIES.load("prefix-lru")
    assert issubclass(policy, EvictionPolicy)
    assert policy.name == "prefix-lru"


def test_an_unknown_scheme_names_the_nearest_and_what_is_installed():
    with pytest.raises(UnknownSchemeError) as caught:
        open_backend("flie:///mnt/kv")
    assert "no backend is called 'flie'; did you mean 'file'?" in str(caught.value)
    assert "cpu (kvlayer-core)" in caught.value.hint
    assert "file (kvlayer-core)" in caught.value.hint


def test_an_unknown_scheme_with_nothing_near_says_only_what_is_installed():
    with pytest.raises(UnknownSchemeError) as caught:
        BACKENDS.load("zzzzzzzzzz")
    assert "did you mean" not in str(caught.value)
    assert "file (kvlayer-core)" in caught.value.hint


def test_a_group_nobody_offers_anything_in_says_so(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UnknownSchemeError) as caught:
        POLICIES.load("prefix-lru")
    assert "nothing is installed" in caught.value.hint


def test_a_backend_given_by_hand_is_built_from_its_url_and_not_opened():
    backend = open_backend("remember://there?option=1", backends=REMEMBERING)
    assert isinstance(backend, _Remembering)
    assert (backend.url.host, backend.url.options) == ("there", {"option": "1"})


def test_extending_a_registry_leaves_the_original_alone():
    assert "remember" in REMEMBERING.names()
    assert "remember" not in BACKENDS.names()
    with pytest.raises(UnknownSchemeError):
        BACKENDS.load("remember")


def test_what_is_given_by_hand_comes_before_what_is_installed():
    assert BACKENDS.extended({"file": _Remembering}).load("file") is _Remembering


def test_a_url_that_is_none_is_refused_before_any_plugin_is_looked_for():
    with pytest.raises(ConfigError, match="not a backend URL"):
        open_backend("/mnt/kv", backends=REMEMBERING)


def test_the_registries_keep_no_state_between_calls(monkeypatch, tmp_path):
    before = ADAPTERS.installed()
    info = tmp_path / "late-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: late\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[kvlayer.adapters]\nlate = nowhere:Adapter\n")
    monkeypatch.syspath_prepend(tmp_path)
    late = Plugin("late", "nowhere:Adapter", "late", "2.0")
    assert ADAPTERS.installed() == sorted([*before, late], key=lambda p: p.name)
    with pytest.raises(PluginError, match=r"late 2\.0 failed to import"):
        ADAPTERS.load("late")


@pytest.mark.parametrize(
    "error", [SystemExit(3), GeneratorExit(), type("Own", (BaseException,), {})()]
)
def test_a_plugin_that_leaves_leaves_alone(monkeypatch, tmp_path, error):
    """``sys.exit`` on import, or while it is built, is an error that names the plugin."""

    class Leaving(_Remembering):
        @classmethod
        def from_url(cls, url, /):
            raise error

    backends = BACKENDS.extended({"leaving": Leaving})
    with pytest.raises(PluginError, match=type(error).__name__):
        open_backend("leaving://", backends=backends)
    info = tmp_path / "leaving-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: leaving\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvlayer.adapters]\nleaving = leaving_on_import:X\n")
    (tmp_path / "leaving_on_import.py").write_text("raise SystemExit(4)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=r"leaving 1\.0 failed to import: SystemExit: 4"):
        ADAPTERS.load("leaving")


def test_an_interrupt_while_a_backend_is_built_passes():
    class Slow(_Remembering):
        @classmethod
        def from_url(cls, url, /):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_backend("slow://", backends=BACKENDS.extended({"slow": Slow}))

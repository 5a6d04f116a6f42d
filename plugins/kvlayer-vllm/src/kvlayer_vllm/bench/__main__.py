"""``python -m kvlayer_vllm.bench [--json PATH] [--model NAME]...``: one engine after the other.

Rows are named ``ttft.MODEL.TIER.LENGTH``. ``value`` is the time to the first token of a prompt that
is loaded, ``ceiling`` that of vLLM's own prefix cache, both in CPU seconds of the whole process;
``wall`` and ``ceiling_wall`` are what passed meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kvlayer_vllm.bench.models import random_model, trained_model
from kvlayer_vllm.bench.serving import ENVIRONMENT

LENGTHS = (1024, 4096)
MODELS = {"random0.3b": None, "smollm2": None}
TIERS = ("cpu", "file")


def main() -> int:
    """Measure, print a table, and write the rows. 1 when nothing was loaded somewhere."""
    parser = argparse.ArgumentParser(prog="kvlayer_vllm.bench", allow_abbrev=False)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--model", action="append", choices=MODELS, help="only this model")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="prompt tokens")
    wanted = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="kvlayer-models-") as scratch:
        for name in wanted.model or MODELS:
            folder = trained_model() if name == "smollm2" else random_model(Path(scratch) / name)
            rows += _rows(name, folder, list(wanted.lengths))
    for row in rows:
        _say(_line(row))
    if wanted.json is not None:
        wanted.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    # Answers are compared, and may differ: bf16 has near ties, for vLLM's prefix cache as well.
    return 0 if all(row["loaded_tokens"] > 0 for row in rows) else 1


def _rows(name: str, folder: Path, lengths: list[int]) -> list[dict[str, Any]]:
    prefix = {each["length"]: each for each in _measured(name, folder, "prefix", lengths)}
    rows: list[dict[str, Any]] = []
    for tier in TIERS:
        for found in _measured(name, folder, tier, lengths):
            top = prefix[found["length"]]
            rows.append(
                {
                    "name": f"ttft.{name}.{tier}.{found['length']}",
                    "value": found["hit"],
                    "unit": "s",
                    "ceiling": top["hit"],
                    "ratio": top["hit"] / found["hit"],
                    "cold": found["cold"],
                    "loaded_tokens": found["loaded_tokens"],
                    "wall": found["hit_wall"],
                    "ceiling_wall": top["hit_wall"],
                    "cold_wall": found["cold_wall"],
                    "prefix_tokens": top["loaded_tokens"],
                    "same_output": found["same_output"],
                }
            )
    return rows


def _measured(name: str, folder: Path, kind: str, lengths: list[int]) -> list[dict[str, Any]]:
    _say(f"{name}, {kind}: starting an engine")
    command = [sys.executable, "-m", "kvlayer_vllm.bench.engine", str(folder), kind]
    ran = subprocess.run(  # noqa: S603  # this interpreter, and arguments made here
        [*command, *map(str, lengths)],
        stdout=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, **os.environ},
        check=True,
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith('{"length"')]
    return [json.loads(line) for line in lines]


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['name']:28} hit {row['value']:7.3f} s, prefix cache {row['ceiling']:7.3f} s "
        f"({row['value'] / row['ceiling']:.2f}x), cold {row['cold']:7.2f} s "
        f"({row['cold'] / row['value']:.0f}x), {row['loaded_tokens']} tokens loaded"
    )


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())

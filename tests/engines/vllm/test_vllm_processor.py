"""``--processor`` reaches vLLM in every process of the session, and those with instructions do."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import vllm_processor
from vllm_processor import LEVELS, NATIVE, packing

# What a process that imports torch, and one that has it already, say of their processor.
ASK = """
import torch
print(*[name for name in NAMES if getattr(torch.cpu, name)()])
"""
BEFORE = "import sys; sys.path.insert(0, SUPPORT)\nfrom vllm_processor import pretend\n"
NAMES = LEVELS["avx2"].hidden


def said(code: str, **env: str) -> list[str]:
    names = f"NAMES = {NAMES!r}; SUPPORT = {str(Path(vllm_processor.__file__).parent)!r}\n"
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TESTS_PROCESSOR")}
    done = subprocess.run(
        [sys.executable, "-c", names + code],
        env={**clean, **env},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.parametrize("level", [level for level in LEVELS if level != NATIVE])
def test_hidden_instructions_are_hidden_wherever_torch_was_imported(level: str) -> None:
    here = said(f"{BEFORE}import torch\npretend({level!r})\n{ASK}")
    before = said(f"{BEFORE}pretend({level!r})\n{ASK}")
    child = f"subprocess.run([sys.executable, '-c', {f'NAMES = {NAMES!r}' + ASK!r}], check=True)"
    below = said(f"{BEFORE}import subprocess\npretend({level!r})\n{child}")
    assert here == before == below
    assert not {*here} & {*LEVELS[level].hidden}


def test_nothing_is_hidden_unasked() -> None:
    assert said(f"{BEFORE}pretend({NATIVE!r})\n{ASK}") == said(ASK)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_elsewhere_packs_as_this_process_says(
    dtype: str, tiny: Path, engine_process: Any
) -> None:
    cache = {"tiers": [{"url": "cpu://?capacity=64MiB"}]}
    room = {"max_model_len": 256, "num_gpu_blocks_override": 16}
    process = engine_process(tiny, cache, dtype=dtype, **room)
    assert process("state")["groups"] == [f"native:vllm-cpu-{packing(dtype)}-32"]
    process.close()


def test_a_session_that_hides_amx_packs_without_it(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--processor") != NATIVE:
        assert packing("bfloat16") == "vec"
    assert packing("float32") == "vec"


def test_there_is_no_triton_here() -> None:
    """With it vLLM leaves out the C++ kernels of its CPU build, which everything here runs on."""
    assert find_spec("triton") is None
    assert not import_module("vllm.triton_utils").HAS_TRITON

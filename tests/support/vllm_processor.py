"""The processor under a session of vLLM's tests: this one, or one with fewer instructions.

vLLM asks torch which instructions there are, packs blocks and chooses kernels by the answers, and
has no switch to use fewer. :func:`pretend` changes the answers, in this process and in all that it
starts (``fewer_instructions/sitecustomize.py``), so that a machine with AMX also runs what one
without it would. The libraries below torch are told the same by variables of their own.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["LEVELS", "NATIVE", "describe", "needs", "packing", "pretend", "pretend_as_told"]

NATIVE = "native"
_VARIABLE = "TESTS_PROCESSOR"
_STARTUP = Path(__file__).parent / "fewer_instructions"
_TORCH = "torch.cpu"


@dataclass(frozen=True)
class Level:
    """Which of torch's questions are answered with no, and what its libraries read."""

    hidden: tuple[str, ...]
    variables: dict[str, str]


_AMX = ("_is_amx_tile_supported", "_is_amx_fp16_supported")
_AVX512 = ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_vnni_supported")
LEVELS = {
    NATIVE: Level((), {}),
    "avx512": Level(_AMX, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}),
    "avx2": Level(
        (*_AMX, *_AVX512),
        {
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "ATEN_CPU_CAPABILITY": "avx2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        },
    ),
}
"""By the newest instructions that are left."""


def pretend(level: str) -> None:
    """From now on this process, and every one that it starts, has ``level``'s instructions.

    Call it before torch has computed anything and before vLLM is imported.
    """
    if level == NATIVE:
        return
    path = [str(_STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {_VARIABLE: level, "PYTHONPATH": os.pathsep.join(path)}
    sys.path.insert(0, str(_STARTUP))  # a zygote gets this path in place of the variable
    pretend_as_told()


def pretend_as_told() -> None:
    """What a process that a pretending one has started does first."""
    level = LEVELS[os.environ[_VARIABLE]]
    os.environ |= level.variables
    if (known := sys.modules.get(_TORCH)) is not None:
        _hide(known, level)
    else:  # most processes never import torch
        sys.meta_path.insert(0, _Hiding(level))


def _hide(module: ModuleType, level: Level) -> None:
    for name in level.hidden:
        assert callable(getattr(module, name)), name
        setattr(module, name, lambda: False)


class _Hiding:
    """Lets ``torch.cpu`` be imported as ever, and changes its answers."""

    def __init__(self, level: Level) -> None:
        self._level = level

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TORCH:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _hide(module, self._level)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


# -- what a test asks for --------------------------------------------------------------------------


def packing(dtype: str) -> str:
    """How the engine packs blocks of 32 tokens and heads of 64 in this session."""
    import torch

    from kvlayer_vllm.engine import attention_isa

    return attention_isa(getattr(torch, dtype), 32, 64, "auto")


def needs(isa: str) -> Any:
    """Marks of a test that runs only where vLLM packs with ``isa``."""
    import pytest
    import torch

    if isa != "amx" or torch.cpu._is_amx_tile_supported():  # every processor has the others
        return ()
    reason = "needs a processor with AMX"
    return (pytest.mark.may_skip(reason), pytest.mark.skip(reason=reason))


def describe(level: str) -> str:
    """One line: what the session ran on, and how blocks were packed."""
    import torch

    from kvlayer_vllm.engine import platform

    if platform() != "cpu":  # asked for at the end: engines are forked before a device is opened
        return f"device: {torch.cuda.get_device_name()}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "?")
    packed = ", ".join(f"{dtype} {packing(dtype)}" for dtype in ("float32", "bfloat16"))
    taken = "" if level == NATIVE else f", as one with nothing newer than {level}"
    return f"processor: {name}{taken}; blocks packed: {packed}"

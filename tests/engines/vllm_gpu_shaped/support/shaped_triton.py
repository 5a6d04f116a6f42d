"""Triton for vLLM on a CPU: its kernels run in Triton's own interpreter, on CPU tensors.

Triton lies in a folder of its own, which ``TESTS_TRITON`` names: where it can be imported vLLM
leaves out the C++ stand-ins of its CPU build, which every other session runs. Only processes that
call :func:`use` see it.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any

__all__ = ["FOLDER", "use"]

FOLDER = "TESTS_TRITON"


def use() -> None:
    """Before anything of vLLM's is imported, in a process that ends with it."""
    assert "vllm" not in sys.modules
    sys.path.insert(0, os.environ[FOLDER])
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    found: Any = import_module("triton.backends")
    # vLLM's CPU build asks for a backend of this name, and wants its driver to be there.
    driver = SimpleNamespace(is_active=lambda: True)
    found.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)

"""Speculative decoding by n-grams in an engine of a test, and how its drafts fare.

vLLM compiles its search for n-grams with numba, which is 150 MB and not among what the tests
install. Where it is missing, the same search runs as the Python that it is.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["NGRAM", "FATES", "prepare", "watch"]

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
FATES = [0, 0]
"""Tokens that were drafted in this process, and those of them that were accepted."""


def prepare() -> None:
    """Before the engine imports its search."""
    if find_spec("numba") is not None:
        return
    numba: Any = ModuleType("numba")
    numba.jit = numba.njit = _as_it_is
    numba.prange = range
    numba.get_num_threads = lambda: 1
    numba.set_num_threads = lambda _count: None
    sys.modules["numba"] = numba


def _as_it_is(*args: Any, **_: Any) -> Any:
    """``@jit`` and ``@jit(...)``."""
    return args[0] if args else lambda function: function


def watch(scheduler: Any) -> None:
    """Count what becomes of its drafts."""
    make = scheduler.make_spec_decoding_stats

    def counted(*args: Any, **how: Any) -> Any:
        FATES[0] += how["num_draft_tokens"]
        FATES[1] += how["num_accepted_tokens"]
        return make(*args, **how)

    scheduler.make_spec_decoding_stats = counted

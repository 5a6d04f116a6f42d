"""What a call does, counted: the same on every machine, however busy it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

__all__ = ["counted"]

T = TypeVar("T")


def counted(work: Callable[[], T]) -> tuple[T, int, int]:
    """``work()``'s result, its instructions of Python and the digests it fed: of this thread."""
    instructions = digests = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal instructions
        frame.f_trace_opcodes = True
        instructions += event == "opcode"
        return trace

    def profile(_: FrameType, event: str, function: Any) -> None:
        nonlocal digests
        if event == "c_call":
            owner = type(getattr(function, "__self__", None)).__module__
            digests += "_hashlib" in (function.__module__, owner)

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        result = work()
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
    return result, instructions, digests

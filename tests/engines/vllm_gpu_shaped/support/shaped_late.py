"""Chances that never come: devices compute when they must, and copies need no time."""

from __future__ import annotations

import random
from typing import Any

__all__ = ["Late"]


class Late(random.Random):
    """Always the first choice, and never a chance."""

    def random(self) -> float:
        return 1.0

    def choice(self, seq: Any) -> Any:
        return seq[0]

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        return (start if stop is None else stop) - 1

    def randint(self, a: int, b: int) -> int:
        return a

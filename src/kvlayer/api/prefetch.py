"""What ``Cache.prefetch`` returns: a promotion that runs by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

from kvlayer.results import RetrieveReport

__all__ = ["Prefetch"]


class Prefetch:
    """A running promotion: poll it from an engine step, cancel it, or await its report."""

    def __init__(self, task: asyncio.Task[RetrieveReport]) -> None:
        self._task = task

    def done(self) -> bool:
        """Whether it has ended."""
        return self._task.done()

    def cancel(self) -> None:
        """Stop it and unpin what it held. What other requests wait for goes on."""
        self._task.cancel()

    def __await__(self) -> Generator[Any, None, RetrieveReport]:
        return asyncio.shield(self._task).__await__()

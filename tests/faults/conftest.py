"""What every fault starts from: processes that start in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from zygote import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Forks the processes that are killed, stopped and starved."""
    forking = Zygote()
    yield forking
    forking.close()

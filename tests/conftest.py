"""What every test of the core starts from."""

from __future__ import annotations

import os

import pytest

from kvlayer.config_source import PREFIX


@pytest.fixture(autouse=True)
def no_configuration_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own ``KVLAYER_`` variables must not decide what a test sees."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)

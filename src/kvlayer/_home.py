"""Where a user's kvlayer keeps what it can work out again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_directory"]


def cache_directory() -> Path | None:
    """``$XDG_CACHE_HOME/kvlayer`` or ``~/.cache/kvlayer``; None for a user without a home."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    if Path(home).is_absolute():  # the specification: a relative one is ignored
        return Path(home) / "kvlayer"
    try:
        return Path.home() / ".cache" / "kvlayer"
    except RuntimeError:  # a container's user
        return None

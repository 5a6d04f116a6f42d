"""What goes wrong with a stored file."""

from __future__ import annotations

from pathlib import Path

__all__ = ["damage_file"]


def damage_file(path: Path, damage: str) -> None:
    """``truncated``, ``flipped`` or ``deleted``."""
    raw = bytearray(path.read_bytes())
    match damage:
        case "truncated":
            path.write_bytes(raw[: len(raw) // 3])
        case "flipped":
            raw[len(raw) // 2] ^= 16
            path.write_bytes(raw)
        case _:
            path.unlink()

"""How long a test waits for what must happen."""

__all__ = ["HANG"]

HANG = 300.0
"""Seconds. Far more than anything takes on the busiest machine: what takes longer never ends."""

"""Decisions about what is where. Pure: no I/O, no loop, no clock."""

"""Listeners that turn a cache's events into logs and metrics."""

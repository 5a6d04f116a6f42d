"""What users hold: the cache, its hits and its control, and what puts them together."""

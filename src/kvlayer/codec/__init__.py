"""How payloads become bytes on a disk or a wire."""

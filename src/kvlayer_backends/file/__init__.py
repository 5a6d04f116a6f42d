"""``file://``: objects as files in a directory that any number of processes share."""

from kvlayer_backends.file.backend import FileBackend
from kvlayer_backends.file.options import FileOptions

__all__ = ["FileBackend", "FileOptions"]

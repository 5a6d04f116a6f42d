"""The directory of this machine that a URL names: for backends that store in files."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from kvlayer.errors import ConfigError
from kvlayer.urls import BackendURL

__all__ = ["local_directory"]

_SHELL = re.compile(r"^/~|\$")


def local_directory(url: BackendURL) -> str:
    """The absolute directory that a URL such as ``file:///mnt/nvme/kv`` names.

    ``file://~/kv`` is in the user's home. Raises ``ConfigError`` for a host, for a relative path,
    and for what only a shell would expand.
    """
    head, rest = f"{url.scheme}://", urlsplit(url.text).path  # as written: %7E is a plain '~'
    if url.port is not None or url.host not in ("", "~", "localhost"):
        here = str(
            Path.cwd() / rest.strip("/") if url.host in (".", "..") else Path("/", url.host + rest)
        )
        raise ConfigError(
            f"{head} URL names a host: {url}",
            hint=f"a local path is absolute and needs three slashes: {head}{here}",
        )
    if _SHELL.search(rest):
        raise ConfigError(
            f"{head} URL has what only a shell expands: {url}",
            hint=f"write the path itself, {head}~/kv for the user's home, and '~' and '$' in "
            "names as %7E and %24",
        )
    if not url.path.startswith("/") or not url.path.strip("/"):
        raise ConfigError(
            f"{head} URL names no directory: {url}",
            hint=f"give an absolute path with three slashes: {head}/mnt/nvme/kv",
        )
    home = _home(url) if url.host == "~" else ""
    return home + url.path.rstrip("/")


def _home(url: BackendURL) -> str:
    home = os.path.expanduser("~")  # noqa: PTH111  # raises nothing
    if not os.path.isabs(home):  # noqa: PTH117
        raise ConfigError(f"this user has no home for {url}", hint="write the absolute path")
    return home.rstrip("/")

"""Which build this is, read from the installed metadata: it is set in pyproject.toml alone."""

from __future__ import annotations

__all__ = ["DISTRIBUTION", "version"]

DISTRIBUTION = "kvlayer-core"


def version() -> str:
    """The installed version, or ``0+uninstalled`` for source that was put on the path by hand."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed_version

    try:
        return installed_version(DISTRIBUTION)
    except PackageNotFoundError:
        return "0+uninstalled"

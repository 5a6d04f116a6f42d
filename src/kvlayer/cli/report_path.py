"""The type of options that name a report's file: a wrong one is told before the work, not after."""

from __future__ import annotations

import os
from pathlib import Path

import click

__all__ = ["ReportPath"]


class ReportPath(click.Path):
    """A file that can be written; it need not be there."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, dir_okay=False, writable=True)

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str | bytes | os.PathLike[str]:
        folder = Path(value).absolute().parent
        if not folder.is_dir():
            self.fail(f"there is no directory {folder}", param, ctx)
        if not os.access(folder, os.W_OK | os.X_OK):
            self.fail(f"nothing can be written in {folder}", param, ctx)
        return super().convert(value, param, ctx)

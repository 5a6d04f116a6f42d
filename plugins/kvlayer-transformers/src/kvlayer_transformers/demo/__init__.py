"""``kvlayer demo``: a real model answers from KV that survived a restart. Three acts, one table."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import click

__all__ = ["demo"]


@click.command()
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write every figure to this file.",
)
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the stored KV in this directory (default: a temporary one).",
)
@click.option("--keep", is_flag=True, help="Keep the temporary directory, too.")
def demo(json_path: Path | None, directory: Path | None, keep: bool) -> None:
    """A real model answers from KV that survived a restart.

    Act 1: the same questions cold and warm. Act 2: a process is killed while it stores; a new one
    answers from disk. Act 3: stored objects are damaged, and noticed. Takes about a minute and runs
    on one CPU core, without a network. Exits with 1 when an answer or a cause is wrong; how fast
    it was does not decide.
    """
    # Before torch is imported, and for the processes that are started: on a busy machine several
    # threads are many times slower than one, and only one adds up in the same order every time.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from kvlayer_transformers.demo.play import play

    temporary = None if directory else tempfile.mkdtemp(prefix="kvlayer-demo-")
    began = time.monotonic()
    try:
        report = play(Path(directory or temporary or ""))
    finally:
        if temporary and not keep:
            shutil.rmtree(temporary, ignore_errors=True)
    click.echo("\n" + report.text())
    if json_path is not None:
        figures = {**report.figures(), "wall_s": time.monotonic() - began}
        json_path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if directory or keep:
        click.echo(f"\nThe stored KV is in {directory or temporary}.")
    sys.exit(1 if report.broken() else 0)

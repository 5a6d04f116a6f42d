"""The demo from loading the model to the report."""

from __future__ import annotations

from pathlib import Path

import torch

from kvlayer_transformers.demo import model
from kvlayer_transformers.demo.acts import crash, damage, speed
from kvlayer_transformers.demo.asking import Asker
from kvlayer_transformers.demo.console import Console
from kvlayer_transformers.demo.documents import GUIDE, HANDBOOK
from kvlayer_transformers.demo.report import Report
from kvlayer_transformers.demo.store import Store

__all__ = ["play"]


def play(directory: Path, *, source: Path | None = None, folder: Path | None = None) -> Report:
    """All three acts on a store in ``directory``; what it holds of this model is cleared first.

    ``source`` and ``folder`` are those of ``model.materialize``.
    """
    torch.set_num_threads(1)
    console = Console()
    with console.stage(f"loading {model.NAME}"):
        loaded = model.load(model.materialize(folder, source=source, report=console.step))
    handbook, guide = HANDBOOK.document(loaded), GUIDE.document(loaded)
    asker = Asker(loaded, Store(directory), console)
    console.heading(f"Act 1: {handbook.title}, cold and warm")
    first = speed.play(asker, handbook)
    console.heading("Act 2: killed while storing, and started again")
    second = crash.play(asker, handbook, guide)
    console.heading("Act 3: damaged on disk, and noticed")
    third = damage.play(asker, handbook)
    return Report(first, second, third, len(handbook.ids), len(guide.ids))

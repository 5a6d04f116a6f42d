"""A process of its own for act 2: ``python -m ...worker (store|answer) STORE MODEL``.

It speaks JSON, one object a line, on standard output. ``store`` computes and stores the second
document and is killed while it does; ``answer`` opens the store and answers about both.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvlayer_transformers.demo import model
from kvlayer_transformers.demo.asking import Asker
from kvlayer_transformers.demo.console import Console
from kvlayer_transformers.demo.documents import GUIDE, HANDBOOK
from kvlayer_transformers.demo.store import Store


def main(task: str, directory: str, folder: str) -> None:
    """Load the model, say so, do the task."""
    torch.set_num_threads(1)
    loaded = model.load(Path(folder))
    say("loaded")
    asker = Asker(loaded, Store(Path(directory)), Relay())
    {"store": store, "answer": answer}[task](asker)


class Relay(Console):
    """Progress for the parent to show."""

    def step(self, text: str) -> None:
        """Not needed: the parent words its own."""

    def tokens(self, done: int, total: int) -> None:
        say("pass", done=done, total=total)


def say(event: str, **fields: Any) -> None:
    """One line for the parent, at once."""
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def store(asker: Asker) -> None:
    """Compute the second document and store it, slowly enough to be caught in the act."""
    prompt = GUIDE.document(asker.loaded).prompts[0]
    with asker.open(one_by_one=True) as session:
        session.generate(
            prompt.ids,
            max_new_tokens=1,
            do_sample=False,
            on_pass=asker.console.tokens,
            streamer=_EndOfAnswer(),
        )
        say("stored")


class _EndOfAnswer:
    """A transformers streamer that says when generation has ended and storing begins."""

    def put(self, _ids: Any) -> None:
        """A token, of no interest."""

    def end(self) -> None:
        say("storing")


def answer(asker: Asker) -> None:
    """Answer every question about the first document, then the one about the second.

    The first is timed from before the cache is opened: its recovery is part of the wait.
    """
    handbook, guide = HANDBOOK.document(asker.loaded), GUIDE.document(asker.loaded)
    requested: float | None = time.perf_counter()
    with asker.open() as session:
        for prompt in (*handbook.prompts, *guide.prompts):
            say("answer", answer=asdict(asker.ask(session, prompt, requested=requested)))
            requested = None


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Act 1: the same questions cold and warm; first tokens come sooner, answers stay the same."""

from __future__ import annotations

from dataclasses import dataclass

from kvlayer import Cache
from kvlayer_transformers.demo.asking import Answer, Asker
from kvlayer_transformers.demo.documents import Document

__all__ = ["Speed", "play"]


@dataclass(frozen=True, slots=True)
class Speed:
    """Answers in the order of the document's questions, and the bytes of the document's KV."""

    cold: list[Answer]
    warm: list[Answer]
    kv_nbytes: int


async def _clear(cache: Cache) -> None:
    await cache.control.clear()


def play(asker: Asker, document: Document) -> Speed:
    """Ask every question with nothing to reuse, then again from host memory."""
    console = asker.console
    with asker.open() as session:
        session.portal.call(_clear)  # a directory that was kept may know the document
        cold: list[Answer] = []
        for prompt in document.prompts:
            # Each is computed from its first token; the first one's KV is kept for what follows.
            first = not cold
            with console.stage(f"cold: {prompt.question}"):
                cold.append(asker.ask(session, prompt, load=first, save=first))
            console.line(f"    {cold[-1].text}")
        warm: list[Answer] = []
        for prompt in document.prompts:
            with console.stage(f"warm: {prompt.question}"):
                warm.append(asker.ask(session, prompt))
            console.line(f"    {warm[-1].text}")
        stats = session.portal.cache.control.stats()
    return Speed(cold, warm, stats.tiers[0].stored_nbytes)

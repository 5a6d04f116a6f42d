"""Act 3: stored objects are damaged; each is an honest miss with its cause, answers stay right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvlayer_transformers.demo.asking import Answer, Asker, cause_at, explain
from kvlayer_transformers.demo.documents import Document
from kvlayer_transformers.demo.store import CHUNK_TOKENS

__all__ = ["Damage", "Damages", "play"]


@dataclass(frozen=True, slots=True)
class Damage:
    """What was done to an object, the cause the cache names, its explanation and the answer."""

    done: str
    cause: str
    explanation: str
    answer: Answer


@dataclass(frozen=True, slots=True)
class Damages:
    """Both damages, and how the store has healed after one more question."""

    corrupt: Damage
    truncated: Damage
    healed_tokens: int
    healed_explanation: str


def play(asker: Asker, document: Document) -> Damages:
    """Damage two objects of the document, one after the other, asking in between.

    Nothing is stored before both have been seen; then one more question repairs the store.
    """
    chunks = len(document.ids) // CHUNK_TOKENS
    corrupt = _suffer(asker, document, chunks - 2, asker.store.flip_byte, "one byte flipped")
    truncated = _suffer(asker, document, chunks - 4, asker.store.cut, "one object cut in half")
    with asker.open() as session:
        with asker.console.stage("asked once more: what is missing is computed and stored again"):
            asker.ask(session, document.prompts[0])
        explanation = explain(session, document.ids)
    return Damages(corrupt, truncated, explanation.hit_tokens, str(explanation))


def _suffer(
    asker: Asker,
    document: Document,
    chunk: int,
    inflict: Callable[[list[int], int], str],
    what: str,
) -> Damage:
    """Damage one chunk's object, ask with empty host memory, and see what the cache says."""
    done = inflict(document.ids, chunk)
    asker.console.line(f"    {done}")
    with asker.open() as session:
        with asker.console.stage(f"{what}: {document.prompts[0].question}"):
            answer = asker.ask(session, document.prompts[0], save=False)
        asker.console.line(f"    {answer.text}")
        explanation = explain(session, document.ids)
    cause = cause_at(explanation, chunk * CHUNK_TOKENS)
    return Damage(done, str(cause), str(explanation), answer)

"""Asking one question and timing its first token, with or without the cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvlayer import Cache, Explanation
from kvlayer.results import Cause
from kvlayer_transformers.demo.console import Console
from kvlayer_transformers.demo.documents import Prompt
from kvlayer_transformers.demo.model import LoadedModel
from kvlayer_transformers.demo.store import PASS_TOKENS, Store
from kvlayer_transformers.session import Session

__all__ = ["Answer", "Asker", "cause_at", "explain", "median"]

_ANSWER_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, and how.

    ``ids`` are the generated tokens. ``ttft_s`` is the time from the request to the first of them;
    ``loaded`` tokens of the prompt came from the cache; ``causes`` say what cut the load short.
    """

    question: str
    text: str
    ids: list[int]
    ttft_s: float
    prompt_tokens: int
    loaded: int
    causes: list[str] = field(default_factory=list[str])


class _FirstToken:
    """A transformers streamer that notes when the first generated token arrives."""

    def __init__(self) -> None:
        self.at: float | None = None
        self._seen_prompt = False

    def put(self, _ids: Any) -> None:
        if self._seen_prompt and self.at is None:
            self.at = time.perf_counter()
        self._seen_prompt = True

    def end(self) -> None:
        """The last token has been seen."""


@dataclass(frozen=True, slots=True)
class Asker:
    """A loaded model, and the store its sessions open."""

    loaded: LoadedModel
    store: Store
    console: Console

    def open(self, *, one_by_one: bool = False) -> Session:
        """A session on the store, with nothing in host memory yet. See ``Store.config``."""
        return Session.open(
            self.loaded.model,
            self.store.config(one_by_one=one_by_one),
            weights=self.loaded.weights,
            geometry=self.loaded.geometry,
            pass_tokens=PASS_TOKENS,
        )

    def ask(
        self,
        session: Session,
        prompt: Prompt,
        *,
        requested: float | None = None,
        load: bool = True,
        save: bool = True,
    ) -> Answer:
        """Answer greedily, with one sentence.

        ``requested`` is when the request came, on ``perf_counter``; None: it comes now.
        """
        first = _FirstToken()
        requested = time.perf_counter() if requested is None else requested
        generation = session.generate(
            prompt.ids,
            load=load,
            save=save,
            on_pass=self.console.tokens,
            max_new_tokens=_ANSWER_TOKENS,
            eos_token_id=self.loaded.ends(),
            do_sample=False,
            streamer=first,
        )
        if first.at is None:
            raise AssertionError("the model generated nothing")
        new: Any = generation.sequences[0, len(prompt.ids) :]
        ids: list[int] = new.tolist()
        return Answer(
            prompt.question,
            self.loaded.decode(ids),
            ids,
            first.at - requested,
            len(prompt.ids),
            generation.loaded,
            [str(failure.cause) for failure in generation.failed],
        )


def explain(session: Session, ids: Sequence[int]) -> Explanation:
    """What the session's cache says of a prompt."""

    async def ask(cache: Cache) -> Explanation:
        return await cache.control.explain(list(ids))

    return session.portal.call(ask)


def cause_at(explanation: Explanation, token: int) -> Cause | None:
    """The cause of the miss that covers a token; None when it is no miss."""
    for miss in explanation.misses:
        if miss.start <= token < miss.stop:
            return miss.cause
    return None


def median(values: Sequence[float]) -> float:
    """The middle value, the upper one of two."""
    return sorted(values)[len(values) // 2]

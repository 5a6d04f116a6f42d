"""The transformers adapter keeps what any engine adapter must."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hang import HANG
from transformers import DynamicCache

from kvlayer import CacheConfig, Scope
from kvlayer.testing import AdapterSuite
from kvlayer_transformers import Session


class AdaptedSession:
    def __init__(self, model: Any, session: Session) -> None:
        self.model, self.session = model, session

    def store(self, tokens: Sequence[int], scope: Scope, /) -> Sequence[bytes]:
        past = DynamicCache()
        with torch.no_grad():
            self.model(torch.tensor([list(tokens)]), past_key_values=past)
        self.session.save(list(tokens), past, scope=scope)
        return _columns(past, len(tokens))

    def load(self, tokens: Sequence[int], scope: Scope, /) -> Sequence[bytes]:
        past, columns = self.session.load(list(tokens), scope=scope)
        return _columns(past, columns)

    def found(self, tokens: Sequence[int], scope: Scope, /) -> int:
        with self.session.portal.lookup(list(tokens), scope=scope) as lookup:
            return lookup.wait(HANG).tokens


def _columns(past: Any, count: int) -> list[bytes]:
    return [
        b"".join(
            each[0, :, column].numpy().tobytes()
            for layer in past.layers
            for each in (layer.keys, layer.values)
        )
        for column in range(count)
    ]


class TestSession(AdapterSuite):
    exact = True

    @pytest.fixture(autouse=True)
    def model_of_the_session(self, llama: Any) -> None:
        self.model = llama

    @contextmanager
    def open(self, config: CacheConfig, /) -> Iterator[AdaptedSession]:
        with Session.open(self.model, config, exact=self.exact, report_prefill=False) as session:
            yield AdaptedSession(self.model, session)


class TestSessionWithTails(TestSession):
    exact = False

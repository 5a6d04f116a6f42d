"""The adapter suite on an engine of tensors alone, and adapters that lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hang import HANG

from kvlayer import AttentionKind, Cache, CacheConfig, KVGroup, KVLayout, KVView, Portal, Scope
from kvlayer.layout import NHD
from kvlayer.testing import AdapterSuite

GROUP = KVGroup(AttentionKind.MHA, (0, 1), "float32", num_kv_heads=2, head_size=8)
LAYOUT = KVLayout.single(GROUP, NHD, tokens_per_block=4)
SLOTS = list(range(200))[::-1]  # token i does not lie in slot i


class TensorEngine:
    """KV is a function of all tokens so far; paged memory, and an adapter of a few lines."""

    def __init__(self, portal: Portal) -> None:
        self.portal = portal

    def compute(self, tokens: Sequence[int]) -> list[torch.Tensor]:
        running = torch.cumsum(torch.tensor(tokens, dtype=torch.float64), 0)
        memory = self.memory()
        for layer, cache in enumerate(memory):
            for token, value in enumerate(running.tolist()):
                block, inside = divmod(SLOTS[token], 4)
                row = torch.arange(32, dtype=torch.float32).view(2, 2, 8)
                cache[:, block, inside] = torch.sin(row + value + layer * 0.5)
        return memory

    def memory(self) -> list[torch.Tensor]:
        return [torch.full((2, 50, 4, 2, 8), 7.0) for _ in GROUP.layers]

    def rows(self, memory: list[torch.Tensor], count: int) -> list[bytes]:
        at = [divmod(SLOTS[token], 4) for token in range(count)]
        return [
            b"".join(cache[:, block, inside].numpy().tobytes() for cache in memory)
            for block, inside in at
        ]

    def store(self, tokens: Sequence[int], scope: Scope, /) -> Sequence[bytes]:
        memory = self.compute(tokens)
        view = KVView.single(memory, torch.tensor(SLOTS[: len(tokens)]))
        self.portal.call(Cache.store, tokens, view, scope=scope)
        return self.rows(memory, len(tokens))

    def load(self, tokens: Sequence[int], scope: Scope, /) -> Sequence[bytes]:
        memory = self.memory()
        view = KVView.single(memory, torch.tensor(SLOTS[: len(tokens)]))

        async def load(cache: Cache) -> int:
            async with cache.lookup(tokens, scope=scope) as hit:
                return (await cache.retrieve(hit, view)).tokens

        return self.rows(memory, self.portal.call(load))

    def found(self, tokens: Sequence[int], scope: Scope, /) -> int:
        with self.portal.lookup(tokens, scope=scope) as lookup:
            return lookup.wait(HANG).tokens


class TestTensorEngine(AdapterSuite):
    engine: type[TensorEngine] = TensorEngine

    @contextmanager
    def open(self, config: CacheConfig, /) -> Iterator[TensorEngine]:
        with Portal.open(config, LAYOUT) as portal:
            yield self.engine(portal)


class LoadsAllThatWasAsked(TensorEngine):
    def load(self, tokens: Sequence[int], scope: Scope, /) -> Sequence[bytes]:
        loaded = super().load(tokens, scope)
        if 64 <= len(loaded) < 72 and len(tokens) == 70:
            return [*loaded, *loaded[: 70 - len(loaded)], b""]
        return loaded


class ForgetsTheScope(TensorEngine):
    def store(self, tokens: Sequence[int], scope: Scope, /) -> Sequence[bytes]:
        return super().store(tokens, Scope())

    def load(self, tokens: Sequence[int], scope: Scope, /) -> Sequence[bytes]:
        return super().load(tokens, Scope())


class IgnoresTheFirstToken(TensorEngine):
    def load(self, tokens: Sequence[int], scope: Scope, /) -> Sequence[bytes]:
        found = super().load(tokens, scope)
        other = (tokens[0] - 1, *tokens[1:])
        return found or super().load(other, scope)


class RaisesForDamage(TensorEngine):
    def load(self, tokens: Sequence[int], scope: Scope, /) -> Sequence[bytes]:
        memory = self.memory()
        view = KVView.single(memory, torch.tensor(SLOTS[: len(tokens)]))

        async def load(cache: Cache) -> int:
            async with cache.lookup(tokens, scope=scope) as hit:
                report = await cache.retrieve(hit, view)
            if report.failed:
                raise RuntimeError(report.failed)
            return report.tokens

        return self.rows(memory, self.portal.call(load))


class ClaimsAnEmptyHit(TensorEngine):
    def load(self, tokens: Sequence[int], scope: Scope, /) -> Sequence[bytes]:
        loaded = super().load(tokens, scope)
        return loaded or ([b""] if scope.salts and self.is_cold else [])

    is_cold = True

    def store(self, tokens: Sequence[int], scope: Scope, /) -> Sequence[bytes]:
        self.is_cold = False
        return super().store(tokens, scope)


class StoresTheFirstTurnOnly(TensorEngine):
    seen = 0

    def store(self, tokens: Sequence[int], scope: Scope, /) -> Sequence[bytes]:
        self.seen += 1
        if self.seen < 4:
            return super().store(tokens, scope)
        return self.rows(self.compute(tokens), len(tokens))


class HalvesThePrecision(TensorEngine):
    """In what it loads of a prompt it has not seen: as far as it goes, right but for rounding."""

    is_new = True

    def store(self, tokens: Sequence[int], scope: Scope, /) -> Sequence[bytes]:
        self.is_new = False
        return super().store(tokens, scope)

    def load(self, tokens: Sequence[int], scope: Scope, /) -> Sequence[bytes]:
        loaded = super().load(tokens, scope)
        if not self.is_new or len(loaded) < 140:
            return loaded
        last = torch.frombuffer(bytearray(loaded[-1]), dtype=torch.float32)
        return [*loaded[:-1], last.to(torch.float16).float().numpy().tobytes()]


LIARS: list[tuple[type[TensorEngine], str]] = [
    (HalvesThePrecision, "what one engine stored another loads to the bit"),
    (ClaimsAnEmptyHit, "an empty cache loads nothing"),
    (LoadsAllThatWasAsked, "it never loads past what a lookup finds"),
    (IgnoresTheFirstToken, "a prompt that differs loads only what is alike"),
    (ForgetsTheScope, "tenants do not share"),
    (RaisesForDamage, "damage is a shorter prefix"),
    (StoresTheFirstTurnOnly, "a prompt that grows is found whole"),
]


@pytest.mark.parametrize(("liar", "name"), LIARS)
def test_a_lying_adapter_fails_exactly_the_promise_it_breaks(
    liar: type[TensorEngine], name: str
) -> None:
    class Asked(TestTensorEngine):
        engine = liar

    assert [v.promise.name for v in Asked().run() if not v.is_good] == [name]


class NamesEveryModelAlike(TestTensorEngine):
    @contextmanager
    def open(self, config: CacheConfig, /) -> Iterator[TensorEngine]:
        one = dataclasses.replace(config.model, weights=f"sha256:{'a' * 64}")
        with super().open(dataclasses.replace(config, model=one)) as engine:
            yield engine


OTHER_MODEL = "another model loads nothing"


def test_an_adapter_that_forgets_which_model_it_is_fails_that_promise() -> None:
    suite = NamesEveryModelAlike()
    assert [v.promise.name for v in suite.run() if not v.is_good] == [OTHER_MODEL]


def test_every_promise_of_an_adapter_has_a_liar() -> None:
    lied_about = {*(name for _, name in LIARS), OTHER_MODEL}
    assert lied_about == {promise.name for promise in AdapterSuite.promises()}

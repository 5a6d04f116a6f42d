"""The suite of an engine adapter: what goes from an engine into a cache and comes back to another.

It sees an adapter from outside: which KV the engine stored of a prompt, and which KV another
instance found loaded, token by token, both as bytes.
"""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import ClassVar, Protocol

from kvlayer.config.model import CacheConfig, ModelConfig, TierConfig
from kvlayer.scope import Scope
from kvlayer.testing.promise import Promise, broken, expect, promise, same_bytes
from kvlayer.testing.suite import Suite

__all__ = ["AdaptedEngine", "AdapterSuite", "AdapterTrial"]

_ALICE, _BOB = Scope.private("alice's unguessable salt"), Scope.private("bob's unguessable salt")


class AdaptedEngine(Protocol):
    """One engine with its adapter and its cache. All calls block."""

    def store(self, tokens: Sequence[int], scope: Scope, /) -> Sequence[bytes]:
        """Compute a prompt without loading anything and hand its KV to the adapter.

        Returns the KV of each token as the engine holds it: all layers, in any order that
        :meth:`load` shares. Has reached every tier when this returns.
        """
        ...

    def load(self, tokens: Sequence[int], scope: Scope, /) -> Sequence[bytes]:
        """Let the adapter load what it can of a prompt, into memory that held something else.

        Returns the KV of the leading tokens that the engine would not compute.
        """
        ...

    def found(self, tokens: Sequence[int], scope: Scope, /) -> int:
        """The tokens of ``cache.lookup`` on the adapter's own cache."""
        ...


@dataclass(frozen=True, slots=True)
class AdapterTrial:
    """Opens engines on one directory; ``weights`` says which model they claim to be."""

    open: Callable[[str], AbstractContextManager[AdaptedEngine]]
    directory: Path
    prompt: tuple[int, ...]

    def another_prompt(self, same: int) -> tuple[int, ...]:
        """One of the same length whose first ``same`` tokens are the same, and the next is not."""
        rest = self.prompt[same:]
        changed = (rest[0] + 1 if rest[0] < max(self.prompt) else rest[0] - 1, *rest[1:])
        return (*self.prompt[:same], *changed)


class AdapterSuite(Suite):
    """Override :meth:`open`; a subclass of a real engine wants a tiny model."""

    tokens_per_chunk: ClassVar[int] = 16
    prompt_tokens: ClassVar[int] = 150
    vocabulary: ClassVar[tuple[int, int]] = (3, 500)
    """Token ids are drawn from this half-open range."""

    @abstractmethod
    def open(self, config: CacheConfig, /) -> AbstractContextManager[AdaptedEngine]:
        """An engine whose adapter opens a cache with ``config``, and closes it when it is left.

        ``config.model.weights`` is a digest; the tiers are host memory and a directory.
        """

    async def keep(self, promise: Promise, /) -> None:
        rng = Random(5)  # noqa: S311  # the same prompt every time
        prompt = tuple(rng.randrange(*self.vocabulary) for _ in range(self.prompt_tokens))
        with tempfile.TemporaryDirectory(prefix="kvlayer-", ignore_cleanup_errors=True) as folder:
            trial = AdapterTrial(lambda weights: self.open(self._config(folder, weights)),
                                 Path(folder), prompt)  # fmt: skip
            await promise.check(self, trial)

    def _config(self, folder: str, weights: str) -> CacheConfig:
        return CacheConfig(
            model=ModelConfig(weights=f"sha256:{weights * 64}"),
            tiers=(
                TierConfig(url="cpu://?capacity=16MiB"),
                TierConfig(url=f"file://{folder}", write="through", deadline_seconds=60.0),
            ),
            tokens_per_chunk=self.tokens_per_chunk,
        )

    @promise("The engine gets a shorter correct prefix, never wrong bytes.")
    async def test_an_empty_cache_loads_nothing(self, trial: AdapterTrial) -> None:
        with trial.open("a") as engine:
            expect(len(engine.load(trial.prompt, _ALICE)), 0, "the tokens loaded from nothing")

    @promise(
        "It stores, finds, moves and reloads the attention keys and values of token chunks across "
        "requests, processes and restarts."
    )
    async def test_what_one_engine_stored_another_loads_to_the_bit(
        self, trial: AdapterTrial
    ) -> None:
        with trial.open("a") as engine:
            stored = engine.store(trial.prompt, Scope())
        expect(len(stored) >= self.tokens_per_chunk, True, "a chunk and more to be stored")
        with trial.open("a") as engine:
            loaded = engine.load(trial.prompt, Scope())
        expect(len(loaded) >= self.tokens_per_chunk, True, "a chunk and more to be loaded")
        _is_prefix(loaded, stored)

    @promise("Prefix hit: the longest usable prefix, in tokens.")
    async def test_it_never_loads_past_what_a_lookup_finds(self, trial: AdapterTrial) -> None:
        with trial.open("a") as engine:
            engine.store(trial.prompt[:70], Scope())
            for tokens in (trial.prompt, trial.prompt[:70], trial.prompt[:40], trial.prompt[:5]):
                found = engine.found(tokens, Scope())
                loaded = len(engine.load(tokens, Scope()))
                if loaded > min(found, len(tokens)):
                    broken(f"at most {found} of {len(tokens)} tokens to be loaded", f"{loaded}")

    @promise("A name includes everything before it.")
    async def test_a_prompt_that_differs_loads_only_what_is_alike(
        self, trial: AdapterTrial
    ) -> None:
        with trial.open("a") as engine:
            stored = engine.store(trial.prompt, Scope())
            for same in (0, 1, 40, 97):
                loaded = engine.load(trial.another_prompt(same), Scope())
                if len(loaded) > same:
                    broken(f"at most {same} tokens that are alike to be loaded", f"{len(loaded)}")
                _is_prefix(loaded, stored)

    @promise("A salt makes KV private.")
    async def test_tenants_do_not_share(self, trial: AdapterTrial) -> None:
        with trial.open("a") as engine:
            stored = engine.store(trial.prompt, _ALICE)
            for scope in (_BOB, Scope()):
                loaded = len(engine.load(trial.prompt, scope))
                expect(loaded, 0, "the tokens another tenant loads")
            mine = engine.load(trial.prompt, _ALICE)
            expect(len(mine) > 0, True, "the tenant's own KV to be loaded")
            _is_prefix(mine, stored)

    @promise(
        "Two deployments share bytes exactly when everything that shaped those bytes is equal."
    )
    async def test_another_model_loads_nothing(self, trial: AdapterTrial) -> None:
        with trial.open("a") as engine:
            engine.store(trial.prompt, Scope())
        with trial.open("b") as engine:
            expect(len(engine.load(trial.prompt, Scope())), 0, "the tokens another model loads")

    @promise("A cache may fail only into a miss.")
    async def test_damage_is_a_shorter_prefix(self, trial: AdapterTrial) -> None:
        with trial.open("a") as engine:
            stored = engine.store(trial.prompt, Scope())
        damaged = _damage(trial.directory)
        expect(damaged > 1, True, "objects to be there to be damaged")
        with trial.open("a") as engine:
            loaded = engine.load(trial.prompt, Scope())
            _is_prefix(loaded, stored)
            again = engine.store(trial.prompt, Scope())
            loaded = engine.load(trial.prompt, Scope())
            expect(len(loaded) > 0, True, "what was stored again to be loaded")
            _is_prefix(loaded, again)

    @promise("A conversation that grows names all its tokens.")
    async def test_a_prompt_that_grows_is_found_whole(self, trial: AdapterTrial) -> None:
        with trial.open("a") as engine:
            for tokens in (40, 41, 90):
                engine.store(trial.prompt[:tokens], Scope())
            stored = engine.store(trial.prompt, Scope())
        with trial.open("a") as engine:
            found = engine.found(trial.prompt, Scope())
            expect(found >= len(trial.prompt) // self.tokens_per_chunk * self.tokens_per_chunk,
                   True, f"every full chunk of {len(trial.prompt)} tokens to be found")  # fmt: skip
            loaded = engine.load(trial.prompt, Scope())
        expect(bool(loaded), True, "something of it to be loaded")
        for whole, part in zip(stored, loaded, strict=False):
            expect(len(part), len(whole), "the bytes of a token")


def _is_prefix(loaded: Sequence[bytes], stored: Sequence[bytes]) -> None:
    if len(loaded) > len(stored):
        broken(f"at most the {len(stored)} tokens that were stored", f"{len(loaded)} loaded")
    for token, (mine, theirs) in enumerate(zip(loaded, stored, strict=False)):
        same_bytes(mine, theirs, f"token {token}, as it was stored")


def _damage(directory: Path) -> int:
    """Flip a byte near the end of every second object, newest names first; how many there were."""
    files = sorted(path for path in directory.rglob("*.raw") if path.is_file())
    for path in files[::2]:
        content = bytearray(path.read_bytes())
        content[-4096] ^= 0xFF  # the first byte of the last page: payload, not padding
        path.write_bytes(content)
    return len(files)

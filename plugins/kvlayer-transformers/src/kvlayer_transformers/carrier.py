"""Carries the rows of a batch between transformers' past and the cache; never breaks generation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from kvlayer import Cache, KVView, Portal, Scope, StoreReport
from kvlayer._values import items
from kvlayer.errors import (
    ClosedError,
    ForkedError,
    IdentityError,
    LayoutError,
    TokensError,
    UnsupportedError,
)
from kvlayer.results import Failure
from kvlayer_transformers.adapters import Adapters
from kvlayer_transformers.chains import Chains
from kvlayer_transformers.engine import Past
from kvlayer_transformers.geometry import Geometry
from kvlayer_transformers.past import Layers, allocate, as_cache, view_of
from kvlayer_transformers.prompts import Prompts
from kvlayer_transformers.transfer import Arrival, Row, load_rows, store_rows

__all__ = ["Carrier", "Loading", "Scopes"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

Scopes: TypeAlias = Scope | Sequence[Scope]
"""One scope for every row of a batch, or one per row."""

# A broken program, which has to hear of it. Everything else the cache raises is its own trouble.
_MISUSE = (ClosedError, ForkedError, IdentityError, LayoutError, TokensError, UnsupportedError)


@dataclass(frozen=True, slots=True)
class Loading:
    """``past`` holds the first ``columns`` columns of a batch; ``failed`` is what shortened it."""

    past: Past
    columns: int = 0
    failed: tuple[Failure, ...] = ()


class Carrier:
    """One model's way in and out of one cache. All calls block the calling thread."""

    def __init__(self, portal: Portal, geometry: Geometry, adapters: Adapters) -> None:
        """``adapters`` of the model: while one is active, every scope must name it."""
        self.portal = portal
        self.geometry = geometry
        self._adapters = adapters
        self._chains = Chains(portal.cache.chain)
        self.troubles = 0

    def load(self, prompts: Prompts, scopes: Scopes, *, step: int) -> Loading:
        """As many leading columns as every row has KV for: a multiple of ``step``, never all."""
        self._chains.begin()
        rows = self._rows(prompts, scopes, [prompts.columns] * prompts.rows)
        lent: list[Layers] = []

        def lend(columns: int) -> Callable[[int, int, int], KVView]:
            layers = allocate(self.geometry, prompts.pads, columns)
            lent.append(layers)
            return lambda row, start, stop: view_of(layers, self.geometry, row, start, stop)

        arrival = self._ask(Arrival(), load_rows, rows, prompts.columns, step, lend)
        past = as_cache(lent[0] if arrival.columns else [], arrival.columns)
        return Loading(past, arrival.columns, arrival.failed)

    def computed(self, tokens: int, seconds: float) -> None:
        """Tell the cache how fast the model computes prompts. Waits for nothing."""

        async def report(cache: Cache) -> None:
            cache.report_prefill(tokens, seconds)

        self.portal.submit(report)

    def save(
        self,
        prompts: Prompts,
        layers: Layers,
        scopes: Scopes,
        *,
        ends: Sequence[int],
        first_tokens: Sequence[int],
        tail: bool,
    ) -> tuple[StoreReport, ...]:
        """Store row r's KV of tokens ``first_tokens[r]`` up to column ``ends[r]``.

        One report per row, all zero where the cache broke. ``layers`` is read until this returns.
        """
        rows = self._rows(prompts, scopes, ends)
        stores: list[tuple[Row, KVView, int]] = []
        for index, (row, first, end) in enumerate(zip(rows, first_tokens, ends, strict=True)):
            start = min(first, end - row.pad)
            view = view_of(layers, self.geometry, index, row.pad + start, end)
            stores.append((row, view, start))
        return self._ask((StoreReport(),) * prompts.rows, store_rows, stores, tail)

    def trouble(self, what: str, exc: Exception | None = None) -> None:
        """Count something that went wrong and was answered by recomputing; log the first one."""
        self.troubles += 1
        if self.troubles == 1:
            _log.warning("the KV cache failed, recomputing (told once): %s", what, exc_info=exc)

    def _ask(self, otherwise: T, coroutine: Callable[..., Any], *args: Any) -> T:
        """What ``coroutine(cache, *args)`` returns on the cache's loop, or ``otherwise``."""
        try:
            answer: T = self.portal.call(coroutine, *args)
        except _MISUSE:
            raise
        except Exception as exc:  # noqa: BLE001  # law 1: the cache may fail only into a miss
            self.trouble(f"{type(exc).__name__}: {exc}", exc)
            return otherwise
        return answer

    def _rows(self, prompts: Prompts, scopes: Scopes, ends: Sequence[int]) -> list[Row]:
        """The batch's rows, each up to its end column and with its scope."""
        given = items("scope", scopes, Scope, hint="pass a kvlayer.Scope, or one for each prompt")
        each = given * prompts.rows if isinstance(scopes, Scope) else given
        if len(each) != prompts.rows:
            raise TokensError(
                f"{len(each)} scopes for {prompts.rows} prompts",
                hint="pass one scope for all of them, or one for each",
            )
        self._adapters.check(each)
        return [
            Row(self._chains.chain(prompts.ids[index, pad:end], scope), pad)
            for index, (pad, end, scope) in enumerate(zip(prompts.pads, ends, each, strict=True))
        ]

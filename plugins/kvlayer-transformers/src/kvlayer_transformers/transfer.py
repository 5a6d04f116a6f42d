"""What a session asks of the cache: coroutines that run on the portal's loop, one call a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from kvlayer import Cache, KVView, StoreReport
from kvlayer.identity.chain import ChunkChain
from kvlayer.results import Failure
from kvlayer_transformers.prompts import reusable_columns

__all__ = ["Arrival", "Row", "load_rows", "store_rows"]


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt of a batch: its names without padding, and how many columns of padding it has."""

    chain: ChunkChain
    pad: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """``columns`` leading columns of the batch are loaded; ``failed`` says what shortened them."""

    columns: int = 0
    failed: tuple[Failure, ...] = ()


async def load_rows(
    cache: Cache,
    rows: Sequence[Row],
    columns: int,
    step: int,
    lend: Callable[[int], Callable[[int, int, int], KVView]],
) -> Arrival:
    """Load as many leading columns of a batch as every row has KV for, a multiple of ``step``.

    ``columns`` is the batch's width; the last one is never loaded. ``lend(columns)`` provides
    memory and answers how to view it: ``view(row, start, stop)``. All hits stay pinned until
    every row has been loaded.
    """
    pads = [row.pad for row in rows]
    async with AsyncExitStack() as pinned:
        hits = [await pinned.enter_async_context(cache.lookup(row.chain)) for row in rows]
        usable = reusable_columns(pads, [hit.tokens for hit in hits], columns, step)
        if usable == 0:
            return Arrival()
        view = lend(usable)
        loaded: list[int] = []
        failed: list[Failure] = []
        for index, (row, hit) in enumerate(zip(rows, hits, strict=True)):
            if row.pad >= usable:
                loaded.append(0)
                continue
            report = await cache.retrieve(hit, view(index, row.pad, usable))
            loaded.append(report.tokens)
            failed += report.failed
        return Arrival(min(usable, reusable_columns(pads, loaded, columns, step)), tuple(failed))


async def store_rows(
    cache: Cache,
    rows: Sequence[tuple[Row, KVView, int]],
    tail: bool,
) -> tuple[StoreReport, ...]:
    """Store each row's KV: a view of tokens from the given first token on."""
    return tuple(
        [
            await cache.store(row.chain, view, first_token=first, tail=tail)
            for row, view, first in rows
        ]
    )

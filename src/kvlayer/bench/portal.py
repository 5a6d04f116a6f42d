"""What crossing to a cache's loop costs an engine thread, and what it need not cross for."""

from __future__ import annotations

import asyncio
import random
import threading
from array import array
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial

from kvlayer.api.cache import Cache
from kvlayer.api.portal import Portal
from kvlayer.bench.measure import Row, alternate, seconds_of
from kvlayer.config.model import CacheConfig, TierConfig
from kvlayer.identity.keys import ChunkChain, Scope
from kvlayer.layout import NHD, AttentionKind, KVGroup, KVLayout
from kvlayer.staging.sample import paged_view

__all__ = ["portal_rows"]

_TOKENS, _CHUNK, _BATCH = 32_768, 256, 64
_PUBLIC = Scope()


async def _nothing(*_: object) -> None:
    pass


@contextmanager
def _bare_hop() -> Generator[Callable[[], object]]:
    """A call that runs nothing on another thread's loop, by asyncio's own means."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield lambda: asyncio.run_coroutine_threadsafe(_nothing(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _prompts(count: int) -> list[array[int]]:
    rng = random.Random(0)  # noqa: S311  # tokens, not keys
    return [array("i", (rng.randrange(128_000) for _ in range(_TOKENS))) for _ in range(count)]


async def portal_rows(rounds: int) -> list[Row]:
    """``portal.hop``, ``portal.batch64`` and ``portal.lookup``: median seconds of an engine thread.

    A call of nothing and 64 of them in one hop, beside one bare hop; a lookup and release of 32,768
    tokens in memory, beside naming them alone.
    """
    group = KVGroup(AttentionKind.MHA, (0,), "bfloat16", 1, 1)
    layout = KVLayout.single(group, NHD, tokens_per_block=_CHUNK)
    config = CacheConfig(tiers=(TierConfig(url="cpu://?capacity=8MiB"),), tokens_per_chunk=_CHUNK)
    prompts = _prompts(8)
    with Portal.open(config, layout) as portal, _bare_hop() as bare:
        view = paged_view(layout, _TOKENS // _CHUNK, seed=1)
        for prompt in prompts:
            portal.call(Cache.store, prompt, view)

        def batch() -> None:
            for job in reversed(portal.submit_all([_nothing] * _BATCH)):  # the last first: one wait
                job.wait()

        async def hop_taken(_: int) -> float:
            return seconds_of(lambda: portal.call(_nothing))

        async def batch_taken(_: int) -> float:
            return seconds_of(batch)

        async def lookup_taken(number: int) -> float:
            return seconds_of(lambda: portal.lookup(prompts[number % len(prompts)]).release())

        def name() -> None:
            ChunkChain(prompts[0], _PUBLIC, tokens_per_chunk=_CHUNK, tokens_per_tail=_CHUNK // 8)

        rows: list[Row] = []
        for figure, subject, ceiling, times in (
            ("portal.hop", hop_taken, bare, 100),
            ("portal.batch64", batch_taken, bare, 20),
            ("portal.lookup", lookup_taken, name, 20),
        ):
            top_taken = partial(seconds_of, ceiling)
            own, top = await alternate(subject, top_taken, rounds=times * rounds, warm=8)
            rows.append(Row(figure, own, "s", top))
        return rows

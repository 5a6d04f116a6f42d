"""What other processes may read of the slab: a slot's word changes when its bytes change hands."""

from __future__ import annotations

import pytest
from caches import config, layout, tokens
from engine import Engine

from kvlayer import Cache
from kvlayer.tier.planner.directory import HostState


@pytest.mark.asyncio
async def test_a_slots_word_stays_while_its_object_does_and_changes_when_it_goes() -> None:
    engine = Engine(layout(), 32, 1)
    slots = engine.slots(64)
    async with Cache.open(config(host="16KiB"), layout()) as cache:
        slab, planner = cache.stack.objects.slab, cache.stack.planner
        words = slab.generations()
        await cache.store(tokens(64), engine.view(slots))
        ready = [r for r in planner.directory.active() if r.host is HostState.READY]
        seen = {record.offset // 4096: words[record.offset // 4096] for record in ready}
        assert len(seen) == 4 and all(seen.values())
        async with cache.lookup(tokens(64)) as hit:
            await cache.retrieve(hit, engine.view(slots))
        assert seen == {page: words[page] for page in seen}
        await cache.store(tokens(64, 1), engine.view(slots))  # needs all of their room
        assert not [page for page, word in seen.items() if words[page] == word]
        words.release()

"""A process of the simulated world: an open cache, and the record of what it said it holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from world import DIM, PAGE, World

from kvlayer import (
    AttentionKind,
    Cache,
    CacheConfig,
    KVGroup,
    KVLayout,
    ModelConfig,
    TierConfig,
)
from kvlayer.abc.backend import Backend
from kvlayer.config.registry import BACKENDS
from kvlayer.events import Event, ObjectQuarantined, ObjectsEvicted
from kvlayer.layout import NHD
from kvlayer.testing import invariants
from kvlayer.testing.faults import given
from kvlayer.tier.planner.records import HostState
from kvlayer_backends.cpu import CpuBackend

T = TypeVar("T")

BLOCK, CHUNK, TAIL = 4, 8, 4  # tokens
SLACK = 0.25  # virtual seconds that work on threads may add
LEASE = 5.0
LAYOUT = KVLayout.single(
    KVGroup(AttentionKind.MHA, (0,), "float32", 1, DIM), NHD, tokens_per_block=BLOCK
)


@dataclass
class Below:
    """A lower tier of a process."""

    backend: Backend
    settings: dict[str, Any] = field(default_factory=dict[str, Any])


@asynccontextmanager
async def opened(
    world: World,
    *below: Below,
    pages: int = 12,
    name: str = "",
    high: float = 1.0,
    layout: KVLayout = LAYOUT,
    **config: Any,
) -> AsyncGenerator[Process]:
    """A cache in a process of its own, until the block ends.

    Host memory has ``pages``; above ``high``, a share of them, it is emptied to half of that.
    """
    tiers = [TierConfig(url=f"cpu://?capacity={pages * PAGE}")]
    schemes: dict[str, type[Backend]] = {"cpu": CpuBackend}
    for number, tier in enumerate(below):
        scheme = f"tier{number}"
        schemes[scheme] = given(tier.backend, scheme)
        tiers.append(TierConfig(url=f"{scheme}://", **tier.settings))
    settings = CacheConfig(
        model=ModelConfig(weights="sha256:" + "ab" * 32),
        tiers=tuple(tiers),
        tokens_per_chunk=CHUNK,
        tokens_per_tail=TAIL,
        high_watermark=high,
        low_watermark=high / 2,
        lease_seconds=LEASE,
        close_seconds=20.0,
        **config,
    )
    process = Process(world, name, [tier.backend for tier in below])
    world.processes.append(process)
    async with Cache.open(
        settings,
        layout,
        sinks=[process.hear],
        backends=BACKENDS.extended(schemes),
    ) as cache:
        process.cache = cache
        yield process


class Process:
    """One cache, and what it said it holds."""

    cache: Cache

    def __init__(self, world: World, name: str, backends: list[Backend]) -> None:
        self.world, self.name, self.backends = world, name, backends
        self._moment = 0
        self._committed: dict[bytes, int] = {}
        self._given_up: dict[bytes, int] = {}
        self._taken_by_others: set[bytes] = set()
        """What other processes took from a shared tier, some time."""

    @property
    def patience(self) -> float:
        """Seconds in which one question to every lower tier is answered, or given up."""
        return max((t.guard.deadline for t in self.cache.stack.lower), default=0.0) + SLACK

    # -- what it said ----------------------------------------------------------------------------

    def now(self) -> int:
        self._moment += 1
        return self._moment

    def hear(self, event: Event) -> None:
        if isinstance(event, ObjectsEvicted):
            # What leaves host memory in the background is served from below.
            keys = event.keys if event.policy != "demotion" else ()
        elif isinstance(event, ObjectQuarantined):
            keys = (event.key,)
        else:
            return
        chunks = [key.end_hash for key in keys]
        if isinstance(event, ObjectsEvicted) and event.tier == self.cache.stack.host.name:
            self.leaves_host(chunks)
        else:
            self.takes_below(chunks)

    def holds(self, chunk_hash: bytes, *, in_host: bool = False) -> bool:
        """Whether the cache believes that it can serve all of a chunk."""
        records = self.cache.stack.planner.directory.ending(self.cache.namespace.digest, chunk_hash)
        objects = [found for record in records for found in record.objects]
        ready = [o.host is HostState.READY or (o.is_ready and not in_host) for o in objects]
        return bool(ready) and all(ready)

    def commits(self, hashes: list[bytes], since: int) -> None:
        """What was stored. What is only believed to lie on a shared tier is a hint."""
        mine = [each for each in hashes if self.holds(each, in_host=True)]
        self._committed |= dict.fromkeys(mine, since)

    def gives_up(self, *hashes: bytes) -> None:
        """Somebody else took these away, and may: they are not missed."""
        self._given_up |= dict.fromkeys(hashes, self.now())

    def takes_below(self, hashes: list[bytes]) -> None:
        """What this process took from a shared tier has left it for all."""
        for process in self.world.processes:
            process.gives_up(*hashes)
            if process is not self:
                process._taken_by_others.update(hashes)

    def leaves_host(self, hashes: list[bytes]) -> None:
        """What host memory dropped is missed, if a tier below is to have it.

        But the directory's word on a shared tier is a hint: a store of what lies in host memory
        does not ask there again. Where another process had taken the copy away, host memory
        dropped the last one, and may. Nothing is excused that is there now, or that nobody took.
        """
        self.gives_up(
            *(
                each
                for each in hashes
                if not self.holds(each)
                or (
                    each in self._taken_by_others
                    and not self.holds(each, in_host=True)
                    and not self.world.lies_in_directory(each)
                )
            )
        )

    def committed(self) -> list[bytes]:
        """What has to be there: committed, and given up by no one since it was stored."""
        return [h for h, at in self._committed.items() if self._given_up.get(h, 0) < at]

    # -- what must hold --------------------------------------------------------------------------

    def check(self) -> None:
        """Between any two steps."""
        invariants.accounts(self.cache.stack.planner)
        invariants.no_wrong_bytes(self.cache, self.world.bytes_of)
        invariants.within_bounds(self.cache)

    async def timed(self, what: str, work: Awaitable[T], within: float) -> T:
        """Wait for ``work``, which has to end within so many seconds."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        result = await work
        invariants.answered(what, loop.time() - started, within=within)
        return result

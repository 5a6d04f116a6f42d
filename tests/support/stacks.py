"""Small tier stacks for tests: layouts, a planner on a hand-set clock, backends that misbehave."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvlayer._steps import Steps, finish
from kvlayer.abc.backend import (
    DeleteResult,
    Hit,
    Read,
    ReadResult,
    SizeResult,
    Write,
    WriteResult,
)
from kvlayer.abc.policy import EvictionPolicy
from kvlayer.abc.stager import HostCopy, Stager
from kvlayer.codec.frame import HEADER_NBYTES
from kvlayer.errors import BackendError
from kvlayer.events import Emitter, Event
from kvlayer.eviction.lru import PrefixLRU
from kvlayer.identity.keys import ChunkChain, ObjectKey, Part, Scope
from kvlayer.layout import (
    NHD,
    STATE_BLOCKS,
    AttentionKind,
    GroupLayout,
    HitRule,
    KVGroup,
    KVLayout,
    KVView,
)
from kvlayer.memory.slab import Slab
from kvlayer.runtime.offload import Offload
from kvlayer.testing import invariants
from kvlayer.testing.memory import MemoryBackend as Honest
from kvlayer.tier.guard.guard import Guard
from kvlayer.tier.planner.match import Match
from kvlayer.tier.planner.planner import Planner, Reservation, StorePlan
from kvlayer.tier.stack import Stack
from kvlayer.tier.tier import LowerTier, Tier
from kvlayer.tier.transfer.device import LocalDevice
from kvlayer.tier.transfer.objects import Objects

check_accounts = invariants.accounts

NAMESPACE = "ab" * 32
CHUNK = 16
TAIL = 4


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def full_group() -> KVGroup:
    """Every-chunk attention: two layers, two heads; one 4 KiB page per chunk and shard."""
    return KVGroup(AttentionKind.MHA, (0, 2), "float32", 2, 8)


def window_group(window_tokens: int = 20, rule: HitRule = HitRule.TRAILING) -> KVGroup:
    """Sliding-window attention, or with ``HitRule.CHUNKED`` that within attention chunks."""
    return KVGroup(
        AttentionKind.MHA,
        (1,),
        "float32",
        2,
        8,
        hit_rule=rule,
        window_tokens=window_tokens,
    )


def state_group(nbytes: int = 64) -> KVGroup:
    """A recurrent state: only the one at the end of a hit matters."""
    return KVGroup(
        AttentionKind.STATE,
        (3,),
        "float32",
        hit_rule=HitRule.TRAILING,
        window_tokens=1,
        state_nbytes=nbytes,
    )


def plain_layout() -> KVLayout:
    """One every-chunk group."""
    return KVLayout.single(full_group(), NHD, tokens_per_block=4)


def hybrid_layout(window_tokens: int = 20) -> KVLayout:
    """Full attention, a sliding window and a state."""
    return KVLayout(
        (
            GroupLayout(full_group(), NHD, 4),
            GroupLayout(window_group(window_tokens), NHD, 4),
            GroupLayout(state_group(), STATE_BLOCKS, 4),
        )
    )


def chunked_layout(window_tokens: int = 48) -> KVLayout:
    """Full attention, local attention in chunks and a state."""
    local = window_group(window_tokens, HitRule.CHUNKED)
    return KVLayout(
        (
            GroupLayout(full_group(), NHD, 4),
            GroupLayout(local, NHD, 4),
            GroupLayout(state_group(), STATE_BLOCKS, 4),
        )
    )


def states_layout() -> KVLayout:
    """Full attention and two groups of states: a page of each for a chunk."""
    states = GroupLayout(state_group(), STATE_BLOCKS, 4)
    return KVLayout((GroupLayout(full_group(), NHD, 4), states, states))


def make_planner(
    *,
    layout: KVLayout | None = None,
    pages: int = 64,
    tiers: int = 2,
    head_shards: int = 0,
    clock: Callable[[], float] | None = None,
    policy: type[EvictionPolicy] = PrefixLRU,
) -> Planner:
    """A planner over ``pages`` 4 KiB pages of host memory."""
    return Planner(
        NAMESPACE,
        layout or plain_layout(),
        tiers=[f"tier-{i}" for i in range(tiers)],
        capacity=pages * 4096,
        policy=policy,
        tokens_per_chunk=CHUNK,
        tokens_per_tail=TAIL,
        head_shards=head_shards,
        clock=clock or Clock(),
        wall_clock=Clock(),
    )


def chain_of(count: int, *, seed: int = 0, scope: Scope | None = None) -> ChunkChain:
    """The names of a prompt of ``count`` tokens; equal seeds begin alike."""
    tokens = array("i", ((seed * 7919 + i * 31) % 50_000 for i in range(count)))
    chain = ChunkChain(tokens, scope or Scope(), tokens_per_chunk=CHUNK, tokens_per_tail=TAIL)
    return chain.named_in(NAMESPACE)


def holds_all(_group: int, _span: object) -> bool:
    """An engine that still has everything."""
    return True


def store(
    planner: Planner,
    chain: ChunkChain,
    *,
    tail: bool = False,
    first_token: int = 0,
    holds: Callable[[int, Any], bool] = holds_all,
) -> StorePlan:
    """Plan, gather (nothing is copied) and settle a store."""
    todo = planner.plan_store(chain, first_token, tail=tail, holds=holds)
    planner.stored(todo.gathers, ok=True)
    planner.settle(chain, todo.gathers)
    return todo


def whole(match: Match) -> Steps[Match | None]:
    """Chooses all that was found."""
    yield from ()
    return match


def probes(planner: Planner, chain: ChunkChain) -> list[ObjectKey]:
    """What a search that presumes nothing asks about full chunks."""
    return [key for key in _first_round(planner, chain) if key.tokens == CHUNK]


def tail_probes(planner: Planner, chain: ChunkChain) -> list[ObjectKey]:
    """What it asks about tails at the first gap."""
    return [key for key in _first_round(planner, chain) if key.tokens < CHUNK]


def _first_round(planner: Planner, chain: ChunkChain) -> list[ObjectKey]:
    search = planner.search(planner.match(chain), every=True)
    asked = finish(planner.questions(search, 1 << 1, 0.0))
    return [key for _, keys in asked for key in keys]


class MemoryBackend(Honest):
    """Objects in a dict, and switches for faults that no real backend produces on demand."""

    def __init__(self) -> None:
        super().__init__(capabilities=())
        self.calls: list[tuple[str, ObjectKey]] = []
        self.gate: asyncio.Event | None = None
        """While unset, ``get`` and ``put`` wait here; a cancellation ends the wait."""
        self.is_stubborn = False
        """Waits at the gate through cancellations, as a thread that cannot be stopped does."""
        self.arrived = asyncio.Event()
        """Set when a call has reached the gate."""
        self.raises: BaseException | None = None
        self.fails: BackendError | None = None
        self.claims: int | None = None
        """What ``get`` says it filled, whatever it did."""
        self.results: list[Any] | None = None
        """What a call answers instead of the truth."""

    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        for key in keys:
            self.calls.append(("contains", key))
        await self._pass()
        if self.results is not None:
            return self.results
        return await super().contains(keys)

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        results: list[ReadResult] = []
        for read in reads:
            self.calls.append(("get", read.key))
            await self._pass()
            results.append(self.fill(read))
        return results if self.results is None else self.results

    def fill(self, read: Read) -> ReadResult:
        if self.fails is not None:
            return self.fails
        result = super().fill(read)
        if isinstance(result, Hit) and self.claims is not None:
            return Hit(self.claims)
        return result

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        results: list[WriteResult] = []
        self.calls += [("put", write.key) for write in writes]
        for write in writes:
            await self._pass()
            if self.fails is None:
                self.objects[write.key] = b"".join(write.regions)
            results.append(self.fails)
        return results if self.results is None else self.results

    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        for key in keys:
            self.calls.append(("delete", key))
        return await super().delete(keys)

    async def _pass(self) -> None:
        gate = self.gate
        cancelled = False
        while gate is not None and not gate.is_set():
            self.arrived.set()
            try:
                await gate.wait()
            except asyncio.CancelledError:
                if not self.is_stubborn:
                    raise
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError
        if self.raises is not None:
            raise self.raises

    def count(self, operation: str) -> int:
        """How often an operation was asked for, in objects."""
        return sum(name == operation for name, _ in self.calls)


class RecordingStager(Stager):
    """No device: gathers write a pattern that names chunk and part, scatters are written down."""

    def __init__(self) -> None:
        self.gathered: list[HostCopy] = []
        self.scattered: list[tuple[Part, int, int, int]] = []
        """Part, first token in the view, tokens, tokens skipped."""
        self.bytes: list[bytes] = []
        self.gate: asyncio.Event | None = None
        self.arrived = asyncio.Event()
        self.raises: Exception | None = None

    def check(self, view: KVView) -> None: ...

    async def gather(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        await self._pass()
        for copy in copies:
            self.gathered.append(copy)
            copy.host[:] = pattern(copy.first, copy.payload.part, copy.host.nbytes)

    async def scatter(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        await self._pass()
        for copy in copies:
            self.scattered.append((copy.payload.part, copy.first, copy.tokens, copy.skip))
            self.bytes.append(bytes(copy.host))

    async def _pass(self) -> None:
        if self.gate is not None:
            self.arrived.set()
            await self.gate.wait()
        if self.raises is not None:
            raise self.raises


def pattern(first: int, part: Part, nbytes: int) -> bytes:
    """Bytes that no other chunk or part has."""
    unit = f"{first}:{part};".encode()
    return (unit * (nbytes // len(unit) + 1))[:nbytes]


@dataclass
class Rig:
    """A stack over ``MemoryBackend`` tiers; ``backends[0]`` is tier 1."""

    clock: Clock
    planner: Planner
    slab: Slab
    stager: RecordingStager
    backends: list[MemoryBackend]
    stack: Stack
    events: list[Event] = field(default_factory=list[Event])
    checks: Offload | None = None

    @property
    def tier(self) -> LowerTier:
        return self.stack.lower[0]

    @property
    def backend(self) -> MemoryBackend:
        return self.backends[0]

    def write_into(self, slots: Sequence[Reservation]) -> None:
        """What a gather would do to these slots."""
        for slot in slots:
            view = self.slab.view(slot.piece.offset, slot.piece.nbytes)
            view[:] = pattern(slot.span.start, slot.record.part, slot.piece.nbytes)

    def hold(self, chain: ChunkChain, *, tail: bool = False) -> StorePlan:
        """Put a prompt into host memory, and nowhere else."""
        todo = self.planner.plan_store(chain, 0, tail=tail, holds=holds_all)
        self.write_into(todo.gathers)
        self.planner.stored(todo.gathers, ok=True)
        self.planner.settle(chain, todo.gathers)
        return todo

    async def send_down(self, chain: ChunkChain, *, tail: bool = False) -> None:
        """Put a prompt on the lower tiers, and leave nothing of it in host memory."""
        todo = self.hold(chain, tail=tail)
        await self.stack.spills.start([(s.span, s.record) for s in todo.gathers], [])
        await self.stack.spills.flush()
        gone = self.planner.evict([s.record for s in todo.gathers], "cleared", "")  # type: ignore[arg-type]
        assert len(gone) == len(todo.gathers)

    async def settled(self) -> None:
        """Wait until nothing is in flight."""
        for tier in self.stack.lower:
            while tier.guard.inflight:
                await next(iter(tier.guard._calls)).ended()

    async def aclose(self) -> None:
        for backend in self.backends:
            if backend.gate is not None:
                backend.gate.set()
        await self.stack.aclose()
        self.stack.objects.close()
        self.slab.close()


def make_rig(
    *,
    layout: KVLayout | None = None,
    pages: int = 64,
    tiers: int = 1,
    write: str = "through",
    tails: bool = True,
    deadline: float = 30.0,
    max_inflight: int = 8,
    max_queued: int = 1024,
    head_shards: int = 0,
    shared: bool = False,
    watermarks: tuple[float, float] = (1.0, 1.0),
    policy: type[EvictionPolicy] = PrefixLRU,
) -> Rig:
    """A whole stack without files, devices or a moving clock. Needs a running loop."""
    clock = Clock()
    planner = make_planner(
        layout=layout,
        pages=pages,
        tiers=tiers + 1,
        head_shards=head_shards,
        clock=clock,
        policy=policy,
    )
    events: list[Event] = []
    emit = Emitter([events.append])
    slab, stager = Slab(pages * 4096), RecordingStager()
    backends = [MemoryBackend() for _ in range(tiers)]
    objects = Objects(
        slab,
        [None, *backends],
        shape=planner.payload,
        clock=clock,
        wall_clock=clock,
        build="test",
    )
    lower = [
        LowerTier(
            index,
            f"tier-{index}",
            emit,
            backend=backend,
            guard=Guard(deadline, max_inflight, max_queued=max_queued),
            write=write,
            tails=tails,
            is_shared=shared,
        )
        for index, backend in enumerate(backends, 1)
    ]
    low, high = watermarks
    stack = Stack(
        planner,
        LocalDevice(slab, stager, planner.payload),
        objects,
        Tier(0, "host", emit),
        lower,
        clock=clock,
        high_watermark=high,
        low_watermark=low,
    )
    return Rig(clock, planner, slab, stager, backends, stack, events)


def framed(nbytes: int) -> int:
    """Bytes of an object on a lower tier."""
    return HEADER_NBYTES + nbytes

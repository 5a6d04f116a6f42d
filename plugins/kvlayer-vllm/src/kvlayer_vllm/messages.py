"""What the scheduler's and the workers' halves tell each other, by vLLM's own means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvlayer.tier.messages import Verb
from kvlayer_vllm.device_order import EngineStream
from kvlayer_vllm.engine import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)
from kvlayer_vllm.layouts import RankLayout
from kvlayer_vllm.moves import Load

__all__ = ["Answers", "RankOrder", "Handshake", "Step"]


@dataclass(frozen=True, slots=True)
class RankOrder:
    """An order for a rank in another process. What is said of it need not be read to find it."""

    rank: int
    verb: Verb
    """Which way it goes."""
    view: str
    """One of ``Step.views``."""
    order: bytes


@dataclass(slots=True)
class Step(KVConnectorMetadata):
    """From the scheduler, with every step."""

    number: int = 0
    """Counted by the scheduler, from 1."""
    greeting: bytes = b""
    """For ranks that have not heard it yet."""
    shares: tuple[RankLayout, ...] = ()
    """With a greeting: what each rank holds of the whole model."""
    errands: list[RankOrder] = field(default_factory=list[RankOrder])
    """For all ranks."""
    views: dict[str, tuple[bytes, ...]] = field(default_factory=dict[str, tuple[bytes, ...]])
    """The slots of each KV group by an order's view: int64 in bytes, entry 0 being its first."""
    loads: list[Load] = field(default_factory=list[Load])
    """To start in this very process; empty where the workers are elsewhere."""
    must_wait: bool = False
    """The loads are of requests that this step computes."""
    received: set[str] = field(default_factory=set[str])
    """Requests whose load has ended, well or not."""
    failed: set[str] = field(default_factory=set[str])
    """Of these the ones to compute anew from the start."""
    invalid: set[int] = field(default_factory=set[int])
    """Blocks that a load was to fill and did not."""
    is_idle: bool = False
    """Somebody waits for a lookup, a load or a store and nothing is computed: let others run."""


@dataclass(slots=True)
class Answers(KVConnectorWorkerMetadata):
    """From one worker, or from several, with every step."""

    step: int
    """The step's number."""
    completions: list[bytes] = field(default_factory=list[bytes])
    greeted: set[int] = field(default_factory=set[int])
    """Ranks that have heard the greeting."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Answers:
        """What two workers say, as one."""
        assert isinstance(other, Answers)
        return Answers(
            min(self.step, other.step),
            self.completions + other.completions,
            self.greeted | other.greeted,
        )


@dataclass(slots=True)
class Handshake(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler once its tensors are there."""

    rank: RankLayout
    """With the layers of its own stage alone."""
    caches: list[list[Any]] | None
    """The tensors themselves, for a scheduler in the same process."""
    stream: EngineStream | None
    """With the tensors: what writes to them."""

    def __getstate__(self) -> tuple[RankLayout]:
        return (self.rank,)  # tensors and streams do not cross processes

    def __setstate__(self, state: tuple[RankLayout]) -> None:
        (self.rank,), self.caches, self.stream = state, None, None

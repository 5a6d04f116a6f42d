"""What the scheduler's and the workers' halves tell each other, by vLLM's own means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvlayer.tier.messages import Verb
from kvlayer_vllm.engine import KVConnectorMetadata, KVConnectorWorkerMetadata
from kvlayer_vllm.introductions import Introduction
from kvlayer_vllm.layouts import RankLayout
from kvlayer_vllm.moves import Load

__all__ = ["Answers", "RankOrder", "Step"]


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
    """Counted by the scheduler, from 1; 0 while nothing is offered."""
    asks: bool = False
    """The scheduler does not know its workers yet: they introduce themselves with their answers."""
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
    land: Callable[[], None] | None = None
    """After that rest: add to ``received``, ``failed`` and ``invalid`` what has ended meanwhile.
    None where the workers are elsewhere."""


@dataclass(slots=True)
class Answers(KVConnectorWorkerMetadata):
    """From one worker, or from several, with every step."""

    step: int
    """The step's number."""
    completions: list[bytes] = field(default_factory=list[bytes])
    greeted: set[int] = field(default_factory=set[int])
    """Ranks that have heard the greeting."""
    refusals: dict[int, str] = field(default_factory=dict[int, str])
    """Of the ranks that cannot join the cache: why."""
    introductions: dict[int, Introduction] = field(default_factory=dict[int, Introduction])
    """Of workers in other processes, by rank, where the step has asked for them."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Answers:
        """What two workers say, as one."""
        assert isinstance(other, Answers)
        return Answers(
            min(self.step, other.step),
            self.completions + other.completions,
            self.greeted | other.greeted,
            self.refusals | other.refusals,
            self.introductions | other.introductions,
        )

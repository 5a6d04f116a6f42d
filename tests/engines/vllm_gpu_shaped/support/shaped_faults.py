"""What the rig changes of the adapter: refusals that it lifts for itself, and faults it plants.

A harness that finds nothing proves something only where it finds what is there: each fault takes
one precaution of the adapter away, and :mod:`test_shaped_controls` sees each of them found.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from kvlayer import AttentionKind, KVGroup, KVView
from kvlayer_vllm import engine, layouts
from kvlayer_vllm.device_order import EngineStream, Queued
from kvlayer_vllm.held_blocks import HeldBlocks
from kvlayer_vllm.kept_states import KeptStates
from kvlayer_vllm.moves import Save
from kvlayer_vllm.promises import PendingLoads
from kvlayer_vllm.steps_under_way import StepsUnderWay
from kvlayer_vllm.tracked import Tracked

__all__ = ["FAULTS", "WrongKVError", "lifted"]


class WrongKVError(AssertionError):
    """Rows or answers are not those of their prefix. What is expected to fail fails of this."""


@contextmanager
def lifted() -> Generator[None]:
    """The one place where the rig lifts the adapter's refusals: of loads that a step waits for.

    Goes when the adapter no longer refuses them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "RECOMPUTES_IN_STEP", engine.TESTED[0])
        yield


@contextmanager
def in_flight_counts() -> Generator[None]:
    """Tokens of steps that nobody has heard of yet are taken for computed."""

    def computed(tracked: Tracked) -> int:
        return int(min(tracked.request.num_computed_tokens, tracked.request.num_tokens))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracked, "computed", property(computed))
        yield


@contextmanager
def found_counts() -> Generator[None]:
    """What a request finds in vLLM's prefix cache is taken for written."""

    def computed(tracked: Tracked) -> int:
        request = tracked.request
        known = request.num_computed_tokens - request.num_in_flight_tokens
        return int(min(known, request.num_tokens))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracked, "computed", property(computed))
        yield


@contextmanager
def last_step_counts() -> Generator[None]:
    """The last step that was scheduled is taken for the one that is heard of."""
    heard = StepsUnderWay.heard

    def all_of_them(steps: StepsUnderWay, _number: int) -> Any:
        return heard(steps, steps._last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepsUnderWay, "heard", all_of_them)
        yield


@contextmanager
def blocks_not_held() -> Generator[None]:
    """What a store reads is another's as soon as its request lets go of it."""

    def not_held(_held: HeldBlocks, _save: Save, _block_ids: Any) -> None:
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldBlocks, "hold", not_held)
        yield


@contextmanager
def states_not_held() -> Generator[None]:
    """A state that vLLM offers is remembered, and its block is whoever's."""

    class NoPool:
        def __init__(self, pool: Any) -> None:
            self.blocks = pool.blocks

        def touch(self, _blocks: Any) -> None: ...

        def free_blocks(self, _blocks: Any) -> None: ...

    bind = KeptStates.bind

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeptStates, "bind", lambda kept, pool: bind(kept, NoPool(pool)))
        yield


@contextmanager
def half_a_set() -> Generator[None]:
    """A hit needs no state at its end."""
    needed = KVGroup.first_needed

    def without(group: KVGroup, stop: int) -> int:
        return stop if group.kind is AttentionKind.STATE else needed(group, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVGroup, "first_needed", without)
        yield


@contextmanager
def loads_in_the_step() -> Generator[None]:
    """A state is loaded by the step that goes on from it, which has copied it by then."""
    make = PendingLoads.__init__

    def waiting(self: PendingLoads, *args: Any, **how: Any) -> None:
        make(self, *args, **how)
        self.is_async = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PendingLoads, "__init__", waiting)
        yield


@contextmanager
def heads_by_turns() -> Generator[None]:
    """Of more ranks than heads every other is taken for holding the same one, not neighbours."""

    def by_turns(held: Any, rank: int, _ranks: int) -> tuple[int, int]:
        first = rank * held.heads % held.group.num_kv_heads
        return first, first + held.heads

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "_heads", by_turns)
        yield


@contextmanager
def copies_follow_nothing() -> Generator[None]:
    """Copies do not wait for the engine's stream."""

    def as_it_is(_queued: Queued, view: KVView) -> KVView:
        return view

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Queued, "followed_by", as_it_is)
        yield


@contextmanager
def copies_follow_too_little() -> Generator[None]:
    """Copies wait for what was queued when another one began: its blocks are zeroed later."""
    queued = EngineStream.queued

    def before(stream: EngineStream) -> Queued:
        found = getattr(stream, "_before", None) or queued(stream)
        stream._before = queued(stream)  # type: ignore[attr-defined]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineStream, "queued", before)
        yield


FAULTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "in flight counts": in_flight_counts,
    "found counts": found_counts,
    "last step counts": last_step_counts,
    "blocks not held": blocks_not_held,
    "states not held": states_not_held,
    "half a set": half_a_set,
    "loads in the step": loads_in_the_step,
    "heads by turns": heads_by_turns,
    "copies follow nothing": copies_follow_nothing,
    "copies follow too little": copies_follow_too_little,
}

"""What the rig changes of the adapter: refusals that it lifts for itself, and faults it plants.

A harness that finds nothing proves something only where it finds what is there: each fault takes
one precaution of the adapter away, and :mod:`test_shaped_controls` sees each of them found.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from kvlayer_vllm import scheduler
from kvlayer_vllm.scheduler import SchedulerHalf
from kvlayer_vllm.tracked import Tracked

__all__ = ["FAULTS", "NOT_IN_ORDER", "Remedy", "WrongKVError", "lifted"]

NOT_IN_ORDER = (
    "the adapter remembers the last step that was scheduled, not the one it hears of: with several "
    "under way it stores rows that are not written yet"
)


class WrongKVError(AssertionError):
    """Rows or answers are not those of their prefix. What is expected to fail fails of this."""


class Remedy:
    """What the adapter does not do yet where several steps are under way, done for it.

    It remembers one step, the last that was scheduled, and takes it for the one whose output it
    hears; and it takes for computed what a request has found in vLLM's prefix cache, although
    the step that writes those rows may be under way. Told of both from outside it is right in the
    same traffic: what the rig finds otherwise are these two faults and no others. Goes when the
    adapter keeps a record of each step.
    """

    def __init__(self) -> None:
        self._heard: set[str] = set()
        """Requests of which a step was heard since they were given blocks."""

    def preempts(self, names: Iterable[str]) -> None:
        self._heard.difference_update(names)

    def hears(self, half: SchedulerHalf, output: Any) -> None:
        """The step that vLLM is going to hear of is this one."""
        half._scheduled = tuple(output.num_scheduled_tokens)
        self._heard.update(half._scheduled)

    def ends(self, half: SchedulerHalf, name: str) -> None:
        """A request is aborted: what none of its own steps has shown to be there is not stored."""
        tracked = half._tracked.get(name)
        if tracked is not None and name not in self._heard:
            tracked.is_doubtful = True


@contextmanager
def lifted() -> Generator[None]:
    """The one place where the rig lifts the adapter's refusal of ranks and of steps ahead.

    Goes when the adapter no longer refuses them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "refuse_parallel", lambda _config: None)
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
def finished_not_held() -> Generator[None]:
    """A finished request's blocks go back to vLLM while they are still read."""
    finished = SchedulerHalf.finished

    def let_go(half: SchedulerHalf, request: Any, block_ids: Any) -> bool:
        finished(half, request, block_ids)
        half._leaving.pop(request.request_id, None)
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SchedulerHalf, "finished", let_go)
        yield


@contextmanager
def preempted_not_held() -> Generator[None]:
    """Blocks that are still read go to others when they leave a window or are preempted."""
    overtaken = SchedulerHalf._overtaken

    def none(half: SchedulerHalf, preempted: Any) -> list[Any]:
        overtaken(half, preempted)
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SchedulerHalf, "_overtaken", none)
        yield


FAULTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "in flight counts": in_flight_counts,
    "finished not held": finished_not_held,
    "preempted not held": preempted_not_held,
}

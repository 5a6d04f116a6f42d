"""Steps that vLLM has scheduled and whose output it has not taken yet, oldest first.

vLLM may schedule several steps before it takes the output of the first, so each has a record::

    schedule   the scheduler's half begins a record: a number, and of each request the tokens up to
               which the step computes it. The loads the step waits for, and the loads whose end it
               tells of, are noted there, too. The number goes to the workers with ``Step``.
    workers    answer every step with its number (``Answers.step``), whatever else they have to say.
    heard      with the answer the step's record is closed, and those before it: loads it told of
               are settled, and what its requests have of their own in their blocks grows to where
               it computed them (``Tracked.written``). Nothing else makes that grow: what a request
               finds in vLLM's prefix cache may be written by a step that is still under way.
    store      up to ``written``, and never beyond what vLLM counts as computed.
    preempted  the blocks are gone: what steps under way compute of the request counts no more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvlayer_vllm.messages import Step
from kvlayer_vllm.moves import Load
from kvlayer_vllm.tracked import Tracked

__all__ = ["Share", "StepUnderWay", "StepsUnderWay"]


@dataclass(frozen=True, slots=True)
class Share:
    """What a step computes of one request: ``count`` tokens that end before ``stop``."""

    placement: int
    """In which blocks: see ``Tracked.placement``."""
    count: int
    stop: int


@dataclass(slots=True, eq=False)
class StepUnderWay:
    """One step, until it is heard of."""

    number: int
    began: float
    """When it was scheduled, by the clock of :class:`StepsUnderWay`."""
    of_prompts: int = 0
    """How many of the tokens it computes were known before: of prompts, or computed anew."""
    computes: dict[Tracked, Share] = field(default_factory=dict[Tracked, Share])
    waits_for: list[tuple[Tracked, Load]] = field(default_factory=list[tuple[Tracked, Load]])
    """Loads that are over before it computes."""
    told: list[Tracked] = field(default_factory=list[Tracked])
    """Whose load's end the workers report with it."""

    @property
    def is_right(self) -> bool:
        """Whether all it waited for was loaded. Once it has run.

        If not, blocks that hold nothing yet may count as computed for any request that shares
        them: nothing the step computed is to be stored.
        """
        return all(load.is_over and load.is_whole for _, load in self.waits_for)

    def add(self, tracked: Tracked, count: int) -> None:
        """It computes ``count`` tokens of the request beyond those that vLLM counts by now."""
        request = tracked.request
        stop = request.num_computed_tokens + count
        known = min(count, request.num_tokens - request.num_computed_tokens)
        if known > 1:  # the one that was sampled last is an answer's
            self.of_prompts += known
        self.computes[tracked] = Share(tracked.placement, count, stop)

    def has_written(self, tracked: Tracked) -> None:
        """vLLM has taken its output: the request's share of it is in the request's blocks."""
        share = self.computes[tracked]
        if self.is_right and share.placement == tracked.placement:
            tracked.written = max(tracked.written, share.stop)


class StepsUnderWay:
    """The records of all steps that nobody has heard of yet."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._steps: deque[StepUnderWay] = deque()
        self._last = 0

    def begin(self, step: Step) -> StepUnderWay:
        """The record of a step, which is numbered by it. Of one that is begun, the same."""
        if not step.number:
            self._last += 1
            step.number = self._last
            self._steps.append(StepUnderWay(step.number, self._clock()))
        return self._steps[-1]

    def heard(self, number: int) -> list[StepUnderWay]:
        """Close the records up to this step: vLLM takes their outputs in their order."""
        found: list[StepUnderWay] = []
        while self._steps and self._steps[0].number <= number:
            found.append(self._steps.popleft())
        return found

    def taken_of(self, tracked: Tracked) -> None:
        """The request ends: count what vLLM has taken of it and has not let us hear of yet.

        vLLM ends a request while it takes a step's output, and lets connectors hear of the step
        after that. What it does not count as in flight any more has been taken.
        """
        mine = [
            step
            for step in self._steps
            if tracked in step.computes and step.computes[tracked].placement == tracked.placement
        ]
        in_flight = sum(step.computes[tracked].count for step in mine)
        for step in mine:
            if in_flight <= tracked.request.num_in_flight_tokens:
                return
            in_flight -= step.computes[tracked].count
            step.has_written(tracked)

"""What one tier is being asked: about each object once at a time, however many want to know."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from kvlayer.abc.backend import SizeResult
from kvlayer.errors import BackendError
from kvlayer.identity.keys import ObjectKey
from kvlayer.results import Cause
from kvlayer.runtime.foreign import words
from kvlayer.tier.guard.guard import Refused, TierCall
from kvlayer.tier.planner.copies import copy_of
from kvlayer.tier.planner.planner import Planner
from kvlayer.tier.tier import LowerTier
from kvlayer.tier.transfer.objects import Objects

__all__ = ["Question", "Questions"]


@dataclass(slots=True, eq=False)
class Question:
    """One call that asks whether objects are there. ``waiters``: how many lookups want to know."""

    keys: Sequence[ObjectKey]
    call: TierCall[list[SizeResult]]
    waiters: int = 1
    is_counted: bool = False
    """Somebody has counted that it missed its deadline."""

    @property
    def has_answered(self) -> bool:
        """Whether it has said of any object if that is there."""
        if not self.call.has_ended or self.call.error is not None:
            return False
        return any(not isinstance(size, BackendError) for size in self.call.result())


class Questions:
    """Asks one tier and notes its answers, whoever still waits for them. On the loop."""

    def __init__(
        self, tier: LowerTier, planner: Planner, objects: Objects, clock: Callable[[], float]
    ) -> None:
        self._tier = tier
        self._planner = planner
        self._objects = objects
        self._clock = clock
        self._open: dict[ObjectKey, Question] = {}

    def ask(self, keys: Sequence[ObjectKey]) -> list[Question]:
        """Join what is being asked already, and ask the rest in one call.

        :meth:`wait` for each, then :meth:`leave` it. A tier that refuses to be asked is counted.
        """
        joined: dict[Question, None] = {}
        rest: list[ObjectKey] = []
        for key in keys:
            question = self._open.get(key)
            if question is None or question.call.was_late:
                rest.append(key)  # one that is stuck may hang for ever: the guard counts those
            else:
                joined[question] = None
        for question in joined:
            question.waiters += 1
        if rest and (new := self._begin(rest)) is not None:
            joined[new] = None
        return [*joined]

    def _begin(self, keys: Sequence[ObjectKey]) -> Question | None:
        ask = partial(self._objects.contains, self._tier.index, keys)
        try:
            call = self._tier.guard.start(ask, partial(self._booked, keys))
        except Refused as no:
            self._tier.refused(no.cause)
            return None
        question = Question(keys, call)
        self._open |= dict.fromkeys(keys, question)
        self._tier.asks(len(keys))
        return question

    async def wait(self, question: Question, seconds: float) -> bool:
        """Whether it was answered, within ``seconds`` and the tier's deadline."""
        tier, call = self._tier, question.call
        if await tier.guard.wait(call, seconds):
            return question.has_answered
        if not call.was_late:
            tier.refused(Cause.DEADLINE)  # an earlier question took most of the time
        elif not question.is_counted:
            question.is_counted = True
            tier.fails(Cause.DEADLINE, f"no answer within {tier.guard.deadline} s")
        return False

    def leave(self, question: Question) -> None:
        """Stop waiting. When nobody waits any more it is cancelled."""
        question.waiters -= 1
        if not question.waiters and not question.call.has_ended:
            self._close(question.keys, question.call)
            question.call.cancel()

    def _close(self, keys: Sequence[ObjectKey], call: TierCall[list[SizeResult]]) -> None:
        for key in keys:
            question = self._open.get(key)
            if question is not None and question.call is call:
                del self._open[key]

    def _booked(self, keys: Sequence[ObjectKey], call: TierCall[list[SizeResult]]) -> None:
        """The call has ended, in whatever way."""
        self._close(keys, call)
        error = call.error
        if error is None:
            self._note(keys, call.result(), is_late=call.was_late)
        elif isinstance(error, Refused):
            self._tier.refused(error.cause)
        elif not (isinstance(error, CancelledError) and call.was_told_to_stop):
            self._tier.fails(Cause.TIER_DOWN, words(error))

    def _note(
        self, keys: Sequence[ObjectKey], sizes: Sequence[SizeResult], *, is_late: bool
    ) -> None:
        """Note what was said of each object. An error is not an absence."""
        tier, answers = self._tier, [*zip(keys, sizes, strict=True)]
        there = [key for key, size in answers if isinstance(size, int)]
        copies = [copy_of(0, size) for size in sizes if isinstance(size, int)]
        absent = [key for key, size in answers if size is None]
        self._planner.note(there, tier.index, copies)
        self._planner.absent(absent, tier.index, self._clock())
        tier.answered(sizes, is_late=is_late)

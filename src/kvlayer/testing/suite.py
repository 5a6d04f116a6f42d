"""A suite: the promises of one kind of plugin, run by any runner of tests, or by none."""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from time import perf_counter
from types import TracebackType
from typing import ClassVar
from unittest import SkipTest

from kvlayer.testing.bounded import Patience, run_bounded, seconds
from kvlayer.testing.promise import Broken, Hung, Promise

__all__ = ["Outcome", "Suite", "Verdict"]


class Outcome(StrEnum):
    """How a promise fared."""

    KEPT = "kept"
    BROKEN = "broken"
    """Something else was found than what is promised."""
    FAILED = "failed"
    """An exception came out, of the tested thing as far as anybody can tell."""
    HUNG = "hung"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One promise, and what was found. ``seconds`` is wall time; it decides nothing."""

    promise: Promise
    outcome: Outcome
    expected: str = ""
    found: str = ""
    """Of a promise that was not run: why."""
    trace: str = ""
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        return self.outcome in (Outcome.KEPT, Outcome.NOT_RUN)


class Suite(ABC):
    """Promises as methods named ``test_...``; subclass one of the suites built on this.

    With pytest a subclass called ``Test...`` is collected like any other class; :meth:`run` does
    without. Each promise gets a fresh subject, a thread and an event loop.
    """

    deadline_seconds: ClassVar[float] = 60.0
    """What does not answer by then hangs. Generous: slowness is not what is judged."""

    @classmethod
    def promises(cls) -> list[Promise]:
        """Every promise, in the order of the classes and lines that declare them."""
        found: dict[str, Promise] = {}
        for owner in reversed(cls.__mro__):
            for name, value in vars(owner).items():
                declared = getattr(value, "promise", None)
                if isinstance(declared, Promise):
                    found[name] = declared
        return list(found.values())

    def why_not(self, promise: Promise, /) -> str | None:
        """Why a promise cannot be asked of this subject; None when it can."""
        return None

    def patience(self) -> Patience:
        """How long a promise may take."""
        return seconds(self.deadline_seconds)

    @abstractmethod
    async def keep(self, promise: Promise, /) -> None:
        """Make a subject, run ``promise.check(self, subject)`` on it and clear up."""

    def verify(self, promise: Promise, /) -> None:
        """Raise what the promise raises when it is not kept, with the contract as a note.

        Raises ``unittest.SkipTest`` for one that :meth:`why_not` excludes; the pytest plugin of
        this package leaves those out instead.
        """
        __tracebackhide__ = True
        why = self.why_not(promise)
        if why is not None:
            raise SkipTest(why)
        try:
            run_bounded(lambda: self.keep(promise), self.patience())
        except Exception as exc:
            exc.add_note(f'the contract: "{promise.contract}"')
            exc.__traceback__ = _where(exc, promise)
            raise

    def judge(self, promise: Promise, /) -> Verdict:
        """Like :meth:`verify`, but the answer is a value."""
        why = self.why_not(promise)
        if why is not None:
            return Verdict(promise, Outcome.NOT_RUN, found=why)
        began = perf_counter()
        try:
            run_bounded(lambda: self.keep(promise), self.patience())
        except Broken as exc:
            outcome = Outcome.HUNG if isinstance(exc, Hung) else Outcome.BROKEN
            return Verdict(
                promise, outcome, exc.expected, exc.found, seconds=perf_counter() - began
            )
        except Exception as exc:  # noqa: BLE001  # whatever the tested thing raises is the finding
            said = "".join(traceback.format_exception_only(exc)).strip()
            trace = "".join(traceback.format_tb(_where(exc, promise)))
            elapsed = perf_counter() - began
            return Verdict(promise, Outcome.FAILED, "no exception", said, trace, elapsed)
        return Verdict(promise, Outcome.KEPT, seconds=perf_counter() - began)

    def run(self) -> Iterator[Verdict]:
        """Judge every promise, one after the other."""
        for each in self.promises():
            yield self.judge(each)


def _where(error: BaseException, promise: Promise) -> TracebackType | None:
    """The traceback from the promise on, without the kit's threads and loops before it.

    All of it, where the error came from elsewhere: from building or opening the subject.
    """
    at = error.__traceback__
    while at is not None and at.tb_frame.f_code is not promise.check.__code__:
        at = at.tb_next
    return at or error.__traceback__

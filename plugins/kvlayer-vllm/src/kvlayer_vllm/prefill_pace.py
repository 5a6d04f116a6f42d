"""How fast the engine computes prompts, as its own steps tell: what a load must beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvlayer_vllm.steps_under_way import StepUnderWay

__all__ = ["PrefillPace"]

_MOSTLY = 0.9  # of a step's tokens, at least, for its time to be that of computing prompts


class PrefillPace:
    """Reports the tokens and seconds of steps that computed prompts and little else.

    A step is timed from when it was scheduled until its output was taken, and not before that of
    the step ahead of it was: several may be under way, and the engine computes one after the other.
    What the engine waits for between two steps does not count. Left out are steps that

    - computed fewer than ``least`` tokens of prompts: those tell what a step costs, not a token;
    - answered many requests, too (over a tenth of their tokens);
    - waited for a load before they computed.

    ``report(tokens, seconds)`` is called in the scheduler's thread, once for each that is left.
    """

    def __init__(
        self, report: Callable[[int, float], None], *, least: int, clock: Callable[[], float]
    ) -> None:
        self._report = report
        self._least = least
        self._clock = clock
        self._heard_at = float("-inf")

    def heard(self, steps: Sequence[StepUnderWay]) -> None:
        """The outputs of these steps, the next ones, were taken just now, all at once."""
        if not steps:
            return
        now = self._clock()
        seconds = now - max(steps[0].began, self._heard_at)
        self._heard_at = now
        tokens = sum(share.count for step in steps for share in step.computes.values())
        prompts = sum(step.of_prompts for step in steps)
        if (
            prompts >= self._least
            and prompts >= _MOSTLY * tokens
            and not any(step.waits_for for step in steps)
        ):
            self._report(tokens, seconds)

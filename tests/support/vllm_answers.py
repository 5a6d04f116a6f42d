"""Answers of one engine beside those of another: the same, but for how sums are rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from vllm_process import EngineProcess

__all__ = ["DRIFT", "TIE", "Answer", "Comparison", "assert_attended"]

TIE = {"float32": 0.0, "bfloat16": 0.25}
"""Largest gap between the two best log-probabilities at which the second may be chosen."""
DRIFT = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest difference of a chosen token's log-probability."""
_FAR = 4
"""Times that difference: what no rounding and no tie comes near to."""

Answer: TypeAlias = tuple[list[int], int, list[list[float]]]
"""Tokens, how many of the prompt were not computed, the two best log-probabilities of each."""


@dataclass
class Comparison:
    """What came of comparing greedy answers of engines that compute in ``dtype``."""

    dtype: str
    tokens: int = 0
    """That were compared: of each answer up to the first that differs."""
    ties: int = 0
    """Answers that differ, where the engine itself was about to choose another token."""
    drift: float = 0.0
    """Largest difference of a log-probability so far."""
    wrong: int = 0
    """Answers that differ by more than rounding."""

    def add(self, cold: Answer, warm: Answer) -> None:
        """Compare one answer."""
        assert len(cold[0]) == len(warm[0]) == len(cold[2]) == len(warm[2])
        for ours, theirs, best, found in zip(warm[0], cold[0], cold[2], warm[2], strict=True):
            self.tokens += 1
            if ours != theirs:
                is_tie = best[0] - best[1] < TIE[self.dtype]
                self.ties += is_tie
                self.wrong += not is_tie
                return  # what follows answers another text
            drift = abs(best[0] - found[0])
            self.drift = max(self.drift, drift)
            if drift > DRIFT[self.dtype]:
                self.wrong += 1
                return


def assert_attended(
    process: EngineProcess, dtype: str, cold: Answer, prompt: list[int], cached: int
) -> float:
    """The negative control: what is loaded is what is attended to.

    The first token of ``cold``, which is ``prompt``'s answer, is as likely as it was when it is
    computed from the KV that was stored, and becomes far less likely when that is overwritten in
    host memory. Far more than rounding explains, whatever tokens are about as likely: returns by
    how much.
    """
    token, before = cold[0][0], cold[2][0][0]
    process("forget")
    logprob, loaded = process("likelihood", prompt, token)
    assert loaded == cached and abs(logprob - before) <= DRIFT[dtype]
    process("forget")
    assert process("alter", [prompt]) > 0
    logprob, loaded = process("likelihood", prompt, token)
    assert loaded == cached
    drift = abs(float(logprob) - before)
    assert drift > _FAR * DRIFT[dtype], (drift, dtype)
    return drift

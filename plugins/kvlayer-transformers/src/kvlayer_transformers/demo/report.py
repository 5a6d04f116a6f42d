"""What the demo found: figures for machines, a table for people, and the promises it checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from kvlayer.results import Cause
from kvlayer_transformers.demo.acts.crash import Crash
from kvlayer_transformers.demo.acts.damage import Damages
from kvlayer_transformers.demo.acts.speed import Speed
from kvlayer_transformers.demo.asking import Answer, median

__all__ = ["Report"]

_AIM: Final = 8.0


@dataclass(frozen=True, slots=True)
class Report:
    """All three acts, and how many tokens of the prompts are the documents'."""

    speed: Speed
    crash: Crash
    damages: Damages
    document_tokens: int
    second_tokens: int

    @property
    def cold_s(self) -> float:
        return median([answer.ttft_s for answer in self.speed.cold])

    @property
    def warm_s(self) -> float:
        return median([answer.ttft_s for answer in self.speed.warm])

    @property
    def restart_s(self) -> float:
        """The first answer of a new process, the opening of its cache included."""
        return self.crash.first[0].ttft_s

    def same_answers(self) -> dict[str, bool]:
        """Which answers had to be a cold one's, token by token, and whether they were."""
        cold, crash, damages = self.speed.cold, self.crash, self.damages
        return {
            "warm answers are the cold ones": _same(cold, self.speed.warm),
            "a new process gives the first document's cold answers": _same(cold, crash.first),
            "a new process gives the second document's cold answer": _same(
                [crash.reference], [crash.second]
            ),
            "a flipped byte changes no answer": _same(cold[:1], [damages.corrupt.answer]),
            "a truncated object changes no answer": _same(cold[:1], [damages.truncated.answer]),
        }

    def promises(self) -> dict[str, bool]:
        """Everything that must hold, in words, and whether it did. Times are not among it."""
        damages, full = self.damages, self.document_tokens
        reused = [answer.loaded for answer in (*self.speed.warm, *self.crash.first)]
        cut_short = [damage.answer.loaded for damage in (damages.corrupt, damages.truncated)]
        return {
            **self.same_answers(),
            "cold runs reuse nothing": not any(answer.loaded for answer in self.speed.cold),
            "warm runs reuse the whole document": set(reused) == {full},
            "damage cuts reuse short": all(0 < loaded < full for loaded in cut_short),
            "a flipped byte is called corrupt": damages.corrupt.cause == Cause.CORRUPT,
            "a truncated object is called truncated": damages.truncated.cause == Cause.TRUNCATED,
            "what was damaged is stored again": damages.healed_tokens == full,
        }

    def broken(self) -> list[str]:
        """The promises that were not kept."""
        return [promise for promise, kept in self.promises().items() if not kept]

    def figures(self) -> dict[str, Any]:
        """Every figure shown, for ``--json``."""
        promises = self.promises()
        return {
            "prompt_tokens": self.speed.cold[0].prompt_tokens,
            "document_tokens": self.document_tokens,
            "second_document_tokens": self.second_tokens,
            "kv_nbytes": self.speed.kv_nbytes,
            "cold_ttft_s": self.cold_s,
            "warm_ttft_s": self.warm_s,
            "restart_ttft_s": self.restart_s,
            "cold_over_warm": self.cold_s / self.warm_s,
            "cold_over_restart": self.cold_s / self.restart_s,
            "outputs_identical": all(self.same_answers().values()),
            "corrupt_cause": self.damages.corrupt.cause,
            "truncated_cause": self.damages.truncated.cause,
            "promises": promises,
            "act_1": asdict(self.speed),
            "act_2": asdict(self.crash),
            "act_3": asdict(self.damages),
        }

    def text(self) -> str:
        """The closing table, what ``explain`` says, and what was not kept."""
        speed, crash, damages = self.speed, self.crash, self.damages
        second = crash.reference.ttft_s
        rows = [
            ("", "first token", "against cold", "tokens reused", "same answer"),
            self._row("cold", self.cold_s, speed.cold, None),
            self._row("warm, from host memory", self.warm_s, speed.warm, speed.cold),
            self._row(
                "after SIGKILL, new process, from disk", self.restart_s, crash.first, speed.cold
            ),
            self._row("one byte flipped", None, [damages.corrupt.answer], speed.cold[:1]),
            self._row("one object cut in half", None, [damages.truncated.answer], speed.cold[:1]),
            ("second document, cold", f"{second:.2f} s", "", "0", ""),
            (
                "second document, after SIGKILL",
                f"{crash.second.ttft_s:.2f} s",
                f"{second / crash.second.ttft_s:.1f}x",
                f"{crash.second.loaded:,}",
                _yes(_same([crash.reference], [crash.second])),
            ),
        ]
        lines = [*_columns(rows), "", self._notes(), ""]
        for title, damage in (("flipped byte", damages.corrupt), ("cut object", damages.truncated)):
            lines += [f"explain, {title}: {_indented(damage.explanation)}"]
        lines += [f"explain, at the end: {_indented(damages.healed_explanation)}"]
        if broken := self.broken():
            lines += ["", "NOT KEPT:", *(f"  {promise}" for promise in broken)]
        return "\n".join(lines)

    def _row(
        self,
        what: str,
        seconds: float | None,
        answers: Sequence[Answer],
        cold: Sequence[Answer] | None,
    ) -> tuple[str, ...]:
        seconds = answers[0].ttft_s if seconds is None else seconds
        ratio = "" if cold is None else f"{self.cold_s / seconds:.1f}x"
        same = "" if cold is None else _yes(_same(cold, answers))
        return (what, f"{seconds:.2f} s", ratio, f"{answers[0].loaded:,}", same)

    def _notes(self) -> str:
        crash, speed = self.crash, self.speed
        notes = (
            f"{speed.cold[0].prompt_tokens:,} tokens in a prompt, {self.document_tokens:,} of them "
            f"the document, whose KV is {speed.kv_nbytes / 1e6:.1f} MB.\n"
            f"{crash.signal} came with {crash.written} of the second document's {crash.expected} "
            f"objects written and {crash.unfinished} unfinished."
        )
        if min(self.cold_s / self.warm_s, self.cold_s / self.restart_s) < _AIM:
            notes += (
                f"\nFirst tokens came less than {_AIM:.0f} times sooner: is the machine busy? "
                "Times are reported, never judged."
            )
        return notes


def _same(expected: Sequence[Answer], found: Sequence[Answer]) -> bool:
    """Token by token, question by question."""
    return [(a.question, a.ids) for a in expected] == [(a.question, a.ids) for a in found]


def _yes(kept: bool) -> str:
    return "yes" if kept else "NO"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def _indented(text: str) -> str:
    return text.replace("\n", "\n  ")

"""What a check found: one sentence, why it matters, what to do. A plain value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["Check", "Finding", "Status"]


class Status(StrEnum):
    """How a finding bears on kvlayer."""

    OK = "ok"
    UNKNOWN = "unknown"
    """This system does not say."""
    WARN = "warn"
    """It works, and less well or less safely than it could."""
    BAD = "bad"
    """Something will not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of one check."""

    check: str
    status: Status
    found: str
    why: str
    """Why it matters."""
    advice: str = ""
    """What to do; empty where nothing is to be done."""
    detail: Mapping[str, object] = field(default_factory=dict[str, object])
    """The figures behind it, as JSON can hold them. Bytes end in ``_nbytes``."""

    def as_dict(self) -> dict[str, object]:
        return {
            "check": self.check,
            "status": self.status.value,
            "found": self.found,
            "why": self.why,
            "do": self.advice,
            "detail": dict(self.detail),
        }


@dataclass(frozen=True, slots=True)
class Check:
    """What a check is called and why it matters; it makes its findings."""

    name: str
    why: str

    def ok(self, found: str, **detail: object) -> Finding:
        return Finding(self.name, Status.OK, found, self.why, detail=detail)

    def unknown(self, found: str, **detail: object) -> Finding:
        return Finding(self.name, Status.UNKNOWN, found, self.why, detail=detail)

    def warn(self, found: str, advice: str, **detail: object) -> Finding:
        return Finding(self.name, Status.WARN, found, self.why, advice, detail)

    def bad(self, found: str, advice: str, **detail: object) -> Finding:
        return Finding(self.name, Status.BAD, found, self.why, advice, detail)

"""What an eviction is asked for, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from kvlayer.errors import BackendError
from kvlayer.identity.keys import ObjectKey

__all__ = ["Eviction", "Victim"]


class Victim(NamedTuple):
    """An object chosen to go, unless its file says it was used after ``used_ns``."""

    key: ObjectKey
    nbytes: int
    used_ns: int
    entry: int
    """The ledger's number of it when it was chosen: a file written since has another."""
    before: tuple[int, ...] = ()
    """The same of what comes right before it in a prompt: if it stays, those stay."""


@dataclass(slots=True)
class Eviction:
    """What became of victims. A thread fills it, so that a cancelled wait loses nothing."""

    gone: list[Victim] = field(default_factory=list[Victim])
    lost: list[Victim] = field(default_factory=list[Victim])
    """Somebody else had deleted them."""
    spared: list[tuple[Victim, int]] = field(default_factory=list[tuple[Victim, int]])
    """Another process used them, or what follows them, at that time (ns)."""
    failed: list[Victim] = field(default_factory=list[Victim])
    """They, or what follows them, could not be removed."""
    error: BackendError | None = None
    freed_nbytes: int = 0
    """Bytes of those that are gone or lost."""
    _kept: dict[int, int] = field(default_factory=dict[int, int])
    """What comes before victims that stay: when those were used, -1: they could not be removed."""

    def go(self, victim: Victim) -> None:
        """It was removed."""
        self.gone.append(victim)
        self.freed_nbytes += victim.nbytes

    def lose(self, victim: Victim) -> None:
        """It was not there."""
        self.lost.append(victim)
        self.freed_nbytes += victim.nbytes

    def spare(self, victim: Victim, used_ns: int) -> None:
        """It was used at that time (ns)."""
        self.spared.append((victim, used_ns))
        self._kept.update(dict.fromkeys(victim.before, used_ns))

    def fail(self, victim: Victim) -> None:
        """It could not be removed."""
        self.failed.append(victim)
        self._kept.update(dict.fromkeys(victim.before, -1))

    def keeps(self, victim: Victim) -> bool:
        """Whether it stays, because what follows it did; that is noted."""
        used_ns = self._kept.get(victim.entry)
        if used_ns is None:
            return False
        if used_ns < 0:
            self.fail(victim)
        else:
            self.spare(victim, used_ns)
        return True

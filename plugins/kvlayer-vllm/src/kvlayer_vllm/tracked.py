"""One request as the scheduler's half sees it, until nothing reads or writes its blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvlayer_vllm.engine import Request
from kvlayer_vllm.moves import Load, Save
from kvlayer_vllm.search import Search

__all__ = ["Tracked"]


@dataclass(slots=True, eq=False)
class Tracked:
    """One request, from its arrival until nothing reads or writes its blocks any more."""

    request: Request
    search: Search | None
    """Looks for its prefix; None where no KV may be shared with it."""
    found: int = 0
    """Tokens of it in host memory, as vLLM was told."""
    load: Load | None = None
    is_doubtful: bool = False
    """What vLLM counts as computed may not be: a load that concerns it failed, or is under way."""
    saved: int = 0
    """Tokens that need not be stored: they were loaded, or are on their way."""
    has_prompt: bool = False
    """The prompt's tail is stored, too."""
    saves: list[Save] = field(default_factory=list[Save])

    def running_saves(self) -> list[Save]:
        self.saves = [save for save in self.saves if not save.is_over]
        return self.saves

    @property
    def computed(self) -> int:
        """Tokens whose KV vLLM takes for right: no step that is still under way."""
        request = self.request
        return int(request.num_computed_tokens - request.num_in_flight_tokens)

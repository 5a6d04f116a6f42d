"""One request as the scheduler's half sees it, until it is over."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from kvlayer_vllm.engine import Request
from kvlayer_vllm.moves import Load
from kvlayer_vllm.search import Search
from kvlayer_vllm.token_ids import TokenIds
from kvlayer_vllm.wishes import Wishes

__all__ = ["Tracked"]

_log = logging.getLogger("vllm.kvlayer")  # below vLLM's, so that its users see it


@dataclass(slots=True, eq=False)
class Tracked:
    """One request, from its arrival until vLLM says that it is over."""

    request: Request
    ids: TokenIds
    search: Search | None
    """Looks for its prefix; None where no KV may be shared with it."""
    wishes: Wishes = field(default_factory=Wishes)
    reach: int | None = None
    """Its prefix is looked for up to this token; None: all of it."""
    local: int = 0
    """Tokens that vLLM had itself when it asked what more there is."""
    found: int = 0
    """Tokens of it in host memory, as vLLM was told."""
    load: Load | None = None
    has_failed: bool = False
    """A load of it has failed. It is computed: asking again could go on for ever."""
    written: int = 0
    """Tokens that lie in its blocks for certain: up to where its own steps, those that were heard
    of, have computed it."""
    placement: int = 0
    """How often it has lost its blocks: what was computed into others counts no more."""
    is_awaited: bool = False
    """vLLM holds its blocks until it hears that the load has ended, and lets go of them then."""
    saved: int = 0
    """Tokens that need not be stored: they were loaded, or are on their way."""
    has_prompt: bool = False
    """The prompt's tail is stored, too."""
    has_states: bool = False
    """Its model keeps recurrent states: a prefix ends where there is one, and nowhere else."""
    states: dict[int, dict[int, int]] = field(default_factory=dict[int, dict[int, int]])
    """Those of it that no store has taken yet: by the token they follow, the block in each of
    vLLM's groups. They are held: ``kept_states``."""
    is_cut: bool = False
    """The last store of it was cut short, since too many blocks were held. A later one goes on."""

    @property
    def computed(self) -> int:
        """Tokens whose KV is written and right: of no step that is still under way.

        vLLM counts fewer than are written where it does not accept drafts, or where a load failed.
        It may count drafts that it accepted beyond the token at which the answer stops.
        """
        request = self.request
        known = request.num_computed_tokens - request.num_in_flight_tokens
        return int(min(known, self.written, request.num_tokens))

    @property
    def storable(self) -> int:
        """Tokens that may be stored by now."""
        most = self.wishes.most_stored
        return self.computed if most is None else min(self.computed, most)

    def wanted(self) -> int:
        """How many tokens from its start it may be given.

        One is always left to compute. Rows may be given for it all the same, a state may not.
        """
        count = int(self.request.num_tokens) - self.has_states
        return count if self.reach is None else min(count, self.reach)

    def looks_from(self, local: int) -> None:
        """vLLM has so many tokens itself; what it asks for beyond may be bounded."""
        if self.wishes.most_loaded is None:
            return
        reach = local + self.wishes.most_loaded
        if reach != self.reach and self.search is not None:
            self.search.release()
        self.reach = reach

    def exclude(self, why: str) -> None:
        """Nothing is loaded for it, nor stored of it: no name would be its own."""
        _log.debug("request %s is computed and not stored: %s", self.request.request_id, why)
        if self.search is not None:
            self.search.release()
            self.search = None

    def start_over(self) -> None:
        """Its blocks are gone. What is being stored of them is held and goes on."""
        self.saved = self.written = 0
        self.placement += 1
        self.has_prompt = False

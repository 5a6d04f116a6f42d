"""An engine of a model with attention, local attention in chunks, and two groups of states.

What a layer keeps of a token follows from all tokens up to it, so the row of that token says which
state is right after it.
"""

from __future__ import annotations

import torch
from clients import Client
from processes import BLOCK, CHUNK, TAIL, Process
from world import DIM, LONGEST, PAGE, PUBLIC, Prompt, World

from kvlayer._steps import finish
from kvlayer.api.hit import PrefixHit
from kvlayer.identity.keys import ObjectKey, ObjectName, Span
from kvlayer.layout import (
    NHD,
    STATE_BLOCKS,
    AttentionKind,
    GroupLayout,
    HitRule,
    KVGroup,
    KVLayout,
    KVView,
)
from kvlayer.results import Cause, RetrieveReport
from kvlayer.testing import invariants
from kvlayer.tier.planner.records import HostState

__all__ = ["LAYOUT", "HybridEngine", "Kept"]

LOCAL = 2 * CHUNK
"""Tokens of an attention chunk of the local layers."""
SIZES = (8, 24)
"""Numbers in a state, by state group."""
FIRST = 2
"""The first state group."""
_APART = 50_000.0
"""By how much what one group keeps differs from what the next one keeps."""

_MHA = AttentionKind.MHA
LAYOUT = KVLayout(
    (
        GroupLayout(KVGroup(_MHA, (0,), "float32", 1, DIM), NHD, BLOCK),
        GroupLayout(
            KVGroup(_MHA, (1,), "float32", 1, DIM, hit_rule=HitRule.CHUNKED, window_tokens=LOCAL),
            NHD,
            BLOCK,
        ),
        *(
            GroupLayout(
                KVGroup(AttentionKind.STATE, (FIRST + at,), "float32", state_nbytes=4 * size),
                STATE_BLOCKS,
                BLOCK,
            )
            for at, size in enumerate(SIZES)
        ),
    )
)


class Kept:
    """What all engines of a world have kept, and after which tokens they had a state."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ends: list[set[int]] = [set() for _ in SIZES]
        """By state group, the rows after which some engine had its state to store."""

        self.objects: dict[ObjectKey, bytes] = {}
        """What lies on the tier that all share."""

    def local(self, rows: torch.Tensor) -> torch.Tensor:
        return self.world.kv[:, rows] + _APART

    def state(self, at: int, row: int) -> torch.Tensor:
        return torch.arange(SIZES[at], dtype=torch.float32) + _APART * (FIRST + at) + 32 * row

    def ends_of(self, prompt: Prompt, length: int) -> list[int]:
        """Where an engine has states: at few ends, so that little of a prompt leads to one."""
        chance, prompts = self.world.chance, self.world.prompts
        places = prompt.rows.tolist()
        step = chance.choice([TAIL, CHUNK])
        ends = {length // step * step}
        for other in prompts:
            theirs = other.rows.tolist()
            shared = sum(mine == its for mine, its in zip(places, theirs, strict=True))
            ends.add(shared // CHUNK * CHUNK)  # another prompt goes on from there
        named = [*range(CHUNK, length + 1, CHUNK), length // TAIL * TAIL]
        return [end for end in sorted(ends & {*named}) if end and chance.random() < 0.8]

    def note(self, spans: list[Span], prompt: Prompt) -> None:
        """What the objects of these spans begin with."""
        for span in spans:
            rows = prompt.rows[span.start : span.stop]
            planes = (self.world.kv[:, rows], self.local(rows))
            last = int(prompt.rows[span.stop - 1])
            states = [self.state(at, last) for at in range(len(SIZES))]
            for group, numbers in enumerate([*planes, *states]):
                self.world.kept[span.hash, group] = numbers.contiguous().numpy().tobytes()

    def evict(self, key: ObjectKey) -> None:
        """An object goes from all tiers, and all processes hear of it. What is leased stays."""
        self.objects.pop(ObjectName.raw(key), None)
        for process in self.world.processes:
            planner = process.cache.stack.planner
            finish(planner.expiring())
            gone = [found for found in planner.directory.objects() if found.key == key]
            planner.evict(gone, Cause.EVICTED, "")
            planner.vanished([key], 1, "evicted")
        self.world.counts["evicted"] += 1


class HybridEngine(Client):
    """Has slots only for what it needs, as an engine does whose blocks are few."""

    def __init__(self, process: Process, kept: Kept) -> None:
        super().__init__(process)
        self.kept = kept
        blocks = LONGEST // BLOCK
        sizes = [2 * LONGEST * DIM, 2 * LONGEST * DIM, *(blocks * size for size in SIZES)]
        self.memory = torch.zeros(sum(sizes))
        attention, local, *states = self.memory.split(sizes)
        self._caches = [
            *([part.view(2, blocks, BLOCK, 1, DIM)] for part in (attention, local)),
            *([part.view(blocks, -1)] for part in states),
        ]
        self._flat, self._local = (part.view(2, LONGEST, DIM) for part in (attention, local))
        self._states = [caches[0] for caches in self._caches[FIRST:]]
        self._lent: list[torch.Tensor] = []
        """By group, the slots of the last view."""
        self._before = self.memory.clone()
        self._hit = 0
        """Tokens of the last hit."""

    def learn(self, prompt: Prompt, length: int) -> list[bytes]:
        chain = self.cache.chain(prompt.tokens[:length], PUBLIC)
        spans = [*chain.spans(len(chain)), *chain.tails(len(chain))[:1]]
        self.kept.note(spans, prompt)
        return [span.hash for span in spans]

    def _places(self, length: int, first: int, local_from: int, ends: list[list[int]]) -> KVView:
        """A view of tokens ``[first, length)``, with states after the tokens before ``ends``."""
        count = length - first
        local = self._slots[:count].clone()
        local[: max(local_from - first, 0)] = -1
        self._lent = [self._slots[:count], local]
        for some in ends:
            slots = torch.full((count,), -1)
            blocks = self.world.chance.sample(range(LONGEST // BLOCK), len(some))
            for end, block in zip(some, blocks, strict=True):
                slots[end - 1 - first] = block * BLOCK + (end - 1) % BLOCK
            self._lent.append(slots)
        return KVView(self._caches, self._lent)

    def compute(self, prompt: Prompt, length: int, first: int) -> KVView:
        chance, kept = self.world.chance, self.kept
        ends = [[end for end in kept.ends_of(prompt, length) if end > first]] * len(SIZES)
        if chance.random() < 0.2:  # one group has lost its states
            ends[chance.randrange(len(SIZES))] = []
            self.world.counts["half a set"] += 1
        oldest = chance.choice([0, length // LOCAL * LOCAL])
        view = self._places(length, first, oldest, ends)
        rows = prompt.rows[first:length]
        self._flat[:, : length - first] = self.world.kv[:, rows]
        self._local[:, : length - first] = kept.local(rows)
        for at, some in enumerate(ends):
            for end in some:
                row = int(prompt.rows[end - 1])
                self._states[at][self._block(at, end - first)] = kept.state(at, row)
                kept.ends[at].add(row)
        return view

    def _block(self, at: int, tokens: int) -> int:
        return int(self._lent[FIRST + at][tokens - 1]) // BLOCK

    def make_room(self, prompt: Prompt, length: int, hit: PrefixHit) -> KVView:
        self._hit = hit.tokens
        if hit.tokens and self.world.chance.random() < 0.3:  # then the hit becomes shorter
            self.kept.evict(self._key(prompt, hit.spans[-1], FIRST))
        ends = [hit.tokens] if hit.tokens else []
        if ends and self.world.chance.random() < 0.5:  # and where a shorter one may end
            ends = [*range(TAIL, hit.tokens + 1, TAIL)]
        oldest = self.world.chance.choice([0, hit.tokens // LOCAL * LOCAL])
        view = self._places(length, 0, oldest, [ends] * len(SIZES))
        self._before = self.memory.clone()
        return view

    def check_served(self, prompt: Prompt, tokens: int) -> None:
        super().check_served(prompt, tokens)
        self._check_untouched()
        if not tokens:
            return
        row = int(prompt.rows[tokens - 1])
        for at, states in enumerate(self._states):
            what = f"a hit ends at token {tokens}, and in state group {FIRST + at}"
            if row not in self.kept.ends[at]:
                raise invariants.Broken(f"{what} no state was kept there")
            if int(self._lent[FIRST + at][tokens - 1]) < 0:
                raise invariants.Broken(f"{what} the view has no place for its state")
            if not torch.equal(states[self._block(at, tokens)], self.kept.state(at, row)):
                raise invariants.Broken(f"{what} the state is another one")
        first = tokens // LOCAL * LOCAL
        right = self.kept.local(prompt.rows[first:tokens])
        if not torch.equal(self._local[:, first:tokens], right):
            raise invariants.Broken(f"wrong local attention among tokens {first}..{tokens}")

    def _check_untouched(self) -> None:
        """What had no slot in the view is as it was."""
        now, then = self.memory.clone(), self._before.clone()
        sizes = [part.numel() for caches in self._caches for part in caches]
        for parts in (now.split(sizes), then.split(sizes)):
            for group, (part, slots) in enumerate(zip(parts, self._lent, strict=True)):
                held = slots[slots >= 0]
                if group < FIRST:
                    part.view(2, LONGEST, DIM)[:, held] = 0
                else:
                    part.view(LONGEST // BLOCK, -1)[held // BLOCK] = 0
        if not torch.equal(now, then):
            raise invariants.Broken("a load wrote where the view has no slot")

    async def load(
        self,
        prompt: Prompt,
        length: int = LONGEST,
        *,
        deadline: float | None = None,
        pause: float = 0.0,
    ) -> RetrieveReport:
        report = await super().load(prompt, length, deadline=deadline, pause=pause)
        no_place = any("no slots" in failure.detail for failure in report.failed)
        self.world.counts["no place"] += no_place
        self.world.counts["shorter"] += 0 < report.tokens < self._hit
        self.world.counts["at a state"] += report.tokens > 0
        return report

    def _key(self, prompt: Prompt, span: Span, group: int) -> ObjectKey:
        part = [*self.cache.stack.planner.directory.needs][group]
        zone = self.cache.chain(prompt.tokens, PUBLIC).zone(span)
        return ObjectKey.of(self.cache.namespace.digest, zone, span.hash, span.tokens, part)

    def longest(self, prompt: Prompt) -> int:
        """By brute force, the end of the longest hit that all that is there can make.

        A tail stands in the place of the first chunk that nobody is thought to have.
        """
        chain = self.cache.chain(prompt.tokens, PUBLIC)
        planner = self.cache.stack.planner
        thought = {o.key: o.host is HostState.READY for o in planner.directory.objects()}

        def is_there(span: Span, group: int) -> bool:
            key = self._key(prompt, span, group)
            right = self.world.bytes_of(key)
            stored = self.kept.objects.get(ObjectName.raw(key), b"")
            is_below = right is not None and stored[PAGE : PAGE + len(right)] == right
            return is_below or thought.get(key, False)

        def is_hit(path: list[Span]) -> bool:
            stop = path[-1].stop
            local = [span for span in path if span.stop > stop // LOCAL * LOCAL]
            return (
                all(is_there(span, 0) for span in path)
                and all(is_there(span, 1) for span in local)
                and all(is_there(path[-1], FIRST + at) for at in range(len(SIZES)))
            )

        spans = [*chain.spans(len(chain))]
        missing = (i for i, span in enumerate(spans) if self._key(prompt, span, 0) not in thought)
        lead = next((i for i in missing if not is_there(spans[i], 0)), len(spans))
        paths = [spans[:count] for count in range(1, lead + 1)]
        paths += [[*spans[:lead], tail] for tail in chain.tails(lead)]
        return max((path[-1].stop for path in paths if is_hit(path)), default=0)

"""The world a scenario plays in: prompts whose KV is known, and what is right about their objects.

A :class:`World` is one seed's; :func:`play` plays it. In it there are processes (``processes.py``)
and engines (``clients.py``). The invariants are in ``kvlayer.testing.invariants``.
"""

from __future__ import annotations

import asyncio
import functools
import random
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from kvlayer import Cache
from kvlayer._version import version
from kvlayer.api import assembly
from kvlayer.config import registry
from kvlayer.identity.keys import ObjectKey, Scope
from kvlayer.testing import invariants
from kvlayer.testing.faults import Injected, tally
from kvlayer.testing.sim import run

if TYPE_CHECKING:
    from processes import Process

LONGEST = 40  # tokens
PAGE = 4096  # slab bytes of a chunk
DIM = 4
PUBLIC = Scope()


@dataclass(frozen=True)
class Prompt:
    """``LONGEST`` tokens, and which rows of the world's KV they have."""

    tokens: array[int]
    rows: torch.Tensor


class World:
    """All of one seed."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.directory = directory / str(seed)
        self.log: list[Injected] = []
        self.counts: Counter[str] = Counter()
        self.right: dict[bytes, bytes] = {}
        """What the objects of a chunk begin with, by its hash."""
        self.of: dict[tuple[str, bytes], bytes] = {}
        """The same in namespaces where it is something else, by namespace and hash."""
        self.kept: dict[tuple[bytes, int], bytes] = {}
        """The same of a model of several KV groups, by hash and group."""
        self.processes: list[Process] = []
        self.prompts: list[Prompt] = []
        rows: dict[bytes, int] = {}
        stem = [self.chance.randrange(50_000) for _ in range(LONGEST)]
        for _ in range(6):
            shared = self.chance.choice([0, 8, 16, 20, 32])
            own = [self.chance.randrange(50_000) for _ in range(LONGEST - shared)]
            tokens = array("i", stem[:shared] + own)
            packed = tokens.tobytes()
            places = [rows.setdefault(packed[: 4 * at + 4], len(rows)) for at in range(LONGEST)]
            self.prompts.append(Prompt(tokens, torch.tensor(places)))
        count = len(rows)
        self.kv = torch.arange(1, 2 * count * DIM + 1, dtype=torch.float32).view(2, count, DIM)

    def pick(self) -> tuple[Prompt, int]:
        """A prompt, and how much of it is asked for."""
        length = self.chance.choice([LONGEST, self.chance.randrange(1, LONGEST + 1)])
        return self.chance.choice(self.prompts), length

    def learn(self, cache: Cache, prompt: Prompt, length: int) -> list[bytes]:
        """Note what the objects of a prompt are; the hashes of its spans."""
        chain = cache.chain(prompt.tokens[:length], PUBLIC)
        spans = [*chain.spans(len(chain)), *chain.tails(len(chain))[:1]]
        k, v = (plane[prompt.rows].numpy().tobytes() for plane in self.kv)
        row = 4 * DIM
        for span in spans:
            at, to = span.start * row, span.stop * row
            self.right[span.hash] = k[at:to] + v[at:to]
        return [span.hash for span in spans]

    def bytes_of(self, key: ObjectKey) -> bytes | None:
        if self.kept:
            return self.kept.get((key.end_hash, key.part.group))
        return self.of.get((key.namespace, key.end_hash), self.right.get(key.end_hash))

    def lies_in_directory(self, chunk_hash: bytes) -> bool:
        """Whether there is a file of this chunk below the directory, whoever wrote it."""
        text = chunk_hash.hex()
        return any((self.directory / "v2").glob(f"*/{text[:2]}/{text}-*"))

    def check_stored(self, objects: dict[ObjectKey, bytes]) -> None:
        """What lies on a tier below is right, too."""
        for key, stored in objects.items():
            expected = self.bytes_of(key)
            if expected is not None and stored[PAGE : PAGE + len(expected)] != expected:
                raise invariants.Broken(f"wrong bytes of {key} were written down")


_entry_points = functools.cache(registry.entry_points)
_version = functools.cache(version)
Scenario = Callable[[World], Coroutine[Any, Any, None]]


def simulate(main: Coroutine[Any, Any, None], seed: int, trace: list[str] | None = None) -> None:
    """Run ``main`` under the simulator."""
    # Metadata is read once for all seeds: it would be half of what they cost.
    with (
        mock.patch.object(registry, "entry_points", _entry_points),
        mock.patch.object(assembly, "version", _version),
    ):
        run(main, seed=seed, trace=trace)


def play(scenario: Scenario, seed: int, directory: Path, trace: list[str] | None = None) -> World:
    """Play one seed of a scenario. Raises what its invariants raise."""
    world = World(seed, directory)

    async def whole() -> None:
        try:
            await scenario(world)
        finally:
            task = asyncio.current_task()
            left = [each for each in asyncio.all_tasks() if each is not task]
        if left:
            raise invariants.Broken(f"tasks are left: {left}")

    try:
        simulate(whole(), seed, trace)
    except BaseException as exc:
        exc.add_note(f"injected: {tally(world.log)}")
        raise
    finally:
        shutil.rmtree(world.directory, ignore_errors=True)
    return world

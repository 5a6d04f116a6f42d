"""What one planner is owed of a directory that another one takes from: no more, and no less."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest
from clients import Client
from processes import Below, opened
from settling import settle
from two_planners import Watched
from world import LONGEST, Prompt, World, play

from kvlayer.abc.backend import (
    Backend,
    Damaged,
    DeleteResult,
)
from kvlayer.testing.faults import Wrapper
from kvlayer.testing.invariants import Broken
from kvlayer_backends.file.backend import FileBackend
from kvlayer_backends.file.options import FileOptions

Pair = tuple[Client, Client, Prompt]


class Reluctant(Wrapper):
    """Takes a damaged object out of sight when it was ``asked``, and is ``told`` to."""

    def __init__(self, inner: Backend, chance: Random) -> None:
        super().__init__(inner, chance)
        self.asked, self.told = asyncio.Event(), asyncio.Event()

    async def quarantine(self, items: Sequence[Damaged], /) -> list[DeleteResult]:
        self.asked.set()
        await self.told.wait()
        return await super().quarantine(items)


def files(world: World) -> FileBackend:
    return FileBackend(str(world.directory), FileOptions(direct="off", interval=20.0))


@asynccontextmanager
async def pair(world: World, first: Backend | None = None) -> AsyncGenerator[Pair]:
    """Two processes of one directory, and a prompt that the second has stored there."""
    through = {"write": "through"}
    async with (
        opened(world, Below(first or files(world), through), name="one") as one,
        opened(world, Below(files(world), through), name="other") as other,
    ):
        prompt = world.prompts[0]
        await Client(other).store(prompt)
        yield Client(one), Client(other), prompt
        await settle(other)


def files_of(world: World, prompt: Prompt, cache: Client) -> list[Path]:
    hashes = world.learn(cache.cache, prompt, LONGEST)
    return [path for each in hashes for path in world.directory.glob(f"v2/*/??/{each.hex()}-*")]


def test_a_copy_that_another_process_took_away_is_not_missed_below(arena: Path) -> None:
    """It was in host memory when it was stored again, so nobody asked the directory."""

    async def scenario(world: World) -> None:
        async with pair(world) as (one, other, prompt):
            await one.drop(prompt, tier=None)
            assert not files_of(world, prompt, one)
            report = await other.store(prompt)
            assert (report.stored, report.dropped) == (0, 0)
            assert other.process.committed()
            await other.drop(prompt, tier="cpu")
            assert (await other.load(prompt)).tokens == 0

    play(scenario, 0, arena)


def test_a_copy_that_is_there_again_is_missed_when_nobody_takes_it(arena: Path) -> None:
    async def scenario(world: World) -> None:
        async with pair(world) as (one, other, prompt):
            await one.drop(prompt, tier=None)
            await one.store(prompt)
            await other.store(prompt)
            await other.drop(prompt, tier="cpu")
            for path in files_of(world, prompt, one):
                path.unlink()
            assert (await other.load(prompt)).tokens == 0

    with pytest.raises(Broken, match="nothing took it away"):
        play(scenario, 0, arena)


def test_a_copy_that_nobody_took_away_is_missed_below(arena: Path) -> None:
    async def scenario(world: World) -> None:
        async with pair(world) as (one, other, prompt):
            for path in files_of(world, prompt, one):
                path.unlink()
            await other.drop(prompt, tier="cpu")
            assert (await other.load(prompt)).tokens == 0

    with pytest.raises(Broken, match="nothing took it away"):
        play(scenario, 0, arena)


def test_a_copy_is_another_process_s_to_take_until_its_quarantine_has_ended(arena: Path) -> None:
    """The event says what was found, before anything is moved."""

    async def scenario(world: World) -> None:
        slow = Reluctant(files(world), world.chance)
        watched = Watched(slow, world.chance)
        watched.world = world
        async with pair(world, watched) as (one, other, prompt):
            for path in files_of(world, prompt, one):
                path.write_bytes(bytes(path.stat().st_size))
            loading = asyncio.ensure_future(one.load(prompt))
            await slow.asked.wait()
            await other.store(prompt)
            await other.drop(prompt, tier="cpu")
            slow.told.set()
            await loading
            assert (await other.load(prompt)).tokens < LONGEST

    play(scenario, 0, arena)

"""``prefix-lru`` on disk: what stays never lacks what comes before it."""

from __future__ import annotations

import random
from hashlib import sha256
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest

from kvlayer.abc.backend import Write
from kvlayer.abc.rows import Rows
from kvlayer.errors import NoRoomError
from kvlayer.eviction.lru import LRU, PrefixLRU
from kvlayer.keys import ObjectKey, ObjectName, Part
from kvlayer.retention import Retention
from kvlayer_backends.file import FileBackend, FileOptions
from kvlayer_backends.file.depths import Depths

PAGE = 4096
PART = Part(0, (0, 4), (0, 8))
CHUNK = 16


def key(prompt: int, index: int) -> ObjectKey:
    return ObjectName.raw(
        ObjectKey.of("ab" * 32, "0", sha256(b"%d.%d" % (prompt, index)).digest(), CHUNK, PART)
    )


def write(prompt: int, index: int, retention: Retention | None = None) -> Write:
    memory = memoryview(mmap(-1, PAGE))
    more = {} if retention is None else {"retention": retention}
    return Write(key(prompt, index), (memory,), index * CHUNK, CHUNK, **more)


def backend(root: Path, pages: int, **more: Any) -> FileBackend:
    options = FileOptions(interval=3600.0, capacity=pages * PAGE)
    return FileBackend(str(root), options, policy=more.get("policy", PrefixLRU))


async def held(files: FileBackend, prompt: int, count: int) -> list[bool]:
    return [n is not None for n in await files.contains([key(prompt, i) for i in range(count)])]


def usable(there: list[bool]) -> bool:
    """Whether everything that is there follows what is there."""
    return there == sorted(there, reverse=True)


@pytest.mark.asyncio
@pytest.mark.parametrize("order", ["root first", "end first", "mixed"])
@pytest.mark.parametrize("batch", [1, 3])
async def test_a_prompt_larger_than_the_tier_keeps_its_beginning(
    tmp_path: Path, order: str, batch: int
) -> None:
    async with backend(tmp_path, 6) as files:
        indices = list(range(20))
        if order == "end first":
            indices.reverse()
        elif order == "mixed":
            random.Random(1).shuffle(indices)
        for at in range(0, 20, batch):
            answers = await files.put([write(0, i) for i in indices[at : at + batch]])
            assert all(answer is None or isinstance(answer, NoRoomError) for answer in answers)
            there = await held(files, 0, 20)
            assert order != "root first" or usable(there)
        assert there == [True] * 6 + [False] * 14


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(4))
async def test_whatever_is_written_and_used_at_once_nothing_dead_is_kept(
    tmp_path: Path, seed: int
) -> None:
    """Several prompts, written turn by turn, used in between, in a tier that is too small."""
    chance = random.Random(seed)
    async with backend(tmp_path, 12) as files:
        done = dict.fromkeys(range(4), 0)
        for _ in range(60):
            prompt = chance.randrange(4)
            if chance.random() < 0.3:
                await files.touch([key(prompt, i) for i in reversed(range(done[prompt]))])
                continue
            there = await held(files, prompt, 15)
            at = sum(there)  # what an engine stores next: what is not there yet
            if at < 15:
                (answer,) = await files.put([write(prompt, at)])
                assert answer is None or isinstance(answer, NoRoomError)
                done[prompt] = at + (answer is None)
            for each in range(4):
                assert usable(await held(files, each, 15))


@pytest.mark.asyncio
async def test_the_order_is_kept_over_a_restart(tmp_path: Path) -> None:
    async with backend(tmp_path, 40) as files:
        for prompt in range(2):
            for index in range(10):
                await files.put([write(prompt, index)])
    async with backend(tmp_path, 9) as files:
        await files.recovered()
        assert files.janitor is not None
        await files.janitor.pass_()
        kept = [await held(files, prompt, 10) for prompt in range(2)]
        assert sum(map(sum, kept)) == 9
        assert all(map(usable, kept)), kept


@pytest.mark.asyncio
async def test_older_prompts_go_before_what_is_being_written(tmp_path: Path) -> None:
    now = 0.0
    async with backend(tmp_path, 12) as files:
        assert files.janitor is not None and files.janitor.ledger is not None
        files.janitor.ledger._depths._clock = lambda: now
        await files.put([write(0, index) for index in range(10)])
        now = 100.0
        for index in range(8):
            await files.put([write(1, index)])
            assert usable(await held(files, 0, 10)) and usable(await held(files, 1, 10))
        assert await held(files, 1, 8) == [True] * 8
        assert sum(await held(files, 0, 10)) == 4


@pytest.mark.asyncio
async def test_other_policies_choose_by_themselves(tmp_path: Path) -> None:
    async with backend(tmp_path, 4, policy=LRU) as files:
        await files.recovered()
        for index in range(5):
            await files.put([write(0, index)])
        assert await held(files, 0, 5) == [False, True, True, True, True]
    async with backend(tmp_path, 2, policy=LRU) as files:
        await files.recovered()
        assert files.janitor is not None
        await files.janitor.pass_()
        assert await held(files, 0, 5) == [False, False, False, True, True]


@pytest.mark.asyncio
async def test_depth_decides_among_equals_only(tmp_path: Path) -> None:
    async with backend(tmp_path, 4) as files:
        kept = Retention(priority=1)
        await files.put([write(0, index, kept) for index in range(3)])
        await files.put([write(1, 0)])
        await files.put([write(2, 0)])
        assert await held(files, 0, 3) == [True] * 3
        assert [await held(files, n, 1) for n in (1, 2)] == [[False], [True]]


def test_what_is_remembered_of_depths_is_bounded() -> None:
    now = 0.0
    rows = Rows()
    depths = Depths(rows, lambda: now)
    for number in range(3000):
        now += 10.0
        row = rows.take(number, 1, first_token=number % 7 * CHUNK, tokens=CHUNK)
        depths.add((row,))
        depths.add((row,))
        if number >= 10:
            gone = (row + 1) % 11
            depths.discard(gone)
            rows.give_back(gone)
    assert sum(map(len, depths._heaps.values())) < 300
    assert len(depths._heaps) == len(depths._sizes) < 30

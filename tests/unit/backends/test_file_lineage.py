"""``prefix-lru`` on disk: the least recently used end goes, and what stays lacks nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlayer.abc.backend import Write
from kvlayer.codec.frame import pack_header
from kvlayer.errors import NoRoomError
from kvlayer.eviction.lru import LRU, PrefixLRU
from kvlayer.identity.keys import ObjectKey, ObjectName, Part
from kvlayer.layout import AttentionKind, KVGroup
from kvlayer.memory.key_table import KeyTable
from kvlayer.payload import Payload
from kvlayer.retention import ORDINARY, Retention
from kvlayer_backends.file import FileBackend, FileOptions, disk
from kvlayer_backends.file.ledger import Ledger
from kvlayer_backends.file.lineage import Lineage
from kvlayer_backends.file.victims import Eviction

PAGE = 4096
PART = Part(0, (0, 4), (0, 8))
OTHER = Part(0, (4, 8), (0, 8))
CHUNK = 16

Node = tuple[int, ...]
"""A chunk of a prompt, by the turns that lead to it: what it follows is all of it but the last."""


def hashed(node: Node) -> bytes:
    return sha256(repr(node).encode()).digest()


def key(node: Node, part: Part = PART) -> ObjectKey:
    return ObjectName.raw(ObjectKey.of("ab" * 32, "0", hashed(node), CHUNK, part))


def write(node: Node, part: Part = PART, retention: Retention = ORDINARY, pages: int = 1) -> Write:
    parent = hashed(node[:-1]) if len(node) > 1 else b""
    memory = memoryview(mmap(-1, pages * PAGE))
    return Write(key(node, part), (memory,), (len(node) - 1) * CHUNK, CHUNK, retention, parent)


def backend(root: Path, pages: int, **more: Any) -> FileBackend:
    options = FileOptions(interval=3600.0, capacity=pages * PAGE)
    return FileBackend(str(root), options, policy=more.get("policy", PrefixLRU))


def path(node: Node) -> list[Node]:
    """What leads to a node, and the node: root first."""
    return [node[:n] for n in range(1, len(node) + 1)]


def line(prompt: int, count: int) -> list[Node]:
    """A prompt of so many chunks, root first."""
    return path((prompt,) + (0,) * (count - 1)) if count else []


async def held(files: FileBackend, nodes: Sequence[Node]) -> list[bool]:
    return [n is not None for n in await files.contains([*map(key, nodes)])]


def is_whole(nodes: set[Node]) -> bool:
    """Whether nothing lacks what comes before it."""
    return all(len(node) == 1 or node[:-1] in nodes for node in nodes)


class Model:
    """Exact ``prefix-lru``: whoever uses an object uses all that leads to it, the root last."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used: dict[Node, int] = {}
        self.now = 0

    def use(self, node: Node) -> None:
        for each in reversed(path(node)):
            self.now += 1
            self.used[each] = self.now

    def store(self, node: Node) -> bool:
        if node not in self.used:
            if len(node) > 1 and node[:-1] not in self.used:
                return False
            if len(self.used) == self.capacity:
                spared = path(node)
                others = [n for n in self.used if n not in spared]
                victim = min(others, key=self.used.__getitem__, default=None)
                if victim is None:
                    return False
                del self.used[victim]
        self.use(node)
        return True


Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["grow", "grow", "grow", "branch", "begin", "use", "restart"]),
        st.integers(0, 10**6),
        st.integers(1, 4),
    ),
    max_size=60,
)


@given(steps=STEPS, capacity=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_what_is_kept_is_what_an_exact_prefix_lru_keeps(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step], capacity: int
) -> None:
    asyncio.run(_against_the_model(tmp_path_factory.mktemp("kv"), steps, capacity))


async def _against_the_model(root: Path, steps: list[Step], capacity: int) -> None:
    model, known = Model(capacity), list[Node]()
    files = backend(root, capacity)
    await files.open()
    try:
        for what, number, count in steps:
            if what == "restart":
                await files.aclose()
                files = backend(root, capacity)
                await files.open()
                await files.recovered()
                continue
            there = sorted(model.used)
            if what == "begin" or not there:
                await _store(files, model, known, (number % 10**3,), count)
            elif what == "use":
                node = there[number % len(there)]
                await files.touch([*map(key, reversed(path(node)))])
                model.use(node)
            else:
                node = there[number % len(there)]
                if what == "grow":  # the end of some prompt
                    while (*node, 0) in model.used:
                        node += (0,)
                await _store(files, model, known, (*node, number % 3), count)
            there_now = await held(files, known)
            kept = {node for node, is_held in zip(known, there_now, strict=True) if is_held}
            assert kept == set(model.used), (what, number)
            assert is_whole(kept)
    finally:
        await files.aclose()


async def _store(
    files: FileBackend, model: Model, known: list[Node], node: Node, count: int
) -> None:
    """Write a node and more after it, one by one, whatever becomes of each."""
    for _ in range(count):
        (answer,) = await files.put([write(node)])
        assert answer is None or isinstance(answer, NoRoomError)
        assert (answer is None) == model.store(node), node
        known += [node] if node not in known else []
        node = (*node, 0)


@pytest.mark.asyncio
@pytest.mark.parametrize("order", ["root first", "end first"])
@pytest.mark.parametrize("batch", [1, 3, 20])
async def test_a_prompt_larger_than_the_tier_keeps_its_beginning(
    tmp_path: Path, order: str, batch: int
) -> None:
    nodes = line(0, 20)
    async with backend(tmp_path, 6) as files:
        todo, there = nodes if order == "root first" else nodes[::-1], list[bool]()
        for at in range(0, 20, batch):
            answers = await files.put([*map(write, todo[at : at + batch])])
            assert all(answer is None or isinstance(answer, NoRoomError) for answer in answers)
            there = await held(files, nodes)
            assert order != "root first" or there == sorted(there, reverse=True)
        if order == "root first" or batch < 20:
            assert there == [True] * 6 + [False] * 14
        assert sum(there) == 6


@pytest.mark.asyncio
async def test_a_small_directory_that_is_filled_at_once_takes_new_ends(tmp_path: Path) -> None:
    """Depth decides nothing: within a moment as after an hour the least recently used goes."""
    async with backend(tmp_path, 12) as files:
        await files.put([*map(write, line(0, 10))])
        for node in line(1, 8):
            assert await files.put([write(node)]) == [None]
        assert await held(files, line(1, 8)) == [True] * 8
        assert await held(files, line(0, 10)) == [True] * 4 + [False] * 6


@pytest.mark.asyncio
async def test_a_batch_makes_room_for_all_of_it(tmp_path: Path) -> None:
    async with backend(tmp_path, 16) as files:
        await files.put([*map(write, line(0, 16))])
        gone: list[int] = []
        files.on_evicted = lambda victims, _: gone.append(len(victims))
        assert await files.put([*map(write, line(1, 10))]) == [None] * 10
        assert sum(gone) == 10
        assert await held(files, line(0, 16)) == [True] * 6 + [False] * 10


@pytest.mark.asyncio
async def test_what_a_file_follows_is_learnt_from_whoever_wrote_it(tmp_path: Path) -> None:
    """Another process wrote it: its janitor knows what comes before what after a scan."""
    async with backend(tmp_path, 8) as files, backend(tmp_path, 8) as other:
        await files.recovered()
        assert files.is_janitor and not other.is_janitor
        for node in line(0, 5):
            await other.put([write(node)])
        assert files.janitor is not None
        await files.janitor.pass_()
        await files.put([*map(write, line(1, 6))])
        assert await held(files, line(0, 5)) == [True, True, False, False, False]


@pytest.mark.asyncio
async def test_what_no_attribute_says_is_learnt_when_it_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    async with backend(tmp_path, 8) as files:
        monkeypatch.setattr(os, "setxattr", refuse)
        assert await files.put([*map(write, line(0, 5))]) == [None] * 5
    async with backend(tmp_path, 8) as files:
        await files.recovered()
        for node in line(0, 5):
            await files.put([write(node)])
        await files.put([write((2,))])
        await files.put([write((3,)), write((4,))])  # one slot is free, the other is to be made
        await files.put([*map(write, line(0, 5)[::-1])])
        await files.put([write((5,)), write((6,)), write((7,)), write((8,))])
        there = await held(files, line(0, 5))
        assert there == sorted(there, reverse=True)


@pytest.mark.asyncio
async def test_other_policies_choose_by_themselves(tmp_path: Path) -> None:
    nodes = line(0, 5)
    async with backend(tmp_path, 4, policy=LRU) as files:
        await files.recovered()
        for node in nodes:
            await files.put([write(node)])
        assert await held(files, nodes) == [False, True, True, True, True]


@pytest.mark.asyncio
async def test_the_parts_of_a_chunk_go_each_with_its_own(tmp_path: Path) -> None:
    async with backend(tmp_path, 6) as files:
        for node in line(0, 3):
            await files.put([write(node), write(node, OTHER)])
        await files.put([write((1,)), write((1,), OTHER)])
        there = await files.contains([key(n, p) for n in line(0, 3) for p in (PART, OTHER)])
        assert there == [PAGE] * 4 + [None] * 2


@pytest.mark.asyncio
async def test_what_is_to_be_kept_outlives_what_follows_it(tmp_path: Path) -> None:
    """A beginning with priority stays when its ordinary end has gone, and others go first."""
    kept = Retention(priority=1)
    async with backend(tmp_path, 4) as files:
        await files.put([write((0,), retention=kept)])
        await files.put([write((1,), retention=kept)])
        await files.put([write((0, 0)), write((2,))])
        for number in range(3, 9):
            await files.put([write((number,))])
        assert await held(files, [(0,), (1,), (0, 0), (2,)]) == [True, True, False, False]


@pytest.mark.asyncio
async def test_what_another_process_uses_keeps_what_leads_to_it(tmp_path: Path) -> None:
    nodes = line(0, 4)
    async with backend(tmp_path, 6) as files, backend(tmp_path, 6) as other:
        await files.recovered()
        await files.put([*map(write, nodes)])
        await files.put([write((1,)), write((2,))])
        # It reads the end alone: only that file tells of it.
        stamp = os.stat(next(tmp_path.glob(f"v2/*/*/{hashed(nodes[-1]).hex()}*"))).st_mtime_ns
        await other.touch([key(nodes[-1])])
        changed = os.stat(next(tmp_path.glob(f"v2/*/*/{hashed(nodes[-1]).hex()}*"))).st_mtime_ns
        assert changed > stamp
        await files.put([write((3,)), write((4,))])
        assert await held(files, nodes) == [True] * 4
        assert await held(files, [(1,), (2,)]) == [False, False]


# -- the books alone ------------------------------------------------------------------------------


def ledger(nodes: Sequence[Node], capacity: int = 0) -> Ledger:
    made = Ledger(PrefixLRU, capacity)
    for number, node in enumerate(nodes):
        made.create(key(node), PAGE, number, write(node))
    return made


def taken(books: Ledger, pages: int) -> list[ObjectKey]:
    return [victim.key for victim in books.take(pages * PAGE, 1, 0.0)]


def test_a_whole_prompt_goes_in_one_slice_end_first() -> None:
    nodes = line(0, 12)
    books = ledger([*nodes, (1,)])
    assert taken(books, 12) == [*map(key, reversed(nodes))]


def test_what_stays_keeps_what_comes_before_it_in_the_same_slice() -> None:
    nodes = line(0, 4)
    books = ledger(nodes)
    victims = books.take(3 * PAGE, 1, 0.0)
    eviction = Eviction()
    assert not eviction.keeps(victims[0])
    eviction.fail(victims[0])
    assert [*map(eviction.keeps, victims[1:])] == [True, True]
    books.settle(victims, eviction)
    assert len(books) == 4
    assert taken(books, 4) == [*map(key, reversed(nodes))]


def test_what_a_write_follows_stays_until_it_has_ended() -> None:
    nodes = line(0, 3)
    books = ledger(nodes)
    books.expect([write((0, 0, 0, 0))])
    assert taken(books, 3) == []
    books.expect_no_more([write((0, 0, 0, 0))])
    assert taken(books, 3) == [*map(key, reversed(nodes))]


def test_passing_over_much_is_done_in_slices() -> None:
    wide: list[Node] = [(n,) for n in range(150)]
    books = ledger([*wide, *((n, 0) for n in range(150))])
    assert taken(books, 1) == [] and books.has_more
    assert taken(books, 1) == [key((0, 0))] and not books.has_more


def test_what_lost_its_last_follower_to_somebody_else_is_recent() -> None:
    books = ledger([(0,), (0, 0), (1,), (2,)])
    assert taken(books, 1) == [key((0, 0))]
    books.settle([], Eviction())
    books = ledger([(0,), (0, 0), (1,), (2,)])
    books.use([key((0, 0))], [100])
    assert taken(books, 1) == [key((1,))]  # its turn came, and it waits
    books.forget(key((0, 0)))
    assert taken(books, 1) == [key((2,))]
    assert taken(books, 1) == [key((0,))]


@given(st.integers(0, 2**32))
@settings(max_examples=40)
def test_followers_are_counted_whatever_comes_and_goes(seed: int) -> None:
    chance = random.Random(seed)
    keys = KeyTable()
    lineage = Lineage(keys)
    rows: dict[int, Node] = {}
    left: set[int] = set()
    expected: list[Node] = []
    nodes = [node for a in range(2) for b in range(2) for node in path((a, b, 0))]
    for _ in range(200):
        what = chance.randrange(6)
        node = chance.choice(nodes)
        known = {n: row for row, n in rows.items()}
        if what <= 1 and node not in known:
            row = next(n for n in range(99) if n not in rows)
            keys.add(key(node), row)
            lineage.add(row, write(node).parent)
            rows[row] = node
        elif what == 2 and node in known:
            lineage.discard(known[node])
            keys.pop(key(node))
            del rows[known[node]]
            left.discard(known[node])
        elif what == 3 and node in known:
            (lineage.come_back if known[node] in left else lineage.leave)(known[node])
            left ^= {known[node]}
        elif what == 4:
            lineage.expect(write(node))
            expected.append(node)
        elif expected:
            lineage.expect_no_more(write(expected.pop()))
        for row, node in rows.items():
            followers = [n for r, n in rows.items() if r not in left and n[:-1] == node]
            followers += [n for n in expected if n[:-1] == node]
            assert lineage.is_followed(row) == bool(followers)
            before = [n for n in rows.values() if n == node[:-1]]
            assert [rows[r] for r in lineage.before(row)] == before
    for row in [*rows]:
        lineage.discard(row)
        keys.pop(key(rows.pop(row)))
    for node in expected:
        lineage.expect_no_more(write(node))
    assert not lineage._awaited and not lineage._left


@pytest.mark.asyncio
@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EACCES, errno.ENOSYS, errno.EINVAL])
async def test_what_cannot_be_noted_costs_no_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "setxattr", refuses)
    async with backend(tmp_path, 8) as files:
        assert await files.put([write((1,)), write((1, 2))]) == [None, None]


def _without_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuses)
    monkeypatch.setattr(os, "getxattr", refuses)


def framed(node: Node) -> Write:
    """What a tier is given: an object that says itself what it follows."""
    plain = write(node)
    group = KVGroup(AttentionKind.MHA, tuple(range(4)), "float16", 8, 8)
    payload = Payload.of(group, PART, CHUNK)
    header = memoryview(bytearray(PAGE))
    segments = payload.segments()
    pack_header(
        header,
        [0] * len(segments),
        key=ObjectKey(plain.key.rpartition("/")[0]),
        payload=payload,
        first_token=plain.first_token,
        created=0.0,
        build="test",
        parent=plain.parent,
    )
    return replace(plain, regions=(header, memoryview(bytes(payload.nbytes))))


@pytest.mark.asyncio
async def test_without_attributes_a_file_itself_says_what_it_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a restarted process would give up first what was written first: the root."""
    _without_attributes(monkeypatch)
    pages = framed((0,)).nbytes // PAGE
    nodes, others = line(0, 6), line(1, 4)
    async with backend(tmp_path, 8 * pages) as files:
        for node in nodes:
            assert await files.put([framed(node)]) == [None]
    async with backend(tmp_path, 8 * pages) as files:
        await files.recovered()
        for node in others:
            assert await files.put([framed(node)]) == [None]
        assert await held(files, nodes) == [True] * 4 + [False] * 2
        assert await held(files, others) == [True] * 4


@pytest.mark.asyncio
async def test_a_root_is_not_read_to_learn_that_it_follows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with backend(tmp_path, 8) as files:
        assert await files.put([*map(write, line(0, 3))]) == [None] * 3
    read: list[str] = []
    note = disk.read_note
    monkeypatch.setattr(disk, "read_note", lambda path, n: read.append(path) or note(path, n))
    async with backend(tmp_path, 8) as files:
        await files.recovered()
        assert files.objects == 3
    kept = os.listxattr(next(tmp_path.glob(f"v2/*/*/{hashed((0,)).hex()}*")))
    assert bool(kept) is not any("/v2/" + "ab" * 32 in path for path in read)


def _forge(root: Path, node: Node, parent: Node) -> None:
    (path,) = root.glob(f"v2/*/*/{hashed(node).hex()}*")
    try:
        os.setxattr(path, "user.kvlayer.parent", hashed(parent))
    except OSError as exc:
        pytest.skip(f"the file system keeps no attributes: {exc}")


@pytest.mark.asyncio
async def test_objects_that_are_said_to_follow_each_other_go_like_others(tmp_path: Path) -> None:
    ring: list[Node] = [(0,), (1,), (2,)]
    async with backend(tmp_path, 3) as files:
        await files.put([*map(write, ring)])
    for node, parent in zip(ring, [*ring[1:], ring[0]], strict=True):
        _forge(tmp_path, node, parent)
    async with backend(tmp_path, 3) as files:
        await files.recovered()
        for node in line(3, 3):
            assert await files.put([write(node)]) == [None]
        assert await held(files, ring) == [False] * 3
        assert await held(files, line(3, 3)) == [True] * 3


@given(st.integers(0, 2**32), st.integers(1, 40))
@settings(max_examples=60)
def test_whatever_is_said_to_follow_what_everything_can_go(seed: int, count: int) -> None:
    chance = random.Random(seed)
    books = Ledger(PrefixLRU, 0)
    for number in range(count):
        parent = hashed((chance.randrange(count),)) if chance.random() < 0.9 else b""
        for part in (PART, OTHER)[: chance.randrange(1, 3)]:
            if chance.random() < 0.3:  # each of its parts says something else
                parent = hashed((chance.randrange(count),))
            made = replace(write((number,), part), parent=parent)
            books.create(made.key, PAGE, number, made)
    left = len(books)
    for _ in range(2 * count * count + 2):
        victims = books.take(PAGE, 1, 0.0)
        if victims:
            gone = Eviction()
            for victim in victims:
                gone.go(victim)
            books.settle(victims, gone)
            left -= len(victims)
        elif not books.has_more:
            break
    assert left == len(books) == 0


def test_rings_are_looked_for_in_slices_and_only_when_more_was_learnt() -> None:
    long = [(0,) * n for n in range(1, 1500)]
    books = Ledger(PrefixLRU, 0)
    for number, node in enumerate(long):
        made = write(node)
        if len(node) == 1:
            made = replace(made, parent=hashed(long[-1]))
        books.create(made.key, PAGE, number, made)
    calls = 0
    while not (victims := books.take(PAGE, 1, 0.0)):
        assert books.has_more
        calls += 1
    assert calls >= 2 and len(victims) == 1
    books = ledger(line(0, 3))
    books.expect([write((0, 0, 0, 0))])
    looks: list[int] = []
    before = books._lineage.before
    books._lineage.before = lambda row: looks.append(row) or before(row)  # type: ignore[method-assign, func-returns-value]
    assert taken(books, 3) == [] and looks
    looks.clear()
    assert taken(books, 3) == [] and not looks

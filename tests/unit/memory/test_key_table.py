"""Keys as numbers: every key comes back as it was, and what is gone leaves nothing."""

from __future__ import annotations

import gc
import random
import tracemalloc
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvlayer.identity.keys import ObjectKey
from kvlayer.memory.key_table import KeyTable

HASH = sha256(b"x").hexdigest()
OTHER = sha256(b"y").hexdigest()
NAMESPACE = "ab" * 32


@pytest.mark.parametrize(
    "key",
    [
        f"{NAMESPACE}/0/{HASH}/g0.l0-4.h0-8.canonical",
        f"{NAMESPACE}/{'cd' * 16}/{HASH}-256/g0.l0-4.canonical",
        f"{NAMESPACE}/0/{HASH}-256/g0.l0-4.canonical/f2",
        f"{NAMESPACE}/0/{HASH.upper()}/g0.l0-4.canonical",
        f"{NAMESPACE}/0/{HASH[:62]} a/g0.l0-4.canonical",
        f"{NAMESPACE}/0/{HASH[:60]}/g0",
        f"{HASH}",
        "no key",
        "",
        "/",
        "//",
        f"//{HASH}",
    ],
)
def test_a_key_comes_back_as_it_was(key: str) -> None:
    table = KeyTable()
    table.add(key, 3)
    assert (table.row(key), table.key(3), [*table]) == (3, key, [key])
    assert key in table
    assert key + "x" not in table
    assert 3 not in table
    assert table.pop(key) == 3
    assert (table.row(key), table.pop(key), len(table)) == (None, None, 0)
    assert not (table._frames or table._frame_ids or table._uses)


def test_keys_that_differ_in_anything_are_different() -> None:
    keys = {
        f"{namespace}/{zone}/{digest}{tokens}/{part}"
        for namespace in (NAMESPACE, "cd" * 32)
        for zone in ("0", "ef" * 16)
        for digest in (HASH, OTHER)
        for tokens in ("", "-16", "-32")
        for part in ("g0.l0-4.canonical", "g1.l0-4.canonical")
    }
    table = KeyTable()
    for row, key in enumerate(sorted(keys)):
        table.add(key, row)
    assert {table.key(row) for row in range(len(keys))} == keys
    assert [table.row(key) for key in sorted(keys)] == [*range(len(keys))]


def test_a_zone_that_is_empty_is_forgotten() -> None:
    table = KeyTable()
    for n in range(1000):
        key = f"{NAMESPACE}/{n:032x}/{HASH}/g0.l0-4.canonical"
        table.add(key, 0)
        table.pop(key)
    assert not (table._frames or table._frame_ids or table._uses)


@given(st.text(max_size=80), st.text(max_size=80))
@settings(max_examples=300)
def test_any_text_is_a_key(first: str, second: str) -> None:
    table = KeyTable()
    table.add(first, 1)
    assert table.key(1) == first
    assert (second in table) is (first == second)


def test_a_key_costs_some_fifty_five_bytes_and_the_garbage_collector_nothing() -> None:
    count = 20_000
    keys = [
        ObjectKey.of(NAMESPACE, "0", sha256(b"%d" % n).digest(), 16, "g0.l0-4.canonical")
        for n in range(count)
    ]
    gc.collect()
    before = len(gc.get_objects())
    tracemalloc.start()
    table = KeyTable()
    for row, key in enumerate(keys):
        table.add(key, row)
    nbytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert nbytes < 70 * count
    assert len(gc.get_objects()) - before < 700  # its segments, however many keys


def test_keys_are_found_by_their_hash_alone() -> None:
    """Of one namespace, whatever zone, tokens, part and encoding say."""
    table = KeyTable()
    tails = ("-16/g0.l0-4", "-32/g0.l0-4", "-16/g0.l0-4/2.raw", "-16/g1.l0-4", "/x")
    keys = [
        f"{namespace}/{zone}/{digest}{tail}"
        for namespace in (NAMESPACE, "cd" * 32)
        for zone in ("0", "ef" * 16)
        for digest in (HASH, OTHER)
        for tail in tails
    ]
    for row, key in enumerate(keys):
        table.add(key, row)
    for row, key in enumerate(keys):
        same = [k for k in keys if k[:64] == key[:64] and HASH in k]
        found = table.ending(*table.place(f"{key[:64]}/0/{HASH}-8/g0.l0-4"))
        assert sorted(table.key(row) for row in found) == sorted(same)
        assert table.place(key) == (table.family_of(row), table.prefix(row))
        assert table.family(key) == table.family_of(row)
    assert table.ending(*table.place("none")) == []


def test_the_hash_table_keeps_up_with_churn() -> None:
    """What comes and goes leaves nothing that slows down or takes room."""
    chance = random.Random(3)
    table, model = KeyTable(), dict[str, int]()
    free = list(range(3000))
    for n in range(30_000):
        if len(model) > 2000 or (model and chance.random() < 0.4):
            key = next(iter(model))
            free.append(model.pop(key))
            assert table.pop(key) == free[-1]
        else:
            key = f"{NAMESPACE}/0/{sha256(b'%d' % n).hexdigest()}-16/g0.l0-4"
            model[key] = free.pop()
            table.add(key, model[key])
    assert {key: table.row(key) for key in model} == model
    assert sorted(table.rows()) == sorted(model.values())
    assert sum(map(len, table._segments)) < 16 * 2000
    assert [*table] and len(table) == len(model)


class TableMachine(RuleBasedStateMachine):
    """Against a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.table = KeyTable()
        self.model: dict[str, int] = {}

    keys = st.sampled_from(
        [
            f"{NAMESPACE}/{zone}/{digest}/{part}"
            for zone in ("0", "1" * 32)
            for digest in (HASH, OTHER)
            for part in ("g0.l0-1.canonical", "g0.l1-2.canonical")
        ]
    )

    @rule(key=keys)
    def add(self, key: str) -> None:
        if key not in self.model:
            row = next(n for n in range(9) if n not in self.model.values())
            self.table.add(key, row)
            self.model[key] = row

    @rule(key=keys)
    def pop(self, key: str) -> None:
        assert self.table.pop(key) == self.model.pop(key, None)

    @invariant()
    def they_agree(self) -> None:
        assert {key: self.table.row(key) for key in self.table} == self.model
        assert all(self.table.key(row) == key for key, row in self.model.items())
        assert len(self.table) == len(self.model)
        assert len(self.table._frames) == len(
            {k.replace(HASH, "").replace(OTHER, "") for k in self.model}
        )


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=40)

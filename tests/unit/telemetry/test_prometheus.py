"""Metrics: what a scrape shows, what it never shows, and that it disturbs nobody."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import subprocess
import sys
import threading
import weakref
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
from caches import config, layout, stored_files, tokens
from engine import Engine
from hang import HANG
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvlayer import Cache, Portal, Scope
from kvlayer.errors import ConfigError
from kvlayer.events import LookupDone, ObjectQuarantined, StoreDone, TierChanged, TransferDone
from kvlayer.identity.keys import ObjectKey, Span
from kvlayer.results import Cause, Failure
from kvlayer.telemetry.families import SCRAPED
from kvlayer.telemetry.prometheus import PrometheusSink

ROOT = Path(__file__).parents[3]
KEY = ObjectKey(f"{'a' * 64}/0/{'b' * 64}/g0.l0-1.canonical")
LOOKUP = LookupDone(owner="ann", asked_tokens=10, hit_tokens=8, seconds=0.003, by_tier={"cpu": 8})


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def scrape(registry: CollectorRegistry) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of a scrape, by name and labels, read back from the text that is exposed."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    labels.setdefault("cache", "default")
    return scrape(registry).get((name, frozenset(labels.items())))


async def use(cache: Cache, engine: Engine, scope: Scope | None = None) -> None:
    """A prompt's life: stored, found, loaded, prefetched."""
    view = engine.view(engine.slots(32))
    scope = scope or Scope()
    await cache.store(tokens(32), view, scope=scope)
    async with cache.lookup([*tokens(32), 7], scope=scope) as hit:
        await cache.retrieve(hit, view)
    await cache.prefetch(tokens(32), scope=scope)


@pytest.fixture
def engine() -> Engine:
    return Engine(layout(), 64)


# -- what is counted -------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_prompts_life_is_counted_by_tier(
    tmp_path: Path, registry: CollectorRegistry, engine: Engine
) -> None:
    sink = PrometheusSink(registry=registry)
    async with Cache.open(config(tmp_path), layout(), sinks=[sink]) as cache:
        sink.watch(cache)
        await use(cache, engine)
        async with cache.lookup([5, 6]):
            pass
        async with Cache.open(config(), layout()) as other:  # another cache's are not counted
            await use(other, engine)
    async with Cache.open(config(tmp_path), layout(), sinks=[sink]) as cache:  # opened again
        sink.watch(cache)
        await cache.recovered()
        await use(cache, engine)
        expected = {
            ("kvlayer_lookups_total", "outcome", "partial"): 2,
            ("kvlayer_lookups_total", "outcome", "none"): 1,
            ("kvlayer_lookup_hit_tokens_total", "tier", "cpu"): 32,
            ("kvlayer_lookup_hit_tokens_total", "tier", "file"): 32,
            ("kvlayer_retrieve_tokens_total", "tier", "file"): 32,
            ("kvlayer_retrieve_bytes_total", "tier", "file"): 2 * 4096,
            ("kvlayer_retrieve_bytes_total", "tier", "cpu"): 2 * 4096,
            ("kvlayer_store_spans_total", "outcome", "stored"): 2,
            ("kvlayer_store_spans_total", "outcome", "skipped"): 2,
            ("kvlayer_store_spans_total", "outcome", "failed"): 0,
            ("kvlayer_tier_objects", "tier", "file"): 2,
            ("kvlayer_tier_objects", "tier", "cpu"): 2,
            ("kvlayer_tier_up", "tier", "file"): 1,
            ("kvlayer_tier_capacity_bytes", "tier", "cpu"): 1 << 20,
            ("kvlayer_tier_used_bytes", "tier", "cpu"): 2 * 4096,
            ("kvlayer_tier_pinned_bytes", "tier", "cpu"): 2 * 4096,  # the prefetch holds it
        }
        for (name, label, at), count in expected.items():
            assert value(registry, name, **{label: at}) == count, (name, at)
        assert value(registry, "kvlayer_lookup_asked_tokens_total") == 33 + 33 + 2
        assert value(registry, "kvlayer_lookup_seconds_count") == 3
        assert value(registry, "kvlayer_store_bytes_total") == 2 * 4096
        assert value(registry, "kvlayer_prefetch_tokens_total") == 64
        assert value(registry, "kvlayer_prefetch_seconds_count") == 2
        assert value(registry, "kvlayer_leases") == 1
        assert value(registry, "kvlayer_inflight_calls") == cache.control.stats().inflight
        short = cache.namespace.digest[:12]
        assert value(registry, "kvlayer_cache_info", namespace=short) == 1
        for direction in ("load", "store"):
            at = {"tier": "file", "direction": direction}
            assert value(registry, "kvlayer_transfers_total", **at) == 2
            assert value(registry, "kvlayer_transfer_bytes_total", **at) == 2 * 4096
            assert value(registry, "kvlayer_transfer_seconds_count", **at) == 2
        assert value(registry, "kvlayer_tier_capacity_bytes", tier="file") is None  # no limit


@pytest.mark.asyncio
async def test_damage_eviction_and_failure_are_counted_by_cause(
    tmp_path: Path, registry: CollectorRegistry, engine: Engine
) -> None:
    sink = PrometheusSink(registry=registry)
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.store(tokens(16), engine.view(engine.slots(16)))
    for path in stored_files(tmp_path):
        path.write_bytes(b"")
    view = engine.view(engine.slots(64))
    async with Cache.open(config(tmp_path, host="16KiB"), layout(), sinks=[sink]) as cache:
        sink.watch(cache)
        async with cache.lookup(tokens(16)) as hit:
            await cache.retrieve(hit, view)
        await cache.store(tokens(64, 1), view)
        await cache.store(tokens(64, 2), view)
        damage = {"tier": "file", "cause": "empty"}
        assert value(registry, "kvlayer_quarantined_objects_total", **damage) == 1
        assert value(registry, "kvlayer_failures_total", operation="retrieve", **damage) == 1
        failed = value(registry, "kvlayer_transfer_failures_total", direction="load", **damage)
        assert failed == 1
        assert value(registry, "kvlayer_tier_misses_total", **damage) == 1
        gone = {"tier": "cpu", "policy": "prefix-lru"}
        assert value(registry, "kvlayer_evicted_objects_total", **gone) == 4
        assert value(registry, "kvlayer_evicted_bytes_total", **gone) == 4 * 4096


def test_seconds_and_outcomes_of_events_are_those_exposed(registry: CollectorRegistry) -> None:
    sink = PrometheusSink(registry=registry, buckets=(0.001, 0.01))
    failed = (Failure(Span(0, 16, b""), Cause.BUSY, "file"),) * 3
    sink(LOOKUP)
    sink(LookupDone(owner="", asked_tokens=8, hit_tokens=8, seconds=5.0))
    sink(StoreDone(owner="", stored=1, skipped=2, dropped=4, failed=failed, nbytes=9, seconds=0.0))
    for ok in (False, True, False):
        sink(TierChanged(tier="file", ok=ok, detail=""))
    moved = TransferDone(tier="file", direction="load", key=KEY, nbytes=7, seconds=0.5)
    sink(moved)
    sink(
        TransferDone(
            tier="file", direction="load", key=KEY, nbytes=0, seconds=9.0, cause=Cause.VANISHED
        )
    )
    sink(ObjectQuarantined(tier="file", key=KEY, cause=Cause.CORRUPT, detail=""))
    buckets = [
        value(registry, "kvlayer_lookup_seconds_bucket", le=le) for le in ("0.001", "0.01", "+Inf")
    ]
    assert buckets == [0, 1, 2]
    assert value(registry, "kvlayer_lookup_seconds_sum") == pytest.approx(5.003)
    assert value(registry, "kvlayer_lookups_total", outcome="full") == 1
    spans = [
        value(registry, "kvlayer_store_spans_total", outcome=outcome)
        for outcome in ("stored", "skipped", "dropped", "failed")
    ]
    assert spans == [1, 2, 4, 3]
    busy = {"operation": "store", "tier": "file", "cause": "busy"}
    assert value(registry, "kvlayer_failures_total", **busy) == 3
    assert value(registry, "kvlayer_tier_changes_total", tier="file", state="down") == 2
    assert value(registry, "kvlayer_tier_changes_total", tier="file", state="up") == 1
    load = {"tier": "file", "direction": "load"}
    assert value(registry, "kvlayer_transfers_total", **load) == 1
    assert value(registry, "kvlayer_transfer_bytes_total", **load) == 7
    assert value(registry, "kvlayer_transfer_seconds_sum", **load) == 0.5  # what arrived alone


# -- what is never shown ---------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_no_secret_key_or_owner_is_in_a_scrape(
    tmp_path: Path, registry: CollectorRegistry, engine: Engine
) -> None:
    sink = PrometheusSink(registry=registry)
    scope = Scope.private("hunter2", owner="request-7")
    async with Cache.open(config(tmp_path), layout(), sinks=[sink]) as cache:
        sink.watch(cache)
        await use(cache, engine, scope)
        text = generate_latest(registry).decode()
        labels = {label for name, pairs in scrape(registry) for label, _ in pairs}
        hashes = {h.hex() for h in cache.chain(tokens(32), scope).hashes}
    assert "hunter2" not in text
    assert "request-7" not in text
    assert not [h for h in hashes if h in text]
    assert scope.salts[0].zone not in text
    bounded = {"cache", "namespace", "tier", "cause", "direction", "outcome", "operation", "le"}
    assert labels <= bounded | {"policy"}


def test_owners_are_named_only_when_asked_and_only_so_many(registry: CollectorRegistry) -> None:
    sink = PrometheusSink(registry=registry, owners=2)
    for owner in ("ann", "bob", "cy", "dee", "ann"):
        sink(LookupDone(owner=owner, asked_tokens=10, hit_tokens=5, seconds=0.1))
        sink(
            StoreDone(owner=owner, stored=1, skipped=0, dropped=0, failed=(), nbytes=3, seconds=0.1)
        )
    asked = {
        dict(labels)["owner"]: count
        for (name, labels), count in scrape(registry).items()
        if name == "kvlayer_owner_asked_tokens_total"
    }
    assert asked == {"ann": 20, "bob": 10, "(others)": 20}
    assert value(registry, "kvlayer_owner_hit_tokens_total", owner="ann") == 10
    assert value(registry, "kvlayer_owner_stored_bytes_total", owner="(others)") == 6


def test_a_negative_bound_of_owners_is_refused(registry: CollectorRegistry) -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        PrometheusSink(registry=registry, owners=-1)


# -- several caches --------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_two_caches_share_a_registry_and_do_not_meet(
    registry: CollectorRegistry, engine: Engine
) -> None:
    one = PrometheusSink("one", registry=registry)
    two = one.sibling("two")
    async with Cache.open(config(), layout(), sinks=[one]) as first:
        async with Cache.open(config(host="2MiB"), layout(), sinks=[two]) as second:
            one.watch(first)
            two.watch(second)
            await use(first, engine)
            await use(first, engine)
            await use(second, engine)
            for name, lookups, capacity in (("one", 2, 1 << 20), ("two", 1, 2 << 20)):
                assert value(registry, "kvlayer_lookup_seconds_count", cache=name) == lookups
                size = value(registry, "kvlayer_tier_capacity_bytes", cache=name, tier="cpu")
                assert size == capacity
    text = generate_latest(registry).decode()
    assert len(re.findall(r"^# TYPE kvlayer_lookups_total ", text, re.MULTILINE)) == 1


def test_two_caches_with_registries_of_their_own_do_not_meet() -> None:
    registries = CollectorRegistry(), CollectorRegistry()
    for registry in registries:
        PrometheusSink(registry=registry)(LOOKUP)
    assert [value(r, "kvlayer_lookup_asked_tokens_total") for r in registries] == [10, 10]


def test_a_second_sink_on_a_registry_says_what_to_do_and_changes_nothing(
    registry: CollectorRegistry,
) -> None:
    sink = PrometheusSink(registry=registry)
    with pytest.raises(ConfigError, match="already") as caught:
        PrometheusSink("other", registry=registry)
    assert "sibling" in str(caught.value.hint)
    sink(LOOKUP)
    assert value(registry, "kvlayer_lookup_asked_tokens_total") == 10


def test_a_clash_with_the_applications_own_metric_leaves_nothing_half_there(
    registry: CollectorRegistry,
) -> None:
    theirs = Counter("kvlayer_tier_up", "somebody's", registry=registry)  # the last to register
    with pytest.raises(ConfigError):
        PrometheusSink(registry=registry)
    registry.unregister(theirs)
    PrometheusSink(registry=registry)(LOOKUP)
    assert value(registry, "kvlayer_lookup_asked_tokens_total") == 10


def test_one_name_for_two_caches_is_refused(registry: CollectorRegistry) -> None:
    sink = PrometheusSink("one", registry=registry)
    with pytest.raises(ConfigError, match="'one'"):
        sink.sibling("one")


@pytest.mark.asyncio
async def test_one_sink_watches_one_open_cache(registry: CollectorRegistry) -> None:
    sink = PrometheusSink(registry=registry)
    async with Cache.open(config(), layout()) as first, Cache.open(config(), layout()) as second:
        sink.watch(first)
        sink.watch(first)
        with pytest.raises(ConfigError, match="another open cache"):
            sink.watch(second)
    async with Cache.open(config(host="2MiB"), layout()) as third:
        sink.watch(third)  # the first has closed
        assert value(registry, "kvlayer_tier_capacity_bytes", tier="cpu") == 2 << 20


# -- scrapes disturb nobody ------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_closed_cache_leaves_its_counters_and_no_gauges(
    registry: CollectorRegistry, engine: Engine
) -> None:
    sink = PrometheusSink(registry=registry)
    async with Cache.open(config(), layout(), sinks=[sink]) as cache:
        sink.watch(cache)
        await use(cache, engine)
    assert value(registry, "kvlayer_lookup_asked_tokens_total") == 33
    assert value(registry, "kvlayer_leases") is None
    assert value(registry, "kvlayer_tier_up", tier="cpu") is None


@pytest.mark.asyncio
async def test_watching_does_not_keep_a_cache_alive(registry: CollectorRegistry) -> None:
    sink = PrometheusSink(registry=registry)
    async with Cache.open(config(), layout(), sinks=[sink]) as cache:
        sink.watch(cache)
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    assert value(registry, "kvlayer_leases") is None


@pytest.mark.asyncio
async def test_a_backend_that_cannot_be_asked_does_not_fail_the_scrape(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = Counter("application_requests", "the application's", registry=registry)
    theirs.inc()
    sink = PrometheusSink(registry=registry)
    async with Cache.open(config(), layout(), sinks=[sink]) as cache:
        sink.watch(cache)
        monkeypatch.setattr(cache.control, "stats", lambda: 1 // 0)
        samples = scrape(registry)
    assert samples["application_requests_total", frozenset()] == 1
    assert not [name for name, _ in samples if name == "kvlayer_leases"]
    assert "the figures of cache 'default' could not be read" in caplog.text


def test_a_scrape_in_a_forked_child_shows_no_gauges(registry: CollectorRegistry) -> None:
    sink = PrometheusSink(registry=registry)
    with Portal.open(config(), layout()) as portal:
        sink.watch(portal.cache)
        cache = portal.cache
        pid, cache._pid = cache._pid, -1  # what a fork would see
        try:
            assert value(registry, "kvlayer_leases") is None
        finally:
            cache._pid = pid
        assert value(registry, "kvlayer_leases") == 0


def test_scrapes_from_threads_while_a_cache_works_and_closes(
    tmp_path: Path, registry: CollectorRegistry, engine: Engine
) -> None:
    sink = PrometheusSink(registry=registry)
    stop, scraped, failed = threading.Event(), threading.Barrier(3, timeout=HANG), []

    def work() -> None:
        first = True
        while not stop.is_set():
            try:
                generate_latest(registry)
            except Exception as exc:  # noqa: BLE001  # any at all is the failure looked for
                failed.append(exc)
                return
            if first:
                scraped.wait()
                first = False

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        scraped.wait()  # both are scraping
        for _ in range(3):
            with Portal.open(config(tmp_path, host="64KiB"), layout(), sinks=[sink]) as portal:
                sink.watch(portal.cache)
                for seed in range(10):
                    portal.call(_store, engine, seed)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failed == []
    assert value(registry, "kvlayer_store_seconds_count") == 30


async def _store(cache: Cache, engine: Engine, seed: int) -> None:
    view = engine.view(engine.slots(64))
    await cache.store(tokens(64, seed), view)
    async with cache.lookup(tokens(64, seed)) as hit:
        await cache.retrieve(hit, view)


@pytest.mark.asyncio
async def test_a_scrape_asks_for_no_list_of_objects(
    registry: CollectorRegistry, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the Planner's lock: its time must not grow with what is stored."""
    sink = PrometheusSink(registry=registry)
    async with Cache.open(config(), layout(), sinks=[sink]) as cache:
        sink.watch(cache)
        await use(cache, engine)

        def refuse() -> None:
            raise AssertionError("a scan of all objects")

        monkeypatch.setattr(cache.stack.planner.directory, "objects", refuse)
        assert value(registry, "kvlayer_tier_objects", tier="cpu") == 2


@pytest.mark.asyncio
async def test_a_scrape_waits_for_no_loop(registry: CollectorRegistry) -> None:
    """A loop that is busy, or stuck, is what metrics are for."""
    sink = PrometheusSink(registry=registry)
    async with Cache.open(config(), layout()) as cache:
        sink.watch(cache)
        thread = threading.Thread(target=generate_latest, args=(registry,))
        thread.start()
        thread.join(timeout=HANG)  # the loop stands still meanwhile
        assert not thread.is_alive()
        await asyncio.sleep(0)


# -- the extra -------------------------------------------------------------------------------------

WITHOUT = """
import sys
sys.modules["prometheus_client"] = None  # what an import of a missing package finds
from kvlayer.errors import UnsupportedError
import kvlayer.telemetry.prometheus as module
try:
    module.PrometheusSink()
except UnsupportedError as exc:
    print(exc, exc.hint, sep="|")
"""


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_the_package_the_error_names_the_extra() -> None:
    message, hint = python(WITHOUT).split("|")
    assert "prometheus_client" in message
    assert hint == "install kvlayer-core[prometheus]"


def test_the_extra_the_error_names_brings_the_package() -> None:
    wanted = [line for line in requires("kvlayer-core") or () if "prometheus" in line]
    (line,) = wanted
    assert line.startswith("prometheus")
    assert re.search(r"extra == .prometheus.", line)


def test_only_building_a_sink_imports_the_package() -> None:
    loaded = "import sys; print('prometheus_client' in sys.modules)"
    modules = "import kvlayer, kvlayer.api.cache, kvlayer.telemetry.prometheus\n"
    assert python("from kvlayer import *\n" + modules + loaded) == "False"
    built = modules + "kvlayer.telemetry.prometheus.PrometheusSink()\n" + loaded
    assert python(built) == "True"


# -- the page --------------------------------------------------------------------------------------


def documented() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name -> kind and labels, as docs/observability.md says."""
    page = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(kvlayer_\w+)` \| (\w+) \| (.*?) \|", page, re.MULTILINE)
    return {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


@pytest.mark.asyncio
async def test_the_page_lists_exactly_what_is_exposed(
    tmp_path: Path, registry: CollectorRegistry
) -> None:
    sink = PrometheusSink(registry=registry, owners=1)
    async with Cache.open(config(tmp_path), layout(), sinks=[sink]) as cache:
        sink.watch(cache)
        families = {
            family.name: family.type
            for family in text_string_to_metric_families(generate_latest(registry).decode())
            if not family.name.endswith("_created")
        }
    exposed = {n + "_total" * (kind == "counter"): kind for n, kind in families.items()}
    assert exposed == {name: kind for name, (kind, _) in documented().items()}


@pytest.mark.asyncio
async def test_the_page_lists_exactly_the_labels_exposed(
    tmp_path: Path, registry: CollectorRegistry, engine: Engine
) -> None:
    made: dict[str, tuple[str, ...]] = {}
    sink = PrometheusSink(registry=registry, owners=1)
    metrics: list[Any] = [*sink._metrics.counters.values(), *sink._metrics.histograms.values()]
    for metric in metrics:
        made[metric._name] = metric._labelnames[1:]
    for each in SCRAPED:
        made[each.family.name] = each.family.labels
    listed = {name.removesuffix("_total"): labels for name, (_, labels) in documented().items()}
    assert made == listed


def test_names_follow_the_conventions() -> None:
    for name, (kind, labels) in documented().items():
        assert name.endswith("_total") == (kind == "counter")
        assert kind != "histogram" or name.endswith("_seconds")
        assert not re.search(r"_(ms|millis\w*|kb|mb|nbytes)(_|$)", name)
        assert "cache" not in labels  # every family has it

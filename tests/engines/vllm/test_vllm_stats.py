"""kvlayer's figures in vLLM's statistics: what is counted is what happened, logged and scraped."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from vllm_desk import LAYERS, Desk

from kvlayer.events import LookupDone, RetrieveDone
from kvlayer.telemetry import families
from kvlayer.telemetry.prometheus import PrometheusSink
from kvlayer_vllm.connector import KVLayerConnector
from kvlayer_vllm.stats import CUT_STORES, HELD_BLOCKS, Figures, PromMetrics, StatsSink

PROMPT = list(range(3, 203))
LABELS = ["model_name", "engine"]
ENGINES: dict[int, list[object]] = {0: ["tiny", "0"], 1: ["tiny", "1"]}


@pytest.fixture
def desk(desk: Any) -> Any:
    """One, of one group."""
    return desk()


@pytest.fixture
def metric_types() -> Any:
    """vLLM's own, in a registry of the test's."""
    registry = CollectorRegistry()

    def kind(made: Any) -> Any:
        return lambda **how: made(**how, registry=registry)

    return registry, {each: kind(each) for each in (Counter, Gauge, Histogram)}


def all_figures(desk: Desk) -> Figures:
    return desk.half.figures() or Figures()


def test_what_is_counted_is_what_happened(desk: Desk, request_of: Any) -> None:
    first = all_figures(desk)
    assert first.data["gauges"] and not first.data["counters"]
    desk.answer(request_of(PROMPT), [1, 2, 3, 4, 5, 6, 7])
    desk.answer(request_of([*PROMPT, 7], request_id="two"), [11, 12, 13, 14, 15, 16, 17])
    found = all_figures(desk)
    host = desk.half.portal.cache.control.stats().tiers[0]
    assert found.total(families.LOOKUPS) == 2 and found.total(families.LOOKUPS, "partial") == 1
    assert found.total(families.LOOKUP_ASKED) == 200 + 201
    assert found.total(families.LOOKUP_HIT, "cpu") == 192
    assert found.total(families.RETRIEVE_TOKENS, "cpu") == 192
    assert found.total(families.RETRIEVE_BYTES) == host.loaded_nbytes > 0
    assert found.total(families.STORE_BYTES) == host.stored_nbytes == host.loaded_nbytes
    assert found.total(families.STORE_SPANS, "stored") == 3
    assert len(found.data["seconds"]["kvlayer_retrieve_seconds"]) == 1
    said = found.reduce()
    assert (said["kvlayer lookups"], said["tokens found"], said["tokens loaded"]) == (2, 192, 192)
    assert said["MB loaded"] == said["MB stored"] == round(host.loaded_nbytes / 1e6, 3)
    assert said["failures"] == 0 and said["ms per load"] > 0
    later = desk.half.figures()
    assert later is None or not later.data["counters"]  # nothing twice


def test_gauges_are_read_once_a_second_and_misses_are_not_counted_twice(desk: Desk) -> None:
    now = [100.0]
    sink, cache = StatsSink(lambda: now[0]), desk.half.portal.cache
    cache.stack.host.misses["no-room"] += 3  # type: ignore[index]  # a cause is its word
    first = sink.take(cache)
    assert first is not None
    assert first.total(families.SCRAPED[-1].family, "cpu", "no-room") == 3
    assert first.data["gauges"]["kvlayer_tier_capacity_bytes\tcpu"] == 64 << 20
    now[0] += 0.5
    assert sink.take(cache) is None
    cache.stack.host.misses["no-room"] += 1  # type: ignore[index]
    now[0] += 0.6
    second = sink.take(cache)
    assert second is not None and second.total(families.SCRAPED[-1].family) == 1


def test_a_backend_whose_figures_fail_costs_no_count(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    sink, cache = StatsSink(lambda: now[0]), desk.half.portal.cache
    sink(LookupDone(owner="", asked_tokens=9, hit_tokens=9, seconds=0.5, by_tier={"cpu": 9}))
    with monkeypatch.context() as broken:
        broken.setattr(type(cache.control), "stats", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sink.take(cache)
        found = sink.take(cache)  # the next step, of the same second
    assert found is not None and found.total(families.LOOKUP_HIT, "cpu") == 9
    now[0] += 1.0
    later = sink.take(cache)
    assert later is not None and later.data["gauges"]


def test_intervals_add_up_and_survive_the_way_to_another_process() -> None:
    def interval(tokens: int, tier: str) -> Figures:
        sink = StatsSink(lambda: 0.0)
        sink(
            LookupDone(
                owner="", asked_tokens=9, hit_tokens=tokens, seconds=0.5, by_tier={tier: tokens}
            )
        )
        return sink._figures

    one, two = interval(3, "cpu"), interval(4, "file")
    one.data["gauges"], two.data["gauges"] = {"g": 1.0}, {"g": 2.0}
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(two.to_dict()))
    built = KVLayerConnector.build_kv_connector_stats(sent)
    assert isinstance(built, Figures)
    both = one.aggregate(built)
    assert both is one and both.total(families.LOOKUP_HIT) == 7
    assert both.total(families.LOOKUP_HIT, "file") == 4 and both.total(families.LOOKUPS) == 2
    assert both.data["seconds"]["kvlayer_lookup_seconds"] == [0.5, 0.5]
    assert both.data["gauges"] == {"g": 2.0}  # the later one
    both.reset()
    assert both.is_empty() and KVLayerConnector.build_kv_connector_stats() == Figures()


def test_vllm_logs_them_as_one_line(vllm_config: Any, desk: Desk, request_of: Any) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging

    logs = KVConnectorLogging(vllm_config.kv_transfer_config)
    lines: list[str] = []
    desk.answer(request_of(PROMPT), [1, 2, 3, 4, 5, 6, 7])
    logs.observe(all_figures(desk).to_dict())
    desk.answer(request_of([*PROMPT, 7], request_id="two"), [11, 12, 13, 14, 15, 16, 17])
    logs.observe(all_figures(desk).to_dict())
    logs.log(lambda text, *args: lines.append(text % args))
    (line,) = lines
    assert "kvlayer lookups=2, tokens asked=401, tokens found=192, tokens loaded=192" in line
    logs.log(lambda text, *args: lines.append(text % args))
    assert len(lines) == 1


def test_every_family_is_shown_under_vllms_prefix_and_labels(
    vllm_config: Any, desk: Desk, request_of: Any, metric_types: Any
) -> None:
    registry, types = metric_types
    shown = PromMetrics(vllm_config, types, LABELS, ENGINES)
    names = {each.name for each in registry.collect()}
    known = [*families.COUNTERS, *families.HISTOGRAMS, *(each.family for each in families.SCRAPED)]
    known += [CUT_STORES, HELD_BLOCKS]
    assert names == {f"vllm:{each.name}" for each in known}
    desk.answer(request_of(PROMPT), [1, 2, 3, 4, 5, 6, 7])
    desk.answer(request_of([*PROMPT, 7], request_id="two"), [11, 12, 13, 14, 15, 16, 17])
    figures = all_figures(desk)
    shown.observe(figures.to_dict(), 1)
    shown.observe(figures.to_dict(), 1)

    def value(name: str, **labels: str) -> float | None:
        own = {"model_name": "tiny", "engine": "1", **labels}
        found: float | None = registry.get_sample_value(f"vllm:{name}", own)
        return found

    assert value("kvlayer_retrieve_tokens_total", tier="cpu") == 2 * 192
    assert value("kvlayer_lookups_total", outcome="partial") == 2
    assert value("kvlayer_retrieve_seconds_count") == 2
    assert value("kvlayer_retrieve_seconds_sum") == pytest.approx(
        2 * sum(figures.data["seconds"]["kvlayer_retrieve_seconds"])
    )
    assert value("kvlayer_tier_up", tier="cpu") == 1
    assert value("kvlayer_tier_objects", tier="cpu") == 3
    assert value("kvlayer_cache_info", namespace=desk.half.portal.cache.namespace.digest[:12]) == 1


def test_vllm_sees_what_a_sink_of_the_applications_own_sees(
    vllm_config: Any, metric_types: Any
) -> None:
    """One mapping from events to figures: the two never disagree."""
    registry, types = metric_types
    own = CollectorRegistry()
    there, here = StatsSink(lambda: 0.0), PrometheusSink("c", registry=own)
    by_tier = {"cpu": 64, "file": 32}
    for sink in (there, here):
        sink(LookupDone(owner="x", asked_tokens=200, hit_tokens=96, seconds=0.02, by_tier=by_tier))
        sink(
            RetrieveDone(
                owner="x", asked_tokens=96, tokens=96, failed=(), nbytes=7, seconds=0.3,
                by_tier=by_tier, nbytes_by_tier={"cpu": 5, "file": 2},
            )
        )  # fmt: skip
    PromMetrics(vllm_config, types, LABELS, ENGINES).observe(there._figures.to_dict())
    seen = [
        {
            (
                s.name.removeprefix("vllm:"),
                tuple(sorted((k, v) for k, v in s.labels.items() if k not in {*LABELS, "cache"})),
            ): s.value
            for metric in each.collect()
            for s in metric.samples
            if not s.name.endswith("_created")
        }
        for each in (registry, own)
    ]
    assert seen[1].items() <= seen[0].items() and len(seen[1]) > 40
    assert ("kvlayer_lookup_hit_tokens_total", (("tier", "file"),)) in seen[1]


def test_figures_that_make_no_sense_are_told_once_and_cost_nothing(
    vllm_config: Any, metric_types: Any, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("vllm.kvlayer").addHandler(caplog.handler)
    shown = PromMetrics(vllm_config, metric_types[1], LABELS, ENGINES)
    for _ in range(2):
        shown.observe({"counters": {"nobody's": 1.0}, "seconds": {}, "gauges": {}})
        shown.observe({})
    logging.getLogger("vllm.kvlayer").removeHandler(caplog.handler)
    assert len({id(r) for r in caplog.records if "metrics are missing" in r.getMessage()}) == 1


def test_a_second_engine_of_the_process_shows_its_own(vllm_config: Any) -> None:
    """vLLM builds its metrics in one registry for every engine that a process starts."""
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorProm
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    try:
        for _ in range(2):
            unregister_vllm_metrics()
            prom = KVConnectorProm(vllm_config, LABELS, ENGINES)
            assert isinstance(prom.prom_metrics, PromMetrics)
            prom.observe({"counters": {"kvlayer_store_bytes": 5.0}, "seconds": {}, "gauges": {}}, 0)
            own = {"model_name": "tiny", "engine": "0"}
            assert REGISTRY.get_sample_value("vllm:kvlayer_store_bytes_total", own) == 5
    finally:
        unregister_vllm_metrics()
    assert REGISTRY.get_sample_value("vllm:kvlayer_store_bytes_total", own) is None


def test_an_engine_that_kvlayer_is_off_for_shows_nothing(
    vllm_config: Any, metric_types: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvlayer_vllm import connector

    monkeypatch.setattr(connector, "engine_version", lambda: "0.99.0")
    registry, types = metric_types
    assert KVLayerConnector.build_prom_metrics(vllm_config, types, LABELS, ENGINES) is None
    assert list(registry.collect()) == []


@pytest.fixture
def connector(
    vllm_config: Any, spec: Any, kv_cache_config: Any, no_cache_home: None
) -> Iterator[KVLayerConnector]:
    """A connector that has not met its workers yet."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole

    groups = kv_cache_config((LAYERS, spec("FullAttentionSpec")))
    made = KVLayerConnector(vllm_config, KVConnectorRole.SCHEDULER, groups)
    yield made
    made.shutdown()


def test_before_the_workers_are_met_every_hook_has_an_answer(
    connector: KVLayerConnector, request_of: Any
) -> None:
    assert connector.is_on and connector.get_kv_connector_stats() is None
    assert connector.take_events() == [] and connector.reset_cache() is None
    step = connector.build_connector_meta(None)
    assert not (step.received or step.loads)  # type: ignore[attr-defined]
    assert connector.request_finished(request_of(PROMPT), [1]) == (False, None)
    assert not connector.has_pending_push_work() and not connector.has_pending_block_frees()
    assert connector.troubles == 0


def test_statistics_and_events_that_fail_are_none(
    connector: KVLayerConnector, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(connector, "_scheduler", desk.half)
    assert isinstance(connector.get_kv_connector_stats(), Figures)
    monkeypatch.setattr(connector, "troubles", 1)  # one is logged, with its traceback
    monkeypatch.setattr(desk.half, "figures", broken)
    monkeypatch.setattr(desk.half, "take_events", broken)
    assert connector.get_kv_connector_stats() is None and connector.take_events() == []
    assert connector.troubles == 3

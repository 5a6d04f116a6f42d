"""An engine whose statistics, metrics and KV events are looked at as its operators would.

``python observed_process.py MODEL DIRECTORY``: the engine's core in a process of its own, so that
everything crosses as it does under ``vllm serve``. Prints what was seen as one line of JSON.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
os.environ["VLLM_LOG_STATS_INTERVAL"] = "1e9"  # they are logged once, when they are asked for

from hang import HANG

from kvlayer_vllm.bench.serving import Serving, prompt_of

TOKENS, ANSWER, CHUNK, BLOCK = 700, 8, 64, 32
SPANS = "kvlayer_store_spans_total stored"
KEPT = (TOKENS + ANSWER) // BLOCK  # blocks
OBJECTS = 12  # ten chunks and the tail of the prompt, and the chunk that the answer completes


class Logged(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Router:
    """Listens where the engine publishes."""

    def __init__(self, endpoint: str) -> None:
        import msgspec
        import zmq
        from vllm.distributed.kv_events import KVEventBatch

        self._decode = msgspec.msgpack.Decoder(KVEventBatch).decode
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(endpoint)
        self._socket.setsockopt_string(zmq.SUBSCRIBE, "")

    def hear(self, milliseconds: int) -> list[dict[str, Any]]:
        """What was published, waiting so long for the first batch."""
        found: list[dict[str, Any]] = []
        while self._socket.poll(0 if found else milliseconds):
            _, _, packed = self._socket.recv_multipart()
            found += [self._plain(event) for event in self._decode(packed).events]
        return found

    @staticmethod
    def _plain(event: Any) -> dict[str, Any]:
        return {
            "kind": type(event).__name__,
            "medium": getattr(event, "medium", None),
            "owner": getattr(event, "ownership", None),
            "hashes": list(getattr(event, "block_hashes", ())),
            "parent": getattr(event, "parent_block_hash", None),
            "tokens": list(getattr(event, "token_ids", ())),
        }


def main(model: str, directory: Path) -> None:
    says = os.fdopen(os.dup(1), "w")  # the engine's log must not get between
    os.dup2(2, 1)
    endpoint = f"ipc://{directory}/events"
    router = Router(endpoint)
    serving = started(model, directory, endpoint)
    logged = Logged()
    logging.getLogger("vllm").addHandler(logged)
    meet(serving, router)
    found = look(serving, router)
    found["logged"] = [line for line in logged.lines if "KV Transfer metrics" in line]
    says.write(json.dumps(found) + "\n")
    says.flush()
    serving.close()


def started(model: str, directory: Path, endpoint: str) -> Serving:
    """An engine that publishes its events at the endpoint."""
    from vllm.config import KVEventsConfig

    return Serving(
        model,
        cache={
            "tokens_per_chunk": CHUNK,
            "tokens_per_tail": BLOCK,
            "held_share": 1.0,  # few blocks, and what is stored is counted
            "report_prefill": False,  # what is found is loaded
            "tiers": [
                {"url": "cpu://?capacity=256MiB"},
                {"url": f"file://{directory}/kv", "write": "through", "deadline_seconds": 60.0},
            ],
        },
        dtype="float32",
        max_num_batched_tokens=512,
        enable_prefix_caching=True,
        disable_log_stats=False,
        kv_events_config=KVEventsConfig(
            enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint
        ),
    )


def meet(serving: Serving, router: Router) -> None:
    """Until the router hears the engine; then everything is forgotten."""
    for seed in count(99):  # whoever subscribes late has missed what was published before
        serving.ask([prompt_of(64, seed, 512)], 2)  # another each time: nothing is loaded here
        if router.hear(100):
            break
    forget_everything(serving)
    step(serving)  # with which the last of it is counted


def step(serving: Serving) -> None:
    """What is under way is told of with the steps after it: here is one."""
    serving.ask([[5, 6, 7]], 2)


def forget_everything(serving: Serving) -> None:
    """kvlayer, too: until no block is read any more."""
    while not serving.engine.reset_prefix_cache(False, True):
        step(serving)


def look(serving: Serving, router: Router) -> dict[str, Any]:
    """Ask a prompt cold, from kvlayer, and after everything was forgotten: what could be seen."""
    from prometheus_client import REGISTRY

    before = values(REGISTRY)
    prompt = prompt_of(TOKENS, 1, 512)
    (cold,) = serving.ask([prompt], ANSWER)
    while not serving.engine.reset_prefix_cache():  # while blocks are gathered it is not free
        step(serving)
    (warm,) = serving.ask([prompt], ANSWER)
    stored: list[dict[str, Any]] = []
    removed: list[dict[str, Any]] = []
    text = [*prompt, *cold.tokens]
    blocks = {tuple(text[at : at + BLOCK]) for at in range(0, len(text), BLOCK)}

    def is_stored() -> bool:
        """What was published before, when nothing of the prompt was there, may come this late."""
        stored.extend(event for event in router.hear(100) if blocks & {*blocks_of(event)})
        spans = values(REGISTRY).get(SPANS, 0) - before.get(SPANS, 0)
        return spans >= OBJECTS and all(len(held) == KEPT for held in told(stored).values())

    def is_removed() -> bool:
        removed.extend(event for event in router.hear(100) if known & {*event["hashes"]})
        return told(removed) == told(stored)

    step_until(is_stored, serving)
    step(serving)  # what was published by now is counted with the next step at the latest
    after = values(REGISTRY)
    serving.engine.do_log_stats()
    known = {each for event in stored for each in event["hashes"]}
    forget_everything(serving)
    step_until(is_removed, serving)
    (again,) = serving.ask([prompt], ANSWER)
    return {
        "cold": [list(cold.tokens), cold.cached],
        "warm": [list(warm.tokens), warm.cached],
        "again": [list(again.tokens), again.cached],
        "prompt": prompt,
        "values": {key: value - before.get(key, 0) for key, value in after.items()},
        "gauges": {key: value for key, value in after.items() if "_tier_" in key},
        "stored": stored,
        "removed": removed,
    }


def step_until(is_so: Callable[[], bool], serving: Serving) -> None:
    """However many steps that takes."""
    until = time.monotonic() + HANG
    while not is_so():
        if time.monotonic() > until:
            raise TimeoutError(f"{is_so.__name__}: never")
        step(serving)


def blocks_of(event: dict[str, Any]) -> list[tuple[int, ...]]:
    """The tokens of each block that an event tells of."""
    tokens = event["tokens"]
    return [tuple(tokens[at : at + BLOCK]) for at in range(0, len(tokens), BLOCK)]


def told(events: list[dict[str, Any]]) -> dict[str, set[Any]]:
    """The blocks that kvlayer's of them name, by where they are."""
    found: dict[str, set[Any]] = {"CPU": set(), "STORAGE": set()}
    for event in events:
        if event["medium"] in found:
            found[event["medium"]].update(event["hashes"])
    return found


def values(registry: Any) -> dict[str, float]:
    """Every sample of kvlayer's and of vLLM's own count of what connectors gave."""
    found: dict[str, float] = {}
    for metric in registry.collect():
        for sample in metric.samples:
            labels = [v for k, v in sample.labels.items() if k not in ("model_name", "engine")]
            found[" ".join([sample.name.removeprefix("vllm:"), *labels])] = sample.value
    shown = {key: n for key, n in found.items() if "kvlayer" in key or "external" in key}
    return {key: n for key, n in shown.items() if "_created" not in key}  # times of day


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # what an interpreter with an engine in it does when it exits is nobody's concern

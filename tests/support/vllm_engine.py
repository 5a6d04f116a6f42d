"""An engine in a process of its own, driven line by line: one JSON request, one JSON answer.

``python engine_process.py MODEL CACHE OPTIONS`` (JSON; CACHE may be null: without kvlayer). Each
request is ``[verb, *arguments]``; see the functions below.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from kvlayer import Cache
from kvlayer_vllm.bench.serving import Serving


def ask(serving: Serving, prompts: list[list[int]], tokens: int, salt: str = "") -> Any:
    """Greedy answers: token ids and how many prompt tokens were not computed."""
    answers = serving.ask(prompts, tokens, salt=salt)
    return [[list(answer.tokens), answer.cached] for answer in answers]


def ask_logprobs(serving: Serving, prompts: list[list[int]], tokens: int) -> Any:
    """Greedy answers with the two best log-probabilities of each token, one prompt at a time."""
    found = [serving.ask([prompt], tokens, logprobs=2)[0] for prompt in prompts]
    return [[list(each.tokens), each.cached, each.logprobs] for each in found]


def rest(serving: Serving) -> Any:
    """Until nothing is under way; what was stored has reached its tiers."""
    serving.rest()
    if serving.connector is not None:
        serving.connector.scheduler.portal.call(Cache.flush)
    return None


def leave_memory(serving: Serving, prompt: list[int]) -> Any:
    """The prompt's KV is in the lower tiers alone from now on."""
    rest(serving)

    async def evict(cache: Cache) -> int:
        return await cache.control.evict(prompt, tier="cpu")

    return serving.connector.scheduler.portal.call(evict)


def explain(serving: Serving, prompt: list[int]) -> Any:
    async def work(cache: Cache) -> str:
        return str(await cache.control.explain(prompt))

    return serving.connector.scheduler.portal.call(work)


def state(serving: Serving) -> Any:
    """Whether kvlayer is on, what went wrong in it, and how it loads and stores."""
    connector = serving.connector
    if not connector.is_on:
        return {"on": False}
    portal = connector.scheduler.portal
    layout = portal.cache.stack.planner.layout
    host = portal.cache.control.stats().tiers[0]
    return {
        "on": True,
        "troubles": connector.troubles,
        "namespace": portal.cache.namespace.digest,
        "groups": [str(group.form) for group in layout.groups],
        "rules": [str(group.group.hit_rule) for group in layout.groups],
        "leases": portal.cache.control.stats().leases,
        "pinned": host.pinned_nbytes,
        "loaded": host.loaded_nbytes,
        "free_blocks": serving.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        "tracked": connector.scheduler.tracked,
    }


def resident(serving: Serving, chunks: int) -> Any:
    """Fill the directory with this many more chunks, without touching their memory."""
    cache: Cache = serving.connector.scheduler.portal.cache

    async def fill(cache: Cache) -> int:
        planner, step, made = cache.stack.planner, 500, 0
        from array import array

        from kvlayer import Scope

        size = planner.tokens_per_chunk
        for number in range(0, chunks, step):
            tokens = array("i", (number * 7 + i % 9973 for i in range(step * size)))
            chain = cache.chain(tokens, Scope())
            todo = planner.plan_store(chain, 0, tail=False, holds=lambda _g, _s: True)
            planner.stored(todo.gathers, ok=True)
            planner.settle(chain, todo.gathers)
            made += len(todo.gathers)
        return made

    made = serving.connector.scheduler.portal.call(fill)
    return made, len(cache.stack.planner.directory)


def hook_times(serving: Serving, prompts: list[list[int]], tokens: int) -> Any:
    """Answer prompts; milliseconds of thread CPU time of every call of each hook, in order."""
    connector = serving.connector
    times: dict[str, list[float]] = {}

    def timed(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            began = time.thread_time_ns()
            try:
                return hook(*args)
            finally:
                times.setdefault(name, []).append((time.thread_time_ns() - began) / 1e6)

        return call

    names = (
        "on_new_request",
        "get_num_new_matched_tokens",
        "update_state_after_alloc",
        "build_connector_meta",
        "update_connector_output",
        "request_finished_all_groups",
    )
    for name in names:
        setattr(connector, name, timed(name, getattr(connector, name)))
    answers = ask(serving, prompts, tokens)
    for name in names:
        delattr(connector, name)
    return times, answers


def reset(serving: Serving) -> Any:
    serving.rest()
    return serving.core.reset_prefix_cache(False, True)


def close(serving: Serving) -> Any:
    serving.close()
    return None


VERBS = {
    each.__name__: each
    for each in (
        ask,
        ask_logprobs,
        rest,
        leave_memory,
        explain,
        state,
        resident,
        hook_times,
        reset,
        close,
    )
}


def main() -> None:
    says = os.fdopen(os.dup(1), "w")  # the engine's log must not get between the answers
    os.dup2(2, 1)
    model, cache, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    serving = Serving(model, cache=cache, **options)
    says.write(json.dumps("ready") + "\n")
    says.flush()
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        says.write(json.dumps(VERBS[verb](serving, *arguments)) + "\n")
        says.flush()


if __name__ == "__main__":
    main()

"""An engine in a process of its own, driven line by line: one JSON request, one JSON answer.

A role for ``zygote.Zygote``, which has imported vLLM by then: an engine starts in a second. Each
request is ``[verb, *arguments]``; see the functions below.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import vllm_drafts
import vllm_states
import vllm_tiering
from counting import counted
from damage import damage_file
from vllm_beside import BesideServing, config_of, sibling
from vllm_states import ends, misses, noise, states_are_optional
from vllm_tiering import leave_offload, offload_state
from vllm_unusual import converse, embedded

from kvlayer import Cache, Cause, RetrieveReport, Scope
from kvlayer.identity.keys import Span
from kvlayer.results import Failure
from kvlayer_vllm import engine
from kvlayer_vllm.bench import engine as bench
from kvlayer_vllm.bench.serving import Serving
from kvlayer_vllm.bench.settled import settled

__all__ = ["measure", "serve"]

for _name in (
    "kvlayer_vllm.connector",
    "vllm.v1.engine.llm_engine",
    f"vllm.v1.worker.{'cpu' if engine.platform() == 'cpu' else 'gpu'}_worker",
    "compressed_tensors",
):
    import_module(_name)  # what every engine imports, before the first is forked

for _name, _file in {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Gemma3ForCausalLM": "gemma3",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "MambaForCausalLM": "mamba",
}.items():
    # Of a model that is not imported yet vLLM learns what it can do from another process.
    _model = getattr(import_module(f"vllm.model_executor.models.{_file}"), _name)
    import_module("vllm").ModelRegistry.register_model(_name, _model)


def ask(serving: Serving, prompts: list[list[int]], tokens: int, salt: str = "") -> Any:
    """Greedy answers: token ids and how many prompt tokens were not computed."""
    answers = serving.ask(prompts, tokens, salt=salt)
    return [[list(answer.tokens), answer.cached] for answer in answers]


def answers(serving: Serving, prompts: list[list[int]], tokens: int) -> Any:
    """:func:`ask`, and the two best log-probabilities of each token of an answer, best first."""
    found = serving.ask(prompts, tokens, logprobs=2)
    return [[list(each.tokens), each.cached, each.logprobs] for each in found]


def rest(serving: Serving) -> Any:
    """Until nothing is under way; what was stored has reached its tiers."""
    serving.rest()
    if serving.connector is not None:
        settled(serving.connector.scheduler)
    return None


def forget(serving: Serving) -> Any:
    """The engine's own prefix cache holds nothing any more. How often it has preempted so far."""
    serving.rest()
    assert serving.core.scheduler.reset_prefix_cache()
    return _PREEMPTED[0]


def likelihood(serving: Serving, prompt: list[int], token: int) -> Any:
    """How likely ``token`` comes next, as a log-probability, and what was not computed for it."""
    # It is taken before the choice is narrowed to the one token.
    (found,) = serving.ask([prompt], 1, logprobs=0, allowed_token_ids=[token])
    assert found.tokens == (token,)
    ((logprob,),) = found.logprobs
    return [logprob, found.cached]


def alter(serving: Serving, prompts: list[list[int]]) -> Any:
    """Put noise in place of these prompts' KV in host memory. How many bytes that were.

    Zeros would not do: what attends to nothing goes on from its last tokens, and may guess right.
    """
    import torch

    stack = serving.connector.scheduler.portal.cache.stack
    noise, altered = torch.Generator().manual_seed(1), 0
    for prompt in prompts:
        chain = serving.connector.scheduler.portal.cache.chain(prompt, Scope())
        for record in stack.planner.match(chain).path():
            slot = stack.objects.slab.view(record.offset, record.nbytes)
            held = stack.planner.layout.groups[record.part.group].group
            values = torch.frombuffer(slot, dtype=getattr(torch, held.dtype))
            values.copy_(4.0 * torch.randn(values.shape, generator=noise))
            altered += slot.nbytes
    return altered


def damage_before_load(serving: Serving, directory: str, damage: str) -> Any:
    """What is found next is damaged on the disk once it is found, before it is read."""
    promote = Cache.promote
    files = sorted(path for path in Path(directory).rglob("*.raw") if path.is_file())
    damaged: list[str] = []
    patch = pytest.MonkeyPatch()

    async def damages(cache: Cache, hit: Any, **how: Any) -> Any:
        patch.undo()
        assert hit.tokens
        for path in files[::2]:
            damage_file(path, damage)
            damaged.append(path.name)
        return await promote(cache, hit, **how)

    patch.setattr(Cache, "promote", damages)
    _DAMAGED[:] = [damaged]
    return len(files)


def damaged(_: Serving) -> Any:
    """How many files :func:`damage_before_load` has damaged by now."""
    return len(_DAMAGED[0])


def fail_loads(_: Serving, fails: bool) -> Any:
    """From now on loads put nonsense where they can, and fail, or not; how often one has so far."""
    if fails:
        _FAILING.setattr(Cache, "retrieve", _fails)
    else:
        _FAILING.undo()
    return _FAILED[0]


async def _fails(_: Cache, hit: Any, kv: Any, **how: Any) -> RetrieveReport:
    _FAILED[0] += 1
    for layer in kv.caches[0] if kv.caches else ():
        layer[sorted({int(slot) // 32 for slot in kv.slots[0]})] = 7.5
    return RetrieveReport(0, (Failure(Span(0, hit.tokens, b""), Cause.RANK_DOWN, "cpu", "no"),))


def empty(serving: Serving, name: str) -> Any:
    """The connector of this class beside kvlayer holds nothing any more."""
    serving.rest()
    return sibling(serving, name).reset_cache()


def policy(serving: Serving) -> Any:
    """Whether vLLM computes what a load has not brought."""
    return serving.core.scheduler.recompute_kv_load_failures


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
        "token_nbytes": _token_nbytes(portal.cache),
        "free_blocks": serving.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        "tracked": connector.scheduler.tracked,
    }


def _token_nbytes(cache: Cache) -> int:
    """Of one token's KV, in all groups."""
    planner, size = cache.stack.planner, 1 << 10
    return sum(planner.payload(part, size).nbytes // size for part in planner.directory.needs)


def resident(serving: Serving, chunks: int) -> Any:
    """Fill the directory with this many more chunks, without touching their memory."""
    cache: Cache = serving.connector.scheduler.portal.cache

    async def fill(cache: Cache) -> int:
        planner, step, made = cache.stack.planner, 500, 0
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


HOOKS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished_all_groups",
)


def hook_work(serving: Serving, prompts: list[list[int]], tokens: int, counts: bool) -> Any:
    """Answer prompts; what every call of each of the scheduler's hooks took, in order.

    ``counts``: instructions of Python and digests that its thread computed. Otherwise milliseconds
    of the thread's CPU time: counting costs far more of it than the hooks do.
    """
    connector = serving.connector
    work: dict[str, list[Any]] = {name: [] for name in HOOKS}

    def watched(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if counts:
                result, *found = counted(lambda: hook(*args))
                work[name].append(found)
                return result
            began = time.thread_time_ns()
            try:
                return hook(*args)
            finally:
                work[name].append((time.thread_time_ns() - began) / 1e6)

        return call

    for name in HOOKS:
        setattr(connector, name, watched(name, getattr(connector, name)))
    answers = ask(serving, prompts, tokens)
    for name in HOOKS:
        delattr(connector, name)
    return work, answers


def reset(serving: Serving) -> Any:
    serving.rest()
    return serving.core.reset_prefix_cache(False, True)


def close(serving: Serving) -> Any:
    serving.close()
    return None


def fates(_: Serving) -> Any:
    """Tokens that were drafted so far, and those of them that were accepted."""
    return vllm_drafts.FATES


_PREEMPTED = [0]
_DAMAGED: list[list[str]] = [[]]
_FAILING = pytest.MonkeyPatch()
_FAILED = [0]
VERBS = {
    each.__name__: each
    for each in (
        ask,
        answers,
        likelihood,
        rest,
        forget,
        alter,
        noise,
        ends,
        misses,
        states_are_optional,
        leave_offload,
        offload_state,
        damage_before_load,
        damaged,
        fail_loads,
        empty,
        policy,
        leave_memory,
        explain,
        state,
        resident,
        hook_work,
        fates,
        embedded,
        converse,
        reset,
        close,
    )
}


def serve(model: str, cache: Any, options: dict[str, Any]) -> None:
    """Until it is told to close, or nobody listens any more.

    Loads that a step waits for are served here whatever the version: none fails in these engines.
    Of the options ``beside`` names the connectors of a ``MultiConnector`` (``vllm_beside``),
    ``behind_vllms_offload`` a tier of its offload (``vllm_tiering``), and ``splits_steps`` is for
    Mamba 2 (``vllm_states``). What is found is loaded, however fast so small a model computes.
    """
    cache = cache if cache is None else {"report_prefill": False, **cache}
    engine.RECOMPUTES_IN_STEP = engine.TESTED[0]
    says = os.fdopen(os.dup(1), "w")  # the engine's log must not get between the answers
    os.dup2(2, 1)
    if "speculative_config" in options:
        vllm_drafts.prepare()
    if options.pop("splits_steps", False):
        vllm_states.without_checkpoints()
    if tier := options.pop("behind_vllms_offload", None):
        transfer = vllm_tiering.config_of(tier)
        serving: Serving = Serving(model, **{**options, "kv_transfer_config": transfer})
    elif order := options.pop("beside", None):
        transfer = config_of(order, cache)
        serving = BesideServing(model, **{**options, "kv_transfer_config": transfer})
    else:
        serving = Serving(model, cache=cache, **options)
    vllm_drafts.watch(serving.core.scheduler)
    _count_preemptions(serving.core.scheduler)
    says.write(json.dumps("ready") + "\n")
    says.flush()
    for line in os.fdopen(0):
        verb, *arguments = json.loads(line)
        says.write(json.dumps(VERBS[verb](serving, *arguments)) + "\n")
        says.flush()
        if verb == "close":
            return


def measure(model: str, kind: str, directory: str) -> None:
    """One of the benchmark's engines, until nobody listens any more."""
    bench.serve(model, kind, directory)


def _count_preemptions(scheduler: Any) -> None:
    preempt = scheduler._preempt_request

    def counted(*args: Any, **how: Any) -> None:
        _PREEMPTED[0] += 1
        preempt(*args, **how)

    scheduler._preempt_request = counted

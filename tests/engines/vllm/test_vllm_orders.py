"""Several ranks, each with its share of layers and heads, stepped without an engine around them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from counting import counted
from vllm_desk import BLOCK, LAYERS

from kvlayer import Cache
from kvlayer.api.rank_worker import RankWorker
from kvlayer.errors import UnsupportedError
from kvlayer.tier.messages import Verb
from kvlayer_vllm import groups, layouts

PROMPT = list(range(3, 203))  # three chunks of 64 and 8 tokens
FROM, INTO = [1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16]
HEADS = 2
SHAPES = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]
"""Tensor ranks, stages of a pipeline. Of four ranks two hold each head."""


@pytest.fixture
def ranks(vllm_config: Any, spec: Any, kv_cache_config: Any, no_cache_home: None) -> Iterator[Any]:
    """``ranks(tensor, pipeline, **how)``: a desk with so many, or with ``latent`` MLA on each."""
    from vllm_desk import Desk

    made: list[Desk] = []

    def make(tensor: int = 1, pipeline: int = 1, *, latent: bool = False, **how: Any) -> Desk:
        held = spec("FullAttentionSpec", num_kv_heads=max(HEADS // tensor, 1))
        if latent:
            held = spec("MLAAttentionSpec", num_kv_heads=1, head_size=576)
        stages = [LAYERS] if pipeline == 1 else [LAYERS[:1], LAYERS[1:]]
        configs = [kv_cache_config((stages[n // tensor], held)) for n in range(tensor * pipeline)]
        how = {"tensor": tensor, "pipeline": pipeline, "remote": True, "form": "canonical", **how}
        made.append(Desk(vllm_config, *configs, **how))
        return made[-1]

    yield make
    for each in made:
        each.close()


def by_heads(at: Any, blocks: list[int]) -> dict[tuple[str, int], list[Any]]:
    """What blocks hold of each layer and head of the model, on every rank that has it."""
    found: dict[tuple[str, int], list[Any]] = {}
    tensor = len(at.rows_held) // len({next(iter(held)) for held in at.rows_held})
    for number, held in enumerate(at.rows_held):
        first = number % tensor * HEADS // tensor  # as vLLM deals heads out
        for name, each in held.items():
            for head in range(each.shape[1]):
                found.setdefault((name, first + head), []).append(each[blocks][:, head].clone())
    return found


def alike(at: Any) -> None:
    """Ranks that hold the same head hold the same of it, as in an engine."""
    written: dict[tuple[str, int], Any] = {}
    tensor = len(at.rows_held) // len({next(iter(held)) for held in at.rows_held})
    for number, held in enumerate(at.rows_held):
        first = number % tensor * HEADS // tensor
        for name, each in held.items():
            for head in range(each.shape[1]):
                each[:, head] = written.setdefault((name, first + head), each[:, head].clone())


def loads(at: Any, request: Any) -> int:
    """A request that finds its prefix; its tokens are in blocks ``INTO`` then."""
    at.half.arrived(request)
    found = int(at.admit(request, [*INTO, 17]))
    while found and request.request_id not in at.run().received:
        pass
    return found


# -- which rank holds what -------------------------------------------------------------------------


@pytest.mark.parametrize(("tensor", "pipeline"), SHAPES)
def test_every_rank_loads_its_own_layers_and_heads(
    tensor: int, pipeline: int, ranks: Any, request_of: Any
) -> None:
    at = ranks(tensor, pipeline)
    alike(at)
    at.answer(request_of(PROMPT), [*FROM, 7])
    was = by_heads(at, FROM)
    assert loads(at, request_of([*PROMPT, 7], request_id="two")) == 192
    now = by_heads(at, INTO)
    assert len(now) == len(LAYERS) * HEADS
    for place, copies in now.items():
        assert all(torch.equal(was[place][0], each) for each in copies), place


@pytest.mark.parametrize("reads", SHAPES[:3])
@pytest.mark.parametrize("writes", SHAPES[:3])
def test_engines_of_other_sizes_read_each_other(
    writes: tuple[int, int], reads: tuple[int, int], ranks: Any, below: Any, request_of: Any
) -> None:
    first = ranks(*writes, head_shards=HEADS, tiers=below)
    alike(first)
    first.answer(request_of(PROMPT), [*FROM, 7])
    was = by_heads(first, FROM)
    first.close()
    second = ranks(*reads, head_shards=HEADS, tiers=below)
    assert loads(second, request_of([*PROMPT, 7], request_id="two")) == 192
    for place, copies in by_heads(second, INTO).items():
        assert all(torch.equal(was[place][0], each) for each in copies), place


def test_a_map_of_heads_that_is_not_vllms_loads_the_wrong_ones(
    ranks: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above sees it: of four ranks and two heads, rank 1 has head 0, not head 1."""
    monkeypatch.setattr(layouts, "_heads", lambda held, rank, _: (rank % HEADS, rank % HEADS + 1))
    at = ranks(4)
    alike(at)
    at.answer(request_of(PROMPT), [*FROM, 7])
    was = by_heads(at, FROM)
    assert loads(at, request_of([*PROMPT, 7], request_id="two")) == 192
    now = by_heads(at, INTO)
    assert not all(torch.equal(was[place][0], each) for place in now for each in now[place])


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (4, 1), (2, 2)])
def test_a_latent_is_stored_once_for_all_tensor_ranks(
    tensor: int, pipeline: int, ranks: Any, request_of: Any
) -> None:
    at = ranks(tensor, pipeline, latent=True)
    for number, held in enumerate(at.rows_held):  # every rank of a stage computes the same
        for name, each in held.items():
            each.copy_(at.rows_held[number - number % tensor][name])
    at.answer(request_of(PROMPT), [*FROM, 7])
    was = at.rows(FROM)
    host = at.half.portal.cache.control.stats().tiers[0]
    assert host.objects == 3 * pipeline  # of three chunks
    assert loads(at, request_of([*PROMPT, 7], request_id="two")) == 192
    for before, now in zip(was, at.rows(INTO), strict=True):
        assert torch.equal(before, now)


def test_who_is_taken_for_another_rank_moves_nothing(
    ranks: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = ranks(2)
    at.half._hands._shares = (*reversed(at.half._hands._shares),)
    at.answer(request_of(PROMPT), [*FROM, 7])
    assert at.found(PROMPT) == 0


@pytest.mark.parametrize(
    ("missing", "message"), [([1], r"2 workers \[1\] have not"), ([0, 1], "no worker")]
)
def test_a_worker_that_is_missing_turns_it_off(
    missing: list[int], message: str, ranks: Any
) -> None:
    at = ranks(2)
    heard = {n: each for n, each in at.introductions().items() if n not in missing}
    with pytest.raises(UnsupportedError, match=message):
        at.half.open(heard)


def test_stages_that_do_not_divide_the_layers_are_refused(ranks: Any) -> None:
    at = ranks(1, 2)
    heard = at.introductions()
    held = heard[0].rank.layout.groups[0]
    around = replace(held, group=replace(held.group, layers=(0, 5)))
    layout = replace(heard[0].rank.layout, groups=(around,))
    heard[0] = replace(heard[0], rank=replace(heard[0].rank, layout=layout))
    with pytest.raises(UnsupportedError, match=r"rank 0 has layers \(0, 5\) of \(0, 1, 5\)"):
        at.half.open(heard)


def test_native_blocks_of_several_ranks_are_refused_by_name(ranks: Any) -> None:
    with pytest.raises(UnsupportedError, match="form = 'native' keeps the blocks of one rank"):
        ranks(2, form="native")


# -- no step waits ---------------------------------------------------------------------------------


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``hanging(verb)``: orders of this kind hang on every rank, until its event is set."""
    go_on = threading.Event()
    carry_out = RankWorker.carry_out

    def hang(verb: Verb) -> threading.Event:
        async def late(rank: RankWorker, order: Any, view: Any) -> bytes:
            if rank.order(order).verb is verb:
                await asyncio.get_running_loop().run_in_executor(None, go_on.wait)
            return await carry_out(rank, order, view)

        monkeypatch.setattr(RankWorker, "carry_out", late)
        return go_on

    yield hang
    go_on.set()


def ordered(at: Any, scheduled: Any = None) -> None:
    """Steps until both ranks were ordered something that has not ended."""
    at.run(scheduled)
    while not all(each._orders._under_way for each in at.workers):
        at.run()


def test_steps_do_not_wait_for_what_is_gathered(ranks: Any, hanging: Any, request_of: Any) -> None:
    at = ranks(2)
    go_on = hanging(Verb.GATHER)
    request = request_of(PROMPT)
    at.half.arrived(request)
    at.admit(request, [*FROM, 7])
    ordered(at, {request: 200})
    for _ in range(3):
        at.run()  # it would never end
    at.finish(request)
    at.run()
    assert at.found(PROMPT) == 0 and at.held() == set(FROM)
    go_on.set()
    at.rest()
    assert at.found(PROMPT) == 192


def test_steps_do_not_wait_for_what_is_scattered(ranks: Any, hanging: Any, request_of: Any) -> None:
    at = ranks(2)
    at.answer(request_of(PROMPT), [*FROM, 7])
    was = at.rows(FROM)
    go_on = hanging(Verb.SCATTER)
    again = request_of([*PROMPT, 7], request_id="two")
    at.half.arrived(again)
    assert at.admit(again, [*INTO, 17]) == 192
    ordered(at)
    for _ in range(3):
        assert "two" not in at.run().received
    go_on.set()
    while "two" not in at.run().received:
        pass
    for before, now in zip(was, at.rows(INTO), strict=True):
        assert torch.equal(before, now)


def test_joining_holds_no_step(
    ranks: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To map and pin memory takes its time: orders wait for it, and no step does."""
    go_on, opened = threading.Event(), RankWorker.open

    def late(*args: Any, **how: Any) -> Any:
        go_on.wait()
        return opened(*args, **how)

    monkeypatch.setattr(RankWorker, "open", late)
    at = ranks(2)
    request = request_of(PROMPT)
    at.half.arrived(request)
    at.admit(request, [*FROM, 7])
    ordered(at, {request: 200})
    go_on.set()
    at.finish(request)
    at.rest()
    assert at.found(PROMPT) == 192


def test_blocks_that_a_rank_still_reads_are_held_whatever_their_request_does(
    ranks: Any, hanging: Any, request_of: Any
) -> None:
    """No step waits for the ranks: nobody else is given the blocks until both have answered."""
    at = ranks(2)
    go_on = hanging(Verb.GATHER)
    request = request_of(PROMPT)
    at.half.arrived(request)
    at.admit(request, [*FROM, 7])
    ordered(at, {request: 200})
    was = at.rows(FROM)
    step = at.begin(preempted=[request])  # it would never end
    at.accept(step)
    at.preempt(request)
    at.finish(request)
    for _ in range(3):
        at.run()
    assert at.held() == set(FROM)
    go_on.set()
    at.rest()
    assert at.held() == set()
    for held in at.rows_held:
        for tensor in held.values():
            tensor[1:7] = 7.5  # another request computes in them
    assert loads(at, request_of([*PROMPT, 7], request_id="two")) == 192
    for before, now in zip(was, at.rows(INTO), strict=True):
        assert torch.equal(before, now)


def test_a_reset_does_not_wait_for_what_ranks_are_copying(
    ranks: Any, hanging: Any, request_of: Any
) -> None:
    """They answer with a step, and vLLM takes none meanwhile."""
    at = ranks(2)
    go_on = hanging(Verb.GATHER)
    request = request_of(PROMPT)
    at.half.arrived(request)
    at.admit(request, [*FROM, 7])
    ordered(at, {request: 200})
    assert at.half.reset()
    go_on.set()
    at.finish(request)
    at.rest()
    at.half.portal.call(Cache.flush)
    assert at.found(PROMPT) == 0 and not at.half.portal.cache.control.stats().tiers[0].objects


def test_an_order_that_is_none_is_answered_as_a_failure(
    ranks: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: Any) -> bytes:
        raise ValueError("not an order")

    at = ranks(2)
    monkeypatch.setattr(RankWorker, "carry_out", fails)
    at.answer(request_of(PROMPT), [*FROM, 7])  # nothing is owed
    assert at.found(PROMPT) == 0


# -- what it costs the scheduler -------------------------------------------------------------------

INSTRUCTIONS = 45_000
"""Of a call: less than a millisecond. A third is vLLM's: to hold 1,000 blocks takes 75 us."""
IN_STEP = 5_000
"""Of a worker's call, while the device may be waiting for its step: less than 200 us."""


def test_orders_for_eight_ranks_do_not_hold_the_scheduler(
    vllm_config: Any,
    spec: Any,
    kv_cache_config: Any,
    request_of: Any,
    figures: Any,
    no_cache_home: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """32,000 tokens are stored by eight ranks of one head each, then loaded."""
    from vllm_desk import Desk

    monkeypatch.setattr(groups, "total_kv_heads", lambda _: 8)
    held = spec("FullAttentionSpec", num_kv_heads=1, head_size=32)
    blocks = 32_000 // BLOCK
    config = kv_cache_config((LAYERS[:1], held), blocks=2 * blocks + 2)
    tiers = [{"url": "cpu://?capacity=1GiB"}]
    sizes = {"tokens_per_chunk": 256, "held_share": 1.0}
    at = Desk(vllm_config, config, tensor=8, tiers=tiers, **sizes)
    longest = dict.fromkeys(("step", "heard", "before_step", "load", "answers"), 0)

    def watched(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            found, instructions, _ = counted(lambda: hook(*args))
            longest[name] = max(longest[name], instructions)
            return found

        return call

    for name in longest:
        for whose in (at.half, *at.workers):
            if hasattr(whose, name):
                monkeypatch.setattr(whose, name, watched(name, getattr(whose, name)))
    prompt = [n * 7919 % 50_000 for n in range(32_000)]
    request = request_of(prompt)
    at.half.arrived(request)
    at.pool.touch(at.pool.blocks[1 : blocks + 1])  # as vLLM does: they are the request's
    at.admit(request, range(1, blocks + 1))
    at.run({request: 32_000})
    at.finish(request)
    at.rest()
    again = request_of([*prompt, 7], request_id="two")
    at.half.arrived(again)
    assert at.admit(again, range(blocks + 1, 2 * blocks + 2)) == 32_000
    while "two" not in at.run().received:
        pass
    figures("vllm.orders", ranks=8, tokens=32_000, **longest)
    at.close()
    assert min(longest.values()) > 0 and max(longest.values()) <= INSTRUCTIONS, longest
    in_steps = [longest[name] for name in ("before_step", "load", "answers")]
    assert max(in_steps) <= IN_STEP, longest

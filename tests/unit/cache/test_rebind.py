"""Weights updated in place: whoever straddles the change is neither stored nor served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import WEIGHTS, config, group, layout, stored_files, tokens
from engine import Engine, same
from hang import HANG
from stacks import check_accounts

from kvlayer import Cache, Namespace
from kvlayer.errors import ArgumentError, ClosedError, IdentityError
from kvlayer.events import CacheRebound, Event
from kvlayer.identity.keys import ChunkChain, Scope
from kvlayer.results import Cause, RetrieveReport, StoreReport

TURNS = 30  # of the loop: more than a store or a load of these tests takes
LENGTH = 72  # four chunks and a tail
SPANS = 5
PROMPT = tokens(LENGTH)

OLD = Namespace(weights=WEIGHTS, groups=(group(),), compute_dtype="bfloat16", tokens_per_chunk=16)
NEW = replace(OLD, weights="sha256:" + "cd" * 32)


def opened(directory: Path | None = None, **more: Any) -> Any:
    return Cache.open(config(directory, **more), layout(), OLD)


class Model:
    """An engine whose weights are updated: its memory then holds other KV of the same prompt."""

    def __init__(self) -> None:
        self.engine = Engine(layout(), 64, 1)
        self.slots = self.engine.slots(LENGTH)
        self.old = self.engine.read(self.slots)

    def updated(self) -> None:
        other = Engine(layout(), 64, 2)
        for mine, its in zip(self.engine.caches, other.caches, strict=True):
            for tensor, new in zip(mine, its, strict=True):
                tensor.copy_(new)

    @property
    def now(self) -> list[torch.Tensor]:
        return self.engine.read(self.slots)

    def store(self, cache: Cache, prompt: Any = PROMPT, **more: Any) -> Any:
        return cache.store(prompt, self.engine.view(self.slots), **more)


async def served(cache: Cache, prompt: Any = PROMPT) -> tuple[int, list[torch.Tensor]]:
    """How much of a prompt is served, and what."""
    other = Engine(layout(), 64, 9)
    slots = other.slots(LENGTH, seed=4)
    async with cache.lookup(prompt) as hit:
        report = await cache.retrieve(hit, other.view(slots))
    assert report.tokens == hit.tokens and report.failed == ()
    return report.tokens, other.read(slots)


def begin(found: tuple[int, list[torch.Tensor]], right: list[torch.Tensor]) -> bool:
    """Whether what was served begins as it should."""
    count, planes = found
    return same([p[:count] for p in planes], [p[:count] for p in right])


async def idle(cache: Cache) -> None:
    """Wait until nothing is being written or read."""
    await cache.flush()
    for tier in cache.stack.lower:
        while tier.guard.inflight:
            await next(iter(tier.guard._calls)).ended()


async def settled(cache: Cache) -> None:
    """Every account is exact and nothing is held, once nothing is on its way to a tier."""
    await idle(cache)
    check_accounts(cache.stack.planner, idle=True)
    assert cache.control.stats().leases == 0


@pytest.mark.asyncio
async def test_each_epoch_serves_its_own_and_the_old_one_is_read_on_request(tmp_path: Path) -> None:
    model, heard = Model(), list[Event]()
    async with Cache.open(config(tmp_path), layout(), OLD, sinks=[heard.append]) as cache:
        await model.store(cache)
        await cache.rebind(NEW)
        assert cache.namespace == NEW
        model.updated()
        assert (await served(cache))[0] == 0
        assert (await model.store(cache)).stored == SPANS
        for tier in (None, "cpu"):  # from memory, then from the disk
            old = cache.chain(PROMPT, namespace=OLD)
            assert (await served(cache))[0] == (await served(cache, old))[0] == LENGTH
            assert begin(await served(cache), model.now)
            assert begin(await served(cache, old), model.old)
            if tier is None:
                await cache.control.clear("cpu")
        with pytest.raises(IdentityError, match="only read"):
            await model.store(cache, cache.chain(PROMPT, namespace=OLD))
        await cache.rebind(OLD)  # the old weights are back
        assert begin(await served(cache), model.old)
        await settled(cache)
    assert {path.relative_to(tmp_path).parts[1] for path in stored_files(tmp_path)} == {
        OLD.digest,
        NEW.digest,
    }
    rebound = [event for event in heard if isinstance(event, CacheRebound)]
    assert rebound == [
        CacheRebound(before=OLD.digest, now=NEW.digest, stopped=0),
        CacheRebound(before=NEW.digest, now=OLD.digest, stopped=0),
    ]
    async with opened(tmp_path) as cache:  # another process
        await cache.rebind(NEW)
        assert begin(await served(cache), model.now) and (await served(cache))[0] == LENGTH


@pytest.mark.asyncio
@pytest.mark.parametrize("to", [NEW, OLD], ids=["another", "the same"])
async def test_a_hit_of_the_old_epoch_is_refused_and_its_lease_given_back(to: Namespace) -> None:
    model, other = Model(), Engine(layout(), 64, 9)
    before = other.read(other.slots(LENGTH))
    async with opened() as cache:
        await model.store(cache)
        async with cache.lookup(PROMPT) as hit:
            assert hit.tokens == LENGTH
            await cache.rebind(to)
            for _ in range(2):
                report = await cache.retrieve(hit, other.view(other.slots(LENGTH)))
                assert report.tokens == 0
                (failure,) = report.failed
                assert (failure.cause, failure.span) == (Cause.REBOUND, hit.spans[0])
                assert cache.control.stats().leases == 0
            promoted = await cache.promote(hit)
            assert (promoted.tokens, promoted.failed[0].cause) == (0, Cause.REBOUND)
        assert cache.control.stats().tiers[0].misses[Cause.REBOUND] == 3
        assert same(before, other.read(other.slots(LENGTH)))
        assert (await served(cache))[0] == (LENGTH if to == OLD else 0)
        await settled(cache)


@pytest.mark.asyncio
async def test_a_request_that_keeps_its_chain_cannot_straddle() -> None:
    model = Model()
    async with opened() as cache:
        chain = cache.chain(PROMPT[:40])
        await cache.rebind(NEW)
        model.updated()
        report = await model.store(cache, chain.grown(PROMPT[40:]))
        assert (report.stored, report.skipped, report.dropped) == (0, 0, 0)
        assert [failure.cause for failure in report.failed] == [Cause.REBOUND] * SPANS
        assert (await served(cache, chain))[0] == 0
        (missed,) = (await cache.control.explain(chain)).misses
        assert (missed.start, missed.stop, missed.cause) == (0, 40, Cause.REBOUND)
        assert len(cache.stack.planner.directory) == 0
        again = cache.chain(chain)
        assert again.links is chain.links and not again.is_stale  # nothing is hashed
        assert (await model.store(cache, again.grown(PROMPT[40:]))).stored == SPANS
        assert cache.chain(again) is again
        with cache.begin_lookup(chain) as lookup:
            assert (await lookup).tokens == 0
        await settled(cache)


async def straddle(
    cache: Cache,
    work: Coroutine[Any, Any, Any],
    turns: int,
    then: Callable[[], None],
) -> Any:
    """Rebind while ``work`` is at one of its awaits; ``then`` at once when that has returned.

    ``turns`` of the loop after its start; 0: when it has ended.
    """
    task = asyncio.ensure_future(work)
    for _ in range(turns):
        await asyncio.sleep(0)
    if not turns:
        await asyncio.wait({task})
    await cache.rebind(NEW)
    then()
    return await task


@pytest.mark.asyncio
@pytest.mark.parametrize("write", ["through", "back"])
async def test_a_store_under_way_at_any_await_stores_nothing_of_the_new_weights(
    tmp_path: Path, write: str
) -> None:
    kept: set[int] = set()
    for turns in range(TURNS):
        model, told = Model(), list[int]()
        async with opened(tmp_path / str(turns), write=write) as cache:
            store = model.store(cache, on_gathered=lambda told=told: told.append(1))
            report: StoreReport = await straddle(cache, store, turns, model.updated)
            assert told == [1]
            assert report.stored + len(report.failed) == SPANS
            assert {failure.cause for failure in report.failed} <= {Cause.REBOUND}
            kept.add(report.stored)
            assert (await served(cache))[0] == 0
            found = await served(cache, cache.chain(PROMPT, namespace=OLD))
            assert begin(found, model.old)
            await settled(cache)
            await cache.control.clear("cpu")
            found = await served(cache, cache.chain(PROMPT, namespace=OLD))
            assert begin(found, model.old)  # what was queued then was written under its own name
            assert (found[0] > 0) == (report.stored > 0)
            assert (await served(cache))[0] == 0
            await settled(cache)
    assert kept == {0, SPANS}  # some were stopped, and some were through


@pytest.mark.asyncio
async def test_a_load_under_way_at_any_await_writes_nothing_after_that(tmp_path: Path) -> None:
    reports: list[RetrieveReport] = []
    async with opened(tmp_path) as cache:
        await Model().store(cache)
    for turns in [*range(TURNS), *range(TURNS)]:
        is_found = len(reports) >= TURNS  # then it is the load that is interrupted
        async with opened(tmp_path) as cache:
            if is_found:
                await cache.recovered()  # what is listed is found however late the disk answers
            other, seen = Engine(layout(), 64, 9), list[list[torch.Tensor]]()
            slots = other.slots(LENGTH)

            async def load(cache: Cache = cache, other: Engine = other, slots: Any = slots) -> Any:
                async with cache.lookup(PROMPT) as hit:
                    return hit.tokens, await cache.retrieve(hit, other.view(slots))

            def snapshot(other: Engine = other, seen: Any = seen, slots: Any = slots) -> None:
                seen.append([plane.clone() for plane in other.read(slots)])

            if is_found:
                async with cache.lookup(PROMPT) as hit:
                    assert hit.tokens == LENGTH
                    loading = cache.retrieve(hit, other.view(slots))
                    tokens_, report = hit.tokens, await straddle(cache, loading, turns, snapshot)
            else:
                tokens_, report = await straddle(cache, load(), turns, snapshot)
            reports.append(report)
            assert report.tokens == (0 if report.failed or not tokens_ else LENGTH)
            assert {failure.cause for failure in report.failed} <= {Cause.REBOUND}
            assert same(seen[0], other.read(slots))
            await settled(cache)
    assert any(report.failed for report in reports)
    assert any(report.tokens for report in reports)
    assert any(not report.failed and not report.tokens for report in reports)  # as a miss


@pytest.mark.asyncio
async def test_a_prefetch_or_pin_under_way_is_given_up(tmp_path: Path) -> None:
    given_up = 0
    async with opened(tmp_path) as cache:
        await Model().store(cache)
    for turns in range(TURNS):
        async with opened(tmp_path) as cache:
            job = cache.prefetch(PROMPT, deadline=1e6)
            pinned = asyncio.ensure_future(cache.control.pin(PROMPT, seconds=1e6))
            report = await straddle(cache, _report(job), turns, lambda: None)
            pin = await pinned
            if report.failed:
                given_up += 1
                assert (report.tokens, report.failed[0].cause) == (0, Cause.REBOUND)
                assert pin.tokens in (0, LENGTH)
            cache.control.unpin(pin)
            if not report.tokens:
                await idle(cache)
                assert cache.control.stats().tiers[0].pinned_nbytes == 0
    assert 0 < given_up < TURNS


async def _report(job: Any) -> RetrieveReport:
    found: RetrieveReport = await job
    return found


@pytest.mark.asyncio
async def test_while_the_weights_change_nothing_is_stored_or_served() -> None:
    model, before, heard = Model(), Engine(layout(), 64, 9), list[str]()
    async with opened() as cache:
        await model.store(cache)
        kept = before.read(before.slots(LENGTH))

        async def update() -> None:
            began = cache.chain(PROMPT)
            for prompt in (PROMPT, began, cache.chain(PROMPT, namespace=OLD)):
                async with cache.lookup(prompt) as hit:
                    assert hit.tokens == 0
            for prompt in (PROMPT, began):
                report = await model.store(cache, prompt)
                assert [f.cause for f in report.failed] == [Cause.REBOUND] * SPANS
            assert (await cache.prefetch(PROMPT)).tokens == 0
            model.updated()
            heard.append("updated")

        await cache.rebind(NEW, update)
        assert heard == ["updated"]
        assert (await served(cache))[0] == 0
        assert (await served(cache, cache.chain(PROMPT, namespace=OLD)))[0] == LENGTH
        assert (await model.store(cache)).stored == SPANS
        assert begin(await served(cache), model.now)
        assert same(kept, before.read(before.slots(LENGTH)))


@pytest.mark.asyncio
@pytest.mark.parametrize("ends", ["raises", "is cancelled"])
async def test_an_update_that_fails_leaves_the_cache_closed_until_it_is_rebound(ends: str) -> None:
    model = Model()
    async with opened() as cache:
        await model.store(cache)

        async def update() -> None:
            if ends == "raises":
                raise OSError("half of the weights are there")
            await asyncio.Event().wait()

        rebinding = asyncio.ensure_future(cache.rebind(NEW, update))
        await asyncio.sleep(0)
        rebinding.cancel() if ends == "is cancelled" else None
        with pytest.raises((OSError, asyncio.CancelledError)):
            await rebinding
        assert (await model.store(cache)).stored == 0
        assert (await served(cache))[0] == 0
        await cache.rebind(OLD)
        assert begin(await served(cache), model.old)
        assert (await served(cache))[0] == LENGTH
        await settled(cache)


@pytest.mark.asyncio
async def test_an_update_that_is_no_coroutine_function_is_refused_in_words() -> None:
    model = Model()
    async with opened() as cache:
        with pytest.raises(ArgumentError, match="must return what can be awaited") as caught:
            await cache.rebind(NEW, model.updated)  # type: ignore[arg-type]
        assert "async def" in (caught.value.hint or "")
        assert (await model.store(cache)).stored == 0  # it has changed the memory, or half of it
        await cache.rebind(NEW)
        assert (await model.store(cache)).stored == SPANS


@pytest.mark.asyncio
@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
async def test_while_any_update_changes_the_memory_nothing_is_stored_or_served(
    inside: bool,
) -> None:
    model, go = Model(), asyncio.Event()
    third = replace(OLD, weights="sha256:" + "ef" * 32)
    async with opened() as cache:

        async def slow() -> None:
            if inside:
                await cache.rebind(third)
            await go.wait()
            model.updated()

        first = asyncio.ensure_future(cache.rebind(NEW, slow))
        await asyncio.sleep(0)
        if not inside:
            await cache.rebind(third, partial(asyncio.sleep, 0))
        report = await model.store(cache)
        assert [failure.cause for failure in report.failed] == [Cause.REBOUND] * SPANS
        go.set()
        await first
        assert cache.namespace == third and (await served(cache))[0] == 0
        assert (await model.store(cache)).stored == SPANS
        assert begin(await served(cache), model.now)
        await settled(cache)


@pytest.mark.asyncio
async def test_rebinding_twice_at_once_waits_for_all_that_runs(tmp_path: Path) -> None:
    for turns in range(1, TURNS, 2):
        model = Model()
        async with opened(tmp_path / str(turns)) as cache:
            store = asyncio.ensure_future(model.store(cache))
            for _ in range(turns):
                await asyncio.sleep(0)
            third = replace(OLD, weights="sha256:" + "ef" * 32)
            await asyncio.gather(cache.rebind(NEW), cache.rebind(third))
            model.updated()
            await store
            assert cache.namespace == third
            for namespace in (NEW, third):
                assert (await served(cache, cache.chain(PROMPT, namespace=namespace)))[0] == 0
            assert begin(await served(cache, cache.chain(PROMPT, namespace=OLD)), model.old)
            await settled(cache)


@pytest.mark.asyncio
async def test_closing_and_rebinding_do_not_wait_for_each_other(tmp_path: Path) -> None:
    for turns in range(1, TURNS, 3):
        model = Model()
        async with opened(tmp_path / str(turns)) as cache:
            store = asyncio.ensure_future(model.store(cache))
            for _ in range(turns):
                await asyncio.sleep(0)
            rebinding = asyncio.ensure_future(cache.rebind(NEW))
            await asyncio.sleep(0)
        await rebinding
        report = await store
        assert report.stored + len(report.failed) == SPANS
        with pytest.raises(ClosedError):
            await cache.rebind(OLD)


@pytest.mark.asyncio
async def test_who_is_cancelled_by_somebody_else_meanwhile_stays_cancelled(tmp_path: Path) -> None:
    cut = 0
    for turns in range(1, TURNS):
        model = Model()
        async with opened(tmp_path / str(turns)) as cache:
            store = asyncio.ensure_future(model.store(cache))
            for _ in range(turns):
                await asyncio.sleep(0)
            rebinding = asyncio.ensure_future(cache.rebind(NEW))
            await asyncio.sleep(0)
            cut += store.cancel()
            await rebinding
            await asyncio.wait({store})
            await cache.flush()
            assert store.cancelled() or store.result().stored + len(store.result().failed) == SPANS
            await settled(cache)
    assert cut > 0


@pytest.mark.asyncio
async def test_a_task_is_not_left_cancelled_by_what_was_stopped_in_it(tmp_path: Path) -> None:
    model = Model()
    async with opened(tmp_path) as cache:

        async def whole() -> int:
            async with asyncio.timeout(HANG):
                await model.store(cache)
                await asyncio.sleep(0)
            task = asyncio.current_task()
            assert task is not None
            return task.cancelling()

        assert await straddle(cache, whole(), 2, model.updated) == 0


@pytest.mark.asyncio
async def test_what_cannot_lie_in_this_cache_is_refused(tmp_path: Path) -> None:
    model = Model()
    wrong = {
        "KV groups": replace(OLD, groups=(group(heads=4),)),
        "tokens_per_chunk": replace(OLD, tokens_per_chunk=32, tokens_per_tail=OLD.tokens_per_tail),
        "tokens_per_tail": replace(OLD, tokens_per_tail=4),
        "hash_scheme": replace(OLD, hash_scheme="pairs"),
        "weights are not known": replace(OLD, weights="process:" + "0" * 32),
    }
    async with opened(tmp_path) as cache:
        chain = cache.chain(PROMPT)
        for match, namespace in wrong.items():
            with pytest.raises(IdentityError, match=match):
                await cache.rebind(namespace)
            with pytest.raises(IdentityError, match=match):
                cache.chain(PROMPT, namespace=namespace)
        assert cache.namespace == OLD and not chain.is_stale
        assert (await model.store(cache, chain)).stored == SPANS


@pytest.mark.asyncio
async def test_a_chain_for_other_kv_is_refused_and_one_of_nobody_begins_now(tmp_path: Path) -> None:
    """Names are of tokens; whose KV is meant is the cache's to say, never a chain's."""
    model = Model()
    async with opened(tmp_path) as mine, Cache.open(config(tmp_path), layout(), NEW) as other:
        await model.store(mine)
        forged = other.chain(PROMPT)
        with pytest.raises(IdentityError, match="made for KV"):
            async with mine.lookup(forged):
                pass
        with pytest.raises(IdentityError, match="made for KV"):
            await model.store(mine, forged)
        made_up = ChunkChain(
            PROMPT, Scope(), tokens_per_chunk=16, tokens_per_tail=OLD.tokens_per_tail
        )
        assert (await served(other, made_up))[0] == 0
        assert (await served(mine, made_up))[0] == LENGTH
        with pytest.raises(IdentityError, match="made for KV"):
            await served(mine, made_up.named_in(NEW.digest))
        kept = mine.chain(PROMPT)
    async with opened(tmp_path) as again:  # a chain may outlive its cache
        assert (await served(again, kept))[0] == LENGTH


@pytest.mark.asyncio
async def test_evict_and_clear_take_what_every_served_namespace_has(tmp_path: Path) -> None:
    model = Model()
    async with opened(tmp_path) as cache:
        await model.store(cache)
        await cache.rebind(NEW)
        await model.store(cache)
        assert len(stored_files(tmp_path)) == 2 * SPANS
        await cache.control.evict(PROMPT)
        assert stored_files(tmp_path) == []
        await model.store(cache)
        await cache.rebind(OLD)
        await model.store(cache)
        await cache.control.clear()
        assert stored_files(tmp_path) == []
        assert (await served(cache))[0] == 0
        await settled(cache)


@pytest.mark.asyncio
async def test_what_another_process_stores_in_the_new_namespace_is_found(tmp_path: Path) -> None:
    model = Model()
    async with opened(tmp_path) as cache:
        model.updated()
        async with Cache.open(config(tmp_path), layout(), NEW) as other:
            await model.store(other)
        explained = await cache.control.explain(PROMPT[:64])
        assert {miss.cause for miss in explained.misses} == {Cause.OTHER_NAMESPACE}
        await cache.rebind(NEW)
        await cache.recovered()
        assert begin(await served(cache), model.now)
        assert (await served(cache))[0] == LENGTH
        explained = await cache.control.explain(cache.chain(PROMPT[:64], namespace=OLD))
        assert {miss.cause for miss in explained.misses} == {Cause.OTHER_NAMESPACE}


@pytest.mark.asyncio
async def test_what_lies_in_memory_of_another_epoch_is_explained_to_its_owner() -> None:
    model, ann = Model(), Scope(owner="ann")
    async with opened() as cache:
        await model.store(cache, scope=ann)
        await cache.rebind(NEW)
        (missed,) = (await cache.control.explain(PROMPT, scope=ann)).misses
        assert (missed.cause, missed.start, missed.stop) == (Cause.OTHER_NAMESPACE, 0, LENGTH)
        assert OLD.digest[:12] in missed.detail
        (missed,) = (await cache.control.explain(PROMPT, scope=Scope(owner="bob"))).misses
        assert missed.cause is Cause.NEVER_STORED


@pytest.mark.asyncio
async def test_many_epochs_leave_nothing_behind(tmp_path: Path) -> None:
    model = Model()
    async with opened(tmp_path, write="never") as cache:
        for number in range(200):
            await cache.rebind(replace(OLD, weights=f"sha256:{number:064x}"))
            await model.store(cache, PROMPT[:LENGTH])
        stack = cache.stack
        await cache.recovered()
        await cache.rebind(NEW)
        await cache.recovered()
        assert len(stack.planner.served()) == len(stack.lower[0].listed) == 64
        assert stack.planner.served()[-1] == cache.namespace.digest
        assert len(stack._recoveries) == 1 and not stack.epochs._running
        assert stack.planner.counts([]).used_nbytes <= stack.planner.counts([]).capacity_nbytes
        await cache.control.clear()
        await settled(cache)

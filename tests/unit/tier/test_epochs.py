"""What runs in an epoch is stopped when it ends, and whoever ends it waits for that."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress

import pytest
from stacks import CHUNK, NAMESPACE, chain_of, check_accounts, holds_all, make_planner

from kvlayer.identity.epoch import Epoch
from kvlayer.results import Cause
from kvlayer.tier.epochs import EpochOver, Epochs
from kvlayer.tier.planner.planner import Planner


class Work:
    """A task that moves KV of an epoch until it is stopped; its memory is back a little later."""

    def __init__(self, epochs: Epochs, epoch: Epoch | None = None) -> None:
        self.epochs, self.epoch = epochs, epoch or epochs.current
        self.let_go = asyncio.Event()
        self.is_over = False
        self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> str:
        try:
            with self.epochs.within(self.epoch):
                try:
                    await asyncio.Event().wait()
                finally:
                    await self.let_go.wait()
                    self.is_over = True
        except EpochOver:
            return "over"
        return "whole"


@pytest.mark.asyncio
async def test_closing_stops_what_runs_and_opening_waits_until_it_has_let_go() -> None:
    epochs = Epochs("a")
    first = epochs.current
    some = [Work(epochs) for _ in range(3)]
    await asyncio.sleep(0)
    assert epochs.close("b") == 3
    assert epochs.close("b") == 0  # they know already
    closed = epochs.current
    assert first.is_over and closed.is_over
    ended = asyncio.ensure_future(epochs.ended())
    for work in some:
        await asyncio.sleep(0)
        assert not ended.done()
        work.let_go.set()
    await ended
    assert all(work.is_over for work in some)
    assert [await work.task for work in some] == ["over"] * 3
    assert epochs.current is closed
    with epochs.changing():
        assert epochs.current.is_over
    assert epochs.current.namespace == "b" and not epochs.current.is_over


@pytest.mark.asyncio
async def test_nothing_begins_in_an_epoch_that_is_over_or_while_none_is_open() -> None:
    epochs = Epochs("a")
    first = epochs.current
    epochs.close("b")
    for epoch in (first, epochs.current):
        with pytest.raises(EpochOver), epochs.within(epoch):
            pytest.fail("it began")
    await epochs.ended()
    with epochs.within(None):
        pass


@pytest.mark.asyncio
@pytest.mark.parametrize("order", ["first ends first", "last ends first"])
async def test_who_closed_last_names_the_epoch_and_who_ends_last_opens_it(order: str) -> None:
    epochs = Epochs("a")
    first, last = epochs.changing(), epochs.changing()
    epochs.close("b")
    first.__enter__()
    epochs.close("c")
    last.__enter__()
    for each in (first, last) if order == "first ends first" else (last, first):
        assert epochs.current.is_over
        each.__exit__(None, None, None)
    assert epochs.current.namespace == "c" and not epochs.current.is_over


@pytest.mark.asyncio
@pytest.mark.parametrize("fails", ["first", "last"])
async def test_memory_that_somebody_failed_to_change_is_not_opened(fails: str) -> None:
    epochs = Epochs("a")
    with suppress(ZeroDivisionError), ExitStack() as first:
        epochs.close("b")
        first.enter_context(epochs.changing())
        with suppress(ZeroDivisionError):
            epochs.close("c")
            with epochs.changing():
                assert fails != "last" or 1 / 0
        assert fails != "first" or 1 / 0
    assert epochs.current.namespace == "c" and epochs.current.is_over
    epochs.close("d")
    with epochs.changing():
        pass
    assert epochs.current.namespace == "d" and not epochs.current.is_over


@pytest.mark.asyncio
async def test_what_is_cancelled_by_others_as_well_is_cancelled() -> None:
    epochs = Epochs("a")
    work = Work(epochs)
    await asyncio.sleep(0)
    epochs.close("b")
    work.task.cancel()
    work.let_go.set()
    await epochs.ended()
    with pytest.raises(asyncio.CancelledError):
        await work.task


@pytest.mark.asyncio
async def test_who_waits_may_be_cancelled_and_others_wait_on() -> None:
    epochs = Epochs("a")
    work = Work(epochs)
    await asyncio.sleep(0)
    epochs.close("b")
    one, two = (asyncio.ensure_future(epochs.ended()) for _ in range(2))
    await asyncio.sleep(0)
    one.cancel()
    work.let_go.set()
    await two
    assert one.cancelled() and await work.task == "over"


def _planned(planner: Planner, epoch: Epoch) -> None:
    chain = chain_of(3 * CHUNK).bound(epoch)
    todo = planner.plan_store(chain, 0, tail=False, holds=holds_all)
    epoch.is_over = True
    failed = planner.gathered(todo, ())
    assert [failure.cause for failure in failed] == [Cause.REBOUND] * 3
    assert todo.gathers == [] and todo.spans == []
    planner.settle(chain, todo.gathers)


def test_what_was_gathered_when_its_epoch_had_ended_is_not_kept() -> None:
    """Whoever was to stop the gather may have failed to: the planner looks itself."""
    planner = make_planner()
    _planned(planner, Epoch(NAMESPACE))
    assert planner.match(chain_of(3 * CHUNK)).tokens == 0
    assert len(planner.directory) == 0 and len(planner.promises) == 0
    check_accounts(planner, idle=True)

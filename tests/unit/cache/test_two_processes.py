"""The planner in one process, its ranks in others: one slab, and nothing but messages between."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from caches import config, layout, stored_files, tokens
from engine import Engine
from hang import HANG
from rank_process import BLOCKS, digest, held, receive, send
from stacks import check_accounts

from kvlayer import Cache, Portal
from kvlayer.runtime.job import Job
from kvlayer.tier.messages import Completion, Order, Verb
from kvlayer.tier.ranks.rank_team import RankTeam, RemoteView

SCRIPT = Path(__file__).parents[2] / "support" / "rank_process.py"
HEADS = {1: [(0, 2)], 2: [(0, 1), (1, 2)]}
HERE, THERE = list(range(5, 83)), list(range(40, 118))


class Process:
    """A rank's process, and the pipe an engine would have to it."""

    def __init__(self, number: int, heads: tuple[int, int], greeting: bytes) -> None:
        self.heads = heads
        path = os.pathsep.join([str(SCRIPT.parent), *filter(None, sys.path)])
        self.popen = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(number), f"{heads[0]}-{heads[1]}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        self.send(greeting)

    def send(self, message: object) -> None:
        assert self.popen.stdin is not None
        send(self.popen.stdin, message)

    def receive(self) -> Any:
        assert self.popen.stdout is not None
        return receive(self.popen.stdout)

    def ask(self, do: str, **fields: object) -> Any:
        self.send({"do": do, **fields})
        return self.receive()

    def end(self) -> None:
        """Ended, whatever it does; it must not have failed before."""
        assert self.popen.stdin is not None and self.popen.stdout is not None
        self.popen.stdin.close()
        code = self.popen.wait(HANG)
        self.popen.stdout.close()
        assert code in (0, -9)


@contextmanager
def planned(directory: Path, ranks: int) -> Generator[tuple[Portal, RankTeam, list[Process]]]:
    with ExitStack() as stack:
        fleet = RankTeam([held(heads) for heads in HEADS[ranks]])
        portal = stack.enter_context(
            Portal.open(config(directory, host="1MiB"), layout(), ranks=fleet)
        )
        processes: list[Process] = []
        for number, heads in enumerate(HEADS[ranks]):
            processes.append(Process(number, heads, fleet.greeting()))
            stack.callback(processes[-1].end)
        assert [process.receive() for process in processes] == ["joined"] * ranks
        yield portal, fleet, processes


def drive(job: Job[Any], fleet: RankTeam, processes: list[Process], slots: list[int]) -> Any:
    """Pass messages on until the job is done."""
    while not job.done():
        for order in fleet.take(0.05):
            process = processes[order.rank]
            fleet.complete(process.ask("order", order=order.to_bytes(), slots=slots))
    return job.wait(0)


async def clear_host(cache: Cache) -> None:
    await cache.control.clear("cpu")


@pytest.mark.parametrize("ranks", [1, 2])
def test_kv_goes_from_one_process_to_disk_and_back_into_it_through_anothers_memory(
    tmp_path: Path, ranks: int
) -> None:
    with planned(tmp_path, ranks) as (portal, fleet, processes):
        for number, process in enumerate(processes):
            process.ask("seed", seed=10 + number)
        store = portal.submit(Cache.store, tokens(78), RemoteView.of("request-1", range(78)))
        report = drive(store, fleet, processes, HERE)
        assert (report.stored, report.failed) == (5, ())
        assert len(stored_files(tmp_path)) == 5 * ranks  # committed by this process
        portal.call(clear_host)
        for process in processes:
            process.ask("seed", seed=77)
        with portal.lookup(tokens(78)) as lookup:
            assert lookup.wait(HANG).by_tier == {"cpu": 0, "file": 78}
            load = portal.submit(Cache.retrieve, lookup.hit, RemoteView.of("r-2", range(78)))
            assert drive(load, fleet, processes, THERE).tokens == 78
        for number, process in enumerate(processes):
            # What the rank had, known here by its seed alone: no byte of it came over the pipe.
            before = Engine(held(process.heads), BLOCKS, 10 + number)
            assert process.ask("digest", slots=THERE) == digest(before, HERE)
        check_accounts(portal.cache.stack.planner, idle=True)


def test_a_rank_killed_in_mid_gather_leaves_nothing_behind(tmp_path: Path) -> None:
    with planned(tmp_path, 2) as (portal, fleet, processes):
        processes[1].ask("stick")
        store = portal.submit(Cache.store, tokens(78), RemoteView.of("request-1", range(78)))
        orders = dict(_by_rank(fleet, 2))
        whole = processes[0].ask("order", order=orders[0].to_bytes(), slots=HERE)
        fleet.complete(whole)
        assert processes[1].ask("order", order=orders[1].to_bytes(), slots=HERE) == "half-way"
        slab = portal.cache.stack.objects.slab
        first = orders[1].pieces[0]
        assert any(slab.view(first.offset, first.nbytes))  # it has written, here
        processes[1].popen.kill()
        assert processes[1].popen.wait(HANG) == -9
        assert not store.done()
        fleet.lost(1, "killed")  # as the engine that owns the process finds out
        report = store.wait(HANG)
        assert report.stored == 0 and len(report.failed) == 5
        assert stored_files(tmp_path) == []
        with portal.lookup(tokens(78)) as lookup:
            assert lookup.wait(HANG).tokens == 0
        planner = portal.cache.stack.planner
        assert planner.host.extents.used == 0
        check_accounts(planner, idle=True)
        # The engine starts the rank anew, and everything works again.
        processes[1].end()
        processes[1] = Process(1, (1, 2), fleet.greeting())
        assert processes[1].receive() == "joined"
        fleet.joined(1)
        again = portal.submit(Cache.store, tokens(78), RemoteView.of("request-1", range(78)))
        assert drive(again, fleet, processes, HERE).stored == 5
        processes[1].end()


def _by_rank(fleet: RankTeam, count: int) -> Iterator[tuple[int, Order]]:
    while count:
        for order in fleet.take(10):
            count -= 1
            yield order.rank, order


def test_a_process_refuses_what_is_no_order_for_it_and_goes_on(tmp_path: Path) -> None:
    with planned(tmp_path, 1) as (portal, fleet, (process,)):
        store = portal.submit(Cache.store, tokens(78), RemoteView.of("request-1", range(78)))
        ((_, order),) = _by_rank(fleet, 1)
        for packed in (b"junk", order._replace(rank=3).to_bytes(), order.to_bytes()[:-9]):
            refusal = process.ask("order", order=packed, slots=HERE)
            assert isinstance(refusal, str) and "order" in refusal
        short = process.ask("order", order=order.to_bytes(), slots=HERE[:9])
        answer = Completion.from_bytes(short)
        assert len(answer.missed) == answer.asked == len(order.pieces)
        assert order.verb is Verb.GATHER
        fleet.complete(process.ask("order", order=order.to_bytes(), slots=HERE))
        assert store.wait(HANG).stored == 5

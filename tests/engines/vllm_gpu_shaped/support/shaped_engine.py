"""vLLM's real scheduler and both halves of the connector, around a model that is a table.

:meth:`Engine.turn` is ``EngineCore.step_with_batch_queue``: steps are scheduled until ``depth`` of
them are under way, then the oldest one is heard. When ranks run their hooks and devices compute in
between is the seed's choice; never later than vLLM hears of the step.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from shaped_device import Behind, Device
from shaped_rank import Batch, Rank, Work, WrongRead
from shaped_setting import BLOCK, Configs
from shaped_text import Text

__all__ = ["Engine"]

_MOST_FRUITLESS = 40  # a copy waits for less


def _nothing() -> None:
    """What happens between a step and its answer, mostly."""


class Engine:
    """One engine, stepped by hand. Close it."""

    def __init__(
        self, configs: Configs, rng: random.Random, device: Callable[[], Device] = Behind
    ) -> None:
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.structured_output import StructuredOutputManager

        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self._setting, self._rng = configs.setting, random.Random(0)
        config = configs.engine()
        self.ranks = [Rank(configs, number, device()) for number in range(self._setting.ranks)]
        kind = AsyncScheduler if self._setting.is_async else Scheduler
        self.scheduler: Any = kind(
            vllm_config=config,
            kv_cache_config=configs.kv_cache(),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
        )
        self.connector = self.scheduler.connector
        self._aggregator = self._aggregates()
        self._under_way: deque[Batch] = deque()
        self._not_run: list[deque[Batch]] = [deque() for _ in self.ranks]
        self._texts: dict[str, Text] = {}
        self.live: dict[str, Any] = {}
        """vLLM's requests that are not over."""
        self.steps = self.preempted = self.finished = 0
        self._fruitless = 0
        """Steps in a row that compute nothing."""
        self.wrong_answers: list[str] = []
        while self.is_busy:  # with workers elsewhere, which introduce themselves
            self.turn()
        assert self.connector.scheduler.is_open
        self._rng, self.steps = rng, 0

    def _aggregates(self) -> Any:
        from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator

        if not self._setting.is_remote:
            return None  # vLLM's executor for one process has none
        return KVOutputAggregator.from_connector(self.connector, len(self.ranks))

    # -- requests ----------------------------------------------------------------------------------

    def ask(self, name: str, prompt: Sequence[int], tokens: int) -> None:
        """A request arrives, for ``tokens`` tokens of an answer."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        request = Request(
            request_id=name,
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(max_tokens=tokens, ignore_eos=True),
            pooling_params=None,
            block_hasher=self._hasher,
        )
        self._texts[name], self.live[name] = Text(prompt), request
        self.scheduler.add_request(request)

    def abort(self, name: str) -> None:
        """It is over, whatever of it is under way."""
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self._over()

    def said(self, name: str) -> list[int]:
        """Prompt and answer of a request, as far as it was computed."""
        return [*self.live[name].all_token_ids]

    # -- steps -------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        return bool(self.scheduler.has_requests() or self._under_way)

    def turn(self, between: Callable[[], None] = _nothing) -> None:
        """Schedule a step, or hear of the oldest one where no more fit.

        ``between`` is called where vLLM takes aborts: the step has run, and was not heard yet.
        """
        if self.scheduler.has_requests():
            batch = self._scheduled()
            is_full = len(self._under_way) >= self._setting.depth
            if not is_full and (batch.works or self.scheduler.has_requests()):
                return
        if self._under_way:
            self._hear(self._under_way.popleft(), between)
            self._over()

    def _scheduled(self) -> Batch:
        output, works = self.scheduler.schedule(), list[Work]()
        for name, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            tables = self.scheduler.kv_cache_manager.get_block_ids(name)
            stop = request.num_computed_tokens
            works.append(
                Work(
                    name,
                    self._texts[name],
                    tuple(tuple(table) for table in tables),
                    stop - count,
                    stop,
                    samples=not request.is_prefill_chunk,
                )
            )
        self.steps += 1
        self._fruitless = 0 if works else self._fruitless + 1
        self.preempted += len(output.preempted_req_ids or ())
        batch = Batch(self.steps, output, works)
        self._under_way.append(batch)
        for number, waiting in enumerate(self._not_run):
            waiting.append(batch)
            if not self._setting.is_remote:
                self._run_until(number, batch.number)
        self._ranks_go_on()
        return batch

    def _ranks_go_on(self) -> None:
        """Other processes and devices have come as far as the seed says."""
        for number, rank in enumerate(self.ranks):
            reached = self._rng.choice(self._under_way).number
            if self._rng.random() < 0.5:
                self._run_until(number, reached)
            if self._rng.random() < 0.3:
                left = self._not_run[number]
                rank.catch_up(min(reached, left[0].number - 1 if left else reached))

    def _run_until(self, number: int, step: int) -> None:
        waiting = self._not_run[number]
        while waiting and waiting[0].number <= step:
            self.ranks[number].run(waiting.popleft())

    def _hear(self, batch: Batch, between: Callable[[], None]) -> None:
        """Every rank has run the step, and so has its device: vLLM takes the output."""
        for number, rank in enumerate(self.ranks):
            self._run_until(number, batch.number)
            rank.catch_up(batch.number)
        answers = [batch.answers[number] for number in range(len(self.ranks))]
        answer = answers[0] if self._aggregator is None else self._aggregator.aggregate(answers)
        answer.sampled_token_ids = [self._sampled(batch, work) for work in batch.works]
        between()
        self.scheduler.update_from_output(batch.output, answer)

    def _sampled(self, batch: Batch, work: Work) -> list[int]:
        if not work.samples:
            return []
        token = work.text.upto(work.stop + 1)[work.stop]
        return [token + 1 if work.request_id in batch.wrong else token]

    def _over(self) -> None:
        """Requests that have ended have said what their text says."""
        for name, request in list(self.live.items()):
            if name in self.scheduler.requests and not request.is_finished():
                continue
            if self.said(name) != self._texts[name].upto(request.num_tokens):
                self.wrong_answers.append(name)
            self.finished += 1
            del self.live[name]

    @property
    def is_stuck(self) -> bool:
        """vLLM computes nothing, and does not wait for kvlayer.

        Requests whose load has ended may hold all blocks, and then none of them gets its next one:
        vLLM preempts what runs, and none of them does.
        """
        half = self.connector.scheduler
        waits = len(half._promises) + len(half._held)
        return bool(self.live) and self._fruitless > _MOST_FRUITLESS and not waits

    # -- what came of it ---------------------------------------------------------------------------

    @property
    def wrong_reads(self) -> list[WrongRead]:
        """Those that vLLM was not told of in the same step."""
        return [each for rank in self.ranks for each in rank.wrong if not each.is_reported]

    @property
    def reads(self) -> int:
        return sum(rank.reads for rank in self.ranks)

    @property
    def missing_blocks(self) -> int:
        """Blocks that nobody gave back; one is vLLM's own."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return self._setting.blocks - 1 - int(pool.get_num_free_blocks())

    @property
    def troubles(self) -> int:
        """Hooks of kvlayer's that raised."""
        return sum(each.troubles for each in (self.connector, *(r.connector for r in self.ranks)))

    @property
    def loops(self) -> list[Any]:
        """Those on which kvlayer moves bytes: the scheduler's, then the ranks' own."""
        orders = [rank.connector._worker._orders for rank in self.ranks]
        return [self.connector.scheduler.portal, *(each._thread for each in orders if each)]

    def close(self) -> None:
        self.connector.shutdown()
        for rank in self.ranks:
            rank.connector.shutdown()

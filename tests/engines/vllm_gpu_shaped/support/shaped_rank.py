"""One rank: the worker's half of the connector, its KV tensors, and a device that runs behind.

The hooks are called in the order of vLLM's GPU runner (``v1/worker/gpu/kv_connector.py``). What the
step computes is queued on the device, and runs when :meth:`Rank.catch_up` says at the latest: until
then the tensors hold what they held, whatever the scheduler counts as computed.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_sim import Access
from shaped_device import Device, blocks_of, rows_of
from shaped_setting import (
    BLOCK,
    HEAD_SIZE,
    STATE_LAYERS,
    Configs,
    heads_of,
    layers_of,
    name_of,
)
from shaped_states import States
from shaped_text import Text

__all__ = ["Batch", "Rank", "WrongRead", "Work"]


@dataclass(frozen=True, slots=True)
class Work:
    """One request's share of a step: tokens ``first .. stop``, and its block table per group."""

    request_id: str
    text: Text
    tables: tuple[tuple[int, ...], ...]
    first: int
    stop: int
    samples: bool
    """Whether a token follows from it."""


@dataclass(slots=True)
class Batch:
    """A step that was scheduled. ``output`` is what vLLM's scheduler made of it."""

    number: int
    output: Any
    works: list[Work]
    wrong: set[str] = field(default_factory=set[str])
    """Requests that read a wrong row in it."""
    answers: dict[int, Any] = field(default_factory=dict[int, Any])
    """What each rank answers, once it has run it."""


@dataclass(frozen=True, slots=True)
class WrongRead:
    """A row that attention read and that is not the prefix's."""

    step: int
    request_id: str
    rank: int
    layer: int
    token: int
    block: int
    is_reported: bool
    """The step said itself that the request's load had failed: vLLM computes it again."""


class Rank:
    """A worker's process, as far as the connector can see it."""

    def __init__(self, configs: Configs, number: int, device: Device) -> None:
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

        from kvlayer_vllm.connector import KVLayerConnector

        self._setting, self.number = configs.setting, number
        self._heads = heads_of(self._setting, number)
        kv_cache = configs.kv_cache(number)
        self.connector: Any = KVLayerConnector(
            configs.engine(number), KVConnectorRole.WORKER, kv_cache
        )
        shape = (self._setting.blocks, len(self._heads), BLOCK, 2 * HEAD_SIZE)
        groups = [*enumerate(kv_cache.kv_cache_groups)]
        keeping = groups[len(groups) - len(STATE_LAYERS) :] if self._setting.has_states else []
        groups = groups[: len(groups) - len(keeping)]
        names = [name for _, group in groups for name in group.layer_names]
        self._tensors = {name: torch.zeros(shape) for name in names}
        self._bits = {name: each.numpy().view("uint32") for name, each in self._tensors.items()}
        self._groups = {
            name: (index, self._setting.window if index else None)
            for index, group in groups
            for name in group.layer_names
        }
        self._states: States | None = None
        if keeping:
            numbers = [index for index, _ in keeping]
            self._states = States(numbers, STATE_LAYERS, self._setting.blocks)
        self._device = device
        lent = self._tensors | ({} if self._states is None else self._states.tensors)
        self.connector.register_kv_caches(device.lent(lent))
        self.wrong: list[WrongRead] = []
        self.reads = 0

    def run(self, batch: Batch) -> None:
        """The hooks of a step; what it computes is queued."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        output, connector = batch.output, self.connector
        self._device.hooks_come()
        self._zeroed(batch)
        step = self._crossed(output.kv_connector_metadata)
        connector.handle_preemptions(step)
        connector.bind_connector_metadata(step)
        if self._states is not None:
            self._states.moves_on(batch)
            # A runner on a CPU does so at once, and one on a GPU queues it.
            copy = partial(self._states.copied, batch)
            if self._setting.depth == 1:
                copy()
            else:
                self._device.queue(batch.number, copy, [], [])
        if output.has_sync_kv_loads:
            connector.start_load_kv(None)
        if batch.works:
            compute = partial(self._compute, batch)
            self._device.queue(batch.number, compute, *self._touched(batch))
        if not output.has_sync_kv_loads:
            connector.start_load_kv(None)
        connector.wait_for_save()
        found = connector.get_transfer_results(output.finished_req_ids)
        said = KVConnectorOutput(
            finished_sending=found.finished_sending or None,
            finished_recving=found.finished_recving or None,
            failed_recving=found.failed_recving,
            invalid_block_ids=connector.get_block_ids_with_load_errors(),
            kv_connector_worker_meta=connector.build_connector_worker_meta(),
        )
        connector.clear_connector_metadata()
        if batch.works:
            names = [work.request_id for work in batch.works]
            answer = ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=[],
                kv_connector_output=said,
            )
        else:
            answer = ModelRunnerOutput.with_kv_conn_output_only(said)
        batch.answers[self.number] = self._crossed(answer)

    def catch_up(self, number: int) -> None:
        """The device has run what was queued, up to step ``number``."""
        self._device.catch_up(number)

    def _zeroed(self, batch: Batch) -> None:
        """New blocks are zeroed on the device: at once, where it has nothing else to do."""
        blocks = batch.output.new_block_ids_to_zero
        if blocks and self._device.is_idle:
            self._zero(blocks)
        elif blocks:
            writes = [each for t in self._tensors.values() for each in blocks_of(t, blocks)]
            self._device.queue(batch.number, partial(self._zero, blocks), [], writes)

    def _touched(self, batch: Batch) -> tuple[list[Access], list[Access]]:
        """What the step reads, and what it writes."""
        reads, writes = list[Access](), list[Access]()
        for layer in layers_of(self._setting, self.number):
            name = name_of(layer)
            group, window = self._groups[name]
            for work in batch.works:
                seen = 0 if window is None else max(0, work.first - window + 1)
                table, tensor = work.tables[group], self._tensors[name]
                if seen < work.first:
                    reads += rows_of(tensor, *_places(table, seen, work.first))
                writes += rows_of(tensor, *_places(table, work.first, work.stop))
        return reads, writes

    def _zero(self, blocks: Sequence[int]) -> None:
        for each in self._bits.values():
            each[list(blocks)] = 0

    def _compute(self, batch: Batch) -> None:
        """A layer writes the rows of all requests, then attends to what came before them."""
        layers = layers_of(self._setting, self.number)
        for layer in layers:
            for work in batch.works:
                self._write(work, layer)
        for layer in layers:
            for work in batch.works:
                if (wrong := self._wrong_token(work, layer)) is not None:
                    self._note(batch, work, layer, wrong)
        if self._states is not None:
            for work in batch.works:
                for found in self._states.wrong(batch, work):
                    self._note(batch, work, *found)
                self._states.computed(batch, work, is_wrong=work.request_id in batch.wrong)
                self.reads += 1
        for work in batch.works:
            if work.request_id in batch.wrong:  # what follows from garbage is garbage
                for layer in layers:
                    self._write(work, layer, is_wrong=True)

    def _note(
        self, batch: Batch, work: Work, layer: int, token: int, group: int | None = None
    ) -> None:
        table = work.tables[self._groups[name_of(layer)][0] if group is None else group]
        invalid = batch.answers[self.number].kv_connector_output.invalid_block_ids
        batch.wrong.add(work.request_id)
        self.wrong.append(
            WrongRead(
                batch.number,
                work.request_id,
                self.number,
                layer,
                token,
                table[token // BLOCK],
                bool(invalid.intersection(table)),
            )
        )

    def _wrong_token(self, work: Work, layer: int) -> int | None:
        """The first token before the work's own whose row is not what it should be."""
        group, window = self._groups[name_of(layer)]
        first = 0 if window is None else max(0, work.first - window + 1)
        if first >= work.first:
            return None
        held = self._rows(layer, work.tables[group], first, work.first)
        wanted = work.text.rows(layer, self._heads, first, work.first)
        self.reads += work.first - first
        differs = (held != wanted).any(axis=(0, 2))
        return first + int(differs.argmax()) if differs.any() else None

    def _write(self, work: Work, layer: int, *, is_wrong: bool = False) -> None:
        table = work.tables[self._groups[name_of(layer)][0]]
        rows = work.text.rows(layer, self._heads, work.first, work.stop)
        if is_wrong:
            rows = ~rows
        blocks, inside = _places(table, work.first, work.stop)
        self._bits[name_of(layer)][blocks, :, inside] = rows.transpose(1, 0, 2)

    def _rows(self, layer: int, table: Sequence[int], first: int, stop: int) -> Any:
        blocks, inside = _places(table, first, stop)
        return self._bits[name_of(layer)][blocks, :, inside].transpose(1, 0, 2)

    def _crossed(self, message: Any) -> Any:
        """A message that has been to another process."""
        return pickle.loads(pickle.dumps(message)) if self._setting.is_remote else message  # noqa: S301


def _places(table: Sequence[int], first: int, stop: int) -> tuple[Any, Any]:
    tokens = np.arange(first, stop)
    return np.array(table)[tokens // BLOCK], tokens % BLOCK

"""vLLM's own offload into host memory where the device is a CPU: its copies alone are another's.

vLLM's worker copies on CUDA streams and refuses any other device. This one copies in the engine's
thread. What is kept, for how long and under which name stays vLLM's.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

__all__ = ["HostOnCpu"]


class Copier(OffloadingWorker):
    """Blocks of the engine's tensors against rows of host memory."""

    def __init__(self, kv_caches: Any, blocks_per_chunk: int, chunks: int) -> None:
        self._per_chunk = blocks_per_chunk
        self._groups = kv_caches.group_data_refs
        self._engine = [
            each.tensor.view(torch.int8).view(-1, each.page_size_bytes)
            for each in kv_caches.tensors
        ]
        self._host = [
            torch.zeros((chunks * blocks_per_chunk, each.page_size_bytes), dtype=torch.int8)
            for each in kv_caches.tensors
        ]
        self._ended: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, src_spec, dst_spec, is_store=True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, dst_spec, src_spec, is_store=False)

    def _copy(self, job: int, engine: Any, host: Any, *, is_store: bool) -> bool:
        blocks, chunks = iter(engine.block_ids.tolist()), iter(host.block_ids.tolist())
        sizes = zip(self._groups, engine.group_sizes, engine.block_indices, strict=True)
        moved = 0
        for references, count, index in sizes:
            first = index % self._per_chunk
            of_chunk = [next(chunks) for _ in range(-(-(first + count) // self._per_chunk))]
            for number in range(first, first + count):
                chunk, part = divmod(number, self._per_chunk)
                block, row = next(blocks), of_chunk[chunk] * self._per_chunk + part
                for each in references:
                    here, there = self._engine[each.tensor_idx], self._host[each.tensor_idx]
                    size = each.page_size_bytes
                    if is_store:
                        there[row, :size] = here[block, :size]
                    else:
                        here[block, :size] = there[row, :size]
                    moved += size
        self._ended.append(TransferResult(job, True, moved, 0.0))
        return True

    def get_finished(self) -> list[TransferResult]:
        ended, self._ended = self._ended, []
        return ended

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""


class HostOnCpu(CPUOffloadingSpec):
    """``spec_name`` of an ``OffloadingConnector``."""

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        return Copier(kv_caches, self.blocks_per_chunk, self.num_chunks)

"""vLLM's own offload where the device is a CPU: its copies alone are replaced.

vLLM's worker copies on CUDA streams and refuses any other device. This one copies in the engine's
thread, a block of a layer at a time, with nothing but ``memmove``. What is kept, for how long,
under which name, and its tier of files stay vLLM's.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from kvlayer_vllm.engine import module

__all__ = ["HostOnCpu", "TieringOnCpu"]

if TYPE_CHECKING:

    class OffloadingWorker:
        """Copies for an ``OffloadingConnector``: see ``vllm.v1.kv_offload.base``."""

    class CPUOffloadingSpec:
        """Where an ``OffloadingConnector`` keeps KV: see ``vllm.v1.kv_offload.cpu.spec``."""

        blocks_per_chunk: int
        num_chunks: int

    class TieringOffloadingSpec(CPUOffloadingSpec):
        """The same with tiers: see ``vllm.v1.kv_offload.tiering.spec``."""

        _engine_id: str
        kv_bytes_per_chunk: int
        cpu_page_size_per_worker: int

else:
    OffloadingWorker = module("v1.kv_offload.base").OffloadingWorker
    CPUOffloadingSpec = module("v1.kv_offload.cpu.spec").CPUOffloadingSpec
    TieringOffloadingSpec = module("v1.kv_offload.tiering.spec").TieringOffloadingSpec


class Copier(OffloadingWorker):
    """Blocks of the engine's tensors against chunks of host memory.

    ``region`` is vLLM's memory that its tiers share; None: memory of its own.
    """

    def __init__(
        self, kv_caches: Any, blocks_per_chunk: int, chunks: int, region: Any = None
    ) -> None:
        self._per_chunk = blocks_per_chunk
        self._groups = kv_caches.group_data_refs
        self._region = region
        self._engine: list[Any] = []
        self._host: list[Any] = []
        int8: Any = torch.int8
        for each in kv_caches.tensors:
            nbytes = each.page_size_bytes
            self._engine.append(each.tensor.view(int8).view(-1, nbytes))
            nbytes *= blocks_per_chunk
            self._host.append(
                torch.zeros((chunks, nbytes), dtype=int8)
                if region is None
                else region.create_next_worker_view(nbytes)
            )
        self._ended: list[Any] = []

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
            places = [
                (next(blocks), of_chunk[at // self._per_chunk], at % self._per_chunk)
                for at in range(first, first + count)
            ]
            for each in references:
                size = each.page_size_bytes
                here, there = self._engine[each.tensor_idx], self._host[each.tensor_idx]
                part_nbytes = there.shape[1] // self._per_chunk
                here_at, here_step = here.data_ptr(), here.stride(0)
                there_at, there_step = there.data_ptr(), there.stride(0)
                for block, chunk, part in places:
                    one = here_at + block * here_step
                    other = there_at + chunk * there_step + part * part_nbytes
                    ctypes.memmove(*((other, one) if is_store else (one, other)), size)
                moved += count * size
        result = module("v1.kv_offload.base").TransferResult
        self._ended.append(result(job, True, moved, 0.0))
        return True

    def get_finished(self) -> list[Any]:
        ended, self._ended = self._ended, []
        return ended

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""

    def shutdown(self) -> None:
        self._host.clear()
        if self._region is not None:
            self._region.cleanup()


class HostOnCpu(CPUOffloadingSpec):
    """``spec_name`` of an ``OffloadingConnector`` that keeps KV in host memory."""

    def get_worker(self, kv_caches: Any) -> Any:
        return Copier(kv_caches, self.blocks_per_chunk, self.num_chunks)


class TieringOnCpu(TieringOffloadingSpec):
    """``spec_name`` of an ``OffloadingConnector`` with tiers behind host memory."""

    def get_worker(self, kv_caches: Any) -> Any:
        region = module("v1.kv_offload.cpu.shared_offload_region").SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=0,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return Copier(kv_caches, self.blocks_per_chunk, self.num_chunks, region)

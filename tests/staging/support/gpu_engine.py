"""An engine on a simulated GPU: tensors that say they are CUDA's, and work on its own stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from engine import Engine
from gpu_sim import Gpu, bytes_at

from kvlayer.layout import KVView, LoadedLayers

__all__ = ["DeviceTensor", "GpuEngine", "QueuedEvent", "memory_of"]


class QueuedEvent(NamedTuple):
    """An event of ``gpu`` as torch has it."""

    gpu: Gpu
    cuda_event: int

    def wait(self, stream: Any) -> None:
        self.gpu.wait(stream.cuda_stream, self.cuda_event)


class DeviceTensor(torch.Tensor):
    """A CPU tensor that says it is on a CUDA device."""

    number = 0

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.number)


class SecondDeviceTensor(DeviceTensor):
    """The same, on another one."""

    number = 1


def memory_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes of the tensor's whole storage."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


class GpuEngine:
    """The tensors of ``engine``, on device ``number`` of ``gpu``, and a stream to compute on."""

    def __init__(self, gpu: Gpu, engine: Engine, *, number: int = 0) -> None:
        self.gpu, self.engine, self.number = gpu, engine, number
        kind = (DeviceTensor, SecondDeviceTensor)[number]
        for start, nbytes in self.storages():
            gpu.lend(start, nbytes, number)
        self.caches: list[list[Any]] = [
            [
                tuple(t.as_subclass(kind) for t in cache)
                if isinstance(cache, tuple)
                else cache.as_subclass(kind)
                for cache in layers
            ]
            for layers in engine.caches
        ]
        gpu.device = number
        self.stream = gpu.new_stream()

    def view(self, slots: Any, loaded: Callable[[LoadedLayers], None] | None = None) -> KVView:
        """What the engine lends: every group has these slots."""
        return KVView(self.caches, [slots] * len(self.caches), self.stream, loaded)

    def queued(self) -> QueuedEvent:
        """An event behind what is on the engine's stream by now, as an engine's hook makes it."""
        event = self.gpu.new_event()
        self.gpu.device = self.number
        self.gpu.record(event, self.stream)
        return QueuedEvent(self.gpu, event)

    def write(self, values: Sequence[np.ndarray[Any, Any]], label: str = "the model") -> None:
        """Queue a kernel that writes all of the cache: a value per storage, whole."""
        for (start, nbytes), value in zip(self.storages(), values, strict=True):
            access = [(np.array([start]), nbytes)]

            def run(start: int = start, nbytes: int = nbytes, value: Any = value) -> None:
                bytes_at(start, nbytes)[:] = value

            self._launch(label, run, [], access)

    def read(self, layer: int, into: list[Any], label: str = "attention") -> None:
        """Queue a kernel that reads a layer of group 0, and keeps what it saw in ``into``."""
        cache = self.engine.caches[0][layer]
        for tensor in cache if isinstance(cache, tuple) else (cache,):
            start, nbytes = memory_of(tensor)

            def run(start: int = start, nbytes: int = nbytes) -> None:
                into.append(bytes_at(start, nbytes).copy())

            self._launch(label, run, [(np.array([start]), nbytes)], [])

    def bits(self) -> list[np.ndarray[Any, Any]]:
        """All of the cache's bytes, storage by storage, as they are now."""
        return [bytes_at(start, nbytes).copy() for start, nbytes in self.storages()]

    def by_layer(self, values: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """The first storage of each layer of group 0, of values in the order of ``bits``."""
        order = [start for start, _ in self.storages()]
        found: list[np.ndarray[Any, Any]] = []
        for cache in self.engine.caches[0]:
            tensor = cache[0] if isinstance(cache, tuple) else cache
            found.append(values[order.index(memory_of(tensor)[0])])
        return found

    def noise(self, seed: int) -> list[np.ndarray[Any, Any]]:
        """Values for ``write``."""
        rng = np.random.default_rng(seed)
        return [rng.integers(0, 256, nbytes, dtype=np.uint8) for _, nbytes in self.storages()]

    def _launch(self, label: str, run: Callable[[], None], reads: Any, writes: Any) -> None:
        self.gpu.device = self.number
        self.gpu.launch(self.stream, label, run, lambda: (reads, writes))

    def storages(self) -> list[tuple[int, int]]:
        """Address and bytes of each piece of the cache, in the engine's order."""
        found = dict(
            memory_of(tensor)
            for layers in self.engine.caches
            for cache in layers
            for tensor in (cache if isinstance(cache, tuple) else (cache,))
        )
        return list(found.items())

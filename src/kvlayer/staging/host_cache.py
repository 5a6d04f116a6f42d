"""A cache tensor in host memory, moved by numpy calls on views of its storage."""

from __future__ import annotations

from kvlayer.layout import Tensor
from kvlayer.staging.lazy import torch
from kvlayer.staging.moves import Transfer
from kvlayer.staging.steps import Bytes

__all__ = ["HostCache"]


class HostCache:
    """One CPU tensor of an engine's cache, for the duration of one call. Holds no copy of it."""

    def __init__(self, tensor: Tensor) -> None:
        # The whole storage as bytes: rows of any dtype are reached by strides through it, and
        # numpy checks each view against its bounds.
        storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        self._memory: Bytes = storage.numpy()
        self._base: int = tensor.storage_offset() * tensor.element_size()

    def gather(self, layer: Bytes, transfer: Transfer, strip: int) -> None:
        """Copy the transfer's ``strip``-th strip to the payload's layer ``layer``."""
        for step in transfer.gathers(strip):
            payload, cache = step.payload.of(layer, 0), step.cache.of(self._memory, self._base)
            if step.is_take:
                # Slots were checked: nothing is clipped, but other modes go through a temporary.
                cache.take(step.cache_at, None, payload, "clip")
            else:
                payload[step.payload_at] = cache[step.cache_at]

    def scatter(self, layer: Bytes, transfer: Transfer, strip: int) -> None:
        """Copy the transfer's ``strip``-th strip from the payload's layer ``layer``."""
        for step in transfer.scatters(strip):
            payload, cache = step.payload.of(layer, 0), step.cache.of(self._memory, self._base)
            cache[step.cache_at] = payload[step.payload_at]

"""The interface between host memory and an engine's paged KV memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from kvlayer.identity.keys import Part
from kvlayer.layout import KVLayout, KVView
from kvlayer.payload import Payload

if TYPE_CHECKING:
    from kvlayer.memory.slab import Slab

__all__ = ["HostCopy", "Landed", "MakeStager", "Stager"]


Landed: TypeAlias = Callable[[int, int], None]
"""Told that a layer is complete: the KV group, and the layer's position in the view's caches."""


@dataclass(frozen=True, slots=True)
class HostCopy:
    """One payload in host memory and the tokens of the view it belongs to.

    ``host`` holds ``payload`` (``payload.nbytes`` bytes, ``payload.part`` of the model,
    ``payload.tokens`` tokens). Token ``skip + i`` of the payload is token ``first + i`` of the
    view, for i in 0..``tokens``. A gather always has ``skip == 0`` and ``tokens ==
    payload.tokens``; a scatter may take only the end of a payload when the engine holds the rest.
    """

    payload: Payload
    host: memoryview
    first: int
    tokens: int
    skip: int = 0

    @property
    def part(self) -> Part:
        return self.payload.part


class Stager(ABC):
    """Copies payloads between an engine's tensors and host memory, for one device.

    Both copies return only once neither the tensors nor the host memory is in use any more,
    also when they are cancelled. Copies of one call touch disjoint memory.
    """

    @abstractmethod
    def check(self, view: KVView) -> None:
        """Raise ``LayoutError`` unless the view matches the layout: counts, shapes, dtype, device.

        Cheap enough for every call; no device synchronisation.
        """

    @abstractmethod
    async def gather(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        """Copy tokens from the view into host payloads."""

    @abstractmethod
    async def scatter(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        """Copy tokens from host payloads into the view, restricted to the rank's layers and heads.

        Tokens whose slot is -1 are skipped. Slots outside the copies are not touched.
        """

    async def scatter_layers(
        self, view: KVView, copies: Sequence[HostCopy], landed: Landed
    ) -> None:
        """:meth:`scatter`, layer after layer in the model's order; says so after each.

        A stager that moves everything at once need not say anything.
        """
        await self.scatter(view, copies)

    async def aclose(self) -> None:
        """Release device resources. Idempotent."""


MakeStager: TypeAlias = Callable[[KVLayout, "Slab", int], Stager]
"""Makes the stager of an engine's device: its layout, the slab, and how many threads may copy."""

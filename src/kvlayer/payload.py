"""How one object's bytes lie, in host memory and in a frame alike. Pure arithmetic.

Canonical payloads are ``[layer][K|V][head][token][dim]`` (MLA: ``[layer][token][dim]``; state:
opaque per layer), native ones ``[layer]`` followed by the engine's own blocks. Layers lie back to
back; segments only group them. The whole is padded to 4 KiB once, so that a slot in the host slab
can be written to and read from a disk directly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from kvlayer.errors import LayoutError
from kvlayer.identity.keys import Part
from kvlayer.layout import AttentionKind, KVGroup

__all__ = ["ALIGNMENT", "Payload", "Segment", "align"]

ALIGNMENT = 4096
_MIN_SEGMENT = 256 * 1024  # large enough that checking it costs more than calling for the check
_MAX_SEGMENTS = 64  # what one 4 KiB header can list


def align(nbytes: int) -> int:
    """Round up to the alignment direct I/O needs."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Segment(NamedTuple):
    """Consecutive layers that are stored, verified and decoded alone.

    ``layer`` counts from the part's first layer; ``offset`` and ``nbytes`` are bytes in the
    payload.
    """

    layer: int
    num_layers: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Payload:
    """Shape of one object: which part, how many tokens, where each layer starts.

    Make one with :meth:`of`, which checks that the part exists in the group.
    """

    group: KVGroup
    part: Part
    tokens: int
    num_layers: int
    layer_nbytes: int
    layers_per_segment: int
    body_nbytes: int = field(init=False, repr=False, compare=False)
    """Bytes of all layers."""
    nbytes: int = field(init=False, repr=False, compare=False)
    """Bytes in host memory and, uncompressed, in a frame: padded to 4 KiB."""

    def __post_init__(self) -> None:
        body_nbytes = self.num_layers * self.layer_nbytes
        object.__setattr__(self, "body_nbytes", body_nbytes)  # asked for many times an object
        object.__setattr__(self, "nbytes", align(body_nbytes))

    @classmethod
    def of(cls, group: KVGroup, part: Part, tokens: int) -> Payload:
        """The payload of ``part`` of a span of ``tokens`` tokens.

        Raises ``LayoutError`` for a part the group does not have (a key from outside may name
        any) and for less than one token.
        """
        first, last = part.layers
        headless = group.kind is not AttentionKind.MHA
        if last > len(group.layers) or (part.heads is None) is not headless:
            raise LayoutError(
                f"part {part} does not fit a {group.kind} group of {len(group.layers)} layers",
                hint="layers count within the group; only MHA parts have a head range",
            )
        if part.heads is not None and part.heads[1] > group.num_kv_heads:
            raise LayoutError(f"part {part} does not fit a group of {group.num_kv_heads} KV heads")
        if tokens < 1:
            raise LayoutError(f"a payload holds at least one token, found {tokens}")
        if group.kind is AttentionKind.STATE:
            layer_nbytes = group.state_nbytes
        else:
            row_nbytes = sum(group.planes()) * group.itemsize
            layer_nbytes = tokens * _num_heads(part) * row_nbytes
        num_layers = last - first
        per_segment = max(-(-_MIN_SEGMENT // layer_nbytes), -(-num_layers // _MAX_SEGMENTS))
        return cls(group, part, tokens, num_layers, layer_nbytes, min(per_segment, num_layers))

    @property
    def num_heads(self) -> int:
        """KV heads of the part; 1 where heads mean nothing."""
        return _num_heads(self.part)

    def layer_offset(self, layer: int) -> int:
        """Where layer ``layer`` (counted from the part's first) starts."""
        return layer * self.layer_nbytes

    def segments(self) -> list[Segment]:
        """All segments in order."""
        step, found = self.layers_per_segment, list[Segment]()
        for at in range(0, self.num_layers, step):
            layers = min(step, self.num_layers - at)
            found.append(Segment(at, layers, self.layer_offset(at), layers * self.layer_nbytes))
        return found


def _num_heads(part: Part) -> int:
    return 1 if part.heads is None else part.heads[1] - part.heads[0]

"""An object as the core would hand it to a backend: with the header that says how long it is."""

from __future__ import annotations

from kvlayer.identity.keys import ObjectKey, Part
from kvlayer.layout import AttentionKind, KVGroup
from kvlayer.payload import Payload
from kvlayer.tier.transfer.coding import encode, write_scratch

__all__ = ["framed"]


def framed(key: ObjectKey, content: bytes) -> bytes:
    """``content``, whole pages of it, behind a header that names ``key`` and lists all of it."""
    group = KVGroup(AttentionKind.STATE, (0,), "float16", state_nbytes=len(content))
    payload = Payload.of(group, Part(0, (0, 1), None), 1)
    return b"".join(
        encode(
            key,
            payload,
            (memoryview(content),),
            memoryview(bytearray(write_scratch(payload, copies=False))),
            copies=False,
            first_token=0,
            created=0.0,
            build="kvlayer.testing",
        )
    )

"""An object as the core would hand it to a backend: with the header that says how long it is."""

from __future__ import annotations

from kvlayer.codec.frame import HEADER_NBYTES, write_header
from kvlayer.keys import ObjectKey, Part
from kvlayer.layout import AttentionKind, KVGroup
from kvlayer.payload import Payload

__all__ = ["framed"]


def framed(key: ObjectKey, content: bytes) -> bytes:
    """``content``, whole pages of it, behind a header that names ``key`` and lists all of it."""
    group = KVGroup(AttentionKind.STATE, (0,), "float16", state_nbytes=len(content))
    payload = Payload.of(group, Part(0, (0, 1), None), 1)
    header, body = bytearray(HEADER_NBYTES), bytearray(content)
    write_header(
        memoryview(header),
        memoryview(body),
        key=key,
        payload=payload,
        first_token=0,
        created=0.0,
        build="kvlayer.testing",
    )
    return bytes(header + body)

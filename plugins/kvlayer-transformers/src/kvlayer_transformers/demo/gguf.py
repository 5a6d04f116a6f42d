"""Reads GGUF files (v2 and v3): metadata, and tensors of the few types the demo's model uses.

A GGUF file is ``magic, version, counts, metadata, tensor table, padding, tensor bytes``, all
little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Nothing in the file is
trusted: every count and offset is checked against the bytes that are there before it is used.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from kvlayer.errors import KVLayerError

__all__ = ["GGUFError", "GGUFFile", "GGUFTensor"]


class GGUFError(KVLayerError, ValueError):
    """The file is not a GGUF file this reader understands, or it is damaged."""


class _Scalar(NamedTuple):
    """How one scalar metadata type is packed."""

    format: str
    nbytes: int


_SCALARS: Final[Mapping[int, _Scalar]] = {
    code: _Scalar(f, struct.calcsize("<" + f))
    for code, f in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
_STRING: Final = 8
_ARRAY: Final = 9
_MAX_DIMS: Final = 4


def _halves(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The fp16 at byte ``start`` of every block, as an fp32 column."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _from_f32(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.contiguous().view(torch.float32).clone()


def _from_q4_1(blocks: torch.Tensor) -> torch.Tensor:
    """fp16 scale, fp16 minimum, 16 bytes of nibbles: the low ones come first."""
    packed = blocks[:, 4:]
    quants = torch.cat((packed & 15, packed >> 4), dim=1).float()
    return quants.mul_(_halves(blocks, 0)).add_(_halves(blocks, 2))


def _from_q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """fp16 scale, 32 signed bytes."""
    return blocks[:, 2:].contiguous().view(torch.int8).float().mul_(_halves(blocks, 0))


@dataclass(frozen=True, slots=True)
class _Encoding:
    """A tensor type: blocks of ``elements`` values in ``nbytes`` bytes.

    ``decode`` takes uint8 ``(blocks, nbytes)`` and returns fp32 with the same number of rows.
    """

    name: str
    elements: int
    nbytes: int
    decode: Callable[[torch.Tensor], torch.Tensor]


_ENCODINGS: Final[Mapping[int, _Encoding]] = {
    0: _Encoding("F32", 1, 4, _from_f32),
    3: _Encoding("Q4_1", 32, 20, _from_q4_1),
    8: _Encoding("Q8_0", 32, 34, _from_q8_0),
}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of a file; ``shape`` runs outermost first, as torch has it."""

    name: str
    shape: tuple[int, ...]
    _encoding: _Encoding
    _raw: memoryview

    @property
    def encoding(self) -> str:
        """The type's name, for example ``Q4_1``."""
        return self._encoding.name

    def decode(self) -> torch.Tensor:
        """A new fp32 tensor of ``shape`` that owns its memory."""
        raw = torch.frombuffer(self._raw, dtype=torch.uint8)
        blocks = raw.view(-1, self._encoding.nbytes)
        return self._encoding.decode(blocks).reshape(self.shape)


class _Cursor:
    """A position in the file that refuses to pass its end."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self.at = 0

    def take(self, nbytes: int, what: str) -> memoryview:
        if nbytes > len(self._view) - self.at:
            left = len(self._view) - self.at
            raise GGUFError(
                f"the file ends inside {what}: {nbytes} bytes expected at byte {self.at}, "
                f"{left} left",
                hint="the file is truncated or damaged; fetch it again",
            )
        self.at += nbytes
        return self._view[self.at - nbytes : self.at]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def text(self, what: str) -> str:
        raw = self.take(self.u64(what), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as exc:
            raise GGUFError(f"{what} is not UTF-8: {exc}") from None

    def value(self, kind: int, what: str) -> Any:
        if (scalar := _SCALARS.get(kind)) is not None:
            return struct.unpack("<" + scalar.format, self.take(scalar.nbytes, what))[0]
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self._array(what)
        raise GGUFError(f"{what} has the unknown value type {kind}")

    def _array(self, what: str) -> list[Any]:
        kind, count = self.u32(what), self.u64(what)
        if (scalar := _SCALARS.get(kind)) is not None:
            raw = self.take(count * scalar.nbytes, what)
            return list(struct.unpack(f"<{count}{scalar.format}", raw))
        if kind != _STRING:
            raise GGUFError(f"{what} is an array of the unsupported value type {kind}")
        return [self.text(what) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A file's metadata and tensors. Tensors read from the file when decoded."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Map a file and check all of its structure; tensor bytes stay on disk until decoded.

        Raises ``GGUFError`` when the file is damaged, of another version, or has tensors of a
        type this reader does not know; ``OSError`` when it cannot be read.
        """
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise GGUFError(f"{path} is empty")
            # A private mapping: torch wants writable memory, and nobody writes.
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        try:
            return cls._parse(view)
        except GGUFError as exc:
            raise GGUFError(f"{path}: {exc}", hint=exc.hint) from None

    @classmethod
    def _parse(cls, view: memoryview) -> GGUFFile:
        cursor = _Cursor(view)
        if bytes(cursor.take(4, "the magic")) != b"GGUF":
            raise GGUFError("not a GGUF file: it does not begin with 'GGUF'")
        version = cursor.u32("the version")
        if version not in (2, 3):
            raise GGUFError(f"GGUF version {version} is not supported, only 2 and 3")
        num_tensors, num_values = cursor.u64("the tensor count"), cursor.u64("the metadata count")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = cursor.text("a metadata key")
            metadata[key] = cursor.value(cursor.u32(key), f"metadata {key!r}")
        entries = [_Entry.read(cursor) for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise GGUFError(f"general.alignment is {alignment!r}, expected a multiple of 8")
        base = -(-cursor.at // alignment) * alignment
        tensors = {entry.name: entry.tensor(view, base, alignment) for entry in entries}
        if len(tensors) != len(entries):
            raise GGUFError("two tensors have the same name")
        return cls(metadata, tensors)


class _Entry(NamedTuple):
    """One line of the tensor table."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @classmethod
    def read(cls, cursor: _Cursor) -> _Entry:
        name = cursor.text("a tensor name")
        what = f"tensor {name!r}"
        dims = cursor.u32(what)
        if not 1 <= dims <= _MAX_DIMS:
            raise GGUFError(f"{what} has {dims} dimensions, expected 1..{_MAX_DIMS}")
        shape = tuple(cursor.u64(what) for _ in range(dims))[::-1]
        return cls(name, shape, cursor.u32(what), cursor.u64(what))

    def tensor(self, view: memoryview, base: int, alignment: int) -> GGUFTensor:
        encoding = _ENCODINGS.get(self.kind)
        if encoding is None:
            known = ", ".join(e.name for e in _ENCODINGS.values())
            raise GGUFError(
                f"tensor {self.name!r} is of ggml type {self.kind}, unknown to this reader",
                hint=f"it reads {known}; convert the file, or load it with transformers and gguf",
            )
        if 0 in self.shape or self.shape[-1] % encoding.elements:
            raise GGUFError(
                f"tensor {self.name!r} of shape {self.shape} is not made of whole {encoding.name} "
                f"blocks ({encoding.elements} elements)"
            )
        start = base + self.offset
        stop = start + prod(self.shape) // encoding.elements * encoding.nbytes
        if self.offset % alignment or stop > len(view):
            raise GGUFError(
                f"tensor {self.name!r} lies at bytes {start}..{stop} of a file of {len(view)} "
                f"(alignment {alignment})",
                hint="the file is truncated or damaged; fetch it again",
            )
        return GGUFTensor(self.name, self.shape, encoding, view[start:stop])

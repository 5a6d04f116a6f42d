"""The GGUF reader: exact on what it knows, clear about what it does not, safe on garbage."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvlayer_transformers.demo.gguf import GGUFError, GGUFFile

WriteGGUF = Callable[..., Path]


def q4_1(scale: float, minimum: float, quants: list[int]) -> bytes:
    """One block of 32 elements, as ggml packs it: element i and i + 16 share a byte."""
    packed = bytes(quants[i] | quants[i + 16] << 4 for i in range(16))
    return struct.pack("<ee", scale, minimum) + packed


def q8_0(scale: float, quants: list[int]) -> bytes:
    return struct.pack("<e32b", scale, *quants)


@pytest.fixture
def sample(write_gguf: WriteGGUF, tmp_path: Path) -> Path:
    metadata = {"general.name": "tiny", "count": 7, "on": True, "eps": 0.5, "words": ["a", "ß"]}
    floats = struct.pack("<6f", *range(6))
    return write_gguf(
        tmp_path / "sample.gguf",
        metadata,
        [("plain", (2, 3), 0, floats), ("packed", (1, 32), 8, q8_0(2.0, list(range(-16, 16))))],
    )


def test_metadata_and_tensors_are_read_as_they_were_written(sample: Path) -> None:
    file = GGUFFile.open(sample)
    assert file.metadata == {
        "general.name": "tiny",
        "count": 7,
        "on": True,
        "eps": 0.5,
        "words": ["a", "ß"],
    }
    assert torch.equal(file.tensors["plain"].decode(), torch.arange(6.0).view(2, 3))
    assert file.tensors["packed"].encoding == "Q8_0"


def test_q8_0_is_scale_times_quant(sample: Path) -> None:
    found = GGUFFile.open(sample).tensors["packed"].decode()
    assert torch.equal(found, 2.0 * torch.arange(-16.0, 16.0).view(1, 32))


def test_q4_1_is_scale_times_quant_plus_minimum(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    quants = [(3 * i) % 16 for i in range(64)]
    raw = q4_1(0.5, -1.0, quants[:32]) + q4_1(2.0, 0.25, quants[32:])
    path = write_gguf(tmp_path / "q.gguf", {}, [("w", (2, 32), 3, raw)])
    expected = torch.tensor(quants, dtype=torch.float32).view(2, 32)
    expected = torch.stack((expected[0] * 0.5 - 1.0, expected[1] * 2.0 + 0.25))
    assert torch.equal(GGUFFile.open(path).tensors["w"].decode(), expected)


def test_a_decoded_tensor_outlives_the_file(sample: Path) -> None:
    tensor = GGUFFile.open(sample).tensors["plain"].decode()
    sample.unlink()
    assert tensor.sum() == 15


def test_a_file_cut_anywhere_is_refused(sample: Path) -> None:
    whole = sample.read_bytes()
    for size in range(len(whole)):
        sample.write_bytes(whole[:size])
        with pytest.raises(GGUFError):
            GGUFFile.open(sample)


def test_random_damage_is_refused_or_read_but_never_crashes(sample: Path) -> None:
    whole, chance = sample.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        sample.write_bytes(damaged)
        try:
            for tensor in GGUFFile.open(sample).tensors.values():
                tensor.decode()
        except GGUFError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "at",
    [
        pytest.param(8, id="tensor count"),
        pytest.param(16, id="metadata count"),
        pytest.param(24, id="length of the first key"),
    ],
)
def test_an_absurd_count_is_refused_before_memory_is_asked_for(sample: Path, at: int) -> None:
    raw = bytearray(sample.read_bytes())
    raw[at : at + 8] = struct.pack("<Q", 2**62)
    sample.write_bytes(raw)
    with pytest.raises(GGUFError):
        GGUFFile.open(sample)


def test_something_else_is_called_not_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(GGUFError, match="not a GGUF file"):
        GGUFFile.open(path)


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(GGUFError, match="empty"):
        GGUFFile.open(path)


def test_another_version_is_refused_by_number(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="version 4"):
        GGUFFile.open(write_gguf(tmp_path / "v4.gguf", {}, [], version=4))


def test_an_unknown_tensor_type_is_refused_by_name(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "k.gguf", {}, [("w", (1, 256), 14, b"\0" * 210)])
    with pytest.raises(GGUFError, match="'w' is of ggml type 14") as caught:
        GGUFFile.open(path)
    assert "Q4_1" in str(caught.value.hint)


def test_rows_that_are_no_whole_blocks_are_refused(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "b.gguf", {}, [("w", (1, 33), 8, b"\0" * 68)])
    with pytest.raises(GGUFError, match="whole Q8_0 blocks"):
        GGUFFile.open(path)


def test_two_tensors_of_one_name_are_refused(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    twice = [("w", (1,), 0, b"\0" * 4)] * 2
    with pytest.raises(GGUFError, match="same name"):
        GGUFFile.open(write_gguf(tmp_path / "t.gguf", {}, twice))

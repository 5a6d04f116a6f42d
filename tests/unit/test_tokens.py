"""Token ids as bytes: every buffer an engine may hold gives the same ones, anything else none."""

from __future__ import annotations

import struct
import sys
from array import array
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlayer.errors import TokensError
from kvlayer.identity.keys import token_bytes

IDS = [0, 1, 2, 127, 128, 255, 256, 32767, 65536, 128000, 2**31 - 1]
WIDE = [*IDS, 2**31, 2**32 - 1]


def packed(ids: list[int]) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


def read_only(ids: list[int], dtype: Any) -> Any:
    buffer = np.array(ids, dtype)
    buffer.flags.writeable = False
    return buffer


def column(ids: list[int], dtype: Any) -> Any:
    """A strided view: every value of the other column would be wrong."""
    return np.stack([np.array(ids, dtype), np.full(len(ids), 99, dtype)], axis=1)[:, 0]


def backwards(ids: list[int], dtype: Any) -> Any:
    return np.array(ids[::-1], dtype)[::-1]


def every_second(ids: list[int], code: str) -> Any:
    """A strided buffer of no library's: every other value would be wrong."""
    return memoryview(array(code, [number for i in ids for number in (i, 9)]))[::2]


NARROW_BUFFERS = {
    "list": list,
    "tuple": tuple,
    "list of numpy ints": lambda ids: [np.int64(i) for i in ids],
    "array i": lambda ids: array("i", ids),
    "array I": lambda ids: array("I", ids),
    "array l": lambda ids: array("l", ids),
    "array q": lambda ids: array("q", ids),
    "array Q": lambda ids: array("Q", ids),
    "every second of an array": lambda ids: every_second(ids, "i"),
    "every second of a wide array": lambda ids: every_second(ids, "q"),
    "numpy int32": lambda ids: np.array(ids, np.int32),
    "numpy uint32": lambda ids: np.array(ids, np.uint32),
    "numpy int64": lambda ids: np.array(ids, np.int64),
    "numpy uint64": lambda ids: np.array(ids, np.uint64),
    "read-only numpy int32": lambda ids: read_only(ids, np.int32),
    "read-only numpy int64": lambda ids: read_only(ids, np.int64),
    "column of int32": lambda ids: column(ids, np.int32),
    "column of int64": lambda ids: column(ids, np.int64),
    "backwards int32": lambda ids: backwards(ids, np.int32),
    "backwards int64": lambda ids: backwards(ids, np.int64),
    "torch int32": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "torch int64": lambda ids: torch.tensor(ids, dtype=torch.int64),
    "torch uint32": lambda ids: torch.tensor(ids, dtype=torch.uint32),
    "column of torch int64": lambda ids: torch.tensor(
        [[i, 9] for i in ids], dtype=torch.int64
    ).view(-1, 2)[:, 0],
}
SIGNED_32 = {
    name for name in NARROW_BUFFERS if "int32" in name and "uint32" not in name
} | {"array i", "every second of an array"}  # fmt: skip
WIDE_BUFFERS = {name: make for name, make in NARROW_BUFFERS.items() if name not in SIGNED_32}


@pytest.mark.parametrize("make", NARROW_BUFFERS.values(), ids=NARROW_BUFFERS)
def test_every_kind_of_buffer_gives_the_same_bytes(make: Any) -> None:
    assert token_bytes(make(IDS)) == packed(IDS)


@pytest.mark.parametrize("make", WIDE_BUFFERS.values(), ids=WIDE_BUFFERS)
def test_ids_up_to_the_last_of_32_bits_are_named(make: Any) -> None:
    assert token_bytes(make(WIDE)) == packed(WIDE)


@pytest.mark.parametrize(
    "none",
    [[], (), array("i"), array("q"), np.zeros(0, np.int32), np.zeros(0, np.int64),
     np.zeros(0, np.uint32), np.zeros(4, np.int64)[:0], torch.zeros(0, dtype=torch.int64)],
    ids=repr,
)  # fmt: skip
def test_no_tokens_are_no_bytes(none: Any) -> None:
    assert token_bytes(none) == b""


OUT_OF_RANGE: dict[str, Any] = {
    "list": [5, -1],
    "large list": [5, 2**32],
    "huge list": [5, 2**70],
    "array i": array("i", [5, -1]),
    "array q": array("q", [5, -1]),
    "large array q": array("q", [5, 2**32]),
    "large array Q": array("Q", [5, 2**63]),
    "numpy int32": np.array([5, -(2**31)], np.int32),
    "numpy int64": np.array([5, -1], np.int64),
    "numpy int64, low half plausible": np.array([5, -(2**32) + 7], np.int64),
    "large numpy int64": np.array([5, 2**32], np.int64),
    "large numpy uint64": np.array([5, 2**64 - 1], np.uint64),
    "column": np.array([[5, 5], [-1, 5]], np.int32)[:, 0],
    "torch int32": torch.tensor([5, -1], dtype=torch.int32),
    "torch int64": torch.tensor([5, 2**32]),
}


@pytest.mark.parametrize("tokens", OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_a_negative_or_larger_id_is_refused(tokens: Any) -> None:
    with pytest.raises(TokensError, match="2\\^32-1") as caught:
        token_bytes(tokens)
    assert caught.value.hint


NOT_TOKENS: dict[str, Any] = {
    "bytes": b"\1\0\0\0",
    "bytearray": bytearray(8),
    "text": "12",
    "None": None,
    "an int": 7,
    "a generator": (i for i in range(3)),
    "a set": {1, 2},
    "floats": [1.0, 2.0],
    "a float among ints": [1, 2.0],
    "None among ints": [1, None],
    "text among ints": [1, "2"],
    "bools": [True, False],
    "nested lists": [[1, 2], [3, 4]],
    "numpy bools in a list": [np.bool_(1)],
    "numpy floats": np.ones(3),
    "numpy halves": np.ones(3, np.float16),
    "numpy bools": np.ones(3, bool),
    "numpy bytes": np.ones(3, np.uint8),
    "numpy shorts": np.ones(3, np.int16),
    "numpy objects": np.array([1, 2], object),
    "numpy dates": np.zeros(2, "M8[s]"),
    "numpy other byte order": np.ones(3, ">i4"),
    "numpy scalar": np.array(3),
    "numpy batch": np.ones((2, 3), np.int64),
    "numpy batch of one": np.ones((1, 3), np.int32),
    "array of floats": array("d", [1.0]),
    "array of bytes": array("B", [1, 2, 3, 4]),
    "torch floats": torch.ones(3),
    "torch bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "torch bools": torch.ones(3, dtype=torch.bool),
    "torch complex": torch.ones(3, dtype=torch.complex64),
    "torch scalar": torch.tensor(3),
    "torch batch": torch.ones((1, 3), dtype=torch.int64),
    "torch without values": torch.empty(3, dtype=torch.int64, device="meta"),
    "torch sparse": torch.ones(3, dtype=torch.int64).to_sparse(),
}


@pytest.mark.parametrize("tokens", NOT_TOKENS.values(), ids=NOT_TOKENS)
def test_what_is_no_row_of_ids_is_refused_with_a_hint(tokens: Any) -> None:
    with pytest.raises(TokensError) as caught:
        token_bytes(tokens)
    assert caught.value.hint


@pytest.mark.parametrize("make", NARROW_BUFFERS.values(), ids=NARROW_BUFFERS)
def test_a_buffer_is_copied_so_its_owner_may_write_to_it_at_once(make: Any) -> None:
    assert type(token_bytes(make(IDS))) is bytes


def test_a_tensor_that_wants_a_gradient_or_lives_elsewhere_is_read_through_the_host() -> None:
    class Remote:
        """What token_bytes uses of a tensor: torch without numpy, on some device."""

        ndim = 1

        def __init__(self, calls: list[str]) -> None:
            self.calls = calls

        def detach(self) -> Remote:
            self.calls.append("detach")
            return self

        def cpu(self) -> Remote:
            self.calls.append("cpu")
            return self

        def is_floating_point(self) -> bool:
            return False

        def numpy(self) -> Any:
            raise RuntimeError("Numpy is not available")

        def tolist(self) -> list[int]:
            return IDS

    calls: list[str] = []
    assert token_bytes(Remote(calls)) == packed(IDS)
    assert calls == ["detach", "cpu"]


@pytest.mark.parametrize("make", NARROW_BUFFERS.values(), ids=NARROW_BUFFERS)
def test_a_big_endian_machine_names_the_same_bytes(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = make(IDS)
    monkeypatch.setattr(sys, "byteorder", "big")
    swapped = struct.pack(f">{len(IDS)}I", *IDS)  # this machine's order, turned round
    assert token_bytes(tokens) == swapped


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(0, 2**32 - 1)), st.sampled_from(sorted(WIDE_BUFFERS)))
def test_any_ids_in_any_buffer_give_the_bytes_of_struct(ids: list[int], kind: str) -> None:
    assert token_bytes(WIDE_BUFFERS[kind](ids)) == packed(ids)


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1), st.data())
def test_an_id_out_of_range_is_found_wherever_it_stands(ids: list[int], data: Any) -> None:
    kind = data.draw(st.sampled_from(["array q", "numpy int64", "torch int64", "column of int64"]))
    tokens = NARROW_BUFFERS[kind](ids)
    if min(ids) >= 0 and max(ids) < 2**32:
        assert token_bytes(tokens) == packed(ids)
    else:
        with pytest.raises(TokensError):
            token_bytes(tokens)

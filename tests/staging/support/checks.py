"""What must hold of each kernel, over random cases: used on the kernels, and on mutants of them.

Each check runs one case and raises ``AssertionError`` (``EmulatorError`` is one) where a kernel
does something else than its oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from cases import TORCH_DTYPES, Case, launch, random_bytes, random_case, random_floats
from emulator import Emulator, Memory

from kvlayer.payload import Payload
from kvlayer.staging.kernels.int8 import dequantize_plan, int8_layer_nbytes, quantize_plan
from kvlayer.staging.kernels.plan import gather_plan, scatter_plan
from kvlayer.staging.kernels.rotation import Rotation, rotate_plans

__all__ = ["CHECKS", "Check"]

Check = Callable[[Emulator, np.random.Generator], None]


@contextmanager
def lent(emulator: Emulator, sizes: Sequence[int]) -> Generator[list[Memory]]:
    memories = [Memory(emulator, nbytes) for nbytes in sizes]
    try:
        yield memories
    finally:
        for memory in memories:
            memory.close()


def gather(emulator: Emulator, rng: np.random.Generator) -> None:
    """Staging memory holds what the torch stager writes into a payload; the cache is untouched."""
    case = random_case(rng, gather=True)
    nbytes = [case.payload.nbytes] * len(case.spans)
    with lent(emulator, case.nbytes()) as caches, lent(emulator, nbytes) as stages:
        for memory in (*caches, *stages):
            memory.array[:] = random_bytes(rng, memory.nbytes)
        before = [cache.array.copy() for cache in caches]
        expected = [stage.array.copy() for stage in stages]
        case.oracle(before, expected, gather=True)
        arrays = [cache.array for cache in caches]
        moves = case.moves(arrays, [stage.array for stage in stages], gather=True)
        bases = [stage.address for stage in stages]
        launch(emulator, case, moves, bases, case.view(arrays), gather_plan)
        for stage, wanted in zip(stages, expected, strict=True):
            assert np.array_equal(stage.array, wanted), "the payload differs"
        for cache, wanted in zip(caches, before, strict=True):
            assert np.array_equal(cache.array, wanted), "a gather wrote to the cache"


def scatter(emulator: Emulator, rng: np.random.Generator) -> None:
    """The cache holds what the torch stager leaves in it, to the last byte between the rows."""
    case = random_case(rng, gather=False)
    hosts = [random_bytes(rng, case.payload.nbytes) for _ in case.spans]
    _scatter(emulator, case, hosts, hosts, scatter_plan)


def _scatter(
    emulator: Emulator,
    case: Case,
    staged: Sequence[Any],
    expected_hosts: Sequence[Any],
    planner: Any,
    terms: Sequence[Any] | None = None,
    **more: Any,
) -> None:
    """Scatter ``staged``; the cache must become what the oracle makes of ``expected_hosts``.

    Bit for bit, but for elements whose ``terms`` (payloads as well) are not 0: see ``_within``.
    """
    rng = case.rng
    with (
        lent(emulator, case.nbytes()) as caches,
        lent(emulator, [len(each) for each in staged]) as stages,
    ):
        for cache in caches:
            cache.array[:] = random_bytes(rng, cache.nbytes)
        for stage, host in zip(stages, staged, strict=True):
            stage.array[:] = host
        expected = [cache.array.copy() for cache in caches]
        case.oracle(expected, expected_hosts, gather=False)
        computed = [np.zeros_like(each) for each in expected]
        if terms is not None:
            case.oracle(computed, terms, gather=False)
        arrays = [cache.array for cache in caches]
        moves = case.moves(arrays, expected_hosts, gather=False)
        addresses = [stage.address for stage in stages]
        launch(emulator, case, moves, addresses, case.view(arrays), planner, **more)
        dtype = TORCH_DTYPES[case.layout.group.dtype]
        for cache, wanted, sizes in zip(caches, expected, computed, strict=True):
            equal = np.array_equal(cache.array, wanted)
            assert equal or (terms is not None and _within(cache.array, wanted, sizes, dtype)), (
                "the cache differs"
            )
        for stage, host in zip(stages, staged, strict=True):
            assert np.array_equal(stage.array, host), "a scatter wrote to staging memory"


def rotate(emulator: Emulator, rng: np.random.Generator) -> None:
    """K is turned as in double precision, within 1 ulp; all else is the same bit for bit."""
    case = random_case(rng, gather=False, floats=True, vectors=bool(rng.integers(3)))
    group, payload = case.layout.group, case.payload
    size = group.head_size
    pairs = int(rng.choice([p for p in (1, 4, 5, 8, 16, 20, 24, 32, 40, 64) if 2 * p <= size]))
    first = int(rng.choice([0, 0, size - 2 * pairs]))
    style = ("neox", "gptj")[rng.integers(2)]
    rotation = Rotation(style, tuple(1e4 ** (-np.arange(pairs) / pairs)), first)
    shifts = [int(shift) for shift in rng.integers(-5000, 5000, len(case.spans))]
    if rng.integers(3) == 0:
        shifts[0] = 0
    hosts = [random_floats(rng, payload.nbytes, group.dtype) for _ in case.spans]
    done = [_rotated(host, payload, rotation, s) for host, s in zip(hosts, shifts, strict=True)]
    turned, terms = zip(*done, strict=True)
    _scatter(
        emulator,
        case,
        hosts,
        turned,
        rotate_plans,
        terms,
        shifts=shifts,
        payload=payload,
        rotation=rotation,
    )


def _rows(host: Any, payload: Payload, layer: int, plane: int) -> Any:
    """[head, token, element] of one plane, as numbers; a view of ``host``."""
    group, heads, tokens = payload.group, payload.num_heads, payload.tokens
    sizes = group.planes()
    at = payload.layer_offset(layer) + heads * tokens * sum(sizes[:plane]) * group.itemsize
    nbytes = heads * tokens * sizes[plane] * group.itemsize
    values = torch.from_numpy(host[at : at + nbytes]).view(TORCH_DTYPES[group.dtype])
    return values.view(heads, tokens, sizes[plane])


def _within(found: Any, wanted: Any, terms: Any, dtype: torch.dtype) -> bool:
    """Whether bytes are the same; where ``terms`` are not 0, whether floats are within 1 ulp.

    ``terms`` is the size of the two terms whose sum the float is: where they cancel, what counts
    is their own rounding to float32. What is subnormal there may have become 0.
    """
    size = torch.finfo(dtype)
    same = (found == wanted).reshape(-1, dtype.itemsize).all(1)
    a, b, t = (torch.from_numpy(each).view(dtype).double() for each in (found, wanted, terms))
    ulp = b.abs().clamp(min=size.smallest_normal) * size.eps
    near = (t != 0) & ((a - b).abs() <= ulp + t * 2.0**-22 + 2.0**-124)
    return bool((torch.from_numpy(same) | near).all())


def _rotated(host: Any, payload: Payload, rotation: Rotation, shift: int) -> tuple[Any, Any]:
    """The payload with its keys turned, in double precision; and the terms: see ``_within``."""
    turned, n, first = host.copy(), len(rotation.frequencies), rotation.first
    terms = np.zeros_like(host)
    angles = shift * torch.tensor(rotation.frequencies, dtype=torch.float64)
    cosine, sine = (f(angles).float().double() for f in (torch.cos, torch.sin))
    for layer in range(payload.num_layers if shift else 0):
        (x, y), (x_terms, y_terms) = (
            (part[..., :n], part[..., n:])
            if rotation.style == "neox"
            else (part[..., 0::2], part[..., 1::2])
            for rows in (turned, terms)
            for part in [_rows(rows, payload, layer, 0)[..., first : first + 2 * n]]
        )
        a, b = x.double(), y.double()
        x.copy_(a * cosine - b * sine)
        y.copy_(a * sine + b * cosine)
        least = torch.finfo(x.dtype).smallest_normal
        x_terms.copy_(((a * cosine).abs() + (b * sine).abs()).clamp(min=least))
        y_terms.copy_(((a * sine).abs() + (b * cosine).abs()).clamp(min=least))
    return turned, terms


def quantize(emulator: Emulator, rng: np.random.Generator) -> None:
    """The int8 form of a gather is that of the payload, computed by numpy, bit for bit."""
    case = random_case(rng, gather=True, floats=True, vectors=True)
    dtype, layer = case.layout.group.dtype, int8_layer_nbytes(case.payload)
    sizes = [layer * case.payload.num_layers] * len(case.spans)
    with lent(emulator, case.nbytes()) as caches, lent(emulator, sizes) as stages:
        for cache in caches:
            cache.array[:] = random_floats(rng, cache.nbytes, dtype, finite=False)
        for stage in stages:
            stage.array[:] = 0xCD
        arrays = [cache.array for cache in caches]
        hosts = [np.zeros(case.payload.nbytes, np.uint8) for _ in case.spans]
        case.oracle(arrays, hosts, gather=True)
        moves = case.moves(arrays, hosts, gather=True)
        launch(
            emulator,
            case,
            moves,
            [s.address for s in stages],
            case.view(arrays),
            quantize_plan,
            at=lambda number, _: number * layer,
            payload=case.payload,
        )
        for stage, host in zip(stages, hosts, strict=True):
            assert np.array_equal(stage.array, int8_form(host, case.payload, 0xCD))


def dequantize(emulator: Emulator, rng: np.random.Generator) -> None:
    """Int8 rows come back as numpy computes them, bit for bit, and close to what they were."""
    case = random_case(rng, gather=False, floats=True, vectors=True)
    payload, layer = case.payload, int8_layer_nbytes(case.payload)
    first = payload.part.layers[0]
    hosts = [random_floats(rng, payload.nbytes, case.layout.group.dtype) for _ in case.spans]
    staged = [int8_form(host, payload, 0xCD) for host in hosts]
    back = [_undone(stage, host, payload) for stage, host in zip(staged, hosts, strict=True)]
    skipped = case.layout.layer_range[0] - first
    _scatter(
        emulator,
        case,
        staged,
        back,
        dequantize_plan,
        at=lambda number, _: (number + skipped) * layer,
        payload=payload,
    )


def int8_form(host: Any, payload: Payload, fill: int) -> Any:
    """The payload's int8 form: see ``kvlayer.staging.kernels.int8``."""
    planes, heads, tokens = payload.group.planes(), payload.num_heads, payload.tokens
    form = np.full((payload.num_layers, int8_layer_nbytes(payload)), fill, np.uint8)
    scales_at = -(-sum(planes) * heads * tokens // 16) * 16
    for layer, place in enumerate(form):
        at, scale_at = 0, scales_at
        for plane in range(len(planes)):
            rows = _rows(host, payload, layer, plane).float().numpy()
            largest = np.fmax.reduce(np.abs(rows), -1, keepdims=True, initial=np.float32(0))
            tiny = largest < np.float32(2.0**-100)
            inverse = np.float32(127) / np.where(tiny, np.float32(1), largest)
            with np.errstate(invalid="ignore"):  # infinity * 0
                scaled = np.rint(rows * np.where(tiny, np.float32(0), inverse))
            q = np.where(np.isnan(scaled), np.float32(0), scaled).astype(np.int8)
            scale = np.where(tiny, np.float32(0), largest / np.float32(127))
            place[at : at + q.size] = q.reshape(-1).view(np.uint8)
            place[scale_at : scale_at + scale.nbytes] = scale.reshape(-1).view(np.uint8)
            at, scale_at = at + q.size, scale_at + scale.nbytes
    return form.reshape(-1)


def _undone(stage: Any, host: Any, payload: Payload) -> Any:
    """A payload made of an int8 form."""
    planes, heads, tokens = payload.group.planes(), payload.num_heads, payload.tokens
    back = host.copy()
    for layer, place in enumerate(stage.reshape(payload.num_layers, -1)):
        at, scale_at = 0, -(-sum(planes) * heads * tokens // 16) * 16
        for plane, size in enumerate(planes):
            count, scales = heads * tokens * size, 4 * heads * tokens
            q = place[at : at + count].view(np.int8).astype(np.float32)
            scale = place[scale_at : scale_at + scales].copy().view(np.float32)
            values = q.reshape(heads, tokens, size) * scale.reshape(heads, tokens, 1)
            rows = _rows(back, payload, layer, plane)
            before = rows.float().numpy().copy()
            rows.copy_(torch.from_numpy(values))
            # Half a step, and the rounding of the dtype.
            bound = scale.reshape(heads, tokens, 1) * 0.5 + np.abs(before) * 2.0**-7
            assert (np.abs(rows.float().numpy() - before) <= bound + 1e-7).all()
            at, scale_at = at + count, scale_at + scales
    return back


CHECKS: dict[str, Check] = {
    check.__name__: check for check in (gather, scatter, rotate, quantize, dequantize)
}

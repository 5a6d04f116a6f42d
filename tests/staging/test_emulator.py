"""The emulator computes as the hardware does, and finds what a kernel must not do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulator import Emulator, EmulatorError, Memory

PROBES = """
KV_KERNEL f16_to_f32(u64 from, u64 to, u32 count) {
    for (u32 i = threadIdx.x; i < count; i += THREADS)
        kv_store<float>(to + i * 4, kv_f16_to_float(kv_load<u16>(from + i * 2)));
}
KV_KERNEL f32_to_f16(u64 from, u64 to, u32 count) {
    for (u32 i = threadIdx.x; i < count; i += THREADS)
        kv_store<u16>(to + i * 2, (u16)(kv_floats_to_f16(0.f, kv_load<float>(from + i * 4)) >> 16));
}
KV_KERNEL f32_to_bf16(u64 from, u64 to, u32 count) {
    for (u32 i = threadIdx.x; i < count; i += THREADS)
        kv_store<u16>(to + i * 2, (u16)kv_floats_to_bf16(kv_load<float>(from + i * 4), 0.f));
}
KV_KERNEL sum(u64 from, u64 to) {
    if (threadIdx.x) return;
    for (u32 i = 0; i < 3; i++) {
        const u64 two = from + i * 8;
        kv_store<float>(to + i * 4, kv_load<float>(two) + kv_load<float>(two + 4));
    }
}
KV_KERNEL kv_two(u64, u32) {}
KV_KERNEL load_at(u64 from) { kv_load<uint4>(from); }
KV_KERNEL store_at(u64 to) { kv_store<u32>(to, 1); }
KV_KERNEL unset_shared(u64 to) {
    KV_SHARED float unset;
    kv_store<float>(to, unset);
}
KV_KERNEL barrier_for_half(u64) {
    if (threadIdx.x < 128) __syncthreads();
}
KV_KERNEL barrier_twice_for_some(u64) {
    __syncthreads();
    if (threadIdx.x != 3) __syncthreads();
    else __shfl_xor_sync(1u << 3, 1.f, 0);
}
KV_KERNEL shuffle_without_a_lane(u64) {
    if (threadIdx.x % 32 != 5) __shfl_xor_sync(0xffffffffu, 1.f, 1);
}
KV_KERNEL shuffle_outside_its_mask(u64) {
    if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xffffu, 1.f, 16);
}
KV_KERNEL shuffle_masks_differ(u64) {
    if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xffffffffu, 1.f, 1);
    else __shfl_xor_sync(0xfffffffeu, 1.f, 1);
}
"""


@pytest.fixture(scope="module")
def probes(emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    folder = tmp_path_factory.mktemp("probes")
    return Emulator(folder, edit=lambda source: source + PROBES, runtime=emulator.runtime)


def call(probes: Emulator, kernel: str, *args: int) -> None:
    probes.function("copy", kernel)((1,), (256,), args)


def through(probes: Emulator, kernel: str, values, dtype):
    source, target = Memory(probes, values.nbytes), Memory(probes, len(values) * dtype().itemsize)
    source.array[:] = values.view(np.uint8)
    call(probes, kernel, source.address, target.address, len(values))
    found = target.array.copy().view(dtype)
    for memory in (source, target):
        memory.close()
    return found


def test_every_half_float_becomes_the_same_float(probes):
    halves = np.arange(1 << 16, dtype=np.uint16)
    found = through(probes, "f16_to_f32", halves, np.float32)
    wanted = halves.view(np.float16).astype(np.float32)
    number = ~np.isnan(wanted)
    assert np.array_equal(found[number].view(np.uint32), wanted[number].view(np.uint32))
    assert np.isnan(found[~number]).all()


def floats():
    """Every half and bfloat16, what lies between two of them, and random bits."""
    with np.errstate(over="ignore", invalid="ignore"):
        halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
        bfloats = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
        near = [each.view(np.uint32) + d for each in (halves, bfloats) for d in (0, 1, 0x1000)]
        ties = [(each.view(np.uint32) + 0x8000) for each in (halves, bfloats)]
    bits = np.random.default_rng(0).integers(0, 1 << 32, 50_000, dtype=np.uint32)
    values = np.concatenate([*near, *ties, bits]).view(np.float32)
    return values[~np.isnan(values)]


@pytest.mark.parametrize(
    ("kernel", "dtype"), [("f32_to_f16", torch.float16), ("f32_to_bf16", torch.bfloat16)]
)
def test_floats_round_to_the_nearest_ties_to_even(probes, kernel, dtype):
    values = floats()
    found = through(probes, kernel, values, np.uint16)
    wanted = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(found, wanted)


def test_subnormal_floats_are_zero_in_kernels_and_nowhere_else(probes):
    smallest, half = np.float32(2.0**-126), np.float32(2.0**-127)
    terms = np.array([half, 0, smallest, -half, smallest, half + half], np.float32)
    assert through(probes, "sum", terms, np.float32)[:3].tolist() == [0, smallest, 2 * smallest]
    assert half + half == smallest


@pytest.mark.parametrize(
    ("args", "found"),
    [
        ((np.uint64(1), np.uint64(2)), "88"),
        ((np.uint32(1), np.uint32(2)), "44"),
        ((np.uint64(1),), "8"),
        ((np.uint64(1), np.uint32(2), np.uint32(3)), "844"),
    ],
)
def test_arguments_that_are_not_the_kernels_are_an_error(probes, args, found):
    call(probes, "kv_two", np.uint64(1), np.uint32(2))
    with pytest.raises(EmulatorError, match=f"takes arguments of 84 bytes, found {found}$"):
        call(probes, "kv_two", *args)
    with pytest.raises(EmulatorError, match="17 arguments, at most 16"):
        call(probes, "store_at", *range(17))


@pytest.mark.parametrize(("at", "nbytes"), [(-16, 16), (32, 16), (16, 24), (24, 32), (1 << 30, 16)])
def test_an_access_outside_of_lent_memory_is_an_error(probes, at, nbytes):
    memory = Memory(probes, nbytes)
    with pytest.raises(EmulatorError, match=r"outside of the memory|misaligned"):
        call(probes, "load_at", memory.address + at)
    memory.close()
    with pytest.raises(EmulatorError, match="store outside"):
        call(probes, "store_at", memory.address)


def test_a_misaligned_access_is_an_error(probes):
    memory = Memory(probes, 64)
    with pytest.raises(EmulatorError, match="misaligned access of 16 bytes"):
        call(probes, "load_at", memory.address + 8)
    memory.close()


def test_shared_memory_holds_nan_until_it_is_written(probes):
    memory = Memory(probes, 4)
    for _ in range(2):
        memory.array[:] = 0
        call(probes, "unset_shared", memory.address)
        assert np.isnan(memory.array.view(np.float32)[0])
    memory.close()


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("barrier_for_half", "some threads have ended|never reach"),
        ("barrier_twice_for_some", "some threads have ended|never reach"),
        ("shuffle_without_a_lane", "has ended|never reach"),
        ("shuffle_outside_its_mask", "outside of its mask"),
        ("shuffle_masks_differ", "lacks the caller|different masks"),
    ],
)
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_threads_that_do_not_meet_are_an_error(probes, kernel, message, order):
    probes.order = order
    with pytest.raises(EmulatorError, match=message):
        call(probes, kernel, 0)


def test_accesses_are_logged_and_sectors_counted(probes):
    memory = Memory(probes, 512)
    memory.array[:] = 0
    with probes.accesses() as accesses, probes.sectors() as sectors:
        call(probes, "f16_to_f32", memory.address, memory.address + 256, 32)
    assert {(a.address - memory.address, a.nbytes) for a in accesses if not a.stores} == {
        (2 * i, 2) for i in range(32)
    }
    assert sum(a.stores for a in accesses) == 32
    assert sectors["loads"] == (64, 2)
    assert sectors["stores"] == (128, 4)
    memory.close()

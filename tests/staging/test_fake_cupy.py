"""The fake GPU is worth something only if it is like CuPy, and sees what it should see."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from types import ModuleType

import fake_cupy
import numpy as np
import pytest
from fake_cupy import Calls
from gpu_sim import FakeCudaError, Gpu, bytes_at

from kvlayer.staging.cuda.runtime import Runtime
from kvlayer.staging.kernels.build import kernel_source

FUNCTIONS = [
    name
    for name, value in vars(Runtime).items()
    if inspect.isfunction(value) and not name.startswith("_")
]


@pytest.fixture
def real() -> ModuleType:
    pytest.importorskip("cupy", reason="CuPy is not installed: nox -s kernels has it")
    return import_module("cupy.cuda.runtime")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_call_of_the_pipeline_exists_in_cupy_with_these_parameters(
    name: str, real: ModuleType
) -> None:
    signature = (getattr(real, name).__doc__ or "").splitlines()[0]
    theirs = re.findall(r"(\w+)(?:=[^,)]*)?[,)]", signature)
    ours = [each for each in inspect.signature(getattr(Runtime, name)).parameters if each != "self"]
    with fake_cupy.install(Gpu("eager")):
        fake = import_module("cupy.cuda.runtime")
        fakes = list(inspect.signature(getattr(fake, name)).parameters)
    assert theirs[: len(ours)] == ours
    assert fakes[: len(ours)] == ours


def test_constants_and_errors_are_cupys(real: ModuleType) -> None:
    assert (real.memcpyHostToDevice, real.memcpyDeviceToHost) == (1, 2)
    assert (real.streamNonBlocking, real.eventBlockingSync, real.eventDisableTiming) == (1, 1, 2)
    assert real.hostAllocPortable == 1
    assert issubclass(real.CUDARuntimeError, Exception)


def two_streams(mode: str, *, waits: bool) -> tuple[Gpu, int]:
    """A copy up on one stream, and a copy down of the same bytes on another."""
    gpu = Gpu(mode)
    with fake_cupy.install(gpu, calls=Calls()):
        cuda = import_module("cupy.cuda.runtime")
        first, second = cuda.streamCreateWithPriority(1, -1), cuda.streamCreateWithPriority(1, -1)
        event, device = cuda.eventCreateWithFlags(3), cuda.malloc(64)
        host, back = cuda.hostAlloc(64, 1), cuda.hostAlloc(64, 1)
        bytes_at(host, 64)[:] = 7
        cuda.memcpyAsync(device, host, 64, 1, first)
        cuda.eventRecord(event, first)
        if waits:
            cuda.streamWaitEvent(second, event)
        cuda.memcpyAsync(back, device, 64, 2, second)
        cuda.streamSynchronize(second)
        return gpu, int(bytes_at(back, 64)[0])


def test_a_missing_wait_is_wrong_bytes_when_late_and_a_race_when_not() -> None:
    assert two_streams("lazy", waits=True)[1] == 7
    assert two_streams("lazy", waits=False)[1] != 7
    (clean, _), (racing, value) = (two_streams("race", waits=waits) for waits in (True, False))
    assert clean.races is not None and racing.races is not None
    assert clean.races.found == []
    assert value == 7 and racing.races.found


def test_a_module_has_the_kernels_that_its_source_defines_and_no_others() -> None:
    with fake_cupy.install(Gpu("eager")):
        make = import_module("cupy").RawModule
        module = make(code=kernel_source("int8"), options=(), backend="nvrtc")
        assert module.get_function("kv_quantize_bf16")
        for name in ("kv_scatter", "kv_quantize", "quantize_tile"):  # all are in its text
            with pytest.raises(FakeCudaError, match="NOT_FOUND"):
                module.get_function(name)


def test_cudas_rules_are_kept() -> None:
    gpu = Gpu("eager", devices=2)
    memory = np.zeros(4096, np.uint8)
    start = memory.ctypes.data
    with fake_cupy.install(gpu):
        cuda = import_module("cupy.cuda.runtime")
        stream, device = cuda.streamCreateWithPriority(1, -1), cuda.malloc(4096)
        cuda.hostRegister(start, 2048, 1)
        cuda.hostRegister(start + 2048, 2048, 1)
        cuda.memcpyAsync(device, start, 2048, 1, stream)
        with pytest.raises(FakeCudaError, match="two registrations"):
            cuda.memcpyAsync(device, start, 4096, 1, stream)
        with pytest.raises(FakeCudaError, match="AlreadyRegistered"):
            cuda.hostRegister(start, 64, 1)
        with pytest.raises(FakeCudaError, match="IllegalAddress"):
            cuda.memcpyAsync(device + 4000, start, 1024, 1, stream)
        cuda.free(device)
        with pytest.raises(FakeCudaError, match="IllegalAddress"):
            cuda.memcpyAsync(device, start, 64, 1, stream)
        cuda.setDevice(1)
        with pytest.raises(FakeCudaError, match="another device"):
            cuda.memcpyAsync(cuda.malloc(64), start, 64, 1, stream)

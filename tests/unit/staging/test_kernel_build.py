"""Where CUDA cannot be used, the error says why and what to do; what is built is built once."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kvlayer.errors import UnsupportedError
from kvlayer.staging.kernels import build
from kvlayer.staging.kernels.build import MIN_ARCH, OPTIONS, SOURCES, Builder, kernel_source


class CUDARuntimeError(RuntimeError):
    """As ``cupy.cuda.runtime`` has it."""


class Machine:
    """What CuPy says of a machine, and what was asked of it."""

    def __init__(self, archs: list[int], *, driver: bool = True, compiles: bool = True) -> None:
        self.archs, self.driver, self.compiles = archs, driver, compiles
        self.modules: list[dict[str, Any]] = []

    def count(self) -> int:
        if not self.driver:
            raise CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is too old")
        return len(self.archs)

    def module(self, **given: Any) -> Any:
        self.modules.append(given)

        def function(name: str) -> Any:
            if not self.compiles:
                raise ValueError("copy.cu(3): error: identifier is undefined\n1 error detected\n")
            return name, lambda *_: None

        return SimpleNamespace(get_function=function)

    def device(self, number: int) -> Any:
        device = Device()
        device.compute_capability = str(self.archs[number])
        return device


class Device:
    compute_capability: str

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def install(monkeypatch):
    def put(machine: Machine) -> Machine:
        cupy: Any = ModuleType("cupy")
        runtime = SimpleNamespace(getDeviceCount=machine.count, CUDARuntimeError=CUDARuntimeError)
        cupy.cuda = SimpleNamespace(runtime=runtime, Device=machine.device)
        cupy.RawModule = machine.module
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        return machine

    return put


def refused(device: int = 0) -> UnsupportedError:
    with pytest.raises(UnsupportedError) as caught:
        Builder(device).function("copy", "kv_gather")
    assert caught.value.hint
    return caught.value


def test_no_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    error = refused()
    assert "CuPy cannot be imported" in str(error)
    assert "pip install cupy-cuda13x" in str(error.hint)


def test_cupy_that_cannot_make_the_folder_of_its_cache(monkeypatch):
    def refuse(name: str) -> ModuleType:
        raise PermissionError(13, "Permission denied", "/home/nobody/.cupy")

    monkeypatch.setattr(build, "import_module", refuse)
    error = refused()
    assert "CuPy cannot be imported: [Errno 13] Permission denied" in str(error)
    assert "CUPY_CACHE_DIR" in str(error.hint)


def test_no_driver(install):
    install(Machine([90], driver=False))
    assert "no CUDA driver or device: cudaErrorInsufficientDriver" in str(refused())


@pytest.mark.parametrize(("archs", "device"), [([], 0), ([90], 1), ([90], -1)])
def test_no_such_device(install, archs, device):
    install(Machine(archs))
    assert f"no CUDA device {device}: {len(archs)} found" in str(refused(device))


def test_an_architecture_that_is_too_old(install):
    install(Machine([90, 75]))
    assert f"device 1 is sm_75; the kernels need sm_{MIN_ARCH} or newer" in str(refused(1))


def test_a_kernel_that_does_not_compile(install):
    install(Machine([120], compiles=False))
    error = refused()
    assert "kernel kv_gather of copy.cu does not build for sm_120" in str(error)
    assert "identifier is undefined; 1 error detected" in str(error)
    assert isinstance(error.__cause__, ValueError)


def test_a_module_is_built_once_with_the_options_that_are_checked(install):
    machine = install(Machine([90]))
    builder = Builder()
    first = builder.function("copy", "kv_gather")
    assert builder.function("copy", "kv_gather") is first
    builder.function("copy", "kv_scatter")
    builder.function("int8", "kv_quantize_bf16")
    assert [given["options"] for given in machine.modules] == [OPTIONS, OPTIONS]
    assert machine.modules[0]["code"] == kernel_source("copy")


def test_what_is_built_is_named_by_source_options_and_architecture(install, monkeypatch):
    install(Machine([90, 120]))
    names = {Builder(device).fingerprint(source) for device in (0, 1) for source in SOURCES}
    assert len(names) == 6
    monkeypatch.setattr(build, "OPTIONS", (*OPTIONS, "--use_fast_math"))
    assert Builder(0).fingerprint("copy") not in names


def test_a_source_is_one_text_that_includes_nothing():
    for name in SOURCES:
        source = kernel_source(name)
        assert "#include" not in source and "#pragma once" not in source
        assert source.count("struct Plane {") == 1


def test_planning_launches_imports_neither_cupy_nor_torch():
    code = (
        "import kvlayer.staging.kernels.build, kvlayer.staging.kernels.int8, sys;"
        "assert not {'cupy', 'torch', 'numpy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

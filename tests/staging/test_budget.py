"""What the kernels cost once compiled, per architecture: read from the machine code, not measured.

``budget.json`` holds what was found and is compared with what is found now: a kernel that takes
more registers, or starts to spill, is a change that must be seen. ``WRITE_BUDGET=1`` writes
it anew.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from emulator import kernels_of

from kvlayer.staging.kernels.build import ARCHITECTURES, OPTIONS, SOURCES, kernel_source

BUDGET = Path(__file__).with_name("budget.json")
THREADS = 256
MAX_REGISTERS = 64  # four blocks of 256 threads on a multiprocessor
MAX_SHARED = 4096
LOCAL = {"LDL", "STL"}
BUILT_WITH = (*OPTIONS, "-ftz=true", "--device-as-default-execution-space")  # as CuPy does
COPIES = {"kv_gather", "kv_scatter"}

ACCESS = re.compile(r"\b(LDL|STL|LDG|STG|LD|ST)\.E?\.?([A-Z0-9.]*)")
USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# Registers, threads and blocks that a multiprocessor has room for.
PROCESSORS = {
    80: (65536, 2048, 32),
    90: (65536, 2048, 32),
    100: (65536, 2048, 32),
    120: (65536, 1536, 24),
}


def tool(name: str) -> Path:
    """A program of the CUDA toolkit's wheels."""
    spec = find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [path for folder in folders for path in Path(folder).glob(f"*/bin/{name}")]
    if not found:
        pytest.skip(f"needs {name} (dependency group `kernels`)")
    return found[0]


def compiled(text: str, name: str, folder: Path, arch: int) -> Path:
    """Machine code of a source's text for an architecture; no driver is needed."""
    nvrtc = pytest.importorskip("cupy", reason="needs CuPy (dependency group `kernels`)").cuda.nvrtc
    program = nvrtc.createProgram(text, f"{name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"--gpu-architecture=sm_{arch}", *BUILT_WITH))
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    assert not nvrtc.getProgramLog(program).strip("\0 \n"), "the compiler warns"
    file = folder / f"{name}_{arch}.cubin"
    file.write_bytes(nvrtc.getCUBIN(program) + b"\0")  # CuPy drops the last byte
    return file


def printed(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


Cost = dict[str, Any]


def costs(file: Path, arch: int) -> dict[str, Cost]:
    """Kernel -> what it takes."""
    accesses = _accesses(printed(tool("nvdisasm"), "-c", file))
    usage = printed(tool("cuobjdump"), "--dump-resource-usage", file)
    return {
        match[1]: {
            "registers": int(match[2]),
            "stack": int(match[3]),
            "shared": int(match[4]),
            "local": int(match[5]),
            "occupancy": _occupancy(arch, int(match[2])),
            "accesses": accesses[match[1]],
        }
        for match in USAGE.finditer(usage)
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Cost]]:
    """Kernel -> architecture -> what it takes."""
    folder = tmp_path_factory.mktemp("cubin")
    kernels: dict[str, dict[str, Cost]] = {}
    for source in SOURCES:
        for arch in ARCHITECTURES:
            file = compiled(kernel_source(source), source, folder, arch)
            for name, cost in costs(file, arch).items():
                kernels.setdefault(name, {})[f"sm_{arch}"] = cost
    return {name: kernels[name] for name in sorted(kernels)}


def _accesses(sass: str) -> dict[str, dict[str, int]]:
    """Kernel -> kind and width in bits of its accesses of memory -> how many.

    What is read as constant are the plan's tables, not rows.
    """
    kernels: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in sass.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.(\w+)", line)
        if section:
            current = kernels.setdefault(section[1], {})
        access = ACCESS.search(line)
        if access:
            modifiers = access[2].split(".")
            width = next((w for w in ("128", "64", "U16", "U8") if w in modifiers), "32")
            table = ".CONSTANT" if "CONSTANT" in modifiers else ""
            kind = f"{access[1]}{table}.{width.removeprefix('U')}"
            current[kind] = current.get(kind, 0) + 1
    return {name: dict(sorted(kinds.items())) for name, kinds in kernels.items()}


def _occupancy(arch: int, registers: int) -> float:
    """Threads that fit at once, of those a multiprocessor has room for."""
    total, threads, blocks = PROCESSORS[arch]
    fit = min(total // (-(-registers // 8) * 8 * THREADS), threads // THREADS, blocks)
    return round(fit * THREADS / threads, 2)


def test_kernels_are_checked_with_the_options_that_cupy_builds_them_with(monkeypatch):
    pytest.importorskip("cupy", reason="needs CuPy (dependency group `kernels`)")
    compiler = import_module("cupy.cuda.compiler")
    seen: list[tuple[str, ...]] = []

    class SeenError(Exception):
        """Far enough: what follows needs a driver."""

    def note(program: object, options: tuple[str, ...], *rest: object) -> None:
        seen.append(options)
        raise SeenError

    monkeypatch.setattr(compiler._NVRTCProgram, "compile", note)
    monkeypatch.setattr(compiler, "_preprocess", lambda *_: "")
    arch = ("-arch=sm_90", "cubin")
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda *_: arch)
    with pytest.raises(SeenError):
        compiler._compile_with_cache_cuda(
            kernel_source("copy"), OPTIONS, arch="90", cache_in_memory=True
        )
    assert [{*options} - {arch[0], "--pch"} for options in seen] == [{*BUILT_WITH}]


def test_every_kernel_is_compiled_for_every_architecture(found):
    names = {f"sm_{arch}" for arch in ARCHITECTURES}
    assert {name: set(archs) for name, archs in found.items()} == dict.fromkeys(found, names)
    listed = {name for source in SOURCES for name in kernels_of(kernel_source(source))}
    assert set(found) == listed


def test_no_kernel_spills_or_uses_local_memory(found):
    for name, archs in found.items():
        for arch, cost in archs.items():
            assert cost["stack"] == cost["local"] == 0, (name, arch)
            assert not [kind for kind in cost["accesses"] if kind.startswith(("LDL", "STL"))]


def test_no_kernel_takes_more_than_64_registers_or_4_kib_of_shared_memory(found):
    for name, archs in found.items():
        for arch, cost in archs.items():
            assert cost["registers"] <= MAX_REGISTERS, (name, arch)
            assert cost["shared"] <= MAX_SHARED, (name, arch)


def test_copies_move_128_bits_at_a_time_four_under_way(found):
    for name in COPIES:
        for arch, cost in found[name].items():
            for kind in ("LDG.128", "STG.128"):
                assert cost["accesses"].get(kind, 0) >= 4, (name, arch, kind)


def test_kernels_that_transform_read_and_write_rows_of_floats_128_bits_at_a_time(found):
    for name, archs in found.items():
        for arch, cost in archs.items():
            if not name.startswith("kv_dequantize"):
                assert cost["accesses"].get("LDG.128", 0) >= 1, (name, arch)
            if not name.startswith("kv_quantize"):
                assert cost["accesses"].get("STG.128", 0) >= 1, (name, arch)


def test_all_memory_is_addressed_as_global(found):
    """Generic accesses would have to find out what they address."""
    for name, archs in found.items():
        for arch, cost in archs.items():
            generic = [kind for kind in cost["accesses"] if kind.startswith(("LD.", "ST."))]
            assert not generic, (name, arch)


def test_the_budget_is_what_was_agreed(found):
    if os.environ.get("WRITE_BUDGET"):
        BUDGET.write_text(json.dumps(found, indent=1) + "\n")
    budget = json.loads(BUDGET.read_text())
    assert set(budget) == set(found)
    for name, archs in found.items():
        for arch, cost in archs.items():
            assert cost["registers"] <= budget[name][arch]["registers"], (name, arch)
            assert cost["occupancy"] >= budget[name][arch]["occupancy"], (name, arch)


def test_the_gate_sees_spills_and_narrow_accesses(tmp_path):
    """Kernels that are given too few registers, and that copy 8 bytes where 16 would do."""
    text = kernel_source("copy")
    squeezed = text.replace("__launch_bounds__(256)", "__launch_bounds__(256, 8)")
    narrow = text.replace("copy_tile<uint4, GATHER>", "copy_tile<uint2, GATHER>")
    assert text not in {squeezed, narrow}
    cost = costs(compiled(squeezed, "squeezed", tmp_path, 90), 90)["kv_gather"]
    assert cost["stack"] > 0
    assert {kind.split(".")[0] for kind in cost["accesses"]} >= LOCAL
    cost = costs(compiled(narrow, "narrow", tmp_path, 90), 90)["kv_gather"]
    assert not {"LDG.128", "STG.128"} & {*cost["accesses"]}

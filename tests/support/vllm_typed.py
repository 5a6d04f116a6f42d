"""Checks what the adapter asks of vLLM against a release of it that has no build for CPUs.

``python vllm_typed.py WHEEL SOURCES``, in an environment with the engine and basedpyright.
The adapter holds vLLM's objects as ``Any`` and reaches vLLM through ``kvlayer_vllm.engine`` and
``kvlayer_vllm.engine_offload`` alone.
In a copy of it the real classes stand there instead, and a type checker looks up every attribute,
call and hook in the sources of the installed engine and of the wheel, neither of which is imported.
A finding that the installed engine does not have, for which the tests run, fails; so does a control
that is not found.

A checker does not read strings. What the adapter asks for by ``getattr`` must be declared somewhere
in the wheel, and every hook of the connector and of the tier in one of the classes that it inherits
from.
"""

from __future__ import annotations

import argparse
import ast
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import kvlayer
import kvlayer_vllm

ADAPTER = Path(kvlayer_vllm.__file__).parent
CORE = Path(kvlayer.__file__).parents[1]

_V1 = "vllm.distributed.kv_transfer.kv_connector.v1"
_OFFLOAD = "vllm.v1.kv_offload"
HOME = {
    "VllmConfig": "vllm.config",
    "KVTransferConfig": "vllm.config",
    "KVCacheConfig": "vllm.v1.kv_cache_interface",
    "KVCacheGroupSpec": "vllm.v1.kv_cache_interface",
    "Request": "vllm.v1.request",
    "SchedulerOutput": "vllm.v1.core.sched.output",
    "KVConnectorOutput": "vllm.v1.outputs",
    "KVCacheManager": "vllm.v1.core.kv_cache_manager",
    "KVCacheBlocks": "vllm.v1.core.kv_cache_manager",
    "KVConnectorBase_V1": f"{_V1}.base",
    "SupportsHMA": f"{_V1}.base",
    "KVConnectorMetadata": f"{_V1}.base",
    "KVConnectorWorkerMetadata": f"{_V1}.base",
    "KVConnectorRole": f"{_V1}.base",
    "KVConnectorTransferResults": f"{_V1}.base",
    "KVConnectorStats": f"{_V1}.metrics",
    "KVConnectorPromMetrics": f"{_V1}.metrics",
    "OffloadingSpec": f"{_OFFLOAD}.base",
    "ReqContext": f"{_OFFLOAD}.base",
    "LookupResult": f"{_OFFLOAD}.base",
    "RequestOffloadingContext": f"{_OFFLOAD}.base",
    "TransferJob": f"{_OFFLOAD}.tiering.base",
    "SecondaryTierManager": f"{_OFFLOAD}.tiering.base",
    "JobResult": f"{_OFFLOAD}.tiering.base",
    "Locality": f"{_OFFLOAD}.base",
    "Medium": f"{_OFFLOAD}.base",
}
"""Where vLLM has what ``kvlayer_vllm.engine`` and ``kvlayer_vllm.engine_offload`` declare."""

LEFT_OUT = ["bench", "__pycache__"]

CONTROL = """
from kvlayer_vllm.engine import KVCacheManager, KVConnectorBase_V1, Request
from kvlayer_vllm.engine_offload import ReqContext, SecondaryTierManager

def gone(request: Request) -> object:
    return request.an_attribute_that_is_gone

def another_parameter(manager: KVCacheManager) -> object:
    return manager.get_block_ids(request_id="", one_too_many=1)

class Hooks(KVConnectorBase_V1):
    def on_new_request(self, one: object, too_many: object) -> None: ...

def gone_too(context: ReqContext) -> object:
    return context.an_attribute_that_is_gone

class Tier(SecondaryTierManager):
    def lookup(self, one: object) -> object: ...
"""
CONTROLS = {
    "reportAttributeAccessIssue": 2,
    "reportCallIssue": 1,
    "reportIncompatibleMethodOverride": 2,
}


class Finding(NamedTuple):
    """What the checker says of a line; without the line's number, so that two runs compare."""

    file: str
    rule: str
    message: str


class _Typed(ast.NodeTransformer):
    """Puts vLLM's own classes and modules where the adapter has ``Any``."""

    def __init__(self) -> None:
        self.modules: set[str] = set()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """``Request: TypeAlias = Any``."""
        if isinstance(node.target, ast.Name) and node.target.id in HOME:
            return _import(node.target.id)
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.AST]:
        """What is declared for type checkers alone, and imported otherwise."""
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            return self.generic_visit(node)
        declared = [each.name for each in node.body if isinstance(each, ast.ClassDef)]
        declared += [
            each.target.id
            for each in node.body
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        ]
        return [_import(name) for name in declared]

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """``module("v1.request")``."""
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Name(id="module"), args=[ast.Constant(value=str(path))]):
                self.modules.add(f"vllm.{path}")
                return ast.parse(f"vllm.{path}", mode="eval").body
            case _:
                return node


def _import(name: str) -> ast.AST:
    return ast.ImportFrom(HOME[name], [ast.alias(name, name)], 0)


def typed_copy(folder: Path) -> None:
    """The adapter with vLLM's own types, and the controls, below ``folder``."""
    copy = folder / "kvlayer_vllm"
    shutil.copytree(ADAPTER, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for path in copy.rglob("*.py"):
        typed = _Typed()
        tree: ast.Module = typed.visit(ast.parse(path.read_text()))
        imports = [ast.Import([ast.alias(each)]) for each in sorted(typed.modules)]
        first = next(n for n, each in enumerate(tree.body) if isinstance(each, ast.ImportFrom))
        tree.body[first + 1 : first + 1] = imports
        path.write_text(ast.unparse(ast.fix_missing_locations(tree)))
    (copy / "control.py").write_text(CONTROL)


def findings(folder: Path, engine: Path | None) -> set[Finding]:
    """What a type checker says of the copy beside an engine's sources; None: the installed ones.

    Raises ``SystemExit`` unless it has found every control.
    """
    paths = [str(CORE)] if engine is None else [str(engine), str(CORE)]
    settings = {"include": ["kvlayer_vllm"], "extraPaths": paths, "typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "-p", str(folder)]
    done = subprocess.run(
        [*command, "--pythonpath", sys.executable], stdout=subprocess.PIPE, check=False
    )
    found = {
        Finding(Path(each["file"]).name, each.get("rule", ""), each["message"])
        for each in json.loads(done.stdout)["generalDiagnostics"]
        if each["severity"] == "error"
    }
    controls = {each for each in found if each.file == "control.py"}
    if Counter(each.rule for each in controls) != CONTROLS:
        raise SystemExit(f"the controls were not found, so nothing was checked: {controls}")
    return found - controls


# -- what a type checker does not see --------------------------------------------------------------


def _sources() -> list[Path]:
    return [path for path in ADAPTER.rglob("*.py") if not {*LEFT_OUT} & {*path.parts}]


def asked_by_name() -> set[str]:
    """Attributes of vLLM's that the adapter asks for by ``getattr`` or a list of names."""
    found: set[str] = set()
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(str(name)), *_]):
                    found.add(name)
                case _:
                    pass
    return found


def declared(folder: Path) -> set[str]:
    """Names of attributes, methods, functions and classes anywhere in an engine's sources."""
    found: set[str] = set()
    for path in (folder / "vllm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.AnnAssign(target=ast.Name(id=name)) | ast.Name(id=name, ctx=ast.Store()):
                    found.add(name)
                case ast.Attribute(attr=name, ctx=ast.Store()):
                    found.add(name)
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                    found.add(name)
                case _:
                    pass
    return found


def hooks(file: str, base: str) -> set[str]:
    """The public methods of the class that inherits from ``base``: vLLM calls them by name."""
    return {
        method.name
        for each in ast.parse((ADAPTER / file).read_text()).body
        if isinstance(each, ast.ClassDef)
        if base in {inherited.id for inherited in each.bases if isinstance(inherited, ast.Name)}
        for method in each.body
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
    }


def methods(folder: Path, base: str) -> set[str]:
    """The methods of the classes that stand where a base class does."""
    path = folder.joinpath(*HOME[base].split(".")).with_suffix(".py")
    return {
        method.name
        for each in ast.parse(path.read_text()).body
        if isinstance(each, ast.ClassDef)
        for method in each.body
        if isinstance(method, ast.FunctionDef)
    }


HOOKS = {"connector.py": "KVConnectorBase_V1", "tier/manager.py": "SecondaryTierManager"}
"""Where the adapter has what vLLM calls, and the class that says so."""
OWN = {"introduction", "is_on", "scheduler"}
"""The connector's own: no hooks."""
OF_OTHERS = {"shape", "layer_types", "rope_parameters"}
"""Of torch and of models' configurations: not vLLM's to declare."""
GONE = {"calculate_kv_scales"}
"""Of older releases: a later one computes no scales while it runs."""


def problems(folder: Path, engine: Path, known: set[Finding]) -> Iterator[str]:
    """What the adapter asks of an engine that is not there, or is not so any more."""
    for each in sorted(findings(folder, engine) - known):
        yield f"{each.file}: {each.message} ({each.rule})"
    for name in sorted(asked_by_name() - OF_OTHERS - GONE - declared(engine)):
        yield f"nothing in it is called {name!r}"
    for file, base in HOOKS.items():
        for name in sorted(hooks(file, base) - OWN - methods(engine, base)):
            yield f"{file}: there is no hook {name!r}"


def unpack(wheel: Path, folder: Path) -> None:
    """The Python sources of a wheel, as a build for CPUs: what needs no kernel can be run."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith((".py", ".typed"))]
        archive.extractall(folder, names)
    version = f"{wheel.name.split('-')[1]}+cpu"
    metadata = folder / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="vllm_typed", allow_abbrev=False)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("sources", type=Path, help="a new folder, for the wheel's")
    chosen = parser.parse_args(arguments)
    unpack(chosen.wheel, chosen.sources)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        typed_copy(folder)
        found = [*problems(folder, chosen.sources, findings(folder, None))]
    sys.stdout.write(f"{chosen.wheel.name}: {len(found) or 'nothing'} to look at\n")
    sys.stdout.writelines(f"  {each}\n" for each in found)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

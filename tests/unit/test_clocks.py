"""No test depends on the clock: none asserts what one says, and a bound on a wait is ``HANG``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CLOCKS = frozenset(
    {"time", "monotonic", "perf_counter", "process_time", "thread_time"}
    | {"time_ns", "monotonic_ns", "perf_counter_ns", "process_time_ns", "thread_time_ns"}
)
LEAST = 120  # seconds: a shorter bound may be over on a busy machine before anything has hung
EXEMPT = {
    # They time a GPU against its own ceiling, alone on the machine.
    "gpu": "figures of a device",
}
FILES = [
    path
    for path in sorted(TESTS.rglob("*.py"))
    if path.relative_to(TESTS).parts[0] not in EXEMPT and path.name != Path(__file__).name
]


def _is_clock(node: ast.AST) -> bool:
    """``time.monotonic()``, ``perf_counter()``; not ``loop.time()``, which may be virtual."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="time"), attr=name)):
            return name in CLOCKS
        case ast.Call(func=ast.Name(id=name)):
            return name in CLOCKS - {"time"}
        case _:
            return False


def _names(target: ast.AST) -> Iterator[str]:
    yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def asserted_clocks(tree: ast.AST) -> list[int]:
    """Lines of assertions about what a clock has said, also by way of names in one function."""
    found: set[int] = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        timed: set[str] = set()

        def tells(node: ast.AST, timed: set[str] = timed) -> bool:
            return any(
                _is_clock(each) or (isinstance(each, ast.Name) and each.id in timed)
                for each in ast.walk(node)
            )

        before = -1
        while before != len(timed):  # a loop may use what its end has set
            before = len(timed)
            for node in ast.walk(function):
                if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.NamedExpr):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    if node.value is not None and tells(node.value):
                        timed |= {name for target in targets for name in _names(target)}
        found |= {
            node.lineno
            for node in ast.walk(function)
            if isinstance(node, ast.Assert) and tells(node.test)
        }
    return sorted(found)


def short_bounds(tree: ast.AST) -> list[int]:
    """Lines that wait for a few seconds for what must happen: 1 to 120, written as a number."""
    found: list[int] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        name = node.func.id if isinstance(node.func, ast.Name) else name
        bounds = [keyword.value for keyword in node.keywords if keyword.arg == "timeout"]
        if name in ("wait", "join", "settimeout", "wait_for", "communicate"):
            bounds += node.args[-1:]
        found += [
            node.lineno
            for bound in bounds
            if isinstance(bound, ast.Constant)
            and isinstance(bound.value, int | float)
            and 1 < bound.value < LEAST
        ]
    return found


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(TESTS)) for path in FILES])
def test_no_assertion_depends_on_a_clock(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert asserted_clocks(tree) == []
    assert short_bounds(tree) == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("def t():\n    assert time.monotonic() < 3", [2]),
        ("def t():\n    a = perf_counter()\n    b = perf_counter() - a\n    assert b < 3", [4]),
        ("def t():\n    for _ in r:\n        assert w < 3\n        w = max(w, time.time())", [3]),
        ("def t():\n    a = time.monotonic()\n    figures(seconds=a)", []),
        ("def t():\n    assert loop.time() == 3.0", []),
        ("def t():\n    assert time.strftime('%Y')", []),
    ],
)
def test_assertions_on_clocks_are_found(source: str, lines: list[int]) -> None:
    assert asserted_clocks(ast.parse(source)) == lines


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("job.wait(10)", [1]),
        ("thread.join(timeout=30.0)", [1]),
        ("await asyncio.wait_for(work(), 5)", [1]),
        ("job.wait(HANG)", []),
        ("job.wait(0.001)", []),
        ("job.wait(300)", []),
        ("', '.join(names)", []),
    ],
)
def test_short_bounds_are_found(source: str, lines: list[int]) -> None:
    assert short_bounds(ast.parse(source)) == lines

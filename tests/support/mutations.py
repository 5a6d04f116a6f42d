"""The small bugs that a source may have: where they would stand, and the text with one of them."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Mutation", "mutations_of"]

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
}
_STATEMENTS = (ast.Expr, ast.AugAssign, ast.Delete, ast.Raise, ast.Break, ast.Continue)


@dataclass(frozen=True, slots=True)
class Mutation:
    """``text[start:end]`` of a source becomes ``new``."""

    operator: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def applied(self, text: str) -> str:
        """The source with the bug."""
        assert text[self.start : self.end] == self.old
        return text[: self.start] + self.new + text[self.end :]

    def __str__(self) -> str:
        return f"{self.line}: {self.operator}: {' '.join(self.old.split())} -> {self.new}"


def mutations_of(text: str) -> list[Mutation]:
    """Every mutation of a source, each of which compiles, in the order of their places."""
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def place(line: int, column: int) -> int:
        """Columns are counted in bytes."""
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    found: list[Mutation] = []
    for operator, node, new in _sites(ast.parse(text)):
        start = place(node.lineno, node.col_offset)
        end = place(node.end_lineno or 0, node.end_col_offset or 0)
        mutation = Mutation(operator, node.lineno, start, end, text[start:end], new)
        try:
            compile(mutation.applied(text), "mutant", "exec")
        except SyntaxError:
            continue
        found.append(mutation)
    return sorted(found, key=lambda each: (each.start, -each.end))


def _sites(node: ast.AST) -> Iterator[tuple[str, Any, str]]:
    """What may change below ``node``: the operator, the piece that changes, and into what."""
    if isinstance(node, ast.JoinedStr | ast.Assert):
        return  # texts, and what must be true anyway
    yield from _expressions(node)
    yield from _conditions(node)
    yield from _deletions(node)
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
            continue
        if isinstance(node, ast.Raise) or _is_type_checking(node):
            continue  # what an error says is for people
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _sites(child)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _changed(node: Any, **fields: Any) -> str:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return f"({ast.unparse(other)})"


def _expressions(node: ast.AST) -> Iterator[tuple[str, Any, str]]:
    match node:
        case ast.Compare(ops=ops):
            for number, op in enumerate(ops):
                swapped = [*ops[:number], _COMPARISONS[type(op)](), *ops[number + 1 :]]
                yield "comparison", node, _changed(node, ops=swapped)
        case ast.BinOp(op=op) if type(op) in _ARITHMETIC:
            yield "arithmetic", node, _changed(node, op=_ARITHMETIC[type(op)]())
        case ast.AugAssign(op=op) if type(op) in _ARITHMETIC:
            yield "arithmetic", node, _changed(node, op=_ARITHMETIC[type(op)]())[1:-1]
        case ast.BoolOp(op=op):
            other = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield "boolean", node, _changed(node, op=other)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield "boolean", node, f"({ast.unparse(operand)})"
        case ast.Constant(value=bool() as value):
            yield "constant", node, str(not value)
        case ast.Constant(value=int() | float() as number):
            yield "constant", node, str(number + 1)
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield "return", node, "return None"
        case _:
            pass


def _conditions(node: ast.AST) -> Iterator[tuple[str, Any, str]]:
    """Branches taken the other way; comparisons and negations change by themselves."""
    if isinstance(node, ast.If | ast.While | ast.IfExp) and not _is_type_checking(node):
        test = node.test
        if isinstance(test, ast.Name | ast.Attribute | ast.Call | ast.Await | ast.NamedExpr):
            yield "boolean", test, f"(not ({ast.unparse(test)}))"


def _deletions(node: ast.AST) -> Iterator[tuple[str, Any, str]]:
    match node:
        case ast.Expr(value=ast.Constant() | ast.Yield() | ast.YieldFrom()):
            return  # docstrings; a generator that yields nothing is none
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name)))) if name.strip(
            "_"
        ) in ("log", "logger"):
            return
        case ast.Assign(targets=targets) if all(
            isinstance(target, ast.Attribute | ast.Subscript) for target in targets
        ):
            yield "deletion", node, "pass"
        case _ if isinstance(node, _STATEMENTS):
            yield "deletion", node, "pass"
        case _:
            pass

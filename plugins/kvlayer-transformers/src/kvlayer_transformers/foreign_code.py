"""What code of others computes with, as text: where the texts are equal, so is what is computed.

Numbers and texts are shown wherever code names them: constants, defaults, closures, globals and
attributes of classes, in lists and mappings, too. Any other object is shown as a word of this
process alone, so KV that depends on one is shared with no other process.
"""

# What code names has any type.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import enum
import functools
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, Final

import torch

__all__ = ["functions_in", "names", "shown"]

_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None), type(...))
_TORCH: Final = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_MOST_NUMBERS: Final = 1 << 16  # of a tensor

_words: dict[int, tuple[object, str]] = {}
"""By id, what cannot be shown, which is kept so that no other gets its id, and its word."""


def shown(values: Iterable[object], is_known: Callable[[str], bool]) -> str:
    """sha256, in hex, of functions, classes and values. ``is_known(module)``: not looked into."""
    show = _Shower(is_known)
    return sha256("\n".join(sorted(show.text(value) for value in values)).encode()).hexdigest()


def functions_in(value: Any) -> Iterator[FunctionType]:
    """The functions that a method, a property or a partial calls."""
    if isinstance(value, property):
        for accessor in (value.fget, value.fset):
            yield from functions_in(accessor)
    value = getattr(value, "__func__", value)
    while isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, FunctionType):
        yield value


def names(code: CodeType) -> Iterator[str]:
    """Names that code looks up, as globals or as attributes."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names(constant)


class _Shower:
    """Shows each function and class once: what refers to itself comes to an end."""

    def __init__(self, is_known: Callable[[str], bool]) -> None:
        self._is_known = is_known
        self._open: set[int] = set()

    def text(self, value: Any) -> str:
        if type(value) in _PLAIN or isinstance(value, _TORCH):
            return repr(value)
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__}.{value.name}"
        if isinstance(value, FunctionType | BuiltinFunctionType | type | ModuleType):
            return self._named(value)
        if isinstance(value, CodeType):
            return self._code(value)
        if isinstance(value, torch.Tensor) and value.numel() <= _MOST_NUMBERS:
            content = (
                value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
            return f"{value.dtype} {tuple(value.shape)} {sha256(content).hexdigest()}"
        return self._once(value, self._container)

    def _container(self, value: Any) -> str:
        if isinstance(value, property | staticmethod | classmethod | functools.partial):
            bound = (value.args, value.keywords) if isinstance(value, functools.partial) else ()
            return (
                f"{type(value).__name__} {[self.text(v) for v in (*functions_in(value), *bound)]}"
            )
        if type(value) in (tuple, list, torch.Size):
            return f"{type(value).__name__} {[self.text(each) for each in value]}"
        if type(value) in (set, frozenset):
            return f"{type(value).__name__} {sorted(self.text(each) for each in value)}"
        if isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections"):
            return f"map {sorted(f'{self.text(k)}: {self.text(v)}' for k, v in value.items())}"
        return _word(value)

    def _named(self, value: Any) -> str:
        """Something that has a module of its own."""
        if isinstance(value, ModuleType):
            name = value.__name__
            return f"module {name}" if self._is_known(name) else _word(value)
        name = f"{value.__module__ or 'builtins'}.{value.__qualname__}"
        if isinstance(value, FunctionType):
            module = str(value.__globals__.get("__name__", ""))
            if not self._is_known(module):
                return f"{name} {self._once(value, self._function)}"
        elif isinstance(value, type) and not self._is_known(str(value.__module__)):
            return f"{name} {self._once(value, self._class)}"
        return name

    def _once(self, value: Any, show: Callable[[Any], str]) -> str:
        if id(value) in self._open:
            return "itself"
        self._open.add(id(value))
        try:
            return show(value)
        finally:
            self._open.discard(id(value))

    def _function(self, function: FunctionType) -> str:
        parts: list[object] = [function.__code__, function.__defaults__, function.__kwdefaults__]
        parts += [_cell(cell) for cell in function.__closure__ or ()]
        texts = [self.text(part) for part in parts]
        called = sorted(set(names(function.__code__)))
        found = {name: function.__globals__.get(name, self) for name in called}
        texts += [
            f"{name}: {self._global(value, called)}"
            for name, value in found.items()
            if value is not self
        ]
        return sha256("\n".join(texts).encode()).hexdigest()

    def _global(self, value: Any, called: Iterable[str]) -> str:
        """Of a module that is not known, what the code may call of it."""
        if isinstance(value, ModuleType) and not self._is_known(value.__name__):
            members = vars(value)
            used = [f"{name}: {self.text(members[name])}" for name in called if name in members]
            return f"module {value.__name__} {used}"
        return self.text(value)

    def _class(self, kind: type) -> str:
        texts = [self.text(base) for base in kind.__bases__]
        for name, value in sorted(vars(kind).items()):
            is_made = name.startswith("__") and not list(functions_in(value))
            if not is_made and name != "_abc_impl":
                texts.append(f"{name}: {self.text(value)}")
        return sha256("\n".join(texts).encode()).hexdigest()

    def _code(self, code: CodeType) -> str:
        texts = [code.co_code.hex()]
        texts.append(repr((code.co_names, code.co_varnames, code.co_freevars, code.co_flags)))
        texts += map(self.text, code.co_consts)
        return sha256("\n".join(texts).encode()).hexdigest()


def _word(value: object) -> str:
    found = _words.get(id(value))
    if found is None:
        found = _words[id(value)] = (value, secrets.token_hex(16))
    return found[1]


def _cell(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None

"""The code that computes a model: the functions of its classes and those they call by name.

Whoever replaces one of them, for a class, a module or all of transformers, changes KV without a
trace in weights, configuration or modules. So the functions are looked up when a session opens
and compared at every call, and what is neither transformers' nor torch's is part of the name of
the KV.
"""

# What classes hold has any type.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any, Final, TypeAlias, cast

import torch

from kvlayer_transformers.contents import own_modules
from kvlayer_transformers.engine import ATTENTION, CACHES, MASKS, Model
from kvlayer_transformers.foreign_code import functions_in, names, shown

__all__ = ["Code", "is_known", "origin"]

_Place: TypeAlias = tuple[Any, str]
"""A class, or a mapping of names, and the name of a function in it."""

_KNOWN: Final = frozenset(
    {
        *("torch", "transformers", "transformers_modules", "peft", "accelerate", "kernels"),
        *("liger_kernel", "kvlayer_transformers", "numpy", "huggingface_hub", "safetensors"),
        *("builtins", "tokenizers", "packaging", "einops", "flash_attn", "tqdm"),
        *sys.stdlib_module_names - {"__main__"},
    }
)
"""Packages whose functions compute what the weights say. Files of remote code are weights files."""
_FOLLOWED: Final = ("models", "integrations", "masking_utils", "modeling_rope_utils", "activations")
"""Parts of transformers whose functions are looked into for those that they call."""


class Code:
    """The functions behind a model's passes, where they are found, as they are now."""

    def __init__(self, model: Model) -> None:
        """Some tens of milliseconds. ``model`` is not kept, its classes are."""
        self._classes = list(_classes(model))
        self._methods = [_methods(kind) for kind in self._classes]
        self._globals: dict[tuple[int, str], tuple[_Place, Any]] = {}
        self._functions: dict[int, FunctionType] = {}
        for place in (*_operations(), *_attention(model)):
            self._note(place)
        for methods in self._methods:
            for value in methods.values():
                self._walk(value)
        self._codes = [function.__code__ for function in self._functions.values()]

    def changed(self) -> str | None:
        """The name of a function that was replaced since; None if none was."""
        for kind, before in zip(self._classes, self._methods, strict=True):
            now = _methods(kind)
            for name in before.keys() | now.keys():
                if now.get(name) is not before.get(name):
                    return f"{kind.__qualname__}.{name}"
        for (holder, name), value in self._globals.values():
            if _found(holder, name) is not value:
                return name
        for function, code in zip(self._functions.values(), self._codes, strict=True):
            if function.__code__ is not code:
                return function.__qualname__
        return None

    def digest(self) -> str:
        """sha256, in hex, of all of it: equal for equal code under one version of Python."""
        return _digest(self._functions.values())

    def foreign(self) -> str | None:
        """What is in none of the packages that are known, with the values that it names; or None.

        What cannot be shown as text gives a digest that no other process has.
        """
        found: list[Any] = [each for each in self._functions.values() if not is_known(origin(each))]
        found += [kind for kind in self._classes if not is_known(kind.__module__)]
        return shown(found, is_known) if found else None

    def _note(self, place: _Place) -> None:
        holder, name = place
        if (id(holder), name) not in self._globals:
            value = _found(holder, name)
            self._globals[id(holder), name] = (place, value)
            self._walk(value)

    def _walk(self, value: object) -> None:
        """Note functions, what they wrap, and what those worth looking into call by name."""
        for function in functions_in(value):
            if id(function) in self._functions:
                continue
            self._functions[id(function)] = function
            for cell in function.__closure__ or ():
                with_content = _cell(cell)
                if isinstance(with_content, FunctionType):
                    self._walk(with_content)
            if not _is_followed(origin(function)):
                continue
            is_foreign = not is_known(origin(function))
            for name in names(function.__code__):
                named = _found(function.__globals__, name)
                if isinstance(named, FunctionType) or (is_foreign and named is not None):
                    self._note((function.__globals__, name))


def origin(value: Any) -> str:
    """The module whose code runs when ``value`` is called; decorators cannot disguise it."""
    while hasattr(value, "func"):  # functools.partial
        value = value.func
    value = getattr(value, "__func__", value)
    if isinstance(value, FunctionType):
        return str(value.__globals__.get("__name__", ""))
    owner = value if isinstance(value, type | BuiltinFunctionType) else type(value)
    return str(getattr(owner, "__module__", None) or "builtins")


def is_known(module: str) -> bool:
    """Whether code of a module is known to compute what the weights say."""
    return module.split(".", maxsplit=1)[0] in _KNOWN


def _is_followed(module: str) -> bool:
    package, _, rest = module.partition(".")
    if package == "transformers":
        return rest.split(".")[0] in _FOLLOWED
    return package == "transformers_modules" or not is_known(module)


def _classes(model: Model) -> Iterator[Any]:
    """The classes of the model's modules and caches, torch's apart, in a fixed order."""
    kinds: set[Any] = {type(module) for _, module in own_modules(model)} | set(CACHES)
    bases: set[Any] = {base for kind in kinds for base in kind.__mro__}
    found = [b for b in bases if b.__module__.split(".")[0] not in ("torch", "builtins")]
    return iter(sorted(found, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}"))


def _methods(kind: Any) -> dict[str, Any]:
    members: dict[str, Any] = dict(vars(kind))
    return {name: value for name, value in members.items() if _is_code(value)}


def _is_code(value: object) -> bool:
    return isinstance(value, FunctionType | staticmethod | classmethod | property)


def _operations() -> Iterator[_Place]:
    """What others put their own in the place of (quantised attention)."""
    functions: Any = torch.nn.functional
    for name in ("scaled_dot_product_attention", "linear", "embedding", "softmax", "silu", "gelu"):
        yield vars(functions), name
    for name in ("matmul", "bmm", "softmax", "cat"):
        yield vars(torch), name


def _attention(model: Model) -> Iterator[_Place]:
    """Where transformers looks up how attention is computed, and how it is masked."""
    configs = (getattr(module, "config", None) for _, module in own_modules(model))
    names = {getattr(config, "_attn_implementation", None) for config in configs}
    for name in sorted(name for name in names if isinstance(name, str)):
        yield ATTENTION, name
        yield MASKS, name


def _found(holder: Any, name: str) -> Any:
    table: Mapping[str, Any] = holder
    return table.get(name)


def _cell(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _digest(functions: Any) -> str:
    parts = sorted(f"{origin(each)}.{each.__qualname__}:{_digest_of(each)}" for each in functions)
    return sha256("\n".join(parts).encode()).hexdigest()


def _digest_of(function: FunctionType) -> str:
    total = sha256()
    _add_code(total.update, function.__code__)
    bound: list[object] = [*(function.__defaults__ or ())]
    bound += [value for _, value in sorted((function.__kwdefaults__ or {}).items())]
    bound += [_cell(cell) for cell in function.__closure__ or ()]
    for value in bound:
        total.update(_shown(value).encode())
    return total.hexdigest()


def _add_code(update: Callable[[bytes], None], code: CodeType) -> None:
    update(code.co_code)
    update(repr((code.co_names, code.co_varnames, code.co_freevars, code.co_flags)).encode())
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _add_code(update, constant)
        else:
            update(_shown(constant).encode())


def _shown(value: object) -> str:
    """A text that is the same in every process; other things than numbers and texts by kind.

    Of code that is known, which holds no others: see ``foreign_code``.
    """
    if isinstance(value, frozenset):
        return repr(sorted(map(_shown, value)))
    if isinstance(value, tuple):
        return repr([_shown(each) for each in cast("tuple[object, ...]", value)])
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    return type(value).__qualname__

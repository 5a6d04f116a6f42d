"""Values that callers pass, whatever their annotations say: taken as they are meant, or refused.

Each function returns the value in its own type or raises ``error`` (``ArgumentError`` unless told
otherwise), which names the argument, what was expected and what was found.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from enum import StrEnum
from math import inf, isfinite
from numbers import Real
from operator import index
from threading import TIMEOUT_MAX
from typing import Any, TypeVar, cast

from kvlayer.errors import ArgumentError, KVLayerError
from kvlayer.urls import is_text, nearest, shown_text

__all__ = [
    "called",
    "callee",
    "choice",
    "flag",
    "function",
    "functions",
    "given",
    "instance",
    "items",
    "listed",
    "number",
    "shown_value",
    "text",
    "waiting",
    "whole",
]

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)
Error = type[KVLayerError]

_MOST = (1 << 63) - 1
_LAZY = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)


def shown_value(value: object) -> str:
    """``value`` as a message shows it: plain values alone, and of URLs only what is no secret."""
    if isinstance(value, str):
        return shown_text(value)
    if value is not None and not isinstance(value, (int, float)):
        return f"a {type(value).__name__}"  # a secret may be anywhere in it
    try:
        return repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "what is too long to print"


def given(value: object) -> object:
    """A value whose annotation is not believed by what checks it."""
    return value


def whole(
    what: str, value: object, *, least: int = 0, most: int = _MOST, error: Error = ArgumentError
) -> int:
    """A whole number in ``least..most``, of any integer type but bool."""
    try:
        found = None if isinstance(value, bool) else index(cast(Any, value))
    except TypeError:  # no integer
        found = None
    if found is None or not least <= found <= most:
        limit = "" if most == _MOST else f" and at most {most}"
        raise error(
            f"{what} must be a whole number of at least {least}{limit}, found {shown_value(value)}",
            hint="pass a plain int",
        )
    return found


def number(
    what: str,
    value: object,
    *,
    least: float = 0.0,
    most: float = inf,
    endless: bool = False,
    error: Error = ArgumentError,
) -> float:
    """A finite number in ``least..most``, of any real type but bool. ``endless``: or infinity."""
    try:
        is_number = not isinstance(value, bool) and isinstance(value, Real)
        found = float(cast(Real, value)) if is_number else None
    except OverflowError:  # an integer of hundreds of digits
        found = None
    is_good = found is not None and least <= found <= most and (endless or isfinite(found))
    if found is None or not is_good:
        finite = "" if endless else "finite "
        floor = "" if least == -inf else f" of at least {least:g}"
        limit = "" if most == inf else f" and at most {most:g}"
        raise error(
            f"{what} must be a {finite}number{floor}{limit}, found {shown_value(value)}",
            hint="pass a plain int or float",
        )
    return found


def waiting(what: str, value: object) -> float | None:
    """For how many seconds to wait: none when the time has passed, None for no limit."""
    if value is None:
        return None
    seconds = number(what, value, least=-inf, endless=True)
    return None if seconds > TIMEOUT_MAX else max(seconds, 0.0)


def flag(what: str, value: object) -> bool:
    """True or False. What is only true-ish (``"no"`` is) may be meant either way."""
    if not isinstance(value, bool):
        raise ArgumentError(
            f"{what} must be True or False, found {shown_value(value)}", hint="pass bool(...)"
        )
    return value


def choice(what: str, value: object, kind: type[E], *, error: Error = ArgumentError) -> E:
    """A member of an enum, or its text as JSON and TOML have it."""
    try:
        return kind(value if isinstance(value, str) else "")
    except ValueError:
        known = [member.value for member in kind]
        near = nearest(value, known) if isinstance(value, str) else None
        raise error(
            f"{what} must be one of {', '.join(known)}, found {shown_value(value)}",
            hint=f"did you mean {near!r}?" if near else f"pass a {kind.__name__}",
        ) from None


def instance(
    what: str, value: object, kind: type[T], *, hint: str, error: Error = ArgumentError
) -> T:
    """An instance of ``kind``. Of anything else only the type is shown."""
    if not isinstance(value, kind):
        found = "None" if value is None else f"a {type(value).__name__}"
        raise error(f"{what} must be a {kind.__name__}, found {found}", hint=hint)
    return value


def listed(value: object) -> list[object] | None:
    """What an iterable holds; None for text, and for what cannot be iterated over."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return None
    try:
        return [*value]
    except TypeError:  # an array without an axis says that it is iterable
        return None


def text(what: str, value: object, *, hint: str, error: Error = ArgumentError) -> str:
    """Text that can be written anywhere: logs, metrics, messages."""
    found = instance(what, value, str, hint=hint, error=error)
    if not is_text(found):
        raise error(f"{what} must be valid Unicode text, found a lone surrogate", hint=hint)
    return found


def items(
    what: str, value: object, kind: type[T], *, hint: str, error: Error = ArgumentError
) -> tuple[T, ...]:
    """Any number of instances of ``kind``, from a list or other iterable; a single one is one."""
    if isinstance(value, kind):
        return (value,)
    found = listed(value)
    if found is None:
        shown = "None" if value is None else f"a {type(value).__name__}"
        raise error(f"{what} must be a tuple of {kind.__name__}, found {shown}", hint=hint)
    name = f"each of {what}"
    return tuple(instance(name, each, kind, hint=hint, error=error) for each in found)


def callee(what: str, value: T) -> T:
    """Something that can be called."""
    if not callable(value):
        raise ArgumentError(
            f"{what} must be a function, found {shown_value(value)}", hint="pass it uncalled"
        )
    return value


def functions(what: str, value: Iterable[T]) -> tuple[T, ...]:
    """Any number of things that can be called; a single one is one."""
    given: object = value
    if callable(given):
        return (called("a function of " + what, cast(T, given)),)
    found = listed(given)
    if found is None:
        raise ArgumentError(
            f"{what} must be a list of functions, found {shown_value(given)}",
            hint="leave it out for none",
        )
    return tuple(called(f"each of {what}", cast(T, each)) for each in found)


def function(what: str, value: T) -> T:
    """Something whose call does its work, or None."""
    return value if value is None else called(what, value)


def called(what: str, value: T) -> T:
    """Something whose call does its work: of a coroutine or generator function none would begin."""
    callee(what, value)
    calls = (value, getattr(value, "__call__", None))  # noqa: B004  # of an instance: its method
    if any(is_lazy(each) for each in calls for is_lazy in _LAZY):
        raise ArgumentError(
            f"{what} must be a plain function, found one that is to be awaited or iterated over",
            hint="pass a function that starts it: lambda: asyncio.ensure_future(...)",
        )
    return value

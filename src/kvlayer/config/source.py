"""Where configuration comes from: code over environment over a TOML file over the defaults.

Every value is remembered with its origin, so that ``kvlayer info`` can print it and an error can
name it. Environment names are ``KVLAYER_`` and the field, with ``__`` between levels:
``KVLAYER_TOKENS_PER_CHUNK``, ``KVLAYER_MODEL__WEIGHTS``, ``KVLAYER_TIERS__0__URL``.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast, get_args, get_origin, get_type_hints

from kvlayer._values import shown_value
from kvlayer.config.model import CacheConfig, FieldError, expectation
from kvlayer.errors import ConfigError
from kvlayer.urls import nearest, parse_bool, shown_url

__all__ = ["CONFIG_VARIABLE", "PREFIX", "LoadedConfig", "load_config"]

PREFIX = "KVLAYER_"
CONFIG_VARIABLE = "KVLAYER_CONFIG"
DEFAULT = "default"
_MOST_NBYTES = 1 << 20  # of a file

# Kubernetes sets these in every pod beside a service whose name is "kvlayer" or begins with
# "kvlayer-"; nobody typed them.
_INJECTED = re.compile(
    r"KVLAYER_([A-Z0-9_]+_)?"
    r"(SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration and where each of its values came from."""

    config: CacheConfig
    origins: Mapping[str, str]
    """Dotted key (``tiers.0.url``) -> ``default``, ``file <path>``, ``environment <NAME>`` or
    ``code``."""

    def values(self) -> dict[str, object]:
        """Dotted key -> value, in the order of ``origins``; URLs without their options' values."""
        leaves = _flatten(self.config, _ROOT, (), DEFAULT)
        return {
            _dotted(key): shown_url(leaf.value) if key[-1] == "url" else leaf.value
            for key, leaf in leaves.items()
            if not leaf.is_list
        }


def load_config(
    path: str | Path | None = None, *, env: Mapping[str, str] | None = None, **code: Any
) -> LoadedConfig:
    """Like :meth:`CacheConfig.load`, but also tells where each value came from."""
    environment = os.environ if env is None else env
    file = path if path is not None else environment.get(CONFIG_VARIABLE) or None
    settings = _flatten(CacheConfig(), _ROOT, (), DEFAULT)
    if file is not None:
        said_by = "" if path is not None else f" (named by {CONFIG_VARIABLE})"
        table = _read(_expanded(file), said_by)
        settings = _over(settings, _flatten(table, _ROOT, (), f"file {file}"))
    settings = _over(settings, _from_environment(environment))
    settings = _over(settings, _flatten(code, _ROOT, (), "code"))
    config: CacheConfig = _build(_ROOT, (), settings)
    whole = _flatten(config, _ROOT, (), DEFAULT)
    leaves = ((key, settings.get(key, leaf)) for key, leaf in whole.items() if not leaf.is_list)
    origins = {_dotted(key): leaf.origin for key, leaf in leaves}
    return LoadedConfig(config, origins)


# The shape of the configuration, read off the dataclasses once.


@dataclass(frozen=True, slots=True)
class _Leaf:
    hint: Any


@dataclass(frozen=True, slots=True)
class _Open:
    """A table whose names are the application's; its values are scalars."""

    hint: Any


@dataclass(frozen=True, slots=True)
class _List:
    item: _Table


@dataclass(frozen=True, slots=True)
class _Table:
    cls: type[Any]
    fields: Mapping[str, _Shape]
    required: frozenset[str]


_Shape: TypeAlias = _Leaf | _Open | _List | _Table


def _shape(hint: Any) -> _Shape:
    if get_origin(hint) is Mapping:
        return _Open(hint)
    if get_origin(hint) is tuple:
        return _List(_table_shape(get_args(hint)[0]))
    return _table_shape(hint) if is_dataclass(hint) else _Leaf(hint)


def _table_shape(cls: Any) -> _Table:
    required = (f.name for f in fields(cls) if f.default is f.default_factory is MISSING)
    shapes = {name: _shape(hint) for name, hint in get_type_hints(cls).items()}
    return _Table(cls, shapes, frozenset(required))


_ROOT = _table_shape(CacheConfig)


# Every source becomes a flat layer of settings; layers are put over one another.


class _Setting(NamedTuple):
    value: Any
    origin: str
    is_list: bool = False
    """An entry for a list itself, so that an empty one is known to have been given."""


_Key: TypeAlias = tuple[str, ...]
_Settings: TypeAlias = dict[_Key, _Setting]


def _over(base: _Settings, layer: _Settings) -> _Settings:
    """``layer`` over ``base``. A list given as a whole replaces the list below it."""
    lists = [key for key, setting in layer.items() if setting.is_list]
    kept = {k: v for k, v in base.items() if not any(k[: len(key)] == key for key in lists)}
    return kept | layer


def _flatten(given: object, shape: _Shape, key: _Key, origin: str) -> _Settings:
    """The settings in a tree of mappings, lists and config objects.

    Checks structure and names; values are checked when the config objects are built.
    """
    match shape:
        case _Leaf():
            return {key: _Setting(given, origin)}
        case _Open():
            table = _as_table(given, key, origin)
            return {(*key, name): _Setting(item, origin) for name, item in table.items()}
        case _List(item_shape):
            if not isinstance(given, (list, tuple)):
                raise _wrong(_dotted(key), f"a list of {item_shape.cls.__name__}", given, origin)
            found: _Settings = {key: _Setting((), origin, is_list=True)}
            for index, item in enumerate(cast("Sequence[object]", given)):
                found |= _flatten(item, item_shape, (*key, str(index)), origin)
            return found
        case _Table(cls, shapes):
            if isinstance(given, cls):
                given = {name: getattr(given, name) for name in shapes}
            found = {}
            for name, item in _as_table(given, key, origin).items():
                if name not in shapes:
                    raise _unknown(_dotted((*key, name)), name, list(shapes), origin)
                found |= _flatten(item, shapes[name], (*key, name), origin)
            return found


def _as_table(given: object, key: _Key, origin: str) -> Mapping[str, object]:
    if not isinstance(given, Mapping):
        raise _wrong(_dotted(key), "a table", given, origin)
    return cast("Mapping[str, object]", given)


def _expanded(file: str | Path) -> Path:
    """The file's path; a ``~`` that no shell has expanded is the user's home."""
    try:
        return Path(file).expanduser()
    except RuntimeError:  # "~nobody"
        return Path(file)


def _read(path: Path, said_by: str) -> dict[str, Any]:
    try:
        content = _content(path)
    except OSError as exc:
        raise ConfigError(
            f"cannot read the configuration file {path}{said_by}: {exc.strerror}",
            hint="give the path of a TOML file, or leave it out to use the defaults",
        ) from None
    if isinstance(content, str):
        raise ConfigError(
            f"the configuration file {path}{said_by} is {content}",
            hint="give the path of a TOML file, or leave it out to use the defaults",
        )
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as exc:
        raise ConfigError(
            f"the configuration file {path}{said_by} is not UTF-8: {exc.reason} at byte "
            f"{exc.start}",
            hint="save it as UTF-8",
        ) from None
    except (ValueError, RecursionError) as exc:  # numbers too long, tables too deep for tomllib
        raise ConfigError(
            f"the configuration file {path}{said_by} is not TOML: {exc}",
            hint="docs/configuration.md shows a complete file",
        ) from None


def _content(path: Path) -> bytes | str:
    """What a regular file of bearable size holds, or what the file is instead, in words.

    A pipe in its place is not waited for. Raises ``OSError``.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return "no regular file"
        content = file.read(_MOST_NBYTES + 1)
    return content if len(content) <= _MOST_NBYTES else f"larger than {_MOST_NBYTES} bytes"


def _from_environment(env: Mapping[str, str]) -> _Settings:
    found: _Settings = {}
    for name in sorted(env):
        if not name.startswith(PREFIX) or name == CONFIG_VARIABLE:
            continue
        try:
            key, shape = _locate(name)
        except ConfigError:
            if _INJECTED.fullmatch(name):
                continue
            raise
        found[key] = _Setting(_parse(env[name], shape, name), f"environment {name}")
    return found


def _locate(name: str) -> tuple[_Key, _Leaf | _Open]:
    """The field an environment variable sets. An ``_Open`` shape stands for one of its values."""
    key = tuple(name.removeprefix(PREFIX).lower().split("__"))
    shape: _Shape = _ROOT
    for depth, word in enumerate(key):
        if isinstance(shape, _Open) and word and depth == len(key) - 1:
            return key, shape
        inner = _inside(shape, word)
        if inner is None:
            raise _unknown_variable(name, key[:depth], word, shape)
        shape = inner
    if isinstance(shape, _Leaf):
        return key, shape
    raise _unknown_variable(name, key, "", shape)


def _inside(shape: _Shape, word: str) -> _Shape | None:
    """The shape of the field or list entry ``word``, if there is one."""
    match shape:
        case _Table(_, shapes):
            return shapes.get(word)
        case _List(item_shape) if word.isdecimal():
            return item_shape
        case _:
            return None


def _unknown_variable(name: str, above: _Key, word: str, shape: _Shape) -> ConfigError:
    """``word`` is no key of ``shape``, which is what the words ``above`` it name."""
    match shape:
        case _Table(_, shapes):
            known = [*shapes]
        case _List(item_shape):
            known = [f"0__{next(iter(item_shape.fields))}"]
        case _Open():
            known = ["<name>"]
        case _Leaf():
            known = []
    keys = [_variable((*above, each)) for each in known] or [_variable(above)]
    return _unknown(
        name, _variable((*above, word)), keys, "environment", below=_variables(shape, above)
    )


def _variables(shape: _Shape, above: _Key) -> list[str]:
    """The variables of every field below ``above``: one underscore too few is a common slip."""
    match shape:
        case _Table(_, shapes):
            return [each for n, s in shapes.items() for each in _variables(s, (*above, n))]
        case _List(item_shape):
            return _variables(item_shape, (*above, "0"))
        case _Open():
            return []
        case _Leaf():
            return [_variable(above)]


def _variable(key: _Key) -> str:
    return PREFIX + "__".join(key).upper()


def _parse(text: str, shape: _Leaf | _Open, name: str) -> object:
    """A variable's text as a value, by the rules backend URLs have for their options."""
    if isinstance(shape, _Open):
        return _scalar(text)
    if shape.hint not in (int, float, bool):
        return text
    try:
        return parse_bool(text) if shape.hint is bool else shape.hint(text)
    except ValueError:
        raise _wrong(name, expectation(shape.hint), text, "environment") from None


def _scalar(text: str) -> object:
    """Text for a field that takes any scalar: a number or a truth value if TOML reads one."""
    try:
        found: object = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # TOML's own errors are ValueErrors
        return text
    return found if isinstance(found, (bool, int, float)) else text


# The merged settings become config objects, which check themselves.


def _build(shape: _Shape, key: _Key, settings: _Settings) -> Any:
    match shape:
        case _Leaf():
            return settings[key].value
        case _Open():
            return {k[-1]: setting.value for k, setting in settings.items() if k[:-1] == key}
        case _List(item_shape):
            count = len(_names_below(key, settings))
            return tuple(_build(item_shape, (*key, str(index)), settings) for index in range(count))
        case _Table(cls, shapes, required):
            names = _names_below(key, settings)
            for name in sorted(required - names):
                raise _missing((*key, name), settings)
            values = {n: _build(shapes[n], (*key, n), settings) for n in shapes if n in names}
            try:
                return cls(**values)
            except FieldError as exc:
                raise _with_origins(exc, key, settings) from None


def _names_below(key: _Key, settings: _Settings) -> set[str]:
    return {k[len(key)] for k in settings if k[: len(key)] == key and len(k) > len(key)}


def _missing(key: _Key, settings: _Settings) -> ConfigError:
    beside = {k: each for k, each in settings.items() if k[:-1] == key[:-1]}
    last = max(k for k in (beside or settings) if k[:-2] == key[:-2])  # what made it needed
    where = f" ({_dotted(last)}: {settings[last].origin})"
    return ConfigError(
        f"{_dotted(key)} is not set, and has no default{where}",
        hint=f"set {_dotted(key)} in the file or {_variable(key)} in the environment; "
        "entries of a list are numbered from 0 without gaps",
    )


def _with_origins(exc: FieldError, key: _Key, settings: _Settings) -> ConfigError:
    keys = [(*key, *name.split(".")) for name in exc.fields]
    places = [f"{_dotted(k)}: {settings[k].origin if k in settings else DEFAULT}" for k in keys]
    return ConfigError(f"{exc.message} ({'; '.join(places)})", hint=exc.hint)


def _dotted(key: _Key) -> str:
    return ".".join(key)


def _unknown(
    shown: str, word: str, known: list[str], origin: str, *, below: Sequence[str] = ()
) -> ConfigError:
    near = nearest(word, [*known, *below])
    return ConfigError(
        f"unknown key {shown} ({origin})" + (f"; did you mean {near!r}?" if near else ""),
        hint=f"known here: {', '.join(known)}",
    )


def _wrong(shown: str, wanted: str, found: object, origin: str) -> ConfigError:
    return ConfigError(
        f"{shown} must be {wanted}, found {shown_value(found)} ({origin})",
        hint="docs/configuration.md lists every key with its type and unit",
    )

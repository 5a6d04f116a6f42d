"""Backend URLs: ``scheme://location?option=value``. Never a place for secrets."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from fractions import Fraction
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from kvlayer.errors import ConfigError

__all__ = [
    "BackendURL",
    "format_bytes",
    "is_text",
    "nearest",
    "parse_bool",
    "parse_bytes",
    "shown_text",
    "shown_url",
]

T = TypeVar("T")

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("KMGTP")
    for suffix, base in (("iB", 1024), ("B", 1000), ("", 1024))
}
_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """``"8GiB"`` -> 8589934592, exactly. ``GB`` is decimal, ``G`` and ``GiB`` binary.

    A fraction of a byte is dropped; less than one byte is no size. Raises ``ConfigError``.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    found = Fraction(match[1]) * _UNITS[match[2]] if match and match[2] in _UNITS else None
    if found is None or 0 < found < 1:
        raise ConfigError("not a size", hint="try 512MiB, 8GiB or 1TiB")
    return int(found)


def format_bytes(nbytes: int) -> str:
    """8589934592 -> ``8 GiB``, to four digits: what a person reads where a size was written."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if nbytes >= 1024**power:
            return f"{nbytes / 1024**power:.4g} {unit}"
    return f"{nbytes} B"


def parse_bool(text: str) -> bool:
    """``true``/``false`` and their usual spellings."""
    lowered = text.lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ConfigError("not a yes or no", hint="write true or false")


def nearest(word: str, known: list[str]) -> str | None:
    """The known word closest to a misspelt one, if any is close."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, known, n=1, cutoff=0.5)), None)


_SECRET = re.compile(
    r"(^|[._-])(password|passwd|passphrase|pwd|secret|token|credentials?|signature|sig|sas|jwt"
    r"|bearer|(api|access|account|private|secret)[_-]?key)([._-]|$)",
    re.IGNORECASE,
)
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")  # accessToken is access_token
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_USER = re.compile(r":[^/]*@")
_MASK = "***"
_TELLING = 4
_LONG = 1000
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_HARMLESS = re.compile(r"[\w./~-]*")  # no place for user:password
_TRY = "try file:///mnt/nvme/kv?capacity=1TiB"


def shown_url(text: str) -> str:
    """A URL as a message may show it: without a user, and without the values of its options."""
    head, question, query = text.partition("?")
    scheme, slashes, rest = head.partition("://")
    if slashes and "@" in rest:
        rest = f"{_MASK}@{rest.rpartition('@')[2]}"
    given = query.partition("#")[0]
    names = (pair.partition("=")[0] for pair in given.split("&"))
    shown = "&".join(f"{name}={_MASK}" for name in names) if given else ""
    return f"{scheme}{slashes}{rest}{question}{shown}"


def shown_text(text: str) -> str:
    """Text that may or may not be a URL, as a message may show it."""
    if _SCHEME.match(text) is not None:
        return repr(shown_url(text))
    if len(text) > _LONG or "://" in text or ("?" in text and "=" in text):
        return f"text of {len(text)} characters"
    return repr(text)


@dataclass(frozen=True, slots=True, repr=False)
class BackendURL:
    """A parsed backend URL. Credentials are refused: backends take them from the environment.

    A name does not tell what is a secret, so ``str`` and ``repr`` leave out the value of every
    option. Only ``text`` and ``options`` have them; neither belongs into a message.
    """

    text: str
    scheme: str
    host: str = ""
    port: int | None = None
    path: str = ""
    options: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)

    @classmethod
    def parse(cls, text: str) -> BackendURL:
        """Raises ``ConfigError`` for anything that is not a URL or that carries a secret.

        No message repeats a part of the text in which a secret could stand: who refuses a
        credential must not print it.
        """
        if _SCHEME.match(text) is None or _CONTROL.search(text) or not is_text(text):
            shown = f", found {text!r}" if _HARMLESS.fullmatch(text) else ""
            raise ConfigError(f"not a backend URL: expected scheme://location{shown}", hint=_TRY)
        parts, port = _split(text)
        pairs = _options(parts)
        try:
            path = unquote(parts.path, errors="strict")
        except UnicodeDecodeError:
            path = "\0"
        if _CONTROL.search(path):
            raise ConfigError(
                f"the path of the {parts.scheme}:// URL is not readable text",
                hint="percent-encode UTF-8 without control characters",
            )
        return cls(text, parts.scheme, parts.hostname or "", port, path, pairs)

    def __str__(self) -> str:
        return shown_url(self.text)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def masked(self, message: str) -> str:
        """``message`` without the values of options: for what the code of others says of a URL.

        Values of fewer than 4 characters stay: they would be found in the middle of words.
        """
        for value in sorted(self.options.values(), key=len, reverse=True):
            if len(value) >= _TELLING:
                message = message.replace(value, _MASK)
        return message

    def into(self, cls: type[T]) -> T:
        """The URL's options as an instance of the dataclass ``cls``.

        A field's type says how its text is read (``int``, ``float``, ``bool``, ``str``, an enum,
        or one of these ``| None``); a field with ``metadata={"parse": f}`` uses ``f``. Raises
        ``ConfigError`` for an option that is no field, naming the nearest that is, for a value
        that cannot be read, and for a missing one that has no default.
        """
        specs = {spec.name: spec for spec in fields(cls) if spec.init}  # type: ignore[arg-type]
        hints = get_type_hints(cls)
        values: dict[str, object] = {}
        for name, text in self.options.items():
            if name not in specs:
                near = nearest(name, list(specs))
                raise ConfigError(
                    f"{self.scheme}:// has no option {name!r}",
                    hint=f"did you mean {near!r}?" if near else f"known: {', '.join(specs)}",
                )
            kind = _kind(hints[name])
            parse: Callable[[str], object]
            parse = specs[name].metadata.get("parse") or _PARSERS.get(kind, kind)
            try:
                values[name] = parse(text)
            except (ValueError, ArithmeticError) as exc:
                expected = f"expected {getattr(kind, '__name__', kind)}"
                known = exc.hint if isinstance(exc, ConfigError) else None
                raise ConfigError(
                    f"the value of the option {name!r} of {self} cannot be read",
                    hint=self.masked(known or expected),
                ) from None
        missing = [name for name, spec in specs.items() if name not in values and _required(spec)]
        if missing:
            raise ConfigError(
                f"{self.scheme}:// needs the option {missing[0]!r}, not found in {self}",
                hint=f"add {'&' if self.options else '?'}{missing[0]}=...",
            )
        return cls(**values)


def is_text(text: str) -> bool:
    """Whether it can be encoded: what the environment holds in other bytes cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _split(text: str) -> tuple[SplitResult, int | None]:
    """The URL's parts and port. The messages of urllib repeat the text and are dropped."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ConfigError("not a backend URL: its host or port cannot be read", hint=_TRY) from None
    if not parts.scheme:
        raise ConfigError("not a backend URL: expected scheme://location", hint=_TRY)
    if "@" in parts.netloc or _USER.search(parts.path):
        raise ConfigError(
            f"{parts.scheme}:// URL carries credentials",
            hint="secrets never go into URLs; set them in the environment",
        )
    if "#" in text:
        raise ConfigError(
            f"{parts.scheme}:// URL has a fragment ('#'), which would be lost",
            hint="write '#' in a path as %23",
        )
    if "&" in parts.path or ";" in parts.path:
        raise ConfigError(
            f"the path of the {parts.scheme}:// URL has a '&' or ';', as only options have",
            hint="options begin with '?'; in a path write %26 and %3B",
        )
    return parts, port


def _options(parts: SplitResult) -> dict[str, str]:
    try:
        pairs = parse_qsl(
            parts.query,
            keep_blank_values=True,
            strict_parsing=bool(parts.query),
            errors="strict",
        )
    except ValueError:
        raise ConfigError(
            f"the options of the {parts.scheme}:// URL cannot be read",
            hint="write ?option=value&option=value",
        ) from None
    options: dict[str, str] = {}
    for name, value in pairs:
        if _SECRET.search(_HUMP.sub("_", name)):
            raise ConfigError(
                f"{parts.scheme}:// URL carries a secret in the option {name!r}",
                hint="secrets never go into URLs; set them in the environment",
            )
        if name in options:
            raise ConfigError(
                f"option {name!r} is given twice in the {parts.scheme}:// URL",
                hint="keep one of the two",
            )
        options[name] = value
    return options


def _kind(annotation: Any) -> Any:
    """The type a text is read as: ``X`` for ``X | None``."""
    members = [member for member in get_args(annotation) if member is not NoneType]
    return members[0] if len(members) == 1 and NoneType in get_args(annotation) else annotation


def _parse_float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ConfigError("not a finite number", hint="leave the option out")
    return number


_PARSERS: Mapping[object, Callable[[str], object]] = {bool: parse_bool, float: _parse_float}


def _required(spec: Field[Any]) -> bool:
    return spec.default is MISSING and spec.default_factory is MISSING

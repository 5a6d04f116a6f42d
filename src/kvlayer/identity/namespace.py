"""What must match for two deployments to share KV: the namespace, whose digest opens every key.

It describes the bytes, never the writer: no engine, block size, TP or PP size, payload form or
host. The encoding is pinned by golden vectors; a change of it is a new ``KEY_SCHEMA``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from typing import Any, TypeAlias, cast

from kvlayer._pack import pack, unpack
from kvlayer._values import items, shown_value
from kvlayer.errors import ConfigError, IdentityError
from kvlayer.identity.links import link_size
from kvlayer.layout import AttentionKind, HitRule, KVGroup

__all__ = ["COMPUTE_DTYPES", "KEY_SCHEMA", "Namespace", "Scalar"]

KEY_SCHEMA = 2
"""Version of everything names are made of: this encoding, links, zones and object keys."""

Scalar: TypeAlias = str | int | float | bool | None
"""A value of a flat description. ``1``, ``1.0`` and ``True`` are three different values."""

COMPUTE_DTYPES = ("float32", "bfloat16", "float16", "float64")

_MAX_NBYTES = 64 * 1024
_WEIGHTS = re.compile(r"sha256:[0-9a-f]{64}|process:[0-9a-f]{32}")
_ADAPTER = re.compile(r"sha256:[0-9a-f]{64}")
_QUALITY = re.compile(r"[a-z0-9][a-z0-9_.:=,+-]{0,127}")
_NUMERICS = re.compile(r"portable|engine:[a-z0-9_]+-[A-Za-z0-9_.!+-]+")
_ADAPTERS = "('sha256:<64 hex digits>',), made by kvlayer.identity.weights.weights_digest"
_SCALES = re.compile(r"[!-~]{0,128}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Namespace:
    """The identity of a model's KV. Two are equal exactly when their digests are.

    Raises ``IdentityError`` for an identity that names nothing or that cannot be encoded, and
    ``ConfigError`` for a chunk or tail size that cannot work.
    """

    weights: str
    """``sha256:<64 hex digits>`` of the model's files, or ``process:<32 hex digits>`` for KV that
    may not leave the process (see :attr:`is_private`)."""

    groups: tuple[KVGroup, ...]
    """The KV groups, in the order of the layout. ``v_head_size`` None means ``head_size``."""

    compute_dtype: str
    """What attention was computed in, one of ``COMPUTE_DTYPES``."""

    tokens_per_chunk: int = 256
    tokens_per_tail: int = 0
    """Tokens of a link: what one hash covers, and the steps in which a prompt's end is kept.

    Divides ``tokens_per_chunk``. Given as 0 it becomes :func:`kvlayer.identity.links.link_size`.
    """

    adapters: tuple[str, ...] = ()
    """Digests of adapter files folded into the weights when they were loaded, in this order."""

    overrides: Mapping[str, Scalar] = field(default_factory=dict[str, Scalar])
    """Load-time quantisation and config overrides."""

    kv_scales: str = ""
    """Names the scales of a quantised KV cache: a digest or a version. Empty: unscaled."""

    quality: str = "exact"
    """``exact``, or what made the KV an approximation: a lossy codec, its version and calibration,
    say. Exact and approximate KV never share a name."""

    hash_scheme: str = "links"
    """How tokens are hashed: ``links`` (see ``kvlayer.identity.links``), or the name of an engine's
    scheme that hashes something else, two ids a position, say."""

    numerics: str = "portable"
    """``portable``: engines agree up to rounding. ``engine:<name>-<version>``: stable to the bit,
    shared by engines of one build only."""

    _canonical: bytes = field(init=False, repr=False)
    _digest: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check_sizes()
        if not self.tokens_per_tail:
            object.__setattr__(self, "tokens_per_tail", link_size(self.tokens_per_chunk))
        self._check_tail()
        self._check_names()
        # The caller keeps its own mappings; what was digested must not change under us.
        groups = tuple(replace(group, rope=dict(group.rope)) for group in self.groups)
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "overrides", dict(self.overrides))
        canonical = _packed(self._description())
        object.__setattr__(self, "_canonical", canonical)
        object.__setattr__(self, "_digest", sha256(canonical).hexdigest())

    def _check_sizes(self) -> None:
        for name, least in (("tokens_per_chunk", 1), ("tokens_per_tail", 0)):
            size: object = getattr(self, name)
            if type(size) is not int or size < least:
                raise ConfigError(
                    f"{name} must be a whole number of at least {least}, found {shown_value(size)}",
                    hint="256 tokens a chunk is the default; 0 for the tail chooses one",
                )

    def _check_tail(self) -> None:
        if self.tokens_per_chunk % self.tokens_per_tail:
            raise ConfigError(
                f"tokens_per_tail must divide tokens_per_chunk, found {self.tokens_per_tail} "
                f"and {self.tokens_per_chunk}",
                hint="set tokens_per_tail to a divisor; an eighth of a chunk is a good one",
            )

    def _check_names(self) -> None:
        _check_name("weights", self.weights, _WEIGHTS, "sha256: and 64 lowercase hex digits, made "
                    "by kvlayer.identity.weights.weights_digest")  # fmt: skip
        adapters = items("adapters", self.adapters, str, hint=_ADAPTERS, error=IdentityError)
        object.__setattr__(self, "adapters", adapters)
        for adapter in adapters:
            _check_name("adapters", adapter, _ADAPTER, "sha256: and 64 lowercase hex digits each")
        _check_name("quality", self.quality, _QUALITY, "exact, or the name of what it is")
        _check_name("hash_scheme", self.hash_scheme, _QUALITY, "links, or the scheme's name")
        _check_name("kv_scales", self.kv_scales, _SCALES, "a digest or a version, or empty")
        _check_name("numerics", self.numerics, _NUMERICS, "portable or engine:<name>-<version>")
        dtype = cast("object", self.compute_dtype)
        if not isinstance(dtype, str) or dtype not in COMPUTE_DTYPES:
            raise IdentityError(
                f"unknown compute_dtype {shown_value(dtype)}",
                hint=f"what attention was computed in, one of: {', '.join(COMPUTE_DTYPES)}",
            )
        overrides = cast("object", self.overrides)
        if not isinstance(overrides, Mapping):
            raise IdentityError(
                f"overrides must be a table, found {shown_value(overrides)}",
                hint="leave them out where nothing was overridden",
            )
        hint = "pass the groups of the engine's KV layout"
        groups = items("groups", self.groups, KVGroup, hint=hint, error=IdentityError)
        object.__setattr__(self, "groups", groups)
        if not groups:
            raise IdentityError(
                "a namespace needs at least one KV group, found none",
                hint="pass the groups of the engine's KV layout",
            )

    @property
    def is_private(self) -> bool:
        """Whether this KV belongs to one process: no backend outside it may hold the bytes."""
        return self.weights.startswith("process:")

    @property
    def digest(self) -> str:
        """64 hex digits: sha256 of :meth:`canonical`."""
        return self._digest

    def canonical(self) -> bytes:
        """Deterministic msgpack of every field: maps sorted by key, at most 64 KiB."""
        return self._canonical

    @classmethod
    def from_canonical(cls, packed: bytes) -> Namespace:
        """Inverse of :meth:`canonical`, for bytes from outside.

        Raises ``IdentityError`` for a schema this build does not know and for any bytes that
        ``canonical`` would not produce. Allocates a bounded amount.
        """
        if len(packed) > _MAX_NBYTES:
            raise _garbage(f"{len(packed)} bytes are more than {_MAX_NBYTES}")
        try:
            value = unpack(packed)
        except ValueError as exc:
            raise _garbage(str(exc)) from None
        if not isinstance(value, dict):
            raise _garbage("it is no map")
        found = cast("dict[str, Any]", value)
        schema: object = found.pop("schema", None)
        if type(schema) is not int or schema != KEY_SCHEMA:
            raise IdentityError(
                f"a namespace of key schema {schema!r}; this build knows {KEY_SCHEMA}",
                hint="KV of another schema cannot be shared: run one release on both sides",
            )
        try:
            found["groups"] = tuple(_group(row) for row in found["groups"])
            found["adapters"] = tuple(found["adapters"])
            namespace = cls(**found)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as exc:
            raise _garbage(str(exc)[:200]) from None  # whatever a hostile value runs into
        if namespace.canonical() != packed:
            raise _garbage("it is not in canonical form")
        return namespace

    def differences(self, other: Namespace) -> list[str]:
        """One line per field that differs, with both values; empty when the two are equal."""
        mine, theirs = _leaves("", self._description()), _leaves("", other._description())
        return [
            f"{path}: {mine.get(path, 'absent')} here, {theirs.get(path, 'absent')} there"
            for path in sorted(mine.keys() | theirs.keys())
            if mine.get(path) != theirs.get(path)
        ]

    def __eq__(self, other: object) -> bool:
        return self._canonical == other._canonical if isinstance(other, Namespace) else False

    def __hash__(self) -> int:
        return hash(self._canonical)

    def _description(self) -> dict[str, object]:
        described: dict[str, object] = {
            spec.name: getattr(self, spec.name) for spec in fields(self) if spec.init
        }
        described["schema"] = KEY_SCHEMA
        described["groups"] = [_described(group) for group in self.groups]
        described["adapters"] = list(self.adapters)
        described["overrides"] = _flat("overrides", self.overrides)
        return dict(sorted(described.items()))


def _check_name(what: str, text: object, pattern: re.Pattern[str], expected: str) -> None:
    if not isinstance(text, str) or pattern.fullmatch(text) is None:
        raise IdentityError(f"{what} cannot be {shown_value(text)}", hint=f"expected {expected}")


def _garbage(detail: str) -> IdentityError:
    return IdentityError(
        f"not a namespace: {detail}", hint="the bytes are damaged or not kvlayer's"
    )


_SCALARS = (str, int, float, bool, type(None))


def _flat(what: str, mapping: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """``mapping`` sorted by key. Only plain scalars: anything else may encode two ways."""
    entries = cast("Mapping[object, object]", mapping)
    for key, value in entries.items():
        if type(key) is not str or type(value) not in _SCALARS or value != value:  # noqa: PLR0124
            raise IdentityError(
                f"{what} maps text to plain str, int, float, bool or None, found "
                f"{shown_value(key)}: {shown_value(value)} ({type(value).__name__})",
                hint="write other values as text",
            )
    return dict(sorted(mapping.items()))


_STATES = "trailing"  # the rule of states, as they were named when it had no name of its own


def _described(group: KVGroup) -> dict[str, object]:
    numbers = {
        "num_kv_heads": group.num_kv_heads,
        "head_size": group.head_size,
        "v_head_size": group.head_size if group.v_head_size is None else group.v_head_size,
        "window_tokens": group.window_tokens,
        "state_nbytes": group.state_nbytes,
    }
    described: dict[str, object] = {
        **numbers,
        "kind": group.kind.value,
        "hit_rule": _STATES if group.hit_rule is HitRule.BOUNDARY else group.hit_rule.value,
        "dtype": group.dtype,
        "layers": list(group.layers),
        "rope": _flat("rope", group.rope),
    }
    if group.quantisation:  # left out where there is none: names from before it was known stay
        described["quantisation"] = group.quantisation
    return dict(sorted(described.items()))


def _group(row: dict[str, Any]) -> KVGroup:
    """Inverse of ``_described``. The caller compares encodings, so this need not be strict."""
    implied = row["v_head_size"] == row["head_size"]
    typed: dict[str, Any] = {
        "kind": AttentionKind(row["kind"]),
        "hit_rule": HitRule(row["hit_rule"]),
        "layers": tuple(row["layers"]),
        "v_head_size": None if implied else row["v_head_size"],
    }
    return KVGroup(**row | typed)


def _packed(description: dict[str, object]) -> bytes:
    try:
        packed = pack(description)
        unpack(packed)  # what others could not read back must not open a key
    except (TypeError, ValueError, OverflowError) as exc:
        raise IdentityError(
            f"the namespace cannot be encoded: {exc}",
            hint="integers fit 64 bits, text is valid Unicode, lists have at most 1,024 entries",
        ) from None
    if len(packed) > _MAX_NBYTES:
        raise IdentityError(
            f"the namespace is {len(packed)} bytes, more than {_MAX_NBYTES}",
            hint="digest long values and put the digest in their place",
        )
    return packed


def _leaves(path: str, value: object) -> dict[str, str]:
    """Every field by path, as text in which 1, 1.0 and True differ."""
    if isinstance(value, dict):
        entries = cast("dict[str, object]", value).items()
        inner = [(f"{path}.{key}" if path else key, entry) for key, entry in entries]
    elif path == "groups":
        rows = cast("list[object]", value)
        inner = [(f"{path}[{index}]", row) for index, row in enumerate(rows)]
    else:
        return {path: repr(value)}
    return {at: text for name, entry in inner for at, text in _leaves(name, entry).items()}

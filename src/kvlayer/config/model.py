"""What a cache can be told: frozen dataclasses that refuse wrong values when they are built.

Where values come from (code, environment, a file) is the business of ``kvlayer.config.source``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args, get_origin, get_type_hints

from kvlayer._values import shown_value
from kvlayer.errors import ConfigError
from kvlayer.identity.links import link_size
from kvlayer.urls import BackendURL, shown_url

__all__ = [
    "CacheConfig",
    "FieldError",
    "ModelConfig",
    "Scalar",
    "TierConfig",
    "expectation",
]

Scalar: TypeAlias = str | int | float | bool
"""A value that TOML, an environment variable and JSON can all carry."""


class FieldError(ConfigError):
    """A field holds a wrong value. ``fields`` names every field that takes part in the quarrel.

    The fields are relative to the object that raised; the loader adds where each came from.
    """

    def __init__(self, message: str, *, fields: tuple[str, ...], hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.message = message
        self.fields = fields


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What identifies the model beyond what its KV layout says. Every field is in the namespace."""

    weights: str = ""
    """The model: a path (folder or file) to digest, or ``sha256:<64 hex digits>`` of a digest made
    elsewhere. Empty: unknown, and KV is then shared with no other process."""

    compute_dtype: str = ""
    """The dtype attention was computed in, e.g. ``bfloat16``. Empty: the KV dtype."""

    overrides: Mapping[str, Scalar] = field(default_factory=dict[str, Scalar])
    """Load-time changes to the model: quantisation, RoPE scaling, config overrides. Names and
    values are the application's; equal overrides share KV, others never meet."""

    kv_scales: str = ""
    """Names the scales of a quantised KV cache (a digest or a version). Empty: unscaled."""

    numerics: Literal["portable", "engine"] = "portable"
    """``portable``: engines share KV and agree up to rounding. ``engine``: the engine and its
    version join the namespace, for output that is stable to the bit."""

    def __post_init__(self) -> None:
        _check_types(self)
        self._check_overrides()
        object.__setattr__(self, "overrides", dict(self.overrides))  # the caller keeps their own

    def _check_overrides(self) -> None:
        for name, value in self.overrides.items():
            if not isinstance(value, Scalar):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise FieldError(
                    f"overrides.{name} must be a string, a number, true or false, found "
                    f"{shown_value(value)} ({type(value).__name__})",
                    fields=(f"overrides.{name}",),
                )


@dataclass(frozen=True, kw_only=True)
class TierConfig:
    """One level of the stack."""

    url: str
    """Which backend, where, and its own options: ``scheme://location?option=value``. Never a
    secret: those stay in the environment the backend reads. No message and no ``repr`` shows the
    value of an option."""

    write: Literal["through", "back", "demote", "never"] = "back"
    """``through``: a store waits until the tier has committed. ``back``: the tier follows, and
    ``flush()`` waits for it. ``demote``: the tier is written only when an object is about to leave
    host memory. ``never``: the tier is read-only."""

    codec: str = ""
    """What this tier's objects are coded with, without loss: the name of an installed codec. Empty:
    they lie there as they are. What a tier holds from before it had a codec it serves as well."""

    tails: bool = True
    """Whether the partial chunk at a prompt's end is written to this tier."""

    deadline_seconds: float = 2.0
    """Seconds a request waits for one operation of this tier before it counts as a miss."""

    max_inflight: int = 32
    """Operations that run in this tier at once, cut-off ones included; an eighth is kept for
    writes, which take a quarter at most. Some more wait their turn; past that they are refused."""

    max_inflight_bytes: int = 0
    """Bytes of host memory that objects hold while they wait to be written to this tier or are
    being written; what is stored past that does not go there. 0: half of host memory."""

    retries: int = 2
    """How often an operation is tried again after an error that may pass, within its deadline."""

    pause_seconds: float = 1.0
    """Seconds a tier is left alone after a missed deadline or five errors in a row, before it is
    tried again. Doubles with every further failure, up to a minute."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_url(self.url)
        _check_positive(self, "deadline_seconds", "seconds")
        _check_at_least(self, "max_inflight", 1, "operations")
        _check_at_least(self, "max_inflight_bytes", 0, "bytes")
        _check_at_least(self, "retries", 0, "tries")
        _check_positive(self, "pause_seconds", "seconds")

    def __repr__(self) -> str:
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        values["url"] = shown_url(self.url)
        return f"TierConfig({', '.join(f'{name}={value!r}' for name, value in values.items())})"


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Everything about a cache except the engine's KV layout, which the engine knows.

    Raises ``FieldError`` (a ``ConfigError``) for a value that cannot work. :meth:`load` adds the
    environment and a file, and says where a wrong value came from.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model's identity."""

    tiers: tuple[TierConfig, ...] = field(
        default_factory=lambda: (TierConfig(url="cpu://?capacity=1GiB"),)
    )
    """The stack, fastest first. Tier 0 is host memory."""

    verify_weights: bool = False
    """Whether the model's files are read whole at every start, whatever is remembered of them.
    Without it files that look unchanged are believed after samples of them were compared."""

    tokens_per_chunk: int = 256
    """Tokens in a chunk, the unit of naming and transfer. In the namespace."""

    tokens_per_tail: int = 0
    """Tokens that one hash names, and that a prompt's last, partial chunk is a multiple of; divides
    ``tokens_per_chunk``. 0: at most an eighth of a chunk and at most 32. In the namespace."""

    head_shards: int = 0
    """Into how many equal ranges the KV heads are cut when written. 0: the tensor-parallel size;
    a fleet that mixes sizes sets their least common multiple."""

    policy: str = "prefix-lru"
    """The eviction policy, by the name it is installed under."""

    high_watermark: float = 0.95
    """Fraction of host memory in use above which objects that a lower tier has, or takes, leave in
    the background, before a store needs the room."""

    low_watermark: float = 0.9
    """Fraction of host memory at which that stops. 1.0 for both: room is made by stores alone."""

    lease_seconds: float = 30.0
    """Seconds after which a lookup that was never released stops pinning what it found."""

    prefill_tokens_per_second: float = 0.0
    """How fast the engine computes KV, until it reports better; hits are cut where loading would
    take longer. 0: unknown, and everything found is loaded."""

    staging_threads: int = 2
    """Threads that copy between the engine's memory and host memory. All requests share them; one
    alone does not come near the memory's speed."""

    close_seconds: float = 30.0
    """Seconds a clean close waits for what is still on its way to the lower tiers."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, "tokens_per_chunk", 1, "tokens")
        _check_at_least(self, "tokens_per_tail", 0, "tokens")
        _check_at_least(self, "head_shards", 0, "shards")
        _check_at_least(self, "staging_threads", 1, "threads")
        _check_positive(self, "lease_seconds", "seconds")
        _check_positive(self, "close_seconds", "seconds")
        _check_number(
            self,
            "prefill_tokens_per_second",
            "0, or from 1e-6 to 1e12 (tokens per second)",
            lambda value: value == 0 or 1e-6 <= value <= 1e12,
        )
        self._check_watermarks()
        if not self.policy:
            raise FieldError("policy must be a name, found ''", fields=("policy",), hint=_POLICY)
        self._check_tail()
        self._check_tiers()

    @property
    def tail_tokens(self) -> int:
        """``tokens_per_tail`` with its default filled in."""
        return self.tokens_per_tail or link_size(self.tokens_per_chunk)

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        env: Mapping[str, str] | None = None,
        **code: Any,
    ) -> CacheConfig:
        """The configuration that code, environment and a TOML file give together, in this order.

        ``code`` holds fields by name; tables may be given as mappings. ``path`` is the file; when
        it is None, ``KVLAYER_CONFIG`` may name one. ``env`` replaces ``os.environ``. Raises
        ``ConfigError`` naming the source and key of whatever is unknown or wrong. Reads the file:
        call it before the event loop runs.
        """
        from kvlayer.config.source import load_config

        return load_config(path, env=env, **code).config

    def _check_tail(self) -> None:
        if self.tokens_per_chunk % self.tail_tokens == 0:
            return
        raise FieldError(
            f"tokens_per_tail must divide tokens_per_chunk, found {self.tail_tokens} "
            f"and {self.tokens_per_chunk}",
            fields=("tokens_per_tail", "tokens_per_chunk"),
            hint="set tokens_per_tail to a divisor; an eighth of a chunk is a good one",
        )

    def _check_watermarks(self) -> None:
        if 0 < self.low_watermark <= self.high_watermark <= 1:
            return
        raise FieldError(
            "watermarks must be fractions of host memory, 0 < low <= high <= 1, "
            f"found low {self.low_watermark} and high {self.high_watermark}",
            fields=("low_watermark", "high_watermark"),
            hint="0.9 and 0.95 are the defaults; 1.0 for both turns background demotion off",
        )

    def _check_tiers(self) -> None:
        if not self.tiers:
            raise FieldError(
                "a cache needs at least one tier, found none",
                fields=("tiers",),
                hint='start with host memory: [[tiers]] url = "cpu://?capacity=8GiB"',
            )
        if self.tiers[0].codec:
            raise FieldError(
                f"tiers.0.codec must be empty, found {shown_value(self.tiers[0].codec)}: host "
                "memory holds KV as it is",
                fields=("tiers.0.codec",),
                hint="give a codec to a tier below it",
            )
        places: dict[tuple[str, str, int | None, str], int] = {}
        for index, tier in enumerate(self.tiers):
            url = BackendURL.parse(tier.url)
            if not (url.host or url.path):
                continue  # memory of the process: every cpu:// is one of its own
            first = places.setdefault((url.scheme, url.host, url.port, url.path), index)
            if first != index:
                raise FieldError(
                    f"tiers {first} and {index} are the same place: "
                    f"{shown_url(self.tiers[first].url)} and {shown_url(tier.url)}",
                    fields=(f"tiers.{first}.url", f"tiers.{index}.url"),
                    hint="a second copy in one place only costs room: remove one of them",
                )


_POLICY = "`kvlayer info` lists what is installed; 'prefix-lru' is the default"


def _check_url(text: str) -> None:
    try:
        BackendURL.parse(text)  # which never repeats what may be a secret
    except ConfigError as exc:
        raise FieldError(f"url: {exc}", fields=("url",), hint=exc.hint) from None


def expectation(hint: Any) -> str:
    """What a field of this type wants, in words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {get_args(hint)[0].__name__}"
    if get_origin(hint) is Mapping:
        return "a table"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    return words.get(hint, f"a table ({hint.__name__})")


_MOST = (1 << 63) - 1  # what TOML promises to carry; a hexadecimal number may be longer


def _conforms(value: object, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        items = cast("tuple[object, ...]", value)
        return isinstance(value, tuple) and all(_conforms(item, args[0]) for item in items)
    if origin is Mapping:
        keys = cast("Mapping[object, object]", value)
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in keys)
    if hint in (int, float) and isinstance(value, bool):
        return False  # True is an int to Python; as a number of tokens it is a mistake
    if isinstance(value, int) and abs(value) > _MOST:
        return False
    return isinstance(value, (int, float) if hint is float else hint)


@cache  # annotations are text: each is compiled to be read
def _hints(cls: type[Any]) -> Mapping[str, Any]:
    return get_type_hints(cls)


def _check_types(config: ModelConfig | TierConfig | CacheConfig) -> None:
    kind: Any = type(config)  # mypy takes no class for hashable whose instances may not be
    hints = _hints(kind)
    for spec in fields(config):
        value: object = getattr(config, spec.name)
        if not _conforms(value, hints[spec.name]):
            raise FieldError(
                f"{spec.name} must be {expectation(hints[spec.name])}, found "
                f"{shown_value(value)} ({type(value).__name__})",
                fields=(spec.name,),
            )


def _check_number(config: object, name: str, wanted: str, accept: Callable[[float], bool]) -> None:
    value = getattr(config, name)
    if not accept(value):
        raise FieldError(f"{name} must be {wanted}, found {shown_value(value)}", fields=(name,))


def _check_at_least(config: object, name: str, least: int, unit: str) -> None:
    _check_number(config, name, f"at least {least} ({unit})", lambda value: value >= least)


def _check_positive(config: object, name: str, unit: str) -> None:
    wanted = (
        f"more than 0 and finite ({unit})"  # without a deadline a dead tier would hang a request
    )
    _check_number(config, name, wanted, lambda value: value > 0 and math.isfinite(value))

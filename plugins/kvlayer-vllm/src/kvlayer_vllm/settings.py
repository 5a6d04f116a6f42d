"""What ``kv_connector_extra_config`` may say: a cache's configuration, and how vLLM uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Final, Literal, get_args

from kvlayer import CacheConfig
from kvlayer.errors import ConfigError, UnsupportedError

__all__ = ["Form", "Loads", "Settings"]

Form = Literal["auto", "native", "canonical"]
Loads = Literal["sync", "layerwise", "async"]

_OWN: Final[Mapping[str, tuple[str, ...]]] = {"form": get_args(Form), "loads": get_args(Loads)}


@dataclass(frozen=True, slots=True)
class Settings:
    """The connector's configuration."""

    cache: CacheConfig
    form: Form = "auto"
    """``native``: blocks as the engine keeps them; ``canonical``: what every engine can read;
    ``auto``: canonical wherever that is not slower (``layouts``)."""
    loads: Loads = "async"
    """When KV is copied into the engine's blocks: beside other requests' steps, or, where
    ``engine.check_loads`` lets it, before the step that uses it (``sync``) or layer by layer during
    that step (``layerwise``)."""
    held_share: float = 0.25
    """Of the engine's blocks, how many stores may hold while they read them. Over 0, at most 1."""
    report_prefill: bool = True
    """Whether the cache hears how fast the engine computes, and leaves what loads slower."""

    @classmethod
    def of(cls, extra_config: Mapping[str, Any]) -> Settings:
        """Read the connector's extra configuration.

        ``form``, ``loads``, ``held_share`` and ``report_prefill`` are the adapter's own; ``config``
        names a TOML file; everything else is a field of ``kvlayer.CacheConfig`` and comes before
        environment and file.
        Raises ``ConfigError`` for what is unknown or wrong.
        """
        given = dict(extra_config)
        own: dict[str, Any] = {}
        for key, choices in _OWN.items():
            if key not in given:
                continue
            own[key] = given.pop(key)
            if own[key] not in choices:
                near = get_close_matches(str(own[key]), choices, 1)
                raise ConfigError(
                    f"{key} must be one of {', '.join(choices)}, found {own[key]!r}",
                    hint=f"did you mean {near[0]!r}?" if near else None,
                )
        if "held_share" in given:
            own["held_share"] = _share("held_share", given.pop("held_share"))
        if "report_prefill" in given:
            own["report_prefill"] = _flag("report_prefill", given.pop("report_prefill"))
        path = given.pop("config", None)
        return cls(CacheConfig.load(path, **given), **own)

    def form_of(self, ranks: int) -> Form:
        """What an engine of so many ranks keeps: ``canonical`` where ``auto`` has several to serve.

        Raises ``UnsupportedError`` for native blocks of several: they are read by none but the same
        rank of an engine with as many.
        """
        if ranks == 1:
            return self.form
        if self.form == "native":
            raise UnsupportedError(
                f"form = 'native' keeps the blocks of one rank, and this engine has {ranks}",
                hint="form = 'canonical', which is what form = 'auto' means with several ranks",
            )
        return "canonical"

    def fitting(self, native_step: int, state_step: int = 1) -> CacheConfig:
        """The cache's configuration where native blocks have ``native_step`` tokens, and recurrent
        states are kept every ``state_step`` tokens at most; 1: none.

        Where there are states, vLLM chooses the block, and a chunk is one: prompts end and part
        where it keeps states, whatever ``tokens_per_chunk`` says.

        Native payloads are whole blocks: unless the size of tails is stated it becomes a block
        where an eighth of a chunk is not a multiple of one. Raises ``ConfigError`` for chunks that
        are not.
        """
        config = self.cache
        if state_step > 1:
            return replace(config, tokens_per_chunk=state_step, tokens_per_tail=state_step)
        if config.tokens_per_tail or config.tail_tokens % native_step == 0:
            return config
        if config.tokens_per_chunk % native_step:
            raise ConfigError(
                f"tokens_per_chunk = {config.tokens_per_chunk} is not a multiple of the engine's "
                f"blocks of {native_step} tokens, which are stored as they are",
                hint="choose a multiple, or form = 'canonical' where the engine's KV is in rows",
            )
        return replace(config, tokens_per_tail=native_step)


def _share(name: str, value: Any) -> float:
    """A number over 0 and at most 1."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    raise ConfigError(f"{name} must be a number over 0 and at most 1, found {value!r}")


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ConfigError(f"{name} must be true or false, found {value!r}")

"""Which adapters (LoRA and the like, through PEFT) shape a model's KV now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any, Final, cast

import torch

from kvlayer import Scope
from kvlayer.errors import UnsupportedError
from kvlayer_transformers.contents import is_tuner, spread
from kvlayer_transformers.engine import Model

__all__ = ["Adapters"]

# Kinds that add the same change to a layer whatever the prompt is. Others put columns of their own
# in front, weigh experts by the whole prompt, or begin at a word inside it.
_STATIC_KINDS: Final = frozenset(
    {
        *("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "HRA", "VERA", "FOURIERFT"),
        *("LN_TUNING", "VBLORA", "RANDLORA", "SHIRA", "C3A", "MISS", "BONE", "WAVEFT"),
        *("TRAINABLE_TOKENS", "DELORA", "GRALORA", "ROAD"),
    }
)

_BASES: Final = ("base_layer", "original_module")
_SAMPLE: Final = 1 << 18
"""Elements compared at each call: all of a small adapter, evenly spread ones of a large one."""


class Adapters:
    """Reads a model's adapters at every call; content is hashed once per change.

    What PEFT's hot swap writes behind autograd's back moves no counter: samples show it.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._marks: tuple[object, ...] = ()
        self._samples: list[torch.Tensor] = []
        self._digest = b""
        self._bound: dict[bytes, bytes] = {}

    def check(self, scopes: Sequence[Scope]) -> None:
        """Refuse scopes that do not name the active adapter, or name another one by its name.

        A scope's adapter may be any digest; what it stands for in this session is decided by its
        first use. Raises ``UnsupportedError``.
        """
        active = self.active()
        for scope in scopes:
            if active and not scope.adapter:
                raise UnsupportedError(
                    "the model has an adapter, but the scope names none: KV of different adapters "
                    "would meet",
                    hint="pass scope=Scope(adapter=<digest of the adapter's files>)",
                )
            if scope.adapter and self._bound.setdefault(scope.adapter, active) != active:
                raise UnsupportedError(
                    "the scope names an adapter that this session has seen with other weights"
                    if active
                    else "the scope names an adapter, but it is not active in the model",
                    hint="activate the adapter that the scope names, or name the one that is "
                    "active by a digest of its files",
                )

    def active(self) -> bytes:
        """A digest of what the active adapters add, empty when none is active.

        Names of adapters are not in it. Raises ``UnsupportedError`` for adapters that are merged
        into the weights, mixed in one layer's batch, or of a kind that depends on the prompt.
        """
        model = self._model
        configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
        tuners = [(name, module) for name, module in model.named_modules() if is_tuner(module)]
        if not tuners:
            has_adapter = bool(configs or getattr(model, "_hf_peft_config_loaded", False))
            if has_adapter:
                self._check_kinds(configs, list(configs))
            return b"unknown" if has_adapter else b""
        parts: list[tuple[str, object]] = []
        for name, module in tuners:
            if getattr(module, "merged", False):
                raise UnsupportedError(
                    f"an adapter is merged into {_plain(name)}: the weights are no longer those "
                    "that the session was opened for",
                    hint="unmerge it, or merge_and_unload() it before Session.open and pass a "
                    "digest of the merged weights as weights=",
                )
            if getattr(module, "disable_adapters", False):
                continue
            active = _active_names(module)
            self._check_kinds(configs, active)
            parts += _parts(_plain(name), module, active)
        if not parts:
            return b""
        marks = tuple(
            (name, id(value), value.data_ptr(), value._version, value.dtype)
            if isinstance(value, torch.Tensor) and not value.is_inference()
            else (name, None if isinstance(value, torch.Tensor) else value)
            for name, value in parts
        )
        known = all(mark[1] is not None or len(mark) == 2 for mark in marks)
        samples = _samples(parts)
        same = len(samples) == len(self._samples) and all(map(torch.equal, samples, self._samples))
        if not (known and same and marks == self._marks and self._digest):
            self._digest, self._marks, self._samples = _digest(parts), marks, samples
        return self._digest

    @staticmethod
    def _check_kinds(configs: dict[str, Any], names: list[str]) -> None:
        for name in names:
            config = configs.get(name)
            kind = getattr(config, "peft_type", None)
            if kind is None:
                continue
            kind = str(getattr(kind, "value", kind))
            if kind not in _STATIC_KINDS or getattr(config, "alora_invocation_tokens", None):
                raise UnsupportedError(
                    f"kvlayer cannot carry the KV of an adapter of kind {kind}: it depends on "
                    "more than the tokens and the adapter's weights",
                    hint="use an adapter that adds a fixed change to layers (LoRA, IA3, OFT, ...)",
                )


def _active_names(module: Any) -> list[str]:
    active: Any = getattr(module, "active_adapters", ())
    return [active] if isinstance(active, str) else list(active)


def _parts(place: str, module: Any, active: list[str]) -> Iterator[tuple[str, object]]:
    """The tensors and numbers that a layer's active adapters add, without the adapters' names."""
    owned = [
        *((n, p) for n, p in module.named_parameters() if not n.startswith(_BASES)),
        *((n, b) for n, b in module.named_buffers() if not n.startswith(_BASES)),
    ]
    for order, name in enumerate(active):
        for key, tensor in owned:
            path = key.split(".")
            if name in path:
                path[path.index(name)] = str(order)
                yield f"{place}.{'.'.join(path)}", tensor
        attributes: dict[str, Any] = module.__dict__
        for key, value in sorted(attributes.items()):
            held: Mapping[str, Any] = {}
            if isinstance(value, dict):
                held = cast("Mapping[str, Any]", value)
            inner = held.get(name)
            if isinstance(inner, int | float | str | bool):
                yield f"{place}.{key}.{order}", inner


def _samples(parts: list[tuple[str, object]]) -> list[torch.Tensor]:
    tensors = [value for _, value in parts if isinstance(value, torch.Tensor)]
    each = max(64, _SAMPLE // max(len(tensors), 1))
    found = (spread(tensor, each, tensor.numel()) for tensor in tensors)
    return [sample for sample in found if sample is not None]


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _digest(parts: list[tuple[str, object]]) -> bytes:
    total = sha256()
    for name, value in parts:
        total.update(f"{name}\0".encode())
        if isinstance(value, torch.Tensor):
            plain = value.detach().cpu().contiguous()
            total.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            total.update(plain.view(-1).view(torch.uint8).numpy().data)
        else:
            total.update(repr(value).encode())
    return total.digest()

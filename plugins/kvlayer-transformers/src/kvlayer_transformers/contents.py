"""What a model consists of: its modules and tensors under names that adapters do not change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Any, Final

import torch

from kvlayer_transformers.engine import Model

__all__ = [
    "attributes",
    "called",
    "foreign_digest",
    "is_tuner",
    "own_modules",
    "spread",
    "tensors_in",
    "tensors_of",
]

_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLE: Final = 4096
_BASES: Final = (".base_layer", ".original_module")
_WRAPPERS: Final = ("BaseTunerLayer", "AuxiliaryTrainingWrapper")
_PLAIN: Final = (torch.Tensor, torch.nn.Parameter)


def foreign_digest(model: Model) -> str | None:
    """A digest of what replaced the layers of the model's class (torchao, quanto); None if nothing.

    Covers kinds, settings as far as they are printed, and up to 4,096 elements of each tensor.
    """
    found: list[bytes] = []
    for name, module in own_modules(model):
        kind: Any = module.__class__
        plain = kind.__module__.split(".")[0] in ("transformers", "transformers_modules")
        if not (plain or kind.__module__.startswith("torch.nn.modules.")):
            found.append(f"{name} {kind.__module__}.{kind.__qualname__} {module!r}".encode())
    for name, tensor, _ in tensors_of(model):
        if type(tensor) not in _PLAIN or not (tensor.is_floating_point() or tensor.numel() < 2):
            found.append(f"{name} {type(tensor).__qualname__} {tensor.dtype}".encode())
    if not found:
        return None
    total = sha256(b"\n".join(found))
    for name, tensor, _ in tensors_of(model):
        sample = spread(tensor, _SAMPLE, tensor.numel())
        if sample is not None:
            total.update(name.encode())
            total.update(sample.cpu().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def spread(tensor: torch.Tensor, count: int, numel: int) -> torch.Tensor | None:
    """About ``count`` of the first ``numel`` elements as integers; None if they cannot be read."""
    plain = tensor.detach()
    if type(plain) is not torch.Tensor or not plain.is_contiguous() or not plain.numel():
        return None
    size = plain.element_size()
    if plain.layout is not torch.strided or size not in _INTEGERS:
        return None
    bits = plain.view(-1)[:numel].view(_INTEGERS[size])
    return bits[:: max(1, -(-numel // count))].clone()


def tensors_of(model: Model) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Name, tensor, whether it is part of the weights. Adapters are judged elsewhere."""
    return tensors_in(own_modules(model))


def tensors_in(modules: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """:func:`tensors_of` the modules that :func:`own_modules` found."""
    for name, module in modules:
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                persistent = key not in module._non_persistent_buffers_set
                yield from _pieces(f"{name}.{key}" if name else key, tensor, persistent)


def _pieces(
    name: str, tensor: torch.Tensor, persistent: bool
) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """A tensor, and what it is made of where it wraps others (torchao, quanto)."""
    yield name, tensor, persistent
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) is not torch.nn.Parameter:
        inner: Any = tensor
        for key in inner.__tensor_flatten__()[0]:
            yield from _pieces(f"{name}.{key}", getattr(inner, key), persistent)


def own_modules(model: Model) -> Iterator[tuple[str, Any]]:
    """The model's modules under the names they have without PEFT's wrappers, its own left out."""
    adapted: list[str] = []
    for name, module in model.named_modules():
        parts = name.removeprefix("base_model.model.")
        if name in ("base_model", "base_model.model") or (
            not name and type(module).__module__.startswith("peft.")
        ):
            if name == "base_model.model":
                yield "", module
            continue
        inner = any(name.startswith(prefix) for prefix in adapted)
        if inner and not any(base in name for base in _BASES):
            continue
        if is_tuner(module):
            adapted.append(f"{name}.")
            continue
        for base in _BASES:
            parts = parts.replace(base, "")
        yield parts, module


def is_tuner(module: Any) -> bool:
    """Whether a module is a layer of PEFT around (or in place of) a layer of the model."""
    return any(
        base.__name__ in _WRAPPERS and base.__module__.startswith("peft.")
        for base in type(module).__mro__
    )


def called(model: Model) -> Any:
    """The module that ``model.generate`` calls: without PEFT's and the compiler's wrappers."""
    own = next((module for name, module in own_modules(model) if not name), model)
    return getattr(own, "_orig_mod", own)


def attributes(module: Any) -> dict[str, Any]:
    found: dict[str, Any] = module.__dict__
    return found

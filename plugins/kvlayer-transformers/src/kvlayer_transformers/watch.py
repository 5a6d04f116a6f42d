"""Notices at every call whether a model is still the one whose KV the session names.

Identity is taken once, when a session opens. Whatever shapes KV and can change afterwards is
looked at again: weights and buffers, the modules themselves and their numbers, hooks, the
configuration, dtype and device. Counters and pointers first, then a sample of the content.
"""

# Hooks have any type.
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Final

import torch

from kvlayer.errors import UnsupportedError
from kvlayer_transformers.code import Code, origin
from kvlayer_transformers.contents import attributes, own_modules, spread, tensors_in
from kvlayer_transformers.engine import Model
from kvlayer_transformers.loaded import numbers_of

__all__ = ["Watch", "check_ready"]

_SAMPLE: Final = 1 << 18
"""Elements compared at each call: all of a tiny model, evenly spread ones of a large model."""
_LEAST: Final = 64
_TRUSTED: Final = (
    *("torch", "transformers", "peft", "accelerate", "kernels", "liger_kernel"),
    "kvlayer_transformers",
)
"""Whose hooks and replaced forwards are known to leave KV as the weights say."""
_DROPS_OUT: Final = ("transformers", "torch.nn.modules.dropout")
"""Whose modules read ``training``. Layers of quantisers are always in training mode."""
_NUMBERS: Final = (
    *(int, float, str, bool, torch.dtype, FunctionType, MethodType, BuiltinFunctionType),
)


def check_ready(model: Model) -> None:
    """Refuse a state in which what the model computes is not what its weights say.

    Training mode, autocast, weights that are not on the device, hooks, torch modes and replaced
    methods of unknown origin. Raises ``UnsupportedError``. Costs a walk over the modules.
    """
    device = getattr(model, "device", None)
    kind = getattr(device, "type", "cpu")
    drops_out = (*_DROPS_OUT, type(model).__module__.split(".")[0])
    for name, module in model.named_modules():
        place = name or "the model"
        if module.training and (not name or type(module).__module__.startswith(drops_out)):
            raise UnsupportedError(
                f"{place} is in training mode: dropout would be part of its KV",
                hint="call model.eval() first",
            )
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.device.type == "meta":
                raise UnsupportedError(
                    f"kvlayer cannot carry an offloaded model: weights of {place} are kept off "
                    "the device",
                    hint="load the model onto one device, without device_map offloading",
                )
        foreign = next(_foreign_code(module), None)
        if foreign is not None:
            raise UnsupportedError(
                f"{place} has {foreign}, which may change KV in a way that nothing names",
                hint="remove it, or call model.generate() without the session",
            )
    everywhere = next(_foreign_everywhere(), None)
    if everywhere is not None:
        raise UnsupportedError(
            f"{everywhere} is active, which may change KV in a way that nothing names",
            hint="remove it, or call model.generate() without the session",
        )
    if kind != "meta" and torch.is_autocast_enabled(kind):
        raise UnsupportedError(
            "autocast is on: keys and values would be computed in another dtype than the model's",
            hint="leave torch.autocast, or load the model in the dtype you want",
        )


class Watch:
    """What a model was at one moment. :meth:`check` costs some milliseconds for 300 tensors."""

    def __init__(self, model: Model) -> None:
        """Raises what :func:`check_ready` raises."""
        check_ready(model)
        self._model = model
        self._config = _config_of(model)
        modules = [*own_modules(model)]
        self._modules = _states_of(modules)
        self._code = Code(model)
        tensors = {name: tensor for name, tensor, _ in tensors_in(modules)}
        self._tensors = {name: _Mark(tensor) for name, tensor in tensors.items()}
        self._each = max(_LEAST, _SAMPLE // max(len(tensors), 1))
        self._sample = self._take(tensors)

    def check(self) -> None:
        """Raise ``UnsupportedError``, naming what has changed since this was made."""
        check_ready(self._model)
        what = self._changed()
        if what is not None:
            raise UnsupportedError(
                f"the model is no longer the one this session was opened for: {what}",
                hint="open a new Session for it, with weights= that names what it is now",
            )

    def _changed(self) -> str | None:
        config = _config_of(self._model)
        if config != self._config:
            names = sorted(k for k in config if config[k] != self._config.get(k))
            return f"its configuration has another {names[0] if names else 'shape'}"
        modules = [*own_modules(self._model)]
        states = _states_of(modules)
        if states != self._modules:
            return _first_difference(states, self._modules)
        replaced = self._code.changed()
        if replaced is not None:
            return f"another function was put in the place of {replaced}"
        found = {name: (tensor, kept) for name, tensor, kept in tensors_in(modules)}
        if found.keys() != self._tensors.keys():
            name = min(found.keys() ^ self._tensors.keys())
            return f"{name} has {'come' if name in found else 'gone'}"
        grown: list[str] = []
        for name, (tensor, persistent) in found.items():
            what = self._tensors[name].differs(tensor)
            if what is not None and persistent:
                return f"{name} {what}"
            if what is not None:
                grown.append(name)
        return self._content_changed({name: tensor for name, (tensor, _) in found.items()}, grown)

    def _content_changed(self, tensors: dict[str, torch.Tensor], grown: list[str]) -> str | None:
        """Compare samples. ``grown``: tables the model computes for itself, made anew."""
        now = self._take(tensors)
        for name, before in self._sample.items():
            after = now[name]
            if before.shape != after.shape or not torch.equal(before, after):
                return f"the content of {name} has changed"
        for name in grown:
            self._tensors[name] = _Mark(tensors[name])
        return None

    def _take(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A few bits of every tensor, by name."""
        return {
            name: sample
            for name, tensor in tensors.items()
            if (sample := spread(tensor, self._each, self._tensors[name].numel)) is not None
        }


class _Mark:
    """What tells one tensor from another, and from itself after a change in place."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.ref = weakref.ref(tensor)
        self.numel = tensor.numel()
        self.seen = _seen(tensor)

    def differs(self, tensor: torch.Tensor) -> str | None:
        dtype, shape, device, pointer, version = _seen(tensor)
        if dtype != self.seen[0]:
            return f"is now {dtype}, it was {self.seen[0]}"
        if device != self.seen[2]:
            return f"is now on {device}, it was on {self.seen[2]}"
        if shape != self.seen[1]:
            return f"has now shape {shape}, it had {self.seen[1]}"
        if self.ref() is not tensor or pointer != self.seen[3]:
            return "was replaced"
        return None if version == self.seen[4] else "was changed in place"


def _seen(tensor: torch.Tensor) -> tuple[Any, ...]:
    version = None if tensor.is_inference() else tensor._version
    return tensor.dtype, tuple(tensor.shape), tensor.device, _pointer(tensor), version


def _pointer(tensor: torch.Tensor) -> int | None:
    try:
        pointer: int = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # a quantised tensor that wraps others
        return None
    return pointer


def _states_of(modules: Iterable[tuple[str, Any]]) -> dict[str, tuple[object, ...]]:
    """Type and public numbers of every module: a window, a scale, whether it is causal.

    Functions that a module holds count as numbers do.
    """
    return {
        name: (
            type(module),
            *numbers_of(module, _NUMBERS).items(),
        )
        for name, module in modules
    }


def _first_difference(now: dict[str, Any], before: dict[str, Any]) -> str:
    for name in {**before, **now}:
        if now.get(name) != before.get(name):
            place = name or "the model"
            if name not in before or name not in now:
                return f"{place} has {'come' if name in now else 'gone'}"
            if now[name][0] is not before[name][0]:
                return f"{place} is now a {now[name][0].__name__}, not a {before[name][0].__name__}"
            changed = sorted({key for key, _ in set(now[name][1:]) ^ set(before[name][1:])})
            return f"{place} has another {changed[0]}"
    return "its modules stand in another order"


def _config_of(model: Model) -> dict[str, Any]:
    config = model.config
    return {**config.to_dict(), "attention implementation": config._attn_implementation}


def _foreign_code(module: Any) -> Iterator[str]:
    for kind, hooks in (
        ("forward hook", module._forward_hooks),
        ("forward pre-hook", module._forward_pre_hooks),
    ):
        for hook in list(hooks.values()):
            if not _is_trusted(hook):
                yield f"a {kind} ({_shown(hook)})"
    own_hook = attributes(module).get("_hf_hook")  # accelerate's, which calls it
    more: Any = getattr(own_hook, "hooks", ())
    for hook in (own_hook, *more):
        if hook is not None and not _is_trusted(hook):
            yield f"a hook ({_shown(hook)})"
    for name, value in attributes(module).items():
        if callable(value) and hasattr(type(module), name) and not _is_trusted(value):
            yield f"a {name} that was replaced ({_shown(value)})"


def _foreign_everywhere() -> Iterator[str]:
    """What reaches into every module or every operation of the process or the thread."""
    modules: Any = torch.nn.modules.module
    for hooks in (modules._global_forward_hooks, modules._global_forward_pre_hooks):
        for hook in list(hooks.values()):
            if not _is_trusted(hook):
                yield f"a global forward hook ({_shown(hook)})"
    overrides: Any = torch.overrides
    utils: Any = torch.utils
    modes: list[Any] = [
        *overrides._get_current_function_mode_stack(),
        *utils._python_dispatch._get_current_dispatch_mode_stack(),
    ]
    for mode in modes:
        if not _is_trusted(mode):
            yield f"a torch mode ({_shown(mode)})"


def _is_trusted(function: Any) -> bool:
    return origin(function).split(".")[0] in _TRUSTED


def _shown(function: Any) -> str:
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    return f"{origin(function)}.{getattr(function, '__qualname__', type(function).__name__)}"

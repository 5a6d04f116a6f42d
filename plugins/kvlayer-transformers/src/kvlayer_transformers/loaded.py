"""How a model in memory differs from its files, and from what its class makes of its configuration.

Weights are named by the files they were loaded from. What happened to them since (files that were
replaced, an adapter merged in, rows added, layers pruned or moved, a scale set by hand) is found by
comparing, and named as well.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import torch

from kvlayer_transformers.contents import attributes, called, own_modules, spread, tensors_of
from kvlayer_transformers.engine import Model, open_tensors, quiet

__all__ = ["changed_modules", "changed_tensors", "numbers_of"]

_BLOCK: Final = 256
_SAMPLE: Final = 4096
_CLOSE: Final = 1e-4
"""For tables that one device computed and another one checks."""
_NUMBERS: Final = (int, float, str, bool)


def changed_tensors(model: Model, folder: str) -> str | None:
    """A digest of the parameters that are not as in the ``safetensors`` of a folder, or None.

    Three blocks of 256 elements of each are compared, in the dtype of the model. None also where
    there are no such files: of other formats nothing is compared. Nor is what some classes load
    from tensors of other names (experts in one piece). Raises ``IdentityError`` for a file that
    cannot be read.
    """
    places = _places(Path(folder)) if folder else {}
    if not places:
        return None
    prefix = f"{getattr(called(model), 'base_model_prefix', '')}."
    absent: dict[str, torch.Tensor] = {}
    changed: dict[str, torch.Tensor] = {}
    same: set[int] = set()
    unused = set(places)
    with ExitStack() as opened:
        files = {path: opened.enter_context(open_tensors(path)) for path in set(places.values())}
        for name, tensor, _ in tensors_of(model):
            names = (name, name.removeprefix(prefix), f"{prefix}{name}")
            known = next((each for each in names if each in places), None)
            if known is not None:
                unused.discard(known)
            if not isinstance(tensor, torch.nn.Parameter):
                continue
            if known is None:
                absent[name] = tensor
            elif _is_in(files[places[known]], known, tensor):
                same.add(id(tensor))
            else:
                changed[name] = tensor
    if not unused:  # else it may have been loaded from one of these
        changed |= {name: each for name, each in absent.items() if id(each) not in same}
    return _digest(changed) if changed else None


def changed_modules(model: Model) -> str | None:
    """A digest of the modules whose kinds, numbers or tables are not those of a new model, or None.

    The new one is built of the model's class and configuration, without memory. None also where
    that fails.
    """
    own = called(model)
    try:
        with quiet(), torch.device("meta"):
            fresh = type(own)(copy.deepcopy(own.config))
    except Exception:  # noqa: BLE001  # somebody else's constructor: anything may come
        return None
    now, before = _described(own), _described(fresh)
    differing = sorted(
        name for name in now.keys() | before.keys() if now.get(name) != before.get(name)
    )
    parts = [f"{name} {now.get(name)}" for name in differing]
    parts += [f"{name} {digest}" for name, digest in _changed_tables(own)]
    return sha256("\n".join(parts).encode()).hexdigest() if parts else None


def numbers_of(module: Any, kinds: tuple[type, ...] = _NUMBERS) -> dict[str, Any]:
    """A module's public attributes of some kinds: a window, a scale, whether it is causal."""
    return {
        key: value
        for key, value in attributes(module).items()
        if isinstance(value, kinds) and not key.startswith("_") and key != "training"
    }


def _places(folder: Path) -> dict[str, Path]:
    """Which file of a folder (or a file itself) has a tensor, as transformers chooses them."""
    single = folder if folder.is_file() else folder / "model.safetensors"
    if single.suffix == ".safetensors" and single.exists():
        with open_tensors(single) as file:
            return dict.fromkeys(file.keys(), single)
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        placed: Mapping[str, str] = index["weight_map"]
        return {name: folder / file for name, file in placed.items()}
    except (OSError, ValueError, KeyError, TypeError):  # no such files, or none transformers loads
        return {}


def _is_in(file: Any, name: str, tensor: torch.Tensor) -> bool:
    """Whether three blocks of a tensor in memory are those of the tensor in a file."""
    stored: torch.Tensor = file.get_tensor(name)  # mapped, not read
    plain = tensor.detach()
    if stored.shape != plain.shape:
        return False
    if not (plain.is_contiguous() and stored.is_contiguous()):
        return bool(torch.equal(plain.cpu(), stored.to(plain.dtype)))
    flat, kept = plain.view(-1), stored.view(-1)
    starts = {0, max(0, len(kept) // 2 - _BLOCK), max(0, len(kept) - _BLOCK)}
    return all(
        torch.equal(flat[at : at + _BLOCK].cpu(), kept[at : at + _BLOCK].to(plain.dtype))
        for at in starts
    )


def _described(model: Any) -> dict[str, str]:
    return {
        name: f"{type(module).__qualname__} {sorted(numbers_of(module).items())}"
        for name, module in own_modules(model)
    }


def _changed_tables(model: Any) -> Iterator[tuple[str, str]]:
    """Tables that modules compute of the configuration (angles of RoPE) and that now differ."""
    for name, module in own_modules(model):
        config, own = getattr(module, "config", None), module._non_persistent_buffers_set
        tables = {key: table for key in sorted(own) if (table := module._buffers[key]) is not None}
        if config is None or not tables or next(module.children(), None) is not None:
            continue
        try:
            with quiet(), torch.device("cpu"):
                fresh = type(module)(config)
        except Exception:  # noqa: BLE001, S112  # not built of a configuration: nothing to compare
            continue
        for key, table in tables.items():
            made, plain = fresh._buffers.get(key), table.detach().cpu()
            if made is None or made.shape != plain.shape or made.device.type == "meta":
                continue
            if not torch.allclose(made.double(), plain.double(), rtol=_CLOSE, atol=0):
                yield f"{name}.{key}", _digest({key: plain})


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    total = sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sample = spread(tensor, _SAMPLE, tensor.numel())
        if sample is not None:
            total.update(sample.cpu().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()

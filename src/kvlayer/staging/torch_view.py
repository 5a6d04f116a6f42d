"""A lent ``KVView`` of torch tensors: checked against the layout, turned into addresses and slots.

Cheap enough for every call and never synchronises a device: only shapes, strides, dtypes and
devices are read, except by ``slot_array``, which copies the slots of a device to the host.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any, cast

from kvlayer._values import shown_value
from kvlayer.errors import LayoutError
from kvlayer.layout import AttentionKind, KVLayout, KVView, LayerCache, Tensor
from kvlayer.staging.geometry import CacheGeometry, TensorShape, cache_geometry
from kvlayer.staging.lazy import np, torch
from kvlayer.staging.slots import IntArray

__all__ = ["GeometryReader", "slot_array", "tensors_of"]

_TORCH_DTYPES = {
    "float32": ("float32",),
    "bfloat16": ("bfloat16",),
    "float16": ("float16",),
    "fp8_e4m3": ("float8_e4m3fn", "uint8"),
    "fp8_e5m2": ("float8_e5m2", "uint8"),
    "int8": ("int8",),
}
_MAX_GEOMETRIES = 64  # engines use one or two; dense caches change shape with every prompt


class GeometryReader:
    """Checks views of one layout and reads their geometry.

    What was verified is remembered by value (shape, strides, dtype), never by the identity of a
    tensor, so reused memory or a resized cache cannot meet a stale answer. Not thread-safe in
    the sense that two threads may verify the same shape twice.
    """

    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout
        self._dtypes = [
            tuple(getattr(torch, name) for name in _TORCH_DTYPES[g.group.dtype])
            for g in layout.groups
        ]
        self._known: dict[tuple[Any, ...], CacheGeometry] = {}

    def read(self, view: KVView) -> list[list[CacheGeometry]]:
        """Geometry per group and local layer. Raises ``LayoutError`` where the view is wrong."""
        groups = self._layout.groups
        for what, count in (("caches", len(view.caches)), ("slots", len(view.slots))):
            if count != len(groups):
                raise LayoutError(
                    f"expected {what} of {len(groups)} KV group(s), found {count}",
                    hint="KVView.single(caches, slots) makes the view of a model with one group",
                )
        ready: object = view.ready
        if ready is not None and not hasattr(ready, "cuda_event"):
            raise LayoutError(
                f"expected ready to be a recorded event, found {shown_value(ready)}",
                hint="a torch.cuda.Event, not its handle; None follows what is queued by now",
            )
        device: Any = None
        geometries: list[list[CacheGeometry]] = []
        for index, (layout, caches) in enumerate(zip(groups, view.caches, strict=True)):
            lo, hi = layout.layer_range
            if len(caches) != hi - lo:
                raise LayoutError(
                    f"group {index}: expected {hi - lo} layers ({lo}..{hi}), found {len(caches)}"
                )
            found_here: list[CacheGeometry] = []
            for layer, cache in enumerate(caches):
                tensors = self._tensors(index, layer, cache)
                for tensor in tensors:
                    found = tensor.device
                    if device is None:
                        device = found
                    if found != device:
                        raise LayoutError(
                            f"group {index} layer {layer}: expected all tensors on {device}, "
                            f"found one on {found}",
                            hint="one stager and one view serve one device",
                        )
                found_here.append(self._geometry(index, layer, tensors))
            geometries.append(found_here)
        for index, slots in enumerate(view.slots):
            self._check_slots(index, slots)
            if len(slots) != len(view.slots[0]):
                raise LayoutError(
                    f"slots of group {index} cover {len(slots)} tokens, those of group 0 "
                    f"{len(view.slots[0])}",
                    hint="all groups cover the same tokens; use -1 where one holds nothing",
                )
        return geometries

    def _tensors(self, index: int, layer: int, cache: LayerCache) -> Sequence[Tensor]:
        tensors, layout = tensors_of(cache), self._layout.groups[index]
        is_pair = tensors is cache
        if (
            is_pair != layout.is_pair
            or len(tensors) != 1 + is_pair
            or any(not isinstance(t, torch.Tensor) for t in tensors)
        ):
            what = "a (K, V) pair of torch tensors" if layout.is_pair else "a torch tensor"
            expected = f"{what} with axes {layout.axes}"
            raise LayoutError(
                f"group {index} layer {layer}: expected {expected}, found {_kind(cache)}",
                hint="axes without kv or kvdim describe each tensor of a pair",
            )
        return tensors

    def _geometry(self, index: int, layer: int, tensors: Sequence[Tensor]) -> CacheGeometry:
        seen = (index, *[(t.shape, t.stride(), t.dtype) for t in tensors])
        known = self._known.get(seen)
        if known is not None:
            return known
        layout = self._layout.groups[index]
        try:
            for tensor in tensors:
                expected = self._dtypes[index]
                if layout.group.kind is not AttentionKind.STATE and tensor.dtype not in expected:
                    names = " or ".join(str(d) for d in expected)
                    raise LayoutError(
                        f"expected dtype {names} for {layout.group.dtype}, found {tensor.dtype}",
                        hint="the layout names the logical KV dtype the engine keeps",
                    )
            shapes = [
                TensorShape(tuple(t.shape), tuple(t.stride()), t.element_size()) for t in tensors
            ]
            geometry = cache_geometry(layout, shapes)
        except LayoutError as error:
            raise LayoutError(f"group {index} layer {layer}: {error}", hint=error.hint) from None
        if len(self._known) >= _MAX_GEOMETRIES:
            self._known.clear()
        self._known[seen] = geometry
        return geometry

    def _check_slots(self, index: int, slots: Any) -> None:
        if isinstance(slots, range):
            return
        if isinstance(slots, torch.Tensor):
            found = f"a {slots.dim()}-D tensor of {slots.dtype}"
            good = slots.dim() == 1 and slots.dtype in (torch.int64, torch.int32)
        else:
            try:
                with memoryview(slots) as lent:
                    found = f"a {lent.ndim}-D buffer of format {lent.format!r}"
                    good = lent.ndim == 1 and lent.format in ("i", "l", "q")
            except TypeError:
                found, good = _kind(slots), False
        if not good:
            raise LayoutError(
                f"slots of group {index}: expected a 1-D int32 or int64 buffer or a range, "
                f"found {found}",
                hint="pass a torch or numpy array, an array.array('q', ...), or a range",
            )


def tensors_of(cache: LayerCache) -> Sequence[Tensor]:
    """The tensors of one layer's cache; the cache itself when it is a pair."""
    return cast("Sequence[Tensor]", cache) if isinstance(cache, (tuple, list)) else (cache,)


def slot_array(slots: Any, first: int, stop: int) -> IntArray:
    """Checked slots ``first..stop`` as int64, in host memory."""
    part = slots[first:stop]
    if isinstance(part, range):
        part = np.arange(part.start, part.stop, part.step, dtype=np.int64)
    elif hasattr(part, "cpu"):
        part = part.detach().cpu().numpy()
    array: IntArray = np.asarray(part).astype(np.int64, copy=False)
    return array


def _kind(value: object) -> str:
    name = f"a {type(value).__name__}"
    return f"{name} of {len(cast('Sized', value))}" if isinstance(value, (tuple, list)) else name

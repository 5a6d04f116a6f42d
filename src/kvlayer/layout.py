"""How KV tensors lie in an engine's memory: groups, named axes and the views an engine lends.

A :class:`KVGroup` is part of a model's identity (every deployment of the model agrees on it); a
:class:`GroupLayout` says how one rank of one engine holds its share; a :class:`KVView` lends the
tensors of one request. Nothing here imports a tensor library.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, TypeAlias

from kvlayer._values import choice, given, instance, items, listed, shown_value, whole
from kvlayer.device_event import DeviceEvent
from kvlayer.errors import LayoutError

__all__ = [
    "DENSE",
    "DTYPE_NBYTES",
    "FUSED_HND",
    "HND",
    "MLA_BLOCKS",
    "NHD",
    "NHD_BLOCK_FIRST",
    "NHD_PAIR",
    "STATE_BLOCKS",
    "AttentionKind",
    "GroupLayout",
    "HitRule",
    "KVGroup",
    "KVLayout",
    "KVView",
    "LayerCache",
    "LoadedLayers",
    "Tensor",
]

Tensor: TypeAlias = Any
"""A torch tensor; the core never imports torch, so it cannot name the type."""

LayerCache: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""One layer's cache: one tensor, or a separate (K, V) pair when the axes have no K|V axis."""

DTYPE_NBYTES: Mapping[str, int] = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
    "int8": 1,
}
"""Logical KV dtypes and their sizes in bytes. An engine that keeps fp8 as uint8 says ``fp8_*``."""


class AttentionKind(StrEnum):
    """What a layer keeps per token."""

    MHA = "mha"
    """A key and a value per head (MHA, GQA, MQA); heads are sharded over tensor parallelism."""
    MLA = "mla"
    """One latent vector, replicated across tensor-parallel ranks."""
    STATE = "state"
    """A recurrent state of fixed size per sequence (Mamba, linear attention), opaque to kvlayer."""


class HitRule(StrEnum):
    """Which chunks of a prefix must be present for the prefix to be usable."""

    EVERY_CHUNK = "every-chunk"
    """All of them."""
    TRAILING = "trailing"
    """Those that reach into a sliding window before the end of the prefix."""
    CHUNKED = "chunked"
    """Those of the last, unfinished attention chunk: chunked local attention (Llama 4)."""
    BOUNDARY = "boundary"
    """A state exactly at the end. Engines keep few of them, so few lengths are usable."""


_OPTIONAL = frozenset({"v_head_size", "window_tokens"})
_QUANTISATION = re.compile(r"[a-z0-9_.:+-]{0,64}")


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers of the model that share a block table and a hit rule. Part of the namespace.

    ``layers`` are the model's layer numbers. ``head_size`` is the row length of K (or of the MLA
    latent, RoPE part included); ``v_head_size`` defaults to it. ``rope`` is a flat description of
    everything that shaped the rotation of K. ``window_tokens`` belongs to ``HitRule.TRAILING`` (how
    many tokens before the end of a hit must be present) and to ``HitRule.CHUNKED`` (the tokens of
    an attention chunk). Of a ``STATE`` group only the state at the end of a hit matters: its rule
    is always ``BOUNDARY``, its window 1 unless one is given, and no other kind has that rule.
    ``state_nbytes`` is the size of one layer's state, which every rank has all of: where each rank
    has a share of it, the group cannot be described. ``quantisation`` names the format of rows
    that are more than elements of ``dtype``: those with scales among their bytes, say, such as
    ``fp8_per_token_head``. Formats of one size are different groups; ``head_size`` and
    ``v_head_size`` then only cut the row in two.

    A list is taken for a tuple, and an enum's text for its member. Raises ``LayoutError`` for
    what names no group.
    """

    kind: AttentionKind
    layers: tuple[int, ...]
    dtype: str
    num_kv_heads: int = 1
    head_size: int = 0
    v_head_size: int | None = None
    hit_rule: HitRule = HitRule.EVERY_CHUNK
    window_tokens: int | None = None
    rope: Mapping[str, str | int | float | bool | None] = field(
        default_factory=dict[str, str | int | float | bool | None]
    )
    state_nbytes: int = 0
    quantisation: str = ""

    def __post_init__(self) -> None:
        self._coerce()
        if _QUANTISATION.fullmatch(self.quantisation) is None:
            raise LayoutError(
                f"a quantisation cannot be named {shown_value(self.quantisation)}",
                hint="its format in lowercase, such as 'fp8_per_token_head'; empty for none",
            )
        if self.dtype not in DTYPE_NBYTES:
            known = ", ".join(DTYPE_NBYTES)
            raise LayoutError(
                f"unknown KV dtype {self.dtype!r}",
                hint=f"use a logical dtype, one of: {known}",
            )
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise LayoutError(
                f"a KV group needs at least one layer, and each once, found {self.layers}",
                hint="layers are the model's layer numbers, for example tuple(range(32))",
            )
        if self.kind is AttentionKind.STATE:
            if self.state_nbytes <= 0:
                raise LayoutError("a state group needs state_nbytes > 0", hint="size of one layer")
        elif self.head_size <= 0 or self.num_kv_heads <= 0:
            raise LayoutError(
                f"a {self.kind} group needs num_kv_heads > 0 and head_size > 0, found "
                f"{self.num_kv_heads} and {self.head_size}"
            )
        if self.hit_rule in (HitRule.TRAILING, HitRule.CHUNKED) and (self.window_tokens or 0) < 1:
            raise LayoutError(
                f"a {self.hit_rule} group needs window_tokens >= 1, found {self.window_tokens}",
                hint="the sliding window, or the attention chunk, in tokens",
            )
        if self.hit_rule is HitRule.BOUNDARY and self.kind is not AttentionKind.STATE:
            raise LayoutError(
                f"a {self.kind} group cannot have the hit rule {self.hit_rule}",
                hint="that of a state group alone, which a prefix needs only at its end",
            )

    def _coerce(self) -> None:
        """Every field in its own type. Texts are taken for the enums they name."""
        layers = listed(self.layers)
        if layers is None:
            raise LayoutError(
                f"layers must be a tuple of layer numbers, found {shown_value(self.layers)}",
                hint="for example tuple(range(32))",
            )
        dtype: object = self.dtype
        instance("dtype", dtype, str, hint="a logical dtype such as 'bfloat16'", error=LayoutError)
        name: object = self.quantisation
        instance("quantisation", name, str, hint="a format's name, or ''", error=LayoutError)
        rope = given(self.rope)
        if not isinstance(rope, Mapping):
            raise LayoutError(f"rope must be a flat table, found {shown_value(rope)}")
        fields: dict[str, object] = {
            "kind": choice("kind", self.kind, AttentionKind, error=LayoutError),
            "hit_rule": choice("hit_rule", self.hit_rule, HitRule, error=LayoutError),
            "layers": tuple(
                whole("a layer's number", layer, error=LayoutError) for layer in layers
            ),
        }
        for name in ("num_kv_heads", "head_size", "v_head_size", "window_tokens", "state_nbytes"):
            value: object = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                fields[name] = whole(name, value, error=LayoutError)
        if fields["kind"] is AttentionKind.STATE:  # of all states only the last one is of use
            fields |= {"hit_rule": HitRule.BOUNDARY, "window_tokens": self.window_tokens or 1}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPE_NBYTES[self.dtype]

    def first_needed(self, stop: int) -> int:
        """The first token whose KV a hit of ``stop`` tokens needs; ``stop`` where it needs none.

        It never falls as ``stop`` grows: a gap that ends one hit ends all longer ones that have it
        behind this token.
        """
        match self.hit_rule:
            case HitRule.EVERY_CHUNK:
                return 0
            case HitRule.TRAILING:
                return max(0, stop - (self.window_tokens or 1))
            case HitRule.CHUNKED:
                return stop - stop % (self.window_tokens or 1)
            case HitRule.BOUNDARY:
                return max(0, stop - 1)

    def planes(self) -> tuple[int, ...]:
        """Row length of each plane of a layer, in canonical order: (K, V), or (latent,)."""
        if self.kind is AttentionKind.MHA:
            return (self.head_size, self.v_head_size or self.head_size)
        return (self.head_size,) if self.kind is AttentionKind.MLA else ()


# An engine's tensor is described by the names of its axes, outermost first:
#   kv     K then V (extent 2)         block  the engine's block (page) number
#   token  position inside a block     head   KV head of this rank
#   dim    element of a head           kvdim  a K row followed by a V row
#   state  one opaque state
Axes: TypeAlias = tuple[str, ...]

NHD: Axes = ("kv", "block", "token", "head", "dim")
NHD_BLOCK_FIRST: Axes = ("block", "kv", "token", "head", "dim")
NHD_PAIR: Axes = ("block", "token", "head", "dim")
HND: Axes = ("kv", "block", "head", "token", "dim")
FUSED_HND: Axes = ("block", "head", "token", "kvdim")
DENSE: Axes = ("head", "token", "dim")
MLA_BLOCKS: Axes = ("block", "token", "dim")
STATE_BLOCKS: Axes = ("block", "state")

_FORM = re.compile(r"canonical|native:[a-z0-9_:-]+")
_AXES = frozenset({"kv", "block", "token", "head", "dim", "kvdim", "state"})


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """How one rank of one engine holds its share of a KV group.

    ``axes`` names the axes of each layer's tensor; without ``kv`` or ``kvdim`` an MHA layer is a
    pair of tensors. ``layers`` and ``heads`` are half-open ranges: positions in ``group.layers``
    and KV heads of the whole model; by default all of them. ``form`` is what this rank stores:
    ``canonical``, or ``native:<name>`` to keep whole blocks as the engine packed them (then
    chunks and tails are multiples of ``tokens_per_block`` and the name must pin the packing).
    A dense layout has no ``block`` axis: slot and token number are the same thing.
    """

    group: KVGroup
    axes: Axes
    tokens_per_block: int = 1
    layers: tuple[int, int] | None = None
    heads: tuple[int, int] | None = None
    form: str = "canonical"

    def __post_init__(self) -> None:
        instance("group", self.group, KVGroup, hint="build a KVGroup first", error=LayoutError)
        axes = listed(self.axes)
        if axes is None or not _are_axes(axes):
            raise LayoutError(
                f"bad axes {shown_value(self.axes)}: each must be one of "
                f"{', '.join(sorted(_AXES))}, once",
                hint="kvlayer.layout has the usual ones: NHD, HND, FUSED_HND, MLA_BLOCKS, ...",
            )
        size = whole("tokens_per_block", self.tokens_per_block, least=1, error=LayoutError)
        object.__setattr__(self, "axes", tuple(axes))
        object.__setattr__(self, "tokens_per_block", size)
        for name in ("layers", "heads"):
            object.__setattr__(self, name, _range(name, getattr(self, name)))
        form = given(self.form)
        if not isinstance(form, str) or not _FORM.fullmatch(form):
            raise LayoutError(
                f"unknown payload form {shown_value(form)}",
                hint="use 'canonical', or 'native:<name>' with a name of [a-z0-9_:-]",
            )
        self._check_kind()
        if self.form != "canonical" and "block" not in self.axes:
            raise LayoutError("a native form keeps whole blocks, but the axes have no block axis")
        for name, (lo, hi), limit in (
            ("layers", self.layer_range, len(self.group.layers)),
            ("heads", self.head_range, self.group.num_kv_heads),
        ):
            if not 0 <= lo < hi <= limit:
                raise LayoutError(f"{name} range {lo}..{hi} is not within 0..{limit}")

    def _check_kind(self) -> None:
        """Axes that this kind of group cannot have are refused before a cache is built on them."""
        kind, found = self.group.kind, {*self.axes}
        if kind is AttentionKind.MLA and found & {"kv", "kvdim"}:
            raise LayoutError(
                f"a {kind} group has no V, but the axes are {', '.join(self.axes)}",
                hint="MLA_BLOCKS are the usual axes",
            )
        if (kind is AttentionKind.STATE) is not ("state" in found):
            raise LayoutError(
                f"the axes of a {kind} group cannot be {', '.join(self.axes)}",
                hint="a state group's are STATE_BLOCKS; no other group has a state axis",
            )

    @property
    def layer_range(self) -> tuple[int, int]:
        return self.layers or (0, len(self.group.layers))

    @property
    def head_range(self) -> tuple[int, int]:
        return self.heads or (0, self.group.num_kv_heads)

    @property
    def is_pair(self) -> bool:
        """Whether each layer's cache is a separate (K, V) pair of tensors."""
        axes = self.axes
        return self.group.kind is AttentionKind.MHA and "kv" not in axes and "kvdim" not in axes

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block of one layer on this rank, K and V together."""
        if self.group.kind is AttentionKind.STATE:
            return self.group.state_nbytes
        lo, hi = self.head_range
        heads = hi - lo if self.group.kind is AttentionKind.MHA else 1
        return self.tokens_per_block * heads * sum(self.group.planes()) * self.group.itemsize


def _are_axes(axes: Sequence[object]) -> bool:
    known = [axis for axis in axes if isinstance(axis, str) and axis in _AXES]
    return len(known) == len(axes) == len(set(known))


def _range(name: str, found: object) -> tuple[int, int] | None:
    """A half-open range of two whole numbers, or None for all there is."""
    if found is None:
        return None
    ends = listed(found)
    if ends is None or len(ends) != 2:
        raise LayoutError(
            f"{name} must be a half-open range (first, last + 1), found {shown_value(found)}",
            hint="leave it out for all of the group's",
        )
    low, high = ends
    what = f"an end of {name}"
    return whole(what, low, error=LayoutError), whole(what, high, error=LayoutError)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """All KV groups of one rank, in the order the namespace lists them."""

    groups: tuple[GroupLayout, ...]

    def __post_init__(self) -> None:
        hint = "KVLayout.single(group, axes, tokens_per_block=...) makes that of one group"
        groups = items("groups", self.groups, GroupLayout, hint=hint, error=LayoutError)
        object.__setattr__(self, "groups", groups)
        if not self.groups:
            raise LayoutError("a KV layout needs at least one group, found none")

    @classmethod
    def single(
        cls,
        group: KVGroup,
        axes: Axes,
        *,
        tokens_per_block: int = 1,
        layers: tuple[int, int] | None = None,
        heads: tuple[int, int] | None = None,
        form: str = "canonical",
    ) -> KVLayout:
        """The layout of a model with one KV group."""
        return cls((GroupLayout(group, axes, tokens_per_block, layers, heads, form),))


class LoadedLayers(NamedTuple):
    """Layers that are on their way into a view, and the event behind the last of their bytes.

    ``layers`` are local layers of KV group ``group``; ``tokens`` are entries of the view's slots.
    Both ranges are half-open. ``event`` is the raw handle of a device event.
    """

    group: int
    layers: tuple[int, int]
    tokens: tuple[int, int]
    event: int


@dataclass(frozen=True, slots=True)
class KVView:
    """KV tensors an engine lends for one call, and where each token lives in them.

    ``caches[g][i]`` is the cache of the i-th local layer of group g, laid out as the group's
    ``axes`` say. ``slots[g]`` maps token -> slot for that group (``block_id * tokens_per_block +
    offset``): a 1-D int64 or int32 buffer (torch, numpy, ``array``) with one entry per token the
    view covers, a ``range`` for consecutive slots, and -1 where the engine no longer holds the
    token. Entry 0 belongs to the token called ``first_token`` in the call the view is passed to.
    All groups cover the same tokens. In a STATE group the block of a token's slot holds the state
    after that token; only the last token of a chunk or tail needs one, and where it has -1 the
    state is neither stored nor loaded.

    The engine owns the memory. It must not free, move or rewrite it until the call returns, also
    when the call is cancelled: every call returns only once it has let go of the view.

    ``stream`` is the raw handle of the device stream the engine computes on (0: its default one).
    The call follows what is queued on it when the call begins, whichever thread has queued it.
    ``ready`` says exactly what it follows: an event that the engine has recorded on ``stream``, as
    torch has it (``torch.cuda.Event``). What was queued later holds nothing up then, whoever
    copies, and waits for no copy. Devices other than CUDA's are waited for as a whole.

    ``loaded`` is told of layers as soon as all the copies are queued that a load's call makes into
    them, in the order of layers, from a thread of kvlayer's. An engine whose stream waits for the
    event may compute these layers before the call has returned; it must have begun to wait by then,
    for the event is used again. A load that fails or is cancelled may never tell, and so does a
    device without layer-wise loads. ``loaded`` must return at once.
    """

    caches: Sequence[Sequence[LayerCache]]
    slots: Sequence[Any]
    stream: int = 0
    loaded: Callable[[LoadedLayers], None] | None = None
    ready: DeviceEvent | None = None

    @property
    def num_tokens(self) -> int:
        """How many tokens the view covers."""
        return len(self.slots[0]) if self.slots else 0

    @classmethod
    def single(cls, caches: Sequence[LayerCache], slots: Any, *, stream: int = 0) -> KVView:
        """A view of a model with one KV group."""
        return cls((caches,), (slots,), stream)

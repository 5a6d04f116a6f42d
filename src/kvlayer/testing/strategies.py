"""Hypothesis strategies for kvlayer's nouns: keys, scopes, namespaces, layouts, prompts, regions.

Everything they draw is valid, and small enough to be computed with.
"""

from __future__ import annotations

from array import array
from typing import TypeVar

from hypothesis import strategies as st

from kvlayer.identity.keys import PUBLIC_ZONE, RAW, Encoding, ObjectKey, ObjectName, Part
from kvlayer.identity.namespace import Namespace
from kvlayer.identity.tokens import MAX_NAMED
from kvlayer.layout import (
    DENSE,
    DTYPE_NBYTES,
    FUSED_HND,
    HND,
    MLA_BLOCKS,
    NHD,
    NHD_BLOCK_FIRST,
    NHD_PAIR,
    STATE_BLOCKS,
    AttentionKind,
    GroupLayout,
    HitRule,
    KVGroup,
    KVLayout,
)
from kvlayer.payload import Payload
from kvlayer.scope import Content, Salt, Scope
from kvlayer.testing.loan import PAGE

__all__ = [
    "contents",
    "cuts",
    "digests",
    "groups",
    "layouts",
    "namespaces",
    "object_keys",
    "object_names",
    "parts",
    "payloads",
    "prompts",
    "scopes",
    "zones",
]

T = TypeVar("T")

_LETTERS = "abz09 -_/\u00e9\u2603\U0001f511"  # of one byte in UTF-8, and of two, three and four
_FORM = st.text("abcdefghijklmnopqrstuvwxyz0123456789_:-", min_size=1, max_size=24)
_DTYPES = st.sampled_from(sorted(DTYPE_NBYTES))
_AXES = {
    AttentionKind.MHA: (NHD, NHD_BLOCK_FIRST, NHD_PAIR, HND, FUSED_HND, DENSE),
    AttentionKind.MLA: (MLA_BLOCKS,),
    AttentionKind.STATE: (STATE_BLOCKS,),
}


def _ranges(limit: int) -> st.SearchStrategy[tuple[int, int]]:
    """Half-open, not empty, within ``0..limit``."""
    bounds = st.lists(st.integers(0, limit), min_size=2, max_size=2, unique=True)
    return bounds.map(sorted).map(lambda pair: (pair[0], pair[1]))


def digests(nbytes: int = 32) -> st.SearchStrategy[bytes]:
    """Any hash."""
    return st.binary(min_size=nbytes, max_size=nbytes)


def zones() -> st.SearchStrategy[str]:
    """The public zone, and those of salts."""
    return st.just(PUBLIC_ZONE) | digests(16).map(bytes.hex)


def parts() -> st.SearchStrategy[Part]:
    """Any part a key can name, of groups and ranges up to the largest number."""
    number = st.one_of(st.just(40), st.just(999_999_999)).flatmap(_ranges)
    forms = st.just("canonical") | _FORM.map("native:{}".format)
    return st.builds(Part, st.integers(0, 999_999_999), number, st.none() | number, forms)


def object_keys(namespace: str | None = None) -> st.SearchStrategy[ObjectKey]:
    """Any key, by default of any namespace."""
    names = digests().map(bytes.hex) if namespace is None else st.just(namespace)
    tokens = st.integers(1, 4096) | st.just(999_999_999)
    return st.builds(ObjectKey.of, names, zones(), digests(), tokens, parts())


def object_names(namespace: str | None = None) -> st.SearchStrategy[ObjectName]:
    """Any name that a tier may store an object under."""
    word = st.text("abcxyz019_-", min_size=1, max_size=8).map("c{}".format)
    encodings = st.just(RAW) | st.builds(Encoding, st.integers(1, 9999), word, st.just("") | word)
    return st.builds(ObjectName.made, object_keys(namespace), encodings)


def prompts(max_size: int = 200, vocabulary: int = MAX_NAMED + 1) -> st.SearchStrategy[array[int]]:
    """Token ids as a buffer of 32-bit integers."""
    ids = st.lists(st.integers(0, vocabulary - 1), max_size=max_size)
    return ids.map(lambda tokens: array("i", tokens))


def scopes(max_first: int = 200) -> st.SearchStrategy[Scope]:
    """Any scope: salts and contents from any token on, with or without an adapter and an owner."""
    first = st.integers(0, max_first)
    salts = st.lists(
        st.builds(Salt, st.text(_LETTERS, min_size=1, max_size=12), first),
        max_size=3,
        unique_by=lambda salt: salt.first_token,
    )
    found = st.lists(st.builds(Content, digests(), first), max_size=2)
    return st.builds(
        Scope,
        salts=salts.map(lambda each: tuple(sorted(each, key=lambda salt: salt.first_token))),
        contents=found.map(tuple),
        adapter=st.just(b"") | digests(),
        owner=st.text(_LETTERS, max_size=8),
    )


def groups(kind: AttentionKind | None = None) -> st.SearchStrategy[KVGroup]:
    """Any small KV group, of any kind of attention unless one is given."""
    kinds = st.sampled_from(list(AttentionKind)) if kind is None else st.just(kind)
    return kinds.flatmap(_groups_of)


@st.composite
def _groups_of(draw: st.DrawFn, kind: AttentionKind) -> KVGroup:
    layers = tuple(range(draw(st.integers(1, 5))))
    dtype = draw(_DTYPES)
    if kind is AttentionKind.STATE:
        nbytes = draw(st.integers(1, 5000))
        return KVGroup(kind, layers, dtype, state_nbytes=nbytes)
    size = draw(st.integers(1, 40))
    rule = draw(st.sampled_from([r for r in HitRule if r is not HitRule.BOUNDARY]))
    window = None if rule is HitRule.EVERY_CHUNK else draw(st.integers(1, 200))
    if kind is AttentionKind.MLA:
        return KVGroup(kind, layers, dtype, head_size=size, hit_rule=rule, window_tokens=window)
    values = draw(st.none() | st.integers(1, 40))
    heads = draw(st.integers(1, 4))
    return KVGroup(kind, layers, dtype, heads, size, values, rule, window)


@st.composite
def layouts(draw: st.DrawFn, kind: AttentionKind | None = None) -> KVLayout:
    """One group as a rank of some engine holds it: any axes, blocks, layers and heads."""
    group = draw(groups(kind))
    axes = draw(st.sampled_from(_AXES[group.kind]))
    if "kv" in axes and len(set(group.planes())) > 1:
        axes = NHD_PAIR  # one tensor of K and V has rows of one length
    heads = _ranges(group.num_kv_heads) if group.kind is AttentionKind.MHA else st.none()
    return KVLayout(
        (
            GroupLayout(
                group,
                axes,
                tokens_per_block=1 if "block" not in axes else draw(st.integers(1, 32)),
                layers=draw(st.none() | _ranges(len(group.layers))),
                heads=draw(st.none() | heads),
            ),
        )
    )


@st.composite
def payloads(draw: st.DrawFn) -> Payload:
    """The shape of any object of a small group."""
    group = draw(groups())
    is_mha = group.kind is AttentionKind.MHA
    heads = draw(_ranges(group.num_kv_heads)) if is_mha else None
    part = Part(0, draw(_ranges(len(group.layers))), heads)
    return Payload.of(group, part, draw(st.integers(1, 64)))


@st.composite
def namespaces(draw: st.DrawFn) -> Namespace:
    """Any small model's namespace."""
    return Namespace(
        weights=f"sha256:{draw(digests()).hex()}",
        groups=tuple(draw(st.lists(groups(), min_size=1, max_size=2))),
        compute_dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        tokens_per_chunk=draw(st.sampled_from([8, 16, 64, 256])),
    )


def contents(max_pages: int = 4) -> st.SearchStrategy[bytes]:
    """What an object may hold: whole pages, each of one byte, so that they shrink well."""
    pages = st.lists(st.integers(0, 255), min_size=1, max_size=max_pages)
    return pages.map(lambda values: b"".join(bytes([value]) * PAGE for value in values))


@st.composite
def cuts(draw: st.DrawFn, pages: int) -> tuple[int, ...]:
    """A way to cut so many pages into regions: for :meth:`kvlayer.testing.Loan.regions`."""
    found: list[int] = []
    while (left := pages - sum(found)) > 0:
        found.append(draw(st.integers(1, left)))
    return tuple(found)

"""Decisions without I/O: how to cut a chunk into parts, what covers a need, how long a hit is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from kvlayer._steps import SLICE, Steps
from kvlayer.errors import LayoutError
from kvlayer.identity.keys import Part
from kvlayer.layout import AttentionKind, GroupLayout, HitRule, KVGroup, KVLayout

__all__ = [
    "accepts",
    "cover",
    "cut",
    "cuts",
    "described",
    "ending",
    "holds",
    "prefix",
    "rank_part",
    "savings",
    "worthwhile",
]


def rank_part(index: int, layout: GroupLayout) -> Part:
    """Everything one rank needs of a chunk of group ``index``, as one part."""
    heads = layout.head_range if layout.group.kind is AttentionKind.MHA else None
    return Part(index, layout.layer_range, heads, layout.form)


def cut(index: int, layout: GroupLayout, head_shards: int) -> list[Part]:
    """The parts a rank writes of one chunk: its heads, cut as ``head_shards`` equal ranks would.

    ``head_shards`` 0 stands for as many as there are ranks of this size. Native payloads and
    groups without heads are never cut. Raises ``LayoutError`` when the rank's heads are not whole
    shards.
    """
    whole = rank_part(index, layout)
    if whole.heads is None or whole.form != "canonical" or not head_shards:
        return [whole]
    lo, hi = whole.heads
    heads = layout.group.num_kv_heads
    step = max(heads // head_shards, 1)
    if heads % step or lo % step or (hi - lo) % step:
        raise LayoutError(
            f"heads {lo}..{hi} of {heads} cannot be cut into {head_shards} equal shards",
            hint="head_shards must be a multiple of every tensor-parallel size in the fleet, "
            "and divide the number of KV heads",
        )
    return [Part(index, whole.layers, (h, h + step)) for h in range(lo, hi, step)]


def cuts(layout: KVLayout, ranks: Sequence[KVLayout], head_shards: int) -> list[list[Part]]:
    """Per group, the parts that are written of one chunk by all ``ranks`` together.

    Raises ``LayoutError`` unless they hold what ``layout`` says the planner plans for: the same
    groups, and every layer and head of them.
    """
    groups = [held.group for held in layout.groups]
    found: list[list[Part]] = []
    for i, planned in enumerate(layout.groups):
        parts: dict[Part, None] = {}
        for number, rank in enumerate(ranks):
            if [held.group for held in rank.groups] != groups:
                raise LayoutError(
                    f"rank {number} and the planner describe different KV groups",
                    hint="build every layout from the same KVGroup values, in the same order",
                )
            parts |= dict.fromkeys(cut(i, rank.groups[i], head_shards))
        need = rank_part(i, planned)
        inside = [part for part in parts if accepts(need, part) and holds(need, part)]
        if len(inside) < len(parts) or cover(need, inside) is None:
            raise LayoutError(
                f"the ranks hold {', '.join(map(str, parts))} of what is planned as {need}",
                hint="plan for the layers and heads of all ranks together; with several ranks "
                "the form must be 'canonical'",
            )
        found.append([*parts])
    return found


def described(layout: KVLayout) -> tuple[str, ...]:
    """What a rank holds of each group, in words that two processes can compare."""
    return tuple(f"{rank_part(i, g)} of {g.group}" for i, g in enumerate(layout.groups))


def holds(whole: Part, part: Part) -> bool:
    """Whether all of ``part`` lies within ``whole``."""
    return (
        (part.group, part.form) == (whole.group, whole.form)
        and (part.heads is None) == (whole.heads is None)
        and _inside(part.layers, whole.layers)
        and _heads_inside(part, whole)
    )


def accepts(need: Part, part: Part) -> bool:
    """Whether a reader that needs ``need`` can scatter from ``part`` at all.

    Forms must be equal: a native rank's axes may not describe what its blocks look like inside.
    """
    if (part.group, part.form) != (need.group, need.form):
        return False
    if (part.heads is None) != (need.heads is None):
        return False
    if part.form != "canonical":
        return part.heads == need.heads and part.layers == need.layers
    return _overlap(part.layers, need.layers) and (
        part.heads is None or need.heads is None or _overlap(part.heads, need.heads)
    )


def cover(need: Part, parts: Iterable[Part]) -> tuple[Part, ...] | None:
    """A small set of ``parts`` that together hold all of ``need``, or None.

    Earlier parts are preferred among equals. Overlap is harmless: content is the same.
    """
    usable = [p for p in parts if accepts(need, p)]
    for part in usable:
        if _inside(need.layers, part.layers) and _heads_inside(need, part):
            return (part,)
    layer_cells = _cells(need.layers, (p.layers for p in usable))
    head_cells = _cells(_heads(need), (_heads(p) for p in usable))
    missing = {(i, j) for i in layer_cells for j in head_cells}
    chosen: list[Part] = []
    while missing:
        best: set[tuple[tuple[int, int], tuple[int, int]]] = set()
        pick: Part | None = None
        for part in usable:
            gain = {
                (i, j) for i, j in missing if _inside(i, part.layers) and _inside(j, _heads(part))
            }
            if len(gain) > len(best):
                best, pick = gain, part
        if pick is None:
            return None
        chosen.append(pick)
        missing -= best
    return tuple(chosen)


def prefix(
    stops: Sequence[int], groups: Sequence[KVGroup], usable: Callable[[int, int], bool]
) -> int:
    """How many of the consecutive spans ending at ``stops`` make the longest usable prefix.

    ``usable(i, g)`` says whether span i is there for group g. Every-chunk groups need all spans,
    others only those that reach beyond ``KVGroup.first_needed``.
    """
    every = [g for g, group in enumerate(groups) if group.hit_rule is HitRule.EVERY_CHUNK]
    count = 0
    while count < len(stops) and all(usable(count, g) for g in every):
        count += 1
    return ending(count, stops.__getitem__, groups, usable)


def ending(
    count: int,
    stop_of: Callable[[int], int],
    groups: Sequence[KVGroup],
    usable: Callable[[int, int], bool],
) -> int:
    """:func:`prefix` of ``count`` spans that every-chunk groups have, span i up to ``stop_of(i)``.

    Looks at windows from the end only, however many spans there are.
    """
    ends = [g for g, group in enumerate(groups) if group.hit_rule is not HitRule.EVERY_CHUNK]
    while count:
        gaps = [_gap(stop_of, count, groups[g], partial(_there, usable, g)) for g in ends]
        gap = min((i for i in gaps if i is not None), default=None)
        if gap is None:
            break
        count = gap  # every hit that ends after the gap needs it too
    return count


def savings(
    stops: Sequence[int],
    needs: Sequence[Mapping[int, int]],
    seconds: Callable[[int, int], float],
    tokens_per_second: float,
) -> Steps[list[float]]:
    """Seconds that taking a hit up to each of ``stops`` saves over recomputing it.

    ``needs[i]`` are the bytes span i needs from each tier, ``seconds(tier, nbytes)`` is what they
    take; tiers load side by side. What lies in host memory needs nothing.
    """
    saved: list[float] = []
    total: dict[int, int] = {}
    for i, stop in enumerate(stops):
        if i and not i % SLICE:
            yield
        for tier, nbytes in needs[i].items():
            total[tier] = total.get(tier, 0) + nbytes
        load = max((seconds(tier, nbytes) for tier, nbytes in total.items()), default=0.0)
        saved.append(stop / tokens_per_second - load)
    return saved


def worthwhile(saved: Sequence[float]) -> int:
    """How many spans of a hit to take: the count that saves most, 0 if none saves anything.

    What lies in host memory is always taken, unless so much before it would have to be loaded that
    all of it is not worth the time.
    """
    most = max(saved, default=0.0)
    return saved.index(most) + 1 if most > 0 else 0


def _gap(
    stop_of: Callable[[int], int], count: int, group: KVGroup, usable: Callable[[int], bool]
) -> int | None:
    """The last unusable span of those that a hit of ``count`` spans needs of a group."""
    first = group.first_needed(stop_of(count - 1))
    i = count - 1
    while i >= 0 and stop_of(i) > first:
        if not usable(i):
            return i
        i -= 1
    return None


def _there(usable: Callable[[int, int], bool], group: int, span: int) -> bool:
    return usable(span, group)


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _heads(part: Part) -> tuple[int, int]:
    return part.heads or (0, 1)


def _heads_inside(need: Part, part: Part) -> bool:
    return _inside(_heads(need), _heads(part))


def _cells(need: tuple[int, int], ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """``need`` cut at every boundary inside it: within a cell all parts agree."""
    cuts = {need[0], need[1]}
    for lo, hi in ranges:
        cuts |= {x for x in (lo, hi) if need[0] < x < need[1]}
    edges = sorted(cuts)
    return list(itertools.pairwise(edges))

"""Calls of a tier to an eviction policy, made to a policy and to a model of it alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from kvlayer.abc.policy import EvictionPolicy
from kvlayer.testing.suites.policy import PlayedPolicy

paths = st.lists(st.integers(0, 11), min_size=1, max_size=4, unique=True)
calls = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["store", "store", "use", "use", "pin"]), paths),
        st.tuples(st.just("unpin"), paths, st.booleans()),
        st.tuples(st.just("lose"), st.integers(0, 11), st.booleans()),
        st.tuples(st.just("evict"), st.integers(1, 4)),
    ),
    max_size=80,
)


_FLAGS = {"unpin": ("used",), "lose": ("evicted",)}


def play(
    real: type[EvictionPolicy],
    model: type[EvictionPolicy],
    calls: Sequence[tuple[Any, ...]],
    same: Callable[[Any, Any], None] = lambda real, model: None,
) -> None:
    """Make the same calls to both: they name the same victims, and hold what ``same`` asserts."""
    both = PlayedPolicy(real), PlayedPolicy(model)

    def victim() -> int | None:
        named = [played.victim() for played in both]
        assert named[0] == named[1]
        return named[0]

    def evict() -> bool:
        name = victim()
        if name is not None:
            for played in both:
                played.lose(name, evicted=True)
        return name is not None

    for what, argument, *more in calls:
        for played in both if what != "evict" else ():
            getattr(played, what)(argument, **dict(zip(_FLAGS.get(what, ()), more, strict=True)))
        for _ in range(argument if what == "evict" else 0):
            evict()
        victim()
        same(both[0].policy, both[1].policy)
    for played in both:
        played.unpin(range(12), used=False)
    while evict():
        same(both[0].policy, both[1].policy)
    assert not both[0].resident

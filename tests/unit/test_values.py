"""Wrong values at every public door: one error of ours, or taken as they are meant."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from array import array
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from caches import config, group, layout, tokens
from engine import Engine
from hang import HANG
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import kvlayer.api.control
from kvlayer import (
    AttentionKind,
    Cache,
    CacheConfig,
    Content,
    GroupLayout,
    HitRule,
    KVGroup,
    KVLayerError,
    KVLayout,
    KVView,
    ModelConfig,
    Namespace,
    Portal,
    Retention,
    Salt,
    Scope,
    TierConfig,
    _values,
)
from kvlayer.errors import ArgumentError, LayoutError, UnsupportedError
from kvlayer.layout import MLA_BLOCKS, NHD, STATE_BLOCKS

NAN, INF = float("nan"), float("inf")


class Odd:
    """Nothing that anybody expects: neither compared, hashed nor shown."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("==")

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        raise RuntimeError("repr")


WRONG: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**64, 10**400, -(2**70), 0.0, 1.5, -0.5, NAN, INF, -INF,
    1e308, 5e-324, Decimal("1.5"), Decimal("NaN"), Fraction(1, 3), 1j, "", "x", "0", "nan", "alice",
    "mha", "every-chunk", "cpu://", "\ud800", b"", b"x" * 32, bytearray(4), array("i", [1, 2]),
    array("d", [0.5]), [], [1], [None], (), (0, 0), ((),), {}, {"a": 1}, {"input_ids": [[1]]},
    set(),     range(4), range(0), object(), Odd(), int, Odd, len, iter([1]),
    np.int64(3), np.float32(0.5), np.float64("nan"), np.bool_(True), np.array(5), np.zeros(4),
    np.zeros((2, 2), np.int64), torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64),
    torch.tensor(7), torch.zeros(0), Path("/x"), Salt("s"), Scope(), Retention(), AttentionKind.MHA,
    HitRule.TRAILING, group(), layout(), GroupLayout(group(), NHD, 4), KVView((), ()),
    CacheConfig(), ModelConfig(), TierConfig(url="cpu://"), KVLayerError("x"), ValueError,
]  # fmt: skip

VALUES: dict[type, Callable[[], Any]] = {
    Salt: lambda: Salt("s", 3),
    Content: lambda: Content(b"x" * 32, 3),
    Scope: lambda: Scope(salts=(Salt("s"),), adapter=b"a", contents=(Content(b"x", 0),), owner="o"),
    Retention: lambda: Retention(1, 5.0),
    KVGroup: group,
    GroupLayout: lambda: GroupLayout(group(), NHD, 4),
    KVLayout: layout,
    ModelConfig: lambda: ModelConfig(weights="sha256:" + "0" * 64),
    TierConfig: lambda: TierConfig(url="cpu://?capacity=1GiB"),
    CacheConfig: CacheConfig,
    Namespace: lambda: Namespace(
        weights="sha256:" + "0" * 64, groups=(group(),), compute_dtype="bfloat16"
    ),
}  # fmt: skip

FIELDS = [(cls, field.name) for cls in VALUES for field in dataclasses.fields(cls) if field.init]


def refused_or(call: Callable[[], Any]) -> Any:
    """What a call returns, or the error of ours that it raises. Anything else is a fault."""
    try:
        return call()
    except KVLayerError as error:
        return error


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda each: getattr(each, "__name__", each))
def test_no_field_of_a_value_takes_what_it_cannot_mean(cls: type, name: str) -> None:
    good = VALUES[cls]()
    given_values = {f.name: getattr(good, f.name) for f in dataclasses.fields(cls) if f.init}
    for value in WRONG:
        found = refused_or(lambda value=value: cls(**given_values | {name: value}))
        if not isinstance(found, KVLayerError):
            _is_sound(found)


def _is_sound(found: Any) -> None:
    """What was taken can be shown, compared, and used to name something."""
    assert repr(found)
    assert found == found  # noqa: PLR0124
    match found:
        case Scope():
            hash(found)
            refused_or(lambda: (found.extras(), found.zones(), found.zone(5)))
        case KVGroup():
            assert isinstance(found.kind, AttentionKind) and isinstance(found.hit_rule, HitRule)
            assert found.planes() is not None and found.itemsize
            refused_or(lambda: dataclasses.replace(VALUES[Namespace](), groups=(found,)))
        case GroupLayout():
            assert (found.layer_range, found.head_range, found.is_pair) is not None
        case CacheConfig():
            assert CacheConfig.load(env={}, **_shallow(found)) == found
        case Namespace():
            assert Namespace.from_canonical(found.canonical()) == found
        case _:
            pass


def _shallow(found: CacheConfig) -> dict[str, Any]:
    return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}


def test_every_public_value_is_tried() -> None:
    public = {getattr(kvlayer, name) for name in kvlayer.__all__ if name != "__version__"}
    told = {c for c in public if dataclasses.is_dataclass(c) and c.__module__ != "kvlayer.results"}
    assert told - {KVView} == set(VALUES)  # a view is checked by the call that it is lent to


# ---- Calls ----


class Calls:
    """Every call of a cache with good arguments: what a test replaces one of."""

    good: ClassVar[dict[str, dict[str, Callable[[Calls], Any]]]] = {
        "store": {
            "tokens": lambda c: c.prompt, "kv": lambda c: c.view, "scope": lambda _: Scope(),
            "first_token": lambda _: 0, "tail": lambda _: True, "on_gathered": lambda _: None,
            "patience": lambda _: 1.0, "quality": lambda _: "exact",
        },
        "retrieve": {
            "hit": lambda c: c.hit, "kv": lambda c: c.view, "first_token": lambda _: 0,
            "deadline": lambda _: 1.0, "on_layer": lambda _: None,
        },
        "promote": {"hit": lambda c: c.hit, "deadline": lambda _: 1.0},
        "lookup": {
            "tokens": lambda c: c.prompt,
            "scope": lambda _: Scope(),
            "patience": lambda _: 0.0,
            "presume": lambda _: True,
        },
        "begin_lookup": {"tokens": lambda c: c.prompt, "scope": lambda _: Scope()},
        "prefetch": {
            "tokens": lambda c: c.prompt, "scope": lambda _: Scope(), "deadline": lambda _: 1.0,
        },
        "report_prefill": {"tokens": lambda _: 100, "seconds": lambda _: 0.1},
        "chain": {
            "tokens": lambda c: c.prompt, "scope": lambda _: Scope(), "namespace": lambda _: None,
        },
        "rebind": {"namespace": lambda c: c.cache.namespace, "update": lambda _: None},
        "named": {"tokens": lambda c: c.prompt, "scope": lambda _: Scope()},
        "control.pin": {
            "tokens": lambda c: c.prompt, "scope": lambda _: Scope(), "seconds": lambda _: 5.0,
            "owner": lambda _: "me",
        },
        "control.unpin": {"pin": lambda c: c.pin},
        "control.explain": {"tokens": lambda c: c.prompt, "scope": lambda _: Scope()},
        "control.evict": {
            "tokens": lambda c: c.prompt, "scope": lambda _: Scope(), "tier": lambda _: None,
        },
        "control.clear": {"tier": lambda _: "no-such-tier"},
    }  # fmt: skip

    def __init__(self, cache: Cache, view: KVView) -> None:
        self.cache, self.view, self.prompt = cache, view, tokens(64)
        self.hit: Any = None
        self.pin: Any = None

    def method(self, name: str) -> Callable[..., Any]:
        found: Any = self.cache
        for word in name.split("."):
            found = getattr(found, word)
        return found

    async def call(self, name: str, **replaced: Any) -> Any:
        """Call with one argument replaced, and await, enter or release whatever that returns."""
        values = {n: make(self) for n, make in self.good[name].items()} | replaced
        parameters = inspect.signature(self.method(name)).parameters
        plain = [v for n, v in values.items() if parameters[n].kind is not inspect._KEYWORD_ONLY]
        named = {n: v for n, v in values.items() if parameters[n].kind is inspect._KEYWORD_ONLY}
        try:
            found = self.method(name)(*plain, **named)
            if hasattr(found, "__aenter__"):
                async with found as hit:
                    return hit
            if name == "begin_lookup":
                found.release()
            elif inspect.isawaitable(found):
                found = await found
            if name == "control.pin":
                self.cache.control.unpin(found)
        except KVLayerError as error:
            return error
        return found


ARGUMENTS = [(call, name) for call, names in Calls.good.items() for name in names]


@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_no_call_takes_what_it_cannot_mean_or_leaves_anything_behind(call: str, name: str) -> None:
    async def main() -> None:
        engine = Engine(layout(), 64)
        async with Cache.open(config(), layout()) as cache:
            calls = Calls(cache, engine.view(engine.slots(64)))
            await cache.store(calls.prompt, calls.view)
            calls.pin = await cache.control.pin(calls.prompt, seconds=100)
            async with cache.lookup(calls.prompt) as calls.hit:
                for value in WRONG:
                    if name == "update" and callable(value):
                        continue  # what it raises, or returns, is its caller's own
                    before = _state(cache)
                    found = await calls.call(call, **{name: value})
                    if isinstance(found, KVLayerError):
                        assert _state(cache) == before, f"{call}({name}={value!r})"
                await asyncio.sleep(0)
                # Whatever was taken, the cache goes on as ever.
                assert (await cache.store(calls.prompt, calls.view)).failed == ()
                async with cache.lookup(calls.prompt) as hit:
                    assert hit.tokens == 64
                    assert (await cache.retrieve(hit, calls.view)).tokens == 64

    asyncio.run(main())


def _state(cache: Cache) -> Any:
    stats = cache.control.stats()
    held = [(tier.objects, tier.used_nbytes, tier.pinned_nbytes) for tier in stats.tiers]
    return held, stats.leases, stats.owners, stats.inflight, stats.prefill_tokens_per_second


def test_every_call_is_tried() -> None:
    public = {
        name
        for name, found in inspect.getmembers(Cache, inspect.isfunction)
        if not name.startswith("_") and len(inspect.signature(found).parameters) > 1
    }
    control = {
        f"control.{name}"
        for name, found in inspect.getmembers(kvlayer.api.control.Control, inspect.isfunction)
        if not name.startswith("_") and len(inspect.signature(found).parameters) > 1
    }
    internal = {"by_tier"}
    assert (public - internal) | control == set(Calls.good)
    for call, names in Calls.good.items():
        owner = kvlayer.api.control.Control if "." in call else Cache
        parameters = inspect.signature(getattr(owner, call.rpartition(".")[2])).parameters
        assert set(parameters) - {"self"} == set(names), call


OPENING = [
    "config", "layout", "namespace", "sinks", "backends", "codecs", "ranks", "make_stager",
]  # fmt: skip


@pytest.mark.parametrize("name", OPENING)
@pytest.mark.parametrize("door", [Cache, Portal])
def test_no_cache_is_opened_with_what_it_cannot_mean(door: Any, name: str) -> None:
    """``sinks`` may be any callables, and a stager is its maker's affair."""

    async def opens(**arguments: Any) -> None:
        async with Cache.open(**arguments):
            pass

    def portal(**arguments: Any) -> None:
        with Portal.open(**arguments):
            pass

    for value in WRONG:
        if name == "config" and isinstance(value, CacheConfig):
            continue  # a gigabyte
        if name in ("make_stager", "sinks") and callable(value):
            continue  # what it does when it is called is its maker's affair
        arguments: dict[str, Any] = {"config": config(), "layout": layout()} | {name: value}
        if door is Cache:
            refused_or(lambda arguments=arguments: asyncio.run(opens(**arguments)))
        else:
            refused_or(lambda arguments=arguments: portal(**arguments))


@pytest.mark.parametrize("method", ["lookup", "lookup_on_loop", "renew", "submit", "call"])
def test_no_call_of_a_portal_takes_what_it_cannot_mean(method: str) -> None:
    with Portal.open(config(), layout()) as portal:
        for value in WRONG:
            if method in ("submit", "call", "lookup_on_loop") and callable(value):
                continue  # what a caller's own work raises is the caller's
            found = refused_or(lambda value=value: getattr(portal, method)(value))
            if hasattr(found, "wait"):
                refused_or(lambda found=found: found.wait(HANG))


def test_no_wait_takes_what_it_cannot_mean() -> None:
    async def nothing(_: Cache) -> None: ...

    with Portal.open(config(), layout()) as portal:
        for value in WRONG:
            refused_or(lambda value=value: portal.submit(nothing).wait(value))
            with portal.lookup(tokens(64)) as lookup:
                refused_or(lambda value=value: lookup.wait(value))


# ---- The helpers themselves ----


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(-(2**70), 2**70), st.integers(-5, 5))
@example(-1, 0)
@example(0, 0)
def test_a_whole_number_is_taken_in_its_range_alone(value: int, least: int) -> None:
    found = refused_or(lambda: _values.whole("n", value, least=least))
    if least <= value < 2**63:
        assert found == value
    else:
        assert isinstance(found, ArgumentError)


@pytest.mark.parametrize("value", [np.int64(3), np.uint8(3), torch.tensor(3), 3])
def test_any_integer_is_a_plain_int(value: Any) -> None:
    assert type(_values.whole("n", value)) is int


@pytest.mark.parametrize("value", [True, 3.0, "3", None, np.bool_(True), Decimal(3)])
def test_what_is_no_integer_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError, match="n must be a whole number"):
        _values.whole("n", value)


@pytest.mark.parametrize(
    ("value", "least", "most", "good"),
    [(0, 0, INF, True), (-1e-9, 0, INF, False), (5, 0, 5, True), (5.1, 0, 5, False),
     (NAN, -INF, INF, False), (INF, 0, INF, False), (Fraction(1, 2), 0, 1, True),
     (np.float32(0.5), 0, 1, True), (True, 0, 1, False), ("1", 0, 1, False)],
)  # fmt: skip
def test_a_number_is_finite_and_in_its_range(
    value: Any, least: float, most: float, good: bool
) -> None:
    found = refused_or(lambda: _values.number("x", value, least=least, most=most))
    assert isinstance(found, float) is good


def test_infinity_is_taken_where_it_means_something() -> None:
    assert _values.number("x", INF, endless=True) == INF
    with pytest.raises(ArgumentError):
        _values.number("x", NAN, endless=True)


def test_an_error_says_what_was_expected_what_was_found_and_what_to_do() -> None:
    with pytest.raises(
        LayoutError, match="hit_rule must be one of every-chunk, trailing, chunked"
    ) as no:
        KVGroup(AttentionKind.MHA, (0,), "float16", 1, 8, hit_rule="trialing")  # type: ignore[arg-type]
    assert no.value.hint == "did you mean 'trailing'?"
    with pytest.raises(ArgumentError, match="scope must be a Scope, found a str") as refused:
        _values.instance("scope", "alice", Scope, hint="Scope.private")
    assert "alice" not in str(refused.value)


# ---- What is taken as it is meant ----


def test_text_is_taken_for_the_enum_it_names() -> None:
    made = KVGroup("mha", [0, 1], "float16", 1, 8, hit_rule="trailing", window_tokens=4)  # type: ignore[arg-type]
    assert made.kind is AttentionKind.MHA
    assert made.hit_rule is HitRule.TRAILING
    assert made.layers == (0, 1)


def test_numpy_s_integers_name_the_same_group() -> None:
    count: Any = np.int64(2)
    made = KVGroup(AttentionKind.MHA, (count,), "float16", count, count)
    assert made == KVGroup(AttentionKind.MHA, (2,), "float16", 2, 2)
    assert type(made.num_kv_heads) is type(made.layers[0]) is int


def test_a_state_group_needs_its_last_state_alone() -> None:
    made = KVGroup(AttentionKind.STATE, (0,), "float32", state_nbytes=64)
    assert (made.hit_rule, made.window_tokens) == (HitRule.BOUNDARY, 1)


@pytest.mark.parametrize("name", ["FP8", "int8 rows", "x" * 65, 2, None])
def test_a_quantisation_is_a_name_and_never_a_number(name: Any) -> None:
    with pytest.raises(LayoutError):
        KVGroup(AttentionKind.MHA, (0,), "int8", 1, 8, quantisation=name)
    assert KVGroup(AttentionKind.MHA, (0,), "int8", 1, 8, quantisation="nvfp4_4over6")


@pytest.mark.parametrize(
    ("axes", "kind"),
    [(NHD, "mla"), (NHD, "state"), (STATE_BLOCKS, "mha"), (STATE_BLOCKS, "mla"),
     (("block", "head", "token", "kvdim"), "mla")],
)  # fmt: skip
def test_axes_that_a_kind_cannot_have_are_refused_before_a_cache_opens(
    axes: tuple[str, ...], kind: str
) -> None:
    made = KVGroup(kind, (0,), "float16", 1, 8, state_nbytes=64)  # type: ignore[arg-type]
    with pytest.raises(LayoutError):
        GroupLayout(made, axes)
    latent = dataclasses.replace(made, kind=AttentionKind.MLA, hit_rule=HitRule.EVERY_CHUNK)
    assert GroupLayout(latent, MLA_BLOCKS)


def test_a_single_salt_is_a_tuple_of_one_and_no_owner_is_nobody() -> None:
    found = Scope(salts=Salt("a"), owner=None)  # type: ignore[arg-type]
    assert found == Scope(salts=(Salt("a"),))
    assert Scope(salts=[Salt("a")]) == found  # type: ignore[arg-type]


def test_a_pin_of_another_cache_or_a_forged_one_is_refused_and_releases_nothing() -> None:
    async def main() -> None:
        engine = Engine(layout(), 64)
        prompt, view = tokens(64), engine.view(engine.slots(64))
        async with Cache.open(config(), layout()) as one, Cache.open(config(), layout()) as two:
            await one.store(prompt, view)
            theirs = await two.control.pin(prompt, seconds=30)
            mine = await one.control.pin(prompt, seconds=30)
            async with one.lookup(prompt):
                for number in range(20):
                    for pin in (theirs, mine):
                        forged = dataclasses.replace(pin, number=number)
                        if forged != mine:
                            with pytest.raises(ArgumentError, match="not made by this cache"):
                                one.control.unpin(forged)
                assert one.control.stats().leases == 2
            assert one.control.unpin(mine) is True
            assert one.control.unpin(mine) is False

    asyncio.run(main())


@pytest.mark.parametrize("deadline", [-1, -INF, 0, INF, 1e308, Fraction(1, 2)])
def test_a_deadline_may_have_passed_or_never_come(deadline: Any) -> None:
    async def main() -> None:
        engine = Engine(layout(), 64)
        prompt, view = tokens(64), engine.view(engine.slots(64))
        async with Cache.open(config(), layout()) as cache:
            await cache.store(prompt, view)
            async with cache.lookup(prompt) as hit:
                report = await cache.retrieve(hit, view, deadline=deadline)
                assert report.tokens == 64  # all in host memory: there is nothing to wait for

    asyncio.run(main())


async def _coroutine(*_: object) -> None: ...


def _generator(*_: object):  # type: ignore[no-untyped-def]
    yield


async def _generated(*_: object):  # type: ignore[no-untyped-def]
    yield


class _Called:
    async def __call__(self, *_: object) -> None: ...


@pytest.mark.parametrize("lazy", [_coroutine, _generator, _generated, _Called()])
def test_a_callback_whose_call_would_do_nothing_is_refused(lazy: Any) -> None:
    async def use() -> None:
        engine = Engine(layout(), 32)
        view = engine.view(engine.slots(32))
        with pytest.raises(ArgumentError, match="of sinks must be a plain function"):
            async with Cache.open(config(), layout(), sinks=[lazy]):
                pass
        with pytest.raises(ArgumentError, match="of sinks must be a plain function"):
            async with Cache.open(config(), layout(), sinks=lazy):
                pass
        async with Cache.open(config(), layout()) as cache:
            with pytest.raises(ArgumentError, match="on_gathered must be a plain function"):
                await cache.store(tokens(32), view, on_gathered=lazy)
            await cache.store(tokens(32), view)
            async with cache.lookup(tokens(32)) as hit:
                with pytest.raises(ArgumentError, match="on_layer must be a plain function"):
                    await cache.retrieve(hit, view, on_layer=lazy)

    asyncio.run(use())


def test_a_lookup_of_another_cache_is_not_renewed() -> None:
    with Portal.open(config(), layout()) as one, Portal.open(config(), layout()) as other:
        lookup = one.lookup(tokens(32))
        with pytest.raises(ArgumentError, match="another cache's") as caught:
            other.renew(lookup)
        assert caught.value.hint


def test_a_cache_on_another_loop_is_refused_and_not_waited_for() -> None:
    async def use(cache: Cache) -> None:
        engine = Engine(layout(), 32)
        view = engine.view(engine.slots(32))
        calls: list[Callable[[], Any]] = [
            lambda: cache.store(tokens(32), view),
            cache.flush,
            cache.recovered,
            lambda: cache.lookup(tokens(32)).__aenter__(),
            lambda: cache.control.explain(tokens(32)),
            lambda: cache.control.pin(tokens(32), seconds=1.0),
            lambda: cache.control.evict(tokens(32)),
            cache.control.clear,
        ]
        for call in calls:
            with pytest.raises(UnsupportedError, match="another event loop"):
                await call()
        for start in (cache.prefetch, cache.begin_lookup):
            with pytest.raises(UnsupportedError, match="another event loop"):
                start(tokens(32))
        assert cache.control.health().ok and cache.control.stats().lookups == 0

    async def main() -> None:
        async with Cache.open(config(), layout()) as cache:
            await asyncio.to_thread(asyncio.run, use(cache))
            with pytest.raises(UnsupportedError, match="this thread runs none"):
                await asyncio.to_thread(cache.begin_lookup, tokens(32))

    asyncio.run(main())


def test_an_owner_that_no_log_or_metric_can_write_is_refused() -> None:
    with pytest.raises(ArgumentError, match="owner must be valid Unicode text"):
        Scope(owner="\ud800")

    async def use() -> None:
        async with Cache.open(config(), layout()) as cache:
            with pytest.raises(ArgumentError, match="owner must be valid Unicode text"):
                await cache.control.pin(tokens(32), seconds=1.0, owner="\udcff")

    asyncio.run(use())

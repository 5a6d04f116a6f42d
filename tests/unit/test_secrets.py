"""What may be a secret is in no message, no ``repr``, no output: a canary is put everywhere."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import pytest
from caches import config, layout, tokens
from click.testing import CliRunner
from engine import Engine
from hypothesis import example, given
from hypothesis import strategies as st

from kvlayer import Cache, CacheConfig, KVLayerError, Salt, Scope, TierConfig
from kvlayer.cli.main import program
from kvlayer.config.registry import BACKENDS, open_backend
from kvlayer.config.source import load_config
from kvlayer.telemetry.log import LogSink
from kvlayer.urls import BackendURL, shown_text, shown_url
from kvlayer_backends.cpu import CpuBackend

CANARY = "hunter2"


def said(error: BaseException) -> str:
    """All that an error says, and what a log shows of it."""
    return "".join(traceback.format_exception(error)) + repr(error)


def everything_said(call: Callable[[], object]) -> str:
    """What a call says: its error, or the ``repr`` of what it returns."""
    try:
        value = call()
    except KVLayerError as error:
        return said(error)
    return f"{value!r} {value}"


NAMES = st.sampled_from(
    [
        "capacity",
        "policy",
        "threads",
        "direct",
        "fsync",
        "readonly",
        "interval",
        "pin",
        "user",
        "auth",
        "sas",
        "AccountKey",
        "X-Amz-Security-Token",
        "jwt",
        "bucket",
        "my.option",
        "key",
    ]
)
URLS = st.builds(
    "{}://{}?{}".format,
    st.sampled_from(["cpu", "file", "s3", "unheard-of"]),
    st.sampled_from(["", "/kv", "host/kv", "~/kv", "./kv"]),
    st.lists(
        st.builds(
            "{}={}".format,
            NAMES,
            st.sampled_from([CANARY, f"{CANARY}%00", f"a%20{CANARY}", f"{CANARY}?x=1", "1GiB"]),
        ),
        min_size=1,
        max_size=3,
    ).map("&".join),
)


@given(URLS)
@example(f"file:///kv?policy={CANARY}")
@example(f"cpu://?capacity=1MiB&policy={CANARY}")
@example(f"file:///kv?direct={CANARY}")
def test_no_error_and_no_repr_shows_the_value_of_an_option(url: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: BackendURL.parse(url),
        lambda: open_backend(url),
        lambda: TierConfig(url=url),
        lambda: TierConfig(url=[url]),  # type: ignore[arg-type]
        lambda: TierConfig(url="cpu://", write=url),  # type: ignore[arg-type]
        lambda: CacheConfig(tiers=(TierConfig(url=url), TierConfig(url=url))),
        lambda: CacheConfig(tiers=(url,)),  # type: ignore[arg-type]
        lambda: CacheConfig(tiers=url),  # type: ignore[arg-type]
        lambda: CacheConfig(model={"weights": url}),  # type: ignore[arg-type]
        lambda: CacheConfig.load(env={"KVLAYER_TIERS__0__URL": url}),
        lambda: CacheConfig.load(env={"KVLAYER_TIERS": url}),
        lambda: CacheConfig.load(env={"KVLAYER_TIERS__0": url}),
        lambda: CacheConfig.load(env={"KVLAYER_TIERS__0__URLS": url}),
        lambda: CacheConfig.load(env={"KVLAYER_TOKENS_PER_CHUNK": url}),
        lambda: CacheConfig.load(env={}, tiers=[url]),
        lambda: CacheConfig.load(env={}, tiers=[{"url": url, "password": CANARY}]),
        lambda: CacheConfig.load(env={}, tiers=[{"url": {"is": url}}]),
        lambda: load_config(env={"KVLAYER_TIERS__0__URL": url}),
        lambda: load_config(env={"KVLAYER_TIERS__0__URL": url}).values(),
    ]
    for call in calls:
        assert CANARY not in everything_said(call)


def test_a_url_shows_where_it_leads_and_which_options_it_has() -> None:
    assert shown_url(f"file:///kv?capacity={CANARY}&fsync") == "file:///kv?capacity=***&fsync=***"
    assert shown_url(f"s3://me:{CANARY}@host/b") == "s3://***@host/b"
    assert shown_url("cpu://") == "cpu://"
    assert shown_url("file:///kv?") == "file:///kv?"
    assert shown_url(f"file:///kv?#{CANARY}") == "file:///kv?"
    assert repr(TierConfig(url="cpu://?capacity=1GiB")).startswith(
        "TierConfig(url='cpu://?capacity=***', write='back', "
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("lru", "'lru'"),
        ("https://me:pw@host/model?token=t", "'https://***@host/model?token=***'"),
        (" s3://b?token=t", "text of 15 characters"),
        ("kv?token=t", "text of 10 characters"),
        ("x" * 1001, "text of 1001 characters"),
    ],
)
def test_text_that_may_be_a_url_is_shown_as_one(text: str, shown: str) -> None:
    assert shown_text(text) == shown


class Gossip(CpuBackend):
    """Says what it was given, as the code of others may."""

    scheme: ClassVar[str] = "gossip"
    raises: ClassVar[type[Exception]] = KVLayerError

    @classmethod
    def from_url(cls, url: BackendURL, /) -> Self:
        raise cls.raises(f"cannot use {dict(url.options)} of {url.text}")


@pytest.mark.parametrize("raises", [KVLayerError, ValueError, KeyError, RuntimeError])
def test_what_a_plugin_says_of_its_url_is_masked(
    raises: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gossip, "raises", raises)
    registry = BACKENDS.extended({"gossip": Gossip})
    with pytest.raises(KVLayerError, match="capacity") as caught:
        open_backend(f"gossip://?capacity=1GiB&auth={CANARY}", backends=registry)
    assert CANARY not in said(caught.value)


def test_opening_a_cache_says_nothing_of_options() -> None:
    host = f"cpu://?capacity={CANARY}", f"cpu://?capacity=1MiB&policy={CANARY}"
    for url in (*host, f"file:///kv?policy={CANARY}"):
        error = unopened(CacheConfig(tiers=(TierConfig(url=url),)))
        assert CANARY not in said(error)


def unopened(wrong: CacheConfig) -> KVLayerError:
    """Why no cache can be opened."""

    async def opens() -> None:
        async with Cache.open(wrong, layout()):
            pass

    with pytest.raises(KVLayerError) as caught:
        asyncio.run(opens())
    return caught.value


def test_weights_that_are_a_url_are_not_repeated() -> None:
    error = unopened(config(weights=f"https://me:{CANARY}@host/model?token={CANARY}"))
    assert "no model at" in str(error)
    assert CANARY not in said(error)


@pytest.mark.parametrize(
    "command", [["info"], ["info", "--json"], ["doctor"], ["doctor", "--json"]]
)
@pytest.mark.parametrize(
    "url",
    [
        f"file:///x?accessToken={CANARY}",
        f"file:///x?capacity=1GiB&sig={CANARY}",
        f"file:///x?policy={CANARY}",
        f"cpu://?capacity=1MiB&pin={CANARY}",
        f"file:///x?direct={CANARY}",
    ],
)
def test_no_command_prints_the_value_of_an_option(
    command: list[str], url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVLAYER_TIERS__0__URL", "cpu://?capacity=1MiB")
    monkeypatch.setenv("KVLAYER_TIERS__1__URL", url)
    done = CliRunner().invoke(program, command)
    assert done.output
    assert CANARY not in done.output
    for report in tmp_path.iterdir():
        assert CANARY not in report.read_text()


def test_the_command_check_prints_no_value_of_an_option(tmp_path: Any) -> None:
    report = tmp_path / "report.json"
    url = f"cpu://?capacity=64MiB&policy={CANARY}"
    assert CANARY not in CliRunner().invoke(program, ["check", url]).output
    kept = ["check", "cpu://?capacity=67108864", "--only", "delete", "--json", str(report)]
    done = CliRunner().invoke(program, kept)
    assert "67108864" not in done.output + report.read_text()
    assert json.loads(report.read_text())["url"] == "cpu://?capacity=***"


@dataclass(frozen=True)
class Optioned:
    """Options of a stranger's backend, which refuses them as a whole."""

    region: str = ""

    def __post_init__(self) -> None:
        raise ValueError(f"no region is called {self.region}")


def test_options_that_are_refused_as_a_whole_are_masked() -> None:
    class Regional(CpuBackend):
        @classmethod
        def from_url(cls, url: BackendURL, /) -> Self:
            url.into(Optioned)
            raise AssertionError

    registry = BACKENDS.extended({"regional": Regional})
    with pytest.raises(KVLayerError) as caught:
        open_backend(f"regional://?region={CANARY}", backends=registry)
    assert CANARY not in said(caught.value)


def test_no_repr_shows_a_salt() -> None:
    async def main() -> list[object]:
        engine = Engine(layout(), 32)
        scope = Scope.private(CANARY, first_token=20, owner="alice")
        prompt, view = tokens(64), engine.view(engine.slots(64))
        seen: list[object] = [scope, scope.salts[0], scope.zones()]
        log = logging.getLogger("kvlayer.test")
        async with Cache.open(config(), layout(), sinks=[seen.append, LogSink(log)]) as cache:
            await cache.store(prompt, view, scope=scope)
            seen += [cache.chain(prompt, scope), await cache.control.explain(prompt, scope=scope)]
            async with cache.lookup(prompt, scope=scope) as hit:
                seen += [hit, hit.match, hit.lease, await cache.retrieve(hit, view)]
            pin = await cache.control.pin(prompt, scope=scope, seconds=5)
            seen += [pin, cache.begin_lookup(prompt, scope=scope), cache.control.stats(), cache]
            seen += asyncio.all_tasks()
        return seen

    with catching_logs(logging.getLogger("kvlayer.test")) as lines:
        for value in asyncio.run(main()):
            assert CANARY not in f"{value!r} {value}"
    assert lines
    assert CANARY not in "".join(lines)


@contextmanager
def catching_logs(logger: logging.Logger) -> Generator[list[str]]:
    """What is logged, with the fields that ride along."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.getMessage()} {record.__dict__}")  # type: ignore[method-assign]
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Salt(CANARY.encode()),  # type: ignore[arg-type]
        lambda: Salt(CANARY, -1),
        lambda: Salt(CANARY + "\ud800"),
        lambda: Scope(salts=CANARY),  # type: ignore[arg-type]
        lambda: Scope(salts=(CANARY,)),  # type: ignore[arg-type]
        lambda: Scope(adapter=CANARY),  # type: ignore[arg-type]
        lambda: Scope(contents=(CANARY,)),  # type: ignore[arg-type]
        lambda: Scope.private(CANARY, first_token=-1),
        lambda: Scope.private([CANARY]),  # type: ignore[arg-type]
    ],
)
def test_no_error_about_a_salt_shows_it(make: Callable[[], object]) -> None:
    with pytest.raises(KVLayerError) as caught:
        make()
    # Formatted without its frames' source lines, which are this test's own.
    assert CANARY not in f"{caught.value!r} {caught.value} {caught.value.hint}"

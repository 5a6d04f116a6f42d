"""Backend URLs: what is wrong is named, what is secret is refused and never repeated."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlayer.config.local_directory import local_directory
from kvlayer.errors import ConfigError
from kvlayer.urls import (
    BackendURL,
    format_bytes,
    nearest,
    parse_bool,
    parse_bytes,
)


def refusal(make: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.hint
    return caught.value


# ---- Parsing ----


def test_a_url_is_taken_apart() -> None:
    url = BackendURL.parse("redis://cache.local:6379/kv%20one/two?capacity=1TiB&direct=")
    assert (url.scheme, url.host, url.port) == ("redis", "cache.local", 6379)
    assert url.path == "/kv one/two"
    assert url.options == {"capacity": "1TiB", "direct": ""}
    assert str(url) == "redis://cache.local:6379/kv%20one/two?capacity=***&direct=***"
    assert repr(url) == f"BackendURL('{url}')"


@pytest.mark.parametrize(
    ("text", "host", "path"),
    [
        ("cpu://?capacity=8GiB", "", ""),
        ("cpu://", "", ""),
        ("peer://", "", ""),
        ("file:///mnt/nvme/kv", "", "/mnt/nvme/kv"),
        ("file:///mnt/a%23b", "", "/mnt/a#b"),
        ("s3://bucket/some/prefix", "bucket", "/some/prefix"),
        ("tcp://[::1]:9000/x", "::1", "/x"),
        ("FILE:///mnt/kv", "", "/mnt/kv"),
    ],
)
def test_each_part_of_a_url_may_be_missing(text: str, host: str, path: str) -> None:
    url = BackendURL.parse(text)
    assert (url.host, url.path) == (host, path)
    assert url.scheme == text.partition(":")[0].lower()


def test_urls_can_be_compared_and_kept_in_sets() -> None:
    text = "cpu://?capacity=1GiB"
    assert {BackendURL.parse(text), BackendURL.parse(text)} == {BackendURL.parse(text)}


@pytest.mark.parametrize(
    "text",
    [
        "", "/mnt/nvme/kv", "file:/mnt/kv", "://x", "1x://y", "s3://host:port/x", "s3://[::1/x",
        "s3://host:99999/x", "file:///a\nb", "file:///a%00b", "file:///a%0ab", "file:///a%ffb",
        "cpu://?capacity", "cpu://?a=%ff", "cpu://?=&", "file:///kv#1?capacity=1GiB",
        "cpu://?a=1&a=2", "file:///mnt/\udcff", "cpu://?policy=\ud800",
    ],
)  # fmt: skip
def test_what_is_no_usable_url_is_refused_with_a_hint(text: str) -> None:
    refusal(lambda: BackendURL.parse(text))


def test_a_forgotten_scheme_is_shown() -> None:
    assert "'/mnt/nvme/kv'" in str(refusal(lambda: BackendURL.parse("/mnt/nvme/kv")))


SECRET = "hunter2"  # noqa: S105  the secret no message may hold


@pytest.mark.parametrize(
    "text",
    [
        f"redis://user:{SECRET}@host/0",
        f"redis://:{SECRET}@host/0",
        f"redis://{SECRET}@host/0",
        f"redis://user:{SECRET}@host:port/0",
        f"redis://user:{SECRET}/host",
        f"redis://host:{SECRET}/0",
        f"user:{SECRET}@host",
        f"redis:user:{SECRET}@host",
        f"redis://user:{SECRET}@\u2100host/",
        f"redis://[{SECRET}/0",
        f"s3://bucket?password={SECRET}",
        f"s3://bucket?secret_key={SECRET}",
        f"s3://bucket?access-key-id={SECRET}",
        f"s3://bucket?AWS_SECRET_ACCESS_KEY={SECRET}",
        f"s3://bucket?session_token={SECRET}",
        f"s3://bucket?a=1&a=1&token={SECRET}",
        f"s3://bucket?{SECRET}",
        f"s3://bucket?a=1&{SECRET}&b=2",
        f"s3://bucket#{SECRET}",
        f"s3:{SECRET}@host://bucket",
        f"file:///user:{SECRET}@host/kv",
        f"file:///kv&capacity={SECRET}",
        f"file:///kv;capacity={SECRET}",
        f"s3://bucket?accessToken={SECRET}",
        f"s3://bucket?X-Amz-Signature={SECRET}",
        f"s3://bucket?my.secret={SECRET}",
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_repeated(text: str) -> None:
    error = refusal(lambda: BackendURL.parse(text))
    assert SECRET not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    "name",
    ["tokens_per_block", "keyspace", "tokenizer", "monkey", "key_prefix", "design", "sigma"],
)
def test_an_option_that_only_sounds_secret_is_accepted(name: str) -> None:
    assert BackendURL.parse(f"s3://bucket?{name}=1").options == {name: "1"}


@settings(deadline=None)  # a busy machine is no failure
@given(st.text(max_size=30) | st.text("a:/?#@&=%[]0.", max_size=30).map("s3://".__add__))
def test_any_text_is_a_url_or_a_config_error(text: str) -> None:
    try:
        url = BackendURL.parse(text)
    except ConfigError:
        return
    assert url.text == text
    assert url.scheme


# ---- Local directories ----


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("file:///mnt/nvme/kv/", "/mnt/nvme/kv"),
        ("file://localhost/mnt/kv", "/mnt/kv"),
        ("file://~/kv", "/home/someone/kv"),
        ("file:///mnt/%7Eodd/%24cash", "/mnt/~odd/$cash"),
        ("file:///mnt/~/kv", "/mnt/~/kv"),
    ],
)
def test_a_local_directory_is_absolute(
    text: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert local_directory(BackendURL.parse(text)) == path


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("file:///~/kv", "file://~/kv"),
        ("file:///~someone/kv", "%7E"),
        ("file:///$HOME/kv", "%24"),
        ("file:///mnt/${NODE}/kv", "%24"),
        ("file://nas/kv", "file:///nas/kv"),
        ("file://localhost:80/kv", "three slashes"),
        ("file://~someone/kv", "three slashes"),
        ("file://", "three slashes"),
        ("file:///", "three slashes"),
    ],
)
def test_what_names_no_local_directory_is_refused_with_a_hint(text: str, hint: str) -> None:
    error = refusal(lambda: local_directory(BackendURL.parse(text)))
    assert hint in str(error.hint)


def test_the_hint_for_a_relative_directory_is_where_it_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refusal(lambda: local_directory(BackendURL.parse("file://./kv")))
    assert f"file://{tmp_path}/kv" in str(error.hint)


@pytest.mark.parametrize("home", ["", "relative"])
def test_a_user_without_a_home_is_told(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    if not home:
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    error = refusal(lambda: local_directory(BackendURL.parse("file://~/kv")))
    assert "absolute path" in str(error.hint)


# ---- Options ----


class Mode(StrEnum):
    FAST = "fast"
    SAFE = "safe"


@dataclass(frozen=True)
class Options:
    capacity: int = field(default=0, metadata={"parse": parse_bytes})
    limit: int | None = field(default=None, metadata={"parse": parse_bytes})
    threads: int = 4
    depth: int | None = None
    ratio: float = 0.5
    direct: bool = True
    mode: Mode = Mode.SAFE
    folder: Path = Path()
    name: str = ""
    opened: int = field(default=7, init=False)


@dataclass(frozen=True)
class Needy:
    bucket: str
    extra: tuple[str, ...] = field(default_factory=tuple)


def options(query: str) -> Options:
    return BackendURL.parse(f"demo://{query}").into(Options)


def test_options_are_read_as_the_fields_say() -> None:
    read = options(
        "?capacity=8GiB&limit=1KB&threads=2&depth=3&ratio=0.25&direct=no&mode=fast&folder=a/b&name=x"
    )
    assert read == Options(8 * 2**30, 1000, 2, 3, 0.25, False, Mode.FAST, Path("a/b"), "x")
    assert options("") == Options()


@pytest.mark.parametrize(
    ("query", "hint"),
    [
        ("?capasity=1GiB", "did you mean 'capacity'?"),
        ("?dirct=1", "did you mean 'direct'?"),
        ("?THREADS=1", "known: capacity, limit, threads"),
        ("?opened=1", "known: "),
        ("?zzzzzzzz=1", "known: capacity, limit, threads"),
    ],
)
def test_an_unknown_option_names_the_nearest(query: str, hint: str) -> None:
    error = refusal(lambda: options(query))
    assert error.hint is not None
    assert hint in error.hint
    assert query[1:].partition("=")[0] in str(error)


@pytest.mark.parametrize(
    ("query", "hint"),
    [
        ("?threads=many", "expected int"),
        ("?depth=1.5", "expected int"),
        ("?ratio=half", "expected float"),
        ("?ratio=nan", "leave the option out"),
        ("?ratio=-inf", "leave the option out"),
        ("?direct=maybe", "true or false"),
        ("?mode=reckless", "expected Mode"),
        ("?capacity=lots", "8GiB"),
        ("?limit=-1", "8GiB"),
    ],
)
def test_a_value_that_cannot_be_read_names_option_url_and_what_was_expected(
    query: str, hint: str
) -> None:
    error = refusal(lambda: options(query))
    name, value = query[1:].split("=")
    assert f"'{name}'" in str(error)
    assert f"demo://?{name}=***" in str(error)
    assert value not in f"{error} {error.hint}"
    assert error.hint is not None
    assert hint in error.hint


def test_a_missing_option_without_a_default_is_named() -> None:
    error = refusal(lambda: BackendURL.parse("demo://").into(Needy))
    assert "'bucket'" in str(error)
    assert BackendURL.parse("demo://?bucket=b").into(Needy) == Needy("b")


# ---- Values ----


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0), ("7", 7), ("7B", 7), (" 8 GiB ", 8 * 2**30), ("8G", 8 * 2**30),
        ("8GB", 8 * 10**9), ("512MiB", 2**29), ("1TiB", 2**40), ("1PB", 10**15),
        ("1.5KiB", 1536), ("0.1GB", 10**8), ("1.3GB", 1_300_000_000),
        ("9007199254740993", 2**53 + 1), (4096, 4096),
    ],
)  # fmt: skip
def test_sizes_are_exact(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (2**29, "512 MiB"),
        (8 * 2**30, "8 GiB"), (2**40, "1 TiB"), (2**30 + 2**20, "1.001 GiB"),
        (2**20 - 1, "1024 KiB"),
    ],
)  # fmt: skip
def test_a_size_is_shown_as_a_person_would_write_it(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text
    assert parse_bytes(text) == pytest.approx(nbytes, rel=1e-3)  # and can be written back


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "-1",
        "8 gigs",
        "1e9",
        "8gib",
        "1.GiB",
        "٣GiB",
        "8GiB!",
        "0x10",
        "0.5B",
        "0.0001KiB",
        -1,
        True,
        1.5,
        None,
    ],
)
def test_what_is_no_size_is_refused(text: Any) -> None:
    refusal(lambda: parse_bytes(text))


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(0, 10**18 - 1), st.sampled_from(["B", "K", "KiB", "MB", "GiB", "T"]))
def test_a_whole_number_of_a_unit_is_that_many(count: int, unit: str) -> None:
    assert parse_bytes(f"{count}{unit}") == count * parse_bytes(f"1{unit}")


@pytest.mark.parametrize("text", ["1", "true", "YES", "On"])
def test_yes_is_yes(text: str) -> None:
    assert parse_bool(text) is True


@pytest.mark.parametrize("text", ["0", "False", "no", "OFF"])
def test_no_is_no(text: str) -> None:
    assert parse_bool(text) is False


def test_neither_yes_nor_no_is_refused() -> None:
    refusal(lambda: parse_bool("maybe"))


def test_nothing_is_near_to_a_word_like_no_other() -> None:
    assert nearest("capasity", ["threads", "capacity"]) == "capacity"
    assert nearest("zzz", ["threads", "capacity"]) is None
    assert nearest("x", []) is None

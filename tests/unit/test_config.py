"""Configuration: precedence, origins, and an answer that teaches for everything that is wrong."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvlayer.config.model
from kvlayer.config.model import CacheConfig, ModelConfig, TierConfig
from kvlayer.config.source import load_config
from kvlayer.errors import ConfigError, KVLayerError

DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.fixture
def toml(tmp_path):
    """Write a configuration file and return its path."""

    def write(text):
        path = tmp_path / "kv.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refused(*args, **kwargs) -> ConfigError:
    kwargs.setdefault("env", {})
    with pytest.raises(ConfigError) as caught:
        load_config(*args, **kwargs)
    return caught.value


# What it is when nobody says anything.


def test_defaults_are_one_host_tier_and_256_token_chunks():
    config = CacheConfig.load(env={})
    assert config == CacheConfig()
    assert [tier.url for tier in config.tiers] == ["cpu://?capacity=1GiB"]
    assert (config.tokens_per_chunk, config.tail_tokens) == (256, 32)
    assert set(load_config(env={}).origins.values()) == {"default"}


def test_a_config_cannot_be_changed_once_built():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CacheConfig().tokens_per_chunk = 1


def test_overrides_are_copied_from_the_caller():
    mine = {"rope_theta": 1e6}
    model = ModelConfig(overrides=mine)
    mine["rope_theta"] = 1.0
    assert model.overrides == {"rope_theta": 1e6}


# Who wins.


def test_code_beats_environment_beats_file_beats_default(toml):
    file = toml("tokens_per_chunk = 64\nhead_shards = 2\nlease_seconds = 5.0\n")
    env = {"KVLAYER_TOKENS_PER_CHUNK": "128", "KVLAYER_HEAD_SHARDS": "4"}
    loaded = load_config(file, env=env, tokens_per_chunk=512)
    config = loaded.config
    assert (config.tokens_per_chunk, config.head_shards, config.lease_seconds) == (512, 4, 5.0)
    assert config.policy == "prefix-lru"
    assert {key: loaded.origins[key] for key in ("tokens_per_chunk", "head_shards")} == {
        "tokens_per_chunk": "code",
        "head_shards": "environment KVLAYER_HEAD_SHARDS",
    }
    assert loaded.origins["lease_seconds"] == f"file {file}"
    assert loaded.origins["policy"] == "default"


def test_every_value_has_an_origin_and_every_origin_a_value(toml):
    file = toml(
        '[[tiers]]\nurl = "cpu://"\n[[tiers]]\nurl = "file:///kv"\n[model.overrides]\na = 1\n'
    )
    loaded = load_config(file, env={"KVLAYER_TIERS__1__WRITE": "through"})
    assert loaded.values().keys() == loaded.origins.keys()
    assert loaded.origins["tiers.1.url"] == f"file {file}"
    assert loaded.origins["tiers.1.write"] == "environment KVLAYER_TIERS__1__WRITE"
    assert loaded.origins["tiers.1.tails"] == "default"
    assert loaded.origins["model.overrides.a"] == f"file {file}"


def test_tiers_in_a_file_replace_the_default_stack(toml):
    file = toml('[[tiers]]\nurl = "cpu://?capacity=2GiB"\n[[tiers]]\nurl = "file:///kv"\n')
    config = CacheConfig.load(file, env={})
    assert [tier.url for tier in config.tiers] == ["cpu://?capacity=2GiB", "file:///kv"]


def test_the_environment_changes_one_tier_and_appends_another():
    env = {
        "KVLAYER_TIERS__0__URL": "cpu://?capacity=2GiB",
        "KVLAYER_TIERS__1__URL": "file:///kv",
        "KVLAYER_TIERS__1__TAILS": "no",
        "KVLAYER_TIERS__1__MAX_INFLIGHT": "4",
        "KVLAYER_TIERS__1__DEADLINE_SECONDS": "0.5",
    }
    second = TierConfig(url="file:///kv", tails=False, max_inflight=4, deadline_seconds=0.5)
    assert CacheConfig.load(env=env).tiers == (TierConfig(url="cpu://?capacity=2GiB"), second)


def test_tiers_in_code_replace_those_of_file_and_environment(toml):
    file = toml('[[tiers]]\nurl = "cpu://"\n[[tiers]]\nurl = "file:///kv"\n')
    mine = (TierConfig(url="cpu://?capacity=3GiB"),)
    config = CacheConfig.load(file, env={"KVLAYER_TIERS__1__WRITE": "never"}, tiers=mine)
    assert config.tiers == mine


def test_a_table_in_code_may_be_a_mapping_and_then_merges(toml):
    file = toml('[model]\nweights = "/models/a"\nkv_scales = "v1"\n')
    config = CacheConfig.load(file, env={}, model={"weights": "/models/b"})
    assert config.model == ModelConfig(weights="/models/b", kv_scales="v1")


def test_kvlayer_config_names_the_file_unless_code_does(toml, tmp_path):
    file = toml("tokens_per_chunk = 64\n")
    env = {"KVLAYER_CONFIG": str(file)}
    assert CacheConfig.load(env=env).tokens_per_chunk == 64
    other = tmp_path / "other.toml"
    other.write_text("tokens_per_chunk = 32\n")
    assert CacheConfig.load(other, env=env).tokens_per_chunk == 32


def test_without_an_env_argument_the_process_environment_counts(monkeypatch):
    monkeypatch.setenv("KVLAYER_POLICY", "lru")
    assert CacheConfig.load().policy == "lru"


@pytest.mark.parametrize(
    ("text", "value"), [("2", 2), ("0.5", 0.5), ("true", True), ("yarn", "yarn"), ("", "")]
)
def test_an_override_from_the_environment_is_a_scalar_of_the_obvious_type(text, value):
    config = CacheConfig.load(env={"KVLAYER_MODEL__OVERRIDES__ROPE": text})
    found = config.model.overrides["rope"]
    assert (found, type(found)) == (value, type(value))


@given(
    chunk=st.integers(1, 4096),
    shards=st.integers(0, 64),
    seconds=st.floats(1e-3, 1e6),
    tails=st.booleans(),
)
def test_the_environment_carries_every_value_code_can(chunk, shards, seconds, tails):
    code = {
        "tokens_per_chunk": chunk,
        "tokens_per_tail": chunk,
        "head_shards": shards,
        "lease_seconds": seconds,
    }
    env = {f"KVLAYER_{name.upper()}": str(value) for name, value in code.items()}
    env["KVLAYER_TIERS__0__TAILS"] = str(tails)
    tiers = [{"url": "cpu://?capacity=1GiB", "tails": tails}]
    assert CacheConfig.load(env=env) == CacheConfig.load(env={}, tiers=tiers, **code)


SERVICES = [
    "kvlayer",
    "kvlayer-metrics",
    "kvlayer-tiers",
    "kvlayer-model",
    "kvlayer-2",
    "kvlayer--x",
]


@pytest.mark.parametrize("service", SERVICES)
def test_variables_kubernetes_sets_for_its_services_are_not_configuration(service):
    prefix = service.upper().replace("-", "_")
    injected = {
        f"{prefix}_SERVICE_HOST": "10.0.0.1",
        f"{prefix}_SERVICE_PORT": "80",
        f"{prefix}_SERVICE_PORT_HTTP_METRICS": "80",
        f"{prefix}_PORT": "tcp://10.0.0.1:80",
        f"{prefix}_PORT_80_TCP": "tcp://10.0.0.1:80",
        f"{prefix}_PORT_80_TCP_ADDR": "10.0.0.1",
        f"{prefix}_PORT_80_UDP_PROTO": "udp",
        f"{prefix}_PORT_80_SCTP_PORT": "80",
    }
    assert CacheConfig.load(env=injected) == CacheConfig()


def test_an_override_may_be_called_as_kubernetes_would():
    env = {"KVLAYER_MODEL__OVERRIDES__MY_PORT": "80"}
    assert CacheConfig.load(env=env).model.overrides == {"my_port": 80}


@pytest.mark.parametrize(
    "name",
    ["KVLAYER_METRICS_PORTS", "KVLAYER_SERVICE", "KVLAYER_PORT_80_ICMP", "KVLAYER_SERVICEHOST"],
)
def test_what_only_resembles_kubernetes_is_still_a_mistake(name):
    with pytest.raises(ConfigError, match="unknown key"):
        CacheConfig.load(env={name: "1"})


def test_a_tilde_in_the_path_of_the_file_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "kv.toml").write_text("tokens_per_chunk = 128")
    assert CacheConfig.load("~/kv.toml", env={}).tokens_per_chunk == 128
    assert CacheConfig.load(env={"KVLAYER_CONFIG": "~/kv.toml"}).tokens_per_chunk == 128
    with pytest.raises(ConfigError, match="~nobody-here"):
        CacheConfig.load("~nobody-here/kv.toml", env={})


# Names nobody knows.


def test_an_unknown_key_in_a_file_names_file_key_and_the_nearest(toml):
    file = toml("tokens_per_chnk = 64\n")
    error = refused(file)
    assert str(error) == (
        f"unknown key tokens_per_chnk (file {file}); did you mean 'tokens_per_chunk'?"
    )
    assert "lease_seconds" in error.hint


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("[modl]\nweights = ''\n", "modl", "model"),
        ("[model]\nweight = ''\n", "model.weight", "weights"),
        ("[[tiers]]\nurl = 'cpu://'\n[[tiers]]\nulr = 'file:///x'\n", "tiers.1.ulr", "url"),
    ],
)
def test_an_unknown_key_is_named_at_every_depth(toml, text, key, near):
    assert f"unknown key {key} (" in str(refused(toml(text)))
    assert f"did you mean {near!r}?" in str(refused(toml(text)))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("KVLAYER_TOKENS_PER_CHNK", "KVLAYER_TOKENS_PER_CHUNK"),
        ("KVLAYER_MODEL__WEIGHT", "KVLAYER_MODEL__WEIGHTS"),
        ("KVLAYER_MODEL", "KVLAYER_MODEL__WEIGHTS"),
        ("KVLAYER_MODEL_WEIGHTS", "KVLAYER_MODEL__WEIGHTS"),
        ("KVLAYER_MODEL__OVERRIDES", "KVLAYER_MODEL__OVERRIDES__<NAME>"),
        ("KVLAYER_TIERS__URL", "KVLAYER_TIERS__0__URL"),
        ("KVLAYER_TIERS__0", "KVLAYER_TIERS__0__URL"),
        ("KVLAYER_TIERS__0__ULR", "KVLAYER_TIERS__0__URL"),
        ("KVLAYER_POLICY__NAME", "KVLAYER_POLICY"),
        ("KVLAYER_CONFIG_FILE", None),
    ],
)
def test_an_unknown_variable_names_itself_and_the_nearest(name, near):
    message = str(refused(env={name: "x"}))
    assert message.startswith(f"unknown key {name} (environment)")
    assert near is None or f"did you mean {near!r}?" in message


def test_an_unknown_key_in_code_names_the_nearest():
    assert str(refused(token_per_chunk=1)) == (
        "unknown key token_per_chunk (code); did you mean 'tokens_per_chunk'?"
    )


# Values that cannot be.


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ({"tokens_per_chunk": "256"}, "tokens_per_chunk must be a whole number, found '256' (str)"),
        ({"tokens_per_chunk": True}, "tokens_per_chunk must be a whole number, found True (bool)"),
        ({"tokens_per_chunk": 0}, "tokens_per_chunk must be at least 1 (tokens), found 0"),
        ({"tokens_per_tail": -1}, "tokens_per_tail must be at least 0 (tokens), found -1"),
        ({"head_shards": 1.5}, "head_shards must be a whole number, found 1.5 (float)"),
        ({"lease_seconds": 0}, "lease_seconds must be more than 0 and finite (seconds), found 0"),
        ({"lease_seconds": float("inf")}, "lease_seconds must be more than 0 and finite"),
        ({"lease_seconds": float("nan")}, "lease_seconds must be more than 0 and finite"),
        ({"policy": ""}, "policy must be a name, found ''"),
        ({"tiers": ()}, "a cache needs at least one tier, found none"),
        ({"tiers": 3}, "tiers must be a list of TierConfig, found 3"),
        ({"tiers": "cpu://"}, "tiers must be a list of TierConfig, found 'cpu://'"),
        ({"model": "llama"}, "model must be a table, found 'llama'"),
        ({"model": {"numerics": "exact"}}, "numerics must be one of 'portable', 'engine'"),
        ({"model": {"overrides": {"a": [1]}}}, "overrides.a must be a string, a number"),
        ({"close_seconds": 0}, "close_seconds must be more than 0 and finite (seconds), found 0"),
        (
            {"tiers": [{"url": "cpu://", "write": "later"}]},
            "write must be one of 'through', 'back'",
        ),
        ({"tiers": [{"url": "cpu://", "tails": 1}]}, "tails must be true or false, found 1 (int)"),
        ({"tiers": [{"url": "cpu://", "max_inflight": 0}]}, "max_inflight must be at least 1"),
        ({"tiers": [{"url": "cpu://", "deadline_seconds": -1}]}, "deadline_seconds must be more"),
        ({"tiers": [{"url": "/mnt/kv"}]}, "url: not a backend URL: expected scheme://location"),
        ({"tiers": [{"write": "back"}]}, "tiers.0.url is not set, and has no default"),
    ],
)
def test_a_wrong_value_says_what_was_expected_and_found_and_who_said_it(code, said):
    message = str(refused(**code))
    assert said in message
    assert "code)" in message


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("KVLAYER_TOKENS_PER_CHUNK", "many", "a whole number"),
        ("KVLAYER_LEASE_SECONDS", "soon", "a number"),
        ("KVLAYER_TIERS__0__TAILS", "perhaps", "true or false"),
    ],
)
def test_a_variable_that_cannot_be_read_says_what_was_expected(name, text, wanted):
    message = str(refused(env={name: text}))
    assert message == f"{name} must be {wanted}, found {text!r} (environment)"


def test_a_wrong_value_in_a_file_names_the_file_and_the_whole_key(toml):
    file = toml("[[tiers]]\nurl = 'cpu://'\nmax_inflight = 0\n")
    assert f"(tiers.0.max_inflight: file {file})" in str(refused(file))


def test_a_tail_is_a_power_of_two_of_at_most_an_eighth_of_a_chunk_and_at_most_32():
    sizes = (256, 12, 4, 512, 4096, 100)
    assert [CacheConfig(tokens_per_chunk=n).tail_tokens for n in sizes] == [32, 1, 1, 32, 32, 4]


def test_a_quarrel_between_two_keys_names_the_origin_of_both():
    error = refused(env={"KVLAYER_TOKENS_PER_TAIL": "30"})
    assert "must divide tokens_per_chunk, found 30 and 256" in str(error)
    assert "tokens_per_tail: environment KVLAYER_TOKENS_PER_TAIL" in str(error)
    assert "tokens_per_chunk: default" in str(error)


def test_two_tiers_in_one_place_are_refused():
    tiers = [{"url": "cpu://"}, {"url": "file:///kv?capacity=1GiB"}, {"url": "file:///kv"}]
    assert "tiers 1 and 2 are the same place" in str(refused(tiers=tiers))


def test_two_tiers_of_process_memory_are_two_places():
    assert len(CacheConfig(tiers=(TierConfig(url="cpu://"), TierConfig(url="cpu://"))).tiers) == 2


def test_a_gap_in_the_numbering_of_tiers_is_an_error_naming_the_variable():
    error = refused(env={"KVLAYER_TIERS__3__URL": "file:///kv"})
    assert "tiers.1.url is not set" in str(error)
    assert "environment KVLAYER_TIERS__3__URL" in str(error)
    assert "without gaps" in error.hint


@pytest.mark.parametrize("text", ["a =", "\xff".encode("latin-1")])
def test_a_file_that_is_not_toml_is_named(tmp_path, text):
    path = tmp_path / "kv.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert str(path) in str(refused(path))


def test_a_missing_file_is_an_error_that_says_who_named_it(tmp_path):
    missing = tmp_path / "nope.toml"
    assert f"cannot read the configuration file {missing}" in str(refused(missing))
    error = refused(env={"KVLAYER_CONFIG": str(missing)})
    assert "named by KVLAYER_CONFIG" in str(error)


# Secrets.


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:hunter2@bucket/prefix",
        "s3://hunter2@bucket",
        "s3://key:hun/hunter2@bucket",
        "key:hunter2@bucket",
        "s3://bucket?secret_access_key=hunter2",
        "redis://host?password=hunter2",
        "s3://bucket?api-key=hunter2",
        "s3://bucket?token=hunter2&token=hunter2",
    ],
)
def test_a_url_with_a_secret_is_refused_and_never_repeated(url):
    error = refused(env={"KVLAYER_TIERS__0__URL": url})
    everything = f"{error}{error.hint}{error.__notes__}{error.__context__!r}"
    assert "hunter2" not in everything
    assert "(tiers.0.url: environment KVLAYER_TIERS__0__URL)" in str(error)


def test_an_at_sign_in_a_path_is_no_secret():
    assert TierConfig(url="file:///mnt/@snapshots/kv").url == "file:///mnt/@snapshots/kv"


def test_an_option_about_tokens_is_no_secret():
    assert TierConfig(url="file:///kv?tokens_per_file=1").url.endswith("tokens_per_file=1")


# The contract with the reader.


@pytest.mark.parametrize("cls", [CacheConfig, ModelConfig, TierConfig])
def test_every_field_is_documented_with_its_default(cls):
    table, title = {
        "CacheConfig": ("", "The cache"),
        "ModelConfig": ("model.", "The model"),
        "TierConfig": ("tiers.", "The tiers"),
    }[cls.__name__]
    page = DOCS.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    for spec in dataclasses.fields(cls):
        if spec.name in ("model", "tiers"):
            continue
        rows = [row for row in page.splitlines() if row.startswith(f"| `{table}{spec.name}`")]
        assert len(rows) == 1, f"docs/configuration.md must have one row for {table}{spec.name}"
        if spec.default not in (dataclasses.MISSING, ""):
            shown = str(spec.default).lower() if spec.type == "bool" else str(spec.default)
            assert f"`{shown}`" in rows[0]


def test_the_file_in_the_documentation_is_valid(toml):
    page = DOCS.read_text(encoding="utf-8")
    block = page.split("```toml\n")[1].split("```")[0]
    assert len(CacheConfig.load(toml(block), env={}).tiers) == 2


def test_every_configuration_error_is_one_of_ours_and_a_value_error():
    assert issubclass(kvlayer.config.model.FieldError, ConfigError)
    assert issubclass(ConfigError, KVLayerError)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device"])
def test_a_file_that_is_no_regular_one_is_refused_and_not_waited_for(tmp_path, kind):
    path = {"a pipe": tmp_path / "pipe", "a folder": tmp_path, "a device": Path("/dev/zero")}[kind]
    if kind == "a pipe":
        os.mkfifo(path)
    error = refused(path)
    assert str(path) in str(error)
    assert "regular file" in str(error) or "directory" in str(error)
    assert error.hint


def test_a_file_larger_than_any_configuration_is_refused(tmp_path):
    path = tmp_path / "kv.toml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert "larger than" in str(refused(path))

"""A configuration is judged as Cache.open would, without opening anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvlayer.doctor.configured import Place, configured
from kvlayer.doctor.finding import Status
from kvlayer.urls import BackendURL
from kvlayer_backends.file.options import FileOptions

WEIGHTS = f'[model]\nweights = "sha256:{"0" * 64}"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "kv.toml"
    path.write_text(text)
    return path


def tiers(*urls: str) -> str:
    return "".join(f'[[tiers]]\nurl = "{url}"\n' for url in urls)


def test_the_defaults_are_fine() -> None:
    known = configured(None)
    assert [f.status for f in known.findings] == [Status.OK]
    assert (known.host_nbytes, known.places) == (1 << 30, ())


def test_host_memory_and_places_are_those_configured(tmp_path: Path) -> None:
    there = tmp_path / "never made"
    url = f"file://{there}?capacity=1GiB&threads=3&direct=on&readonly=true".replace(" ", "%20")
    text = "tokens_per_chunk = 64\n" + WEIGHTS
    path = written(tmp_path, text + tiers("cpu://?capacity=2GiB", "cpu://?capacity=1GiB", url))
    known = configured(path)
    assert [f.status for f in known.findings] == [Status.OK]
    assert known.findings[0].detail["origins"] == [f"file {path}"]
    assert known.host_nbytes == 3 << 30
    assert known.tokens_per_chunk == 64
    assert known.places == (Place(str(there), 1 << 30, 3, "on", True),)
    assert not there.exists()


def test_a_places_defaults_are_the_backends() -> None:
    place, options = Place.of(BackendURL.parse("file:///kv")), FileOptions()
    assert (place.capacity, place.threads) == (options.capacity, options.threads)
    assert (place.direct, place.readonly) == (options.direct, options.readonly)
    assert replace(place, capacity=None) == Place("/kv")  # as --dir has it


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tokens_per_chnk = 64\n", "tokens_per_chnk"),
        ("this is no TOML", "TOML"),
        (tiers("cpu://?capacity=1GiB", "fiel:///kv"), "fiel"),
        (tiers("cpu://?capcity=1GiB"), "capcity"),
        (WEIGHTS + tiers("file:///kv"), "not host memory"),
        ('policy = "mru"\n', "mru"),
        ('[model]\nweights = "/no/such/model"\n', "/no/such/model"),
    ],
)
def test_what_a_cache_would_refuse_will_not_work(tmp_path: Path, text: str, said: str) -> None:
    known = configured(written(tmp_path, text))
    (found,) = known.findings
    assert found.status is Status.BAD
    assert said in found.found
    assert found.advice


def test_a_missing_file_will_not_work_and_the_rest_is_still_looked_at(tmp_path: Path) -> None:
    known = configured(tmp_path / "nope.toml")
    assert [f.status for f in known.findings] == [Status.BAD]
    assert known.host_nbytes == 1 << 30


def test_every_broken_tier_is_named(tmp_path: Path) -> None:
    bad = tiers("cpu://?capcity=1GiB", "fiel:///kv", "file:///kv?threads=0")
    known = configured(written(tmp_path, WEIGHTS + bad))
    assert [f.found.split(":")[0] for f in known.findings] == ["tier 0", "tier 1", "tier 2"]
    assert known.places == ()


def test_a_model_nobody_names_is_a_warning_where_kv_outlives_the_process(tmp_path: Path) -> None:
    text = tiers("cpu://?capacity=1GiB", "file:///kv")
    (found,) = configured(written(tmp_path, text)).findings
    assert found.status is Status.WARN
    (found,) = configured(written(tmp_path, WEIGHTS + text)).findings
    assert found.status is Status.OK


def test_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLAYER_TIERS__0__URL", "cpu://?capacity=4GiB")
    known = configured(None)
    assert known.host_nbytes == 4 << 30
    assert "KVLAYER_TIERS__0__URL" in known.findings[0].found

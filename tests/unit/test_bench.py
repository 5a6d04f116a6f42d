"""``kvlayer bench`` prints figures with ceilings taken in the same run. Their size is no test."""

from __future__ import annotations

import json
import os
import signal
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import replace
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvlayer.api.cache import Cache
from kvlayer.bench import file, groups
from kvlayer.bench.bare import BareFiles, forget, takes_direct
from kvlayer.bench.breakeven import break_evens
from kvlayer.bench.directory import directory_rows
from kvlayer.bench.evict import evict_rows
from kvlayer.bench.groups import GROUPS, Ask, Group
from kvlayer.bench.lookup import lookup_rows
from kvlayer.bench.loop import loop_rows
from kvlayer.bench.machine import file_system
from kvlayer.bench.measure import Row, Taken, alternate
from kvlayer.bench.prompts import prompt
from kvlayer.bench.report import picture, table
from kvlayer.bench.sick import sick_rows
from kvlayer.cli import bench as command
from kvlayer.cli.main import EXIT_BAD, EXIT_USAGE, program
from kvlayer.errors import BackendError

pytestmark = pytest.mark.torch

MIB = 1 << 20

ROWS = {
    "hash": {"hash.int32": "s", "hash.int64": "s", "hash.list": "s"},
    "evict": {"evict.pinned20k": "s"},
    "directory": {"directory.bytes": "B", "directory.stop": "s"},
    "lookup": {
        "lookup.32k.1k": "s",
        "lookup.32k.100k": "s",
        "lookup.named.1k": "s",
        "lookup.named.100k": "s",
    },
    "questions": {"questions.cold": "keys", "questions.warm": "keys"},
    "host": {
        "host.store.native": "B/s",
        "host.store.canonical": "B/s",
        "host.retrieve.native": "B/s",
        "host.retrieve.canonical": "B/s",
    },
    "file": {
        "file.write": "B/s",
        "file.read.cold": "B/s",
        "file.write.small": "B/s",
        "file.read.small": "B/s",
    },
    "portal": {"portal.hop": "s", "portal.batch64": "s", "portal.lookup": "s"},
    "loop": {
        "loop.callback.host": "s",
        "loop.callback.file": "s",
        "loop.wall.host": "s",
        "loop.wall.file": "s",
        **{
            f"loop.{way}.{where}{alone}": "s"
            for way in ("put", "get")
            for where in ("still", "file")
            for alone in ("", ".alone")
        },
    },
    "tier": {
        "tier.healthy": "s",
        "tier.dead.first": "s",
        "tier.dead.later": "s",
        "tier.dead.recovery": "s",
        "tier.slow.first": "s",
        "tier.slow.later": "s",
        "tier.slow.recovery": "s",
        "tier.flapping.first": "s",
        "tier.flapping.later": "s",
        "tier.flapping.worst": "s",
    },
}
NO_CEILING = {"loop.callback.host", "loop.callback.file", "questions.cold", "questions.warm"}
NO_CEILING |= {name for name in ROWS["loop"] if name.startswith(("loop.put", "loop.get"))}


@pytest.fixture(autouse=True)
def on_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tests run, the temporary directory may well be memory; their figures count nothing."""
    monkeypatch.setattr(command, "file_system", lambda path: "a disk")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same groups over a hundredth of the objects."""
    tiny = {
        "evict": lambda ask: evict_rows(ask.rounds, pinned=256, free=128),
        "directory": lambda ask: directory_rows(ask.rounds, known=2_000),
        "lookup": lambda ask: lookup_rows(ask.rounds, few=2, many=4),
        "loop": lambda ask: loop_rows(
            ask.nbytes, samples=200, rounds=1, directory=str(ask.directory)
        ),
        "tier": lambda ask: sick_rows(1, requests=3),
    }
    use(monkeypatch, *(replace(g, rows=tiny.get(g.name, g.rows)) for g in GROUPS))


def use(monkeypatch: pytest.MonkeyPatch, *chosen: Group) -> None:
    monkeypatch.setattr(command, "GROUPS", chosen)


def run(directory: Path, *args: object) -> Result:
    """``kvlayer bench`` in ``directory``, with as little work as makes sense."""
    given = ["bench", "--rounds", "1", "--size", "32MiB", "--dir", directory, *args]
    return CliRunner().invoke(program, [str(arg) for arg in given], prog_name="kvlayer")


# -- what is written -----------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_every_row_has_its_ceiling_and_the_file_holds_what_was_shown(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    ran = run(disk, "--json", tmp_path / "bench.json", "--plot", tmp_path / "bench.svg")
    assert ran.exit_code == 0, ran.output
    report = json.loads((tmp_path / "bench.json").read_text())
    assert set(report) == {"machine", "results", "break_even"}
    results = {row["name"]: row for row in report["results"]}
    assert len(results) == len(report["results"])
    assert {n: row["unit"] for n, row in results.items()} == {
        name: unit for rows in ROWS.values() for name, unit in rows.items()
    }
    for name, row in results.items():
        assert {"name", "value", "unit", "ceiling", "ratio"} <= set(row)
        assert row["value"] > 0
        if name in NO_CEILING:
            assert row["ceiling"] is row["ratio"] is None
            continue
        assert row["ceiling"] > 0
        upside_down = row["unit"] in ("s", "B")
        share = row["value"] / row["ceiling"]
        assert row["ratio"] == pytest.approx(1 / share if upside_down else share)
        assert ("cpu_seconds_per_gb" in row) == name.startswith("file.")
        assert name in ran.stdout
        assert name in (tmp_path / "bench.svg").read_text()
    assert [even["tier"] for even in report["break_even"]] == ["cpu", "file"]
    machine = report["machine"]
    assert machine["cpus"] >= 1
    assert machine["memory_nbytes"] > 0
    assert machine["torch"]
    assert machine["file_system"] == "a disk"
    assert list(disk.iterdir()) == []  # what was measured is gone


@pytest.mark.parametrize("name", ROWS)
def test_a_group_can_be_measured_alone(small: None, tmp_path: Path, name: str) -> None:
    ran = run(tmp_path, "--only", name)
    assert ran.exit_code == 0, ran.output
    shown = [line.split()[0] for line in ran.stdout.split("\n\n")[0].splitlines()[1:]]
    assert set(shown) == set(ROWS[name])


def test_every_group_has_a_section_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for group in GROUPS:
        assert f"`--only {group.name}`" in page
    for rows in ROWS.values():
        for name in rows:
            assert f"`{name}`" in page


def test_an_unknown_group_is_a_usage_error(tmp_path: Path) -> None:
    ran = run(tmp_path, "--only", "hsah")
    assert ran.exit_code == EXIT_USAGE
    assert "hsah" in ran.stderr


# -- what is left out ----------------------------------------------------------------------------


def group(name: str, rows: Callable[[Ask], Any], **more: bool) -> Group:
    async def measured(ask: Ask) -> list[Row]:
        rows(ask)
        return [Row(f"{name}.row", 2.0, "s", 1.0)]

    return Group(name, measured, **more)


def nothing(_: Ask) -> None:
    """A group that has no work to do."""


def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)


def test_without_torch_what_needs_it_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_torch(monkeypatch)
    use(monkeypatch, group("pure", nothing), group("tensors", nothing, torch=True))
    ran = run(tmp_path)
    assert ran.exit_code == 0
    assert "torch is not installed: left out: tensors" in ran.stderr
    assert "pure.row" in ran.stdout
    assert "tensors.row" not in ran.stdout


def test_nothing_to_measure_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_torch(monkeypatch)
    use(monkeypatch, group("tensors", nothing, torch=True))
    ran = run(tmp_path)
    assert ran.exit_code == EXIT_BAD
    assert "install torch" in ran.stderr


@pytest.mark.parametrize("kind", ["tmpfs", "ramfs"])
def test_files_in_memory_are_refused_where_asked_for_and_left_out_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    monkeypatch.setattr(command, "file_system", lambda path: kind)
    use(monkeypatch, group("pure", nothing), group("files", nothing, disk=True))
    asked = run(tmp_path)
    assert asked.exit_code == EXIT_USAGE
    assert f"is a {kind}: its figures would be those of memory" in asked.stderr
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(program, ["bench"])
    assert ran.exit_code == 0
    assert "left out: files" in ran.stderr
    assert "files.row" not in ran.stdout


def test_a_disk_without_room_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, group("files", nothing, disk=True))
    ran = run(tmp_path, "--size", "900PiB")
    assert ran.exit_code == EXIT_USAGE
    assert "bytes free" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_is_not_svg_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, group("never", lambda ask: pytest.fail("measured")))
    ran = run(tmp_path, "--plot", tmp_path / "bench.png")
    assert ran.exit_code == EXIT_USAGE
    assert "name it figures.svg" in ran.stderr


# -- what is left behind: nothing ----------------------------------------------------------------


def test_the_directory_goes_when_a_group_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(ask: Ask) -> None:
        (ask.directory / "file").write_text("x")
        raise BackendError("the disk is full")

    use(monkeypatch, group("failing", fail))
    ran = run(tmp_path)
    assert ran.exit_code == EXIT_BAD
    assert "the disk is full" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_in_the_middle_of_a_transfer_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[str] = []
    real = file._Tier.read

    async def read(tier: Any, prompts: Sequence[Any]) -> Taken:
        seen.extend(path.name for path in tmp_path.rglob("*.canonical.*"))
        signal.raise_signal(signal.SIGINT)
        return await real(tier, prompts)

    monkeypatch.setattr(file._Tier, "read", read)
    ran = run(tmp_path, "--only", "file")
    assert ran.exit_code == 1
    assert "Aborted" in ran.output
    assert seen  # there was something to leave
    assert list(tmp_path.iterdir()) == []


def test_what_takes_long_says_so_every_two_seconds_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = iter([10.0, 11.0, 12.0, 13.9, 14.0, 20.0])
    say = command._Progress(lambda: next(now))
    for text in ("at 1 s", "at 2 s", "at 3.9 s", "at 4 s", "at 10 s"):
        say(text)
    shown = capsys.readouterr()
    assert shown.err.split("\n") == ["  at 2 s", "  at 4 s", "  at 10 s", ""]
    assert shown.out == ""


# -- what the measurements promise ---------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_tier_that_lost_something_is_an_error_not_a_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = file._Tier.empty

    async def lose(tier: Any) -> None:
        await real(tier)
        for path in tmp_path.rglob("*.canonical.*"):
            path.unlink()

    monkeypatch.setattr(file._Tier, "empty", lose)
    with pytest.raises(BackendError, match=r"0 of 512 tokens came back"):
        await file.file_rows(32 << 20, 1, tmp_path, lambda text: None)


@pytest.mark.asyncio
async def test_host_memory_is_empty_when_a_read_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded: list[int] = []
    real = file._Tier.read

    async def read(tier: Any, prompts: Sequence[Any]) -> Taken:
        def disk() -> int:
            return int(tier._cache.control.stats().tiers[1].loaded_nbytes)

        before = disk()
        taken = await real(tier, prompts)
        loaded.append(disk() - before)
        return taken

    monkeypatch.setattr(file._Tier, "read", read)
    await file.file_rows(32 << 20, 2, tmp_path, lambda text: None)
    assert loaded == [64 * MIB] * 3 + [16 * MIB] * 3


@pytest.mark.asyncio
async def test_lookups_among_many_objects_find_every_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[Cache, list[bytes]] = {}
    real = Cache.lookup

    def note(cache: Cache, tokens: Any) -> Any:
        asked.setdefault(cache, []).append(bytes(tokens))
        return real(cache, tokens)

    monkeypatch.setattr(Cache, "lookup", note)
    await lookup_rows(1, few=2, many=7)
    for resident, names in zip((2, 7), asked.values(), strict=True):
        assert len(set(names)) == resident
        # A prompt comes back only when all others have had their turn.
        assert all(len(set(names[at : at + resident])) == resident for at in range(14))


@pytest.mark.asyncio
async def test_without_direct_io_nothing_comes_from_the_page_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(file, "takes_direct", lambda directory: False)
    steps: list[str] = []

    def note(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def noted(*args: Any) -> Any:
            steps.append(name)
            return real(*args)

        monkeypatch.setattr(owner, name, noted)

    note(file, "forget")
    note(file._Tier, "read")
    note(file.BareFiles, "read")
    await file.file_rows(32 << 20, 2, tmp_path, lambda text: None)
    assert steps == ["forget", "read"] * 12  # 3 rounds of 2 sizes, ours and the bare threads'


@pytest.mark.may_skip("a file system may not tell what it has in memory")
def test_what_is_forgotten_has_to_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    page = bytearray(4096)
    fd = os.open(path, os.O_RDONLY)
    try:
        try:
            assert os.preadv(fd, [page], 0, os.RWF_NOWAIT) == 4096
        except OSError as exc:
            pytest.skip(f"cannot be asked: {exc}")
        for _ in range(1000):  # the kernel keeps a page that anybody else is holding just then
            forget(tmp_path)
            try:
                os.preadv(fd, [page], 0, os.RWF_NOWAIT)
            except BlockingIOError:
                return
        pytest.fail("the kernel kept it, however often it was told")
    finally:
        os.close(fd)


@pytest.mark.parametrize("direct", [True, False])
def test_bare_threads_move_the_same_bytes_in_files_of_the_same_size(
    tmp_path: Path, direct: bool
) -> None:
    memory = memoryview(mmap(-1, 4 * MIB))
    for at in range(4):
        memory[at * MIB : (at + 1) * MIB] = bytes([at + 1]) * MIB
    bodies = [memory[at * MIB : (at + 1) * MIB] for at in range(4)]
    with BareFiles(tmp_path, bodies, 2, direct=direct and takes_direct(tmp_path)) as bare:
        assert bare.write() > 0
        sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
        assert sizes == {f"bare-{at}": MIB + 4096 for at in range(4)}
        assert (tmp_path / "bare-2").read_bytes() == bytes(4096) + b"\3" * MIB
        memory[:] = bytes(4 * MIB)
        assert bare.read() > 0
        assert [memory[at * MIB] for at in range(4)] == [1, 2, 3, 4]
        bare.remove()
    assert list(tmp_path.iterdir()) == []
    memory.release()  # nothing borrows it any more


def test_the_file_system_of_a_directory_is_named() -> None:
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(Path("/sys/kernel")) == "sysfs"
    assert file_system(Path(__file__).parent)


def test_prompts_differ_by_seed_and_are_ids_an_engine_could_have() -> None:
    assert prompt(64, 1) == prompt(64, 1)
    assert prompt(64, 1) != prompt(64, 2)
    assert prompt(64, 1).typecode == "i"
    assert 0 <= min(prompt(4096, 3)) <= max(prompt(4096, 3)) < 1 << 16


@pytest.mark.asyncio
async def test_both_sides_take_turns_and_each_goes_first_as_often() -> None:
    order: list[str] = []
    seconds = iter([9.0, 9.0, 1.0, 5.0, 3.0, 2.0])

    async def subject(_: int) -> float:
        order.append("own")
        return next(seconds)

    def ceiling() -> float:
        order.append("top")
        return 0.5

    own, top = await alternate(subject, ceiling, rounds=4, warm=2)
    assert "".join(side[0] for side in order) == "toottoottoot"
    assert (own, top) == (2.5, 0.5)  # the median of 1, 5, 3, 2


def test_a_ratio_is_one_at_the_ceiling_whichever_way_is_better() -> None:
    assert Row("rate", 8.0, "B/s", 10.0).ratio == 0.8
    assert Row("time", 10.0, "s", 8.0).ratio == 0.8
    assert Row("alone", 10.0, "s").ratio is None


def test_rates_are_medians_and_cpu_is_counted_per_gigabyte_moved() -> None:
    own = [Taken(1.0, 0.5), Taken(4.0, 9.0), Taken(2.0, 1.0)]
    row = Row.moved("file.read.cold", 2_000_000_000, own, [1.0, 0.5, 8.0])
    assert (row.value, row.ceiling, row.unit) == (1e9, 2e9, "B/s")
    assert row.cpu_seconds_per_gb == 0.5
    assert row.as_dict()["cpu_seconds_per_gb"] == 0.5
    assert "cpu_seconds_per_gb" not in Row("x", 1.0, "s").as_dict()


# -- load or recompute ---------------------------------------------------------------------------

TIERS = [Row("host.retrieve.canonical", 4e9, "B/s"), Row("file.read.cold", 1e9, "B/s")]


def test_a_tier_pays_below_its_bytes_per_second_over_the_bytes_of_a_token() -> None:
    cpu, disk = break_evens(TIERS, 100_000, prefill_rate=20_000.0)
    assert (cpu.tier, cpu.tokens_per_s, cpu.speedup) == ("cpu", 40_000.0, 2.0)
    assert (disk.tier, disk.tokens_per_s, disk.speedup) == ("file", 10_000.0, 0.5)
    assert cpu.as_dict()["loading_pays"] is True
    assert disk.as_dict()["loading_pays"] is False
    assert str(cpu).endswith("at 20,000 tokens/s loading is 2.0x faster")
    assert "RECOMPUTING IS 2.0x FASTER" in str(disk)


def test_the_slowest_move_on_the_way_into_the_engine_decides() -> None:
    rows = [Row("host.retrieve.canonical", 1e9, "B/s"), Row("file.read.cold", 3e9, "B/s")]
    assert [even.bytes_per_s for even in break_evens(rows, 1, None)] == [1e9, 1e9]
    (alone,) = break_evens(rows[1:], 1, None)
    assert (alone.tier, alone.bytes_per_s) == ("file", 3e9)
    assert break_evens([Row("hash.list", 1.0, "s")], 1, None) == []


def test_without_a_prefill_rate_the_break_even_is_told_and_no_verdict() -> None:
    (cpu, _) = break_evens(TIERS, 100_000, None)
    assert str(cpu) == "cpu: recomputing is faster above 40,000 tokens/s"
    assert cpu.as_dict()["loading_pays"] is None


def test_the_command_says_when_recomputing_is_faster_than_a_tier(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def rows(ask: Ask) -> list[Row]:
        return TIERS

    use(monkeypatch, Group("tiers", rows))
    given = ("--prefill-rate", "20000", "--bytes-per-token", "100000")
    ran = run(tmp_path, *given, "--json", tmp_path / "bench.json")
    assert "at 100,000 bytes of KV a token" in ran.stdout
    assert ran.stdout.count("RECOMPUTING IS 2.0x FASTER") == 1
    verdicts = json.loads((tmp_path / "bench.json").read_text())["break_even"]
    assert [(v["tier"], v["loading_pays"]) for v in verdicts] == [("cpu", True), ("file", False)]


# -- for people ----------------------------------------------------------------------------------


def test_a_table_shows_amounts_a_person_can_compare() -> None:
    lines = table(
        [
            Row("a.long.name", 12.5e-6, "s", 10e-6),
            Row("slow", 1.5, "s"),
            Row("rate", 1.25e9, "B/s", 2.5e9, 0.125),
        ]
    )
    assert [line.split("  ")[0] for line in lines] == ["figure", "a.long.name", "slow", "rate"]
    assert lines[1].split()[1:] == ["12.5", "us", "10.0", "us", "0.80"]
    assert lines[2].split()[1:] == ["1.50", "s"]
    assert lines[3].split()[1:] == ["1.25", "GB/s", "2.50", "GB/s", "0.50", "0.12"]


def test_the_picture_has_a_bar_as_long_as_the_ratio_for_each_row_with_a_ceiling() -> None:
    rows = [Row("half", 1.0, "B/s", 2.0), Row("over", 3.0, "B/s", 2.0), Row("none", 1.0, "s")]
    svg = ET.fromstring(picture(rows, "a < b"))  # noqa: S314  # our own
    space = "{http://www.w3.org/2000/svg}"
    bars = [float(r.get("width", 0)) for r in svg.iter(f"{space}rect") if r.get("x")]
    (ceiling,) = svg.iter(f"{space}line")
    left = next(float(r.get("x", 0)) for r in svg.iter(f"{space}rect") if r.get("x"))
    full = float(ceiling.get("x1", 0)) - left
    assert bars == pytest.approx([full / 2, full * 1.5], abs=0.1)
    texts = [text.text for text in svg.iter(f"{space}text")]
    assert "a < b" in texts
    assert "none" not in texts


def test_groups_are_named_once_and_say_what_they_need() -> None:
    assert [g.name for g in groups.GROUPS] == list(dict.fromkeys(g.name for g in groups.GROUPS))
    assert {g.name for g in groups.GROUPS if g.disk} == {"file", "loop"}
    assert not next(g for g in groups.GROUPS if g.name == "hash").torch

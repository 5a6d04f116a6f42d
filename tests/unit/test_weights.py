"""The weights digest: other bytes are another model, other names of the same bytes are not."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from io import FileIO
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlayer.errors import IdentityError
from kvlayer.identity import weights, weights_cache, weights_samples
from kvlayer.identity.namespace import Namespace
from kvlayer.identity.weights import counts, parse_weights, process_weights, weights_digest
from kvlayer.identity.weights_cache import DigestCache


def hexed(content: bytes) -> str:
    return sha256(content).hexdigest()


def write(folder: Path, **files: bytes) -> Path:
    """A model folder; ``__`` in a name stands for ``.`` and ``___`` for ``/``."""
    for name, content in files.items():
        file = folder / name.replace("___", "/").replace("__", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def model(folder: Path) -> Path:
    return write(folder, model__safetensors=b"weights", config__json=b"{}")


def rewrite(file: Path, content: bytes) -> None:
    """Change a file in place, as often as the file system's clock needs to see it."""
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:
        file.write_bytes(content)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture(autouse=True)
def _no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour has passed since the files were written, and none is too small to be remembered."""
    monkeypatch.setattr(weights_samples, "WHOLE_NBYTES", 0)
    later = time.time_ns() + 3600 * 10**9
    monkeypatch.setattr(weights_cache, "time", SimpleNamespace(time_ns=lambda: later))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were really read."""
    names: list[str] = []
    stream = weights._Hasher._stream

    def spy(hasher: Any, raw: FileIO, size: int) -> str:
        names.append(Path(str(raw.name)).name)
        return stream(hasher, raw, size)

    monkeypatch.setattr(weights._Hasher, "_stream", spy)
    return names


# ---- What is in the digest ----


def test_the_digest_is_what_sha256sum_prints_hashed(tmp_path: Path) -> None:
    write(
        tmp_path,
        model__safetensors=b"weights", config__json=b"{}", sub___adapter__bin=b"a",
        tokenizer__json=b"text", README__md=b"read",
    )  # fmt: skip
    listing = "".join(
        f"{hexed(content)}  {name}\n"
        for name, content in [
            ("config.json", b"{}"),
            ("model.safetensors", b"weights"),
            ("sub/adapter.bin", b"a"),
        ]
    )
    assert weights_digest(tmp_path) == f"sha256:{hexed(listing.encode())}"


def test_the_digest_of_one_file_is_its_sha256_whatever_its_name(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.GGUF"):
        (tmp_path / name).write_bytes(b"weights")
        assert weights_digest(tmp_path / name) == f"sha256:{hexed(b'weights')}"


def test_the_digest_fits_a_namespace(tmp_path: Path) -> None:
    from kvlayer.layout import AttentionKind, KVGroup

    group = KVGroup(AttentionKind.MHA, (0,), "bfloat16", 1, 64)
    for digest in (weights_digest(model(tmp_path)), process_weights()):
        namespace = Namespace(weights=digest, groups=(group,), compute_dtype="bfloat16")
        assert namespace.is_private is digest.startswith("process:")
    assert process_weights() != process_weights()


def test_the_same_files_in_a_folder_of_another_name_are_the_same_model(tmp_path: Path) -> None:
    assert weights_digest(model(tmp_path / "one")) == weights_digest(str(model(tmp_path / "two")))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"weightz"),
        lambda folder: (folder / "config.json").write_bytes(b"{} "),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "model.safetensors").rename(folder / "other.safetensors"),
        lambda folder: write(folder, adapter_config__json=b"{}"),
        lambda folder: write(folder, modeling_x__py=b"pass"),
        lambda folder: write(folder, original___consolidated__pth=b"x"),
        lambda folder: write(folder, lora___adapter_model__safetensors=b"x"),
    ],
)
def test_a_file_changed_added_renamed_or_lost_is_another_model(
    tmp_path: Path, change: Callable[[Path], Any]
) -> None:
    before = weights_digest(model(tmp_path))
    change(tmp_path)
    assert weights_digest(tmp_path) != before


def test_two_files_whose_contents_change_places_are_another_model(tmp_path: Path) -> None:
    one = weights_digest(write(tmp_path / "one", a__bin=b"1", b__bin=b"2"))
    assert weights_digest(write(tmp_path / "two", a__bin=b"2", b__bin=b"1")) != one


def test_what_shapes_only_text_is_not_in_the_digest(tmp_path: Path) -> None:
    before = weights_digest(model(tmp_path))
    write(
        tmp_path,
        tokenizer__json=b"1", tokenizer_config__json=b"1", vocab__json=b"1", README__md=b"1",
        special_tokens_map__json=b"1", generation_config__json=b"1", chat_template__json=b"1",
        added_tokens__json=b"1", tokenizer__model=b"1", optimizer__pt=b"1",
        training_args__bin=b"1", trainer_state__json=b"1", rng_state_0__pth=b"1",
    )  # fmt: skip
    write(tmp_path / ".cache" / "huggingface", model__safetensors=b"1")
    write(tmp_path, __hidden__bin=b"1")
    assert weights_digest(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors", "MODEL.SAFETENSORS", "pytorch_model-00001-of-00002.bin", "a.pt",
        "a.pth", "a.gguf", "a.npz", "config.json", "adapter_config.json", "quantize_config.json",
        "params.json", "model.safetensors.index.json", "modeling_llama.py", "scheduler.py",
        "scaler.safetensors", "optimizer.safetensors", "tokenizer_and_weights.safetensors",
        "vocab.bin", "a\nb.bin",
    ],
)  # fmt: skip
def test_a_file_that_shapes_the_computation_counts(name: str) -> None:
    assert counts(name)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "vocab.json", "merges.txt", "LICENSE", "model.onnx", ".bin", "._model.bin",
     "model.safetensors.lock", "bin", "a.pyc", "chat_template.jinja", "training_args.bin"],
)  # fmt: skip
def test_a_file_that_does_not_is_left_out(name: str) -> None:
    assert not counts(name)


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.dictionaries(st.from_regex(r"[a-c]{1,2}\.(bin|json)", fullmatch=True), st.binary(max_size=2))
)
def test_digests_are_equal_exactly_when_names_and_bytes_are(files: dict[str, bytes]) -> None:
    if not any(name.endswith(".bin") for name in files):
        return
    lines = "".join(f"{hexed(files[name])}  {name}\n" for name in sorted(files))
    found = {name: hexed(content) for name, content in files.items()}
    assert weights._digest_of(found) == f"sha256:{hexed(lines.encode())}"


# ---- Links, Hub caches, split files ----


def test_linked_files_and_folders_are_followed(tmp_path: Path) -> None:
    real = write(tmp_path / "real", model__bin=b"1", sub___more__bin=b"2")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model.bin").symlink_to(real / "model.bin")
    (linked / "sub").symlink_to(real / "sub")
    assert weights_digest(linked) == weights_digest(real)


def test_a_link_back_up_is_not_entered(tmp_path: Path) -> None:
    before = weights_digest(model(tmp_path))
    (tmp_path / "again").symlink_to(tmp_path)
    assert weights_digest(tmp_path) == before


def hub(root: Path, blob: str, content: bytes) -> Path:
    (root / "blobs").mkdir(parents=True)
    (root / "blobs" / blob).write_bytes(content)
    snapshot = root / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob}")
    return snapshot


def test_a_hub_blob_named_by_its_sha256_is_not_read(tmp_path: Path, read: list[str]) -> None:
    snapshot = hub(tmp_path / "hub", hexed(b"weights"), b"weights")
    found = weights_digest(snapshot)
    assert read == []
    assert weights_digest(write(tmp_path / "plain", model__safetensors=b"weights")) == found
    assert weights_digest(snapshot / "model.safetensors") == f"sha256:{hexed(b'weights')}"


@pytest.mark.parametrize("blob", ["ab" * 20, "AB" * 32, "ab" * 32 + ".incomplete"])
def test_a_hub_blob_of_another_name_is_read(tmp_path: Path, read: list[str], blob: str) -> None:
    snapshot = hub(tmp_path, blob, b"weights")
    plain = write(tmp_path / "plain", model__safetensors=b"weights")
    assert weights_digest(snapshot) == weights_digest(plain)
    assert read == ["model.safetensors"] * 2


def test_a_name_of_64_digits_outside_a_blobs_folder_means_nothing(
    tmp_path: Path, read: list[str]
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / ("ab" * 32)).write_bytes(b"weights")
    (tmp_path / "m.gguf").symlink_to(tmp_path / "files" / ("ab" * 32))
    assert weights_digest(tmp_path / "m.gguf") == f"sha256:{hexed(b'weights')}"
    assert read == ["m.gguf"]


def test_one_file_of_a_split_set_stands_for_the_whole_set(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for part in (1, 2):
            (tmp_path / f"{name}-0000{part}-of-00002.gguf").write_bytes(b"%d" % part)
    one = weights_digest(tmp_path / "a-00001-of-00002.gguf")
    assert weights_digest(tmp_path / "b-00002-of-00002.gguf") == one
    (tmp_path / "a-00002-of-00002.gguf").write_bytes(b"other")
    assert weights_digest(tmp_path / "a-00001-of-00002.gguf") != one
    (tmp_path / "a-00002-of-00002.gguf").unlink()
    with pytest.raises(IdentityError, match="00002-of-00002"):
        weights_digest(tmp_path / "a-00001-of-00002.gguf")


def test_a_name_that_only_looks_split_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "a-00000-of-00000.gguf").write_bytes(b"x")
    assert weights_digest(tmp_path / "a-00000-of-00000.gguf") == f"sha256:{hexed(b'x')}"


# ---- Refusals ----


def refusal(path: Any) -> str:
    with pytest.raises(IdentityError) as caught:
        weights_digest(path)
    assert 'model.weights = "sha256:' in (caught.value.hint or "")
    return str(caught.value)


def test_a_missing_model_is_refused_and_says_how_to_pass_a_digest(tmp_path: Path) -> None:
    assert "nowhere" in refusal(tmp_path / "nowhere")
    assert "nobody" in refusal("~nobody-of-this-name/model")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert "no weights" in refusal(write(tmp_path, config__json=b"{}", training_args__bin=b"1"))
    assert "no weights" in refusal(tmp_path / "config.json")


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.bin")
    assert "regular" in refusal(tmp_path)
    assert "regular" in refusal(tmp_path / "model.bin")


def test_a_dangling_link_is_refused(tmp_path: Path) -> None:
    model(tmp_path)
    (tmp_path / "more.bin").symlink_to(tmp_path / "gone")
    assert "more.bin" in refusal(tmp_path)


def test_a_file_or_folder_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Any, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    model(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", deny)
        assert "Permission denied" in refusal(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", deny)
        assert "Permission denied" in refusal(tmp_path)


def test_a_line_break_in_a_name_cannot_forge_a_second_file(tmp_path: Path) -> None:
    (tmp_path / "a.bin\nb.bin").write_bytes(b"x")
    assert "line break" in refusal(tmp_path)


# ---- Files that change ----


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"first")
    calls: list[int] = []

    def once(done: int, _: int) -> None:
        calls.append(done)
        if len(calls) == 1:
            file.write_bytes(b"second, longer")

    assert weights_digest(file, on_progress=once) == f"sha256:{hexed(b'second, longer')}"


def test_a_file_that_keeps_changing_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"1")

    def always(_: int, __: int) -> None:
        with file.open("ab") as more:
            more.write(b"x")

    with pytest.raises(IdentityError, match="changed while") as caught:
        weights_digest(file, on_progress=always)
    assert caught.value.hint


def test_a_file_replaced_under_its_name_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    file, new = tmp_path / "m.gguf", tmp_path / "new"
    file.write_bytes(b"old")
    new.write_bytes(b"new")

    def replace(_: int, __: int) -> None:
        if new.exists():
            new.replace(file)

    assert weights_digest(file, on_progress=replace) == f"sha256:{hexed(b'new')}"


# ---- Progress ----


def test_progress_goes_up_to_all_bytes_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_BUFFER_NBYTES", 4)
    write(tmp_path, a__bin=b"0123456789", b__bin=b"", c__bin=b"xyz")
    seen: list[tuple[int, int]] = []
    weights_digest(tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == [4, 8, 10, 10, 10, 13, 13]
    assert {total for _, total in seen} == {13}


def test_a_buffer_smaller_than_the_file_gives_the_same_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(bytes(range(256)) * 5)
    for nbytes in (1, 7, 1280, 4096):
        monkeypatch.setattr(weights, "_BUFFER_NBYTES", nbytes)
        assert weights_digest(file) == f"sha256:{hexed(file.read_bytes())}"


# ---- The cache of file digests ----


@pytest.mark.usefixtures("settled")
def test_an_unchanged_file_is_read_once(tmp_path: Path, read: list[str]) -> None:
    model(tmp_path / "m")
    seen: list[tuple[int, int]] = []
    first = weights_digest(tmp_path / "m")
    assert sorted(read) == ["config.json", "model.safetensors"]
    assert weights_digest(tmp_path / "m", on_progress=lambda *at: seen.append(at)) == first
    assert len(read) == 2
    assert seen[-1] == (9, 9)
    assert (tmp_path / "xdg" / "kvlayer" / "weights.sha256").is_file()


@pytest.mark.usefixtures("settled")
def test_a_change_is_seen_even_when_size_and_mtime_are_set_back(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"weights")
    before = file.stat()
    weights_digest(file)
    rewrite(file, b"weightz")
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert weights_digest(file) == f"sha256:{hexed(b'weightz')}"


def test_a_file_written_a_moment_ago_is_not_remembered(tmp_path: Path, read: list[str]) -> None:
    model(tmp_path / "m")  # a second change within one tick of the clock would not show
    for _ in range(2):
        weights_digest(tmp_path / "m")
    assert len(read) == 4
    assert not (tmp_path / "xdg").exists()


@pytest.mark.usefixtures("settled")
def test_a_cache_directory_can_be_named(tmp_path: Path, read: list[str]) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"weights")
    for _ in range(2):
        weights_digest(file, cache_dir=tmp_path / "here" / "deep")
    assert read == ["m.gguf"]
    assert [path.name for path in (tmp_path / "here" / "deep").iterdir()] == ["weights.sha256"]
    assert not (tmp_path / "xdg").exists()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("home", ["", "relative", None])
def test_without_an_absolute_xdg_cache_home_the_cache_is_in_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if home is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", home)
    weights_digest(model(tmp_path / "m"))
    assert (tmp_path / "home" / ".cache" / "kvlayer" / "weights.sha256").is_file()


@pytest.mark.usefixtures("settled")
def test_a_user_without_a_home_has_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]
) -> None:
    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    model(tmp_path)
    assert weights_digest(tmp_path) == weights_digest(tmp_path)
    assert len(read) == 4


@pytest.mark.usefixtures("settled")
def test_a_cache_that_cannot_be_written_is_not_used(tmp_path: Path, read: list[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    model(tmp_path / "m")
    found = [weights_digest(tmp_path / "m", cache_dir=tmp_path / "file" / "x") for _ in range(2)]
    assert found[0] == found[1]
    assert len(read) == 4


@pytest.mark.usefixtures("settled")
def test_a_cache_that_fails_half_way_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    weights_digest(model(tmp_path / "m"), cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("size", [0, 1, 50, 100, 150])
def test_a_truncated_cache_costs_only_reading(tmp_path: Path, size: int) -> None:
    model(tmp_path / "m")
    first = weights_digest(tmp_path / "m")
    cache = tmp_path / "xdg" / "kvlayer" / "weights.sha256"
    cache.write_bytes(cache.read_bytes()[:size])
    assert weights_digest(tmp_path / "m") == first


@pytest.mark.usefixtures("settled")
def test_no_damaged_byte_of_the_cache_gives_another_digest(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"weights")
    weights_digest(file)
    cache = tmp_path / "xdg" / "kvlayer" / "weights.sha256"
    whole = cache.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        cache.write_bytes(damaged)
        assert weights_digest(file) == f"sha256:{hexed(b'weights')}"


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("noise", [b"\xff" * 300, b"\0\n" * 100, b"{}\n", b"x" * 2_000_000])
def test_a_cache_of_noise_is_an_empty_cache(tmp_path: Path, noise: bytes, read: list[str]) -> None:
    cache = tmp_path / "xdg" / "kvlayer" / "weights.sha256"
    cache.parent.mkdir(parents=True)
    cache.write_bytes(noise)
    model(tmp_path / "m")
    assert weights_digest(tmp_path / "m") == weights_digest(tmp_path / "m")
    assert len(read) == 2
    assert cache.stat().st_size < 1000


def stat_of(inode: int) -> Any:
    return SimpleNamespace(st_dev=1, st_ino=inode, st_size=2, st_mtime_ns=3, st_ctime_ns=4)


def remembered(directory: Path) -> Iterator[int]:
    for line in (directory / "weights.sha256").read_text().splitlines():
        yield int(line.split()[1])


def test_the_cache_keeps_a_bounded_number_of_the_newest(tmp_path: Path) -> None:
    for first in (0, 3000):
        cache = DigestCache(tmp_path)
        for inode in range(first, first + 3000):
            cache.put(stat_of(inode), "cd" * 32, "ab" * 32)
        cache.save()
    assert list(remembered(tmp_path)) == list(range(6000 - 4096, 6000))


def test_two_writers_one_after_the_other_keep_both_entries(tmp_path: Path) -> None:
    one, two = DigestCache(tmp_path), DigestCache(tmp_path)
    assert one.get(stat_of(1)) is two.get(stat_of(1)) is None
    for inode, cache in enumerate((one, two)):
        cache.put(stat_of(inode), "cd" * 32, f"{inode:064x}")
        cache.save()
    third = DigestCache(tmp_path)
    assert [third.get(stat_of(inode)) for inode in (0, 1)] == [
        ("cd" * 32, f"{0:064x}"),
        ("cd" * 32, f"{1:064x}"),
    ]


def test_many_writers_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    start = threading.Barrier(8)
    failures: list[BaseException] = []

    def writer(number: int) -> None:
        try:
            start.wait()
            for inode in range(20):
                cache = DigestCache(tmp_path)
                cache.put(stat_of(100 * number + inode), "ab" * 32, "cd" * 32)
                cache.save()
        except BaseException as exc:  # noqa: BLE001  carried to the test's thread
            failures.append(exc)

    threads = [threading.Thread(target=writer, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [path.name for path in tmp_path.iterdir()] == ["weights.sha256"]
    lines = (tmp_path / "weights.sha256").read_text().splitlines()
    assert lines
    assert all(weights_cache._entry(line) is not None for line in lines)


@pytest.mark.usefixtures("settled")
def test_what_was_read_before_a_failure_is_remembered(tmp_path: Path, read: list[str]) -> None:
    write(tmp_path / "m", a__bin=b"1")
    os.mkfifo(tmp_path / "m" / "b.bin")
    refusal(tmp_path / "m")
    (tmp_path / "m" / "b.bin").unlink()
    weights_digest(tmp_path / "m")
    assert read == ["a.bin"]


# ---- Config text ----


def test_a_digest_or_a_path_is_accepted(tmp_path: Path) -> None:
    digest = weights_digest(model(tmp_path))
    assert parse_weights(digest) == digest
    assert parse_weights(str(tmp_path)) == digest


@pytest.mark.parametrize(
    "text", ["", "sha256:", "sha256:xyz", "sha256:" + "AB" * 32, "sha256:" + "a" * 65]
)
def test_a_malformed_digest_is_refused_and_not_taken_for_a_path(text: str) -> None:
    with pytest.raises(IdentityError, match="not a weights digest") as caught:
        parse_weights(text)
    assert caught.value.hint


def test_a_served_model_name_is_no_identity() -> None:
    with pytest.raises(IdentityError, match="no model at") as caught:
        parse_weights("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert caught.value.hint


# ---- A file is not its stat ----


def safetensors(*tensors: bytes) -> bytes:
    """A file of float8 tensors called ``0``, ``1``, ..."""
    header, at = {}, 0
    for name, tensor in enumerate(tensors):
        offsets = [at, at + len(tensor)]
        header[str(name)] = {"dtype": "F8_E4M3", "shape": [len(tensor)], "data_offsets": offsets}
        at += len(tensor)
    packed = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return len(packed).to_bytes(8, "little") + packed + b"".join(tensors)


@pytest.fixture
def one_stat(settled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file has the same device, inode and times, as the files of two images may."""
    del settled
    monkeypatch.setattr(
        DigestCache, "key", staticmethod(lambda status: (1, 2, status.st_size, 3, 4))
    )


BIG = bytes(1_000_000)
CASES = {
    "a tensor": (safetensors(BIG, b"a" * 5000, BIG), safetensors(BIG, b"b" * 5000, BIG)),
    "a small tensor": (safetensors(BIG, b"a"), safetensors(BIG, b"b")),
    "the header": (safetensors(b"a" * 8, b""), safetensors(b"", b"a" * 8)),
    "what is no safetensors": (BIG + b"a", BIG + b"b"),
    "the first byte": (b"a" + BIG, b"b" + BIG),
    "a byte in the middle": (BIG + b"a" + BIG, BIG + b"b" + BIG),
}


@pytest.mark.usefixtures("one_stat")
@pytest.mark.parametrize("what", CASES)
def test_equal_stat_is_not_believed_where_samples_differ(tmp_path: Path, what: str) -> None:
    file = tmp_path / "model.safetensors"
    for content in CASES[what] * 2:
        file.write_bytes(content)
        assert weights_digest(file) == f"sha256:{hexed(content)}"


@pytest.mark.usefixtures("one_stat")
def test_what_lies_outside_of_every_sample_is_seen_by_reading_the_whole(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    one, two = (safetensors(end + bytes(100_000) + end) for end in (b"a", b"b"))
    file.write_bytes(one)
    first = weights_digest(file)
    file.write_bytes(two)
    assert weights_digest(file) == first  # as kvlayer.identity.weights_samples says
    for digest in (weights_digest, parse_weights):
        assert digest(str(file), whole=True) == f"sha256:{hexed(two)}"


def test_a_small_file_is_always_read(tmp_path: Path, read: list[str]) -> None:
    model(tmp_path / "m")
    for _ in range(2):
        weights_digest(tmp_path / "m")
    assert len(read) == 4


@pytest.mark.usefixtures("settled")
def test_the_samples_of_a_model_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as sparse:
        sparse.write(safetensors(*[bytes(8)] * 700).replace(b"[8]", b"[9]"))
        sparse.truncate(40 << 30)
    asked: list[int] = []
    pread = os.pread
    monkeypatch.setattr(
        os, "pread", lambda fd, count, at: asked.append(count) or pread(fd, count, at)
    )
    with file.open("rb") as raw:
        weights_samples.sampled(raw.fileno(), 40 << 30)
        assert sum(asked) < 1 << 20
        asked.clear()
        raw.seek(0)
    with file.open("r+b") as raw:
        raw.write(bytes(8))  # no safetensors any more
    with file.open("rb") as raw:
        weights_samples.sampled(raw.fileno(), 40 << 30)
    assert 15 << 20 < sum(asked) < 17 << 20


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(0, 2**64 - 1), st.integers(0, 60))
def test_any_header_is_sampled_within_the_file(header: bytes, length: int, size: int) -> None:
    with TemporaryFile() as file:
        for claimed in (length, len(header)):
            file.seek(0)
            file.write(claimed.to_bytes(8, "little") + header)
            file.truncate(size)
            places = list(weights_samples._places(file.fileno(), size))
            assert places and all(0 <= start <= size and count >= 0 for start, count in places)
            assert len(weights_samples.sampled(file.fileno(), size)) == 64


@pytest.mark.parametrize(
    "offsets", ["[0]", "[0, 9]", "[-1, 4]", "[4, 2]", "null", "[0.5, 1]", '["a", "b"]', "{}"]
)
def test_a_header_that_points_outside_of_the_file_is_none(tmp_path: Path, offsets: str) -> None:
    packed = b'{"t": {"data_offsets": %s}}' % offsets.encode()
    file = tmp_path / "f"
    file.write_bytes(len(packed).to_bytes(8, "little") + packed + bytes(8))
    with file.open("rb") as raw:
        assert weights_samples._tensors(packed, 8) == []
        weights_samples.sampled(raw.fileno(), file.stat().st_size)


@pytest.mark.parametrize("hours", [-1, 0])
def test_a_file_from_the_future_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str], hours: int
) -> None:
    monkeypatch.setattr(weights_samples, "WHOLE_NBYTES", 0)
    now = time.time_ns() + hours * 3600 * 10**9
    monkeypatch.setattr(weights_cache, "time", SimpleNamespace(time_ns=lambda: now))
    model(tmp_path / "m")
    for _ in range(2):
        weights_digest(tmp_path / "m")
    assert len(read) == 4


@pytest.mark.usefixtures("settled")
def test_a_clock_that_was_set_back_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]
) -> None:
    model(tmp_path / "m")
    weights_digest(tmp_path / "m")
    monkeypatch.setattr(weights_cache, "time", SimpleNamespace(time_ns=lambda: 0))
    weights_digest(tmp_path / "m")
    assert len(read) == 4


# ---- Nothing is believed that somebody else can have written ----


FORGED = "ee" * 32


def forge(cache: Path, model_file: Path) -> None:
    """Name another model's digest for a file in the cache."""
    status = model_file.stat()
    with model_file.open("rb") as raw:
        samples = weights_samples.sampled(raw.fileno(), status.st_size)
    cache.write_text(weights_cache._line(DigestCache.key(status), samples, FORGED))


@pytest.fixture
def cached(tmp_path: Path, settled: None) -> tuple[Path, Path]:
    """A model's file, and a cache that names another digest for it."""
    del settled
    file, cache = tmp_path / "m.gguf", tmp_path / "xdg" / "kvlayer" / "weights.sha256"
    file.write_bytes(b"weights")
    cache.parent.mkdir(parents=True, mode=0o700)
    forge(cache, file)
    cache.chmod(0o600)
    return file, cache


def test_the_cache_is_believed_where_only_the_user_can_write(cached: tuple[Path, Path]) -> None:
    assert weights_digest(cached[0]) == f"sha256:{FORGED}"  # else what follows shows nothing


def _nobodys(cache: Path) -> None:
    os.chown(cache, 65534, 65534)


def _link(cache: Path) -> None:
    cache.rename(cache.with_name("elsewhere"))
    cache.symlink_to("elsewhere")


def _pipe(cache: Path) -> None:
    cache.unlink()
    os.mkfifo(cache, 0o600)


def _folder(cache: Path) -> None:
    cache.unlink()
    cache.mkdir()


ATTACKS: dict[str, Callable[[Path], object]] = {
    "a file everybody may write": lambda cache: cache.chmod(0o602),
    "a file a group may write": lambda cache: (os.chown(cache, -1, 65534), cache.chmod(0o620)),
    "a folder everybody may write": lambda cache: cache.parent.chmod(0o707),
    "a folder above that everybody may write": lambda cache: cache.parents[1].chmod(0o777),
    "a pipe": _pipe,
    "a folder": _folder,
    "a link": _link,
    "a file of somebody else's": _nobodys,
    "a folder of somebody else's": lambda cache: _nobodys(cache.parent),
    "a folder above of somebody else's": lambda cache: _nobodys(cache.parents[1]),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_cache_that_others_can_write_is_not_believed(
    cached: tuple[Path, Path], attack: str
) -> None:
    file, cache = cached
    try:
        ATTACKS[attack](cache)
    except PermissionError:
        pytest.skip("only root gives files away")
    assert weights_digest(file) == f"sha256:{hexed(b'weights')}"


@pytest.mark.usefixtures("settled")
def test_a_folder_that_others_can_write_gets_no_cache(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    weights_digest(model(tmp_path / "m"), cache_dir=tmp_path / "open")
    assert list((tmp_path / "open").iterdir()) == []


@pytest.mark.usefixtures("settled")
def test_the_cache_is_made_for_the_user_alone(tmp_path: Path) -> None:
    (tmp_path / "xdg").mkdir(mode=0o700)
    before = os.umask(0)
    try:
        weights_digest(model(tmp_path / "m"))
    finally:
        os.umask(before)
    cache = tmp_path / "xdg" / "kvlayer" / "weights.sha256"
    assert (cache.parent.stat().st_mode & 0o777, cache.stat().st_mode & 0o777) == (0o700, 0o600)


BLOB_ATTACKS: dict[str, Callable[[Path, Path], object]] = {
    "a blob everybody may write": lambda blob, _: blob.chmod(0o666),
    "a blob of somebody else's": lambda blob, _: _nobodys(blob),
    "blobs in a folder everybody may write": lambda blob, _: blob.parent.chmod(0o777),
    "a cache everybody may write": lambda blob, _: blob.parents[1].chmod(0o777),
    "a snapshot everybody may write": lambda _, snapshot: snapshot.chmod(0o777),
    "a link of somebody else's": lambda _, snapshot: os.lchown(
        snapshot / "model.safetensors", 65534, 65534
    ),
    "a blob that was written to after it was linked": lambda blob, _: os.utime(
        blob, (time.time() + 10,) * 2
    ),
    "a blob whose time of writing was set back": lambda blob, snapshot: _set_back(
        blob, snapshot / "model.safetensors"
    ),
}


def _set_back(blob: Path, link: Path) -> None:
    """Write to a blob in the kernel's next tick, and give it the time it had."""
    before = blob.stat()
    while blob.stat().st_ctime_ns <= link.lstat().st_ctime_ns:
        blob.write_bytes(b"weights")
        os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert blob.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("attack", BLOB_ATTACKS)
def test_the_name_of_a_blob_that_others_can_write_is_not_believed(
    tmp_path: Path, attack: str
) -> None:
    snapshot = hub(tmp_path / "hub", FORGED, b"weights")
    file = snapshot / "model.safetensors"
    assert weights_digest(file) == f"sha256:{FORGED}"
    try:
        BLOB_ATTACKS[attack](tmp_path / "hub" / "blobs" / FORGED, snapshot)
    except PermissionError:
        pytest.skip("only root gives files away")
    assert weights_digest(file) == f"sha256:{hexed(b'weights')}"


def test_reading_the_whole_believes_no_blob_and_no_cache(
    tmp_path: Path, cached: tuple[Path, Path]
) -> None:
    blob = hub(tmp_path / "hub", FORGED, b"weights") / "model.safetensors"
    for file in (blob, cached[0]):
        assert weights_digest(file, whole=True) == f"sha256:{hexed(b'weights')}"


def test_a_blob_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    snapshot = hub(tmp_path / "hub", FORGED, b"weights")
    blob = tmp_path / "hub" / "blobs" / FORGED
    blob.unlink()
    os.mkfifo(blob)
    assert "regular" in refusal(snapshot)

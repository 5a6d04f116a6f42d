"""Whatever breaks in the cache, generation goes on; what must not meet never does."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from kvlayer import Scope
from kvlayer.api.cache import Cache
from kvlayer.errors import IdentityError, LayoutError, UnsupportedError
from kvlayer_transformers import Session

OpenSession = Callable[..., Session]
Prompt = Callable[..., list[int]]
Tiny = Callable[..., Any]

NEW: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def object_of(directory: Path, session: Session, ids: list[int], chunk: int) -> Path:
    name = session.portal.cache.chain(ids, Scope()).hashes[chunk].hex()
    (path,) = directory.glob(f"v2/*/{name[:2]}/{name}-*")
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[4096 + 100] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [(cut, "truncated"), (flip, "corrupt")])
def test_a_damaged_object_ends_the_prefix_before_it(
    llama: Any,
    open_session: OpenSession,
    prompt: Prompt,
    tmp_path: Path,
    damage: tuple[Callable[[Path], None], str],
) -> None:
    ids, (inflict, cause) = prompt(150), damage
    with open_session(llama, tmp_path) as session:
        cold = session.generate(ids, **NEW)
        inflict(object_of(tmp_path, session, ids, 5))
    session = open_session(llama, tmp_path)
    short = session.generate(ids, **NEW)
    assert short.loaded == 64  # chunk 5 begins at token 80, the pass before it ends at 64
    assert [str(failure.cause) for failure in short.failed] == [cause]
    assert torch.equal(short.sequences, cold.sequences)
    assert session.troubles == 0
    healed = open_session(llama, tmp_path).generate(ids, **NEW)
    assert (healed.loaded, healed.failed) == (128, ())
    assert torch.equal(healed.sequences, cold.sequences)


@pytest.mark.parametrize("broken", ["lookup", "retrieve", "store"])
def test_a_cache_that_raises_never_breaks_generation(
    llama: Any,
    open_session: OpenSession,
    prompt: Prompt,
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    ids = prompt(150)
    session = open_session(llama)
    expected = session.generate(ids, load=False, **NEW).sequences

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the dog ate it")

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Cache, broken, fail)
        runs = [session.generate(ids, **NEW) for _ in range(3)]
    assert all(torch.equal(run.sequences, expected) for run in runs)
    assert {run.loaded for run in runs} == ({128} if broken == "store" else {0})
    assert session.troubles == 3
    told = [record for record in caplog.records if "the dog ate it" in record.getMessage()]
    assert len(told) == 1


def test_misuse_is_not_taken_for_trouble(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    session = open_session(llama)
    with pytest.raises(UnsupportedError):
        session.save(prompt(40), None)
    assert session.troubles == 0


@pytest.mark.parametrize(
    "argument",
    [
        {"past_key_values": object()},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 16},
        {"num_beams": 2},
        {"num_return_sequences": 2},
        {"return_dict_in_generate": True},
        {"generation_config": GenerationConfig(num_beams=3)},
        {"inputs_embeds": torch.zeros(1, 40, 64)},
    ],
)
def test_arguments_that_stored_kv_cannot_honour_are_refused_by_name(
    llama: Any, open_session: OpenSession, prompt: Prompt, argument: dict[str, Any]
) -> None:
    named = "num_beams" if "generation_config" in argument else next(iter(argument))
    with pytest.raises(UnsupportedError, match=named):
        open_session(llama).generate(prompt(40), **NEW, **argument)


def test_arguments_at_their_defaults_are_no_reason_to_refuse(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    defaults = {"use_cache": True, "num_beams": 1, "cache_implementation": None}
    found = open_session(llama).generate(prompt(40), **NEW, **defaults).sequences
    assert torch.equal(found, llama.generate(torch.tensor([prompt(40)]), **NEW))


def test_a_model_in_training_mode_is_refused(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt
) -> None:
    model = tiny()
    session = open_session(model)
    model.train()
    with pytest.raises(UnsupportedError, match="training mode"):
        session.generate(prompt(40), **NEW)


def test_a_portal_of_another_model_is_refused(
    llama: Any, tiny: Tiny, open_session: OpenSession
) -> None:
    portal = open_session(llama).portal
    with pytest.raises(LayoutError, match="other KV groups"):
        Session(tiny(num_key_value_heads=4), portal)


def test_another_salt_never_hits(llama: Any, open_session: OpenSession, prompt: Prompt) -> None:
    ids = prompt(150)
    session = open_session(llama)
    session.generate(ids, scope=Scope.private("alice"), **NEW)
    assert session.load(ids, scope=Scope.private("alice")).columns == 128
    assert session.load(ids, scope=Scope.private("bob")).columns == 0
    assert session.load(ids).columns == 0


def test_a_salt_that_starts_late_shares_what_lies_before_it(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    ids = prompt(150)
    session = open_session(llama)
    session.generate(ids, scope=Scope.private("alice", first_token=96), **NEW)
    assert session.load(ids, scope=Scope.private("bob", first_token=96)).columns == 96
    assert session.load(ids).columns == 96


def test_a_model_with_an_adapter_needs_a_scope_that_names_it(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt
) -> None:
    model, ids = tiny(), prompt(70)
    model.peft_config = {"default": object()}
    session = open_session(model)
    with pytest.raises(UnsupportedError, match="scope names none"):
        session.generate(ids, **NEW)
    adapted = Scope(adapter=b"\1" * 32)
    session.generate(ids, scope=adapted, **NEW)
    assert session.load(ids, scope=adapted).columns == 64


@pytest.fixture
def folders(tiny: Tiny, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A model, the same model elsewhere, and another model under the first one's name."""
    first, copy, other = (tmp_path / place / "model" for place in ("here", "there", "other"))
    tiny(seed=0).save_pretrained(first)
    shutil.copytree(first, copy)
    tiny(seed=1).save_pretrained(other)
    return first, copy, other


def open_folder(open_session: OpenSession, model: Any, folder: Path, **options: Any) -> Session:
    loaded = type(model).from_pretrained(folder, **options.pop("load", {})).eval()
    store = folder.parents[1] / "kv"
    return open_session(loaded, store, weights=str(folder), **options)


def test_another_weights_file_under_the_same_name_is_another_namespace(
    llama: Any,
    open_session: OpenSession,
    prompt: Prompt,
    folders: tuple[Path, Path, Path],
) -> None:
    first, copy, other = folders
    ids = prompt(150)
    open_folder(open_session, llama, first).generate(ids, **NEW)
    assert open_folder(open_session, llama, copy).load(ids).columns == 128
    assert open_folder(open_session, llama, other).load(ids).columns == 0
    shutil.rmtree(first)
    shutil.copytree(other, first)
    assert open_folder(open_session, llama, first).load(ids).columns == 0


@pytest.mark.parametrize(
    "load",
    [
        {"dtype": torch.bfloat16},
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
    ],
)
def test_a_model_loaded_otherwise_is_another_namespace(
    llama: Any,
    open_session: OpenSession,
    prompt: Prompt,
    folders: tuple[Path, Path, Path],
    load: dict[str, Any],
) -> None:
    ids = prompt(150)
    open_folder(open_session, llama, folders[0]).generate(ids, **NEW)
    assert open_folder(open_session, llama, folders[0], load=load).load(ids).columns == 0


def test_engine_numerics_keep_other_pass_widths_apart(
    llama: Any,
    open_session: OpenSession,
    prompt: Prompt,
    folders: tuple[Path, Path, Path],
) -> None:
    ids, found = prompt(150), []
    for width in (32, 32, 64):
        session = open_folder(open_session, llama, folders[0], numerics="engine", pass_tokens=width)
        found.append(session.generate(ids, **NEW).loaded)
    assert found == [0, 128, 0]
    assert "transformers-" in session.portal.cache.namespace.numerics


def test_portable_numerics_share_over_pass_widths(
    llama: Any,
    open_session: OpenSession,
    prompt: Prompt,
    folders: tuple[Path, Path, Path],
) -> None:
    ids, found = prompt(150), []
    for width in (32, 64):
        session = open_folder(open_session, llama, folders[0], pass_tokens=width)
        found.append(session.generate(ids, **NEW).loaded)
    assert found == [0, 128]


def test_engine_numerics_without_weights_are_refused(llama: Any, open_session: OpenSession) -> None:
    with pytest.raises(IdentityError, match="needs the model's weights"):
        open_session(llama, weights="", numerics="engine")


def test_a_directory_without_known_weights_is_refused(
    llama: Any, open_session: OpenSession, tmp_path: Path
) -> None:
    with pytest.raises(IdentityError):
        open_session(llama, tmp_path, weights="")


def test_without_weights_kv_is_reused_within_the_process(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    session = open_session(llama, weights="")
    assert [session.generate(prompt(70), **NEW).loaded for _ in range(2)] == [0, 64]

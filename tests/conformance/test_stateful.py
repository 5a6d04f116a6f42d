"""Every backend answers as a dictionary would, whatever is done to it in whatever order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from honest import HonestBackend, Options
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import run_state_machine_as_test

from kvlayer.abc.backend import Backend, Read, ReadResult, Write, WriteResult
from kvlayer.config.registry import open_backend
from kvlayer.identity.keys import ChunkChain, ObjectKey
from kvlayer.testing import Broken, strategies
from kvlayer.testing.stateful import backend_machine
from kvlayer_backend_template import SQLiteBackend

BACKENDS: dict[str, tuple[Callable[[Path], Backend], bool]] = {
    "cpu": (lambda _: open_backend("cpu://?capacity=1MiB"), False),
    "cpu, full": (lambda _: open_backend("cpu://?capacity=48KiB"), True),
    "file": (lambda folder: open_backend(f"file://{folder}"), False),
    "template": (lambda folder: SQLiteBackend(str(folder / "kv.sqlite")), False),
    "honest": (lambda folder: HonestBackend(str(folder), Options()), False),
}


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_answers_as_a_dictionary_would(name: str, dose: Any, figures: Any) -> None:
    build, evicts = BACKENDS[name]
    examples, steps = dose(6, 400), dose(15, 50)
    run_state_machine_as_test(
        backend_machine(build, evicts=evicts),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    figures("conformance.stateful", backend=name, examples=examples, steps=steps)


class ForgetsAfterTheThird(HonestBackend):
    async def put_one(self, write: Write) -> WriteResult:
        if len(self.place.objects) == 3:
            return None
        return await super().put_one(write)


class MixesUpTwoOfABatch(HonestBackend):
    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        results = await super().get(reads)
        return results[::-1] if len({read.key for read in reads}) == 2 else results


@pytest.mark.parametrize("liar", [ForgetsAfterTheThird, MixesUpTwoOfABatch])
def test_the_machine_finds_a_liar(liar: type[HonestBackend]) -> None:
    with pytest.raises(Broken):
        run_state_machine_as_test(
            backend_machine(lambda folder: liar(str(folder), Options())),
            settings=settings(
                max_examples=400,
                stateful_step_count=20,
                deadline=None,
                derandomize=True,
                database=None,
                print_blob=False,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
                phases=[phase for phase in settings().phases if phase.name == "generate"],
            ),
        )


@given(key=strategies.object_keys(), payload=strategies.payloads(), layout=strategies.layouts())
def test_what_the_strategies_draw_is_valid(key: ObjectKey, payload: Any, layout: Any) -> None:
    assert ObjectKey.parse(key) == key
    assert payload.nbytes % 4096 == 0
    assert layout.groups[0].block_nbytes > 0


@given(tokens=strategies.prompts(), scope=strategies.scopes(), namespace=strategies.namespaces())
def test_what_the_strategies_draw_can_be_named(tokens: Any, scope: Any, namespace: Any) -> None:
    chain = ChunkChain(
        tokens,
        scope,
        tokens_per_chunk=namespace.tokens_per_chunk,
        tokens_per_tail=namespace.tokens_per_tail,
    )
    assert len(chain) == len(tokens) // namespace.tokens_per_chunk

"""Other people's code: whatever it raises costs its owner, never the caller."""

from __future__ import annotations

import ast
import asyncio
import gc
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from kvlayer.errors import ForeignError
from kvlayer.runtime.foreign import Foreign, awaited, bounded, words
from kvlayer.testing.sim import in_virtual_time

SOURCES = Path(__file__).parents[2] / "src" / "kvlayer"


class Own(BaseException):
    """Somebody's own way out."""


def raising(error: BaseException) -> Callable[[], Awaitable[None]]:
    async def work() -> None:
        await asyncio.sleep(0)
        raise error

    return work


# -- awaited --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [SystemExit(3), GeneratorExit(), asyncio.CancelledError(), Own("x")]
)
@in_virtual_time
async def test_what_must_not_reach_the_loop_is_an_error_of_ours(error: BaseException) -> None:
    task = asyncio.ensure_future(awaited(raising(error)))
    await asyncio.wait({task})
    assert isinstance(task.exception(), ForeignError)
    assert type(error).__name__ in str(task.exception())
    assert task.exception().__cause__ is error  # type: ignore[union-attr]


@pytest.mark.parametrize("error", [ValueError("x"), RecursionError(), MemoryError()])
@in_virtual_time
async def test_an_exception_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        await awaited(raising(error))
    assert raised.value is error


def test_an_interrupt_passes() -> None:
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(awaited(raising(KeyboardInterrupt())))  # type: ignore[arg-type]


@in_virtual_time
async def test_cancelling_the_caller_is_no_error_of_the_code() -> None:
    task = asyncio.ensure_future(awaited(asyncio.Event().wait))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


def test_a_coroutine_that_is_closed_is_no_error_of_the_code() -> None:
    loop = asyncio.new_event_loop()
    work = awaited(loop.create_future)
    with pytest.raises(RuntimeError, match="no running event loop"):
        work.send(None)
    loop.close()

    async def hold() -> None:
        await awaited(asyncio.Event().wait)

    async def closes() -> None:
        held = hold()
        task = asyncio.ensure_future(_stepped(held))
        await asyncio.sleep(0)
        held.close()
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(closes())


async def _stepped(work: object) -> None:
    work.send(None)  # type: ignore[attr-defined]
    await asyncio.Event().wait()


# -- bounded --------------------------------------------------------------------------------------


class Refusing:
    """Ends when it is allowed to, and not when it is cancelled."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.ends = 0

    async def __call__(self) -> str:
        while not self.may_end.is_set():
            try:
                await self.may_end.wait()
            except asyncio.CancelledError:
                pass
        self.ends += 1
        raise ZeroDivisionError  # nobody hears it


@in_virtual_time
async def test_code_that_refuses_to_be_cancelled_is_waited_for_so_long_and_no_longer() -> None:
    loop, refusing = asyncio.get_running_loop(), Refusing()
    complaints: list[object] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    began = loop.time()
    with pytest.raises(TimeoutError, match="not done within 2 s"):
        await bounded(refusing, 2.0)
    assert loop.time() - began == pytest.approx(3.0)  # and a second to end after all
    assert refusing.ends == 0
    refusing.may_end.set()
    await asyncio.sleep(1)
    gc.collect()
    assert (refusing.ends, complaints) == (1, [])


@in_virtual_time
async def test_whoever_waits_for_code_that_refuses_can_be_cancelled() -> None:
    loop, refusing = asyncio.get_running_loop(), Refusing()
    began = loop.time()
    waiter = asyncio.ensure_future(bounded(refusing, 1000.0))
    await asyncio.sleep(1)
    waiter.cancel()
    await asyncio.sleep(0.5)
    waiter.cancel()  # asked again: the code has its second all the same
    await asyncio.wait({waiter})
    assert waiter.cancelled()
    assert loop.time() - began == pytest.approx(2.0)
    refusing.may_end.set()


@in_virtual_time
async def test_what_ends_in_time_is_answered_and_what_ends_when_cancelled_is_waited_for() -> None:
    async def answer() -> int:
        await asyncio.sleep(1)
        return 3

    cleared: list[bool] = []

    async def clear() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.5)
            cleared.append(True)

    assert await bounded(answer, 2.0) == 3
    with pytest.raises(TimeoutError):
        await bounded(clear, 1.0)
    assert cleared == [True]
    with pytest.raises(ZeroDivisionError):
        await bounded(raising(ZeroDivisionError()), 1.0)
    with pytest.raises(ForeignError):
        await bounded(raising(asyncio.CancelledError()), 1.0)


# -- called ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(1), GeneratorExit(), Own()])
def test_what_a_function_raises_is_counted_and_logged(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise error

    foreign = Foreign()
    assert not foreign.call("sink", fails)
    assert (foreign.costs()["sink"].calls, foreign.costs()["sink"].errors) == (1, 1)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert type(error).__name__ in caplog.text


def test_many_errors_are_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    foreign = Foreign()
    for _ in range(100):
        foreign.call("sink", int, "no number")
    assert foreign.costs()["sink"].errors == 100
    assert len(caplog.records) == 7


def test_an_interrupt_of_a_function_passes() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Foreign().call("sink", interrupt)


def test_a_function_that_holds_the_loop_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ticks: Iterator[float] = iter([0.0, 0.001, 1.0, 1.5, 2.0, 2.6, 3.0, 6.0])
    monkeypatch.setattr("kvlayer.runtime.foreign.perf_counter", lambda: next(ticks))
    foreign = Foreign()
    for _ in range(4):  # 1 ms, 0.5 s, 0.6 s, 3 s: the third says nothing new
        assert foreign.call("on_gathered", int)
    said = [record.getMessage() for record in caplog.records]
    assert [text[-7:] for text in said] == ["0.500 s", "3.000 s"]
    assert foreign.costs()["on_gathered"].longest_seconds == 3.0


# -- words ----------------------------------------------------------------------------------------


class Unspeakable(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise ValueError("no text")


def test_words_are_bounded_and_never_raise() -> None:
    assert words(ValueError("x")) == "ValueError: x"
    assert words(ValueError()) == "ValueError"
    assert len(words(ValueError("x" * 10_000_000))) < 400
    assert words(Unspeakable()) == "Unspeakable: (its text raised ValueError)"


# -- one door -------------------------------------------------------------------------------------

DOORS = {
    "runtime/foreign.py",
    "tier/transfer/objects.py",
    "tier/transfer/device.py",
    "tier/transfer/listing.py",
    "tier/transfer/named.py",
}
"""Where foreign code may be called by name: these run behind a guard, or are the door itself."""
BACKEND = {"contains", "get", "put", "delete", "quarantine", "touch", "describe", "list", "open"}
BACKEND |= {"namespaces", "aclose"}
OBJECTS = {"contains", "put", "get", "quarantine", "delete", "touch", "probe", "namespaces"}
CALLBACKS = {"sink", "on_gathered", "on_layer", "landed"}


def _direct_calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        text = ast.unparse(node.func)
        owner, _, name = text.rpartition(".")
        if (
            (name in BACKEND and owner.endswith("backend"))
            or (name in OBJECTS and owner.endswith(("_objects", "stack.objects")))
            or text.removeprefix("self._") in CALLBACKS
        ):
            yield text


def test_foreign_code_is_called_behind_a_guard_or_through_the_door() -> None:
    found = {
        f"{path.relative_to(SOURCES)}: {call}"
        for path in [
            *SOURCES.glob("*.py"),
            *SOURCES.glob("api/*.py"),
            *SOURCES.rglob("tier/**/*.py"),
        ]
        if str(path.relative_to(SOURCES)) not in DOORS
        for call in _direct_calls(ast.parse(path.read_text(encoding="utf-8")))
    }
    # The only one: what it is in is given to a guard, which awaits it through the door.
    allowed = {
        "api/explain.py: cache.stack.objects.namespaces",
        "api/explain.py: cache.stack.objects.contains",
    }
    assert found <= allowed


@pytest.mark.parametrize(
    "text", ["tier.backend.get(x)", "self._objects.touch(1)", "sink(e)", "self._landed(0, 1)"]
)
def test_the_lint_sees_a_direct_call(text: str) -> None:
    assert len(list(_direct_calls(ast.parse(text)))) == 1

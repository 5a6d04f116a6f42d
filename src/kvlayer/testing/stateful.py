"""Any backend against a dictionary: a Hypothesis machine that looks for a short wrong answer.

::

    TestAcme = backend_machine(lambda folder: AcmeBackend(folder)).TestCase
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvlayer.abc.backend import Backend, Capability, Damaged, Hit, Miss, Read, Write
from kvlayer.identity.keys import ObjectKey
from kvlayer.testing.loan import PAGE, Loan
from kvlayer.testing.promise import Hung, broken, expect, same_bytes
from kvlayer.testing.strategies import contents, cuts
from kvlayer.testing.trial import Trial

__all__ = ["BackendMachine", "backend_machine"]

T = TypeVar("T")

Build: TypeAlias = Callable[[Path], Backend]

_DEADLINE_SECONDS = 60.0
_KEYS = 5
_MAX_PAGES = 4
_NUMBERS = st.integers(0, _KEYS - 1)
_BATCHES = st.lists(_NUMBERS, min_size=1, max_size=6)


def backend_machine(build: Build, *, evicts: bool = False) -> type[BackendMachine]:
    """A machine for the backend that ``build`` makes of a fresh folder, unopened.

    It is called again for what opens beside it (``SHARED``) and after it (``PERSISTENT``).
    ``evicts``: objects may go by themselves, but never come back or change.
    """
    return type(
        "BackendMachine", (BackendMachine,), {"build": staticmethod(build), "evicts": evicts}
    )


class BackendMachine(RuleBasedStateMachine):
    """See :func:`backend_machine`."""

    build: Build
    evicts = False

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(prefix="kvlayer-", ignore_cleanup_errors=True)
        self._runner = asyncio.Runner()
        self._thread = ThreadPoolExecutor(1, "kvlayer-machine")  # this one may run a loop already
        self._trial = Trial(lambda: self.build(Path(self._folder.name)))
        self._keys = [self._trial.key(n) for n in range(_KEYS)]
        self.model: dict[ObjectKey, bytes] = {}
        self._run(self._trial.start(self._trial.backend))
        self._sides = [self._trial.backend]
        if self._has(Capability.SHARED):
            self._sides.append(self._run(self._trial.another()))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._thread.submit(self._runner.run, work).result(_DEADLINE_SECONDS)
        except TimeoutError:
            raise Hung(repr(work)) from None

    def _has(self, capability: Capability) -> bool:
        return capability in self._trial.backend.capabilities

    def _side(self, number: int) -> Backend:
        return self._sides[number % len(self._sides)]

    def _content(self, number: int, drawn: bytes) -> bytes:
        """Other bytes each time, unless a writer cannot know whether it is the first."""
        return (
            bytes([number]) * PAGE * (1 + number) if self.evicts else bytes([number]) * PAGE + drawn
        )

    # -- rules -----------------------------------------------------------------------------------

    @rule(numbers=_BATCHES, content=contents(_MAX_PAGES), side=st.booleans(), seed=st.data())
    def put(self, numbers: list[int], content: bytes, side: bool, seed: st.DataObject) -> None:
        """A batch of writes, some of keys that are there, some named twice: the first wins."""
        pages = seed.draw(cuts(len(content) // PAGE))
        keys = [self._keys[n] for n in numbers]
        mine = [self._content(n, content) for n in numbers]
        loans = [Loan(len(each), each) for each in mine]
        writes = [Write(k, loan.regions(pages)) for k, loan in zip(keys, loans, strict=True)]
        results = self._run(self._side(side).put(writes))
        expect(results, [None] * len(keys), "the results of put()")
        for key, each in zip(keys, mine, strict=True):
            self.model.setdefault(key, each)

    @rule(
        numbers=_BATCHES,
        offset=st.integers(0, _MAX_PAGES + 2),
        pages=st.lists(st.integers(1, 3), min_size=1, max_size=3),
        side=st.booleans(),
    )
    def get(self, numbers: list[int], offset: int, pages: list[int], side: bool) -> None:
        """A batch of reads, from any page on, into any regions."""
        keys = [self._keys[n] for n in numbers]
        loans = [Loan(sum(pages) * PAGE) for _ in keys]
        reads = [
            Read(key, loan.regions(pages), offset * PAGE)
            for key, loan in zip(keys, loans, strict=True)
        ]
        results = self._run(self._side(side).get(reads))
        expect(len(results), len(keys), "the number of results")
        for key, loan, result in zip(keys, loans, results, strict=True):
            self._answers(key, result, loan, offset * PAGE)

    def _answers(self, key: ObjectKey, result: object, loan: Loan, offset: int) -> None:
        stored = self.model.get(key)
        if isinstance(result, Miss) and (stored is None or self._went(key)):
            return
        if stored is None or not isinstance(result, Hit):
            broken("Miss()" if stored is None else "a Hit", result)
        wanted = stored[offset : offset + loan.nbytes]
        expect(result, Hit(len(wanted)), f"get() from {offset} on of {len(stored)} bytes")
        same_bytes(loan.content(result.nbytes), wanted, "an object")

    @rule(numbers=_BATCHES, side=st.booleans())
    def contains(self, numbers: list[int], side: bool) -> None:
        keys = [self._keys[n] for n in numbers]
        for key, size in zip(keys, self._run(self._side(side).contains(keys)), strict=True):
            stored = self.model.get(key)
            if size is None and stored is not None and self._went(key):
                continue
            expect(size, None if stored is None else len(stored), "the size in contains()")

    @rule(numbers=_BATCHES, side=st.booleans(), corrupt=st.booleans())
    def delete(self, numbers: list[int], side: bool, corrupt: bool) -> None:
        backend, keys = self._side(side), [self._keys[n] for n in numbers]
        items = [Damaged(key) for key in keys]
        results = self._run(backend.quarantine(items) if corrupt else backend.delete(keys))
        expect(results, [None] * len(keys), "the results of a deletion")
        for key in keys:
            self.model.pop(key, None)

    @rule(numbers=_BATCHES, side=st.booleans())
    def touch(self, numbers: list[int], side: bool) -> None:
        self._run(self._side(side).touch([self._keys[n] for n in numbers]))

    @rule(number=_NUMBERS, turns=st.integers(0, 12), content=contents(_MAX_PAGES))
    def cancelled_put(self, number: int, turns: int, content: bytes) -> None:
        """Whole or absent; which of the two is the backend's to say, once."""
        key, content = self._keys[number], self._content(number, content)
        loan = Loan(len(content), content)

        async def cancel() -> None:
            task = asyncio.ensure_future(self._side(0).put([Write(key, loan.regions())]))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                expect(task.result(), [None], "the results of put()")

        self._run(cancel())
        loan.poison()
        if key not in self.model:
            (size,) = self._run(self._side(0).contains([key]))
            if size is not None:
                self.model[key] = content

    @precondition(lambda self: self._has(Capability.PERSISTENT))
    @rule()
    def restart(self) -> None:
        """Close every instance, and open others."""
        for backend in self._sides:
            self._run(self._trial.close(backend))
        self._sides = [self._run(self._trial.another()) for _ in self._sides]

    @precondition(lambda self: self._has(Capability.LIST))
    @invariant()
    def listed(self) -> None:
        found = self._run(self._trial.listed(on=self._side(1)))
        for key in self.model.keys() - found.keys():
            if not self._went(key):
                broken("every object in list()", f"{key} is missing")
        expected = {key: len(stored) for key, stored in self.model.items()}
        expect(found, expected, "key -> bytes in list()")

    def _went(self, key: ObjectKey) -> bool:
        """An object that is gone may have been evicted, and does not come back."""
        if self.evicts:
            self.model.pop(key, None)
        return self.evicts

    def teardown(self) -> None:
        try:
            for backend in self._sides:
                self._run(self._trial.close(backend))
        finally:
            self._thread.submit(self._runner.close).result(_DEADLINE_SECONDS)
            self._thread.shutdown()
            self._folder.cleanup()

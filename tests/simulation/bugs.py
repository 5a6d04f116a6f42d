"""Eleven planted bugs, one for each scenario, as patches of one function each.

A patch names the text it takes away, which has to be there exactly once: where the product has
moved on, planting fails and says so, in place of proving nothing.
"""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvlayer.tier.epochs import Epochs
from kvlayer.tier.guard.guard import Guard
from kvlayer.tier.planner import plan
from kvlayer.tier.planner.holdings import Holdings
from kvlayer.tier.planner.host import HostTier
from kvlayer.tier.planner.lease import LeaseTable
from kvlayer.tier.planner.lookup_planner import LookupPlanner
from kvlayer.tier.planner.planner import Planner
from kvlayer.tier.stack import Stack
from kvlayer.tier.storing import Storing
from kvlayer_backends.file.ledger import Ledger

__all__ = ["BUGS", "RACES", "UNCHECKED", "UNPLACED", "Bug"]


@dataclass(frozen=True)
class Bug:
    """``takes`` is replaced by ``gives`` in the source of ``function``."""

    what: str
    function: Callable[..., Any]
    takes: str
    gives: str

    @contextmanager
    def planted(self) -> Generator[None]:
        """The function as patched, for all who have it, until the block ends."""
        function: Any = inspect.unwrap(self.function)
        source = textwrap.dedent(inspect.getsource(function))
        found = source.count(self.takes)
        assert found == 1, f"{self.what}: the text is {found} times in {function.__qualname__}"
        patched = source.replace(self.takes, self.gives)
        flags = __future__.annotations.compiler_flag
        names: dict[str, Any] = dict(function.__globals__)
        # Where it stands in its file: tracebacks and watchers of that file know it.
        patched = "\n" * (function.__code__.co_firstlineno - 1) + patched
        file = function.__code__.co_filename
        code = compile(patched, file, "exec", flags, dont_inherit=True)
        exec(code, names)  # noqa: S102  # the product's own source, but for one patch
        healthy = function.__code__
        function.__code__ = inspect.unwrap(names[function.__name__]).__code__
        try:
            yield
        finally:
            function.__code__ = healthy


BUGS = {
    "eviction_against_lookup": Bug(
        "what a move still reads may be evicted",
        HostTier.victim,
        "if not found.pins:",
        "if not found.pins or found.host is Host.READY:",
    ),
    "dying_writer": Bug(
        "a gather that was cut off counts as one that missed nothing",
        Planner.gathered,
        "todo.cut(missed, self.tiers[0])",
        "todo.cut(missed or (), self.tiers[0])",
    ),
    "flapping_tier": Bug(
        "a tier that fails its probe is never asked again",
        Guard._probed,
        "if not breaker.is_closed:",
        "if breaker.is_half_open:",
    ),
    "cancellation": Bug(
        "a retrieve that is cancelled keeps its pins",
        Stack.retrieve,
        "    finally:\n        try:\n            await to_the_end(reading.closing())",
        "    except ZeroDivisionError:\n        raise\n    else:\n        try:\n"
        "            await to_the_end(reading.closing())",
    ),
    "lease_expiry": Bug(
        "a lease that has run out keeps its pins",
        LeaseTable.expire,
        "count = self._let_go(self._ending[0], room)",
        "count = len(self._ending[0].held)\n        self._ending[0].held.clear()",
    ),
    "janitor_hand_over": Bug(
        "who takes office does not count what it finds",
        Ledger.discover,
        "or self._is_newer(key):",
        "or not self._is_newer(key):",
    ),
    "back_pressure": Bug(
        "a write that has ended holds its object on",
        Planner.spilled,
        "self.host.let_go((record,))",
        "pass",
    ),
    "two_planners": Bug(
        "what another process took away is offered again and again",
        Holdings.missing,
        "self._directory.drop_tier(record, tier)",
        "pass",
    ),
    "rebinding": Bug(
        "what moves when its epoch ends is neither stopped nor waited for",
        Epochs.within,
        "_OF_NONE if epoch is None else _Within(self, epoch)",
        "_OF_NONE",
    ),
    "full_memory": Bug(
        "scratch is taken before slots: a store that waits for room holds some meanwhile",
        Storing._room,
        "return await self._patience.wait(asyncio.ensure_future(self._news()), self._now())",
        """arena = self._stack.objects._arenas.writes
    taken = arena.take([arena.nbytes - arena.used_nbytes])
    try:
        return await self._patience.wait(asyncio.ensure_future(self._news()), self._now())
    finally:
        if taken is not None:
            taken.give_back()""",
    ),
    "sparse_states": Bug(
        "a hit ends without a state of one of the groups",
        plan.ending,
        "for g in ends]",
        "for g in ends[:-1]]",
    ),
}
"""By the scenario that is meant to find it."""

UNPLACED = Bug(
    "a hit that became shorter is loaded where the view has no slot for its state",
    Stack.retrieve,
    "if not self._has_place(view, window, bound):",
    "if False:",
)
"""For ``sparse_states``, beside its own."""

UNCHECKED = Bug(
    "what was gathered is served without a look at its epoch",
    Planner.gathered,
    "if todo.chain.is_stale:",
    "if False:",
)
"""For ``rebinding``, beside its own: then nothing keeps new KV from names of old."""

RACES = {
    "found, then leased": Bug(
        "something goes between being found and being leased",
        LookupPlanner.leasing,
        "with self.lock, self._presuming(chain, runs):",
        "with self._presuming(chain, runs):",
    ),
    "claimed without the lock": Bug(
        "what a lease holds is pinned a moment after it was looked at",
        Planner.claiming,
        "with self.lock:\n            if is_whole",
        "if True:\n            if is_whole",
    ),
}
"""Races of threads, for the schedule to find."""

"""The conformance kit: what any backend, policy, frame or engine adapter promises, as suites.

The simulator is beside it: :mod:`~kvlayer.testing.sim`, ``faults``, ``invariants``, ``schedule``.
Nothing here is imported by the product. Only :mod:`~kvlayer.testing.strategies` and
:mod:`~kvlayer.testing.stateful` need hypothesis, only :mod:`~kvlayer.testing.plugin` is pytest's.
Names are resolved when they are first used: the plugin is loaded into every run of pytest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvlayer.testing.bounded import run_bounded
    from kvlayer.testing.loan import Loan
    from kvlayer.testing.promise import Broken, Need, Promise, promise
    from kvlayer.testing.suite import Outcome, Suite, Verdict
    from kvlayer.testing.suites.adapter import AdapterSuite
    from kvlayer.testing.suites.backend import BackendSuite
    from kvlayer.testing.suites.frame import FrameSuite
    from kvlayer.testing.suites.policy import PolicySuite
    from kvlayer.testing.trial import Trial

__all__ = [
    "AdapterSuite",
    "BackendSuite",
    "Broken",
    "FrameSuite",
    "Loan",
    "Need",
    "Outcome",
    "PolicySuite",
    "Promise",
    "Suite",
    "Trial",
    "Verdict",
    "promise",
    "run_bounded",
]

_HOMES = {
    "bounded": ("run_bounded",),
    "loan": ("Loan",),
    "promise": ("Broken", "Need", "Promise", "promise"),
    "suite": ("Outcome", "Suite", "Verdict"),
    "suites.adapter": ("AdapterSuite",),
    "suites.backend": ("BackendSuite",),
    "suites.frame": ("FrameSuite",),
    "suites.policy": ("PolicySuite",),
    "trial": ("Trial",),
}
_HOME_OF = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    # Submodules named like what they hold (promise) shadow nothing: the import sets the module as
    # attribute, and the line below puts the name in its place.
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

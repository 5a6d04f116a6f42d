"""What a liar is: an honest backend but for one step, and the one promise it breaks by that."""

from __future__ import annotations

import threading
from collections.abc import Callable

from honest import HonestBackend, Place

from kvlayer.config.registry import BACKENDS
from kvlayer.identity.keys import ObjectKey
from kvlayer.testing.bounded import Patience
from kvlayer.testing.suite import Outcome
from kvlayer.testing.suites.backend import BackendSuite

__all__ = ["HELD_UP", "LIARS", "PAGE", "HonestSuite", "breaks", "found_in"]

PAGE = 4096
LIARS: dict[type[HonestBackend], tuple[str, Outcome]] = {}
"""Liar -> the promise it breaks, and how that looks."""


def breaks(
    name: str, outcome: Outcome = Outcome.BROKEN
) -> Callable[[type[HonestBackend]], type[HonestBackend]]:
    def register(liar: type[HonestBackend]) -> type[HonestBackend]:
        LIARS[liar] = (name, outcome)
        return liar

    return register


class HonestSuite(BackendSuite):
    """All promises, in small."""

    backends = BACKENDS.extended({"honest": HonestBackend})
    url = "honest://{directory}"
    small_url = "honest://{directory}?capacity=256KiB"
    large_nbytes = 64 * PAGE
    many_objects = 110
    many_keys = 200
    many_regions = 40

    def truncate(self, key: ObjectKey, nbytes: int, /) -> None:
        objects = Place.at(str(self.directory)).objects
        objects[key] = objects[key][:nbytes]


class HeldUp:
    """A point at which a liar stays for ever; patience with it ends when it gets there."""

    def __init__(self) -> None:
        self.reached = threading.Event()

    def patience(self) -> Patience:
        self.reached.clear()

        def wait(done: threading.Event) -> bool:
            while not done.wait(0.005):
                if self.reached.is_set():
                    return False
            return True

        return wait


HELD_UP = HeldUp()


class LiarSuite(HonestSuite):
    def patience(self) -> Patience:
        return HELD_UP.patience()


def found_in(liar: type[HonestBackend]) -> dict[str, Outcome]:
    class Asked(LiarSuite):
        backends = BACKENDS.extended({"honest": liar})

    return {v.promise.name: v.outcome for v in Asked().run() if not v.is_good}

"""The suite of a backend: every promise of ``kvlayer.abc.backend``, in five groups."""

from __future__ import annotations

from kvlayer.testing.suites.batches import BatchPromises
from kvlayer.testing.suites.cancelling import CancelPromises
from kvlayer.testing.suites.keeping import KeepingPromises
from kvlayer.testing.suites.lifetime import LifetimePromises
from kvlayer.testing.suites.objects import ObjectPromises

__all__ = ["BackendSuite"]


class BackendSuite(
    LifetimePromises, KeepingPromises, CancelPromises, BatchPromises, ObjectPromises
):
    """All that any backend must keep. Three lines are a test module::

        class TestAcme(BackendSuite):
            url = "acme://{directory}?capacity=64MiB"
            small_url = "acme://{directory}?capacity=512KiB"

    See :class:`~kvlayer.testing.suites.place.BackendPlace` for what a subclass may say.
    """

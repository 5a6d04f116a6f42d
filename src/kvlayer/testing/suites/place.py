"""Where a suite of a backend finds its backend: what a subclass says, and what follows from it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar

from kvlayer.abc.backend import Backend, Capability
from kvlayer.config.registry import BACKENDS, Registry, open_backend
from kvlayer.errors import ConfigError
from kvlayer.identity.keys import ObjectKey
from kvlayer.testing.promise import Need, Promise
from kvlayer.testing.suite import Suite
from kvlayer.testing.trial import Trial
from kvlayer.urls import BackendURL, parse_bytes

__all__ = ["BackendPlace"]


class BackendPlace(Suite):
    """Set ``url``, or override :meth:`build`. Everything else has a default.

    In a URL, ``{directory}`` stands for a folder that is fresh for each promise and removed after
    it; a backend without one gets back its objects by deletion.
    """

    url: ClassVar[str] = ""
    backends: ClassVar[Registry[type[Backend]]] = BACKENDS
    """Who answers to URLs: the installed ones, or ``BACKENDS.extended(...)``."""
    small_url: ClassVar[str] = ""
    """A tier whose ``capacity`` a test can exceed, at least 256 KiB: it is filled several times."""
    large_nbytes: ClassVar[int] = 16 << 20
    """The largest object that is tried; a multiple of 4 KiB."""
    many_objects: ClassVar[int] = 1200
    """How many a listing must show: more than stores answer with at a time."""
    many_keys: ClassVar[int] = 4096
    """How many one call may name, as the lookup of a long prompt does."""
    many_regions: ClassVar[int] = 1100
    """How many regions one object may have: more than a system call takes."""
    is_disposable: ClassVar[bool] = True
    """Whether what cannot be undone (filling, quarantine, descriptions) may be done."""

    stored: AbstractSet[ObjectKey] = frozenset()
    """What the last promise may have stored. Gone, unless clearing up hung with it."""
    directory: Path = Path(tempfile.gettempdir(), "kvlayer-not-there")
    """The fresh folder, while a promise runs."""

    def build(self) -> Backend:
        """An unopened backend; every call makes an instance of the same place."""
        return self._of(self.url)

    def build_small(self) -> Backend:
        """The same for ``small_url``."""
        return self._of(self.small_url)

    def truncate(self, key: ObjectKey, nbytes: int, /) -> None:
        """Cut a stored object to ``nbytes`` bytes behind the backend's back.

        Override it where that can be done; the place is ``directory``.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot shorten {key}: override truncate(), or leave out the "
            "promises that need it, as why_not() does"
        )

    def _of(self, url: str) -> Backend:
        if not url:
            raise ConfigError(
                f"{type(self).__name__} has no backend to look at",
                hint="set url or override build(); with pytest, --kvlayer-backend URL does, too",
            )
        return open_backend(self.placed(url), backends=self.backends)

    def placed(self, url: str) -> str:
        """The URL with this promise's folder in it."""
        return url.replace("{directory}", str(self.directory))

    @cached_property
    def capabilities(self) -> frozenset[Capability]:
        return self.build().capabilities

    @cached_property
    def introduces(self) -> bool:
        """Whether the backend does anything with memory that is introduced to it."""
        return type(self.build()).introduce is not Backend.introduce

    @property
    def small_capacity_nbytes(self) -> int:
        """What the URL of the small tier says."""
        return parse_bytes(BackendURL.parse(self.placed(self.small_url)).options["capacity"])

    @property
    def has_folder(self) -> bool:
        """Whether everything a promise leaves is removed with its folder."""
        return "{directory}" in self.url

    def why_not(self, promise: Promise, /) -> str | None:
        has = {
            Need.LIST: Capability.LIST in self.capabilities,
            Need.NO_LIST: Capability.LIST not in self.capabilities,
            Need.PERSISTENT: Capability.PERSISTENT in self.capabilities,
            Need.SHARED: Capability.SHARED in self.capabilities,
            Need.REVOCABLE: Capability.REVOCABLE in self.capabilities,
            Need.INTRODUCED: self.introduces,
            Need.URL: bool(self.url),
            Need.DIRECTORY: self.has_folder,
            Need.SMALL: bool(self.small_url) or _overrides(self.build_small),
            Need.TRUNCATE: _overrides(self.truncate),
            Need.DISPOSABLE: self.is_disposable,
        }
        return next((str(need) for need in promise.needs if not has[need]), None)

    async def keep(self, promise: Promise, /) -> None:
        build = self.build_small if Need.SMALL in promise.needs else self.build
        with tempfile.TemporaryDirectory(prefix="kvlayer-", ignore_cleanup_errors=True) as folder:
            self.directory = Path(folder)
            async with Trial.opened(build, clears=not self.has_folder) as trial:
                self.stored = trial.keys
                await promise.check(self, trial)

    def built_elsewhere(self) -> tuple[Callable[[], Backend], Callable[[], list[str]]]:
        """For another fresh folder: what builds a backend in it, and what lies there."""
        self.directory = self.directory / "elsewhere"
        self.directory.mkdir()
        return self.build, partial(os.listdir, self.directory)


def _overrides(method: Callable[..., object]) -> bool:
    return getattr(BackendPlace, method.__name__) is not getattr(method, "__func__", None)

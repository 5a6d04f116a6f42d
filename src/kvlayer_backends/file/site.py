"""One process's footing in a directory: its threads, its private files, its candidate janitor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvlayer._offload import Offload
from kvlayer.abc.policy import EvictionPolicy
from kvlayer.errors import BackendError
from kvlayer_backends.file.directio import probe
from kvlayer_backends.file.faults import explain
from kvlayer_backends.file.janitor import Evicted, Janitor
from kvlayer_backends.file.objects import ObjectFiles
from kvlayer_backends.file.options import FileOptions
from kvlayer_backends.file.paths import Paths
from kvlayer_backends.file.quarantine import Quarantine
from kvlayer_backends.file.scratch import Scratch

__all__ = ["Site"]

_META_THREADS = 2  # lookups must not queue behind bulk transfers, nor behind the janitor's scan


class Site:
    """What is held while a directory is open. Read-only sites have no janitor and hold no files."""

    def __init__(
        self,
        root: str,
        options: FileOptions,
        policy: Callable[[], EvictionPolicy],
        on_evicted: Evicted,
    ) -> None:
        self._options = options
        self.paths = Paths(root)
        self.scratch = Scratch(self.paths)
        self.files = ObjectFiles(self.paths, self.scratch, fsync=options.fsync)
        self.quarantine = Quarantine(self.paths)
        self.bulk = Offload(options.threads, "kvlayer-file")
        self.meta = Offload(_META_THREADS, "kvlayer-file-meta")
        self.janitor = (
            None
            if options.readonly
            else Janitor(
                self.paths,
                options,
                policy,
                files=self.files,
                pool=self.meta,
                on_evicted=on_evicted,
            )
        )

    async def open(self) -> None:
        """Make the directory ready and start the janitor.

        Raises ``BackendError``; then, and when it is cancelled, nothing is held.
        """
        opened = False
        try:
            error = await self.meta.run(self._acquire)
            if error is not None:
                raise error
            self.bulk.begin()  # later the system may have no thread to give
            if self.janitor is not None:
                self.janitor.start()
            opened = True
        finally:
            if not opened:
                await self.aclose()

    def _acquire(self) -> BackendError | None:
        root, mode = self.paths.root, self._options.direct
        try:
            if self.janitor is None:
                any(Path(root).iterdir())  # readable at all?
                self.files.direct = mode != "off"  # a read that is refused goes on without
                return None
            self.paths.make(self.paths.tmp)
            self.scratch.open()
            self.files.direct = mode != "off" and probe(self.scratch.file())
            self.janitor.elect()
        except OSError as exc:
            return explain(exc, "open", root)
        if mode == "on" and not self.files.direct:
            return BackendError(
                f"file://: {root} is on a filesystem without O_DIRECT",
                hint="use direct=auto, or a local disk filesystem such as ext4 or xfs",
            )
        return None

    async def aclose(self) -> None:
        """Let go of everything. No call may be running. Idempotent."""
        if self.janitor is not None:
            await self.janitor.aclose()
        if self.scratch.path is not None:
            await self.meta.run(self.scratch.close)
        self.quarantine.close()
        self.bulk.close()
        self.meta.close()

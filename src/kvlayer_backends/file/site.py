"""One process's footing in a directory: its threads, its private files, its candidate janitor."""

from __future__ import annotations

import logging
from contextlib import suppress
from threading import Lock

from kvlayer.abc.policy import PolicyMaker
from kvlayer.errors import BackendError
from kvlayer.runtime.offload import Offload
from kvlayer_backends.file import disk
from kvlayer_backends.file.directio import probe
from kvlayer_backends.file.faults import explain
from kvlayer_backends.file.janitor import Janitor
from kvlayer_backends.file.notes import Notes
from kvlayer_backends.file.objects import ObjectFiles
from kvlayer_backends.file.options import FileOptions
from kvlayer_backends.file.paths import Paths
from kvlayer_backends.file.pulse import Pulse
from kvlayer_backends.file.quarantine import Quarantine
from kvlayer_backends.file.room import Evicted
from kvlayer_backends.file.scratch import Scratch

__all__ = ["Site"]

_log = logging.getLogger(__name__)

_GRACE_SECONDS = 0.05  # for a thread that has done its work and is about to say so
_META_THREADS = 2  # lookups must not queue behind bulk transfers, nor behind the janitor's scan


class Site:
    """What is held while a directory is open. Read-only sites have no janitor and hold no files."""

    def __init__(
        self,
        root: str,
        options: FileOptions,
        policy: PolicyMaker,
        on_evicted: Evicted,
    ) -> None:
        self._options = options
        self.paths = Paths(root)
        self.pulse = Pulse(self.paths.janitor_lock)
        self.scratch = Scratch(self.paths)
        self.files = ObjectFiles(self.paths, self.scratch, self.pulse, fsync=options.fsync)
        self.quarantine = Quarantine(self.paths)
        self.notes = Notes(self.pulse)
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
        self._handing_over = Lock()
        self._is_acquired = False
        self._is_abandoned = False
        self._is_closed = False

    async def open(self) -> None:
        """Make the directory ready and start the janitor.

        Raises ``BackendError``; then nothing is held. Nor is it when this is cancelled, which ends
        it at once, whatever the disk does: a thread that hangs gives back what it gets.
        """
        is_open = False
        try:
            error = await self.meta.run_unlent(self._acquire)
            if error is not None:
                raise error
            self.bulk.begin()  # later the system may have no thread to give
            if self.janitor is not None:
                self.janitor.start()
            is_open = True
        finally:
            if not is_open:
                self.abandon()

    def _acquire(self) -> BackendError | None:
        try:
            error = self._try_to_acquire()
        except OSError as exc:
            error = explain(exc, "open", self.paths.root)
        with self._handing_over:
            self._is_acquired = True
            if error is not None or self._is_abandoned:
                self._give_back()
        return error

    def _try_to_acquire(self) -> BackendError | None:
        root, mode = self.paths.root, self._options.direct
        if self.janitor is None:
            if disk.list_folder(root) is None:  # readable at all?
                raise FileNotFoundError(2, "No such file or directory", root)
            if disk.exists(self.paths.folder):
                disk.check_private(self.paths.folder)
            self.files.direct = mode != "off"  # a read that is refused goes on without
            return None
        self.pulse.check()  # a thread that makes something on a frozen disk cannot be left behind
        for folder in (self.paths.folder, self.paths.tmp):
            self.paths.make(folder)
        self.scratch.open()
        self.files.direct = mode != "off" and probe(self.scratch.file())
        self.janitor.elect()
        self.pulse.begin()
        if mode == "on" and not self.files.direct:
            return BackendError(
                f"file://: {root} is on a filesystem without O_DIRECT",
                hint="use direct=auto, or a local disk filesystem such as ext4 or xfs",
            )
        return None

    def _give_back(self) -> None:
        """On a thread: let go of what was acquired."""
        if self.janitor is not None:
            self.janitor.resign()
        with suppress(OSError):
            self.pulse.check()
            self.scratch.close()
        self.scratch.abandon()
        self.pulse.close()

    async def aclose(self) -> None:
        """Let go of everything. No call may be running. Idempotent.

        Cancelled, it leaves behind what does not end: see :meth:`abandon`.
        """
        if self._is_closed:
            return
        try:
            await self.notes.aclose()
            if self.janitor is not None:
                await self.janitor.aclose()
            await self.meta.run_unlent(self._give_back)
            self._is_closed = True
        finally:
            if not self._is_closed:
                self.abandon()
        self.bulk.close()
        self.meta.close()

    def abandon(self) -> int:
        """Let go of everything without waiting for the disk; how many threads hang.

        Locks are given back, files stay for a survivor to clear away. Threads that hang keep what
        they were lent, and whoever waits for them gets ``ClosedError``. Idempotent.
        """
        self._is_closed = True
        with self._handing_over:
            self._is_abandoned = True
            if self._is_acquired:
                if self.janitor is not None:
                    self.janitor.abandon()
                self.scratch.abandon()
        hanging = self.bulk.close(_GRACE_SECONDS) + self.meta.close(_GRACE_SECONDS)
        hanging += self.notes.abandon(_GRACE_SECONDS)
        if hanging:
            _log.warning(
                "file://%s does not answer: %d threads are left behind, with the memory they were "
                "lent",
                self.paths.root,
                hanging,
            )
        return hanging

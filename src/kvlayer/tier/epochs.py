"""The epochs of one cache, and what runs in them: it is stopped when its epoch ends."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType

from kvlayer.identity.epoch import Epoch

__all__ = ["EpochOver", "Epochs"]

_OF_NONE = nullcontext()


class EpochOver(Exception):  # noqa: N818  # no error: somebody decided it
    """The epoch of an operation is over. It was stopped, and has let go of what it was lent."""


class Epochs:
    """Which epoch is the current one, and who moves KV in one. Belongs to the cache's loop.

    Any thread may read ``current``.
    """

    def __init__(self, namespace: str = "") -> None:
        self.current = Epoch(namespace, self)
        self._running: dict[_Within, None] = {}
        self._changing = 0
        """How many change the engine's memory now."""
        self._changed: Epoch | None = None
        """The closed epoch for which that has been done, if that is the last there was."""
        self._left: asyncio.Future[None] | None = None
        """Whoever waits is told by this when something of an epoch that is over has ended."""

    def within(self, epoch: Epoch | None) -> AbstractContextManager[object]:
        """The current task moves KV of ``epoch`` inside; None: of no cache's.

        When the epoch ends, what runs inside is cancelled, and :class:`EpochOver` leaves the block
        in place of the cancellation. It is raised at once where the epoch is over already.
        """
        return _OF_NONE if epoch is None else _Within(self, epoch)

    def close(self, namespace: str) -> int:
        """End the current epoch; how many operations are being stopped.

        What begins from now on is of an epoch that is over from its start, until one opens: see
        :meth:`changing`.
        """
        self.current.is_over = True
        self.current = Epoch(namespace, self, is_over=True)
        return sum([each.stop() for each in [*self._running]])

    @contextmanager
    def changing(self) -> Generator[None]:
        """The engine's memory is changed inside, for the current epoch, which is closed.

        That opens when the last of those who are inside at once has left, unless it was closed
        again, or who left last did so by an error: memory that one of them still changes is
        nobody's.
        """
        closed, is_through = self.current, False
        self._changing += 1
        try:
            yield
            is_through = True
        finally:
            self._changing -= 1
            if closed is self.current or not is_through:
                self._changed = closed if is_through else None
            if not self._changing and self._changed is self.current:
                self.current = Epoch(self.current.namespace, self)

    async def ended(self) -> None:
        """Wait until nothing runs any more of epochs that are over."""
        while any(each.epoch.is_over for each in self._running):
            if self._left is None:
                self._left = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._left})

    def entered(self, within: _Within) -> None:
        self._running[within] = None

    def left(self, within: _Within) -> None:
        del self._running[within]
        if self._left is not None:
            self._left.set_result(None)
            self._left = None


class _Within:
    """One stretch of one task. It is cancelled as ``asyncio.timeout`` does it."""

    __slots__ = ("_cancelling", "_epochs", "_is_stopped", "_task", "epoch")

    def __init__(self, epochs: Epochs, epoch: Epoch) -> None:
        self._epochs = epochs
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._is_stopped = False
        self.epoch = epoch

    def stop(self) -> bool:
        """Cancel it, if its epoch is over; whether it has just been."""
        if self._is_stopped or not self.epoch.is_over or self._task is None:
            return False
        self._is_stopped = True
        return self._task.cancel()

    def __enter__(self) -> None:
        if self.epoch.is_over:
            raise EpochOver
        self._task = asyncio.current_task()
        assert self._task is not None, "KV is moved by tasks of the loop"
        self._cancelling = self._task.cancelling()
        self._epochs.entered(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._epochs.left(self)
        if self._is_stopped and self._task is not None:
            # Somebody else may have cancelled the task, too: that is theirs to see.
            is_ours = self._task.uncancel() <= self._cancelling
            if is_ours and kind is asyncio.CancelledError:
                raise EpochOver from error

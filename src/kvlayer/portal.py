"""A cache on a loop of its own, for threads that have none: engines, notebooks, scripts."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Generator, Iterable
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

from kvlayer.abc.backend import Backend
from kvlayer.cache import Cache
from kvlayer.config import CacheConfig
from kvlayer.errors import ClosedError, ForkedError, UnsupportedError
from kvlayer.events import Sink
from kvlayer.layout import KVLayout
from kvlayer.namespace import Namespace
from kvlayer.registry import BACKENDS, Registry

__all__ = ["Portal"]

P = ParamSpec("P")
T = TypeVar("T")


class Portal:
    """Runs a cache's coroutines from other threads. Made by :meth:`open`; thread-safe.

    Work is a coroutine function whose first argument is the cache::

        async def load(cache, tokens, kv):
            async with cache.lookup(tokens) as hit:
                return await cache.retrieve(hit, kv)

        report = portal.call(load, tokens, kv)
    """

    def __init__(self, cache: Cache, loop: asyncio.AbstractEventLoop) -> None:
        self.cache = cache
        self._loop = loop
        self._thread = threading.get_ident()
        self._leave = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._gate = threading.Lock()
        self._pid = os.getpid()
        self._closed = False
        self._abandon = False

    @classmethod
    @contextmanager
    def open(
        cls,
        config: CacheConfig,
        layout: KVLayout,
        namespace: Namespace | None = None,
        *,
        sinks: Iterable[Sink] = (),
        backends: Registry[type[Backend]] = BACKENDS,
    ) -> Generator[Portal]:
        """Open a cache (see ``Cache.open``) on a new thread; leaving the block closes both.

        Work still running then is cancelled and has ended when the block is left. Raises what
        ``Cache.open`` raises.
        """
        opened: Future[Portal] = Future()
        ended: Future[None] = Future()

        async def serve() -> None:
            async with Cache.open(
                config, layout, namespace, sinks=sinks, backends=backends
            ) as cache:
                portal = cls(cache, asyncio.get_running_loop())
                opened.set_result(portal)
                try:
                    await portal._serve()
                finally:
                    portal._closed = True  # also when the loop dies of a SystemExit in some work

        def run() -> None:
            try:
                asyncio.run(serve())
            except _Abandoned:
                ended.set_result(None)
            except BaseException as exc:  # noqa: BLE001  # carried to the thread that waits
                (ended if opened.done() else opened).set_exception(exc)
            else:
                ended.set_result(None)

        thread = threading.Thread(target=run, name="kvlayer-portal", daemon=True)
        thread.start()
        try:
            portal = opened.result()
        except KeyboardInterrupt:  # nobody will use it: it closes once it is open
            opened.add_done_callback(cls._leave_unused)
            raise
        except BaseException:
            thread.join()
            raise
        try:
            yield portal
        except BaseException:
            portal._abandon = True
            raise
        finally:
            portal._close()
            ended.result()
            thread.join()

    @staticmethod
    def _leave_unused(opened: Future[Portal]) -> None:
        if opened.exception() is None:
            portal = opened.result()
            portal._abandon = True
            portal._close()

    def _close(self) -> None:
        with self._gate:
            self._closed = True
        with suppress(RuntimeError):  # the loop has died already: ``ended`` says of what
            self._loop.call_soon_threadsafe(self._leave.set)

    async def _serve(self) -> None:
        await self._leave.wait()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._abandon:
            raise _Abandoned  # tells Cache.open not to flush

    def submit(
        self,
        work: Callable[Concatenate[Cache, P], Coroutine[Any, Any, T]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Future[T]:
        """Start ``work(cache, *args, **kwargs)`` on the cache's loop; a future to poll or wait for.

        Cancelling the future cancels the work. What the work was lent (an engine's tensors) is
        let go some time after ``cancel`` returns, and before the portal is closed.
        """
        if os.getpid() != self._pid:
            raise ForkedError(
                f"the portal was opened in process {self._pid} and used in {os.getpid()}",
                hint="open a portal in each process, after the fork",
            )
        with self._gate:
            if self._closed:
                raise ClosedError("the portal is closed", hint="use it inside `with Portal.open`")
            tracked = self._track(partial(work, self.cache, *args, **kwargs))
            return asyncio.run_coroutine_threadsafe(tracked, self._loop)

    async def _track(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await work()

    def call(
        self,
        work: Callable[Concatenate[Cache, P], Coroutine[Any, Any, T]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run ``work(cache, *args, **kwargs)`` on the cache's loop and wait for its result.

        Raises ``UnsupportedError`` on that loop, which it would block: await there.
        """
        if threading.get_ident() == self._thread:
            raise UnsupportedError(
                "Portal.call waits, so it cannot run on the portal's own loop",
                hint="await the cache's own methods there, or use submit",
            )
        future = self.submit(work, *args, **kwargs)
        try:
            return future.result()
        except CancelledError:
            raise ClosedError("the portal was closed while this call was running") from None
        except KeyboardInterrupt:
            future.cancel()
            raise


class _Abandoned(Exception):  # noqa: N818  # a signal to Cache.open, never seen outside
    """The block was left by an exception."""

"""Who is computing or storing what: the only thing that a lookup or a second store waits for. Pure.

A promise may be broken: its holder fails, is cancelled or dies. Whoever waited looks again, and
does the work itself. The caller brings the time, and holds the planner's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

__all__ = ["Promise", "Promises"]


@dataclass(slots=True, eq=False)
class Promise:
    """What ``holder`` has promised: the chunks that end with ``hashes``.

    ``until`` (the cache's clock, seconds) is when nobody believes it any more.
    """

    namespace: str
    holder: str
    until: float
    hashes: dict[bytes, str] = field(default_factory=dict[bytes, str])
    """What is left of it, in prompt order, and its zone; ``kept`` counts what is there by now."""
    kept: int = 0
    _watchers: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])

    def watch(self, told: Callable[[], None]) -> None:
        """Call ``told`` once, when the next chunk is there, or will not come."""
        self._watchers.append(told)

    def changed(self) -> None:
        """Tell whoever watches."""
        watchers, self._watchers = self._watchers, []
        for told in watchers:
            told()


class Promises:
    """All promises, by namespace and chunk."""

    def __init__(self) -> None:
        self._by_chunk: dict[tuple[str, bytes], Promise] = {}

    def __len__(self) -> int:
        """Chunks that are promised."""
        return len(self._by_chunk)

    def make(self, namespace: str, *, holder: str, until: float) -> Promise:
        """A promise of nothing yet."""
        return Promise(namespace, holder, until)

    def add(self, promise: Promise, chunk_hash: bytes, zone: str) -> None:
        """``promise`` is about one more chunk. Who promised it first stays the one to ask."""
        promise.hashes[chunk_hash] = zone
        self._by_chunk.setdefault((promise.namespace, chunk_hash), promise)

    def find(self, namespace: str, chunk_hash: bytes, now: float) -> Promise | None:
        """Who promised a chunk and is still believed."""
        promise = self._by_chunk.get((namespace, chunk_hash))
        if promise is not None and promise.until <= now:
            self.end(promise, promise.hashes, kept=False)
            return None
        return promise

    def end(self, promise: Promise, hashes: Iterable[bytes], *, kept: bool) -> None:
        """These chunks are there (``kept``), or will not come. Tells whoever watches."""
        for chunk_hash in tuple(hashes):
            if chunk_hash not in promise.hashes:
                continue
            del promise.hashes[chunk_hash]
            promise.kept += kept
            chunk = promise.namespace, chunk_hash
            if self._by_chunk.get(chunk) is promise:
                del self._by_chunk[chunk]
        promise.changed()

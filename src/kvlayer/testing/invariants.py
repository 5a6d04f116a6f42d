"""What must hold of a cache at every moment, whatever its tiers, its users and its clock do.

Each is one function that raises :class:`Broken`, naming what it found. ``wrong_bytes`` needs to be
told what is right, ``unanswered`` how long something took; the others look at the cache alone, at
any point between two steps of its loop.

====================  ==========================================================================
no_wrong_bytes        what is served, and what lies in host memory or below, is what was stored
nothing_lost          what was committed is still there, unless it was evicted or found damaged
accounts              no byte of the slab is used twice, and the capacity is exact
within_bounds         no more is in flight, or held for writing, than the tier's bounds allow
answered              everyone is answered by the deadline
nothing_left          every waiter is released; no lease, pin, hold, transfer or task is left
====================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

from kvlayer.api.cache import Cache
from kvlayer.identity.keys import ObjectKey
from kvlayer.payload import align
from kvlayer.tier.guard.guard import Lane
from kvlayer.tier.planner.planner import Planner
from kvlayer.tier.planner.records import HostState

__all__ = [
    "Broken",
    "accounts",
    "answered",
    "no_wrong_bytes",
    "nothing_left",
    "nothing_lost",
    "within_bounds",
]


class Broken(AssertionError):  # noqa: N818  # what the promise is
    """An invariant does not hold."""


def _hold(is_so: bool, what: str) -> None:
    if not is_so:
        raise Broken(what)


def no_wrong_bytes(cache: Cache, right: Callable[[ObjectKey], bytes | None]) -> None:
    """What host memory offers begins with ``right(key)``; None: nobody knows, it is not looked at.

    Objects on their way in or out may be anything: they are not offered.
    """
    slab = cache.stack.objects.slab
    with cache.stack.planner.lock:
        for record in cache.stack.planner.directory.objects():
            if record.host is not HostState.READY or (expected := right(record.key)) is None:
                continue
            found = slab.view(record.offset, len(expected)).tobytes()
            _hold(found == expected, f"host memory offers wrong bytes of {record.key}")


def nothing_lost(cache: Cache, committed: Iterable[bytes]) -> None:
    """Every chunk whose hash is in ``committed`` can be served from some tier.

    The caller takes out what was evicted, cleared or found damaged since.
    """
    directory, namespace = cache.stack.planner.directory, cache.namespace.digest
    for chunk_hash in committed:
        records = directory.ending(namespace, chunk_hash)
        objects = [o for record in records for o in record.objects]
        _hold(
            bool(objects) and all(found.is_ready for found in objects),
            f"chunk {chunk_hash.hex()[:12]} was committed, nothing took it away, and it is gone",
        )


def accounts(planner: Planner, *, idle: bool = False) -> None:
    """No two objects share bytes of the slab; every byte and every pin is accounted for.

    ``idle``: nothing runs and nobody holds anything any more.
    """
    with planner.lock:
        directory, host = planner.directory, planner.host
        records = list(directory.objects())
        resident = [record for record in records if record.host is not HostState.ABSENT]
        _hold(len(resident) == len(host), f"{len(resident)} resident, {len(host)} counted")
        ranges = sorted((r.offset, align(r.nbytes), r.key) for r in resident)
        for (start, nbytes, one), (after, _, other) in pairwise(ranges):
            _hold(start + nbytes <= after, f"{one} and {other} share bytes of the slab")
        used = sum(nbytes for _, nbytes, _ in ranges)
        _hold(host.extents.used == used, f"{host.extents.used} bytes counted, {used} used")
        _hold(used <= host.extents.capacity, f"{used} bytes in {host.extents.capacity}")
        pinned = sum(r.nbytes for r in resident if r.pins)
        _hold(host.pinned_nbytes == pinned, f"{host.pinned_nbytes} pinned, in truth {pinned}")
        for record in records:
            key = record.key
            _hold(record.pins >= record.held >= 0, f"{key}: {record.pins} pins, {record.held} held")
            is_filling = record.host is HostState.FILLING
            _hold(record.pins > 0 or not is_filling, f"{key} is being filled, and not pinned")
            is_wanted = record.is_ready or record.pins or is_filling or record.writing
            _hold(bool(is_wanted), f"{key}: a record that nothing refers to is remembered")
            if idle:
                _hold(record.pins == 0, f"{key} is still pinned, {record.pins} times")
                _hold(record.writing == 0, f"{key} is still being written")
                _hold(not is_filling, f"{key} is still being filled")


def within_bounds(cache: Cache) -> None:
    """What each lower tier has in flight stays within its configured bounds.

    One object alone may be larger than ``max_inflight_bytes``: otherwise it could never be written.
    """
    config, slab = cache.config, cache.stack.objects.slab
    chunk = cache.namespace.tokens_per_chunk
    groups = cache.stack.planner.directory.needs
    largest = max(cache.stack.planner.payload(part, chunk).nbytes for part in groups)
    for tier in cache.stack.lower:
        settings = config.tiers[tier.index]
        bound = max(settings.max_inflight_bytes or slab.nbytes // 2, largest)
        writing = tier.guard.held_nbytes(Lane.WRITES)
        _hold(writing <= bound, f"{tier.name}: {writing} bytes held for writing, of {bound}")
        running = tier.guard.running
        _hold(
            running <= settings.max_inflight,
            f"{tier.name}: {running} calls run at once, of {settings.max_inflight}",
        )


def answered(what: str, seconds: float, *, within: float) -> None:
    """``what`` took no longer than it may."""
    _hold(seconds <= within, f"{what} took {seconds:.3f} s, and may take {within:.3f} s")


def nothing_left(cache: Cache) -> None:
    """Of an open cache in which nothing runs: everything lent and held is back.

    Leases that nobody released end by themselves: call this once their time is over and something
    was looked up since.
    """
    stats = cache.control.stats()
    _hold(stats.leases == 0, f"{stats.leases} leases are left, of {sorted(stats.owners)}")
    _hold(stats.inflight == 0, f"{stats.inflight} transfers are left")
    for counts in stats.tiers[1:]:
        _hold(counts.orphans == 0, f"{counts.name}: {counts.orphans} orphans are left")
        held = counts.inflight_nbytes
        _hold(held == 0, f"{counts.name}: {held} bytes are left in flight")
    for tier in cache.stack.lower:
        running = tier.guard.running
        _hold(running == 0, f"{tier.name}: {running} turns are taken, and nothing runs")
    accounts(cache.stack.planner, idle=True)

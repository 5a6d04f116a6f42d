"""A GPU that runs nothing: streams, events, copies and launches, in the order a test asks for.

``eager``   everything happens when it is queued
``lazy``    nothing happens until somebody waits for it, and then no more than is needed
``random``  a seeded choice among everything the streams' order allows
``race``    eager, and every access is checked against vector clocks (:mod:`gpu_race`)
``count``   nothing is moved at all; what would be is counted

CUDA's rules are kept where the code under test could break them: memory belongs to a device, a copy
must not lie in two host registrations, copies of pageable memory involve the host.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import c_uint8
from dataclasses import dataclass, field
from threading import Barrier, BrokenBarrierError, RLock, local

import numpy as np
from gpu_race import HOST, Races
from numpy.typing import NDArray

__all__ = ["Access", "FakeCudaError", "Gpu", "bytes_at", "move_rows"]

_BASE = 4096  # nothing lies below, and NumPy takes a view of address 0 for none
_MEMORY: NDArray[np.uint8] = np.ctypeslib.as_array((c_uint8 * (1 << 47)).from_address(_BASE))


def bytes_at(start: int, nbytes: int) -> NDArray[np.uint8]:
    """A view of memory by its address."""
    return _MEMORY[start - _BASE : start - _BASE + nbytes]


def move_rows(into: NDArray[np.int64], out_of: NDArray[np.int64], nbytes: int) -> None:
    """Copy ``nbytes`` bytes from each address to the one beside it."""
    inside = np.arange(nbytes) - _BASE
    _MEMORY[into[:, None] + inside] = _MEMORY[out_of[:, None] + inside]


Access = tuple[NDArray[np.int64], int]
"""Addresses, and how many bytes at each."""


class FakeCudaError(RuntimeError):
    """What CUDA would refuse."""


@dataclass
class _Op:
    label: str
    run: Callable[[], None]
    after: tuple[_Event, int, _Stream] | None = None
    """A record to wait for: the event, the number of the record, the stream that makes it."""


@dataclass
class _Stream:
    handle: int
    device: int
    queue: deque[_Op] = field(default_factory=deque)


@dataclass
class _Event:
    handle: int
    recorded: int = 0
    passed: int = 0
    stream: _Stream | None = None
    clock: NDArray[np.int64] | None = None


@dataclass
class _Block:
    start: int
    nbytes: int
    kind: str
    """``device``, ``pinned`` (allocated) or ``registered``."""
    device: int = 0
    keep: object = None


class Gpu:
    """The simulation. Handles are integers, as CUDA's are. Safe to use from threads."""

    def __init__(self, mode: str = "eager", seed: int = 0, *, devices: int = 1) -> None:
        assert mode in ("eager", "lazy", "random", "race", "count")
        self.mode = mode
        self.devices = devices
        self.lock = RLock()
        self.counts: Counter[str] = Counter()
        self.peak_pinned = self.peak_device = 0
        self.pinnable: int | None = None
        """Bytes that may be pinned; None: any."""
        self.faults: list[str] = []
        """What went wrong on the device."""
        self.failing_copy = 0
        """The copy that fails, counted from 1, and no other before the test says so; 0: none."""
        self.failing_launch = 0
        """The launch of the product that fails, counted from 1; 0: none."""
        self.meeting: Barrier | None = None
        """Where threads that wait for an event meet before the first of them goes on."""
        self.races = Races() if mode == "race" else None
        self._rng = random.Random(seed)
        self._current = local()
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, _Event] = {}
        self._blocks: dict[int, _Block] = {}
        self._starts: list[int] = []
        self._graves: list[object] = []
        self._next = 0x1000
        self._fake_memory = 1 << 50
        for device in range(devices):
            self._streams[-1 - device] = _Stream(-1 - device, device)  # the default streams

    # -- memory ------------------------------------------------------------------------------------

    @property
    def device(self) -> int:
        return getattr(self._current, "device", 0)

    @device.setter
    def device(self, number: int) -> None:
        if not 0 <= number < self.devices:
            raise FakeCudaError(f"cudaErrorInvalidDevice: {number}")
        self._current.device = number

    def allocate(self, nbytes: int, kind: str) -> int:
        """Memory full of a pattern that is nobody's KV."""
        with self.lock:
            if self.mode == "count" and kind == "device":
                self._fake_memory += nbytes + 512
                return self._track(_Block(self._fake_memory, nbytes, kind, self.device))
            raw = np.full(nbytes + 256, 0xCD, np.uint8)
            start = -(-raw.ctypes.data // 256) * 256
            return self._track(_Block(start, nbytes, kind, self.device, raw))

    def lend(self, start: int, nbytes: int, device: int = 0) -> None:
        """Device memory that is somebody else's: an engine's."""
        with self.lock:
            self._track(_Block(start, nbytes, "device", device))

    def register(self, start: int, nbytes: int) -> None:
        with self.lock:
            if self.pinnable is not None and self.pinned_nbytes + nbytes > self.pinnable:
                raise FakeCudaError("cudaErrorMemoryAllocation: cannot pin")
            if any(b.start < start + nbytes and start < b.start + b.nbytes for b in self._host()):
                raise FakeCudaError("cudaErrorHostMemoryAlreadyRegistered")
            self._track(_Block(start, nbytes, "registered"))

    def free(self, start: int, kind: str) -> None:
        with self.lock:
            block = self._blocks.get(start)
            if block is None or block.kind != kind:
                raise FakeCudaError(f"cudaErrorInvalidValue: {start:#x} is no {kind} memory")
            del self._blocks[start]
            self._starts.remove(start)
            self._graves.append(block.keep)  # what still uses it is refused, and harms nobody
            if self.races is not None and kind != "registered":
                self.races.remove(start)

    def watch(self, start: int, nbytes: int) -> None:
        """Let races look at host memory, pinned or not."""
        if self.races is not None:
            self.races.add(start, nbytes)

    @property
    def pinned_nbytes(self) -> int:
        return sum(block.nbytes for block in self._host())

    @property
    def held(self) -> Counter[str]:
        """What is allocated, registered or created, and not given back."""
        found = Counter(block.kind for block in self._blocks.values() if block.keep is not None)
        found.update(block.kind for block in self._host() if block.kind == "registered")
        found["stream"] = sum(handle > 0 for handle in self._streams)
        found["event"] = len(self._events)
        return +found

    def _host(self) -> list[_Block]:
        return [block for block in self._blocks.values() if block.kind != "device"]

    def _track(self, block: _Block) -> int:
        self._blocks[block.start] = block
        self._starts.append(block.start)
        self._starts.sort()
        if self.races is not None and block.kind != "registered":
            self.races.add(block.start, block.nbytes)
        self.peak_pinned = max(self.peak_pinned, self.pinned_nbytes)
        mine = (
            b.nbytes for b in self._blocks.values() if b.kind == "device" and b.keep is not None
        )
        self.peak_device = max(self.peak_device, sum(mine) if self.mode != "count" else 0)
        return block.start

    def find(self, address: int) -> _Block | None:
        """The tracked memory that holds this address."""
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        block = self._blocks[self._starts[at]]
        return block if address < block.start + block.nbytes else None

    def is_device(self, address: int) -> bool:
        """Whether this is device memory: what CUDA finds out by itself in a batch."""
        block = self.find(address)
        return block is not None and block.kind == "device"

    def check_device(self, access: Access, device: int) -> None:
        """Raise unless all of it is memory of this device, or pinned."""
        starts, nbytes = access
        left = starts
        while len(left):
            block = self.find(int(left[0]))
            if block is None or (block.kind == "device" and block.device != device):
                raise FakeCudaError(f"cudaErrorIllegalAddress: {int(left[0]):#x}")
            inside = (left >= block.start) & (left < block.start + block.nbytes)
            if (left[inside] + nbytes > block.start + block.nbytes).any():
                raise FakeCudaError(f"cudaErrorIllegalAddress: past {block.start:#x}")
            left = left[~inside]

    # -- streams and events ------------------------------------------------------------------------

    def new_stream(self) -> int:
        with self.lock:
            self._next += 1
            self._streams[self._next] = _Stream(self._next, self.device)
            return self._next

    def new_event(self) -> int:
        with self.lock:
            self._next += 1
            self._events[self._next] = _Event(self._next)
            return self._next

    def drop_stream(self, handle: int) -> None:
        with self.lock:
            if self._streams[handle].queue:
                self.faults.append(f"stream {handle} is destroyed while it has work")
                self.drain()
            del self._streams[handle]

    def drop_event(self, handle: int) -> None:
        with self.lock:
            del self._events[handle]

    def stream(self, handle: int) -> _Stream:
        """The stream; 0 is the current device's default stream."""
        found = self._streams.get(handle or -1 - self.device)
        if found is None:
            raise FakeCudaError(f"cudaErrorInvalidResourceHandle: stream {handle}")
        return found

    def record(self, event: int, stream: int) -> None:
        with self.lock:
            found, into = self._events[event], self.stream(stream)
            found.recorded += 1
            found.stream = into
            if self.races is not None:
                found.clock = self.races.begin(into.handle).copy()
            version = found.recorded

            def passed() -> None:
                found.passed = max(found.passed, version)

            self._push(into, _Op(f"record {event}", passed))

    def wait(self, stream: int, event: int) -> None:
        with self.lock:
            found, waiter = self._events[event], self.stream(stream)
            if not found.recorded:
                return  # as in CUDA: an event that was never recorded holds nobody up
            if self.races is not None and found.clock is not None:
                self.races.join(waiter.handle, found.clock)
            assert found.stream is not None
            after = (found, found.recorded, found.stream)
            self._push(waiter, _Op(f"wait {event}", lambda: None, after))

    def recorded_on(self, event: int) -> int:
        """The stream of the event's last record."""
        stream = self._events[event].stream
        return 0 if stream is None else stream.handle

    def synchronize_event(self, event: int) -> None:
        meeting = self.meeting
        if meeting is not None:
            with suppress(BrokenBarrierError):  # with a wait taken away, somebody may not come
                meeting.wait(timeout=0.5)
            self.meeting = None
        with self.lock:
            found = self._events[event]
            if found.stream is not None:
                self._force(lambda: found.passed >= found.recorded, found.stream)
            if self.races is not None and found.clock is not None:
                self.races.join(HOST, found.clock)

    def synchronize_stream(self, handle: int) -> None:
        with self.lock:
            found = self.stream(handle)
            self._force(lambda: not found.queue, found)
            if self.races is not None:
                self.races.join(HOST, self.races.begin(found.handle))

    # -- work --------------------------------------------------------------------------------------

    def copy(self, target: int, source: int, nbytes: int, stream: int, *, to_host: bool) -> None:
        """Queue one copy between host memory and the current device."""
        with self.lock:
            self.counts["copies"] += 1
            if self.counts["copies"] == self.failing_copy:
                raise FakeCudaError("cudaErrorUnknown")
            host, device = (target, source) if to_host else (source, target)
            into = self.stream(stream)
            self.counts["to_host_nbytes" if to_host else "to_device_nbytes"] += nbytes
            self.counts["copies_to_host" if to_host else "copies_to_device"] += 1
            block = self._host_block(host, nbytes)
            if block is None:
                self.counts["pageable_copies"] += 1
            elif block.kind == "pinned":
                self.counts["table_nbytes"] += nbytes
            if self.mode == "count":
                return
            ends = [(np.array([address]), nbytes) for address in (source, target)]

            def run() -> None:
                self.check_device((np.array([device]), nbytes), into.device)
                if block is not None and self._host_block(host, nbytes) is None:
                    raise FakeCudaError("cudaErrorIllegalAddress: unpinned under a copy")
                bytes_at(target, nbytes)[:] = bytes_at(source, nbytes)

            what = f"copy to {'host' if to_host else 'device'} on stream {stream}"
            self._queue(into, what, run, ends[:1], ends[1:])
            if block is None:  # pageable memory: the call returns when the host is done with it
                self._force(lambda: not into.queue, into)
                if self.races is not None:
                    self.races.join(HOST, self.races.begin(into.handle))

    def launch(
        self,
        stream: int,
        label: str,
        run: Callable[[], None],
        touched: Callable[[], tuple[Sequence[Access], Sequence[Access]]],
    ) -> None:
        """Queue a kernel; ``touched`` says what it reads and writes, once its inputs are there."""
        with self.lock:
            if self.mode == "count":
                return
            into = self.stream(stream)

            def checked() -> None:
                for access in (*touched()[0], *touched()[1]):
                    self.check_device(access, into.device)
                run()

            reads, writes = touched() if self.races is not None else ((), ())
            self._queue(into, f"{label} on stream {stream}", checked, reads, writes)

    def host_access(
        self, start: int, nbytes: int, *, is_write: bool, label: str = "the host"
    ) -> None:
        """The host touches memory: a race unless it has waited for whoever does."""
        if self.races is not None:
            access = [(np.array([start]), nbytes)]
            reads, writes = ([], access) if is_write else (access, [])
            self.races.access(HOST, label, reads, writes)

    def drain(self) -> None:
        """Run everything that is queued anywhere: the device goes on after whoever left."""
        with self.lock:
            while busy := [s for s in self._streams.values() if s.queue]:
                assert sum(self._step(stream) for stream in busy), "streams wait for each other"

    def hold(self, stream: int) -> Callable[[], None]:
        """Something endless on a stream: what comes behind it waits until the result is called."""
        with self.lock:
            event = _Event(0)
            into = self.stream(stream)
            into.queue.append(_Op("endless", lambda: None, (event, 1, into)))

        def release() -> None:
            event.passed = 1

        return release

    def forget(self) -> None:
        """Lose everything that is queued: what is left of a device after an error that sticks."""
        with self.lock:
            for stream in self._streams.values():
                stream.queue.clear()

    # -- inside ------------------------------------------------------------------------------------

    def _host_block(self, address: int, nbytes: int) -> _Block | None:
        """The pinned memory that holds these bytes. Raises for bytes of two."""
        first, last = self.find(address), self.find(address + nbytes - 1)
        if first is not last:
            raise FakeCudaError("cudaErrorInvalidValue: a copy lies in two registrations")
        if first is not None and first.kind == "device":
            raise FakeCudaError("cudaErrorInvalidValue: expected host memory")
        return first

    def _queue(
        self,
        stream: _Stream,
        label: str,
        run: Callable[[], None],
        reads: Sequence[Access],
        writes: Sequence[Access],
    ) -> None:
        if stream.device != self.device:
            raise FakeCudaError(f"cudaErrorInvalidResourceHandle: {label} of another device")
        if self.races is not None:
            self.races.access(stream.handle, label, reads, writes)
        self._push(stream, _Op(label, run))

    def _push(self, stream: _Stream, op: _Op) -> None:
        stream.queue.append(op)
        if self.mode in ("eager", "race", "count"):
            self.drain()
        elif self.mode == "random":
            for _ in range(self._rng.randrange(4)):
                busy = [s for s in self._streams.values() if s.queue]
                if busy:
                    self._step(self._rng.choice(busy))

    def _step(self, stream: _Stream) -> bool:
        """Run the stream's next operation, unless it waits for another stream."""
        if not stream.queue:
            return False
        op = stream.queue[0]
        if op.after is not None and op.after[0].passed < op.after[1]:
            return False
        stream.queue.popleft()
        try:
            op.run()
        except FakeCudaError as exc:
            self.faults.append(f"{op.label}: {exc}")  # whoever waits may not listen
            raise
        return True

    def _force(self, done: Callable[[], bool], first: _Stream) -> None:
        """Run until ``done``: no more than is needed, or, in random mode, anything meanwhile."""
        while not done():
            if self.mode == "random":
                busy = [s for s in self._streams.values() if s.queue]
                if not any(self._step(s) for s in self._rng.sample(busy, len(busy))):
                    raise FakeCudaError("streams wait for each other")
                continue
            stream, seen = first, set[int]()
            while not self._step(stream):
                if not stream.queue or stream.handle in seen:
                    raise FakeCudaError("streams wait for each other")
                seen.add(stream.handle)
                after = stream.queue[0].after
                assert after is not None
                stream = after[2]

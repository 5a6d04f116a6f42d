"""What staging imports, holds and leaves behind."""

from __future__ import annotations

import asyncio
import gc
import itertools
import mmap
import os
import subprocess
import sys
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hang import HANG

from kvlayer.abc.stager import HostCopy
from kvlayer.errors import ClosedError, LayoutError
from kvlayer.identity.keys import Part
from kvlayer.layout import NHD, AttentionKind, KVGroup, KVLayout, KVView
from kvlayer.payload import Payload
from kvlayer.runtime.offload import Offload, _Todo
from kvlayer.staging import torch_stager
from kvlayer.staging.copy_order import CopyOrder
from kvlayer.staging.device_cache import DeviceCache
from kvlayer.staging.torch_stager import TorchStager

GROUP = KVGroup(AttentionKind.MHA, (0, 1), "bfloat16", 2, 8)
LAYOUT = KVLayout.single(GROUP, NHD, tokens_per_block=4)
PAYLOAD = Payload.of(GROUP, Part(0, (0, 2), (0, 2)), 8)
OFFSETS = [PAYLOAD.layer_offset(layer) for layer in range(2)]


class DevicePathStager(TorchStager):
    def _open(self, tensor: Any) -> Any:
        return DeviceCache(tensor)


def view(slots: Any = range(8)) -> KVView:
    return KVView.single([torch.randn(2, 4, 4, 2, 8).bfloat16() for _ in range(2)], slots)


def slab(copies: int = 1) -> mmap.mmap:
    fd = os.memfd_create("slab")
    try:
        os.ftruncate(fd, copies * PAYLOAD.nbytes)
        return mmap.mmap(fd, copies * PAYLOAD.nbytes)
    finally:
        os.close(fd)


def test_importing_every_staging_module_imports_no_tensor_library() -> None:
    code = (
        "import sys, pkgutil, importlib, kvlayer.staging as s\n"
        "for module in pkgutil.iter_modules(s.__path__, 'kvlayer.staging.'):\n"
        "    importlib.import_module(module.name)\n"
        "assert 'kvlayer.staging.torch_stager' in sys.modules\n"
        "print([m for m in ('torch', 'numpy', 'cupy') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.asyncio
@pytest.mark.parametrize("stager_type", [TorchStager, DevicePathStager])
@pytest.mark.parametrize("slots", [range(8), range(1, 9)])
async def test_a_slab_can_be_closed_after_a_call(
    stager_type: type[TorchStager], slots: range
) -> None:
    memory = slab()
    stager = stager_type(LAYOUT)
    gc.disable()
    try:
        with memoryview(memory) as host:
            await stager.gather(view(slots), [HostCopy(PAYLOAD, host, 0, 8)])
            await stager.scatter(view(slots), [HostCopy(PAYLOAD, host, 0, 8)])
        memory.close()
    finally:
        gc.enable()
    await stager.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("gather", [True, False])
async def test_a_slab_can_be_closed_after_a_call_that_was_refused(gather: bool) -> None:
    memory = slab()
    stager = TorchStager(LAYOUT)
    host = memoryview(memory)
    gc.disable()
    try:
        call = stager.gather if gather else stager.scatter
        with pytest.raises(LayoutError) as caught:
            await call(view(range(90, 98)), [HostCopy(PAYLOAD, host, 0, 8)])
        assert caught.value.__traceback__ is not None
        host.release()
        memory.close()
    finally:
        gc.enable()
    await stager.aclose()


@pytest.mark.asyncio
async def test_a_slab_can_be_closed_while_the_error_of_a_broken_copy_is_still_held() -> None:
    class Broken(TorchStager):
        def _open(self, tensor: Any) -> Any:
            class Cache:
                def gather(self, host: Any, *_: Any) -> None:
                    view_of_it = host[:4]
                    raise RuntimeError(f"out of luck at {len(view_of_it)}")

            return Cache()

    memory = slab()
    stager = Broken(LAYOUT)
    host = memoryview(memory)
    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="out of luck") as caught:
            await stager.gather(view(), [HostCopy(PAYLOAD, host, 0, 8)])
        assert caught.value.__traceback__ is not None
        host.release()
        memory.close()
    finally:
        gc.enable()
    await stager.aclose()


@pytest.mark.asyncio
async def test_no_reference_to_the_engines_tensors_is_kept() -> None:
    stager = TorchStager(LAYOUT)
    lent = view()
    seen = [weakref.ref(t) for t in lent.caches[0]]
    host = memoryview(bytearray(PAYLOAD.nbytes))
    await stager.gather(lent, [HostCopy(PAYLOAD, host, 0, 8)])
    stager.check(lent)
    del lent
    assert [r() for r in seen] == [None, None]
    await stager.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("stager_type", [TorchStager, DevicePathStager])
async def test_caches_allocated_in_inference_mode_can_be_written(
    stager_type: type[TorchStager],
) -> None:
    with torch.inference_mode():
        lent = view()
    stager = stager_type(LAYOUT)
    host = memoryview(bytearray(b"\x40" * PAYLOAD.nbytes))
    for slots in (range(8), range(1, 9)):
        target = KVView.single(lent.caches[0], slots)
        await stager.scatter(target, [HostCopy(PAYLOAD, host, 0, 8)])
    back = memoryview(bytearray(PAYLOAD.nbytes))
    await stager.gather(target, [HostCopy(PAYLOAD, back, 0, 8)])
    layer = PAYLOAD.layer_nbytes
    assert back[:layer] == host[:layer]
    await stager.aclose()


@pytest.mark.asyncio
async def test_copies_run_off_the_loop_on_the_given_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: set[str] = set()
    offload = Offload(1, "lent-threads")
    stager = TorchStager(LAYOUT, offload=offload)
    opened = stager._open

    def note(tensor: Any) -> Any:
        threads.add(threading.current_thread().name)
        return opened(tensor)

    monkeypatch.setattr(stager, "_open", note)
    await stager.gather(view(), [HostCopy(PAYLOAD, memoryview(bytearray(PAYLOAD.nbytes)), 0, 8)])
    assert len(threads) == 1
    assert threads.pop().startswith("lent-threads")
    await stager.aclose()
    assert await offload.run(lambda: 7) == 7  # a lent pool stays open
    offload.close()


@pytest.mark.asyncio
async def test_a_closed_stager_with_its_own_thread_refuses_work() -> None:
    stager = TorchStager(LAYOUT)
    await stager.aclose()
    await stager.aclose()
    with pytest.raises(ClosedError):
        await stager.gather(view(), [])


class Gated(TorchStager):
    """Each batch waits for its turn: ``go[i]`` lets the i-th one move, or fail."""

    def __init__(self, *args: Any, fails: tuple[int, ...] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self.began = [threading.Event() for _ in range(8)]
        self.go = [threading.Event() for _ in range(8)]
        self.ended: list[int] = []
        self._fails = fails
        self._counter = itertools.count()

    def _copy(self, view: KVView, order: CopyOrder, moves: Any, opened: Any, gather: bool) -> None:
        number = next(self._counter)
        self.began[number].set()
        assert self.go[number].wait(HANG)
        try:
            if number in self._fails:
                own = np.frombuffer(moves[0].host, np.uint8)  # a view in the frame that fails
                raise RuntimeError(f"batch {number} broke at {len(own)} bytes")
            super()._copy(view, order, moves, opened, gather)
        finally:
            self.ended.append(number)

    async def has_begun(self, *numbers: int) -> None:
        loop = asyncio.get_running_loop()
        for number in numbers:
            assert await loop.run_in_executor(None, self.began[number].wait, HANG)


@pytest.fixture
def a_batch_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_stager, "_BATCH_NBYTES", 1)
    monkeypatch.setattr(torch_stager, "_LEAST_NBYTES", 1)


@pytest.mark.asyncio
@pytest.mark.usefixtures("a_batch_per_layer")
@pytest.mark.parametrize("threads", [1, 2, 3])
async def test_a_cancelled_call_ends_its_running_batches_and_starts_no_other(threads: int) -> None:
    memory = slab(3)
    host = memoryview(memory)
    parts = [host[i * PAYLOAD.nbytes : (i + 1) * PAYLOAD.nbytes] for i in range(3)]
    stager = Gated(LAYOUT, threads=threads)
    call = asyncio.create_task(
        stager.gather(view(), [HostCopy(PAYLOAD, part, 0, 8) for part in parts])
    )
    await stager.has_begun(*range(threads))
    call.cancel()
    await asyncio.sleep(0)
    for number in range(threads):
        assert not call.done()  # lent memory is still being written
        stager.go[number].set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert sorted(stager.ended) == list(range(threads))
    layers = [part[at : at + PAYLOAD.layer_nbytes] for part in parts for at in OFFSETS]
    assert [any(layer) for layer in layers] == [i < threads for i in range(6)]
    for lent in (*layers, *parts, host):
        lent.release()
    memory.close()
    await stager.aclose()


@pytest.mark.asyncio
@pytest.mark.usefixtures("a_batch_per_layer")
@pytest.mark.parametrize("threads", [1, 2, 3])
async def test_a_batch_that_fails_ends_the_call_once_the_others_have_ended(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, stop = threading.Event(), _Todo.stop

    def noted(todo: _Todo) -> None:
        stop(todo)
        stopped.set()

    monkeypatch.setattr(_Todo, "stop", noted)
    memory = slab(3)
    host = memoryview(memory)
    parts = [host[i * PAYLOAD.nbytes : (i + 1) * PAYLOAD.nbytes] for i in range(3)]
    stager = Gated(LAYOUT, threads=threads, fails=(0, 1))
    gc.disable()
    try:
        call = asyncio.create_task(
            stager.gather(view(), [HostCopy(PAYLOAD, part, 0, 8) for part in parts])
        )
        await stager.has_begun(*range(threads))
        stager.go[0].set()
        assert stopped.wait(HANG)  # on the loop: the thread stops the others, and at once
        for number in range(1, threads):
            await turns()
            assert not call.done()  # a copy is still running
            stager.go[number].set()
        with pytest.raises(RuntimeError, match=r"batch \d broke") as caught:
            await call
        assert sorted(stager.ended) == [*range(threads)]  # whatever the loop has heard of by then
        assert caught.value.__traceback__ is not None
        for part in (*parts, host):
            part.release()
        memory.close()  # while the error is still held
    finally:
        gc.enable()
    await stager.aclose()


async def turns(count: int = 20) -> None:
    """Let the loop do everything it has to do."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.asyncio
@pytest.mark.usefixtures("a_batch_per_layer")
@pytest.mark.parametrize("threads", [1, 2, 3])
async def test_as_many_batches_run_at_once_as_there_are_threads(threads: int) -> None:
    stager = Gated(LAYOUT, threads=threads)
    copies = [HostCopy(PAYLOAD, memoryview(bytearray(PAYLOAD.nbytes)), 0, 8) for _ in range(3)]
    call = asyncio.create_task(stager.gather(view(), copies))
    await stager.has_begun(*range(threads))
    await turns()
    assert [began.is_set() for began in stager.began] == [i < threads for i in range(8)]
    for gate in stager.go:
        gate.set()
    await call
    assert sorted(stager.ended) == list(range(6))
    await stager.aclose()


@pytest.mark.asyncio
async def test_calls_side_by_side_share_the_threads_and_do_not_mix() -> None:
    stager = TorchStager(LAYOUT, threads=2)
    lent = [view() for _ in range(8)]
    hosts = [memoryview(bytearray(PAYLOAD.nbytes)) for _ in lent]
    copies = [[HostCopy(PAYLOAD, host, 0, 8)] for host in hosts]
    await asyncio.gather(*(stager.gather(v, c) for v, c in zip(lent, copies, strict=True)))
    for v, host in zip(lent, hosts, strict=True):
        for tensor, at in zip(v.caches[0], OFFSETS, strict=True):
            rows = tensor.view(torch.int16).permute(0, 3, 1, 2, 4)[:, :, :2].contiguous()
            assert host[at : at + PAYLOAD.layer_nbytes] == rows.numpy().tobytes()
    await stager.aclose()


@pytest.mark.parametrize("threads", [0, -1])
def test_a_stager_without_threads_is_refused(threads: int) -> None:
    with pytest.raises(ValueError, match="at least one thread"):
        TorchStager(LAYOUT, threads=threads)

"""What staging imports, holds and leaves behind."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest
import torch

from kvlayer._offload import Offload
from kvlayer.abc.stager import HostCopy
from kvlayer.errors import ClosedError, LayoutError
from kvlayer.keys import Part
from kvlayer.layout import NHD, AttentionKind, KVGroup, KVLayout, KVView
from kvlayer.payload import Payload
from kvlayer.staging import torch_stager
from kvlayer.staging.device_cache import DeviceCache
from kvlayer.staging.torch_stager import TorchStager

GROUP = KVGroup(AttentionKind.MHA, (0, 1), "bfloat16", 2, 8)
LAYOUT = KVLayout.single(GROUP, NHD, tokens_per_block=4)
PAYLOAD = Payload.of(GROUP, Part(0, (0, 2), (0, 2)), 8)


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


@pytest.mark.asyncio
async def test_a_cancelled_call_ends_its_batch_and_starts_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_stager, "_BATCH_NBYTES", 1)  # one batch per copy
    started, go = threading.Event(), threading.Event()
    copied: list[int] = []

    class Slow(TorchStager):
        def _copy(self, lent: KVView, moves: Any, gather: bool) -> None:
            started.set()
            assert go.wait(10)
            super()._copy(lent, moves, gather)
            copied.append(len(moves))

    memory = slab(3)
    host = memoryview(memory)
    parts = [host[i * PAYLOAD.nbytes : (i + 1) * PAYLOAD.nbytes] for i in range(3)]
    stager = Slow(LAYOUT)
    call = asyncio.create_task(
        stager.gather(view(), [HostCopy(PAYLOAD, part, 0, 8) for part in parts])
    )
    await asyncio.get_running_loop().run_in_executor(None, started.wait, 10)
    call.cancel()
    await asyncio.sleep(0)
    assert not call.done()  # the lent memory is still being written
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert copied == [1]
    assert any(parts[0])
    assert not any(parts[1])
    for part in parts:
        part.release()
    host.release()
    memory.close()
    await stager.aclose()

"""Bytes go straight between the slab and the disk: a tier of files needs no memory of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch

MIB = 1 << 20
OBJECTS, OBJECT_NBYTES = 16, 8 * MIB

# In a process of its own, or memory that other tests gave back would hide the peak.
MOVE = f"""
import asyncio, sys
from pathlib import Path
from kvlayer import AttentionKind, Cache, CacheConfig, KVGroup, KVLayout, ModelConfig, TierConfig
from kvlayer.layout import NHD
from kvlayer.staging.sample import paged_view

def memory(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024

async def main():
    # 8 MiB a chunk: 8 layers of 8 heads of 128 in bf16.
    group = KVGroup(AttentionKind.MHA, tuple(range(8)), "bfloat16", 8, 128)
    layout = KVLayout.single(group, NHD, tokens_per_block=16)
    view = paged_view(layout, {OBJECTS} * 256 // 16, seed=1)
    config = CacheConfig(
        model=ModelConfig(weights="sha256:" + "ab" * 32),
        tiers=(
            TierConfig(url="cpu://?capacity={OBJECTS * OBJECT_NBYTES}"),
            TierConfig(
                url=sys.argv[1],
                deadline_seconds=300.0,
                max_inflight_bytes={OBJECTS * OBJECT_NBYTES},
            ),
        ),
    )
    async with Cache.open(config, layout) as cache:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        before = memory("VmRSS")
        for round in range(2):
            tokens = [round * 1_000_000 + i for i in range({OBJECTS} * 256)]
            assert (await cache.store(tokens, view)).stored == {OBJECTS}
            await cache.flush()
            await cache.control.clear("cpu")
            pin = await cache.control.pin(tokens, seconds=300.0)
            assert pin.tokens == len(tokens)
            cache.control.unpin(pin)
            await cache.control.clear("cpu")
        print(memory("VmHWM") - before)

asyncio.run(main())
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("direct", ["auto", "off"])
def test_storing_and_loading_need_header_pages_and_no_copy(tmp_path: Path, direct: str) -> None:
    url = f"file://{tmp_path}/kv?threads=8&direct={direct}"
    ran = subprocess.run(
        [sys.executable, "-c", MOVE, url],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    # The slab is committed as it is used. A copy would come on top, one for each thread.
    beyond = int(ran.stdout) - OBJECTS * OBJECT_NBYTES
    assert 0 < beyond < OBJECT_NBYTES

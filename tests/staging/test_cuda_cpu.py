"""What queueing a prompt of 8,192 tokens of Llama-3-8B costs the interpreter, CUDA's calls aside.

A PCIe 5 link moves a slot in 0.3 ms, and the interpreter must be done with it sooner. What it calls
is counted, which a busy machine does not change; how long that takes is only reported.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import null_cupy
import pytest
from gpu_scenarios import NoTorch
from llama_8k import PAYLOAD_NBYTES, SHUFFLED, layout, lent

from kvlayer.layout import HND, NHD, NHD_BLOCK_FIRST
from kvlayer.staging.cuda.calibration import Calibration
from kvlayer.staging.cuda.devices import Devices
from kvlayer.staging.cuda.stager import DeviceStager

LAYOUTS = {
    "nhd": layout(NHD),
    "hnd": layout(HND),
    "native": layout(NHD_BLOCK_FIRST, "native:nhd-b16"),
}
THRESHOLDS = Calibration(direct_nbytes=64 << 10)  # blocks are long enough to go straight
FILLS = PAYLOAD_NBYTES // THRESHOLDS.slot_nbytes


def calls_of(work: Callable[[], Any]) -> int:
    """How many functions the interpreter calls."""
    count = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("verb", "what", "most"),
    [
        ("store", "nhd", 250),
        ("store", "hnd", 250),
        ("load", "nhd", 420),
        ("load", "hnd", 420),
        ("load", "native", 300),
    ],
)
async def test_a_fill_costs_few_calls(verb: str, what: str, most: int, dose, figures) -> None:
    held = LAYOUTS[what]
    lending = lent(held, SHUFFLED)
    with null_cupy.install():
        stager = DeviceStager(
            held, devices=Devices(lending.slab, THRESHOLDS), torch_stager=NoTorch()
        )
        pipeline = stager._devices.open(0)
        while stager._devices.pin_next():
            pass

        def whole() -> None:
            call = pipeline.call(lending.view, gather=verb == "store")
            if verb == "store":
                pipeline.gather(call, stager._stores(pipeline, call, lending.copies))
            else:
                pipeline.scatter(call, stager._loads(pipeline, call, lending.copies))
            pipeline.end(call)

        whole()
        seconds: list[float] = []
        for _ in range(dose(5, 40)):
            started = time.thread_time()
            whole()
            seconds.append(time.thread_time() - started)
        calls = calls_of(whole) / FILLS
        stager._devices.close()
        await stager.aclose()
    lending.close()
    figures(f"staging.cpu.{verb}.{what}", calls=calls, us_per_fill=median(seconds) / FILLS * 1e6)
    assert calls <= most

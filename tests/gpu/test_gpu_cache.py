"""A cache over a device's memory: stored, evicted, read back; and a model that answers with it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import caches
import pytest
import torch

from kvlayer import Cache, ModelConfig
from kvlayer.bench.host import LLAMA
from kvlayer.layout import HND, NHD, KVLayout
from kvlayer.staging.cuda.stager import DeviceStager
from kvlayer.staging.sample import paged_view

TOKENS = caches.tokens(4096 + 40, seed=3)
KEPT = 4096 + 32  # whole chunks, and the whole tails of 16


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("axes", "form"), [(NHD, "canonical"), (HND, "canonical"), (NHD, "native:nhd-b16")]
)
async def test_what_a_device_stored_comes_back_from_a_file_bit_for_bit(
    axes: Any, form: str, device: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layout = KVLayout.single(LLAMA, axes, tokens_per_block=16, form=form)
    config = caches.config(
        tmp_path,
        host="1GiB",
        tokens_per_chunk=256,
        tokens_per_tail=16,
        file_options="&capacity=2GiB",
    )
    writer, reader = (
        replace(lent, slots=(lent.slots[0][: len(TOKENS)],))
        for lent in (paged_view(layout, 300, seed=n, device=f"cuda:{device}") for n in (1, 2))
    )
    torch.cuda.synchronize()
    with caplog.at_level(logging.WARNING):
        async with Cache.open(config, layout) as cache:
            stager = cache.stack.device._stager
            assert isinstance(stager, DeviceStager)
            assert await stager.ready(device)
            report = await cache.store(TOKENS, writer)
            assert report.stored == 17 and not report.failed
            await cache.flush()
            await cache.control.clear("cpu")
            async with cache.lookup(TOKENS) as hit:
                assert hit.by_tier == {"cpu": 0, "file": KEPT}
                report = await cache.retrieve(hit, reader)
            assert report.tokens == KEPT and not report.failed
    assert "copied by torch" not in caplog.text
    to_row = [axis for axis in axes if axis not in ("block", "token")]
    for ours, theirs in zip(writer.caches[0], reader.caches[0], strict=True):
        written, read = rows(ours, axes, to_row), rows(theirs, axes, to_row)
        assert torch.equal(
            written[writer.slots[0][:KEPT].to(written.device)],
            read[reader.slots[0][:KEPT].to(read.device)],
        )


def rows(cache: torch.Tensor, axes: Any, rest: list[str]) -> torch.Tensor:
    """One row per slot, whatever the order of the axes."""
    order = [axes.index(axis) for axis in ("block", "token", *rest)]
    bits = cache.view(torch.int16).permute(order)
    return bits.reshape(bits.shape[0] * bits.shape[1], -1)


def test_a_model_on_the_device_answers_the_same_from_stored_kv(device: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    session_type = pytest.importorskip("kvlayer_transformers").Session
    torch.manual_seed(1)
    shape = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(shape).to(f"cuda:{device}").eval()
    config = replace(
        caches.config(tmp_path, host="64MiB", tokens_per_chunk=256, file_options="&capacity=1GiB"),
        model=ModelConfig(weights=caches.WEIGHTS),
    )
    prompt = torch.randint(0, 4096, (1, 1500), device=f"cuda:{device}")
    loaded: list[int] = []
    answers: list[torch.Tensor] = []
    for _ in range(2):  # as far as the cache can tell, the second is another process
        with session_type.open(model, config, report_prefill=False) as session:
            for _ in range(2):
                found = session.generate(prompt, max_new_tokens=16, do_sample=False)
                loaded.append(found.loaded)
                answers.append(found.sequences)
            assert not session.troubles
    assert all(torch.equal(answers[0], answer) for answer in answers)
    assert loaded[0] == 0 and all(columns >= 1024 for columns in loaded[1:])

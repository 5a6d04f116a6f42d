"""One engine that is measured, in a process of its own: the child of ``__main__``."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from kvlayer_vllm.bench.kinds import leave_blocks, options_of
from kvlayer_vllm.bench.serving import Serving, prompt_of

__all__ = ["serve"]

TOKENS = 16
BLOCKS_NBYTES = 384 << 20  # of vLLM's blocks: for one prompt of 8,192 tokens, and its answer


def serve(model: str, kind: str, directory: str, dtype: str = "bfloat16") -> None:
    """Answer lines of JSON until there are none, after ``"ready"``: each is a prompt's length.

    The answer is an ``Answer`` of the prompt of that length. When it was asked before, its KV is
    loaded from the tier that is measured.
    """
    says = os.fdopen(os.dup(1), "w")  # vLLM's log must not get between the answers
    os.dup2(2, 1)
    options = options_of(kind, Path(directory))
    nbytes = BLOCKS_NBYTES * (2 if dtype == "float32" else 1)
    serving = Serving(model, **options, dtype=dtype, kv_cache_memory_bytes=nbytes)
    vocabulary = min(8192, serving.engine.model_config.get_vocab_size())
    serving.ask([prompt_of(200, 999, vocabulary)], 2)  # what is compiled or allocated once
    says.write('"ready"\n')
    says.flush()
    for line in os.fdopen(0):
        length = json.loads(line)
        prompt = prompt_of(length, length, vocabulary)
        leave_blocks(serving, kind, prompt)
        (answer,) = serving.ask([prompt], TOKENS)
        says.write(json.dumps(asdict(answer)) + "\n")
        says.flush()
    serving.close()


if __name__ == "__main__":
    serve(*sys.argv[1:])

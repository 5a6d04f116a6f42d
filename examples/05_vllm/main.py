"""vLLM finds KV that another process has computed: two engines, one after the other.

Needs vLLM and kvlayer-vllm in this environment: see the README beside this file.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

for name, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)


def serve(model: str, directory: str) -> None:
    """One engine: answer a prompt, say what was not computed, end."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    cache = KVTransferConfig(
        kv_connector="KVLayerConnector",
        kv_connector_module_path="kvlayer_vllm",
        kv_role="kv_both",
        kv_connector_extra_config={
            "tiers": [
                {"url": "cpu://?capacity=256MiB"},
                {
                    "url": f"file://{directory}?capacity=1GiB",
                    "write": "back",
                    "deadline_seconds": 60.0,  # a disk slower than that is a miss
                },
            ]
        },
    )
    llm = LLM(
        model,
        kv_transfer_config=cache,
        dtype="float32",
        block_size=32,
        max_model_len=2048,
        enforce_eager=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
    )
    numbers = random.Random(5)
    prompt = {"prompt_token_ids": [numbers.randrange(300) for _ in range(1500)]}
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    (answer,) = llm.generate([prompt], sampling, use_tqdm=False)
    tokens = list(answer.outputs[0].token_ids)
    print("ANSWER", json.dumps([tokens, answer.num_cached_tokens]), flush=True)
    llm.llm_engine.engine_core.shutdown()  # what was stored reaches the disk


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model = sys.argv[1] if len(sys.argv) > 1 else str(tiny_model(Path(scratch) / "model"))
        found = []
        for number in ("first", "second"):
            ran = subprocess.run(
                [sys.executable, __file__, "--serve", model, f"{scratch}/kv"],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            line = next(each for each in ran.stdout.splitlines() if each.startswith("ANSWER"))
            tokens, cached = json.loads(line.removeprefix("ANSWER"))
            print(f"{number} process: {cached} of 1500 prompt tokens were not computed")
            found.append(tokens)
        print("the same answer" if found[0] == found[1] else "DIFFERENT answers")


def tiny_model(folder: Path) -> Path:
    """Random weights, for want of a model."""
    from kvlayer_vllm.bench.models import random_model

    small = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    return random_model(folder, **small, num_attention_heads=4, num_key_value_heads=2)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        main()

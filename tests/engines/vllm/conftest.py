"""The real engine on a CPU, small models, and what a scheduler would hand to the connector.

Nothing here is collected where vLLM is not installed: the session ``vllm`` has an environment with
it, the session ``tests`` has none. ``--processor`` runs all of it as on a processor with fewer
instructions (``vllm_processor.py``).
"""

from __future__ import annotations

import os
import random
import threading
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm_processor
from vllm_process import EngineProcess
from zygote import Zygote

HAS_VLLM = find_spec("vllm") is not None

if HAS_VLLM:
    from kvlayer_vllm.bench.models import random_model
    from kvlayer_vllm.bench.serving import ENVIRONMENT
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--processor",
        choices=sorted(vllm_processor.LEVELS),
        default=vllm_processor.NATIVE,
        help="run vLLM as on a processor with nothing newer than these instructions",
    )


def _level(config: pytest.Config) -> str:
    # Options of a conftest below the arguments' folders come too late: then there is no choice.
    return str(config.getoption("--processor", vllm_processor.NATIVE))


def pytest_configure(config: pytest.Config) -> None:
    if not HAS_VLLM:
        return
    os.environ.update(ENVIRONMENT)  # before anything imports the engine
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the one thing an eager engine compiles: logprobs
    vllm_processor.pretend(_level(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the engine's own, of which there are many
        import vllm.v1.engine.llm_engine  # noqa: F401


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if HAS_VLLM:
        terminalreporter.write_line(vllm_processor.describe(_level(config)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the engine and its libraries warn of is theirs; what kvlayer does stays an error."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.filterwarnings("error:::kvlayer"), append=False)


TINY: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers."""
    return random_model(tmp_path_factory.mktemp("models") / "tiny", **TINY)


@pytest.fixture(scope="session")
def tiny_long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for prompts of up to 33,000 tokens."""
    folder = tmp_path_factory.mktemp("models") / "tiny-long"
    return random_model(folder, **TINY, max_position_embeddings=33_000)


@pytest.fixture(scope="session")
def vllm_config(tiny: Path) -> Any:
    """vLLM's own configuration of that model."""
    from vllm import EngineArgs
    from vllm.config import KVTransferConfig

    return EngineArgs(
        model=str(tiny),
        dtype="float32",
        block_size=32,
        max_model_len=2048,
        distributed_executor_backend="uni",
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVLayerConnector",
            kv_connector_module_path="kvlayer_vllm",
            kv_role="kv_both",
        ),
    ).create_engine_config()


@pytest.fixture
def spec() -> Any:
    """``spec(kind, **changes)``: one of vLLM's descriptions of a layer's KV."""
    import torch
    from vllm.v1 import kv_cache_interface as interface

    def make(kind: str, **changes: Any) -> Any:
        fields: dict[str, Any] = {
            "block_size": 32,
            "num_kv_heads": 2,
            "head_size": 64,
            "dtype": torch.float32,
        }
        return getattr(interface, kind)(**{**fields, **changes})

    return make


@pytest.fixture
def kv_cache_config() -> Any:
    """``kv_cache_config((names, spec), ...)``: what the engine tells of its groups."""
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    def make(*groups: tuple[list[str], Any], blocks: int = 64, **changes: Any) -> Any:
        found = [KVCacheGroupSpec(names, spec, **changes) for names, spec in groups]
        return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=found)

    return make


@pytest.fixture
def request_of() -> Any:
    """``request_of(tokens, **fields)``: a request as the scheduler has it."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    def make(tokens: Any, **fields: Any) -> Any:
        return Request(
            request_id=fields.pop("request_id", "one"),
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=4),
            pooling_params=None,
            **fields,
        )

    return make


@pytest.fixture
def changed() -> Any:
    """``changed(config, "model_config", quantization="fp8")``: a view of a configuration."""

    def change(config: Any, part: str, **fields: Any) -> Any:
        inner = getattr(config, part)
        names = [name for name in dir(config) if name.endswith("_config")]
        copy = SimpleNamespace(**{name: getattr(config, name) for name in names})
        setattr(copy, part, _Over(inner, fields))
        return copy

    return change


class _Over:
    """An object with some attributes of its own in front of another's."""

    def __init__(self, inner: Any, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.fixture
def no_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of models are remembered below the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


# -- both halves of the adapter, without an engine -------------------------------------------------


@pytest.fixture
def desk(vllm_config: Any, spec: Any, kv_cache_config: Any, no_cache_home: None) -> Iterator[Any]:
    """``desk(windows=False, **how)``: a ``Desk``, with a window for the second layer or none."""
    from vllm_desk import LAYERS, Desk

    made: list[Desk] = []

    def make(*, windows: bool = False, blocks: int = 64, **how: Any) -> Desk:
        groups = [(LAYERS, spec("FullAttentionSpec"))]
        if windows:
            window = spec("SlidingWindowSpec", sliding_window=64)
            groups = [(LAYERS[:1], spec("FullAttentionSpec")), (LAYERS[1:], window)]
        made.append(Desk(vllm_config, kv_cache_config(*groups, blocks=blocks), **how))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def go_on(desk: Any) -> Iterator[threading.Event]:
    """What ``vllm_desk.hanging`` waits for."""
    event = threading.Event()
    yield event
    event.set()  # or what a failed test leaves would never end


@pytest.fixture
def below(tmp_path: Path) -> list[dict[str, Any]]:
    """Tiers for a desk: host memory, and a disk that has at once what is stored."""
    return [
        {"url": "cpu://?capacity=64MiB"},
        {"url": f"file://{tmp_path}/kv", "write": "through", "deadline_seconds": 30.0},
    ]


# -- engines in processes of their own -------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def zygote() -> Iterator[Zygote]:
    """Forks engines. For every test, so that it imports vLLM while the first ones run."""
    forking = Zygote("vllm_engine")
    yield forking
    forking.close()


@pytest.fixture
def engine_process(zygote: Zygote) -> Iterator[Any]:
    """``engine_process(model, cache, **options)``; what a test leaves running is killed."""
    running: list[EngineProcess] = []

    def start(model: Path, cache: Any, **options: Any) -> EngineProcess:
        running.append(EngineProcess(zygote, model, cache, **options))
        return running[-1]

    yield start
    for each in running:
        if not each.has_ended:
            each.kill()


# -- one engine in this process, for every test that looks inside ---------------------------------

ANSWER = 12
OPTIONS: dict[str, Any] = {
    "dtype": "float32",  # in bf16 near ties decide greedy answers
    "max_num_batched_tokens": 256,  # longer prompts are computed in steps
    "num_gpu_blocks_override": 40,
    "max_model_len": 1024,
}


@pytest.fixture(scope="session")
def prompts() -> dict[str, list[list[int]]]:
    """34 prompts by what they are for."""
    numbers = random.Random(7)
    words = [numbers.randrange(300, 512) for _ in range(4000)]

    def cut(start: int, count: int) -> list[int]:
        return words[start : start + count]

    return {
        "single": [cut(37 * n, 90 + 23 * n) for n in range(12)],
        "shared": [
            cut(1000 * batch, 160) + cut(300 + 90 * n + 7 * batch, 30 + 11 * n)
            for batch in range(1, 4)
            for n in range(4)
        ],
        "chunked": [cut(1700, 700), cut(2100, 577), cut(2000, 512)],
        # Nine blocks each, of the 39 there are; the answers need a tenth.
        "preempted": [cut(130 + 290 * n, 280) for n in range(4)],
        "control": [cut(555 + 100 * n, 200) for n in range(3)],
    }


@pytest.fixture(scope="session")
def expected(
    tiny: Path, zygote: Zygote, prompts: dict[str, list[list[int]]]
) -> dict[tuple[int, ...], tuple[int, ...]]:
    """What the engine answers without kvlayer, each prompt alone."""
    process = EngineProcess(zygote, tiny, None, **OPTIONS)
    every = [prompt for some in prompts.values() for prompt in some]
    answers = [process("ask", [prompt], ANSWER)[0] for prompt in every]
    process.close()
    return {tuple(prompt): tuple(found) for prompt, (found, _) in zip(every, answers, strict=True)}


class Inside:
    """The engine of this process, with kvlayer above a tier that falls ill on command."""

    def __init__(self, serving: Any, tier: Any) -> None:
        self.serving = serving
        self.tier = tier

    @property
    def half(self) -> Any:
        return self.serving.connector.scheduler

    @property
    def portal(self) -> Any:
        return self.half.portal

    def ask(self, prompts: list[list[int]], **how: Any) -> list[tuple[int, ...]]:
        return [answer.tokens for answer in self.serving.ask(prompts, ANSWER, **how)]

    @property
    def loaded(self) -> int:
        """Tokens copied from host memory into the engine so far."""
        stack = self.portal.cache.stack
        part = stack.planner.directory.needs[0]
        per_token = stack.planner.payload(part, 1024).nbytes // 1024
        return int(stack.host.loaded_nbytes // per_token)

    def forget(self) -> None:
        """The engine's own prefix cache holds nothing any more."""
        self.serving.rest()
        assert self.serving.core.scheduler.reset_prefix_cache()

    def leave_memory(self, prompt: list[int], salt: str = "") -> None:
        """The prompt's KV is on the tier alone."""
        from kvlayer import Scope
        from kvlayer_vllm.bench.settled import settled

        async def evict(cache: Any) -> int:
            scope = Scope.private(salt) if salt else Scope()
            return int(await cache.control.evict(prompt, tier="cpu", scope=scope))

        self.forget()
        settled(self.half)
        self.portal.call(evict)


@pytest.fixture(scope="session")
def engine(tiny: Path) -> Iterator[Inside]:
    """The one engine of this process."""
    from kvlayer.bench.sick import SickTier
    from kvlayer.config.registry import BACKENDS
    from kvlayer_vllm import scheduler
    from kvlayer_vllm.bench.serving import Serving

    tier = SickTier.fresh()
    tier.deadline = DEADLINE  # a slow one answers after twice that: never in time
    opened = scheduler.Portal.open
    with pytest.MonkeyPatch.context() as patch:
        backends = BACKENDS.extended({"sick": tier})
        patch.setattr(
            scheduler.Portal, "open", lambda *args, **how: opened(*args, backends=backends, **how)
        )
        below = {"write": "through", "deadline_seconds": DEADLINE, "pause_seconds": 0.2}
        serving = Serving(
            str(tiny),
            cache={
                "tokens_per_chunk": 64,
                "tokens_per_tail": 32,
                "held_share": 1.0,  # few blocks, and what is stored is counted
                "report_prefill": False,  # what is found is loaded
                "tiers": [{"url": "cpu://?capacity=1GiB"}, {"url": "sick://", **below}],
            },
            enable_prefix_caching=True,
            **OPTIONS,
        )
    yield Inside(serving, tier)
    serving.close()


DEADLINE = 2.0  # of a tier that answers from a dictionary: while it is well, in far less

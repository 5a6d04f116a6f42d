"""What the tier reaches of vLLM's own offload: the other half of ``engine``, with its rules."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

from kvlayer.errors import UnsupportedError
from kvlayer_vllm.engine import (
    KVCacheConfig,
    KVConnectorBase_V1,
    VllmConfig,
    check_version,
    engine_version,
    module,
)

__all__ = [
    "TESTED",
    "JobResult",
    "Locality",
    "LookupResult",
    "Medium",
    "OffloadingSpec",
    "ReqContext",
    "RequestOffloadingContext",
    "SecondaryTierManager",
    "TransferJob",
    "check_root",
    "check_tier_version",
    "has_adapter",
    "hash_root",
    "offloading_engine",
    "tell_adapters",
]

TESTED: Final = ((0, 32), (0, 33))
"""First and last minor version that the tier was tested with: before, vLLM had no such tiers."""

OffloadingSpec: TypeAlias = Any
ReqContext: TypeAlias = Any
TransferJob: TypeAlias = Any

if TYPE_CHECKING:

    class SecondaryTierManager:
        """What a tier inherits: see ``vllm.v1.kv_offload.tiering.base``."""

        locality: Any
        block_size_bytes: int

        def __init__(
            self,
            offloading_spec: Any,
            primary_kv_view: memoryview,
            tier_type: str,
            backpressure_detector: Any = None,
        ) -> None: ...

    JobResult: Any
    Locality: Any
    LookupResult: Any
    Medium: Any
    RequestOffloadingContext: Any
else:
    _base = module("v1.kv_offload.tiering.base")

    SecondaryTierManager = _base.SecondaryTierManager
    JobResult = _base.JobResult
    Locality = _base.Locality
    LookupResult = _base.LookupResult
    Medium = _base.Medium
    RequestOffloadingContext = _base.RequestOffloadingContext


def check_tier_version() -> None:
    """Raise ``UnsupportedError`` outside the versions that the tier was tested with."""
    check_version(engine_version(), TESTED)


def offloading_engine() -> tuple[VllmConfig, KVCacheConfig]:
    """The configuration of the engine whose ``OffloadingConnector`` is being made.

    vLLM gives a tier what concerns its offload, which does not say what the weights are. But a
    connector that makes it is among the callers, and knows.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, KVConnectorBase_V1):
            held = vars(caller)
            return held["_vllm_config"], held["_kv_cache_config"]
        frame = frame.f_back
    raise UnsupportedError(
        "no connector of vLLM's has made this tier, so that the model's weights are not known",
        hint="name it in secondary_tiers of an OffloadingConnector with TieringOffloadingSpec",
    )


def hash_root(algorithm: str) -> str | None:
    """Where the chain of vLLM's block hashes begins, in hex; None where that is a random number.

    vLLM makes it later than its tiers, by the same rule.
    """
    utils = module("v1.core.kv_cache_utils")
    make = module("utils.hashing").get_hash_fn_by_name(algorithm)
    if make in utils._NON_CRYPTO_HASH_FUNCTIONS and os.getenv("PYTHONHASHSEED") is None:
        return None
    found: bytes = make(utils.resolve_none_hash_seed(make))
    return found.hex()


def check_root(root: str | None) -> None:
    """Raise ``UnsupportedError`` unless vLLM's hashes do begin where :func:`hash_root` said."""
    found = getattr(module("v1.core.kv_cache_utils"), "NONE_HASH", None)
    if root is not None and found is not None and bytes(found).hex() != root:
        raise UnsupportedError(
            "vLLM's block hashes begin elsewhere than its rule says: its names are not understood"
        )


@dataclass(frozen=True, slots=True)
class _Adapter:
    """What a request's context is told: whether the request has a LoRA adapter."""

    is_there: bool
    tells: ClassVar[bool] = False
    """Whether vLLM's contexts are being told."""


def tell_adapters() -> None:
    """From now on vLLM tells its tiers which requests have adapters. Idempotent.

    It tells them nothing of a request but its number. Raises ``UnsupportedError`` where it makes
    what it tells in another way.
    """
    if _Adapter.tells:
        return
    scheduler = module("distributed.kv_transfer.kv_connector.v1.offloading.scheduler")
    make = getattr(scheduler, "_create_req_context", None)
    if make is None:
        raise UnsupportedError(
            "vLLM does not say which requests have LoRA adapters, and this engine serves some",
            hint="serve without --enable-lora, or through KVLayerConnector, which names adapters",
        )

    def told(request: Any) -> Any:
        context = make(request)
        context.set_state(_Adapter(request.lora_request is not None))
        return context

    scheduler._create_req_context = told
    _Adapter.tells = True


def has_adapter(context: ReqContext) -> bool:
    """Whether a request has a LoRA adapter, or nobody said; after :func:`tell_adapters`."""
    said = context.get_state(_Adapter)
    return said is None or said.is_there

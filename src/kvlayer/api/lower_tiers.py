"""Opening the tiers below host memory: backends by their URLs, each behind a guard."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvlayer._masked import Mask
from kvlayer.abc.backend import Backend, Capability
from kvlayer.abc.codec import Codec
from kvlayer.config.model import TierConfig
from kvlayer.config.registry import POLICIES, Registry, make_codec
from kvlayer.errors import BackendError, BackendTimeoutError, IdentityError, KVLayerError
from kvlayer.identity.namespace import Namespace
from kvlayer.results import Cause
from kvlayer.runtime.foreign import bounded, words
from kvlayer.tier.guard.guard import Guard
from kvlayer.tier.tier import LowerTier, Tier
from kvlayer.tier.transfer.encodings import Coding, Raw, Segments

__all__ = [
    "check_sharing",
    "close_tier",
    "codings_of",
    "lower_tier",
    "masks_of",
    "names_of",
    "open_tier",
    "outlives",
]


def codings_of(
    tiers: Sequence[TierConfig], codecs: Registry[type[Codec]]
) -> list[Sequence[Coding]]:
    """By tier: the encoding it writes, and raw where it may hold some from before."""
    return [
        (Segments(make_codec(tier.codec, codecs=codecs)), Raw()) if tier.codec else (Raw(),)
        for tier in tiers
    ]


def masks_of(tiers: Sequence[TierConfig]) -> list[Mask]:
    """By tier, what hides its options in what its backend says."""
    public = frozenset(POLICIES.names())
    return [Mask(tier.url, public=public) for tier in tiers]


def outlives(backend: Backend) -> bool:
    """Whether what a backend holds outlives this process, or is shared with others."""
    return bool(backend.capabilities & {Capability.PERSISTENT, Capability.SHARED})


def check_sharing(namespace: Namespace, backends: Sequence[Backend]) -> None:
    """KV of unknown weights must not leave the process: another model's would be served."""
    if not namespace.is_private:
        return
    for backend in backends:
        if outlives(backend):
            raise IdentityError(
                f"{backend.scheme}:// outlives or is shared beyond this process, but the "
                "model's weights are not known",
                hint="set model.weights to the model's folder, or to 'sha256:<64 hex digits>'",
            )


def names_of(backends: Sequence[Backend]) -> list[str]:
    """Tier names for reports: the scheme, numbered from its second use on."""
    seen: dict[str, int] = {}
    names: list[str] = []
    for backend in backends:
        count = seen[backend.scheme] = seen.get(backend.scheme, 0) + 1
        names.append(backend.scheme if count == 1 else f"{backend.scheme}-{count}")
    return names


def lower_tier(place: Tier, backend: Backend, tier: TierConfig, *, max_nbytes: int) -> LowerTier:
    """A backend behind a guard, as ``tier`` says; ``place`` has its number and its name.

    ``max_nbytes``: of what waits to be written, where ``tier`` sets no bound.
    """
    return LowerTier(
        place.index,
        place.name,
        place.emit,
        backend=backend,
        guard=Guard(
            tier.deadline_seconds,
            tier.max_inflight,
            max_write_nbytes=tier.max_inflight_bytes or max_nbytes,
            pause=tier.pause_seconds,
        ),
        write=tier.write,
        tails=tier.tails,
        is_shared=Capability.SHARED in backend.capabilities,
        was_empty=Capability.PERSISTENT not in backend.capabilities,
    )


async def open_tier(tier: LowerTier) -> None:
    """Open a tier's backend, within its deadline.

    Raises ``BackendTimeoutError`` where that takes longer, what the backend raises of kvlayer's
    errors, and ``BackendError`` for whatever else it raises.
    """
    seconds = tier.guard.deadline
    began = asyncio.get_running_loop().time()
    try:
        await bounded(tier.backend.open, seconds)
    except KVLayerError:
        raise
    except Exception as exc:
        if isinstance(exc, TimeoutError) and asyncio.get_running_loop().time() >= began + seconds:
            raise BackendTimeoutError(
                f"{tier.name} did not open within {seconds:g} s",
                hint="raise the tier's deadline_seconds, or leave the tier out",
            ) from exc
        raise BackendError(
            f"{tier.name} did not open: {words(exc)}",
            hint="correct what it says, or repair the plugin: it should raise BackendError",
        ) from exc


async def close_tier(tier: LowerTier, seconds: float) -> None:
    """Close a tier, which holds nothing lent any more: its failure is reported, not raised."""
    try:
        await bounded(tier.backend.aclose, seconds)
    except Exception as exc:  # noqa: BLE001  # foreign code: it must not stop the others' close
        tier.complains(Cause.TIER_DOWN, f"not closed: {words(exc)}")

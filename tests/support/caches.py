"""Small caches for tests: a layout, a configuration and what they store."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

from kvlayer import AttentionKind, CacheConfig, KVGroup, KVLayout, ModelConfig, TierConfig
from kvlayer.layout import NHD

WEIGHTS = "sha256:" + "ab" * 32


def group(
    *, layers: int = 3, heads: int = 2, head_size: int = 8, dtype: str = "bfloat16"
) -> KVGroup:
    """A small grouped-query model."""
    return KVGroup(AttentionKind.MHA, tuple(range(layers)), dtype, heads, head_size)


def layout(tokens_per_block: int = 4) -> KVLayout:
    """Its engine."""
    return KVLayout.single(group(), NHD, tokens_per_block=tokens_per_block)


def config(
    directory: Path | None = None,
    *,
    host: str = "1MiB",
    weights: str = WEIGHTS,
    write: str = "through",
    tokens_per_chunk: int = 16,
    file_options: str = "",
    codec: str = "",
    **more: object,
) -> CacheConfig:
    """A host tier and, with ``directory``, a file tier below it."""
    tiers = [TierConfig(url=f"cpu://?capacity={host}")]
    if directory is not None:
        url = f"file://{directory}?direct=auto{file_options}"
        tiers.append(
            TierConfig(
                url=url,
                write=write,  # type: ignore[arg-type]
                codec=codec,
                deadline_seconds=30.0,
                max_inflight_bytes=1 << 30,  # tests fill host memory, and expect all of it below
            )
        )
    return CacheConfig(
        model=ModelConfig(weights=weights, compute_dtype="bfloat16"),
        tiers=tuple(tiers),
        tokens_per_chunk=tokens_per_chunk,
        **more,  # type: ignore[arg-type]
    )


def tokens(count: int, seed: int = 0) -> array[int]:
    """Random token ids."""
    rng = random.Random(seed)
    return array("i", (rng.randrange(50_000) for _ in range(count)))


def stored_files(directory: Path) -> list[Path]:
    """The object files of a file tier, in no particular order."""
    root = directory / "v2"
    return [
        path
        for path in root.rglob("*")
        if path.is_file() and path.name.endswith(".raw") and "quarantine" not in path.parts
    ]

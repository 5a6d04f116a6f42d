"""The demo's directory of stored KV: how caches open it, what lies in it, and how to damage it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import quote

from kvlayer import CacheConfig, Scope, TierConfig
from kvlayer.errors import KVLayerError
from kvlayer.identity.keys import ChunkChain
from kvlayer.identity.links import link_size

__all__ = ["CHUNK_TOKENS", "PASS_TOKENS", "DemoError", "Store"]

PASS_TOKENS: Final = 512
CHUNK_TOKENS: Final = 256


class DemoError(KVLayerError):
    """The demo could not set up what it wanted to show."""


class Store:
    """A directory under a ``file://`` tier."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()

    def config(self, *, one_by_one: bool = False) -> CacheConfig:
        """Host memory above the directory; a store returns once the directory has it all.

        ``one_by_one`` writes one object after the other and waits for the medium each time.
        """
        url = f"file://{quote(str(self.directory))}?capacity=2GiB"
        if one_by_one:
            url += "&threads=1&fsync=true"
        return CacheConfig(
            tiers=(
                TierConfig(url="cpu://?capacity=256MiB"),
                # No deadline in practice: on a busy machine the demo shall be slow, not cold.
                TierConfig(url=url, write="through", deadline_seconds=60.0),
            ),
            tokens_per_chunk=CHUNK_TOKENS,
        )

    def objects(self, ids: Sequence[int]) -> list[Path | None]:
        """The file of each chunk of a prompt; None where there is none."""
        chain = ChunkChain(
            list(ids),
            Scope(),
            tokens_per_chunk=CHUNK_TOKENS,
            tokens_per_tail=link_size(CHUNK_TOKENS),
        )
        names = [chunk.hex() for chunk in chain.hashes]
        found = [sorted(self.directory.glob(f"v2/*/{name[:2]}/{name}-*")) for name in names]
        return [files[0] if files else None for files in found]

    def present(self, ids: Sequence[int]) -> int:
        """How many chunks of a prompt are in the directory."""
        return sum(path is not None for path in self.objects(ids))

    def remove(self, ids: Sequence[int]) -> None:
        """Delete a prompt's objects. Only while nobody has the directory open."""
        for path in self.objects(ids):
            if path is not None:
                path.unlink()

    def unfinished(self) -> int:
        """How many files were being written when their process died, or still are."""
        return sum(1 for _ in self.directory.glob("v2/tmp/*/*.part"))

    def flip_byte(self, ids: Sequence[int], chunk: int) -> str:
        """Invert one byte in the middle of a chunk's object; says what was done."""
        path = self._object(ids, chunk)
        at = path.stat().st_size // 2
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0xFF]))
        return f"byte {at:,} of {path.stat().st_size:,} of {path.name[:20]}... inverted"

    def cut(self, ids: Sequence[int], chunk: int) -> str:
        """Truncate a chunk's object to half its size; says what was done."""
        path = self._object(ids, chunk)
        before = path.stat().st_size
        os.truncate(path, before // 2)
        return f"{path.name[:20]}... cut from {before:,} to {before // 2:,} bytes"

    def _object(self, ids: Sequence[int], chunk: int) -> Path:
        path = self.objects(ids)[chunk]
        if path is None:
            raise DemoError(f"chunk {chunk} of the document was not stored in {self.directory}")
        return path

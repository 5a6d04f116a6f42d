"""A directory says what its namespaces stand for, and believes only what their digests confirm."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from kvlayer_backends.file.backend import FileBackend
from kvlayer_backends.file.options import FileOptions

CANONICAL = b"\x81\xa5model\xa1x"
DIGEST = sha256(CANONICAL).hexdigest()


@pytest.mark.asyncio
async def test_a_described_namespace_is_known_after_a_restart(tmp_path: Path) -> None:
    async with FileBackend(str(tmp_path)) as backend:
        assert await backend.namespaces() == {}
        await backend.describe(DIGEST, CANONICAL)
        await backend.describe(DIGEST, CANONICAL)
    async with FileBackend(str(tmp_path)) as backend:
        assert await backend.namespaces() == {DIGEST: CANONICAL}
        assert [listed async for listed in backend.list()] == []
    assert list((tmp_path / "v2" / "tmp").iterdir()) == []


@pytest.mark.asyncio
async def test_a_description_that_is_not_its_digests_is_ignored(tmp_path: Path) -> None:
    async with FileBackend(str(tmp_path)) as backend:
        await backend.describe(DIGEST, CANONICAL)
        path = tmp_path / "v2" / DIGEST / "namespace.msgpack"
        path.write_bytes(CANONICAL + b"!")
        assert await backend.namespaces() == {}
        path.write_bytes(b"x" * 1_000_000)
        assert await backend.namespaces() == {}


@pytest.mark.asyncio
async def test_a_read_only_directory_is_not_described(tmp_path: Path) -> None:
    async with FileBackend(str(tmp_path), FileOptions(readonly=True)) as backend:
        await backend.describe(DIGEST, CANONICAL)
    assert list(tmp_path.iterdir()) == []

"""What a directory holds, as a list is drawn from it: what was counted, or read from the disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

from kvlayer.abc.backend import Listed
from kvlayer_backends.file.janitor import Janitor
from kvlayer_backends.file.scan import Listing
from kvlayer_backends.file.site import Site

__all__ = ["counted", "read"]

_AT_ONCE = 1_000
_PATIENCE_SECONDS = 1.0  # whoever reads the list has a deadline for each step


async def counted(janitor: Janitor, prefix: str) -> AsyncGenerator[list[Listed]]:
    """What the janitor knows, and what a count that it makes meanwhile finds, as it finds it.

    Nothing is read twice: of what was counted before only what has changed is looked at again.
    Raises ``OSError`` in the end when not everything could be read.
    """
    counting = asyncio.ensure_future(janitor.count())
    try:
        if janitor.is_recovered:  # what was deleted elsewhere meanwhile should not be listed
            await asyncio.wait({counting}, timeout=_PATIENCE_SECONDS)
        at = 0
        while (ledger := janitor.ledger) is not None:
            is_counted = counting.done()
            while at < ledger.rows:
                batch, at = ledger.listed(prefix, at, _AT_ONCE)
                yield batch
            if is_counted:
                break
            more = asyncio.ensure_future(janitor.progress())
            try:
                await asyncio.wait({counting, more}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                more.cancel()
        await counting
    finally:
        if counting.cancel():
            with suppress(asyncio.CancelledError, Exception):
                await counting


async def read(site: Site, prefix: str) -> AsyncGenerator[list[Listed]]:
    """What lies on the disk. Raises ``OSError`` as :func:`counted` does."""
    listing = Listing(site.paths, prefix)
    while (batch := await site.meta.run(listing.more, _AT_ONCE)) is not None:
        yield batch

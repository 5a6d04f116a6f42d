"""How a plugin's blocking work leaves the event loop without breaking the contract on memory.

``asyncio.to_thread`` does not do: cancelled, it returns while its thread still reads or fills what
was lent to it. :class:`Offload` waits for the thread first.
"""

from __future__ import annotations

from kvlayer._offload import Offload

__all__ = ["Offload"]

"""How a plugin's blocking work leaves the event loop without breaking the contract on memory.

``asyncio.to_thread`` does not do: cancelled, it returns while its thread still reads or fills what
was lent to it. :class:`Offload` waits for the thread first. :class:`Threads` are for work that no
loop waits for: unlike those of ``concurrent.futures`` they never keep a process from ending.
"""

from __future__ import annotations

from kvlayer.runtime.offload import Offload
from kvlayer.runtime.threads import Threads

__all__ = ["Offload", "Threads"]

"""What a worker tells the scheduler of itself, and how the scheduler's half gets it.

vLLM's handshake is not used: from a ``MultiConnector`` it carries what the first of its connectors
says and hands that to all of them, and some raise for what is not their own. So a worker in the
scheduler's process, whose tensors are there before a scheduler is made, is found here by the name
of the engine. Workers elsewhere introduce themselves with the answers of the engine's first step
(``Step.asks``, ``Answers.introductions``).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Final
from weakref import WeakValueDictionary

from kvlayer_vllm.layouts import RankLayout
from kvlayer_vllm.lent_tensors import LentTensors

__all__ = ["Introduction", "announce", "announced"]


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Introduction:
    """What a worker tells the scheduler once its tensors are there."""

    rank: RankLayout
    """With the layers of its own stage alone."""
    tensors: LentTensors | None
    """The tensors themselves, for a scheduler in the same process."""


_HERE: Final = WeakValueDictionary[tuple[str, int], Introduction]()
_NUMBERS: Final = count()


def announce(engine_id: str, introduction: Introduction) -> None:
    """A worker of this engine is in this process. The caller keeps ``introduction`` alive."""
    _HERE[engine_id, next(_NUMBERS)] = introduction


def announced(engine_id: str) -> Introduction | None:
    """What the first worker of this engine has announced that nobody has taken; None: nobody has.

    A connector that is there twice takes what its own twin has announced: vLLM makes them in the
    same order in both halves.
    """
    mine = min((key for key in _HERE if key[0] == engine_id), default=None)
    return None if mine is None else _HERE.pop(mine, None)

"""What a worker tells the scheduler of itself, and how the scheduler's half gets it.

vLLM's handshake is not used: from a ``MultiConnector`` it carries what the first of its connectors
says and hands that to all of them, and some raise for what is not their own. So a worker in the
scheduler's process, which is made before a scheduler is, is found here by the engine's own
configuration. Workers elsewhere introduce themselves with the answers of the engine's first step
(``Step.asks``, ``Answers.introductions``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

from kvlayer_vllm.engine import VllmConfig
from kvlayer_vllm.layouts import RankLayout
from kvlayer_vllm.lent_tensors import LentTensors

__all__ = ["Introduction", "Worker", "announce", "announced", "withdraw"]


@dataclass(frozen=True, slots=True, eq=False)
class Introduction:
    """What a worker tells the scheduler once its tensors are there."""

    rank: RankLayout
    """With the layers of its own stage alone."""
    tensors: LentTensors | None
    """The tensors themselves, for a scheduler in the same process."""


class Worker(Protocol):
    """A connector's half in a worker."""

    @property
    def introduction(self) -> Introduction | None:
        """None while it is off, or has no tensors."""
        ...


_HERE: Final = WeakKeyDictionary[Worker, Any]()
"""In the order in which they were made: the model's configuration, an object that all connectors of
one engine share, whatever else they are configured for."""


def announce(worker: Worker, vllm_config: VllmConfig) -> None:
    """A worker of this engine is made in this process, on or off. The caller keeps it alive."""
    _HERE[worker] = vllm_config.model_config


def announced(vllm_config: VllmConfig) -> Worker | None:
    """The first worker of this engine that nobody has taken; None: there is none.

    A connector that is there twice takes its own twin: vLLM makes them in the same order in both
    halves, and one that is off has its place among them.
    """
    for worker, model in list(_HERE.items()):
        if model is vllm_config.model_config:
            del _HERE[worker]
            return worker
    return None


def withdraw(worker: Worker) -> None:
    """It closes: nobody takes it. Idempotent."""
    _HERE.pop(worker, None)

"""A vLLM engine in a process of its own, driven from a test."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from zygote import Zygote

__all__ = ["EngineProcess"]


class EngineProcess:
    """An engine elsewhere: see ``vllm_engine.py``."""

    def __init__(self, zygote: Zygote, model: Path, cache: Any, **options: Any) -> None:
        self._victim = zygote.start("serve", model=str(model), cache=cache, options=options)
        self.has_ended = False
        assert self._victim.told() == "ready"

    @property
    def pid(self) -> int:
        return self._victim.pid

    def __call__(self, verb: str, *arguments: Any) -> Any:
        self.begin(verb, *arguments)
        return self._victim.told()

    def begin(self, verb: str, *arguments: Any) -> None:
        """Send a request and do not wait."""
        self._victim.say(json.dumps([verb, *arguments]))

    def kill(self) -> None:
        """SIGKILL."""
        self.has_ended = True
        self._victim.signal(signal.SIGKILL)
        assert self._victim.end() == -signal.SIGKILL

    def dies(self) -> int:
        """Wait until it ends without having answered; its exit code."""
        assert self._victim.line() is None
        self.has_ended = True
        return self._victim.end()

    def close(self) -> None:
        """Close the engine, whose process then ends by itself."""
        self("close")
        self.has_ended = True
        assert self._victim.end() == 0

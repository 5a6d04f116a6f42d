"""A vLLM engine in a process of its own, driven from a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["EngineProcess"]

_SCRIPT = Path(__file__).parents[1] / "engines" / "vllm" / "engine_process.py"


class EngineProcess:
    """An engine elsewhere: see ``engine_process.py``. Killed, if need be, by its own handle."""

    def __init__(self, model: Path, cache: Any, **options: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(_SCRIPT), str(model), json.dumps(cache), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def __call__(self, verb: str, *arguments: Any) -> Any:
        self.begin(verb, *arguments)
        return self._answer()

    def begin(self, verb: str, *arguments: Any) -> None:
        """Send a request and do not wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([verb, *arguments]) + "\n")
        self.process.stdin.flush()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the engine's process ended with {self.process.wait()}"
        return json.loads(line)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self._reap()

    def close(self) -> None:
        """Close the engine. What an interpreter does when it exits is nobody's concern then."""
        self("close")
        self.kill()

    def _reap(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait(120)

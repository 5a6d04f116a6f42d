"""One target under a coverage-guided fuzzer: ``fuzz_process.py TARGET [libFuzzer's arguments]``.

libFuzzer keeps inputs that reach new code in the first directory it is given, writes what fails to
``-artifact_prefix`` and exits with 77 then.
"""

from __future__ import annotations

import sys
import tracemalloc
from time import process_time

import atheris

with atheris.instrument_imports(include=["kvlayer", "kvlayer_backends", "tomllib", "urllib"]):
    import fuzz_targets


def main() -> None:
    name, *arguments = sys.argv[1:]
    target = fuzz_targets.TARGETS[name]
    tracemalloc.start()
    counted = {"inputs": 0, "accepted": 0}
    due = 0.0

    def one(given: bytes) -> None:
        nonlocal due
        counted["inputs"] += 1
        counted["accepted"] += fuzz_targets.examine(target, given)
        if process_time() > due:  # often: libFuzzer ends the process without a word to Python
            due = process_time() + 1.0
            said = f"accepted {counted['accepted']} of {counted['inputs']}"
            sys.stderr.write(f"{said} in {process_time():.0f} CPU seconds\n")

    # Hangs are measured in CPU seconds, by ``examine``; a busy machine may stop us for a minute.
    limits = [
        f"-max_len={target.max_len}",
        "-timeout=300",
        "-report_slow_units=300",
        "-rss_limit_mb=1024",
    ]
    atheris.Setup([sys.argv[0], *limits, *arguments], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

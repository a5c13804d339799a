"""The process a contestant lives in: commands as JSON lines on stdin, answers as JSON lines on stdout.

    {"do": "load", "contestant": {...}}             -> laps of loading
    {"do": "warm_up", "texts": FILE}                -> the same
    {"do": "run", "texts": FILE, "vectors": FILE|null, "batch_size": N|null}

An answer is `{"wall_seconds", "cpu_seconds", "peak_rss_bytes", "anonymous_rss_bytes"}`; the processor time
is that of all threads of the process, the peak is the process's since its start. A mistake ends the process
with its traceback on stderr, which `harness` shows. Libraries that talk on stdout are sent to stderr.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.peers import ENGINES, Contestant, Engine, Vectors


def memory_bytes() -> tuple[int, int]:
    """Peak resident memory of this process, and its resident memory now that no file backs."""
    fields: dict[str, int] = {}
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key in ("VmHWM", "RssAnon"):
            fields[key] = int(value.split()[0]) * 1024
    return fields["VmHWM"], fields["RssAnon"]


def measured(work: Callable[[], object]) -> dict[str, float]:
    """What `work` took, as an answer."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak, anonymous = memory_bytes()
    return {
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "peak_rss_bytes": peak,
        "anonymous_rss_bytes": anonymous,
    }


def main() -> None:
    """Answer commands until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    engines: list[Engine] = []

    def load(command: dict[str, object]) -> None:
        fields = command["contestant"]
        if not isinstance(fields, dict):
            raise TypeError(f"contestant is {fields!r}, not an object")
        contestant = Contestant(**fields)
        engines.append(ENGINES[contestant.engine](contestant))

    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "load":
            answer = measured(lambda command=command: load(command))  # type: ignore[misc]
        else:
            answer = _embed(engines[0], command)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _embed(engine: Engine, command: dict[str, object]) -> dict[str, float]:
    texts = json.loads(Path(str(command["texts"])).read_text(encoding="utf-8"))
    if isinstance(command.get("batch_size"), int):
        engine.batch_size = int(str(command["batch_size"]))
    kept: list[Vectors] = []
    answer = measured(lambda: kept.append(engine.embed(texts)))
    if command.get("vectors"):
        np.save(str(command["vectors"]), kept[0])
    return answer


if __name__ == "__main__":
    main()

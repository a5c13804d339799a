"""A contestant whose engine needs no model: the harness is tested without one.

Every call is noted as one line "NAME TEXTS BATCH_SIZE" in the file that the folder names. A text
"die" ends the process.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import peers
from benchmarks.contestant import main


class Fake:
    """The vector of a text is its length and 1, in the order of the texts."""

    def __init__(self, contestant: peers.Contestant) -> None:
        self.batch_size = contestant.batch_size
        self._name = contestant.name
        self._calls = Path(contestant.folder)

    def embed(self, texts: Sequence[str]) -> peers.Vectors:
        """Note the call; work for a moment, longer with larger batches."""
        with self._calls.open("a", encoding="utf-8") as calls:
            calls.write(f"{self._name} {len(texts)} {self.batch_size}\n")
        if "die" in texts:
            raise SystemExit("the fake died as it was told")
        sum(range(self.batch_size * 1_000_000))
        return np.array([[len(text), 1] for text in texts], dtype=np.float32)


peers.ENGINES["fake"] = Fake  # type: ignore[index]  # a dict under its read-only type
main()

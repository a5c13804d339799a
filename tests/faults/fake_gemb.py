"""`gemb` with a fake engine, as a process that tests can kill: `fake_gemb.py embed docs.jsonl -o docs.npy`.

The environment says how it behaves: FAKE_SECONDS_PER_TOKEN, FAKE_LOAD_SECONDS, FAKE_WINDOW_SECONDS, and
FAKE_PEAK_FILE, where the peak of its memory in KiB is written at the end.
"""

import os
import resource
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from gemb.engine import Engine, windows
from gemb.jobs import embed
from tests.fakes import FakeEngine


def setting(name: str) -> float:
    return float(os.environ.get(name, "0"))


def open_engine(setup: object, notice: Callable[[str], None]) -> Engine:
    sys.stdout.write("chatter of a library\n")
    sys.stdout.flush()
    time.sleep(setting("FAKE_LOAD_SECONDS"))
    return FakeEngine(workers=2, seconds_per_token=setting("FAKE_SECONDS_PER_TOKEN"))


setattr(embed, "open_torch_engine", open_engine)  # noqa: B010 - the name is not exported
if setting("FAKE_WINDOW_SECONDS"):
    windows.WINDOW_SECONDS = setting("FAKE_WINDOW_SECONDS")
    windows.FIRST_CHARACTERS = 400

try:
    import_module("gemb.commands").main()
finally:
    if "FAKE_PEAK_FILE" in os.environ:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        Path(os.environ["FAKE_PEAK_FILE"]).write_text(str(peak))

"""`gemb` with a fake engine, as a process that tests can kill: `fake_gemb.py embed docs.jsonl -o docs.npy`.

The environment says how it behaves: FAKE_SECONDS_PER_TOKEN, FAKE_LOAD_SECONDS, FAKE_WINDOW_SECONDS,
FAKE_COMMIT_SECONDS, and FAKE_PEAK_FILE, where the peak of its memory in KiB is written at the end.
"""

import os
import resource
import sys
import time
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from gemb.engine import Engine, windows
from gemb.jobs import embed, index
from gemb.store import writer
from tests.fakes import FakeEngine


def setting(name: str) -> float:
    return float(os.environ.get(name, "0"))


def open_engine(*_: object) -> Engine:
    sys.stdout.write("chatter of a library\n")
    sys.stdout.flush()
    time.sleep(setting("FAKE_LOAD_SECONDS"))
    return FakeEngine(workers=2, seconds_per_token=setting("FAKE_SECONDS_PER_TOKEN"))


for job in (embed, index):
    setattr(job, "open_torch_engine", open_engine)  # noqa: B010 - the name is not exported
if setting("FAKE_WINDOW_SECONDS"):
    windows.WINDOW_SECONDS = setting("FAKE_WINDOW_SECONDS")
    windows.FIRST_CHARACTERS = 400
if setting("FAKE_COMMIT_SECONDS"):
    writer.COMMIT_SECONDS = setting("FAKE_COMMIT_SECONDS")

try:
    import_module("gemb.commands").main()
finally:
    if "FAKE_PEAK_FILE" in os.environ:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        Path(os.environ["FAKE_PEAK_FILE"]).write_text(str(peak))

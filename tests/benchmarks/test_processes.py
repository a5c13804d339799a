import sys
from pathlib import Path

import pytest

from benchmarks.cold_start import Start
from benchmarks.machine import thread_environment
from benchmarks.memory import peak_of, write_rows

HAVE_HELD_64_MIB = (
    "import time; held = bytearray(64 * 2**20); held[::4096] = b'x' * len(held[::4096]);"
    "del held; time.sleep(0.5)"
)


def test_the_peak_of_a_process_is_its_own() -> None:
    # Far more than the child needs is held here: a peak taken over at the fork would show it.
    held = bytearray(300 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    peak = peak_of("child", 1, [sys.executable, "-c", HAVE_HELD_64_MIB], 1).peak_rss_bytes
    assert 64 * 2**20 < peak < 150 * 2**20


def test_a_process_that_fails_is_told_with_its_stderr() -> None:
    with pytest.raises(RuntimeError, match=r"^child ended with 1:\nno such model\n$"):
        peak_of("child", 1, [sys.executable, "-c", "raise SystemExit('no such model')"], 1)


def test_rows_are_all_different(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 500)
    assert (
        len({line.split('"text"')[1] for line in (tmp_path / "rows.jsonl").read_text().splitlines()}) == 500
    )


def test_the_clock_of_a_start_stops_at_the_first_line() -> None:
    program = "import time; print([1.0], flush=True); time.sleep(1)"
    start = Start("quick", [sys.executable, "-c", program])
    start.run(thread_environment(1))
    assert start.wall_seconds[0] < 0.9


def test_a_start_without_a_vector_is_refused() -> None:
    start = Start(
        "mute", [sys.executable, "-c", "import sys; print('hello'); sys.stderr.write('nothing here')"]
    )
    with pytest.raises(RuntimeError, match=r"^mute ended with 0:\nnothing here$"):
        start.run(thread_environment(1))
    assert start.wall_seconds == []

"""What the memory benchmark of training writes, reads and judges."""

import gzip
import json
import sys
from pathlib import Path

from benchmarks.memory import bytes_of
from benchmarks.train_memory import Run, growth, peak_of, write_rows


def test_rows_are_repeated_until_there_are_enough_and_all_are_different(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl.gz"
    with gzip.open(pairs, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"anchor": word, "positive": "p"}) + "\n" for word in ("a", "b"))
    write_rows(tmp_path / "rows.jsonl", 5, pairs)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    assert [row["query"] for row in rows] == ["a 0", "b 1", "a 2", "b 3", "a 4"]
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4"]


def test_memory_that_no_file_backs_is_seen_while_the_process_has_it() -> None:
    block = "x = bytearray(b'1') * (300 * 2**20); import time; time.sleep(0.3)"
    found = peak_of(7, [sys.executable, "-c", block], 1)
    assert found.rows == 7
    assert 300 * 2**20 < found.peak_anonymous_bytes < 360 * 2**20
    assert bytes_of("RssAnon", "VmHWM: 5 kB\nRssAnon:\t     12 kB\n") == 12 * 1024
    assert bytes_of("RssAnon", "State: Z (zombie)\n") == 0


def test_growth_is_that_of_the_medians() -> None:
    runs = [Run(10, 100, 1.0), Run(1000, 104, 1.0), Run(10, 200, 1.0), Run(1000, 102, 1.0), Run(10, 100, 1.0)]
    assert growth(runs) == 1.03

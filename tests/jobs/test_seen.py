from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from gemb.errors import MachineError
from gemb.jobs.seen import Repeat, SeenIds


def add(seen: SeenIds, ids: Sequence[str], first: int) -> list[Repeat]:
    records = range(first, first + len(ids))
    return seen.add(ids, records, [f"docs.jsonl:{record + 1}" for record in records])


@pytest.mark.parametrize("on_disk", [True, False])
def test_repeats_are_told_with_their_first_place(tmp_path: Path, on_disk: bool) -> None:
    seen = SeenIds(tmp_path / "seen.sqlite" if on_disk else None)
    assert add(seen, ["a", "b", "c"], 0) == []
    assert add(seen, ["d", "b", "d", "e", "b"], 3) == [
        Repeat(1, "docs.jsonl:2"),
        Repeat(2, "docs.jsonl:4"),
        Repeat(4, "docs.jsonl:2"),
    ]
    assert add(seen, ["f", "e"], 8) == [Repeat(1, "docs.jsonl:7")]
    seen.close()


def test_thousands_of_ids_at_a_time(tmp_path: Path) -> None:
    seen = SeenIds(tmp_path / "seen.sqlite")
    assert add(seen, [str(number) for number in range(5000)], 0) == []
    repeats = add(seen, [str(number) for number in range(4000, 7000)], 5000)
    assert [repeat.position for repeat in repeats] == list(range(1000))
    assert repeats[-1].first_place == "docs.jsonl:5000"
    seen.close()


def test_records_behind_the_journal_are_forgotten(tmp_path: Path) -> None:
    seen = SeenIds(tmp_path / "seen.sqlite")
    add(seen, ["a", "b", "c"], 0)
    seen.close()
    again = SeenIds(tmp_path / "seen.sqlite")
    assert again.keep_before(2) == 2
    assert add(again, ["c", "a"], 2) == [Repeat(1, "docs.jsonl:1")]
    again.close()


def test_a_damaged_table_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "seen.sqlite"
    path.write_bytes(b"no database" * 100)
    seen = SeenIds(path)
    assert seen.keep_before(10) == 0
    add(seen, [str(number) for number in range(5000)], 0)
    seen.close()
    content = bytearray(path.read_bytes())
    content[5000:9000] = bytes(4000)
    path.write_bytes(content)
    again = SeenIds(path)
    assert again.keep_before(5000) < 5000  # the job sees that ids are missing, and reads them again
    again.close()


def test_a_table_that_cannot_be_opened_is_a_machine_error(tmp_path: Path) -> None:
    path = tmp_path / "nowhere/seen.sqlite"
    with pytest.raises(MachineError) as caught:
        SeenIds(path)
    assert str(caught.value) == (
        f"{path}: unable to open database file; see that the disk has room, then run the same command again"
    )

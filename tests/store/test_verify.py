"""Verification finds every fault, and rebuilding saves what is intact."""

import os
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.errors import LockedError
from gemb.store import Index, Settings, Writer
from gemb.store.blocks import DamagedError, block_checksums
from gemb.store.rebuild import rebuild
from gemb.store.verify import verify
from tests.store.conftest import DIMS, documents, make, vectors
from tests.store.test_writer import contents


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def run_sql(index: Path, statement: str, *parameters: object) -> None:
    with sqlite3.connect(index / "index.db") as connection:
        connection.execute(statement, parameters)
    connection.close()


def test_a_sound_index_has_no_faults_and_everything_is_counted(index: Path) -> None:
    verdict = verify(index)
    assert verdict.faults == []
    assert verdict.notes == []
    files = [path for path in index.rglob("*") if path.is_file()]
    assert (verdict.documents, verdict.rows) == (898, 898)
    assert verdict.files == len(files)
    assert verdict.bytes == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("name", ["rows.u64", "vectors.f16", "codes.i8", "graph.usearch"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_flipped_bit_in_any_file_is_found_with_its_place(index: Path, name: str, share: float) -> None:
    path = next(index.rglob(name))
    size = path.stat().st_size
    flip(path, int(share * (size - 1)), 3)
    faults = verify(index).faults
    assert [fault.file for fault in faults] == [path]
    assert faults[0].what == f"bytes 0 to {size:,} are damaged"


@pytest.mark.parametrize("name", ["rows.u64", "vectors.f16", "codes.i8", "graph.usearch"])
def test_a_missing_and_a_cut_off_file_are_found(index: Path, name: str) -> None:
    path = next(index.rglob(name))
    size = path.stat().st_size
    os.truncate(path, size // 2)
    (fault,) = verify(index).faults
    assert (fault.file, fault.what) == (path, f"{size // 2:,} bytes, but the catalogue says {size:,}")
    path.unlink()
    (fault,) = verify(index).faults
    assert (fault.file, fault.what) == (path, "is missing")


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        (
            "UPDATE documents SET metadata = '{}' WHERE id = 'd9'",
            "1 documents do not match their checksums: 'd9'",
        ),
        ("UPDATE documents SET rows = 2 WHERE id = 'd9'", "1 documents do not match their checksums: 'd9'"),
        ("UPDATE texts SET text = 'x' WHERE key = 11", "1 documents do not match their checksums: 'd10'"),
        (
            "DELETE FROM documents WHERE id = 'd9'",
            "897 documents with 897 rows, but 898 with 898 were committed",
        ),
        ("UPDATE fields SET count = count + 1 WHERE name = 'n'", "the counts of metadata fields do not fit"),
        ("UPDATE manifest SET value = '{}' WHERE name = 'state'", "the manifest's state does not match"),
        ("UPDATE segments SET dead = x'00' WHERE first_key = 1", "does not match its checksum"),
        ("DELETE FROM checksums WHERE file = 'rows.u64'", "rows.u64 are missing or damaged"),
        ("DELETE FROM words WHERE rowid = 12", "the words do not fit the texts"),
    ],
)
def test_a_changed_row_of_the_catalogue_is_found(index: Path, statement: str, what: str) -> None:
    run_sql(index, statement)
    assert any(what in fault.what for fault in verify(index).faults)


def test_a_document_whose_rows_are_gone_is_found(index: Path) -> None:
    run_sql(index, "DELETE FROM segments WHERE first_key > 100")
    faults = verify(index).faults
    assert any(fault.what == "200 documents have no row in any segment" for fault in faults)


def test_codes_of_other_vectors_are_found(tmp_path: Path) -> None:
    """The file is whole by its checksums, which were written for wrong codes."""
    path = make(tmp_path / "x.gemb", vectors(50))
    codes = next(path.rglob("codes.i8"))
    flip(codes, 7, 5)
    blocks = block_checksums(codes).tobytes()
    from gemb.store.documents import checksum

    name = codes.parent.name
    crc = checksum(name, "codes.i8", blocks)
    run_sql(path, "UPDATE checksums SET blocks = ?, checksum = ? WHERE file = 'codes.i8'", blocks, crc)
    assert [fault.what for fault in verify(path).faults] == ["1 codes are not those of their vectors"]


def test_a_running_writer_does_not_keep_from_verifying(index: Path) -> None:
    with Writer.open(index) as writer:
        writer.put(documents(900, 905), vectors(5))
        verdict = verify(index)
    assert verdict.faults == []
    assert verdict.documents == 898
    assert "a writer is at work; its last commit is looked at, without the words" in verdict.notes


def test_a_damaged_database_is_a_fault_not_a_crash(index: Path) -> None:
    (index / "index.db").write_bytes(b"x" * 5000)
    (fault,) = verify(index).faults
    assert fault.file == index / "index.db"
    assert "is no SQLite database" in fault.what


# ---------------------------------------------------------------- rebuild


def test_a_rebuild_of_a_sound_index_loses_nothing(index: Path) -> None:
    before = contents(index)
    rebuilt = rebuild(index)
    assert (rebuilt.documents, rebuilt.lost) == (898, 0)
    assert contents(index) == before
    assert contents(rebuilt.damaged) == before
    assert verify(index).faults == []


@pytest.mark.parametrize("name", ["codes.i8", "graph.usearch"])
def test_codes_and_graphs_are_made_anew_from_the_vectors(index: Path, name: str) -> None:
    before = contents(index)
    next(index.rglob(name)).unlink()
    assert rebuild(index).lost == 0
    assert contents(index) == before
    assert verify(index).faults == []


def test_what_is_damaged_is_lost_and_the_rest_is_saved(tmp_path: Path) -> None:
    rows = vectors(9000, dims=32)
    path = make(tmp_path / "x.gemb", rows)
    before = contents(path)
    flip(next(path.rglob("vectors.f16")), 300_000)  # the second block: rows 4096 to 8191
    run_sql(path, "UPDATE documents SET metadata = '{\"n\": -1}' WHERE id = 'd5'")
    rebuilt = rebuild(path)
    lost = {"d5", *(f"d{n}" for n in range(4096, 8192))}
    assert rebuilt.lost == len(lost)
    assert contents(path) == {id_: content for id_, content in before.items() if id_ not in lost}
    assert verify(path).faults == []
    with Writer.open(path) as writer:  # the same input again adds what was lost
        given = documents(0, 9000)
        needed = writer.compare(given).needed
        assert {given[place].id for place in needed} == lost
        writer.put([given[place] for place in needed], rows[needed])
    assert {id_: document for id_, (document, _) in contents(path).items()} == {
        id_: document for id_, (document, _) in before.items()
    }


def test_a_whole_segment_that_is_gone_costs_only_its_documents(index: Path) -> None:
    shutil.rmtree(next(index.rglob("graph.usearch")).parent)
    rebuilt = rebuild(index)
    assert rebuilt.documents == 200  # of the 200 without a graph d750 is removed, and the changed d5 is new
    assert verify(index).faults == []


@pytest.mark.parametrize(
    "statement", ["DELETE FROM segments", "UPDATE segments SET dead = x'00', record = ''"]
)
def test_entries_of_segments_are_not_needed_to_save_what_is_in_them(index: Path, statement: str) -> None:
    before = contents(index)
    run_sql(index, statement)
    assert rebuild(index).lost == 0
    assert contents(index) == before
    assert verify(index).faults == []


@pytest.mark.parametrize(
    ("name", "rows"), [("vectors.f16", 18_000), pytest.param("rows.u64", 34_000, marks=pytest.mark.slow)]
)
def test_of_a_file_that_is_cut_off_the_blocks_before_are_saved(tmp_path: Path, name: str, rows: int) -> None:
    path = make(tmp_path / "x.gemb", vectors(rows, dims=8), Settings(8, words=False))
    before = contents(path)
    cut = next(path.rglob(name))
    os.truncate(cut, (1 << 18) + 1000)
    kept = (1 << 18) // (8 if name == "rows.u64" else 16)
    rebuilt = rebuild(path)
    assert (rebuilt.documents, rebuilt.lost) == (kept, rows - kept)
    assert contents(path) == {f"d{n}": before[f"d{n}"] for n in range(kept)}


def test_of_a_database_that_is_cut_off_the_pages_before_are_saved(tmp_path: Path) -> None:
    path = make(tmp_path / "x.gemb", vectors(3000), commits=range(100, 3000, 100))
    before = contents(path)
    os.truncate(path / "index.db", (path / "index.db").stat().st_size * 2 // 3)
    with pytest.raises(DamagedError):
        Index.open(path)
    rebuilt = rebuild(path)
    after = contents(path)
    assert 500 < rebuilt.documents == len(after) < 3000
    assert rebuilt.lost == 3000 - rebuilt.documents
    assert after.items() <= before.items()
    assert verify(path).faults == []


def test_a_catalogue_that_cannot_be_read_cannot_be_rebuilt(index: Path) -> None:
    (index / "index.db").write_bytes(b"x" * 5000)
    with pytest.raises(DamagedError) as error:
        rebuild(index)
    assert str(error.value) == (
        f"nothing can be saved: {index}/index.db is no SQLite database, or its first page is damaged; "
        f"make it anew with gemb index INPUT -o {index} --overwrite"
    )
    assert (index / "segments").exists()
    assert not index.with_name("docs.gemb.rebuilding").exists()


def test_a_rebuild_waits_for_no_writer(index: Path) -> None:
    with Writer.open(index), pytest.raises(LockedError):
        rebuild(index)


def test_each_rebuild_keeps_the_damaged_index_under_a_new_name(index: Path) -> None:
    names = [rebuild(index).damaged.name for _ in range(2)]
    assert names == ["docs.gemb.damaged", "docs.gemb.damaged-2"]


def test_int8_ranges_and_passages_survive_a_rebuild(tmp_path: Path, rows: NDArray[np.float32]) -> None:
    path = tmp_path / "x.gemb"
    with Writer.open(path, Settings(dims=DIMS, dtype="int8")) as writer:
        writer.put(documents(0, 2), rows[:6], [[(0, 2), (1, 3), (2, 9)], [(0, 1), (1, 2), (2, 3)]])
    before = contents(path)
    rebuild(path)
    assert contents(path) == before
    with Index.open(path) as index:
        assert index.search(rows[5])[0][0].passage == (2, 3)


def test_a_fault_of_the_database_names_its_file_once_and_gives_no_advice(index: Path) -> None:
    (index / "index.db").write_bytes((index / "index.db").read_bytes()[:5000])
    verdict = verify(index)
    assert [(fault.file, fault.what) for fault in verdict.faults] == [
        (index / "index.db", "database disk image is malformed")
    ]
    assert verdict.remedy == f"gemb index rebuild {index}"

"""Changing an index."""

import os
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.errors import Exit, GembError, LockedError, MachineError, MismatchError, UnavailableError
from gemb.store import Changes, Document, Index, Settings, Writer
from gemb.store import writer as writing
from gemb.store.blocks import DamagedError
from gemb.store.catalogue import Catalogue
from gemb.store.segments import SegmentWriter
from gemb.store.verify import verify
from gemb.vectors.layout import DType
from tests.store.conftest import DIMS, documents, make, vectors

SETTINGS = Settings(dims=DIMS)


def contents(path: Path) -> dict[str, tuple[Document, bytes]]:
    """Every document of an index with the bytes of its vectors."""
    with Index.open(path) as index:
        found = {}
        for block in index.export():
            bounds = np.cumsum([0, *block.counts])
            for place, document in enumerate(block.documents):
                own = block.vectors[bounds[place] : bounds[place + 1]]
                found[document.id] = (document, own.tobytes())
        return found


def sync(path: Path, given: list[Document], rows: NDArray[np.float32], *, prune: bool = True) -> Changes:
    """What `gemb index --prune` does, in chunks of 64."""
    with Writer.open(path, SETTINGS) as writer:
        for start in range(0, len(given), 64):
            chunk = given[start : start + 64]
            compared = writer.compare(chunk)
            assert compared.repeated == []
            needed = compared.needed
            writer.put([chunk[n] for n in needed], rows[[start + n for n in needed]])
        if prune:
            writer.prune()
        return writer.changes


# ---------------------------------------------------------------- equivalence


def test_a_sync_leaves_what_a_new_index_of_the_same_input_has(
    tmp_path: Path, rows: NDArray[np.float32]
) -> None:
    old, new = documents(0, 500), documents(0, 500)
    new[7] = Document("d7", "changed text", "title 0", {"n": 7, "even": False})
    new[9] = Document("d9", "text number 9", "title 2", {"n": -9})
    del new[20:40]
    new += documents(500, 530)
    own = np.concatenate([rows[:20], rows[40:530]])
    path = tmp_path / "x.gemb"
    assert sync(path, old, rows) == Changes(added=500)
    assert sync(path, new, own) == Changes(added=30, changed=2, unchanged=478, removed=20)
    fresh = tmp_path / "fresh.gemb"
    sync(fresh, new, own)
    assert contents(path) == contents(fresh)
    assert sync(path, new, own) == Changes(unchanged=510)
    assert verify(path).faults == []


def test_compaction_changes_no_answer_and_no_content(index: Path) -> None:
    before = contents(index)
    queries = vectors(20, seed=9)
    with Index.open(index) as opened:
        found = opened.nearest(queries, 10, exact=True)
    with Writer.open(index) as writer:
        writer.compact(dead_share=0, graph_rows=100)
        assert [(entry.record.rows, len(entry.dead)) for entry in writer.segments()] == [(897, 0), (1, 0)]
    assert contents(index) == before
    with Index.open(index) as opened:
        again = opened.nearest(queries, 10, exact=True)
    assert np.array_equal(found.keys, again.keys)
    assert np.array_equal(found.scores, again.scores)
    assert verify(index).faults == []


@pytest.mark.parametrize("threads", [1, 3])
def test_the_threads_of_a_build_leave_codes_and_rows_together(tmp_path: Path, threads: int) -> None:
    path = make(tmp_path / "x.gemb", vectors(2000))
    with Writer.open(path, threads=threads) as writer:
        writer.compact(graph_rows=100)
    assert (
        verify(path).faults == []
    )  # compares every code with its vector, and asks the graph for its own rows


@pytest.mark.parametrize("dtype", ["f16", "bf16", "int8"])
def test_stored_vectors_survive_any_number_of_merges_to_the_bit(tmp_path: Path, dtype: DType) -> None:
    path = make(tmp_path / "x.gemb", vectors(300), Settings(dims=DIMS, dtype=dtype), commits=[100, 200])
    before = contents(path)
    for graph_rows in (100, 10**6, 100):
        with Writer.open(path) as writer:
            writer.delete([])
            writer.compact(dead_share=0, graph_rows=graph_rows)
    assert contents(path) == before


# ---------------------------------------------------------------- upsert


def test_a_change_of_metadata_alone_asks_for_no_vector(tmp_path: Path, rows: NDArray[np.float32]) -> None:
    path = make(tmp_path / "x.gemb", rows[:10])
    with Writer.open(path) as writer:
        changed = Document("d4", "text number 4", "title 4", {"n": 44, "new": "x"})
        assert writer.compare([changed]).needed == []
        assert writer.changes == Changes(changed=1)
    with Index.open(path) as index:
        assert index.get(["d4"])["d4"] == changed
        assert index.fields() == {"even": "boolean", "n": "number", "new": "text"}
    assert verify(path).faults == []


def test_a_changed_text_or_title_asks_for_a_vector(tmp_path: Path, rows: NDArray[np.float32]) -> None:
    path = make(tmp_path / "x.gemb", rows[:3])
    given = [Document("d0", "text number 0", "other"), Document("d1", "other", "title 1"), *documents(2, 3)]
    with Writer.open(path) as writer:
        assert writer.compare(given).needed == [0, 1]


def test_title_and_text_are_told_apart(tmp_path: Path, rows: NDArray[np.float32]) -> None:
    with Writer.open(tmp_path / "x.gemb", SETTINGS) as writer:
        writer.put([Document("a", "bc", "a")], rows[:1])
    with Writer.open(tmp_path / "x.gemb") as writer:
        assert writer.compare([Document("a", "c", "ab")]).needed == [0]


def test_a_ready_vector_counts_as_content(tmp_path: Path, rows: NDArray[np.float32]) -> None:
    given = documents(0, 4)
    with Writer.open(tmp_path / "x.gemb", SETTINGS) as writer:
        writer.put(given, rows[:4], ready=True)
    other = rows[:4].copy()
    other[2, 5] += 1e-3
    with Writer.open(tmp_path / "x.gemb") as writer:
        assert writer.compare(given, other).needed == [2]


def test_an_id_twice_in_one_pass_is_told(tmp_path: Path, rows: NDArray[np.float32]) -> None:
    path = make(tmp_path / "x.gemb", rows[:4])
    with Writer.open(path) as writer:
        one = [Document("new", "1"), Document("d1", "text number 1", "title 1", {"n": 1, "even": False})]
        assert writer.compare([*one, one[0], one[1]]).repeated == [2, 3]
        writer.put(one[:1], rows[:1])
        assert writer.compare(one).repeated == [0, 1]
        with pytest.raises(GembError) as error:
            writer.put(one[:1], rows[:1])
        assert str(error.value) == "the id 'new' comes twice in the input; ids are unique"


def test_pruning_removes_what_was_not_seen_and_nothing_else(
    tmp_path: Path, rows: NDArray[np.float32]
) -> None:
    path = make(tmp_path / "x.gemb", rows[:200], commits=[100])
    with Writer.open(path) as writer:
        writer.compare(documents(50, 150))
        writer.put([Document("new")], rows[:1])
        assert writer.prune() == 100
        assert writer.changes == Changes(added=1, unchanged=100, removed=100)
    assert set(contents(path)) == {"new", *(f"d{n}" for n in range(50, 150))}
    assert verify(path).faults == []


def test_deleting_tells_which_ids_are_not_there(tmp_path: Path, rows: NDArray[np.float32]) -> None:
    path = make(tmp_path / "x.gemb", rows[:5])
    with Writer.open(path) as writer:
        assert writer.delete(["d1", "no", "d1", "d2"]) == ["no"]
    assert set(contents(path)) == {"d0", "d3", "d4"}


def test_a_document_can_be_deleted_in_the_pass_that_added_it(
    tmp_path: Path, rows: NDArray[np.float32]
) -> None:
    with Writer.open(tmp_path / "x.gemb", SETTINGS) as writer:
        writer.put(documents(0, 5), rows[:5])
        writer.delete(["d2"])
    assert set(contents(tmp_path / "x.gemb")) == {"d0", "d1", "d3", "d4"}
    assert verify(tmp_path / "x.gemb").faults == []


def test_deleting_everything_leaves_an_empty_index(index: Path) -> None:
    with Writer.open(index) as writer:
        writer.delete([f"d{n}" for n in range(900)])
    assert contents(index) == {}
    assert list((index / "segments").iterdir()) == []
    assert verify(index).faults == []


# ---------------------------------------------------------------- publishing


def test_what_is_not_committed_is_not_there(tmp_path: Path, rows: NDArray[np.float32]) -> None:
    path = make(tmp_path / "x.gemb", rows[:10])
    before = contents(path)
    writer = Writer.open(path)
    writer.put(documents(10, 20), rows[10:20])
    writer.delete(["d1"])
    writer.abandon()
    assert contents(path) == before
    assert verify(path).faults == []


def test_a_writer_commits_by_itself_every_so_many_rows(
    tmp_path: Path, rows: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "COMMIT_ROWS", 100)
    with Writer.open(tmp_path / "x.gemb", SETTINGS) as writer:
        writer.put(documents(0, 99), rows[:99])
        assert writer.segments() == []
        writer.put(documents(99, 100), rows[99:100])
        assert [entry.record.rows for entry in writer.segments()] == [100]


def test_a_writer_commits_by_itself_after_a_while(
    tmp_path: Path, rows: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Writer.open(tmp_path / "x.gemb", SETTINGS) as writer:
        monkeypatch.setattr(writing, "COMMIT_SECONDS", 0.0)
        time.sleep(0.001)
        writer.put(documents(0, 3), rows[:3])
        assert len(writer.segments()) == 1


def test_changes_of_metadata_alone_are_committed_by_and_by_too(
    tmp_path: Path, rows: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "x.gemb", rows[:20])
    monkeypatch.setattr(writing, "COMMIT_ROWS", 8)
    changed = [replace(document, metadata={"n": 1}) for document in documents(0, 20)]
    writer = Writer.open(path)
    for start in range(0, 20, 5):
        assert writer.compare(changed[start : start + 5]).needed == []
    writer.abandon()
    with Index.open(path) as index:
        found = index.get([document.id for document in changed])
    assert sum(document.metadata == {"n": 1} for document in found.values()) == 20
    assert verify(path).faults == []


def test_many_small_commits_leave_few_segments(tmp_path: Path, rows: NDArray[np.float32]) -> None:
    with Writer.open(tmp_path / "x.gemb", SETTINGS) as writer:
        for start in range(0, 600, 10):
            writer.put(documents(start, start + 10), rows[start : start + 10])
            writer.commit()
            assert len(writer.segments()) <= 8  # 3 a size, sizes a factor of 4 apart
    assert len(contents(tmp_path / "x.gemb")) == 600
    assert verify(tmp_path / "x.gemb").faults == []


def test_a_big_graph_is_not_built_anew_for_a_few_more_rows(tmp_path: Path, rows: NDArray[np.float32]) -> None:
    path = make(tmp_path / "x.gemb", rows[:400])
    with Writer.open(path) as writer:
        writer.compact(graph_rows=50)
        name = writer.segments()[0].record.name
        writer.put(documents(400, 460), rows[400:460])
        writer.compact(graph_rows=50)
        assert [(entry.record.rows, entry.record.has_graph) for entry in writer.segments()] == [
            (400, True),
            (60, True),
        ]
        assert writer.segments()[0].record.name == name
        writer.put(documents(460, 560), rows[460:560])
        writer.compact(graph_rows=50)
        assert [entry.record.rows for entry in writer.segments()] == [560]


def test_a_segment_with_many_dead_rows_is_written_anew(tmp_path: Path, rows: NDArray[np.float32]) -> None:
    path = make(tmp_path / "x.gemb", rows[:400])
    with Writer.open(path) as writer:
        writer.compact(graph_rows=50)
        writer.delete([f"d{n}" for n in range(80)])
        writer.compact(graph_rows=50)
        assert [entry.record.rows for entry in writer.segments()] == [400]
        writer.delete(["d80"])
        writer.compact(graph_rows=50)
        assert [entry.record.rows for entry in writer.segments()] == [319]


def test_segments_stay_below_what_a_build_may_hold_in_memory(
    tmp_path: Path, rows: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SEGMENT_BYTES", 300 * (DIMS + 160))
    path = make(tmp_path / "x.gemb", rows, commits=[150, 300, 450, 600, 750])
    with Writer.open(path) as writer:
        writer.compact(graph_rows=50)
        assert max(entry.record.rows for entry in writer.segments()) <= 300
        assert sum(entry.record.rows for entry in writer.segments()) == 900
    assert verify(path).faults == []


def test_leftovers_of_a_killed_writer_are_swept(index: Path) -> None:
    orphan = index / "segments" / "0123456789abcdef"
    orphan.mkdir()
    (orphan / "rows.u64").write_bytes(b"half")
    assert [note.partition(" (")[0] for note in verify(index).notes] == ["1 leftovers in segments/"]
    with Writer.open(index):
        assert not orphan.exists()


def test_a_clean_close_leaves_one_database_file(index: Path) -> None:
    assert sorted(path.name for path in index.iterdir()) == ["index.db", "segments"]
    assert (index / "index.db").read_bytes()[18:20] == b"\x01\x01"  # SQLite's mark of no WAL mode


def test_the_last_commit_holds_after_a_kill_that_left_the_journal(
    tmp_path: Path, rows: NDArray[np.float32]
) -> None:
    """The files of a writer that is still open are copied, as a kill would leave them."""
    path, copy = tmp_path / "x.gemb", tmp_path / "copy.gemb"
    with Writer.open(path, SETTINGS) as writer:
        writer.put(documents(0, 50), rows[:50])
        writer.commit()
        writer.put(documents(50, 90), rows[50:90])
        os.system(f"cp -r {path} {copy}")
    assert (copy / "index.db-wal").stat().st_size > 0
    assert set(contents(copy)) == {f"d{n}" for n in range(50)}
    with Writer.open(copy) as writer:
        assert writer.documents == 50
    assert verify(copy).faults == []


# ---------------------------------------------------------------- refusals


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gemb"
    with (
        Writer.open(path, SETTINGS),
        pytest.raises(LockedError, match=f"^{path} is held by process {os.getpid()}"),
    ):
        Writer.open(path, SETTINGS)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Settings(dims=9), "dims 24, but this run has 9"),
        (Settings(dims=DIMS, dtype="f32"), "stored type f16, but this run has f32"),
        (Settings(dims=DIMS, code_dims=8), "first-stage dims 24, but this run has 8"),
        (Settings(dims=DIMS, encoder={"fingerprint": "x"}), "encoder None, but this run has x"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, other: Settings, message: str) -> None:
    path = make(tmp_path / "x.gemb", vectors(3))
    with pytest.raises(MismatchError) as error:
        Writer.open(path, other)
    assert str(error.value) == f"{path} was made with {message}; use the same, or make a new index"
    with Writer.open(path, SETTINGS):
        pass  # the refused one holds no lock


def test_the_same_model_at_another_precision_or_place_goes_on(tmp_path: Path) -> None:
    made = Settings(dims=DIMS, encoder={"fingerprint": "x", "precision": "fp32", "model": "/a"})
    path = make(tmp_path / "x.gemb", vectors(3), made)
    with Writer.open(path, Settings(dims=DIMS, encoder={"fingerprint": "x", "precision": "bf16"})) as writer:
        assert writer.settings.encoder == made.encoder, "what was recorded first stays"


@pytest.mark.parametrize(
    ("value", "what"), [(0.0, "zeros only"), (np.nan, "NaN or infinity"), (np.inf, "NaN or infinity")]
)
def test_a_vector_that_is_none_is_refused_and_the_others_go_in(
    tmp_path: Path, value: float, what: str
) -> None:
    rows = vectors(5)
    rows[3] = value
    with Writer.open(tmp_path / "x.gemb", SETTINGS) as writer:
        with pytest.raises(GembError) as error:
            writer.put(documents(0, 5), rows)
        assert str(error.value) == f"the vector of 'd3' is {what}; it would ruin every ranking, leave it out"
        writer.put(documents(0, 3), rows[:3])
    assert set(contents(tmp_path / "x.gemb")) == {"d0", "d1", "d2"}


def test_vectors_of_another_width_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gemb"
    with Writer.open(path, SETTINGS) as writer, pytest.raises(MismatchError) as error:
        writer.put(documents(0, 1), np.ones((1, 7), np.float32))
    assert str(error.value) == (
        f"{path} holds 24-wide vectors, but these are 7 wide; index with the model that made it"
    )


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (Document("a\ud800"), "the id of 'a\\ud800' has a lone surrogate at character 1; correct the input"),
        (Document("a", "x\udfff"), "the text of 'a' has a lone surrogate at character 1; correct the input"),
        (
            Document("a", "x", "\ud800"),
            "the title of 'a' has a lone surrogate at character 0; correct the input",
        ),
    ],
)
def test_half_a_surrogate_pair_is_refused(tmp_path: Path, document: Document, message: str) -> None:
    with Writer.open(tmp_path / "x.gemb", SETTINGS) as writer:
        with pytest.raises(GembError) as error:
            writer.put([document], vectors(1))
        assert str(error.value) == message


def test_metadata_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with (
        Writer.open(tmp_path / "x.gemb", SETTINGS) as writer,
        pytest.raises(GembError, match=r"^the metadata of 'a' cannot be stored as JSON: "),
    ):
        writer.put([Document("a", metadata={"x": object()})], vectors(1))


def test_no_index_is_made_without_settings(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as error:
        Writer.open(tmp_path / "no.gemb")
    assert error.value.exit_code == Exit.UNAVAILABLE
    assert not (tmp_path / "no.gemb").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(GembError) as error:
        Writer.open(tmp_path, SETTINGS)
    assert str(error.value) == f"{tmp_path} exists and is no index: it has notes.txt; choose another name"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_making_that_was_killed_at_once_is_begun_again(tmp_path: Path, rows: NDArray[np.float32]) -> None:
    path = tmp_path / "x.gemb"
    (path / "segments").mkdir(parents=True)
    (path / "index.db").touch()
    with pytest.raises(GembError) as error:
        Index.open(path)
    assert str(error.value) == f"{path} is not finished; run the gemb index command that began it again"
    make(path, rows[:3])
    assert len(contents(path)) == 3


def test_a_newer_format_is_refused_by_readers_and_writers(index: Path) -> None:
    connection = sqlite3.connect(index / "index.db")
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    for opened in (Index.open, Writer.open):
        with pytest.raises(MismatchError) as error:
            opened(index)
        assert str(error.value) == f"{index} is an index of format 2, this gemb reads up to 1; upgrade gemb"


def test_a_database_of_another_program_is_no_index(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "index.db")
    connection.execute("CREATE TABLE mine (x)")
    connection.close()
    for opened in (Index.open, lambda path: Writer.open(path, SETTINGS)):
        with pytest.raises(GembError) as error:
            opened(tmp_path)
        assert str(error.value) == (
            f"{tmp_path} is no index: its index.db belongs to another program; choose another path"
        )


def test_a_damaged_database_is_told_as_such(index: Path) -> None:
    (index / "index.db").write_bytes(b"no database" * 1000)
    for opened in (Index.open, Writer.open):
        with pytest.raises(
            DamagedError, match=r"is no SQLite database, or its first page is damaged; run gemb index"
        ):
            opened(index)


def test_damaged_segment_files_are_not_copied_into_a_new_segment(index: Path) -> None:
    path = max(index.rglob("vectors.f16"), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[100] ^= 4
    path.write_bytes(content)
    before = sorted(path.name for path in (index / "segments").iterdir())
    with (
        pytest.raises(DamagedError, match=f"{path} is damaged: the checksum of block 0"),
        Writer.open(index) as writer,
    ):
        writer.compact(dead_share=0, graph_rows=100)
    assert sorted(path.name for path in (index / "segments").iterdir()) == before


@pytest.mark.parametrize("place", ["finish", "put_segment", "commit"])
def test_a_failure_while_publishing_keeps_the_last_commit(
    tmp_path: Path, rows: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    path = make(tmp_path / "x.gemb", rows[:20])
    before = contents(path)

    def fail(*_: object, **__: object) -> None:
        raise MachineError("no space left")

    owner = SegmentWriter if place == "finish" else Catalogue
    writer = Writer.open(path)
    writer.delete(["d1"])
    writer.put(documents(20, 30), rows[20:30])
    monkeypatch.setattr(owner, place, fail)
    with pytest.raises(MachineError, match="no space left"):
        writer.commit()
    writer.abandon()
    monkeypatch.undo()
    assert contents(path) == before
    assert verify(path).faults == []
    with Writer.open(path) as writer:
        writer.put(documents(20, 30), rows[20:30])
    assert len(contents(path)) == 30

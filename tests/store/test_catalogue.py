import sqlite3
from pathlib import Path

import numpy as np
import pytest

from gemb.errors import GembError, MismatchError, UnavailableError
from gemb.store.blocks import DamagedError
from gemb.store.catalogue import DATABASE, FORMAT, Catalogue, SegmentEntry, Settings, State
from gemb.store.documents import Document, content_hash
from gemb.store.segments import SegmentRecord

DOCUMENTS = [
    Document("cat", "a cat sleeps", "Cat", {"year": 2020}),
    Document("dog", "a dog barks", "", {"year": 2021, "by": "Ann"}),
    Document("empty"),
]
RECORD = SegmentRecord("ab12", 10, 1, 9, 4, 0.1, 0.01, {"rows.u64": 80})


def filled(folder: Path, settings: Settings | None = None) -> Catalogue:
    settings = settings or Settings(4)
    catalogue = Catalogue.create(folder, settings)
    with catalogue.transaction():
        catalogue.put_documents(
            DOCUMENTS,
            [1, 2, 3],
            [content_hash(document) for document in DOCUMENTS],
            [None, [(0, 5), (5, 11)], None],
            words=settings.words,
        )
    return catalogue


def changed(folder: Path, statement: str) -> None:
    connection = sqlite3.connect(folder / DATABASE)
    connection.execute(statement)
    connection.commit()
    connection.close()


def test_documents_come_back_as_they_were_put(tmp_path: Path) -> None:
    catalogue = filled(tmp_path)
    found = catalogue.documents([1, 2, 3, 4])
    assert [found[key].document for key in (1, 2, 3)] == DOCUMENTS
    assert list(found) == [1, 2, 3]
    assert found[2].spans == ((0, 5), (5, 11))
    assert [found[key].rows for key in (1, 2, 3)] == [1, 2, 1]
    assert [entry.key for entry in catalogue.all_documents(1)] == [2, 3]
    assert catalogue.known(["dog", "cow"])["dog"].content == content_hash(DOCUMENTS[1])
    assert catalogue.count_documents() == (3, 4)
    catalogue.close()


def test_settings_and_state_come_back_as_they_were_put(tmp_path: Path) -> None:
    settings = Settings(4, "bf16", 2, {"fingerprint": "f" * 8}, words=False)
    catalogue = filled(tmp_path, settings)
    assert catalogue.settings() == settings
    catalogue.put_state(State(3, 2, 5, 9))
    assert catalogue.state() == State(3, 2, 5, 9)
    catalogue.close()


def test_words_find_title_and_text_and_forget_what_is_removed(tmp_path: Path) -> None:
    catalogue = filled(tmp_path)
    assert [key for key, _ in catalogue.keys_with_words("barking OR cats", 5, None)] == [1, 2]
    assert catalogue.remove_documents([2], words=True) == 2
    assert [key for key, _ in catalogue.keys_with_words("barking OR cats", 5, None)] == [1]
    assert catalogue.words_problem() is None
    assert catalogue.fields().keys() == {"year"}
    catalogue.close()


def test_changed_metadata_keeps_the_rest_and_its_checksum(tmp_path: Path) -> None:
    catalogue = filled(tmp_path)
    catalogue.put_metadata(2, Document("dog", metadata={"colour": "red"}))
    found = catalogue.documents([2])[2]
    assert found.document == Document("dog", "a dog barks", "", {"colour": "red"})
    assert catalogue.fields().keys() == {"year", "colour"}
    catalogue.close()


def test_keys_not_in_are_those_that_were_not_seen(tmp_path: Path) -> None:
    catalogue = filled(tmp_path)
    assert catalogue.keys_not_in(np.array([False, True, False])).tolist() == [2, 3]
    assert catalogue.keys_not_in(np.ones(9, dtype=bool)).tolist() == []
    catalogue.close()


def test_segments_come_back_with_dead_rows_and_checksums(tmp_path: Path) -> None:
    catalogue = filled(tmp_path)
    blocks = np.array([1, 2**32 - 1], np.uint32)
    catalogue.put_segment(RECORD, {"rows.u64": blocks})
    dead = np.zeros(10, dtype=bool)
    dead[[0, 9]] = True
    catalogue.put_dead(RECORD, np.packbits(dead, bitorder="little").tobytes())
    (entry,) = catalogue.segments()
    assert entry.record == RECORD
    assert entry.live_rows == 8
    found = entry.dead_rows()
    assert found is not None
    assert found.tolist() == dead.tolist()
    assert catalogue.checksums(RECORD)["rows.u64"].tolist() == blocks.tolist()
    catalogue.remove_segment("ab12")
    assert catalogue.segments() == []
    catalogue.close()


def test_a_segment_without_dead_rows_has_none() -> None:
    assert SegmentEntry(RECORD, b"").dead_rows() is None
    assert SegmentEntry(RECORD, b"").live_rows == 10


def test_a_failed_change_leaves_nothing(tmp_path: Path) -> None:
    catalogue = filled(tmp_path)
    with pytest.raises(ZeroDivisionError), catalogue.transaction():
        catalogue.put_state(State(catalogue.remove_documents([1], words=True) // 0))
    assert catalogue.count_documents() == (3, 4)
    catalogue.close()


def test_a_clean_close_leaves_one_file(tmp_path: Path) -> None:
    filled(tmp_path).close_writing()
    assert [path.name for path in tmp_path.iterdir()] == [DATABASE]


def test_a_reader_sees_the_last_commit_while_a_writer_is_at_work(tmp_path: Path) -> None:
    writer = filled(tmp_path)
    writer.begin()
    writer.remove_documents([1], words=True)
    reader = Catalogue.open_for_reading(tmp_path)
    reader.begin_snapshot()
    assert reader.count_documents() == (3, 4)
    writer.commit()
    assert reader.count_documents() == (3, 4)
    reader.roll_back()
    assert reader.count_documents() == (2, 3)
    reader.close()
    writer.close_writing()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE documents SET title = 'dog' WHERE key = 1",
        "UPDATE documents SET rows = 2.5 WHERE key = 1",
        "UPDATE documents SET metadata = x'00' WHERE key = 1",
        "UPDATE texts SET text = 'a cat sleep' WHERE key = 1",
    ],
)
def test_a_changed_document_is_found(tmp_path: Path, statement: str) -> None:
    filled(tmp_path).close_writing()
    changed(tmp_path, statement)
    catalogue = Catalogue.open_for_reading(tmp_path)
    assert catalogue.documents([2])[2].document == DOCUMENTS[1]
    with pytest.raises(DamagedError) as caught:
        catalogue.documents([1])
    assert str(caught.value) == (
        f"{tmp_path / DATABASE} is damaged: the document 'cat' does not match its checksum; "
        f"run gemb index verify {tmp_path}, then gemb index rebuild {tmp_path}"
    )
    assert catalogue.audit()[0] == ["'cat'"]
    catalogue.close()


def test_a_changed_manifest_is_found(tmp_path: Path) -> None:
    filled(tmp_path).close_writing()
    changed(tmp_path, "UPDATE manifest SET value = replace(value, '4', '5') WHERE name = 'settings'")
    catalogue = Catalogue.open_for_reading(tmp_path)
    with pytest.raises(DamagedError, match="the manifest's settings does not match its checksum"):
        catalogue.settings()
    catalogue.close()


def test_no_index_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "wiki"
    with pytest.raises(UnavailableError) as caught:
        Catalogue.open_for_reading(folder)
    assert str(caught.value) == f"there is no index {folder}; make one with gemb index INPUT -o {folder}"


def test_a_newer_format_is_told(tmp_path: Path) -> None:
    filled(tmp_path).close_writing()
    changed(tmp_path, f"PRAGMA user_version = {FORMAT + 1}")
    with pytest.raises(MismatchError) as caught:
        Catalogue.open_for_reading(tmp_path)
    assert str(caught.value) == (f"{tmp_path} is an index of format 2, this gemb reads up to 1; upgrade gemb")


def test_the_database_of_another_program_is_told(tmp_path: Path) -> None:
    changed(tmp_path, "CREATE TABLE pages (title TEXT)")
    with pytest.raises(GembError, match=r"is no index: its index\.db belongs to another program"):
        Catalogue.open_for_reading(tmp_path)


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"no database" * 500)
    with pytest.raises(DamagedError, match="is no SQLite database, or its first page is damaged"):
        Catalogue.open_for_reading(tmp_path)

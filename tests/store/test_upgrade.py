"""An index of version 0.1.0 becomes one of the present format, with the same vectors and answers."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.errors import Exit, GembError, LockedError, MismatchError, UnavailableError
from gemb.files import Lock
from gemb.store import Document, Index, Settings, Writer
from gemb.store import upgrade as upgrading
from gemb.store.blocks import DamagedError
from gemb.store.upgrade import Upgraded, upgrade
from gemb.store.verify import verify
from gemb.vectors import open_vectors
from tests.store.conftest import DIMS, documents, make, vectors
from tests.store.old_layout import FINGERPRINT, write_old_index


def old_documents(count: int) -> list[Document]:
    return [Document(one.id, one.text, one.title) for one in documents(0, count)]


@pytest.fixture
def old(tmp_path: Path, rows: NDArray[np.float32]) -> Path:
    """900 documents in three parts."""
    return write_old_index(tmp_path / "docs.gemb", old_documents(900), rows)


def test_documents_and_vectors_are_those_of_the_old_index_to_the_bit(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrading, "DOCUMENTS_A_BLOCK", 256)
    with open_vectors(old / "vectors") as opened:
        before = opened.block(0, 900)
    upgraded = upgrade(old)
    assert upgraded == Upgraded(900, old.with_name("docs.gemb.old"))
    assert verify(old).faults == []
    with Index.open(old) as index:
        blocks = list(index.export())
        assert [document for block in blocks for document in block.documents] == old_documents(900)
        assert index.segments()[0][1] == 900
        stored = np.concatenate(
            [live.segment.stored(np.arange(live.segment.rows)) for live in index._view.segments]
        )
    assert stored.tobytes() == before.tobytes()


def test_the_model_is_recorded_as_gemb_index_does(old: Path) -> None:
    upgrade(old)
    with Index.open(old) as index:
        assert index.encoder == {
            "model": "minilm",
            "fingerprint": FINGERPRINT,
            "document_prompt": {"name": "document", "text": "title: none | text: "},
            "query_prompt": None,
            "model_dims": DIMS,
            "max_tokens": 256,
            "passages": "off",
        }
        assert (index.settings.dims, index.settings.dtype) == (DIMS, "f32")


def test_the_same_input_needs_no_new_vector_after_an_upgrade(old: Path) -> None:
    upgrade(old)
    with Writer.open(old) as writer:
        assert writer.compare(old_documents(900)).needed == []
        assert writer.changes.unchanged == 900


def test_the_old_index_is_kept_as_it_was(old: Path) -> None:
    before = {path.relative_to(old): path.read_bytes() for path in old.rglob("*") if path.is_file()}
    kept = upgrade(old).kept
    assert kept is not None
    assert {path.relative_to(kept): path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before


def test_an_index_of_this_format_is_left_alone(tmp_path: Path) -> None:
    path = make(tmp_path / "x.gemb", vectors(5))
    assert upgrade(path) == Upgraded(5, None)
    assert [one.name for one in tmp_path.iterdir()] == ["x.gemb"]


def test_an_upgrade_that_was_killed_after_the_exchange_is_ended_by_the_next(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", die)
        with pytest.raises(Killed):
            upgrade(old)
    assert verify(old).faults == []
    assert upgrade(old) == Upgraded(900, old.with_name("docs.gemb.old"))
    assert sorted(path.name for path in old.parent.iterdir()) == ["docs.gemb", "docs.gemb.old"]


def test_an_upgrade_in_a_gap_between_two_renames_is_ended_by_the_next(old: Path) -> None:
    upgrade(old)
    old.rename(old.with_name("docs.gemb.upgrading"))
    (old.with_name("docs.gemb.upgrading") / "index.db-replaces").touch()
    assert upgrade(old) == Upgraded(900, None)
    assert verify(old).documents == 900


def test_an_empty_old_index_becomes_an_empty_index(tmp_path: Path) -> None:
    path = write_old_index(tmp_path / "x.gemb", [], np.empty((0, DIMS), np.float32))
    assert upgrade(path).documents == 0
    with Index.open(path) as index:
        assert index.search(vectors(1)) == [[]]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["documents.jsonl", "vectors/manifest.json", "vectors/*.npy"])
def test_a_damaged_old_index_is_left_as_it_is(old: Path, name: str) -> None:
    path = sorted(old.glob(name))[-1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=f"{path} is damaged: ") as error:
        upgrade(old)
    assert error.value.exit_code == Exit.FAILED
    assert sorted(one.name for one in old.iterdir()) == ["documents.jsonl", "gemb.json", "vectors"]
    assert [one.name for one in old.parent.iterdir()] == ["docs.gemb"]


def test_a_missing_part_of_an_old_index_is_named(old: Path) -> None:
    (old / "documents.jsonl").unlink()
    with pytest.raises(DamagedError) as error:
        upgrade(old)
    assert str(error.value) == (
        f"{old / 'documents.jsonl'} is missing; make it anew with gemb index INPUT -o NAME.gemb"
    )


def test_readers_and_writers_of_an_old_index_are_told_to_upgrade_it(old: Path) -> None:
    for opened in (Index.open, Writer.open, lambda path: Writer.open(path, Settings(DIMS)), verify):
        with pytest.raises(MismatchError) as error:
            opened(old)
        assert str(error.value) == (
            f"{old} is an index of gemb 0.1.0, this gemb reads format 1; run gemb index upgrade {old}"
        )
    assert sorted(one.name for one in old.iterdir()) == ["documents.jsonl", "gemb.json", "vectors"]


def test_an_old_index_that_is_being_written_is_not_upgraded(old: Path) -> None:
    with Lock(old / "writer.lock", str(old)), pytest.raises(LockedError):
        upgrade(old)
    assert (old / "gemb.json").exists()


def test_nothing_and_something_else_are_not_upgraded(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="there is no index"):
        upgrade(tmp_path / "no.gemb")
    (tmp_path / "gemb.json").write_text('{"format": "something else"}')
    with pytest.raises(GembError, match="is no index"):
        upgrade(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["gemb.json"]


@pytest.mark.parametrize(
    ("version", "kind", "what"),
    [
        (2, MismatchError, "{} is an index of format 2, this gemb reads up to 1; upgrade gemb"),
        (0, DamagedError, "{}/index.db is damaged: there is no format 0; run gemb index verify {}, "),
        (-9, DamagedError, "{}/index.db is damaged: there is no format -9; run gemb index verify {}, "),
    ],
)
def test_formats_that_are_none_of_ours(
    tmp_path: Path, version: int, kind: type[GembError], what: str
) -> None:
    path = make(tmp_path / "x.gemb", vectors(3))
    connection = sqlite3.connect(path / "index.db")
    connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    for opened in (Index.open, Writer.open, upgrade):
        with pytest.raises(kind) as error:
            opened(path)
        assert str(error.value).startswith(what.format(path, path))


def test_a_format_that_gemb_knew_before_is_to_be_upgraded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "x.gemb", vectors(3))
    monkeypatch.setattr("gemb.store.catalogue.FORMAT", 2)
    with pytest.raises(MismatchError) as error:
        Index.open(path)
    assert str(error.value) == (
        f"{path} is an index of format 1, this gemb reads 2; run gemb index upgrade {path}"
    )

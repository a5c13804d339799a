"""What was committed is there, or its absence is told; what is moved, replaced or read-only is told apart."""

import errno
import itertools
import multiprocessing
import os
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.errors import GembError, LockedError, MachineError, MismatchError, UnavailableError
from gemb.files import Lock
from gemb.store import Changes, Document, Index, Settings, Writer
from gemb.store.blocks import DamagedError
from gemb.store.catalogue import Catalogue
from gemb.store.rebuild import rebuild
from gemb.store.verify import verify
from tests.store.conftest import DIMS, documents, make, vectors
from tests.store.test_verify import run_sql
from tests.store.test_writer import contents

SETTINGS = Settings(dims=DIMS)


def as_left_by_a_kill(path: Path, rows: NDArray[np.float32]) -> Path:
    """An index whose last commit, documents d50 to d89, is in the journal alone."""
    with Writer.open(path.with_name("alive.gemb"), SETTINGS) as writer:
        writer.put(documents(0, 50), rows[:50])
        writer.commit()
        writer._catalogue._execute("PRAGMA wal_checkpoint(TRUNCATE)")
        writer.put(documents(50, 90), rows[50:90])
        writer.commit()
        shutil.copytree(path.with_name("alive.gemb"), path)
    shutil.rmtree(path.with_name("alive.gemb"))
    return path


def in_child(check: Callable[[], None], user: int | None = None) -> int | None:
    """How a process ends that runs `check`, as another user where one is given."""

    def run() -> None:
        if user is not None:
            os.setuid(user)
        check()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    return process.exitcode


# ---------------------------------------------------------------- the journal


def test_a_journal_of_a_killed_writer_is_read(tmp_path: Path, rows: NDArray[np.float32]) -> None:
    path = as_left_by_a_kill(tmp_path / "x.gemb", rows)
    assert len(contents(path)) == 90
    with Writer.open(path) as writer:
        assert writer.documents == 90
    assert not (path / "index.db-committed").exists()


@pytest.mark.parametrize("damage", ["removed", "cut off", "flipped"])
def test_a_commit_that_is_lost_with_its_journal_is_missed(
    tmp_path: Path, rows: NDArray[np.float32], damage: str
) -> None:
    """SQLite takes such a file for sound, and shows what was there before."""
    path = as_left_by_a_kill(tmp_path / "x.gemb", rows)
    journal = path / "index.db-wal"
    if damage == "removed":
        journal.unlink()
    elif damage == "cut off":
        os.truncate(journal, journal.stat().st_size // 2)
    else:
        content = bytearray(journal.read_bytes())
        content[40] ^= 1  # in the head of the first page
        journal.write_bytes(content)
    what = (
        "its last commit is number 1, but number 2 was made; its journal index.db-wal was damaged, cut off "
        "or removed"
    )
    message = (
        f"{path}/index.db is damaged: {what}; run gemb index verify {path}, then gemb index rebuild {path}"
    )
    before = os.listdir(path / "segments")
    for opened in (Index.open, Writer.open):
        with pytest.raises(DamagedError) as error:
            opened(path)
        assert str(error.value) == message
    assert [fault.what for fault in verify(path).faults] == [what]
    assert sorted(os.listdir(path / "segments")) == sorted(before), "nothing may be swept"
    assert rebuild(path).documents == 50
    assert set(contents(path)) == {f"d{n}" for n in range(50)}
    assert verify(path).faults == []


def test_a_note_of_commits_that_is_damaged_is_told(tmp_path: Path, rows: NDArray[np.float32]) -> None:
    path = as_left_by_a_kill(tmp_path / "x.gemb", rows)
    (path / "index.db-committed").write_text("5 00000000\n")
    with pytest.raises(DamagedError, match=r"index\.db-committed is damaged: it tells no number of a commit"):
        Index.open(path)
    assert rebuild(path).lost == 0


def test_a_reader_misses_commits_that_it_has_seen(tmp_path: Path, rows: NDArray[np.float32]) -> None:
    path = make(tmp_path / "x.gemb", rows[:40], commits=[20])
    with Index.open(path) as index:
        index._catalogue._generation += 5
        with pytest.raises(DamagedError, match="its last commit is number 2, but number 7 was there"):
            index.search(rows[0])


def test_a_note_of_a_killed_writer_is_swept(tmp_path: Path, rows: NDArray[np.float32]) -> None:
    path = make(tmp_path / "x.gemb", rows[:4])
    left = path / ".index.db-committed.0a0b0c0d.tmp"
    left.touch()
    with Writer.open(path):
        assert not left.exists()


def test_a_kill_while_the_journal_mode_changes_keeps_no_reader_out(
    tmp_path: Path, rows: NDArray[np.float32]
) -> None:
    """The journal of that change is one that a read-only connection cannot take back."""
    path = make(tmp_path / "x.gemb", rows[:30])
    before = (path / "index.db").read_bytes()
    connection = sqlite3.connect(path / "index.db", isolation_level=None)
    connection.execute("PRAGMA cache_spill = 1")
    connection.execute("BEGIN EXCLUSIVE")
    connection.execute("PRAGMA user_version = 1")
    connection.execute("UPDATE documents SET title = title || 'x'")
    connection.execute("PRAGMA cache_size = 1")
    connection.execute("UPDATE texts SET text = text || 'x'")
    shutil.copytree(path, tmp_path / "killed.gemb")
    connection.close()
    assert (tmp_path / "killed.gemb" / "index.db-journal").stat().st_size > 512
    assert contents(tmp_path / "killed.gemb") == contents(path)
    assert (tmp_path / "killed.gemb" / "index.db").read_bytes() == before
    assert not (tmp_path / "killed.gemb" / "index.db-journal").exists()
    assert verify(tmp_path / "killed.gemb").faults == []


# ---------------------------------------------------------------- publishing


def test_the_files_of_a_commit_that_was_refused_stay_until_the_next_writer(
    tmp_path: Path, rows: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing disk can refuse to confirm a commit that is there when the journal is read anew."""
    path = make(tmp_path / "x.gemb", rows[:20])

    def commit_and_fail(catalogue: Catalogue) -> None:
        catalogue._execute("COMMIT")
        raise MachineError("input/output error")

    writer = Writer.open(path)
    writer.put(documents(20, 30), rows[20:30])
    monkeypatch.setattr(Catalogue, "commit", commit_and_fail)
    with pytest.raises(MachineError):
        writer.commit()
    monkeypatch.undo()
    writer.abandon()
    assert len(contents(path)) == 30
    assert verify(path).faults == []


def test_counts_of_changes_are_those_of_what_is_kept(
    tmp_path: Path, rows: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Writer.open(tmp_path / "x.gemb", SETTINGS) as writer:
        writer.put(documents(0, 5), rows[:5])
        writer.commit()
        writer.put(documents(5, 9), rows[5:9])
        with pytest.raises(GembError, match="NaN"):
            writer.put(documents(9, 10), np.full((1, DIMS), np.nan))
        assert writer.changes == Changes(added=9), "a row that is refused costs nothing else"

        def fail(*_: object, **__: object) -> None:
            raise MachineError("input/output error")

        monkeypatch.setattr(Catalogue, "put_documents", fail)
        with pytest.raises(MachineError):
            writer.put(documents(9, 10), rows[9:10])
        monkeypatch.undo()
        assert writer.changes == Changes(added=5)
        assert writer.compare(documents(5, 9)).needed == [0, 1, 2, 3]
        writer.put(documents(5, 9), rows[5:9])
    assert len(contents(tmp_path / "x.gemb")) == 9


def test_a_delete_that_fails_leaves_nothing_half_done(
    tmp_path: Path, rows: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "x.gemb", rows[:20])
    before = contents(path)
    with Writer.open(path) as writer:
        statement = "DELETE FROM texts WHERE"
        execute = Catalogue._execute

        def fail(catalogue: Catalogue, text: str, parameters: tuple[object, ...] = ()) -> sqlite3.Cursor:
            if text.startswith(statement):
                raise MachineError("input/output error")
            return execute(catalogue, text, parameters)

        monkeypatch.setattr(Catalogue, "_execute", fail)
        with pytest.raises(MachineError):
            writer.delete(["d3"])
        monkeypatch.undo()
        assert writer.changes == Changes()
        assert writer.documents == 20
    assert contents(path) == before


def test_a_lost_entry_of_a_segment_costs_no_files(index: Path) -> None:
    """A sweep removes what nobody names; so first it is made sure that all are named that there are."""
    before = sorted(path for path in index.rglob("*") if path.is_file())
    run_sql(index, "DELETE FROM segments WHERE first_key > 100")
    for opened in (Index.open, Writer.open):
        with pytest.raises(DamagedError, match="its segments have 698 rows, but 898 were committed"):
            opened(index)
    assert sorted(path for path in index.rglob("*") if path.is_file()) == before


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("CREATE TABLE guest (x)", "the declaration of guest is not the one that was written"),
        ("DROP VIEW contents", "the declaration of contents is not the one that was written"),
    ],
)
def test_another_declaration_is_a_fault(index: Path, statement: str, what: str) -> None:
    run_sql(index, statement)
    assert what in [fault.what for fault in verify(index).faults]


def test_a_name_in_the_schema_that_is_no_text_any_more_is_damage_and_no_crash(index: Path) -> None:
    """SQLite puts the name into its message, which Python then cannot read."""
    content = (index / "index.db").read_bytes()
    (index / "index.db").write_bytes(
        content.replace(b"sqlite_autoindex_manifest", b"sqlite_auto\xd3ndex_manifest")
    )
    message = f"{index}/index.db is damaged: a name in it is no UTF-8; "
    for opened in (Index.open, Writer.open):
        with pytest.raises(DamagedError) as error:
            opened(index)
        assert str(error.value).startswith(message)
    assert verify(index).faults[0].what == "a name in it is no UTF-8"


def test_a_changed_mark_of_the_journal_mode_is_a_fault(index: Path) -> None:
    content = bytearray((index / "index.db").read_bytes())
    content[18] ^= 8
    (index / "index.db").write_bytes(content)
    assert any("journal modes 0901" in fault.what for fault in verify(index).faults)


@pytest.mark.faults
@pytest.mark.parametrize("place", ["_copy_live", "_check_place", "put_segment", "_note_commit", "_sweep"])
def test_a_kill_in_the_middle_of_a_merge_costs_nothing(
    tmp_path: Path, rows: NDArray[np.float32], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "x.gemb", rows[:30], commits=[10, 20])
    owner = Writer if hasattr(Writer, place) else Catalogue

    def merge_and_die() -> None:
        merge, sound = Writer._merge, getattr(owner, place)

        def dying_merge(writer: Writer, *arguments: Any) -> None:  # noqa: ANN401
            setattr(owner, place, lambda *_, **__: os._exit(77))
            merge(writer, *arguments)
            setattr(owner, place, sound)

        setattr(Writer, "_merge", dying_merge)  # noqa: B010
        with Writer.open(path) as writer:
            writer.put(documents(30, 40), rows[30:40])

    assert in_child(merge_and_die) == 77
    assert contents(path).keys() == {f"d{n}" for n in range(40)}
    assert verify(path).faults == []
    with Writer.open(path) as writer:
        assert len(list((path / "segments").iterdir())) == len(writer.segments())
        writer.put(documents(40, 50), rows[40:50])
    assert len(contents(path)) == 50
    assert verify(path).notes == []


def test_a_full_disk_is_told_where_sqlite_cannot_open_its_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "x.gemb", vectors(3))

    def fail(**_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    (path / "index.db-wal").mkdir()  # as good as no room for it
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", fail)
        with pytest.raises(MachineError, match=f"^cannot write {path}/index.db: no space left"):
            Writer.open(path)
    with pytest.raises(MachineError) as error:
        Writer.open(path)
    assert str(error.value) == (
        f"cannot open {path}/index.db: unable to open database file; "
        "check the disk, then run the same command again"
    )


# ---------------------------------------------------------------- replaced, moved, copied


def test_a_reader_goes_over_to_the_index_that_took_the_place_of_its_own(
    tmp_path: Path, rows: NDArray[np.float32]
) -> None:
    path = make(tmp_path / "x.gemb", rows[:40])
    other = make(tmp_path / "y.gemb", rows[100:140])
    with Index.open(path) as index:
        own = index.nearest(rows[7], 1)
        path.rename(tmp_path / "old.gemb")
        assert index.nearest(rows[7], 1).scores == own.scores, "a folder that is moved can be searched on"
        other.rename(path)
        assert index.state.generation == 1, "both are at the same number"
        found = index.nearest(rows[107], 1)
        assert float(found.scores[0, 0]) > 0.999
        assert int(found.keys[0, 0]) == 8


@pytest.mark.parametrize("other", [Settings(DIMS, encoder={"fingerprint": "y"}), Settings(8)])
def test_a_reader_does_not_go_over_to_an_index_of_another_model(tmp_path: Path, other: Settings) -> None:
    path = make(tmp_path / "x.gemb", vectors(5), Settings(DIMS, encoder={"fingerprint": "x"}))
    new = make(tmp_path / "y.gemb", vectors(5, dims=other.dims), other)
    with Index.open(path) as index:
        path.rename(tmp_path / "old.gemb")
        new.rename(path)
        with pytest.raises(MismatchError) as error:
            index.search(vectors(1))
        assert str(error.value) == (
            f"{path} was replaced by an index of another model; open it again, with that one"
        )


def test_a_reader_follows_a_rebuild(index: Path) -> None:
    with Index.open(index) as opened:
        before = opened.search(vectors(3), k=20, exact=True)
        rebuild(index)
        assert opened.search(vectors(3), k=20, exact=True) == before
        with Writer.open(index) as writer:
            writer.delete(["d1"])
        assert opened.get(["d1"]) == {}


def test_a_writer_whose_folder_was_moved_says_so_and_spares_what_is_there_now(
    tmp_path: Path, rows: NDArray[np.float32]
) -> None:
    path, moved = tmp_path / "x.gemb", tmp_path / "moved.gemb"
    writer = Writer.open(path, SETTINGS)
    writer.put(documents(0, 20), rows[:20])
    writer.commit()
    path.rename(moved)
    make(path, rows[:5])
    with Lock(path / "writer.lock", str(path)):
        writer.delete(["d3"])
        with pytest.raises(GembError) as error:
            writer.commit()
        writer.abandon()
        with pytest.raises(LockedError):
            Writer.open(path)
    assert str(error.value) == (
        f"{path} was moved or replaced while it was written; what was committed before is with it, "
        "run the command again"
    )
    assert len(contents(path)) == 5
    with Writer.open(moved) as again:
        assert again.documents == 20
    assert verify(moved).faults == verify(path).faults == []


def test_a_reader_of_a_moved_folder_that_misses_a_segment_says_where_to_look(
    tmp_path: Path, rows: NDArray[np.float32]
) -> None:
    path, moved = make(tmp_path / "x.gemb", rows[:5]), tmp_path / "moved.gemb"
    with Index.open(path) as index:
        path.rename(moved)
        with Writer.open(moved) as writer:
            writer.put(documents(5, 9), rows[5:9])
        with pytest.raises(UnavailableError) as error:
            index.search(rows[0])
        assert str(error.value) == (
            f"there is no index {path} any more; was it moved? open it where it is now"
        )
        moved.rename(path)
        assert index.search(rows[8])[0][0].id == "d8"


def test_a_copy_of_an_index_is_an_index(index: Path, tmp_path: Path) -> None:
    shutil.copytree(index, tmp_path / "copy.gemb")
    assert contents(tmp_path / "copy.gemb") == contents(index)
    assert verify(tmp_path / "copy.gemb").faults == []


# ---------------------------------------------------------------- read-only


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder in which another user may look."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in itertools.chain([folder], folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def only_readable(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        path.chmod(stat.S_IMODE(path.stat().st_mode) & 0o555)


def another_user() -> int | None:
    return 65534 if os.getuid() == 0 else None  # modes tell root nothing


def test_a_read_only_index_is_searched_and_verified_and_not_written(
    public: Path, rows: NDArray[np.float32]
) -> None:
    path = make(public / "x.gemb", rows[:40])
    only_readable(public)

    def check() -> None:
        assert contents(path).keys() == {f"d{n}" for n in range(40)}
        assert verify(path).faults == []
        with pytest.raises(GembError) as error:
            Writer.open(path)
        assert str(error.value) == (
            f"cannot lock {path}/writer.lock: permission denied; change its mode or choose another path"
        )

    assert in_child(check, another_user()) == 0


def test_the_journal_of_a_killed_writer_is_read_where_nothing_can_be_written(
    public: Path, rows: NDArray[np.float32]
) -> None:
    path = as_left_by_a_kill(public / "x.gemb", rows)
    for left in ("index.db-shm", "writer.lock"):
        (path / left).unlink(missing_ok=True)
    only_readable(public)

    def check() -> None:
        with Index.open(path) as index:
            assert index.state.documents == 90
            assert index._catalogue._reading is not None
            assert index._catalogue._reading.copy is not None
        assert not index._catalogue._reading.copy.exists()
        assert verify(path).documents == 90

    assert in_child(check, another_user()) == 0


def test_a_reader_of_a_read_only_index_sees_what_another_user_writes(
    public: Path, rows: NDArray[np.float32]
) -> None:
    """SQLite takes a file that it opened as immutable for one that nobody changes."""
    path = make(public / "x.gemb", rows[:40])
    connection = sqlite3.connect(path / "index.db")
    connection.execute("PRAGMA journal_mode = WAL")
    shutil.copy(path / "index.db", public / "in-wal-mode")
    connection.close()
    shutil.copyfile(public / "in-wal-mode", path / "index.db")
    only_readable(public)
    fork = multiprocessing.get_context("fork")
    looked, written = fork.Event(), fork.Event()

    def check() -> None:
        with Index.open(path) as index:
            assert index._catalogue._reading is not None
            assert index._catalogue._reading.is_static
            assert index.state.documents == 40
            looked.set()
            assert written.wait(30)
            assert index.state.documents == 60
            assert index.search(rows[55])[0][0].id == "d55"

    def run() -> None:
        if (user := another_user()) is not None:
            os.setuid(user)
        check()

    process = fork.Process(target=run)
    process.start()
    assert looked.wait(30)
    for folder in (path, path / "segments"):
        folder.chmod(0o755)
    with Writer.open(path) as writer:
        writer.put(documents(40, 60), rows[40:60])
    for folder in (path, path / "segments"):
        folder.chmod(0o555)
    written.set()
    process.join(60)
    assert process.exitcode == 0


# ---------------------------------------------------------------- ids, k, nothing


@pytest.mark.parametrize(
    "id_",
    [
        "\x00",
        "a\x00b",
        "a",
        "",
        " ",
        "\n",
        "שלום\u202e",
        "e\u0301",
        "é",
        "𝔘\U0010ffff",
        "'; DROP",
        "x" * 10_240,
    ],
)
def test_any_string_is_an_id(tmp_path: Path, id_: str) -> None:
    path = tmp_path / "x.gemb"
    others = [Document("a\x00c", "other"), Document("b", "other")]
    with Writer.open(path, SETTINGS) as writer:
        writer.put([Document(id_, f"text of {id_}", id_, {"own": id_}), *others], vectors(3))
    with Writer.open(path) as writer:
        assert writer.compare([Document(id_, f"text of {id_}", id_, {"own": id_})]).needed == []
    with Index.open(path) as index:
        assert index.search(vectors(3)[0], k=1)[0][0].id == id_
        assert index.get([id_])[id_].metadata == {"own": id_}
        assert index.like(id_, k=5)
    assert verify(path).faults == []
    with Writer.open(path) as writer:
        assert writer.delete([id_]) == []
    assert set(contents(path)) == {"a\x00c", "b"}


def test_k_beyond_the_rows_gives_all_and_k_below_one_is_refused(
    tmp_path: Path, rows: NDArray[np.float32]
) -> None:
    path = make(tmp_path / "x.gemb", rows[:7])
    with Index.open(path) as index:
        assert len(index.search(rows[0], k=1000)[0]) == 7
        for k in (0, -1):
            with pytest.raises(GembError) as error:
                index.search(rows[0], k=k)
            assert str(error.value) == f"k is {k}; ask for at least 1 document"


def test_an_index_of_nothing_finds_nothing(tmp_path: Path) -> None:
    with Writer.open(tmp_path / "x.gemb", SETTINGS) as writer:
        writer.prune()
    with Index.open(tmp_path / "x.gemb") as index:
        assert index.search(vectors(2), words=["a", "b"], k=3) == [[], []]
        assert index.fields() == {}
    assert verify(tmp_path / "x.gemb").faults == []
    assert rebuild(tmp_path / "x.gemb").documents == 0

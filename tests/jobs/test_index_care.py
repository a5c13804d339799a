"""Verify, compact, rebuild, upgrade, delete and export, as jobs; an index of version 0.1.0."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemb.errors import Exit, GembError, Interrupted, LockedError, MismatchError, UnavailableError
from gemb.files import Lock, file_digest, write_json
from gemb.jobs import index_care as care
from gemb.jobs import info
from gemb.jobs.index import IndexRecipe
from gemb.jobs.index import run as run_index
from gemb.jobs.index_export import export
from gemb.report import Event
from gemb.store import Document, Index, Settings, Step, Writer
from gemb.vectors import Layout, open_sink, open_vectors
from gemb.vectors.layout import MANIFEST

ROWS = 40
DIMS = 6


def vectors_of(rows: int, seed: int = 5) -> np.ndarray[Any, np.dtype[np.float32]]:
    vectors = np.random.default_rng(seed).standard_normal((rows, DIMS)).astype(np.float32)
    unit: np.ndarray[Any, np.dtype[np.float32]] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


VECTORS = vectors_of(ROWS)
DOCUMENTS = [
    Document(f"d{row}", f"text {row}", f"title {row}", {"year": 1990 + row, "tags": ["a"]})
    for row in range(ROWS)
]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index of DOCUMENTS and one that is divided."""
    monkeypatch.setenv("GEMB_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "docs.gemb"
    with Writer.open(path, Settings(DIMS, "f32")) as writer:
        writer.put(DOCUMENTS, VECTORS)
        writer.put([Document("long", "one. two.")], vectors_of(2, 6), [[(0, 5), (5, 9)]])
    return path


def ids_of(path: Path) -> list[str]:
    with Index.open(path) as index:
        return [document.id for block in index.export() for document in block.documents]


# --- verify and rebuild


def test_a_sound_index_is_told_with_its_numbers(made: Path) -> None:
    report = care.verify(made)
    assert report.exit_code == Exit.DONE
    assert report.title.startswith(f"{made}: sound; 41 documents in 42 passages, 4 files, ")
    assert report.data["faults"] == []


def damage(path: Path, name: str = "vectors.f32") -> None:
    (file,) = path.glob(f"segments/*/{name}")
    content = bytearray(file.read_bytes())
    content[10] ^= 64
    file.write_bytes(content)


def test_a_fault_is_told_with_what_to_run_and_that_mends_it(made: Path) -> None:
    damage(made, "codes.i8")
    report = care.verify(made)
    assert report.exit_code == Exit.FAILED
    assert report.title == f"{made}: damaged, 1 fault; run gemb index rebuild {made}"
    ((label, fault),) = report.rows
    assert label == "fault"
    assert fault.endswith("codes.i8: bytes 0 to 252 are damaged")
    rebuilt = care.rebuild(made)
    assert (rebuilt.exit_code, rebuilt.title) == (Exit.DONE, f"{made}: rebuilt with 41 documents")
    assert dict(rebuilt.rows)["before"].startswith(f"kept in {made}.damaged")
    assert care.verify(made).exit_code == Exit.DONE
    assert len(ids_of(made)) == 41


def test_a_rebuild_that_lost_documents_says_so_with_code_3(made: Path) -> None:
    damage(made)
    report = care.rebuild(made)
    assert report.exit_code == Exit.REJECTED
    assert report.title == f"{made}: rebuilt with 0 documents, 41 lost"
    assert "run the gemb index command" in dict(report.rows)["lost"]


# --- compact


def test_compact_drops_dead_rows_and_a_second_time_does_nothing(made: Path) -> None:
    care.delete(made, where="year < 2020")
    report = care.compact(made)
    assert report.title == f"{made}: compacted"
    assert dict(report.rows)["dead rows"] == "30 -> 0"
    assert care.compact(made).title == f"{made}: nothing to compact"
    assert len(ids_of(made)) == 11


def test_few_dead_rows_stay_and_are_told_until_a_full_compaction(made: Path) -> None:
    care.delete(made, ids=["d1"])
    report = care.compact(made)
    assert report.title == f"{made}: nothing to compact"
    told = dict(report.rows)
    assert told["dead rows"] == "1"
    assert told["note"] == "a part is rid of its dead rows where they are more than 20%, or by --full"
    report = care.compact(made, full=True)
    told = dict(report.rows)
    assert (told["dead rows"], "note" in told) == ("1 -> 0", False)
    assert len(ids_of(made)) == 40


# --- delete


def test_delete_takes_ids_and_counts_those_that_are_not_there(made: Path) -> None:
    report = care.delete(made, ids=["d1", "nope", "d2", "d1"])
    assert report.title == f"{made}: deleted 2 documents of 41"
    assert dict(report.rows) == {"not there": "1: 'nope'"}
    assert ids_of(made)[:3] == ["d0", "d3", "d4"]


@pytest.mark.parametrize("stream", [False, True])
def test_delete_reads_ids_from_a_file_or_a_pipe(
    made: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(care, "IDS_AT_ONCE", 3)
    content = "".join(f"d{row}\r\n" for row in range(10)).encode() + b"\nnope\nd39"
    (made.parent / "ids.txt").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    report = care.delete(made, ids_from=Path("-") if stream else made.parent / "ids.txt")
    assert (report.data["removed"], report.data["missing"]) == (11, 1)
    assert ids_of(made) == [*(f"d{row}" for row in range(10, 39)), "long"]


@pytest.mark.parametrize("block", [3, 1000])
def test_delete_where_removes_what_the_filter_says_and_no_more(
    made: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(care, "IDS_AT_ONCE", block)
    counted = care.delete(made, where="year >= 2000 or id = 'long'", dry_run=True)
    assert counted.title == f"{made}: would delete 31 documents of 41"
    assert len(ids_of(made)) == 41
    done = care.delete(made, where="year >= 2000 or id = 'long'")
    assert done.data["removed"] == counted.data["removed"]
    assert ids_of(made) == [f"d{row}" for row in range(10)]
    assert care.verify(made).exit_code == Exit.DONE


def test_delete_without_a_word_or_with_a_wrong_filter_deletes_nothing(made: Path) -> None:
    with pytest.raises(
        GembError, match=r"^nothing is named to be deleted; give ids, --ids-from FILE or --wh"
    ):
        care.delete(made)
    with pytest.raises(GembError, match="no field yaer; did you mean year"):
        care.delete(made, where="yaer = 1")
    with pytest.raises(GembError, match="--where and ids cannot be given together"):
        care.delete(made, ids=["d1"], where="year = 1")
    assert len(ids_of(made)) == 41


def test_a_signal_before_the_commit_deletes_nothing_and_one_after_it_changes_nothing(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(care, "IDS_AT_ONCE", 4)
    with pytest.raises(Interrupted) as raised:
        care.delete(made, interrupt, where="year < 2000 or year > 2010")
    assert str(raised.value) == f"interrupted; nothing was deleted from {made}"
    assert len(ids_of(made)) == 41

    def merge(writer: Writer) -> None:
        interrupt()
        writer._on_step(Step("merging", 1, 1))

    monkeypatch.setattr(Writer, "_merge_small", merge)
    assert care.delete(made, ids=["d1"]).data["removed"] == 1
    assert len(ids_of(made)) == 40


@pytest.mark.parametrize("act", [care.compact, care.delete, care.rebuild])
def test_a_second_writer_is_refused(made: Path, act: Callable[..., object]) -> None:
    arguments = {"ids": ["d1"]} if act is care.delete else {}
    with Lock(made / "writer.lock", str(made)), pytest.raises(LockedError, match="is held by process"):
        act(made, **arguments)


@pytest.mark.parametrize("act", [care.verify, care.compact, care.rebuild, care.upgrade])
def test_nothing_and_something_else_are_refused(tmp_path: Path, act: Callable[..., object]) -> None:
    with pytest.raises(UnavailableError, match=r"^there is no index .*; make one with gemb index INPUT -o"):
        act(tmp_path / "none.gemb")
    (tmp_path / "photos").mkdir()
    with pytest.raises(GembError, match=r"is no index: it has no index\.db"):
        act(tmp_path / "photos")


# --- export


def test_every_export_holds_all_rows_with_their_vectors(made: Path) -> None:
    events: list[Event] = []
    for name in ("docs.npy", "docs.parquet", "docs.jsonl"):
        output = made.parent / name
        report = export(made, output, events.append)
        assert report.title == f"exported 41 documents in 42 rows to {output}"
        with open_vectors(output) as vectors:
            assert vectors.ids() == [*(f"d{row}" for row in range(ROWS)), "long", "long"]
            np.testing.assert_allclose(vectors.block(0, ROWS), VECTORS, atol=1e-6)
    assert events[-1].done == 41
    lines = [json.loads(line) for line in (made.parent / "docs.jsonl").read_text("utf-8").splitlines()]
    assert {name: lines[3][name] for name in lines[3] if name != "embedding"} == {
        "id": "d3", "passage": 0, "title": "title 3", "text": "text 3",
        "metadata": {"year": 1993, "tags": ["a"]},
    }  # fmt: skip
    assert [(line["passage"], line["text"]) for line in lines[-2:]] == [(0, "one. "), (1, "two.")]
    import pyarrow.parquet as pq

    table = pq.read_table(made.parent / "docs.parquet").to_pylist()
    beside = [
        json.loads(line) for line in (made.parent / "docs.documents.jsonl").read_text("utf-8").splitlines()
    ]
    for line, row, other in zip(lines, table, beside, strict=True):
        line.pop("embedding"), row.pop("embedding")
        assert {**row, "metadata": json.loads(row["metadata"])} == line == other


def test_an_export_takes_a_filter_and_makes_an_index_again(made: Path) -> None:
    output = made.parent / "some.npy"
    report = export(made, output, where="year < 2000")
    assert (report.data["documents"], report.data["rows"]) == (10, 10)
    documents = made.parent / "some.documents.jsonl"
    recipe = IndexRecipe(
        inputs=(str(documents),), vectors=output, output=made.parent / "again.gemb", dtype="f32", keep="none"
    )
    run_index(recipe)
    with Index.open(made.parent / "again.gemb") as index:
        hit = index.search(VECTORS[4], k=1)[0][0]
    assert (hit.id, hit.title, hit.text) == ("d4", "title 4", "text 4")


@pytest.mark.parametrize("name", ["some.parquet", "some.jsonl", "some.npy"])
def test_an_index_made_from_an_export_is_the_same(made: Path, name: str) -> None:
    output, again = made.parent / name, made.parent / "again.gemb"
    export(made, output, where="id != 'long'")
    texts = (str(output.with_suffix(".documents.jsonl")),) if name.endswith("npy") else ()
    run_index(IndexRecipe(inputs=texts, vectors=output, output=again, dtype="f32"))
    with Index.open(again) as index:
        assert index.fields() == {"year": "number", "tags": "list"}
        (block,) = index.export()
    assert block.documents == DOCUMENTS
    np.testing.assert_allclose(block.vectors, VECTORS, atol=1e-6)


@pytest.mark.parametrize("name", ["all.parquet", "all.jsonl", "all.npy"])
def test_an_export_with_documents_in_passages_makes_no_index(made: Path, name: str) -> None:
    output, again = made.parent / name, made.parent / "again.gemb"
    export(made, output)
    source = output.with_suffix(".documents.jsonl") if name.endswith("npy") else output
    texts = (str(source),) if source != output else ()
    with pytest.raises(GembError) as raised:
        run_index(IndexRecipe(inputs=texts, vectors=output, output=again, on_error="skip"))
    assert str(raised.value) == (
        f"{source}:42: a further passage of 'long'; documents in passages cannot be made again from an "
        "export, index their texts"
    )
    assert not again.exists()


def test_an_export_is_whole_or_absent(made: Path) -> None:
    output = made.parent / "docs.npy"
    damage(made)
    with pytest.raises(GembError, match="damaged"):
        export(made, output)
    assert sorted(path.name for path in made.parent.iterdir()) == ["docs.gemb"]


def test_an_export_that_cannot_be_is_refused(made: Path) -> None:
    output = made.parent / "docs.csv"
    with pytest.raises(GembError) as raised:
        export(made, output)
    assert str(raised.value) == (
        f"{output}: an index is exported to .parquet, .jsonl, .npy; choose one of these names"
    )
    output = made.parent / "docs.jsonl"
    with pytest.raises(GembError, match="there is no document to export"):
        export(made, output, where="year > 3000")
    assert not output.exists()
    output.write_text("mine", "utf-8")
    with pytest.raises(GembError, match=r"exists; pass --overwrite to replace it"):
        export(made, output)
    assert export(made, output, overwrite=True).data["rows"] == 42


# --- an index of version 0.1.0


def old_index(folder: Path, rows: int = 12) -> Path:
    """An index as version 0.1.0 wrote it: gemb.json, vectors/ and documents.jsonl."""
    folder.mkdir()
    sink = open_sink(folder / "vectors", folder.parent / "work", Layout(DIMS))
    sink.append([f"d{row}" for row in range(rows)], VECTORS[:rows])
    sink.finish()
    documents = [{"id": f"d{row}", "title": f"title {row}", "text": f"text {row}"} for row in range(rows)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents), "utf-8")
    prompt = {"name": "none", "text": ""}
    request = {"model": "f" * 64, "prompt": prompt, "settings": {"max-tokens": 256}}
    write_json(folder / "vectors" / "gemb.json", {"request": request})
    write_json(
        folder / "gemb.json",
        {
            "format": "gemb index 1",
            "model": "minilm",
            "fingerprint": "f" * 64,
            "prompt": prompt,
            "recipe": {},
            "vectors_manifest": file_digest(folder / "vectors" / MANIFEST),
            "documents": file_digest(folder / "documents.jsonl"),
            "rows": rows,
            "dims": DIMS,
        },
    )
    return folder


def test_an_old_index_says_everywhere_to_upgrade_it(tmp_path: Path) -> None:
    path = old_index(tmp_path / "old.gemb")
    (tmp_path / "docs.jsonl").write_text('{"id": "a", "text": "b"}\n', "utf-8")
    recipe = IndexRecipe(inputs=(str(tmp_path / "docs.jsonl"),), output=path)
    uses: list[Callable[[], object]] = [
        lambda: info.run(str(path)),
        lambda: care.verify(path),
        lambda: care.compact(path),
        lambda: care.delete(path, ids=["d1"]),
        lambda: export(path, tmp_path / "out.npy"),
        lambda: run_index(recipe),
    ]
    for use in uses:
        with pytest.raises(MismatchError) as raised:
            use()
        assert str(raised.value) == (
            f"{path} is an index of gemb 0.1.0, this gemb reads format 1; run gemb index upgrade {path}"
        )


def test_an_upgraded_index_is_the_same_and_the_old_one_is_kept(tmp_path: Path) -> None:
    path = old_index(tmp_path / "old.gemb")
    report = care.upgrade(path)
    assert report.title == f"{path}: upgraded, 12 documents"
    assert Path(str(report.data["kept"])).is_dir()
    with Index.open(path) as index:
        hit = index.search(VECTORS[7], k=1)[0][0]
    assert (hit.id, hit.title, hit.text) == ("d7", "title 7", "text 7")
    assert care.upgrade(path).title == f"{path}: of the present format already; nothing has changed"


def test_an_old_index_is_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    path = old_index(tmp_path / "old.gemb")
    np.save(tmp_path / "v.npy", VECTORS[:3])
    report = run_index(IndexRecipe(vectors=tmp_path / "v.npy", output=path), overwrite=True)
    assert report.data["documents"] == 3
    assert ids_of(path) == ["0", "1", "2"]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("old")] == ["old.gemb"]


# --- info


def test_info_tells_what_an_index_is(made: Path) -> None:
    report = info.run(str(made))
    assert report.title == f"{made}: an index of 41 documents"
    rows = dict(report.rows)
    assert rows["documents"] == "41 in 42 passages"
    assert rows["vectors"] == "6 dims as f32, of unit length"
    assert rows["model"] == "none: its vectors came ready"
    assert rows["fields"] == "tags (list), year (number)"
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    assert report.data["bytes"] == size
    assert report.data["segments"] == [{**report.data["segments"][0], "rows": 42, "live_rows": 42}]  # type: ignore[index]

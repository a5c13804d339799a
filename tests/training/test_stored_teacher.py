import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from gemb.engine.encoder import Encoder
from gemb.errors import GembError, MismatchError
from gemb.jobs.distill import DistillRecipe, run
from gemb.recipe import load
from gemb.training.batches import TrainingBatch
from gemb.training.stored_teacher import StoredTeacher
from tests.models import tiny_folder

TEXTS = ["one", "two", "three", "four"]
VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3) - 5


def write(place: Path, suffix: str = ".npy", vectors: NDArray[Any] = VECTORS) -> Path:
    """The vectors of d0 to d3 in a format."""
    path, ids = place / f"vectors{suffix}", [f"d{row}" for row in range(len(vectors))]
    if suffix == ".npy":
        np.save(path, vectors)
        (place / "vectors.ids.txt").write_text("".join(f"{name}\n" for name in ids))
    elif suffix == ".jsonl":
        rows = [{"id": name, "embedding": row} for name, row in zip(ids, vectors.tolist(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        table = pyarrow.table({"id": ids, "embedding": vectors.tolist()})
        pyarrow.parquet.write_table(table, path)
    return path


def write_texts(place: Path, rows: list[dict[str, str]] | None = None) -> str:
    rows = rows or [{"id": f"d{row}", "text": text} for row, text in enumerate(TEXTS)]
    (place / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(place / "texts.jsonl")


def batch(texts: list[str], pairs: int) -> TrainingBatch:
    rows = len(texts)
    nothing = np.zeros(rows, np.int32)
    owner = np.zeros(rows - 2 * pairs, np.int64)
    return TrainingBatch(
        "nice", "pairs", nothing, nothing + 1, nothing, pairs, owner, nothing.astype(np.int64), None, texts
    )


@pytest.mark.parametrize("suffix", [".npy", ".jsonl", ".parquet"])
def test_every_text_gets_its_vector_from_any_format(tmp_path: Path, suffix: str) -> None:
    with StoredTeacher.open(write(tmp_path, suffix), write_texts(tmp_path), tmp_path / "cache") as teacher:
        assert teacher.dims == 3
        found = teacher.vectors(batch(["three", "one", "two", "three", "four"], 2))
    np.testing.assert_array_equal(found, VECTORS[[2, 0, 1, 2, 3]])


def test_half_precision_is_widened(tmp_path: Path) -> None:
    vectors = write(tmp_path, vectors=VECTORS.astype(np.float16))
    with StoredTeacher.open(vectors, write_texts(tmp_path), tmp_path / "cache") as teacher:
        found = teacher.of(TEXTS, ["query"] * 4, "nice")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, VECTORS)


def test_a_text_may_have_a_vector_for_each_role(tmp_path: Path) -> None:
    rows = [
        {"id": "d0", "text": "one", "role": "query"},
        {"id": "d1", "text": "one", "role": "passage"},
        {"id": "d2", "text": "two"},
        {"id": "d3", "text": "two"},
    ]
    with StoredTeacher.open(write(tmp_path), write_texts(tmp_path, rows), tmp_path / "cache") as teacher:
        found = teacher.vectors(batch(["one", "two", "one", "two"], 2))
        assert teacher.notes == (
            f"{tmp_path / 'vectors.npy'} has 4 vectors, for 3 different texts of {tmp_path / 'texts.jsonl'}",
        )
    np.testing.assert_array_equal(found, VECTORS[[0, 2, 1, 2]])


def test_titles_stand_before_their_texts(tmp_path: Path) -> None:
    rows = [{"id": "d1", "text": "deep", "title": "Sea"}, {"id": "none", "text": "lost"}]
    with StoredTeacher.open(write(tmp_path), write_texts(tmp_path, rows), tmp_path / "cache") as teacher:
        np.testing.assert_array_equal(teacher.of(["Sea deep"], ["passage"], "nice"), VECTORS[[1]])
        assert teacher.notes[1] == f"1 texts of {tmp_path / 'texts.jsonl'} have no vector"


def test_another_content_is_another_teacher_and_the_same_is_prepared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, cache = write_texts(tmp_path), tmp_path / "cache"
    with StoredTeacher.open(write(tmp_path), texts, cache) as teacher:
        first = teacher.fingerprint
    with StoredTeacher.open(write(tmp_path, vectors=2 * VECTORS), texts, cache) as teacher:
        assert teacher.fingerprint != first
    texts = write_texts(tmp_path, [{"id": "d0", "text": "other"}])
    with StoredTeacher.open(write(tmp_path), texts, cache) as teacher:
        assert teacher.fingerprint != first
    monkeypatch.setattr("gemb.training.stored_teacher._prepare", lambda *_: pytest.fail("prepared again"))
    with StoredTeacher.open(write(tmp_path), write_texts(tmp_path), cache) as teacher:
        assert teacher.fingerprint == first
        np.testing.assert_array_equal(teacher.of(["four"], ["query"], "nice"), VECTORS[[3]])


def test_a_text_without_vector_is_told(tmp_path: Path) -> None:
    with StoredTeacher.open(write(tmp_path), write_texts(tmp_path), tmp_path / "cache") as teacher:
        with pytest.raises(GembError) as caught:
            teacher.vectors(batch(["one", "five"], 1))
    assert str(caught.value) == (
        f"{tmp_path / 'vectors.npy'} has no vector of the passage 'five' of nice; "
        "embed that text, too, or name a model as the teacher"
    )


def test_a_vector_that_is_none_is_told(tmp_path: Path) -> None:
    vectors = VECTORS.copy()
    vectors[1, 1] = np.nan
    path = write(tmp_path, vectors=vectors)
    with StoredTeacher.open(path, write_texts(tmp_path), tmp_path / "cache") as teacher:
        assert teacher.of(["one"], ["query"], "nice").shape == (1, 3)
        with pytest.raises(MismatchError) as caught:
            teacher.of(["one", "two"], ["query"] * 2, "nice")
    assert str(caught.value) == (
        f"{path}: the vector of row 1 (from 0) is not finite or all zeros; embed its text again"
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "x", "text": "one"}],
         "no id of {texts} is among those of {vectors}; the vectors belong to other texts"),
        ([{"id": "d0", "text": "one", "role": "both"}],
         '{texts}:1: "role" is \'both\', not query or passage'),
        ([{"id": "d0", "text": " "}], "{texts}:1: empty text"),
    ],
)  # fmt: skip
def test_texts_that_do_not_fit_are_told(tmp_path: Path, rows: list[dict[str, str]], message: str) -> None:
    vectors, texts = write(tmp_path), write_texts(tmp_path, rows)
    with pytest.raises(GembError) as caught:
        StoredTeacher.open(vectors, texts, tmp_path / "cache")
    assert str(caught.value) == message.format(texts=texts, vectors=vectors)


def test_an_id_that_stands_twice_is_told(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "vectors.ids.txt").write_text("d0\nd1\nd1\nd3\n")
    with pytest.raises(GembError) as caught:
        StoredTeacher.open(path, write_texts(tmp_path), tmp_path / "cache")
    assert str(caught.value) == f'{path}: the id "d1" stands there twice'


RECIPE = """model: ./base
data: [{path: pairs.jsonl, prompts: {query: query, passage: document}}]
batch: {pairs: 4}
optimizer: {learning_rate: 3e-3}
steps: 3
precision: fp32
threads: 1
"""


def test_stored_vectors_teach_the_same_student_as_the_model_that_gave_them(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "base", "gemma3")
    tiny_folder(tmp_path / "teacher", "bert", dense=[{"out_features": 96}])
    pairs = [{"query": f"w{row} w5", "positive": f"w{row} w9 w{row + 3}"} for row in range(10, 22)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    encoder = Encoder.load(tmp_path / "teacher", threads=1, precision="fp32")
    rows = [
        {"id": f"{role}{number}", "text": pair[role], "role": {"positive": "passage"}.get(role, role)}
        for role in ("query", "positive")
        for number, pair in enumerate(pairs)
    ]
    asked = [encoder.embed([row["text"]], as_=row["role"].replace("passage", "document")) for row in rows]
    np.save(tmp_path / "vectors.npy", np.concatenate(asked))
    (tmp_path / "vectors.ids.txt").write_text("".join(f"{row['id']}\n" for row in rows))
    write_texts(tmp_path, rows)
    students: list[dict[str, torch.Tensor]] = []
    for teacher in ("{model: ./teacher}", "{vectors: vectors.npy, texts: texts.jsonl}"):
        (tmp_path / "r.yaml").write_text(f"{RECIPE}teacher: {teacher}\n")
        output = tmp_path / f"student{len(students)}"
        run(load(tmp_path / "r.yaml", DistillRecipe, [], {"output": output}))
        students.append(load_file(output / "model.safetensors"))
    assert all(students[0][name].equal(students[1][name]) for name in students[0])
    before = load_file(tmp_path / "base/model.safetensors")
    assert any(not students[0][name].equal(before[name]) for name in before)

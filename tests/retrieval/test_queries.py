"""The model of an index: which, loaded when, refused when."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemb.errors import GembError, MismatchError, UnavailableError
from gemb.model.hub import minilm_folder
from gemb.retrieval.queries import QueryEncoder, check_shared, query_prompt
from gemb.store import Index
from tests.conftest import modules_after
from tests.indexes import embedded, make_films, make_plain, minilm, needs_minilm

pytestmark = needs_minilm
CPU = {"device": "cpu", "precision": "fp32", "threads": 1, "engine": "torch"}


def encoder(index: Path, **settings: object) -> QueryEncoder:
    return QueryEncoder(Index.open(index), **(CPU | settings))  # type: ignore[arg-type]


def test_a_query_has_the_vector_of_the_encoder(tmp_path: Path) -> None:
    asked = encoder(make_films(tmp_path / "films.gemb")).embed(["robots", "a whale"])
    np.testing.assert_array_equal(asked, minilm().embed(["robots", "a whale"], as_="query"))


def prompted(tmp_path: Path) -> Path:
    """MiniLM with prompts."""
    folder = tmp_path / "prompted"
    shutil.copytree(str(minilm_folder()), folder)
    (folder / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "find: ", "sts": "alike: ", "document": ""}}', "utf-8"
    )
    return folder


def test_the_prompt_is_the_one_that_the_index_recorded(tmp_path: Path) -> None:
    from gemb.model.folder import fingerprint, read_folder

    model = prompted(tmp_path)
    about: dict[str, Any] = {"model": str(model), "fingerprint": fingerprint(read_folder(model))}
    for name, text in (("query", "find: "), ("sts", "alike: ")):
        recorded = {"name": name, "text": text}
        index = make_films(tmp_path / f"{name}.gemb", **about, query_prompt=recorded)
        np.testing.assert_array_equal(encoder(index).embed(["a whale"]), embedded([f"{text}a whale"]))
    np.testing.assert_array_equal(encoder(index).embed(["a whale"], as_="none"), embedded(["a whale"]))
    unknown = make_films(tmp_path / "unknown.gemb", **about, query_prompt=None)
    np.testing.assert_array_equal(encoder(unknown).embed(["a whale"]), embedded(["find: a whale"]))
    with pytest.raises(MismatchError, match="the model has no prompt 'nosuch'; it has query, sts, document"):
        encoder(index).embed(["a whale"], as_="nosuch")


def test_an_index_without_a_record_asks_for_the_models_own_prompt() -> None:
    assert query_prompt({}) == "query"


def test_nothing_is_loaded_before_the_first_text(tmp_path: Path) -> None:
    index = make_films(tmp_path / "films.gemb")
    loaded = modules_after(
        "import sys\nfrom gemb import Index\nwith Index.open(sys.argv[1]) as index:\n"
        "    assert index.search('whale', lexical=True)[0].id == 'whale'\n"
        "    assert len(index.like('whale')) == 4",
        arguments=[str(index)],
    )
    assert loaded & {"torch", "transformers", "tokenizers", "pyarrow", "usearch", "rich"} == set()


def test_another_model_and_no_model_are_told(tmp_path: Path) -> None:
    index = make_films(tmp_path / "films.gemb")
    with pytest.raises(MismatchError, match=r"films\.gemb holds vectors of minilm \(\w{12}\), but .* is"):
        encoder(index, model=str(prompted(tmp_path))).embed(["a whale"])
    gone = make_films(tmp_path / "gone.gemb", model=str(tmp_path / "nowhere"))
    with pytest.raises(UnavailableError, match=r"gone\.gemb was made by .*nowhere"):
        encoder(gone).embed(["a whale"])
    # The same model in another place is the same model.
    assert encoder(gone, model=str(minilm_folder())).embed(["a whale"]).shape == (1, 384)


def test_ready_vectors_take_a_model_that_is_named_and_fits(tmp_path: Path) -> None:
    plain = make_plain(tmp_path / "plain.gemb", embedded(["a whale", "a rat"]))
    with pytest.raises(GembError, match=r"plain\.gemb has vectors without a model"):
        encoder(plain).embed(["a whale"])
    assert encoder(plain, model="minilm").embed(["a whale"]).shape == (1, 384)
    narrow = make_plain(tmp_path / "narrow.gemb", np.eye(4, dtype=np.float32))
    with pytest.raises(MismatchError) as caught:
        encoder(narrow, model="minilm").embed(["a whale"])
    assert str(caught.value) == (
        f"{narrow} holds 4-wide vectors, but those of minilm are 384 wide; "
        "search with the model that made them"
    )


@pytest.mark.parametrize(("text", "message"), [
    ("", "the query is empty; ask for something"),
    (" \n", "the query is empty; ask for something"),
    ("a\ud800", "the query is not UTF-8 text (character 1)"),
])  # fmt: skip
def test_a_query_with_nothing_in_it_is_refused(tmp_path: Path, text: str, message: str) -> None:
    asked = encoder(make_plain(tmp_path / "plain.gemb", np.eye(4, dtype=np.float32)))
    with pytest.raises(GembError) as caught:
        asked.embed([text])
    assert str(caught.value) == message
    with pytest.raises(GembError, match=f"^{message.replace('the query', 'query 1').replace('(', '.')[:20]}"):
        asked.embed(["good", text])


def test_indexes_are_searched_together_only_where_one_vector_fits_all(tmp_path: Path) -> None:
    films, again = make_films(tmp_path / "films.gemb"), make_films(tmp_path / "again.gemb", model="elsewhere")
    check_shared([Index.open(films), Index.open(again)])
    other = make_films(tmp_path / "other.gemb", fingerprint="0" * 64, model="other")
    with pytest.raises(MismatchError) as caught:
        check_shared([Index.open(films), Index.open(again), Index.open(other)])
    made = Index.open(films).encoder["fingerprint"][:12]
    assert str(caught.value) == (
        f"{films} holds vectors of minilm ({made}), and {other} of other (000000000000); "
        "their scores cannot be compared, so search them one by one"
    )
    narrow = make_plain(tmp_path / "narrow.gemb", np.eye(4, dtype=np.float32))
    with pytest.raises(MismatchError) as caught:
        check_shared([Index.open(films), Index.open(narrow)])
    assert (
        str(caught.value)
        == f"{films} holds 384-wide vectors and {narrow} 4-wide ones; search them one by one"
    )
    asking = make_films(tmp_path / "asking.gemb", query_prompt={"name": "sts", "text": ""})
    with pytest.raises(MismatchError) as caught:
        check_shared([Index.open(films), Index.open(asking)])
    assert str(caught.value) == (
        f"{films} has the query prompt 'query' and {asking} 'sts'; search them one by one"
    )

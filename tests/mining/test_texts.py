import json
from pathlib import Path

import pytest

from gemb.errors import GembError
from gemb.mining.texts import PASSAGES, QUERIES, Passage, TextSet, TextWriter, key_of


def write(folder: Path) -> TextSet:
    with TextWriter(folder) as writer:
        writer.add_passage(Passage("the sea is deep", "Sea"))
        writer.add_passage(Passage("The  sea\nis DEEP"))
        writer.add_passage(Passage("what is deep?"))
        writer.add_passage(Passage("", "only a title"))
        writer.add_pair("What is deep?", [Passage("the sea is deep")], [Passage("a puddle")])
        writer.add_pair("what is  deep?", [Passage("the trench")], [])
        writer.add_pair("what is high?", [Passage("the sky")], [])
        writer.finish()
    return TextSet(folder)


def test_texts_that_differ_in_case_and_white_space_are_one(tmp_path: Path) -> None:
    with write(tmp_path) as texts:
        assert (texts.passages, texts.queries) == (7, 2)
        assert texts.query("WHAT is deep?") == 0
        assert texts.passage(texts.passage_number(Passage("the sea is  deep"))) == Passage(
            "The  sea\nis DEEP"
        )
        assert texts.passage(0) == Passage("the sea is deep", "Sea")
        assert texts.passage(3) == Passage("", "only a title")
    assert key_of("Straße ") == key_of("STRASSE")


def test_every_text_has_a_line_with_its_number(tmp_path: Path) -> None:
    write(tmp_path).close()
    lines = [json.loads(line) for line in (tmp_path / PASSAGES).read_text().splitlines()]
    assert [line["id"] for line in lines] == [str(number) for number in range(7)]
    assert lines[0] == {"id": "0", "text": "the sea is deep", "title": "Sea"}
    assert len((tmp_path / QUERIES).read_text().splitlines()) == 2


def test_positives_of_all_rows_their_duplicates_and_the_query_are_forbidden(tmp_path: Path) -> None:
    with write(tmp_path) as texts:
        found = {texts.passage(number).text for number in texts.forbidden(0)}
        # 0 and 1 have the text of a positive, with and without a title; 2 that of the query
        assert found == {"the sea is deep", "The  sea\nis DEEP", "what is deep?", "the trench"}
        assert texts.forbidden(0, [Passage("a puddle")]) - texts.forbidden(0) == {
            texts.passage_number(Passage("a puddle"))
        }
        assert {texts.passage(number).text for number in texts.forbidden(1)} == {"the sky"}


def test_a_title_without_text_is_no_duplicate_of_another(tmp_path: Path) -> None:
    with TextWriter(tmp_path) as writer:
        writer.add_passage(Passage("", "one"))
        writer.add_pair("q", [Passage("", "two")], [])
        writer.finish()
    with TextSet(tmp_path) as texts:
        assert texts.forbidden(0) == {1}


def test_a_writer_that_was_cut_off_does_not_count_and_is_begun_anew(tmp_path: Path) -> None:
    with TextWriter(tmp_path) as writer:
        writer.add_passage(Passage("left behind"))
    assert not TextSet.is_whole(tmp_path)
    with write(tmp_path) as texts:
        assert texts.passages == 7
    assert TextSet.is_whole(tmp_path)


def test_an_unknown_text_is_told(tmp_path: Path) -> None:
    with write(tmp_path) as texts, pytest.raises(GembError) as caught:
        texts.query("never seen")
    assert str(caught.value) == (
        f"{tmp_path}: the text 'never seen' is not among the queries collected; "
        f"remove {tmp_path} to start anew"
    )

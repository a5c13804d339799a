"""The part of a text that is shown: which sentence, how it is cut, and what is marked as left out."""

import pytest

from gemb.retrieval.excerpts import excerpt

TEXT = (
    "The harbour is old. Ships come from all over the world. In the north there are two lighthouses, and "
    "one of them was built by a blacksmith. Nobody knows why. The market opens at six in the morning."
)


def test_a_short_text_is_whole_and_on_one_line() -> None:
    assert excerpt("  several\n\nlines  ", "anything", 40) == "several lines"


def test_the_sentence_with_the_words_of_the_query_is_shown() -> None:
    assert excerpt(TEXT, "who built the lighthouse?", 90) == (
        "… In the north there are two lighthouses, and one of them was built by a blacksmith. …"
    )


def test_long_words_say_more_than_small_ones() -> None:
    # "It is in the north of" has four words of the query, the other sentence has one.
    text = "It is in the north of the land, they say. " + "Filler words stand here. " * 5 + "A market opens."
    assert "market" in excerpt(text, "is it in the market", 40)


def test_a_word_is_found_in_its_other_forms() -> None:
    assert "Ships come" in excerpt(TEXT, "SHIPPED shipping ship ships", 60)
    assert "blacksmith" in excerpt(TEXT, "blacksmiths", 60)


def test_without_a_shared_word_it_is_the_beginning() -> None:
    shown = excerpt(TEXT, "zebra", 40)
    assert shown == "The harbour is old. Ships come from …"
    assert excerpt(TEXT, "", 40) == shown


def test_of_equal_sentences_the_first_is_shown() -> None:
    text = "A red apple falls. " + "Filler words stand here for a while. " * 5 + "A red apple rolls."
    assert excerpt(text, "apple", 40).startswith("A red apple falls.")


def test_a_word_far_into_a_long_sentence_is_seen() -> None:
    text = "and so on " * 60 + "until the comet came back " + "and so on " * 60
    assert "comet" in excerpt(text, "comet", 80)


@pytest.mark.parametrize("characters", [20, 33, 60, 100, 160, len(TEXT) - 1, len(TEXT)])
@pytest.mark.parametrize("query", ["", "harbour", "lighthouse", "morning", "blacksmith market"])
def test_it_is_never_longer_than_asked_and_ends_at_words(characters: int, query: str) -> None:
    shown = excerpt(TEXT, query, characters)
    assert len(shown) <= characters
    words = shown.removeprefix("… ").removesuffix(" …")
    assert f" {words} " in f" {TEXT} "
    assert shown.startswith("… ") != TEXT.startswith(words)
    assert shown.endswith(" …") != TEXT.endswith(words)


def test_a_text_without_blanks_is_cut_too() -> None:
    text = "東京は日本の首都である。" * 20
    shown = excerpt(text, "首都", 50)
    assert len(shown) <= 50
    assert shown.endswith("…")

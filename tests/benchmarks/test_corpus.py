from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import corpus
from benchmarks.corpus import Corpus, Sample, sample
from gemb.errors import GembError

WHOLE = Corpus("docs", "here", tuple("x" * length for length in range(1, 401)))


def characters(texts: Sequence[str]) -> list[int]:
    return [len(text) for text in texts]


@pytest.fixture
def no_shared_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SHARED_DATA", tmp_path)


def test_a_sample_is_windows_of_neighbours_one_from_each_part() -> None:
    lengths = sorted(sample(WHOLE, 40, 10, characters).lengths)
    windows = [lengths[start : start + 10] for start in range(0, 40, 10)]
    assert all(window == list(range(window[0], window[0] + 10)) for window in windows)
    assert [window[0] // 100 for window in windows] == [0, 1, 2, 3]


def test_an_odd_window_is_not_taken() -> None:
    # One text of 10,000 tokens in the middle of each part: a sample by position would pad to it.
    def odd(texts: Sequence[str]) -> list[int]:
        return [10_000 if len(text) % 100 == 50 else len(text) for text in texts]

    assert max(sample(WHOLE, 40, 10, odd).lengths) < 10_000


def test_a_sample_is_the_same_every_time_and_shuffled() -> None:
    first, second = sample(WHOLE, 40, 10, characters), sample(WHOLE, 40, 10, characters)
    assert first == second
    assert list(first.lengths) != sorted(first.lengths)


def test_padding_is_counted_over_batches_sorted_by_characters() -> None:
    # By characters: ddd ccc | bb a, with 5 2 | 1 1 tokens: 2 x 5 + 2 x 1 computed, 9 real.
    texts = Sample("docs", "here", ("a", "bb", "ccc", "ddd"), (1, 1, 2, 5), 1.0)
    assert texts.padding(2) == pytest.approx(12 / 9)
    assert texts.padding(1) == 1.0


def test_texts_must_fill_their_windows() -> None:
    with pytest.raises(GembError, match=r"^50 texts are not a multiple of windows of 32; try --texts 32$"):
        sample(WHOLE, 50, 32, characters)


def test_a_small_corpus_is_refused() -> None:
    message = r"^corpus docs has 400 texts but 416 are asked for; use fewer --texts$"
    with pytest.raises(GembError, match=message):
        sample(WHOLE, 416, 32, characters)


def test_an_unknown_corpus_names_the_choices() -> None:
    with pytest.raises(GembError, match=r"^no corpus 'books'; choose from docs, prose, queries, uniform$"):
        corpus.corpus("books")


@pytest.mark.usefixtures("no_shared_data")
@pytest.mark.parametrize("name", corpus.NAMES)
def test_without_the_shared_data_the_standard_library_gives_the_texts(name: str) -> None:
    found = corpus.corpus(name)
    assert found.origin.startswith("Python 3.")
    assert len(found.texts) > 500
    assert list(found.texts) == sorted(found.texts, key=lambda text: (len(text), text))
    assert all(text.strip() for text in found.texts)


@pytest.mark.usefixtures("no_shared_data")
def test_passages_have_the_promised_lengths() -> None:
    lengths = sorted(map(len, corpus.corpus("docs").texts))
    # Cutting at white space and the ends of documents move the median; the bars speak of "about".
    assert 0.7 < lengths[len(lengths) // 2] / corpus.MEDIAN_CHARACTERS < 1.3
    assert lengths[-1] <= corpus.LONGEST_CHARACTERS
    assert min(map(len, corpus.corpus("uniform").texts)) > 0.9 * corpus.UNIFORM_CHARACTERS

"""Texts become rows, each once an epoch, in an order and at places that come back after a kill."""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemb.errors import GembError
from gemb.training import pretrain_documents
from gemb.training.pretrain_documents import Piece, RowStream
from tests.training.pretrain_fakes import documents, texts, tokeniser, write_texts

TEXTS = [*texts(40), "w1", "w2 " * 48, "w3 " * 33]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that has about ten windows."""
    monkeypatch.setattr(pretrain_documents, "WINDOW_CHARACTERS", 400)
    return write_texts(tmp_path / "texts.jsonl", TEXTS)


def pieces(file: Path, epoch: int = 0, seed: int = 0) -> list[Piece]:
    windows = documents(file, seed=seed).windows(epoch)
    return list(itertools.chain.from_iterable(window.pieces for window in windows))


def test_the_rows_of_an_epoch_put_together_are_the_texts(file: Path) -> None:
    encoded = tokeniser().encode([*TEXTS])
    whole = np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])
    found = sorted(pieces(file), key=lambda piece: (piece.text, piece.number))
    for number, text in enumerate(whole):
        own = [piece for piece in found if piece.text == number]
        if number == 40:  # a single token has nothing to predict from
            assert own == []
            continue
        assert np.concatenate([piece.ids for piece in own]).tolist() == text[1:].tolist()  # without <bos>
        assert [piece.number for piece in own] == list(range(len(own)))
        assert [piece.ends for piece in own] == [False] * (len(own) - 1) + [True]
        assert all(len(piece.ids) == 16 for piece in own[:-2])
        assert all(2 <= len(piece.ids) <= 16 for piece in own)


def test_the_order_follows_from_seed_and_epoch(file: Path) -> None:
    orders = [
        [(piece.text, piece.number) for piece in pieces(file, epoch, seed)]
        for epoch, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != orders[3]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(orders[3])
    assert orders[0] != sorted(orders[0])


def groups(file: Path, count: int, position: Any = None) -> list[tuple[Any, ...]]:  # noqa: ANN401
    """(tokens, rows, position) of some groups."""
    stream = RowStream(documents(file), 50, position)
    return [
        (tokens, [(epoch, piece.text, piece.number) for epoch, piece in group], after)
        for tokens, group, after in itertools.islice(stream.groups(), count)
    ]


def test_a_stream_that_is_opened_again_anywhere_goes_on_as_before(file: Path) -> None:
    whole = groups(file, 60)  # over two epochs
    assert {row[0] for _, rows, _ in whole for row in rows} == {0, 1, 2}
    for done in (1, 2, 17, 30, 59):
        again = groups(file, 60 - done, whole[done - 1][2])
        assert again == whole[done:]  # rows, places and counts


def test_a_group_holds_no_more_tokens_than_asked_for(file: Path) -> None:
    for tokens, rows, _ in groups(file, 40):
        assert tokens <= 50
        assert rows


def test_what_was_read_is_counted_once_an_epoch(file: Path) -> None:
    first = pieces(file)
    epochs = [(after["place"]["epoch"], after["counts"]) for _, _, after in groups(file, 60)]
    counts = [own for epoch, own in epochs if epoch == 0][-1]  # the last window is counted by then
    assert (counts["texts"], counts["short"], counts["rows"]) == (len(TEXTS), 1, len(first))
    counts = [own for epoch, own in epochs if epoch == 1][-1]
    assert (counts["texts"], counts["rows"]) == (2 * len(TEXTS), 2 * len(first))
    assert documents(file).tokens(file.with_name("tokens.json")) == sum(len(one.ids) for one in first)


def test_the_beginnings_are_the_first_rows_of_the_first_texts(file: Path) -> None:
    found = documents(file).beginnings(7)
    assert [piece.text for piece in found] == list(range(7))
    assert {piece.number for piece in found} == {0}


def test_empty_and_broken_rows_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "w1 w2"}\n{"text": "  "}\n{"txt": "w1"}\n', encoding="utf-8")
    made = documents(file)
    (window,) = made.windows(0)
    assert window.counts.texts == 1
    assert window.counts.rejected == 2
    assert made.first_reject == f"{file}:2: empty text"


def test_texts_without_two_tokens_are_an_error(tmp_path: Path) -> None:
    file = write_texts(tmp_path / "texts.jsonl", ["w1", "", "w2"])
    with pytest.raises(GembError) as error:
        next(RowStream(documents(file), 50, None).groups())
    assert str(error.value) == (
        f"{file}: no text of 2 tokens or more; the first row left out is {file}:2: empty text"
    )
    write_texts(file, ["w1"])
    with pytest.raises(GembError, match=re.escape(f"{file}: no text of 2 tokens or more") + "$"):
        next(RowStream(documents(file), 50, None).groups())

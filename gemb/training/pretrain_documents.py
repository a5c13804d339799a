"""Texts as token rows for pretraining: read in windows, cut to rows, shuffled within each window, resumable.

A window is as many texts as have four million characters; memory does not depend on the files. What a window
holds, and in which order, depends on the files, the seed and the epoch only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.files import read_json, write_json
from gemb.text.inputs import InputFile
from gemb.text.records import ReadOptions, Record, Reject, read_records
from gemb.text.tokenisation import Tokeniser
from gemb.training.permutation import Permutation, key_of

WINDOW_CHARACTERS = 1 << 22
WINDOW_TEXTS = 1 << 14
LEAST_TOKENS = 2
"""A shorter text has nothing to predict from; it is counted and left out."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a text that fits a row."""

    ids: NDArray[np.int32]
    """At least two tokens, special ones left out."""
    text: int
    """The number of its text in all the files, rejected ones counted."""
    number: int
    """Which part of the text it is, from 0."""
    ends: bool
    """Whether the text ends with it."""


@dataclass(slots=True)
class TextCounts:
    """What was read so far, over all epochs."""

    texts: int = 0
    rejected: int = 0
    """Empty texts, and rows that cannot be read."""
    short: int = 0
    """Texts of less than two tokens, left out."""
    rows: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Place:
    """Where a stream stands: so many rows of the window that begins at a text of an epoch are given."""

    epoch: int = 0
    text: int = 0
    rows: int = 0
    is_counted: bool = False
    """Whether the window is among what was counted."""


@dataclass(frozen=True, slots=True)
class Window:
    """The rows of some texts, shuffled."""

    pieces: Sequence[Piece]
    next_text: int
    """Where the next window begins."""
    counts: TextCounts
    """Of this window."""


class Documents:
    """The texts of some files. Not thread-safe, as its tokeniser is not."""

    def __init__(
        self,
        files: Sequence[InputFile],
        tokeniser: Tokeniser,
        row_tokens: int,
        *,
        text_field: str | None = None,
        seed: int = 0,
    ) -> None:
        """Rows of at most `row_tokens` tokens; `tokeniser` cuts nothing."""
        self.files = tuple(files)
        self.row_tokens = row_tokens
        self._tokeniser = tokeniser
        self._before, self._after = (len(part) for part in tokeniser.frame)
        self._text_field = text_field
        self._seed = seed
        self.first_reject: str | None = None

    def windows(self, epoch: int, text: int = 0) -> Iterator[Window]:
        """The windows of an epoch from one that begins at `text` on.

        Raises GembError as `read_records` does.
        """
        options = ReadOptions(text_field=self._text_field, use_titles=False, start=text)
        texts: list[Record] = []
        counts, characters, begin = TextCounts(), 0, text
        rows = read_records(self.files, options)
        for row in rows:
            if isinstance(row, Reject):
                counts.rejected += 1
                self.first_reject = self.first_reject or str(row)
            else:
                texts.append(row)
                characters += len(row.text)
            text = row.index + 1
            if characters >= WINDOW_CHARACTERS or len(texts) >= WINDOW_TEXTS:
                yield self._window(texts, epoch, begin, text, counts)
                texts, counts, characters, begin = [], TextCounts(), 0, text
        yield self._window(texts, epoch, begin, text, counts)

    def beginnings(self, limit: int) -> list[Piece]:
        """The first row of each of the first `limit` texts, in their order."""
        found: list[Piece] = []
        for window in self.windows(0):
            found += [piece for piece in window.pieces if piece.number == 0]
            if len(found) >= limit:
                break
        return sorted(found, key=lambda piece: piece.text)[:limit]

    def tokens(self, cache: Path) -> int:
        """Tokens of one epoch, counted once and kept in the file `cache`."""
        if cache.is_file():
            return int(read_json(cache)["tokens"])
        total = sum(window.counts.tokens for window in self.windows(0))
        write_json(cache, {"tokens": total})
        return total

    def _window(
        self, texts: Sequence[Record], epoch: int, begin: int, end: int, counts: TextCounts
    ) -> Window:
        pieces: list[Piece] = []
        encoded = self._tokeniser.encode([one.text for one in texts])
        edges = np.concatenate(([0], np.cumsum(encoded.lengths, dtype=np.int64)))
        for one, start, stop in zip(texts, edges[:-1], edges[1:], strict=True):
            body = encoded.ids[start + self._before : stop - self._after]
            if len(body) < LEAST_TOKENS:
                counts.short += 1
                continue
            cuts = [*range(self.row_tokens, len(body), self.row_tokens)]
            if cuts and len(body) - cuts[-1] < LEAST_TOKENS:
                cuts[-1] = len(body) - LEAST_TOKENS  # the last row is long enough, too
            for number, ids in enumerate(np.split(body, cuts)):
                pieces.append(Piece(ids, one.index, number, number == len(cuts)))
        counts.texts = len(texts)
        counts.rows = len(pieces)
        counts.tokens = sum(len(piece.ids) for piece in pieces)
        if pieces:
            order = Permutation(len(pieces), key_of("window", self._seed, epoch, begin))
            pieces = [pieces[place] for place in order.at(np.arange(len(pieces)))]
        return Window(pieces, end, counts)


class RowStream:
    """Groups of rows of at most so many tokens, epoch after epoch, from a place on.

    `position` is the place after the last group given, and what was counted until there.
    """

    def __init__(self, documents: Documents, budget_tokens: int, position: Mapping[str, Any] | None) -> None:
        self._documents = documents
        self._budget = budget_tokens
        self._place = Place(**position["place"]) if position else Place()
        self._counts = TextCounts(**position["counts"]) if position else TextCounts()

    def groups(self) -> Iterator[tuple[int, list[tuple[int, Piece]], dict[str, Any]]]:
        """(tokens, (epoch, row) of each row, position after it); a longer row is a group of its own.

        Raises GembError if an epoch has no row.
        """
        group: list[tuple[int, Piece]] = []
        tokens = 0
        place = self._place
        while True:
            for window in self._documents.windows(place.epoch, place.text):
                if not place.is_counted:
                    self._count(window.counts)
                    place.is_counted = True
                for piece in window.pieces[place.rows :]:
                    if group and tokens + len(piece.ids) > self._budget:
                        yield tokens, group, self._position()
                        group, tokens = [], 0
                    group.append((place.epoch, piece))
                    tokens += len(piece.ids)
                    place.rows += 1
                place.text, place.rows, place.is_counted = window.next_text, 0, False
            if self._counts.rows == 0:
                names = ", ".join(file.name for file in self._documents.files)
                why = self._documents.first_reject
                raise GembError(
                    f"{names}: no text of {LEAST_TOKENS} tokens or more"
                    + (f"; the first row left out is {why}" if why else "")
                )
            place.epoch, place.text = place.epoch + 1, 0

    def _count(self, counts: TextCounts) -> None:
        total = self._counts
        total.texts += counts.texts
        total.rejected += counts.rejected
        total.short += counts.short
        total.rows += counts.rows
        total.tokens += counts.tokens

    def _position(self) -> dict[str, Any]:
        """Its copy, as JSON values."""
        return {"place": asdict(self._place), "counts": asdict(self._counts)}

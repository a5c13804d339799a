"""Examples of one data set in a random order without end, and batches of them that share no text.

Draw number d is row `order(d mod n)` of epoch d // n; each epoch has an order of its own, over all n rows.
What a draw is depends on the seed, the name of the data set and d alone, so that a position is one number.
"""

from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import chain
from struct import unpack
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.training.columns import Example, Text
from gemb.training.data_recipe import DataSet
from gemb.training.examples import Rows
from gemb.training.permutation import Permutation, key_of, random64, scattered32

_AHEAD = 256  # places of the order that are computed at once
_SPARE_BATCHES = 4  # batches of examples that may wait for one in which they repeat nothing
_HOPELESS_EPOCHS = 100  # one good batch an epoch is enough, and by chance an epoch of a few rows has none
_TRIES = 16  # at finding a partner with another text; then the label's own second text is taken


class Draw(NamedTuple):
    """One example as it goes into a batch."""

    number: int
    row: int
    texts: tuple[Text, ...]
    """Query, positive and hard negatives; of a scored pair the first and the second text."""
    hashes: tuple[int, ...]
    """Of the texts, without prompts: 64 bits, signed."""
    score: float

    @property
    def negatives(self) -> tuple[Text, ...]:
        """Its hard negatives."""
        return self.texts[2:]


@dataclass(slots=True)
class DrawState:
    """Where the draws of a data set are."""

    drawn: int = 0
    """The next fresh draw."""
    waiting: tuple[int, ...] = ()
    """Draws before it that are still to be used, oldest first."""
    repeated: int = 0
    """Examples so far that had to go into a batch in which they repeat a text."""
    without_negatives: int = 0
    """Batches left out so far because all of their examples repeat one text."""


class Draws:
    """The batches of one data set; `size` examples each."""

    def __init__(
        self,
        rows: Rows,
        data: DataSet,
        *,
        seed: int,
        size: int,
        no_duplicates: bool,
        needs_negatives: bool,
        state: DrawState,
    ) -> None:
        self._rows = rows
        self._data = data
        self._size = size
        self._no_duplicates = no_duplicates and rows.shape != "scored"
        self._needs_negatives = needs_negatives and rows.shape != "scored"
        self._key = key_of("draws", seed, rows.name)
        self._order = lru_cache(maxsize=2)(self._order_of)
        self._places = lru_cache(maxsize=8)(self._places_of)
        self._drawn = state.drawn
        self._waiting = deque(self.draw(number) for number in state.waiting)
        self._repeated = state.repeated
        self._without_negatives = state.without_negatives

    @property
    def state(self) -> DrawState:
        """The state after the last batch."""
        waiting = tuple(draw.number for draw in self._waiting)
        return DrawState(self._drawn, waiting, self._repeated, self._without_negatives)

    def batch(self) -> list[Draw]:
        """The next `size` examples.

        Raises GembError if for many epochs no batch has anything to tell a positive from.
        """
        for _ in range(_HOPELESS_EPOCHS * (self._rows.size // self._size + 1)):
            batch, repeated = self._next()
            if not self._needs_negatives or _has_negatives(batch):
                self._repeated += repeated
                return batch
            self._without_negatives += 1
        raise GembError(
            f"{self._rows.name}: for {_HOPELESS_EPOCHS} epochs the examples of each batch repeated one text, "
            "so that there was nothing to tell a positive from; add other rows, or hard negatives"
        )

    def draw(self, number: int) -> Draw:
        """Draw number `number`."""
        epoch, place = divmod(number, self._rows.size)
        block, offset = divmod(place, _AHEAD)
        row = int(self._places(epoch, block)[offset])
        example = self._rows.example(row)
        if example.label is not None:
            texts = self._partners(number, row, example)
        else:
            positive = example.positives[(epoch + row) % len(example.positives)]
            negatives = _in_turn(example.negatives, self._data.negatives, epoch + row)
            texts = (example.query, positive, *negatives)
        return Draw(number, row, texts, tuple(map(text_hash, texts)), example.score or 0.0)

    def _order_of(self, epoch: int) -> Permutation:
        return Permutation(self._rows.size, random64(self._key, epoch))

    def _places_of(self, epoch: int, block: int) -> NDArray[np.int64]:
        last = min((block + 1) * _AHEAD, self._rows.size)
        return self._order(epoch).at(np.arange(block * _AHEAD, last))

    def _next(self) -> tuple[list[Draw], int]:
        """`size` examples, no two of which share a text as far as that is possible, and how many do.

        An example that repeats a text waits for the next batch. At most four batches of them may wait; then,
        or after so many fresh draws, the oldest fill the batch, and are counted. So a batch costs a bounded
        number of draws, whatever the data hold.
        """
        batch: list[Draw] = []
        texts = _Texts()
        repeats: list[Draw] = []
        candidates = self._waiting
        fresh = _SPARE_BATCHES * self._size
        while len(batch) < self._size:
            if candidates:
                draw = candidates.popleft()
            elif fresh and len(repeats) < _SPARE_BATCHES * self._size:
                draw = self.draw(self._drawn)
                self._drawn += 1
                fresh -= 1
            else:
                break
            if not self._no_duplicates or texts.take(draw):
                batch.append(draw)
            else:
                repeats.append(draw)
        missing = self._size - len(batch)
        batch += repeats[:missing]
        self._waiting = deque(chain(repeats[missing:], candidates))
        return batch, missing

    def _partners(self, number: int, row: int, example: Example) -> tuple[Text, ...]:
        """A labelled text, another of its label, and some of other labels, as Gecko pairs them.

        With `unique_id` each text carries a mark of the example (Gecko, arXiv 2403.20327), so that the other
        examples of the batch are told apart by it and only positive against own negatives is learned. Gecko
        puts it at the end; here it stands at the beginning, where no truncation takes it away.
        """
        labels = self._rows.prepared.labels
        label = labels[example.label or ""]
        positive = None
        first = random64(self._key, number, 0) % label.count
        for step in range(min(label.count, _TRIES)):
            other = self._rows.in_label_order(label.start + (first + step) % label.count)
            text = self._rows.example(other).query
            if other != row and text != example.query:
                positive = text
                break
        if positive is None:
            one, other_text = (self._rows.example(place).query for place in (label.one, label.other))
            positive = other_text if one == example.query else one
        outside = self._rows.size - label.count
        negatives: dict[Text, None] = {}
        for step in range(self._data.negatives + _TRIES if outside else 0):
            if len(negatives) == self._data.negatives:
                break
            place = random64(self._key, number, 1 + step) % outside
            place += label.count if place >= label.start else 0
            text = self._rows.example(self._rows.in_label_order(place)).query
            if text not in (example.query, positive):
                negatives[text] = None
        texts = (example.query, positive, *negatives)
        if not self._data.unique_id:
            return texts
        mark = scattered32(number % (1 << 32), self._key)  # no two examples of one batch have the same
        return tuple(text._replace(text=f"{mark:08x} {text.text}") for text in texts)


def text_hash(text: Text) -> int:
    """64 bits, signed, of a text and its title; the same on every machine."""
    digest = blake2b(text.joined().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int(unpack("<q", digest)[0])


class _Texts:
    """The texts of a batch so far."""

    def __init__(self) -> None:
        self._own: set[int] = set()
        self._negatives: set[int] = set()

    def take(self, draw: Draw) -> bool:
        """True if the example repeats no text of another; it then belongs to the batch.

        A hard negative may be that of several examples, but nobody's query or positive.
        """
        own, negatives = draw.hashes[:2], draw.hashes[2:]
        if not (self._own.isdisjoint(draw.hashes) and self._negatives.isdisjoint(own)):
            return False
        self._own.update(own)
        self._negatives.update(negatives)
        return True


def _has_negatives(batch: list[Draw]) -> bool:
    """True if some query of the batch has something to tell its positive from."""
    if any(draw.negatives for draw in batch):
        return True
    queries, positives = ({draw.hashes[place] for draw in batch} for place in (0, 1))
    return len(queries) > 1 and len(positives) > 1


def _in_turn(texts: tuple[Text, ...], count: int, turn: int) -> tuple[Text, ...]:
    """`count` of the texts, beginning where the last turn stopped; all if there are not more."""
    if len(texts) <= count:
        return texts
    first = turn * count
    return tuple(texts[(first + step) % len(texts)] for step in range(count))

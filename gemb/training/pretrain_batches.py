"""Batches of rows for pretraining, made ahead in a thread and resumable to the bit."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemb.engine.ahead import ReadAhead
from gemb.model.trainable.language_model import LanguageBatch
from gemb.text.denoising import NO_TARGET, Row
from gemb.training.pretrain_documents import Documents, RowStream
from gemb.training.pretrain_rows import MadeRow, RowMaker

_AHEAD_BATCHES = 2


@dataclass(frozen=True, slots=True)
class PretrainBatch:
    """The rows of one step."""

    dataset: str
    rows: Sequence[MadeRow]
    tokens: int
    """Of the texts, before anything is taken out or added."""

    @property
    def pairs(self) -> int:
        """How many rows there are."""
        return len(self.rows)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """[R], the tokens that the model reads of each row, on both sides."""
        return np.array([len(one.row.ids) + len(one.row.source) for one in self.rows], np.int32)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max())

    @property
    def targets(self) -> int:
        """Tokens that are to be predicted."""
        return sum(int((one.row.targets != NO_TARGET).sum()) for one in self.rows)

    @property
    def measures(self) -> Mapping[str, object]:
        """What metrics.jsonl says of the batch."""
        return {"rows": len(self.rows), "targets": self.targets}

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> LanguageBatch:
        """Some rows, as the model takes them."""
        return packed([self.rows[row].row for row in rows])

    def for_teacher(self, rows: Sequence[int] | NDArray[np.int64]) -> LanguageBatch:
        """The same rows, as a teacher reads them. Raises ValueError if it cannot."""
        found = [taught for row in rows if (taught := self.rows[row].teacher) is not None]
        if len(found) < len(rows):
            raise ValueError("the rows of this objective are not for a teacher")
        return packed(found)


def packed(rows: Sequence[Row]) -> LanguageBatch:
    """Rows as one batch of a model, in their order."""
    has_source = any(len(row.source) for row in rows)
    return LanguageBatch(
        ids=np.concatenate([row.ids for row in rows]),
        lengths=np.array([len(row.ids) for row in rows], np.int32),
        targets=np.concatenate([row.targets for row in rows]),
        source_ids=np.concatenate([row.source for row in rows]),
        source_lengths=np.array([len(row.source) for row in rows] if has_source else [], np.int32),
    )


class PretrainBatches:
    """The stream of batches from `position` on."""

    def __init__(
        self,
        documents: Documents,
        maker: RowMaker,
        *,
        dataset: str,
        tokens: int,
        seed: int,
        position: Mapping[str, Any] | None = None,
    ) -> None:
        self.position: Any = position
        self._stream = RowStream(documents, tokens, position)
        self._maker = maker
        self._dataset = dataset
        self._seed = seed
        self._stop = threading.Event()

    def __iter__(self) -> Iterator[PretrainBatch]:
        """The batches that are left, without an end; one iteration at a time."""
        ahead = ReadAhead(self._made(), depth=_AHEAD_BATCHES, stop=self._stop, name="gemb-batches")
        try:
            for batch, position in ahead:
                self.position = position
                yield batch
        finally:
            ahead.close()

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._stop.set()

    def _made(self) -> Iterator[tuple[PretrainBatch, dict[str, Any]]]:
        for tokens, group, position in self._stream.groups():
            rows = [self._maker.of(piece, self._seed, epoch) for epoch, piece in group]
            yield PretrainBatch(self._dataset, rows, tokens), position

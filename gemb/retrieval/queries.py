"""The model of an index, for its queries: checked against the index, loaded when the first text comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError, MismatchError
from gemb.retrieval.index_model import find_encoder, shown_model
from gemb.store import Index as StoredIndex
from gemb.text.prompts import QUERY, Prompts

if TYPE_CHECKING:
    from gemb.engine.encoder import Encoder
    from gemb.engine.opening import EngineName

SPECIAL_TOKENS = 4
"""More than any model sets around a text."""


class QueryEncoder:
    """What makes vectors of queries for one index, and for all others that `check_shared` lets pass.

    Nothing is looked up or loaded before the first text is to be embedded. Safe to use from several
    threads, which take turns.
    """

    def __init__(
        self,
        index: StoredIndex,
        *,
        model: str | None = None,
        device: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        batch_tokens: int | None = None,
        offline: bool = False,
        engine: EngineName = "auto",
        few_texts: bool = True,
        announce: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._path = index.folder
        self._dims = index.settings.dims
        self._record = index.encoder
        self._model = model
        self._device = device
        self._precision = precision
        self._threads = threads
        self._batch_tokens = batch_tokens
        self._offline = offline
        self._engine = engine
        self._few_texts = few_texts
        self._announce = announce
        self._turn = threading.Lock()
        self._encoder: Encoder | None = None

    def embed(self, texts: Sequence[str], *, as_: str | None = None) -> NDArray[np.float32]:
        """The vectors [Q, D] of Q queries, as wide as those of the index.

        `as_` names the prompt; None is the one that the index has recorded for queries.

        Raises GembError for an empty text and for an index without a model; MismatchError (5) for another
        model than the index's and for an unknown prompt; UnavailableError (7) if the model cannot be had.
        """
        for number, text in enumerate(texts):
            check_query(text, "the query" if len(texts) == 1 else f"query {number}")
        with self._turn:
            encoder = self._loaded()
            return encoder.embed(texts, as_=as_ or query_prompt(self._record), dims=self._dims)

    def lost_tokens(self, texts: Sequence[str], *, as_: str | None = None) -> list[int]:
        """About how many tokens of each text `embed` cuts away because the model takes no more.

        Costs nothing for texts that have, with their prompt, fewer bytes than the model takes tokens.
        """
        with self._turn:
            folder = self._loaded().folder
        template = Prompts(folder.prompts, folder.default_prompt).template(as_ or query_prompt(self._record))
        rendered = [template.render(text, None) for text in texts]
        lost = [0] * len(texts)
        # No token is shorter than a byte; a character can be several tokens.
        long = [
            place
            for place, text in enumerate(rendered)
            if len(text.encode()) + SPECIAL_TOKENS > folder.max_tokens
        ]
        if long:
            from gemb.engine.encoder import load_tokeniser

            encoded = load_tokeniser(folder).encode([rendered[place] for place in long])
            for place, count in zip(long, encoded.lost.tolist(), strict=True):
                lost[place] = count
        return lost

    def load(self) -> None:
        """Loads the model now, instead of when the first text comes."""
        with self._turn:
            self._loaded()

    def close(self) -> None:
        """Lets go of the model, if it was loaded."""
        with self._turn:
            if self._encoder is not None:
                self._encoder.close()
                self._encoder = None

    def _loaded(self) -> Encoder:
        if self._encoder is None:
            folder = find_encoder(
                self._path, self._record, self._model, offline=self._offline, announce=self._announce
            )
            # Without a record nothing says that the model was trained to be cut.
            if folder.dims < self._dims or (not self._record and folder.dims != self._dims):
                raise MismatchError(
                    f"{self._path} holds {self._dims}-wide vectors, but those of {self._model} are "
                    f"{folder.dims} wide; search with the model that made them"
                )
            from gemb.engine.encoder import Encoder  # here, because most of what it needs is slow to load

            self._encoder = Encoder.load(
                folder.path,
                device=self._device,
                precision=self._precision,
                threads=self._threads,
                batch_tokens=self._batch_tokens,
                offline=self._offline,
                engine=self._engine,
                few_texts=self._few_texts,
            )
        return self._encoder


def check_query(text: str, name: str = "the query") -> None:
    """Returns if `text` can be searched for. Raises GembError if it is empty, TypeError if it is no text."""
    if not isinstance(text, str):
        raise TypeError(f"{name} is of type {type(text).__name__}, not a text")
    if not text or text.isspace():
        raise GembError(f"{name} is empty; ask for something")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GembError(f"{name} is not UTF-8 text (character {error.start})") from error


def query_prompt(record: Mapping[str, Any]) -> str:
    """The name of the prompt that an index has recorded for its queries; `query` is the model's own."""
    recorded = record.get("query_prompt")
    return str(recorded["name"]) if recorded else QUERY


def check_shared(indexes: Sequence[StoredIndex]) -> None:
    """Returns if one vector of a query can be compared with the rows of all `indexes`.

    Raises MismatchError (5) that names two indexes of different models or widths.
    """
    first, *others = indexes
    for other in others:
        if other.settings.dims != first.settings.dims:
            raise MismatchError(
                f"{first.folder} holds {first.settings.dims}-wide vectors and {other.folder} "
                f"{other.settings.dims}-wide ones; search them one by one"
            )
        if other.encoder.get("fingerprint") != first.encoder.get("fingerprint"):
            raise MismatchError(
                f"{first.folder} holds vectors of {_made_by(first)}, and {other.folder} of "
                f"{_made_by(other)}; their scores cannot be compared, so search them one by one"
            )
        if query_prompt(other.encoder) != query_prompt(first.encoder):
            raise MismatchError(
                f"{first.folder} has the query prompt {query_prompt(first.encoder)!r} and {other.folder} "
                f"{query_prompt(other.encoder)!r}; search them one by one"
            )


def _made_by(index: StoredIndex) -> str:
    return shown_model(index.encoder) if index.encoder else "a model that is not recorded"

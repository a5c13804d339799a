"""What an index keeps of a document, and how it is told whether the document changed."""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from gemb.errors import GembError

Span = tuple[int, int]
"""First character of a passage and the one behind its last, in the document's text."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document: any string as id, text and title (either may be empty), and the rest as metadata."""

    id: str
    text: str = ""
    title: str = ""
    metadata: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hit:
    """A document that was found.

    `score` is the cosine similarity of query and best passage, None where the search had no vector.
    `passage` is that passage's span of the text, None where the document is one passage or the search had
    no vector. `words` is the BM25 score of a search by words, higher is better.
    """

    id: str
    score: float | None
    title: str
    text: str
    metadata: Mapping[str, Any]
    passage: Span | None = None
    words: float | None = None

    @property
    def excerpt(self) -> str:
        """The text of the best passage, or the whole text."""
        return self.text if self.passage is None else self.text[self.passage[0] : self.passage[1]]


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document as it lies in the catalogue, checked against its checksum."""

    key: int
    document: Document
    content: bytes
    rows: int
    spans: tuple[Span, ...] | None


def content_hash(document: Document, vectors: NDArray[np.float32] | None = None) -> bytes:
    """16 bytes of BLAKE2b over what a document's vectors depend on: title and text, or the vectors given."""
    title = encoded(document.title, document.id, "title")
    parts = [len(title).to_bytes(8, "little"), title, encoded(document.text, document.id, "text")]
    if vectors is not None:
        parts = [b"\x01", np.ascontiguousarray(vectors, dtype="<f4").tobytes(), *parts]
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def metadata_json(document: Document) -> str:
    """The metadata as JSON with sorted keys; decimals, as databases export them, are floats.

    Raises GembError where a value cannot be JSON.
    """
    if not document.metadata:
        return "{}"
    try:
        return _dumped(dict(document.metadata)).decode()
    except (orjson.JSONEncodeError, UnicodeDecodeError) as error:
        faults = (_fault(name, value) for name, value in document.metadata.items())
        what = next((fault for fault in faults if fault is not None), str(error))
        raise GembError(f"the metadata of {document.id!r} cannot be stored as JSON: {what}") from error


def _dumped(value: object) -> bytes:
    return orjson.dumps(value, default=_as_float, option=orjson.OPT_SORT_KEYS)


def _as_float(value: object) -> float:
    if isinstance(value, Decimal):
        return float(value)
    raise TypeError


def _fault(name: str, value: object) -> str | None:
    """Why a field cannot be JSON; None if it can."""
    try:
        _dumped({name: value})
    except (orjson.JSONEncodeError, UnicodeDecodeError) as error:
        return f"field {name!r} holds {type(value).__name__}, which JSON cannot ({str(error).lower()})"
    return None


def encoded(text: str, id_: str, what: str) -> bytes:
    """UTF-8 of a text. Raises GembError where it holds half of a surrogate pair, which has no UTF-8."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise GembError(
            f"the {what} of {id_!r} has a lone surrogate at character {error.start}; correct the input"
        ) from error


def checksum(*values: str | bytes | int) -> int:
    """CRC-32 over values and their lengths: what tells that a row of the catalogue is as it was written."""
    parts: list[bytes] = []  # joined, because one call of crc32 costs less than two a value
    for value in values:
        if isinstance(value, int):
            content = value.to_bytes(9, "little", signed=True)
        else:
            content = value.encode() if isinstance(value, str) else value
        parts += (len(content).to_bytes(8, "little"), content)
    return zlib.crc32(b"".join(parts))


def matches(wanted: object, *values: object) -> bool:
    """Whether values of the catalogue have this checksum; a damaged row may hold values of any type."""
    return all(isinstance(value, str | bytes | int) for value in values) and checksum(*values) == wanted  # type: ignore[arg-type]


def spans_json(spans: Sequence[Span] | None) -> str:
    """Spans as the catalogue keeps them; empty for a document that is one passage."""
    return "" if spans is None else orjson.dumps([list(span) for span in spans]).decode()

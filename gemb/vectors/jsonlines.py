"""Vectors as JSON lines: `{"id": ..., "embedding": [...]}`, or the stored row's bytes in base64.

A row that is not float32 says so: `{"id": ..., "dtype": "int8", "embedding": ...}`. Lists hold the
stored numbers (integers for int8 and packed bits), base64 holds them little-endian; with float32
that is what OpenAI's API and `llm` use.
"""

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.vectors.layout import STORED, DType, Layout
from gemb.vectors.quantise import from_bfloat16, to_bfloat16

ID_KEYS = ("id", "_id", "doc_id", "docid", "custom_id")
VECTOR_KEYS = ("embedding", "embeddings", "vector")


def json_lines(ids: Sequence[str], stored: NDArray[Any], layout: Layout) -> bytes:
    """One line a row, each with its newline. `stored`[B, W] is contiguous, as `layout.store` gives it."""
    between = b"" if layout.dtype == "f32" else b',"dtype":"%b"' % layout.dtype.encode()
    parts: list[bytes] = []
    if layout.encoding == "base64":
        for id_, row in zip(ids, stored, strict=True):
            encoded = binascii.b2a_base64(row, newline=False)
            parts += (b'{"id":', json_string(id_), between, b',"embedding":"', encoded, b'"}\n')
    else:
        numbers = from_bfloat16(stored) if layout.dtype == "bf16" else stored
        for id_, row in zip(ids, numbers, strict=True):
            listed = orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)
            parts += (b'{"id":', json_string(id_), between, b',"embedding":', listed, b"}\n")
    return b"".join(parts)


def json_string(text: str) -> bytes:
    """A string as JSON. Raises GembError for a lone surrogate, which no UTF-8 file can hold."""
    try:
        return orjson.dumps(text)
    except orjson.JSONEncodeError as error:
        raise not_utf8(text) from error


def not_utf8(id_: str) -> GembError:
    """The error for an id with a lone surrogate."""
    return GembError(f"id {id_!r} is not valid Unicode and cannot be written as UTF-8; change the id")


def parse_line(line: bytes, place: str) -> tuple[str | None, DType, NDArray[Any]]:
    """The id (None where there is none), type and stored row [W] of a line; `place` is FILE:LINE.

    Raises GembError for anything that is no such line.
    """
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise GembError(f"{place}: not JSON ({error.msg.lower()}); is the file cut off?") from error
    if not isinstance(value, dict):
        raise GembError(f"{place}: a JSON {type(value).__name__}, not an object with id and embedding")
    key = next((key for key in VECTOR_KEYS if key in value), None)
    if key is None:
        raise GembError(f'{place}: no "embedding"; this line has {", ".join(value) or "nothing"}')
    dtype = value.get("dtype", "f32")
    if dtype not in STORED:
        raise GembError(f"{place}: dtype {dtype!r} is none of {', '.join(STORED)}")
    found = next((value[key] for key in ID_KEYS if key in value), None)
    return None if found is None else str(found), dtype, stored_row(value[key], dtype, place)


def stored_row(embedding: object, dtype: DType, place: str) -> NDArray[Any]:
    """The stored row [W] of an "embedding" in either encoding."""
    stored = STORED[dtype]
    try:
        if isinstance(embedding, str):
            return np.frombuffer(base64.b64decode(embedding, validate=True), dtype=stored)
        if not isinstance(embedding, list):
            raise TypeError
        row: NDArray[Any] = np.array(embedding, dtype=np.float32 if dtype == "bf16" else stored)
        if row.ndim != 1:
            raise TypeError
    except (ValueError, TypeError, OverflowError) as error:
        raise GembError(
            f"{place}: the embedding is neither a list of {dtype} numbers nor their base64"
        ) from error
    return to_bfloat16(row) if dtype == "bf16" else row

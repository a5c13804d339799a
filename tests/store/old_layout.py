"""Writes an index as version 0.1.0 did, so that there is one to upgrade."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from gemb.files import file_digest, write_json
from gemb.store import Document
from gemb.vectors import Layout, open_sink

FINGERPRINT = "ab" * 32


def write_old_index(path: Path, documents: Sequence[Document], vectors: NDArray[np.float32]) -> Path:
    """gemb.json, vectors/ and documents.jsonl; vectors[R, D] are brought to unit length."""
    path.mkdir()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    prompt = {"name": "document", "text": "title: none | text: "}
    sink = open_sink(path / "vectors", path / "vectors.partial", Layout(vectors.shape[1], part_rows=400))
    sink.append([document.id for document in documents], unit.astype(np.float32))
    sink.finish()
    sink.close()
    shutil.rmtree(path / "vectors.partial")
    write_json(
        path / "vectors" / "gemb.json",
        {"request": {"model": FINGERPRINT, "prompt": prompt, "settings": {"max-tokens": 256}}},
    )
    lines = [
        orjson.dumps(
            {"id": document.id, "title": document.title, "text": document.text},
            option=orjson.OPT_APPEND_NEWLINE,
        )
        for document in documents
    ]
    (path / "documents.jsonl").write_bytes(b"".join(lines))
    record = {
        "format": "gemb index 1",
        "model": "minilm",
        "fingerprint": FINGERPRINT,
        "prompt": prompt,
        "recipe": {},
        "vectors_manifest": file_digest(path / "vectors" / "manifest.json"),
        "documents": file_digest(path / "documents.jsonl"),
        "rows": len(documents),
        "dims": vectors.shape[1],
    }
    write_json(path / "gemb.json", record)
    return path

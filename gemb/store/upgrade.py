"""An index of an older layout made one of the present format.

Version 0.1.0 of gemb kept an index as a folder of vectors with their documents in a file:

    wiki.gemb/
      gemb.json         {"format": "gemb index 1", model, fingerprint, prompt, rows, dims, checksums}
      vectors/          a folder of gemb embed, rows of unit length, in the order of the documents
      documents.jsonl   id, title and text of each row

It has no number of format, and `PRAGMA user_version` of an index.db counts from 1. The new index is made
beside the old one from what the checksums find whole, with the same vectors in the same type, and verified;
then it takes the old one's place, which is kept under another name.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from gemb.errors import GembError
from gemb.files import Lock, file_digest, os_errors_explained, read_json
from gemb.store import catalogue as catalogues
from gemb.store.blocks import DamagedError
from gemb.store.catalogue import Catalogue, Settings
from gemb.store.documents import Document, StoredDocument, content_hash
from gemb.store.replacement import free_name, put_in_place, settle, settle_missing
from gemb.store.verify import verify_new
from gemb.store.writer import OnStep, Step, Writer
from gemb.vectors import VectorFile, open_vectors
from gemb.vectors.layout import MANIFEST, RECORD

ENDING = "old"
VECTORS, DOCUMENTS = "vectors", "documents.jsonl"
DOCUMENTS_A_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Upgraded:
    """How an upgrade went: the documents there are, and where the old index was put.

    `kept` is None where the index was of the present format already and nothing was done.
    """

    documents: int
    kept: Path | None


def upgrade(folder: Path | str, *, threads: int = 1, on_step: OnStep = lambda step: None) -> Upgraded:
    """Makes the index at `folder` one of the present format; searches go on meanwhile, with the old one.

    Killed at any moment, one of the two is whole at `folder` or, on a drive that cannot exchange two names
    at once, comes there when this is called again.

    Raises UnavailableError (7) if nothing is there, LockedError (6) while a writer is at work, DamagedError
    (1) where the old index is not what was written, MismatchError (5) for a newer one, GembError for none.
    """
    folder = Path(folder)
    fresh = catalogues.replacement_of(folder, "upgrade")
    settle_missing(fresh, folder)
    if not catalogues.is_old_layout(folder):
        catalogues.check_is_index(folder)
    with Lock(folder / catalogues.LOCK, str(folder)) as lock:
        kept = settle(fresh, folder, lambda: free_name(folder, ENDING))
        if not catalogues.is_old_layout(folder):
            return Upgraded(_documents_of(folder), kept)
        try:
            record, vectors = _open_checked(folder)
            with vectors:
                documents = _fill(fresh, folder, record, vectors, threads, on_step)
            verify_new(fresh, documents)
        except GembError:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        kept = free_name(folder, ENDING)
        put_in_place(fresh, folder, kept, lock)
    return Upgraded(documents, kept)


def _documents_of(folder: Path) -> int:
    catalogue = Catalogue.open_for_reading(folder)
    try:
        return catalogue.state().documents
    finally:
        catalogue.close()


def _open_checked(folder: Path) -> tuple[dict[str, Any], VectorFile]:
    """The record and the vectors of an old index, every byte compared with its checksum."""
    record = read_json(folder / RECORD)
    again = "make it anew with gemb index INPUT -o NAME.gemb"
    with os_errors_explained(folder, "read"):
        for name, path in (
            ("vectors_manifest", folder / VECTORS / MANIFEST),
            ("documents", folder / DOCUMENTS),
        ):
            if not path.is_file():
                raise DamagedError(f"{path} is missing; {again}")
            if file_digest(path) != record.get(name):
                raise DamagedError(f"{path} is damaged: its checksum is not the one in {RECORD}; {again}")
        try:
            vectors = open_vectors(folder / VECTORS)
        except GembError as error:
            raise DamagedError(f"{folder} cannot be upgraded: {error}") from error
    missing = [name for name in ("model", "fingerprint", "prompt") if name not in record]
    if missing or (vectors.rows, vectors.dims) != (record.get("rows"), record.get("dims")):
        vectors.close()
        what = f"it has no {missing[0]}" if missing else "its rows and dims are not those of the vectors"
        raise DamagedError(f"{folder / RECORD} is damaged: {what}; {again}")
    return record, vectors


def _fill(
    fresh: Path, folder: Path, record: dict[str, Any], vectors: VectorFile, threads: int, on_step: OnStep
) -> int:
    """Writes the new index and returns how many documents it has."""
    request = read_json(folder / VECTORS / RECORD).get("request", {})
    settings = Settings(
        vectors.dims,
        vectors.dtype,  # that of version 0.1.0 was always f32
        encoder={
            "model": record["model"],
            "fingerprint": record["fingerprint"],
            "document_prompt": record["prompt"],
            "query_prompt": None,
            "model_dims": vectors.dims,  # version 0.1.0 had no way to cut them
            "max_tokens": request.get("settings", {}).get("max-tokens"),
            "passages": "off",
        },
    )
    lines = _documents(folder / DOCUMENTS)
    with Writer.open(fresh, settings, threads=threads, on_step=on_step) as writer:
        for start in range(0, vectors.rows, DOCUMENTS_A_BLOCK):
            stop = min(start + DOCUMENTS_A_BLOCK, vectors.rows)
            documents = list(islice(lines, stop - start))
            if [document.id for document in documents] != vectors.ids(start, stop):
                raise DamagedError(
                    f"{folder} is damaged: {DOCUMENTS} and {VECTORS} are not of the same documents; "
                    "make it anew with gemb index INPUT -o NAME.gemb"
                )
            entries = [StoredDocument(0, document, content_hash(document), 1, None) for document in documents]
            writer.put_stored(entries, vectors.stored(start, stop))
            on_step(Step("copying documents", writer.documents, vectors.rows))
        writer.commit()
        writer.compact()
        return writer.documents


def _documents(path: Path) -> Iterator[Document]:
    with os_errors_explained(path, "read"), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = orjson.loads(line)
                yield Document(entry["id"], entry["text"], entry["title"])
            except (orjson.JSONDecodeError, KeyError, TypeError) as error:
                raise DamagedError(
                    f"{path}:{number}: no document ({error}); make it anew with gemb index INPUT -o NAME.gemb"
                ) from error

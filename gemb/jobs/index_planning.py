"""What a job of `gemb index` would do, for --dry-run: counted and sampled, and nothing written."""

from __future__ import annotations

import time

import numpy as np

from gemb.device import all_devices, pick
from gemb.errors import GembError
from gemb.files import free_bytes, readable_bytes
from gemb.jobs.index_graph import graph_note
from gemb.jobs.index_setup import Encoding, IndexSetup
from gemb.jobs.planning import COUNT_SECONDS, SAMPLE_RECORDS
from gemb.jobs.reporting import shown_prompt
from gemb.report import Plan, counted
from gemb.retrieval.index_model import shown_model
from gemb.store.graph import GraphShape, expected_bytes
from gemb.store.writer import GRAPH_ROWS
from gemb.text.records import Record, read_records

_CATALOGUE_BYTES = 200
"""Of a document in the catalogue, besides its texts: id, hash, checksums, and the pages' own bytes."""
_TEXT_FACTOR = 1.6
"""The words for searches by words take some 60 % of the texts they are from."""


def make_plan(setup: IndexSetup) -> Plan:
    """A plan from counting all records and tokenising a few."""
    sample: list[Record] = []
    documents = refused = 0
    first_refused = ""
    complete = not setup.reads_pipe
    if setup.vectors is not None:
        documents = setup.vectors.rows
    elif complete:
        stop_at = time.monotonic() + COUNT_SECONDS
        for item in read_records(setup.inputs, setup.read_options):
            documents += 1
            if not isinstance(item, Record):
                refused += 1
                first_refused = first_refused or str(item)
            elif len(sample) < SAMPLE_RECORDS:
                sample.append(item)
            if documents % 10_000 == 0 and time.monotonic() > stop_at:
                complete = False
                break
        if not documents:
            raise GembError(f"{', '.join(file.name for file in setup.inputs)}: no rows")
        documents -= refused
    tokens_a_document, rows_a_document = _sampled(setup.encoding, sample)
    rows = round(documents * rows_a_document)
    characters = sum(len(record.text.encode()) for record in sample) / max(1, len(sample))
    needed = _bytes(setup, rows) + round(documents * (_CATALOGUE_BYTES + _TEXT_FACTOR * characters))
    free = free_bytes(setup.output)
    about = "" if complete else "at least "
    recipe, settings = setup.recipe, setup.settings
    shown = [
        ("documents", "unknown, the input is a pipe" if setup.reads_pipe else f"{about}{documents:,}"),
        ("vectors", f"{settings.dims} dims as {settings.dtype}, first stage {settings.code_dims} dims"),
    ]
    if settings.encoder:
        shown.append(("model", shown_model(settings.encoder)))
    device = None
    if setup.encoding is not None:
        device = "\n".join(
            pick(name, recipe.precision, recipe.threads).line for name in all_devices(recipe.device)
        )
        shown += [("prompt", shown_prompt(setup.encoding.template)), ("device", device)]
    if sample:
        shown.append(("tokens", f"about {tokens_a_document * documents:,.0f}, in {about}{rows:,} passages"))
    if refused:
        reasons = f"{refused:,} rows cannot be read; see --on-error\nthe first is {first_refused}"
        shown.append(("refused", reasons))
    shown.append(("disk", f"about {readable_bytes(needed)} needed, {readable_bytes(free)} free"))
    notes = list(setup.notes)
    if setup.exists:
        notes.append(f"{setup.output} exists: what it has unchanged is not embedded again")
    if setup.replaces:
        notes.append(f"{setup.output} exists: it is replaced when the new one is whole")
    if (note := graph_note(setup)) is not None:
        notes.append(note)
    shown += [("note", note) for note in notes]
    data: dict[str, object] = {
        "documents": None if setup.reads_pipe else documents,
        "documents_complete": complete,
        "refused": refused,
        "first_refused": first_refused or None,
        "rows": rows,
        "tokens": round(tokens_a_document * documents),
        "bytes_needed": needed,
        "bytes_free": free,
        "dims": settings.dims,
        "dtype": settings.dtype,
        "first_stage_dims": settings.code_dims,
        "model": settings.encoder.get("model"),
        "fingerprint": settings.encoder.get("fingerprint"),
        "passages": settings.encoder.get("passages"),
        "device": device,
        "exists": setup.exists,
        "notes": notes,
    }
    title = f"would index {about}{counted(documents, 'document')} into {setup.output}"
    return Plan(title=title, rows=shown, data=data, outputs=[setup.output])


def _sampled(encoding: Encoding | None, sample: list[Record]) -> tuple[float, float]:
    """Tokens and rows a document, by the first records."""
    if encoding is None or not sample:
        return 0.0, 1.0
    tokeniser = encoding.load_tokeniser()
    encoded = tokeniser.encode([encoding.template.render(record.text, record.title) for record in sample])
    if encoding.passages is None:
        return float(encoded.lengths.mean()), 1.0
    whole = encoded.lengths.astype(np.int64) + encoded.lost
    step = encoding.passages.tokens - encoding.passages.overlap
    passages = np.maximum(1, np.ceil((whole - encoding.passages.overlap) / step))
    return float(whole.mean()), float(passages.mean())


def _bytes(setup: IndexSetup, rows: int) -> int:
    """About the size of vectors, keys, codes and graphs of so many rows."""
    settings = setup.settings
    wide = {"f32": 4, "f16": 2, "bf16": 2, "int8": 1}[settings.dtype]
    stored = rows * (settings.dims * wide + 8)
    if rows < GRAPH_ROWS or not setup.recipe.compact:
        return stored + rows * settings.code_dims
    return stored + expected_bytes(rows, settings.code_dims, GraphShape())

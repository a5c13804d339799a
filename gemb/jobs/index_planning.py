"""What a job of `gemb index` would do, for --dry-run: counted and sampled, and nothing written."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from gemb.device import all_devices, pick
from gemb.engine.opening import stdout_guarded
from gemb.engine.windows import Refusal
from gemb.errors import GembError
from gemb.files import free_bytes, readable_bytes
from gemb.jobs.index_adding import repeat_of
from gemb.jobs.index_graph import graph_note
from gemb.jobs.index_setup import Encoding, IndexSetup, OpenEngine, document_of
from gemb.jobs.planning import COUNT_SECONDS, SAMPLE_RECORDS, speed_of
from gemb.jobs.reporting import duration_of, shown_prompt
from gemb.report import Plan, counted
from gemb.retrieval.index_model import shown_model
from gemb.store import Document, Index
from gemb.store.graph import GraphShape, expected_bytes
from gemb.store.writer import GRAPH_ROWS
from gemb.text.records import EMPTY_TEXT, Record, Reject, read_records
from gemb.text.tokenisation import Encoded

_CATALOGUE_BYTES = 200
"""Of a document in the catalogue, besides its texts: id, hash, checksums, and the pages' own bytes."""
_COMPARED_ROWS = 1024  # records that are looked up in the index at once
_DIVIDE_SECONDS = 2.0  # for which long texts are divided, to see how many passages they make
_DIVIDED_CHARACTERS = 200_000  # of one text
_TEXT_FACTOR = 1.6
"""The words for searches by words take some 60 % of the texts they are from."""


@dataclass
class _Survey:
    """What was read of the input, beside the index that is there."""

    documents: int = 0
    """That can be read."""
    new: int = 0
    changed: int = 0
    unchanged: int = 0
    to_embed: int = 0
    """New ones, and changed ones whose title or text is another."""
    refused: int = 0
    first_refused: str = ""
    nameless: int = 0
    """Refused rows without an id that can be read."""
    empty: int = 0
    """Left out, as the user wished."""
    kept: int = 0
    """Documents of the index that the input has, be it in a row that is refused."""
    complete: bool = True
    """Whether the input was read to its end."""
    sample: list[Record] = field(default_factory=list)
    """The first of those to embed."""


def make_plan(setup: IndexSetup, open_engine: OpenEngine) -> Plan:
    """A plan from reading all records, comparing them with the index, and computing a few.

    Where nothing is to be embedded, no model is loaded.
    """
    with ExitStack() as stack:
        index = None
        if setup.exists and setup.vectors is None:
            index = stack.enter_context(Index.open(setup.output))
        survey = _survey(setup, index)
        gone = None if index is None else index.state.documents - survey.kept
    documents, sample = survey.to_embed, survey.sample
    tokens_a_document, rows_a_document, encoded = _sampled(setup.encoding, sample)
    tokens = tokens_a_document * documents
    rows = round(documents * rows_a_document)
    characters = sum(len(record.text.encode()) for record in sample) / max(1, len(sample))
    needed = _bytes(setup, rows) + round(documents * (_CATALOGUE_BYTES + _TEXT_FACTOR * characters))
    free = free_bytes(setup.output)
    about = "" if survey.complete else "at least "
    recipe, settings = setup.recipe, setup.settings
    read = "unknown, the input is a pipe" if setup.reads_pipe else f"{about}{survey.documents:,}"
    notes = list(setup.notes)
    removed = None
    if index is not None and not setup.reads_pipe:
        read, removed = _compared(setup, survey, gone or 0, notes)
    shown = [
        ("documents", read),
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
    seconds = None
    if setup.encoding is not None and encoded is not None:
        with stdout_guarded():
            engine = open_engine(setup, setup.encoding, lambda line: None)
        try:
            speed = speed_of(engine, encoded)
        finally:
            engine.close()
        seconds = tokens / speed
        passages = counted(rows, "passage")
        shown += [
            ("tokens", f"about {tokens:,.0f}, in {about}{passages}"),
            ("time", f"about {duration_of(seconds)}, at {speed:,.0f} tokens/s"),
        ]
    if survey.refused:
        refused = counted(survey.refused, "row")
        reasons = f"{refused} cannot be read; see --on-error\nthe first is {survey.first_refused}"
        shown.append(("refused", reasons))
    shown.append(("disk", f"about {readable_bytes(needed)} needed, {readable_bytes(free)} free"))
    if setup.exists and index is None:
        notes.append(f"{setup.output} exists: what it has unchanged is not embedded again")
    if setup.replaces:
        notes.append(f"{setup.output} exists: it is replaced when the new one is whole")
    if (note := graph_note(setup)) is not None:
        notes.append(note)
    shown += [("note", note) for note in notes]
    data: dict[str, object] = {
        "documents": None if setup.reads_pipe else survey.documents,
        "documents_complete": survey.complete,
        "new": None if index is None else survey.new,
        "changed": None if index is None else survey.changed,
        "unchanged": None if index is None else survey.unchanged,
        "removed": removed,
        "refused": survey.refused,
        "first_refused": survey.first_refused or None,
        "rows": rows,
        "tokens": round(tokens),
        "seconds": None if seconds is None else round(seconds, 3),
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
    of = "" if documents == survey.documents else f" of {survey.documents:,}"
    title = f"would index {about}{counted(documents, 'document')}{of} into {setup.output}"
    return Plan(title=title, rows=shown, data=data, outputs=[setup.output])


def _survey(setup: IndexSetup, index: Index | None) -> _Survey:
    """Reads the input, for COUNT_SECONDS at most; without an index every document is new."""
    survey = _Survey(complete=not setup.reads_pipe)
    if setup.vectors is not None:
        survey.documents = survey.new = survey.to_embed = setup.vectors.rows
        return survey
    if setup.reads_pipe:
        return survey
    seen: set[str] = set()
    records = read_records(setup.inputs, setup.read_options)
    stop_at = time.monotonic() + COUNT_SECONDS
    while chunk := list(islice(records, _COMPARED_ROWS)):
        _add_chunk(survey, setup, index, chunk, seen)
        if time.monotonic() > stop_at:
            survey.complete = next(records, None) is None
            break
    if not survey.documents + survey.refused + survey.empty:
        raise GembError(f"{', '.join(file.name for file in setup.inputs)}: no rows")
    return survey


def _add_chunk(
    survey: _Survey, setup: IndexSetup, index: Index | None, chunk: list[Record | Reject], seen: set[str]
) -> None:
    """Counts some records; `seen` are the ids of the documents before them."""
    records: list[Record] = []
    documents: list[Document] = []
    refused: list[Refusal] = []
    for item in chunk:
        if not isinstance(item, Record):
            if item.reason == EMPTY_TEXT and setup.recipe.empty == "skip":
                survey.empty += 1
            else:
                refused.append(Refusal(item.source, item.line, item.index, item.id, item.reason))
        elif item.id in seen:
            refused.append(repeat_of(item))
        elif isinstance(document := document_of(item, setup.kept_fields), Refusal):
            refused.append(document)
        else:
            seen.add(item.id)
            records.append(item)
            documents.append(document)
    survey.documents += len(documents)
    survey.refused += len(refused)
    if refused and not survey.first_refused:
        survey.first_refused = str(min(refused, key=lambda refusal: refusal.index))
    survey.nameless += sum(refusal.id is None for refusal in refused)
    needed = records
    if index is not None:
        differences = index.compare(documents)
        found = Counter(differences)
        survey.changed += found["text"] + found["metadata"]
        survey.unchanged += found["none"]
        named = {refusal.id for refusal in refused if refusal.id is not None} - seen
        seen |= named
        survey.kept += len(documents) - found["new"] + len(index.has(list(named)))
        survey.new += found["new"]
        needed = [
            record for record, change in zip(records, differences, strict=True) if change in ("new", "text")
        ]
    else:
        survey.new += len(documents)
    survey.to_embed += len(needed)
    survey.sample += needed[: SAMPLE_RECORDS - len(survey.sample)]


def _compared(setup: IndexSetup, survey: _Survey, gone: int, notes: list[str]) -> tuple[str, int | None]:
    """What would become of the documents, for people, and how many would be removed; None is not known.

    `gone` documents of the index were not found in the input. Adds a note where a prune would not be done.
    """
    told = f"{survey.new:,} new, {survey.changed:,} changed, {survey.unchanged:,} unchanged"
    limit = setup.recipe.limit_rows
    if not survey.complete:
        return f"at least {told}", None
    if not setup.recipe.prune:
        return f"{told}; {gone:,} not in the input stay, see --prune" if gone else told, 0
    if survey.nameless or (limit is not None and survey.to_embed > limit):
        why = "rows without an id that can be read" if survey.nameless else "--limit-rows ends the run before"
        notes.append(f"nothing would be pruned: {why}")
        return told, 0
    return f"{told}, {gone:,} to be removed", gone


def _sampled(encoding: Encoding | None, sample: list[Record]) -> tuple[float, float, Encoded | None]:
    """Tokens and rows a document, by the first records, and those that have tokens as the model takes them.

    How full passages are depends on where the texts can be divided, so some are divided.
    """
    if encoding is None or not sample:
        return 0.0, 1.0, None
    tokeniser = encoding.load_tokeniser()
    encoded = tokeniser.encode([encoding.template.render(record.text, record.title) for record in sample])
    computed = encoded.take(np.flatnonzero(encoded.lengths)) if encoded.lengths.any() else None
    if encoding.passages is None:
        return float(encoded.lengths.mean()), 1.0, computed
    whole = encoded.lengths.astype(np.int64) + encoded.lost
    is_long = encoded.lost > 0
    divided = divided_tokens = passages = 0
    stop_at = time.monotonic() + _DIVIDE_SECONDS
    for place in np.flatnonzero(is_long).tolist():
        record = sample[place]

        def render(body: str, title: str | None = record.title) -> str:
            return encoding.template.render(body, title)

        text = record.text[:_DIVIDED_CHARACTERS]
        share = len(text) / len(record.text) if text else 1.0  # else a title alone
        overlap = encoding.passages.overlap
        passages += len(tokeniser.passages(text, render, overlap_tokens=overlap))
        divided_tokens += round(share * int(whole[place]))
        divided += 1
        if time.monotonic() > stop_at:
            break
    rows = int((~is_long).sum()) + (passages * float(whole[is_long].sum()) / divided_tokens if divided else 0)
    return float(whole.mean()), rows / len(sample), computed


def _bytes(setup: IndexSetup, rows: int) -> int:
    """About the size of vectors, keys, codes and graphs of so many rows."""
    settings = setup.settings
    wide = {"f32": 4, "f16": 2, "bf16": 2, "int8": 1}[settings.dtype]
    stored = rows * (settings.dims * wide + 8)
    if rows < GRAPH_ROWS or not setup.recipe.compact:
        return stored + rows * settings.code_dims
    return stored + expected_bytes(rows, settings.code_dims, GraphShape())

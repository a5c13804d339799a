"""What a job of `gemb embed` would do, for --dry-run: counted, sampled and measured, and nothing written."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

from gemb.engine import Engine, run_batches
from gemb.engine.opening import stdout_guarded
from gemb.errors import GembError
from gemb.files import free_bytes, readable_bytes
from gemb.jobs.reporting import duration_of, shown_model, shown_prompt
from gemb.jobs.setup import OpenEngine, Setup, any_ranges
from gemb.model.folder import fingerprint
from gemb.report import Plan, counted
from gemb.text.batches import token_batches
from gemb.text.records import Record, read_records
from gemb.text.tokenisation import Encoded
from gemb.vectors.layout import estimated_bytes, output_files

SAMPLE_RECORDS = 2000
COUNT_SECONDS = 20.0  # records are counted for so long at most
COMPUTE_SECONDS = 2.0
SHOWN_INPUTS = 4


def make_plan(setup: Setup, open_engine: OpenEngine) -> Plan:
    """A plan from counting all records and computing a few."""
    recipe = setup.recipe
    sample: list[Record] = []
    records = refused = 0
    first_refused = ""
    stop_at = time.monotonic() + COUNT_SECONDS
    complete = not setup.reads_pipe
    if not setup.reads_pipe:
        for item in read_records(setup.inputs, setup.read_options(0)):
            records += 1
            if not isinstance(item, Record):
                refused += 1
                first_refused = first_refused or f"{item.source}:{item.line}: {item.reason}"
            elif len(sample) < SAMPLE_RECORDS:
                sample.append(item)
            if records % 10_000 == 0 and time.monotonic() > stop_at:
                complete = False
                break
        if records == 0:
            raise GembError(f"{', '.join(file.name for file in setup.inputs)}: no rows")
    with stdout_guarded():
        engine = open_engine(setup, lambda line: None)
    try:
        tokens_a_row, tokens_a_second = _sampled(setup, engine, sample)
    finally:
        engine.close()
    rows = -(-(records - refused) // (setup.shard[1] if setup.shard else 1))
    if recipe.limit_rows is not None and rows > recipe.limit_rows:
        rows, complete = recipe.limit_rows, True
    layout = setup.layout(any_ranges(setup.dims) if recipe.dtype == "int8" else None)
    needed = estimated_bytes(setup.output, layout, rows)
    free = None if setup.is_stream else free_bytes(setup.output)
    about = "" if complete else "at least "
    tokens = tokens_a_row * rows
    seconds = tokens / tokens_a_second if tokens_a_second else None
    where = "stdout" if setup.is_stream else str(setup.output)
    shown = [
        ("input", _shown_inputs([file.name for file in setup.inputs])),
        ("rows", "unknown, the input is a pipe" if setup.reads_pipe else f"{about}{rows:,}"),
        ("model", shown_model(setup)),
        ("prompt", shown_prompt(setup.template)),
        ("device", engine.device_line),
    ]
    if refused:
        reasons = f"{counted(refused, 'row')} cannot be read; see --on-error\nthe first is {first_refused}"
        shown.insert(2, ("refused", reasons))
    if sample:
        shown += [
            ("tokens", f"about {tokens:,.0f}, at most {setup.tokeniser.max_tokens:,} a row"),
            ("time", f"about {duration_of(seconds or 0.0)}, at {tokens_a_second:,.0f} tokens/s"),
        ]
    if free is not None:
        shown.append(("disk", f"about {readable_bytes(needed)} needed, {readable_bytes(free)} free"))
    notes = [*setup.notes, *engine.notes]
    outputs = [] if setup.is_stream else output_files(setup.output, layout)
    if any(path.exists() for path in outputs):
        notes.append(f"{setup.output} exists; if another request made it, the job will need --overwrite")
    if not setup.is_stream and setup.work.exists():
        notes.append(f"{setup.work} is there: the job goes on with it if the same request left it")
    shown += [("note", note) for note in notes]
    data: dict[str, object] = {
        "rows": None if setup.reads_pipe else rows,
        "rows_complete": complete,
        "refused": refused,
        "first_refused": first_refused or None,
        "tokens": round(tokens),
        "seconds": None if seconds is None else round(seconds, 3),
        "tokens_per_second": round(tokens_a_second, 3),
        "bytes_needed": needed,
        "bytes_free": free,
        "dims": setup.dims,
        "dtype": recipe.dtype,
        "model": setup.model_name,
        "fingerprint": fingerprint(setup.folder),
        "prompt": {"name": setup.template.name, "text": setup.template.prefix},
        "device": engine.device_line,
        "notes": notes,
    }
    title = f"would embed {about}{counted(rows, 'row')} to {where}"
    return Plan(title=title, rows=shown, data=data, outputs=outputs)


def _shown_inputs(names: Sequence[str]) -> str:
    """All the names if they are few, else how many they are, with the first and the last."""
    if len(names) <= SHOWN_INPUTS:
        return ", ".join(names)
    return f"{len(names):,} files, from {names[0]} to {names[-1]}"


def _sampled(setup: Setup, engine: Engine, sample: list[Record]) -> tuple[float, float]:
    """(tokens a row, tokens a second) of the first records."""
    if not sample:
        return 0.0, 0.0
    encoded = setup.tokeniser.encode(
        [setup.template.render(record.text, record.title) for record in sample],
        prompt_tokens=setup.prompt_tokens,
    )
    return float(encoded.lengths.mean()), speed_of(engine, encoded)


def speed_of(engine: Engine, encoded: Encoded) -> float:
    """Tokens a second, from computing texts of `encoded`, at least one token long, for COMPUTE_SECONDS."""
    batches = token_batches(encoded.take(np.flatnonzero(encoded.lengths)), engine.batch_tokens)
    stop = threading.Event()
    # The median batch first and last: the longest alone would not be typical.
    middle_out = sorted(range(len(batches)), key=lambda number: abs(number - len(batches) // 2))
    tokens = 0
    list(run_batches(engine, [batches[middle_out[0]]]))  # warms up
    began = time.monotonic()
    for batch, _ in run_batches(engine, (batches[number] for number in middle_out), stop=stop):
        tokens += len(batch.ids)
        if time.monotonic() - began > COMPUTE_SECONDS:
            stop.set()
    return tokens / max(1e-9, time.monotonic() - began)

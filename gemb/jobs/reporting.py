"""The report of a job of `gemb embed`, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from gemb.errors import Exit
from gemb.files import readable_bytes
from gemb.jobs.setup import Setup
from gemb.jobs.writing import Counts, State
from gemb.model.folder import fingerprint
from gemb.report import Report, counted
from gemb.report.progress import duration
from gemb.text.prompts import Template
from gemb.vectors.layout import OutputFile

ON_LONG_HINT = "; see --on-long"


def make_report(
    setup: Setup,
    state: State,
    *,
    before: Counts,
    device_line: str,
    files: Sequence[OutputFile],
    clipped_values: int,
    more: bool,
    notes: Sequence[str],
) -> Report:
    """What was done up to `state`, of which `before` in earlier runs.

    Rates are those of this run. `more` says that a limit stopped it before the end of the input.
    """
    counts = state.counts
    seconds = max(1e-9, counts.seconds - before.seconds)
    rows_per_second = (counts.rows - before.rows) / seconds
    tokens_per_second = (counts.computed_tokens - before.computed_tokens) / seconds
    writing_share = (counts.write_seconds - before.write_seconds) / seconds
    rejects_file = setup.rejects_file if counts.rejected and not setup.is_stream else None
    clipped_share = clipped_values / max(1, counts.rows * setup.dims)
    data: dict[str, object] = {
        "output": str(setup.output),
        "rows": counts.rows,
        "dims": setup.dims,
        "dtype": setup.recipe.dtype,
        "model": setup.model_name,
        "fingerprint": fingerprint(setup.folder),
        "prompt": {"name": setup.template.name, "text": setup.template.prefix},
        "device": device_line,
        "precision": state.precision,
        **asdict(counts),
        "rows_before": before.rows,
        "rows_per_second": round(rows_per_second, 3),
        "tokens_per_second": round(tokens_per_second, 3),
        "writing_share": round(writing_share, 6),
        "clipped_share": clipped_share,
        "more": more,
        "rejects_file": None if rejects_file is None else str(rejects_file),
        "files": [str(file.path) for file in files],
        "notes": list(notes),
    }
    shown = [
        ("model", shown_model(setup)),
        ("prompt", shown_prompt(setup.template)),
        *([("device", device_line)] if device_line else []),  # none if all was computed by earlier runs
        (
            "rate",
            f"{rows_per_second:,.1f} {'passages' if _makes_passages(setup) else 'rows'}/s, "
            f"{tokens_per_second:,.0f} tokens/s; {writing_share:.1%} of the time in writing",
        ),
        ("tokens", _shown_tokens(counts)),
        *_remarkable(setup, counts, before),
    ]
    if counts.rejected:
        shown.append(
            ("rejected", counted(counts.rejected, "row") + (f"; see {rejects_file}" if rejects_file else ""))
        )
    if setup.recipe.dtype == "int8" and files:
        shown.append(("clipped", f"{clipped_share:.3%} of the numbers lie outside the int8 ranges"))
    if files:
        shown.append(("files", "\n".join(f"{file.path} ({readable_bytes(file.bytes)})" for file in files)))
    shown += [("note", note) for note in notes]
    return Report(
        title=_title(setup, counts, more),
        rows=shown,
        data=data,
        outputs=[file.path for file in files],
        exit_code=Exit.MORE if more else Exit.REJECTED if counts.rejected else Exit.DONE,
    )


def _remarkable(setup: Setup, counts: Counts, before: Counts) -> list[tuple[str, str]]:
    """What happened to rows that were not simply computed."""
    shown: list[tuple[str, str]] = []
    if before.rows:
        shown.append(("resumed", f"after {counted(before.rows, 'row')} of earlier runs"))
    if counts.truncated:
        share = counts.truncated / max(1, counts.rows)
        were = "was" if counts.truncated == 1 else "were"
        about = "about " if counts.lost_more else ""
        shown.append(
            (
                "cut",
                f"{counted(counts.truncated, 'row')} ({share:.1%}) {were} longer than "
                f"{setup.tokeniser.max_tokens:,} tokens and lost {about}{counts.lost_tokens:,}{ON_LONG_HINT}",
            )
        )
    if counts.chunked:
        shown.append(("chunked", f"{counted(counts.chunked, 'long text')} became several passages"))
    if counts.duplicates:
        repeats = counted(counts.duplicates, "text")
        shown.append(("repeated", f"{repeats} stood near by before, computed once"))
    if setup.recipe.cache is not None:
        hits, texts = counts.cache_hits, counts.cache_hits + counts.computed_texts
        shown.append(("cache", f"{hits:,} of {counted(texts, 'text')} ({hits / max(1, texts):.1%})"))
    if counts.empty_skipped:
        shown.append(("empty", f"{counted(counts.empty_skipped, 'row')} left out"))
    if counts.long_skipped:
        shown.append(("too long", f"{counted(counts.long_skipped, 'row')} left out"))
    return shown


def _title(setup: Setup, counts: Counts, more: bool) -> str:
    done = counted(counts.rows, "row")
    if _makes_passages(setup):
        done = f"{counted(counts.rows, 'passage')} of {counted(counts.records, 'row')}"
    if not more:
        where = "stdout" if setup.is_stream else str(setup.output)
        return f"embedded {done} to {where} in {duration_of(counts.seconds)}"
    if setup.is_stream:
        return f"stopped by a limit after {done}; more remain"
    if setup.reads_pipe:
        return f"stopped by a limit after {done}; the rest of the pipe is not kept"
    return f"stopped by a limit after {done}; run the same command again to go on"


def _makes_passages(setup: Setup) -> bool:
    """Whether what is written are passages, of which a row of the input may have several."""
    return setup.recipe.on_long == "chunk"


def _shown_tokens(counts: Counts) -> str:
    """The tokens of all that was written, and how many of them cost work."""
    written, computed = counts.tokens, counts.computed_tokens
    return f"{written:,}" if computed >= written else f"{written:,}, of which {computed:,} were computed"


def shown_model(setup: Setup) -> str:
    """The model for people, and what of it is stored."""
    name, short = setup.model_name, fingerprint(setup.folder)[:12]
    return f"{name} ({short}), {setup.dims} dims as {setup.recipe.dtype}"


def shown_prompt(template: Template) -> str:
    """A prompt for people: its name and text, and that a query has no title."""
    shown = f"{template.name}: {template.prefix!r}" if template.prefix else f"{template.name} (no text)"
    return shown if template.uses_titles else f"{shown}; titles are not embedded"


def duration_of(seconds: float) -> str:
    """`0.8 s`, `41 s`, `12:05`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 100 else duration(seconds)

"""The report of a job of `gemb index`, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gemb.errors import Exit
from gemb.jobs.reporting import duration_of, shown_prompt
from gemb.report import Report, counted
from gemb.retrieval.index_model import shown_model
from gemb.store import Changes

if TYPE_CHECKING:
    from gemb.jobs.index_adding import Outcome
    from gemb.jobs.index_setup import IndexSetup


def make_report(
    setup: IndexSetup, outcome: Outcome, changes: Changes, documents: int, rows: int, folder: Path
) -> Report:
    """What a run did to the index, which has now so many documents and rows.

    `folder` is where the index is written; another one than the output while it is not whole.
    """
    counts, settings = outcome.counts, setup.settings
    rejects_file = setup.rejects_file if counts.rejected else None
    data: dict[str, object] = {
        "output": str(setup.output),
        **asdict(changes),
        "rejected": counts.rejected,
        "empty_skipped": counts.empty_skipped,
        "documents": documents,
        "rows": rows,
        "dims": settings.dims,
        "dtype": settings.dtype,
        "first_stage_dims": settings.code_dims,
        "model": settings.encoder.get("model"),
        "fingerprint": settings.encoder.get("fingerprint"),
        "prompt": settings.encoder.get("document_prompt"),
        "passages": settings.encoder.get("passages"),
        "device": outcome.device_line or None,
        "computed_texts": counts.computed_texts,
        "computed_tokens": counts.computed_tokens,
        "truncated": counts.truncated,
        "lost_tokens": counts.lost_tokens,
        "divided": counts.chunked,
        "repeated_texts": counts.duplicates,
        "cache_hits": counts.cache_hits,
        "pruned": outcome.pruned,
        "compacted": outcome.compacted,
        "seconds": round(counts.seconds, 3),
        "more": outcome.more,
        "rejects_file": None if rejects_file is None else str(rejects_file),
        "notes": list(outcome.notes),
    }
    passages = "" if rows == documents else f" in {counted(rows, 'passage')}"
    shown = [("documents", f"{documents:,}{passages}, {settings.dims} dims as {settings.dtype}")]
    if settings.encoder:
        shown.append(("model", shown_model(settings.encoder)))
    if setup.encoding is not None:
        shown.append(("prompt", shown_prompt(setup.encoding.template)))
    if outcome.device_line:
        shown.append(("device", outcome.device_line))
        seconds = max(1e-9, counts.seconds)
        shown.append(
            (
                "rate",
                f"{counts.rows / seconds:,.1f} passages/s, {counts.computed_tokens / seconds:,.0f} tokens/s",
            )
        )
    shown += _remarkable(setup, outcome)
    if rejects_file is not None:
        shown.append(("rejected", f"{counted(counts.rejected, 'row')}; see {rejects_file}"))
    shown += [("note", note) for note in outcome.notes]
    return Report(
        title=_title(setup, outcome, changes, folder),
        rows=shown,
        data=data,
        outputs=[setup.output],
        exit_code=Exit.MORE if outcome.more else Exit.REJECTED if counts.rejected else Exit.DONE,
    )


def _remarkable(setup: IndexSetup, outcome: Outcome) -> list[tuple[str, str]]:
    """What happened to rows that were not simply computed."""
    counts = outcome.counts
    shown: list[tuple[str, str]] = []
    if counts.chunked:
        long = counted(counts.chunked, "document")
        shown.append(
            ("divided", f"{long} into passages of at most {setup.settings.encoder['max_tokens']:,} tokens")
        )
    if counts.truncated:
        about = "about " if counts.lost_more else ""
        shown.append(
            (
                "cut",
                f"{counted(counts.truncated, 'text')} lost {about}{counts.lost_tokens:,} tokens; "
                "see --passages",
            )
        )
    if counts.duplicates:
        shown.append(
            ("repeated", f"{counted(counts.duplicates, 'text')} stood near by before, computed once")
        )
    if setup.recipe.cache is not None:
        hits, texts = counts.cache_hits, counts.cache_hits + counts.computed_texts
        shown.append(("cache", f"{hits:,} of {counted(texts, 'text')} ({hits / max(1, texts):.1%})"))
    if counts.empty_skipped:
        shown.append(("empty", f"{counted(counts.empty_skipped, 'row')} left out"))
    return shown


def _title(setup: IndexSetup, outcome: Outcome, changes: Changes, folder: Path) -> str:
    done = ", ".join(
        f"{count:,} {what}"
        for what, count in (
            ("added", changes.added),
            ("changed", changes.changed),
            ("unchanged", changes.unchanged),
            ("removed", changes.removed),
            ("rejected", outcome.counts.rejected),
        )
        if count or what in ("added", "unchanged")
    )
    title = f"{setup.output}: {done}, in {duration_of(outcome.counts.seconds)}"
    if not outcome.more:
        return title
    if setup.reads_pipe:
        return f"{title}; stopped by a limit, the rest of the pipe was not read"
    if folder != setup.output:
        return (
            f"{title}; stopped by a limit, the old index stays until the same command has gone on to the end"
        )
    return f"{title}; stopped by a limit, run the same command again to go on"

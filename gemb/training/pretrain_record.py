"""The record, the report and the card of a pretraining run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gemb.files import atomic_write
from gemb.report import Report
from gemb.report.progress import duration
from gemb.training.card import how_made
from gemb.training.pretrain_recipe import PretrainRecipe
from gemb.training.record import worst_of

if TYPE_CHECKING:
    from gemb.training.loop import Progress
    from gemb.training.pretrain_setup import PretrainSetup
    from gemb.training.verdict import Verdict


def record_of(
    setup: PretrainSetup,
    progress: Progress,
    verdicts: Sequence[Verdict],
    means: Mapping[str, Mapping[str, float]],
    losses: tuple[float | None, float | None],
    seconds: float,
) -> dict[str, Any]:
    """What gemb.json says of a finished run: the request, and what became of it."""
    first_reject = setup.documents.first_reject
    return {
        **setup.request,
        "objective": setup.recipe.objective.name,
        "output": str(setup.folder.output),
        "device": setup.device.line,
        "ranks": setup.ranks.count,
        "max_tokens": setup.max_tokens,
        "steps": progress.step,
        "rows": progress.pairs,
        "tokens": progress.tokens,
        "tokens_per_second": round(progress.tokens / max(1e-9, progress.seconds), 1),
        "step_seconds": round(progress.seconds, 3),
        "seconds": round(seconds, 3),
        "bad_steps": progress.bad_steps,
        "tokens_per_chunk": progress.plan.tokens_per_chunk,
        "first_loss": losses[0],
        "last_loss": losses[1],
        "best_step": progress.best_step,
        "data_counts": (progress.position or {}).get("counts", {}),
        "first_reject": first_reject,
        **worst_of(verdicts),
        "verdicts": [asdict(one) for one in verdicts],
        "measures": means,
        "notes": setup.notes,
    }


def make_report(setup: PretrainSetup, record: Mapping[str, Any]) -> Report:
    """What people and programs are told at the end."""
    counts = record["data_counts"]
    rejected = ""
    if counts.get("rejected"):
        rejected = (
            f", {counts['rejected']:,} rows left out, first {record['first_reject'] or 'in a run before'}"
        )
    rows = [
        ("model", f"{setup.model_name} -> {setup.folder.output}"),
        ("objective", record["objective"]),
        ("data", f"{counts.get('texts', 0):,} texts read{rejected}"),
        (
            "steps",
            f"{record['steps']:,} of {setup.recipe.batch.tokens:,} tokens, {record['tokens']:,} in all; "
            f"{record['tokens_per_second']:,.0f} tokens/s",
        ),
    ]
    if record["first_loss"] is not None:
        rows.append(("loss", f"{record['first_loss']:.4f} -> {record['last_loss']:.4f}"))
    rows += [("verdict", verdict_line(one)) for one in record["verdicts"]]
    rows += [(name, f"{before:.4g} -> {after:.4g}") for name, before, after in _numbers(record)]
    rows.append(("pictures", str(setup.folder.output / "run" / "report.html")))
    rows += [("note", note) for note in record["notes"]]
    if record["objective"] != "mntp":  # which is for encoders, and for decoders that were adapted before
        rows.append(("next", f"gemb adapt {setup.folder.output} -o ENCODER makes an encoder of it"))
    return Report(
        title=f"trained {setup.model_name} on {record['tokens']:,} tokens in {duration(record['seconds'])}",
        rows=rows,
        data=dict(record),
        outputs=[setup.folder.output],
    )


def verdict_line(one: Mapping[str, Any]) -> str:
    """`WIN texts/accuracy 0.112 -> 0.381 (+0.252 to +0.285, 500 texts)`."""
    return (
        f"{one['word']} {one['metric']} {one['before']:.3f} -> {one['after']:.3f} "
        f"({one['low']:+.3f} to {one['high']:+.3f}, {one['queries']:,} texts)"
    )


def write_card(folder: Path, recipe: PretrainRecipe, record: Mapping[str, Any]) -> None:
    """Write README.md: what the model is, what it was trained on, and what it reached."""
    head = yaml.safe_dump(
        {"library_name": "transformers", "tags": ["gemb"], "base_model": record["model"]["name"]},
        sort_keys=False,
    )
    scores = [
        f"| {one['metric']} | {one['before']:.4f} | {one['after']:.4f} | {one['word']} |"
        for one in record["verdicts"]
    ]
    scores += [f"| {name} | {before:.4g} | {after:.4g} | |" for name, before, after in _numbers(record)]
    table = ["| measure | before | after | verdict |", "| --- | --- | --- | --- |", *scores]
    parts = [
        f"---\n{head}---",
        f"# {Path(str(record['output'])).name}",
        f"{record['model']['name']} trained further with gemb {record['versions']['gemb']} by "
        f"{record['objective']}: {record['steps']:,} steps, {record['tokens']:,} tokens.",
        "## Scores\n\n" + ("\n".join(table) if scores else "Nothing was evaluated."),
        "## Data\n\n" + "\n".join(f"- {name}" for name in record["data"]),
        *how_made(recipe, record),
    ]
    with atomic_write(folder / "README.md") as file:
        file.write(("\n\n".join(parts) + "\n").encode())


def _numbers(record: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(measure, before, after) of those that have no verdict."""
    judged = {one["metric"] for one in record["verdicts"]}
    before, after = (record["measures"].get(when, {}) for when in ("before", "after"))
    return [(name, before[name], after[name]) for name in after if name not in judged and name in before]

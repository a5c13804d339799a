"""The record and the report of a run of `gemb train`, for gemb.json, the model card and people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import orjson

from gemb.recipe import resolved
from gemb.report import Report
from gemb.report.progress import duration
from gemb.training.recipe import RunRecipe, flat
from gemb.training.run_folder import RunFolder

if TYPE_CHECKING:
    from gemb.training.loop import Progress
    from gemb.training.setup import Setup
    from gemb.training.verdict import Verdict


def record_of(
    setup: Setup,
    progress: Progress,
    verdicts: Sequence[Verdict],
    means: Mapping[str, Mapping[str, float]],
    losses: tuple[float | None, float | None],
    seconds: float,
) -> dict[str, Any]:
    """What gemb.json says of a finished run: the request, and what became of it."""
    counts = {name: asdict(one) for name, one in setup.mixture.counts.items()}
    repeats = {name: asdict(state) for name, state in setup.mixture.draws.items()}
    taught: dict[str, Any] = {}
    if setup.teaching is not None:
        from gemb.training.teaching import share_of

        share = share_of(means.get("after", {}), means.get("teacher", {}))
        taught = {"teacher": {"name": setup.teaching.name, "dims": setup.teaching.dims, "share": share}}
    qat = setup.recipe.qat
    return {
        **setup.request,
        **taught,
        **({} if qat is None else {"qat": {"format": qat.format, "start": qat.start}}),
        "output": str(setup.folder.output),
        "device": setup.device.line,
        "ranks": setup.ranks.count,
        "dims": setup.model.dims,
        "matryoshka_dims": list(setup.sizes),
        "steps": progress.step,
        "pairs": progress.pairs,
        "tokens": progress.tokens,
        "tokens_per_second": round(progress.tokens / max(1e-9, progress.seconds), 1),
        "step_seconds": round(progress.seconds, 3),
        "seconds": round(seconds, 3),
        "bad_steps": progress.bad_steps,
        "counts": progress.counts,
        "tokens_per_chunk": progress.plan.tokens_per_chunk,
        "first_loss": losses[0],
        "last_loss": losses[1],
        "best_step": progress.best_step,
        "data_counts": counts,
        "repeated": {name: one["repeated"] for name, one in repeats.items()},
        **worst_of(verdicts),
        "verdicts": [asdict(one) for one in verdicts],
        "measures": means,
        "notes": setup.notes,
    }


def make_report(setup: Setup, record: Mapping[str, Any]) -> Report:
    """What people and programs are told at the end."""
    rows = [
        ("model", f"{setup.model_name} -> {setup.folder.output}"),
        ("data", ", ".join(_shown_data(name, one) for name, one in record["data_counts"].items())),
        (
            "steps",
            f"{record['steps']:,}, {record['tokens']:,} tokens, {record['tokens_per_second']:,.0f} tokens/s",
        ),
        ("device", record["device"]),
    ]
    if record["first_loss"] is not None:
        rows.append(("loss", f"{record['first_loss']:.4f} -> {record['last_loss']:.4f} in this run"))
    if record["bad_steps"]:
        rows.append(("left out", f"{record['bad_steps']:,} steps whose loss or gradient was not finite"))
    if setup.recipe.qat is not None:
        rows.append(("qat", f"{setup.recipe.qat}; scores are those of the quantised model"))
    rows += _left_out(record["counts"])
    rows += [("verdict", str(one)) for one in shown_verdicts(record)]
    if "teacher" in record:
        rows += _taught(record)
    rows.append(("pictures", str(setup.folder.output / "run" / "report.html")))
    rows += [("note", note) for note in record["notes"]]
    return Report(
        title=f"{'distilled' if 'teacher' in record else 'trained'} {setup.model_name} "
        f"on {record['pairs']:,} pairs in {duration(record['seconds'])}",
        rows=rows,
        data=record,
        outputs=[setup.folder.output],
    )


def _left_out(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """How many candidates of the contrastive loss were no negatives."""
    total = counts.get("candidates", 0)
    names = {"masked_duplicates": "repeat a text", "false_negatives": "are likely false negatives"}
    parts = [
        f"{counts[name]:,} ({counts[name] / total:.2%}) {why}"
        for name, why in names.items()
        if total and name in counts
    ]
    return [("masked", f"of {total:,} candidates {', '.join(parts)}")] if parts else []


def _taught(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the student reaches of its teacher's quality."""
    from gemb.training.held_out import is_full_size

    teacher, after = record["teacher"], record["measures"].get("after", {})
    best = record["measures"].get("teacher", {})
    names = [name for name in after if name in best and is_full_size(name)]
    rows = [(f"{name}, of the teacher's", f"{after[name]:.3f} of {best[name]:.3f}") for name in names]
    if teacher["share"] is None:
        return [("teacher", teacher["name"])]
    return [*rows, ("teacher", f"{teacher['name']}; {teacher['share']:.1%} of its quality in the mean")]


def shown_verdicts(record: Mapping[str, Any]) -> list[Verdict]:
    """The verdicts of a record at full width."""
    from gemb.training.held_out import is_full_size
    from gemb.training.verdict import Verdict

    return [Verdict(**one) for one in record["verdicts"] if is_full_size(one["metric"])]


def already_done(recipe: RunRecipe, folder: RunFolder) -> Report:
    """The report of a run that was finished before.

    Raises GembError with the differences if it was another recipe's.
    """
    record = folder.finished()
    now = {**record, "recipe": orjson.loads(orjson.dumps(flat(resolved(recipe))))}
    folder.refuse_differences(record, now, f"{folder.output} was trained by another recipe")
    rows = [("verdict", line) for line in [record.get("verdict_line")] if line]
    return Report(
        title=f"{folder.output} was trained before; nothing to do",
        rows=rows,
        data={**record, "already_done": True},
        outputs=[folder.output],
    )


def worst_of(verdicts: Sequence[Verdict]) -> dict[str, str | None]:
    """The worst verdict at full width, as a word and as a line, so that a gate misses nothing."""
    from gemb.training.held_out import is_full_size

    full = [one for one in verdicts if is_full_size(one.metric)]
    worst = min(full, key=lambda one: ("REGRESSION", "TIE", "WIN").index(one.word), default=None)
    if worst is None:
        return {"verdict": None, "verdict_line": None}
    return {"verdict": worst.word, "verdict_line": str(worst)}


def _shown_data(name: str, counts: Mapping[str, int]) -> str:
    cut = f", {counts['truncated']:,} texts cut" if counts["truncated"] else ""
    return f"{name} ({counts['examples']:,} examples{cut})"

"""`gemb merge`: models of one shape in, one model out.

    report = run(MergeRecipe(models=..., output=Path("soup")))

What the methods do is told in `gemb.merging`, what must be alike in `gemb.jobs.merge_sources`; see
docs/merge.md for what users are promised. The output appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import orjson
import yaml

from gemb.device import available_threads
from gemb.errors import Exit, GembError
from gemb.evaluation import Comparison, Task
from gemb.evaluation.reading import Choices, read_task
from gemb.files import (
    atomic_write,
    check_writable,
    os_errors_explained,
    read_json,
    readable_bytes,
    write_json,
)
from gemb.jobs.merge_digests import PassingDigests, identity_of
from gemb.jobs.merge_recipe import Ingredient, MergeRecipe, layers_of
from gemb.jobs.merge_scores import Scored, ScoreLog, Trial, chosen, data_digest, greedy, mixtures, scored
from gemb.jobs.merge_sources import Source, Tensors, check_alike, checkpoints_of, open_source
from gemb.jobs.merge_streaming import Merge
from gemb.jobs.record import versions
from gemb.model.folder import fingerprint, is_fingerprinted, read_folder
from gemb.recipe import resolved, shipped_recipes
from gemb.report import Event, OnProgress, Plan, Report, Table, counted, ignore

__all__ = ["Ingredient", "MergeRecipe", "plan", "run"]

FORMAT = 1
"""Of the gemb.json in a merged folder."""


@dataclass(frozen=True)
class _Setup:
    """A recipe with its models opened and found to be alike."""

    recipe: MergeRecipe
    output: Path
    sources: Sequence[Source]
    """What is merged; slerp's first is at t = 0."""
    base: Source | None
    """What deltas are taken from."""
    tasks: Sequence[Task]

    @property
    def partial(self) -> Path:
        """Where a search keeps its scores, and the model that is tried, until the output is there."""
        return self.output.with_name(self.output.name + ".partial")

    @property
    def every(self) -> Sequence[Source]:
        """All that is read: the models, and the base behind them."""
        return [*self.sources, *([] if self.base is None else [self.base])]

    @property
    def size_bytes(self) -> int:
        """Of the merged weights, at the dtypes of the first model."""
        return sum(weights.size_bytes for weights in self.sources[0].parts.values())

    def merge(self, weights: Sequence[float] = ()) -> Merge:
        """The merge with these weights, or the recipe's."""
        base = None if self.base is None else Tensors(self.base)
        return Merge(self.recipe, [Tensors(source) for source in self.sources], base, weights)


@dataclass(frozen=True)
class _Written:
    """Whose numbers a merge read and wrote."""

    output: str
    """The fingerprint of the merged model."""
    output_digests: Mapping[str, str]
    """Of its tensors, by full name."""
    ingredients: Sequence[str | None]
    """The fingerprints of the models, and of the base behind them; None of the checkpoints of a run."""


def split_words(words: Sequence[str], recipe: str | None) -> tuple[str | None, list[str]]:
    """(recipe, models) of what stands on the command line.

    A first word that ends in .yaml or .yml, or that is the name of one of gemb's recipes and of no folder, is
    a recipe; models behind it take the place of the recipe's own.
    """
    if recipe is None and words:
        first, *models = words
        if first.endswith((".yaml", ".yml")):
            return first, models
        if not Path(first).exists() and any(first == one.name for one in shipped_recipes()):
            return first, models
    return recipe, list(words)


def plan(recipe: MergeRecipe) -> Plan:
    """What `run` would do, for --dry-run; models are opened and compared, nothing is written.

    Raises GembError as `run` does before the first tensor.
    """
    setup = _prepare(recipe, ignore, overwrite=True)
    setup.merge()
    rows = [
        ("method", _method_shown(recipe)),
        *_ingredient_rows(setup),
        ("weights", f"{readable_bytes(setup.size_bytes)} to write"),
    ]
    if recipe.choose is not None:
        rows.append(("choose", f"{recipe.choose}, {counted(recipe.budget, 'merged model')} at most"))
    notes = _notes(setup)
    if setup.output.exists():
        notes.append(f"{setup.output} exists; the merge will need --overwrite")
    rows += [("note", note) for note in notes]
    return Plan(
        title=f"would merge {counted(len(setup.sources), 'model')} into {setup.output}",
        rows=rows,
        data={
            "method": recipe.merge_method,
            "models": [source.name for source in setup.sources],
            "base": None if setup.base is None else setup.base.name,
            "bytes": setup.size_bytes,
            "recipe": resolved(recipe),
            "notes": notes,
        },
        outputs=[setup.output],
    )


def run(recipe: MergeRecipe, on_progress: OnProgress = ignore, *, overwrite: bool = False) -> Report:
    """Merge what the recipe says; a search that was killed goes on with the scores that it had.

    `overwrite` lets the merged model take the place of a model that is there, which stays until then.

    Raises GembError for parameters that cannot be used and an output that exists, MismatchError for models
    that are not alike, UnavailableError for models and data that cannot be had or are damaged, MachineError
    where the disk is full; then there is no output.
    """
    from gemb.model.trainable.saving import appearing

    began = time.monotonic()
    setup = _prepare(recipe, on_progress, overwrite=overwrite)
    setup.merge()  # parameters show their problems before data are embedded
    alone = [
        scored(source.name, source.folder.path, setup.tasks, recipe, on_progress)
        for source in ([] if recipe.last else setup.sources)
        if setup.tasks
    ]
    trials = _searched(setup, alone, on_progress)
    weights = chosen(trials).weights if trials else ()
    verdict: Comparison | None = None
    with appearing(setup.output, overwrite=overwrite) as place:
        written = _write(setup, setup.merge(weights), place, on_progress)
        own = scored(setup.output.name, place, setup.tasks, recipe, on_progress) if setup.tasks else None
        best = max(alone, key=lambda one: one.mean, default=None)
        if own is not None and best is not None:
            verdict = own.against(best, recipe.seed)
        report = _report(setup, alone, own, verdict, trials, weights, time.monotonic() - began, written)
        _write_card(place, setup, report)
        write_json(place / "gemb.json", {"version": FORMAT, **report.data})
    # Remembered for the files where they are now: the first use of the model need not read them for it.
    identity_of(Source(setup.output.name, read_folder(setup.output)), written.output_digests)
    shutil.rmtree(setup.partial, ignore_errors=True)
    return report


def _prepare(recipe: MergeRecipe, on_progress: OnProgress, *, overwrite: bool) -> _Setup:
    """Everything that can be known before the first tensor is read."""
    from gemb.model.trainable.saving import check_absent

    if recipe.output is None:
        raise GembError("no output given; gemb merge A B C -o soup")
    output = recipe.output
    check_absent(output, overwrite=overwrite, hint="pass --overwrite")
    _check_search(recipe)

    def tell(line: str) -> None:
        on_progress(Event("opening", 0, note=line))

    if recipe.last is not None:
        recipe, sources = _with_checkpoints(recipe)
        base = None
    else:
        ingredients = recipe.ingredients()
        sources = [open_source(one.model, offline=recipe.offline, announce=tell) for one in ingredients]
        base = None
        if recipe.base_model is not None and recipe.merge_method != "slerp":
            base = open_source(recipe.base_model, offline=recipe.offline, announce=tell)
    check_alike([*sources, *([] if base is None else [base])])
    choices = Choices(None, None, None, seed=recipe.seed)
    tasks = [read_task(Path(name), choices) for name in recipe.data]
    setup = _Setup(recipe, output, sources, base, tasks)
    check_writable(output, setup.size_bytes)
    return setup


def _check_search(recipe: MergeRecipe) -> None:
    if recipe.choose is not None and not recipe.data:
        raise GembError("--choose compares merged models on data; name some with --data")
    if recipe.fail_on_regression and not recipe.data:
        raise GembError("--fail-on-regression compares models on data; name some with --data")
    if recipe.choose == "greedy" and recipe.merge_method != "linear":
        raise GembError(f"a greedy soup is linear, not {recipe.merge_method}; take --choose weights")
    if recipe.choose is not None and recipe.merge_method in ("slerp", "model_stock"):
        raise GembError(f"{recipe.merge_method} has no weights to search")
    if recipe.choose is not None and recipe.weights:
        raise GembError("--choose looks for the weights; leave out --weights")
    if recipe.choose is not None and recipe.last is not None:
        raise GembError("checkpoints of a run have weights by --decay; leave out --choose")
    if recipe.decay is not None and recipe.last is None:
        raise GembError("--decay weighs the checkpoints of --last; give both")


def _with_checkpoints(recipe: MergeRecipe) -> tuple[MergeRecipe, list[Source]]:
    """The recipe with the checkpoints of its one run as models, and those."""
    if len(recipe.models) != 1 or recipe.last is None or recipe.merge_method not in ("linear", "karcher"):
        raise GembError(
            f"--last averages the checkpoints of one run by linear or karcher; given are "
            f"{counted(len(recipe.models), 'model')} and {recipe.merge_method}"
        )
    sources = checkpoints_of(recipe.models[0].model, recipe.last, offline=recipe.offline)
    decay = 1.0 if recipe.decay is None else recipe.decay
    weights = tuple(decay**age for age in reversed(range(len(sources))))
    models = tuple(Ingredient(model=source.name) for source in sources)
    return recipe.model_copy(update={"models": models, "weights": weights}), sources


def _searched(setup: _Setup, alone: Sequence[Scored], on_progress: OnProgress) -> list[Trial]:
    """The trials of the recipe's search; none without one."""
    recipe = setup.recipe
    if recipe.choose is None:
        return []

    def score_of(weights: tuple[float, ...]) -> float:
        place = setup.partial / "trial"
        shutil.rmtree(place, ignore_errors=True)
        try:
            place.mkdir()
            _write(setup, setup.merge(weights), place, on_progress)
            return scored("a trial", place, setup.tasks, recipe, on_progress).mean
        finally:
            shutil.rmtree(place, ignore_errors=True)

    with os_errors_explained(setup.partial):
        setup.partial.mkdir(parents=True, exist_ok=True)
    with ScoreLog(setup.partial / "scores.jsonl", _asked(setup)) as log:
        if log.known:
            on_progress(Event("searching", 0, note=f"{counted(log.known, 'score')} kept of an earlier run"))
        known_or_new = partial(log.score, compute=score_of)
        if recipe.choose == "greedy":
            return list(greedy([one.mean for one in alone], known_or_new, recipe.budget))
        names = list(Tensors(setup.sources[0]))
        first = recipe.settings(names[0], layers_of(names)).weights
        return list(mixtures(first, known_or_new, recipe.budget, recipe.seed))


def _asked(setup: _Setup) -> str:
    """Digest of all that the score of merged weights depends on, besides the weights."""
    recipe = setup.recipe
    free = {"output", "weights", "choose", "budget", "device", "threads", "max_memory", "offline"}
    asked = {
        "recipe": {name: value for name, value in resolved(recipe).items() if name not in free},
        "models": [fingerprint(source.folder) for source in setup.every],
        "data": [data_digest(Path(name)) for name in recipe.data],
        "versions": versions(),
    }
    return hashlib.blake2b(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS), digest_size=16).hexdigest()


def _write(setup: _Setup, merge: Merge, place: Path, on_progress: OnProgress) -> _Written:
    """A whole model folder at `place`: the files of the first model, the weights merged.

    What has not been fingerprinted before is hashed while it passes by.
    """
    import torch

    from gemb.model.trainable.saving import copy_files

    source = setup.sources[0]
    folder = source.folder
    parts = source.parts
    total, done = sum(len(weights) for weights in parts.values()), 0

    def tell(name: str) -> None:
        nonlocal done
        done += 1
        on_progress(Event("merging", min(done, total), total, unit="tensors"))

    for each in {folder.path, folder.tokenizer_folder, *(module.folder for module in folder.modules)}:
        copy_files(each, place / each.relative_to(folder.path))
    hashing_threads = setup.recipe.threads or available_threads()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums wait for memory: a second thread only spins
    try:
        merge.prepare(lambda line: on_progress(Event(line, 0, unit="tensors")))
        with ThreadPoolExecutor(hashing_threads) as threads_of_hashing:
            pool = threads_of_hashing if hashing_threads > 1 else None
            ingredients = [
                None if one.checkpoint is not None or is_fingerprinted(one.folder) else PassingDigests(pool)
                for one in setup.every
            ]
            output = PassingDigests(pool)
            for part, weights in parts.items():
                path = place / part / "model.safetensors"
                merge.write(part, weights, path, tell, ingredients, output, pool)
            digests = [{} if passing is None else passing.finish() for passing in ingredients]
            output_digests = output.finish()
    finally:
        torch.set_num_threads(threads)
    dtype = setup.recipe.out_dtype or setup.recipe.dtype
    if dtype is not None:
        _declare(place / folder.transformer.folder.relative_to(folder.path) / "config.json", dtype)
    return _Written(
        identity_of(Source(setup.output.name, read_folder(place)), output_digests),
        output_digests,
        [
            None if one.checkpoint is not None else identity_of(one, known)
            for one, known in zip(setup.every, digests, strict=True)
        ],
    )


def _declare(file: Path, dtype: str) -> None:
    """Let config.json say which dtype the weights have now; transformers loads them so."""
    config = read_json(file)
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) is not None:
                part[key] = dtype
    write_json(file, config)


def _report(
    setup: _Setup,
    alone: Sequence[Scored],
    own: Scored | None,
    verdict: Comparison | None,
    trials: Sequence[Trial],
    weights: Sequence[float],
    seconds: float,
    written: _Written,
) -> Report:
    recipe = setup.recipe
    rows = [("method", _method_shown(recipe)), *_ingredient_rows(setup, weights)]
    rows.append(("model", f"{setup.output} ({written.output[:12]})"))
    data: dict[str, object] = {
        "output": str(setup.output),
        "fingerprint": written.output,
        "method": recipe.merge_method,
        "seconds": round(seconds, 3),
        "ingredients": [
            {"model": source.name, **({"fingerprint": identity} if identity else {})}
            for source, identity in zip(setup.sources, written.ingredients, strict=False)
        ],
        "base": None
        if setup.base is None
        else {"model": setup.base.name, "fingerprint": written.ingredients[-1]},
        "weights": list(weights) or None,
        "recipe": resolved(recipe),
        "versions": versions(),
    }
    tables = []
    if own is not None:
        rows.append(("score", f"{own.mean:.4f}" + _best_shown(alone)))
        data["scores"] = {one.name: one.mean for one in (*alone, own)}
        tables.append(_scores_table(setup.tasks, [*alone, own]))
    if verdict is not None:
        rows.append((
            "verdict",
            f"{verdict.verdict} against the best model: {verdict.difference:+.4f} "
            f"({verdict.low:+.4f} to {verdict.high:+.4f} in 95 % of draws)",
        ))  # fmt: skip
        data["verdict"] = {
            "verdict": verdict.verdict,
            "difference": verdict.difference,
            "low": verdict.low,
            "high": verdict.high,
        }
    if trials:
        data["trials"] = [
            {"weights": trial.weights, "score": trial.score, "origin": trial.origin} for trial in trials
        ]
        tables.append(_trials_table(trials, [source.name for source in setup.sources]))
        rows.append(("note", "weights were chosen on the data of the verdict; measure on others, too"))
    rows += [("note", note) for note in _notes(setup)]
    failed = recipe.fail_on_regression and verdict is not None and verdict.verdict == "REGRESSION"
    return Report(
        title=f"merged {counted(len(setup.sources), 'model')} into {setup.output} in {seconds:.1f} s",
        rows=rows,
        data=data,
        outputs=[setup.output],
        tables=tables,
        exit_code=Exit.GATE if failed else Exit.DONE,
    )


def _notes(setup: _Setup) -> list[str]:
    """What the user should know of the models."""
    places = Counter(source.folder.path.resolve() for source in setup.sources if source.checkpoint is None)
    notes = [f"{place} is given {count} times" for place, count in places.items() if count > 1]
    for source in setup.sources:
        record = source.folder.path / "gemb.json"
        trained = read_json(record).get("qat") if record.is_file() else None
        if isinstance(trained, dict):
            notes.append(
                f"{source.name} was trained for the {trained.get('format')} grid, and a mean of weights lies "
                "off it: gemb quantize will cost the merged model what it costs any other"
            )
    return notes


def _method_shown(recipe: MergeRecipe) -> str:
    rules = " by mergekit's rules" if recipe.variant == "mergekit" else ""
    return f"{recipe.merge_method}{rules}"


def _ingredient_rows(setup: _Setup, weights: Sequence[float] = ()) -> list[tuple[str, str]]:
    shown = weights or setup.recipe.weights
    rows = [("base", setup.base.name)] if setup.base is not None else []
    for place, source in enumerate(setup.sources):
        weight = f", weight {shown[place]:.4g}" if shown else ""
        rows.append(("from", f"{source.name}{weight}"))
    return rows


def _best_shown(alone: Sequence[Scored]) -> str:
    best = max(alone, key=lambda one: one.mean, default=None)
    return "" if best is None else f"; the best model alone {best.mean:.4f} ({best.name})"


def _scores_table(tasks: Sequence[Task], models: Sequence[Scored]) -> Table:
    names = [f"{task.name} {score.metric}" for task, score in zip(tasks, models[0].scores, strict=True)]
    columns = ["model", *names, "mean"]
    rows = [[one.name, *(f"{score.value:.4f}" for score in one.scores), f"{one.mean:.4f}"] for one in models]
    return Table(columns, rows, right_aligned=columns[1:])


def _trials_table(trials: Sequence[Trial], names: Sequence[str]) -> Table:
    columns = ["origin", *names, "score"]
    rows = [
        [trial.origin, *(f"{weight:.3f}" for weight in trial.weights), f"{trial.score:.4f}"]
        for trial in trials
    ]
    return Table(columns, rows, title="tried", right_aligned=columns[1:])


def _write_card(place: Path, setup: _Setup, report: Report) -> None:
    """README.md: what was merged and how, and what it reached."""
    names = [source.name for source in setup.sources]
    head = yaml.safe_dump(
        {
            "library_name": "sentence-transformers",
            "pipeline_tag": "sentence-similarity",
            "tags": ["sentence-transformers", "sentence-similarity", "feature-extraction", "gemb", "merge"],
            "base_model": names,
            "base_model_relation": "merge",
        },
        sort_keys=False,
    )
    lines = [f"- {label}: {value}" for label, value in report.rows]
    tables = ["\n".join(_markdown(table)) for table in report.tables]
    parts = [
        f"---\n{head}---",
        f"# {setup.output.name}",
        f"{counted(len(names), 'model')} merged with gemb {versions()['gemb']}.",
        "\n".join(lines),
        *tables,
        "## Recipe",
        "```yaml\n" + yaml.safe_dump(resolved(setup.recipe), sort_keys=False).rstrip() + "\n```",
        "The licences of the merged models apply to this model as well.",
    ]
    with atomic_write(place / "README.md") as file:
        file.write(("\n\n".join(parts) + "\n").encode())


def _markdown(table: Table) -> list[str]:
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    return [f"| {' | '.join(row)} |" for row in rows]

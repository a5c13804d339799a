"""`gemb mine`: pairs in, the same pairs with hard negatives out.

    report = run(MineRecipe(pairs=("pairs.jsonl",), output=Path("mined.jsonl"), model="minilm"))

The work has stages, each kept in OUTPUT.partial and gone on with by the same command: the different texts are
collected, passages and queries are embedded (`gemb.jobs.embed`), and rows are mined block by block
(`gemb.jobs.mining`). See docs/mine.md for what users are promised.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from gemb.errors import Exit, GembError, Interrupted
from gemb.files import (
    Lock,
    atomic_write,
    check_writable,
    file_digest,
    free_bytes,
    os_errors_explained,
    read_json,
    readable_bytes,
    write_json,
)
from gemb.jobs import embed
from gemb.jobs.interrupts import Interrupts
from gemb.jobs.mining import Miner, Scorer, Tally, collect
from gemb.jobs.planning import COUNT_SECONDS
from gemb.jobs.record import done_already, keep_record, record_path, versions
from gemb.jobs.reporting import duration_of
from gemb.jobs.request import InputIdentity, Request, other_version, refuse
from gemb.jobs.setup import OpenEngine, check_apart, dims_of
from gemb.mining.graph import GraphSearch
from gemb.mining.rules import Pick, Rules
from gemb.mining.texts import PASSAGES, QUERIES, TextSet
from gemb.mining.vectors import Search, exact_search
from gemb.model.folder import ModelFolder, fingerprint, read_folder
from gemb.model.hub import DEFAULT_MODEL, find_model
from gemb.recipe import ComputeRecipe, ModelName, RecipeInput, RecipePath, resolved
from gemb.report import Event, OnProgress, Plan, Report, Table, counted, ignore
from gemb.text.inputs import InputFile, resolve_inputs
from gemb.text.prompts import QUERY, Prompts
from gemb.training.data_recipe import NO_PROMPTS, ColumnNames, DataSet
from gemb.training.documents import beir_files
from gemb.training.examples import OnRows, Rows, open_rows
from gemb.vectors.layout import OutputFile

__all__ = ["MineRecipe", "plan", "run"]

FORMAT = 1
"""Of a work folder."""
PLANNED_ROWS = 50_000
"""Rows of the pairs that a dry run reads at most."""
_COLUMNS_HINT = "--set 'columns={query: A, positive: B}'"


class MineRecipe(ComputeRecipe):
    """What `gemb mine` is asked to do."""

    kind: ClassVar[str] = "mine"

    pairs: tuple[RecipeInput, ...] = ()
    """Files of queries with their positives (.jsonl, .csv, .tsv, .parquet), or one BEIR folder."""
    corpus: RecipeInput | None = None
    """More passages to mine from (id, text, title); the positives of all rows are always among them."""
    output: RecipePath | None = None
    """The .jsonl file for the rows with their negatives."""
    negatives: int = Field(default=5, ge=1)
    """Hard negatives a row, at most."""
    first_rank: int = Field(default=1, ge=1)
    """Rank of the closest passage that may be a negative; positives and their duplicates take no rank."""
    last_rank: int = Field(default=100, ge=1)
    """Rank of the last passage that may be a negative."""
    relative_margin: float | None = Field(default=0.05, ge=0)
    """A negative scores below positive - |positive| times this, right below zero, too; none turns it off."""
    absolute_margin: float | None = Field(default=None, ge=0)
    """A negative scores below positive minus this; none turns it off."""
    min_score: float | None = None
    """A negative scores at least this."""
    max_score: float | None = None
    """A negative scores at most this."""
    pick: Pick = "top"
    """Of the passages that fit: top the closest, random a sample, last the least close."""
    seed: int = Field(default=42, ge=0)
    """Of the sample."""
    second: ModelName | None = None
    """Another model that checks: a negative keeps the margins by both, and the ranks of both are fused."""
    scores: Literal["first", "second", "none"] = "first"
    """Whose scores are written as pos_scores and neg_scores."""
    graph: bool = False
    """Find passages by a graph, which is for millions and misses a few; by default all are compared."""
    query_as: str | None = None
    """The prompt of queries: a prompt's name, or none; by default query."""
    passage_as: str | None = None
    """The prompt of passages: a prompt's name, or none; by default document."""
    dims: int | None = Field(default=None, ge=1)
    """Compare only so many leading dims (Matryoshka), at unit length again."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest text in tokens; by default what the model declares."""
    cache: RecipePath | None = None
    """A folder that keeps vectors by content, so that mining again with other rules embeds nothing."""
    columns: ColumnNames | None = None
    """Which column has which role, where their names do not tell."""
    shape: Literal["auto", "pairs"] = "auto"
    """What a row is; pairs for rows with a label or score that is to be left alone."""
    split: str | None = None
    """Which qrels/SPLIT.tsv of a BEIR folder is read; by default train."""
    limit: int | None = Field(default=None, ge=1)
    """Usable rows to take, from the first on; by default all."""
    wait_lock: float = Field(default=0.0, ge=0)
    """Seconds to wait while another run holds the output."""

    @field_validator("relative_margin", "absolute_margin", mode="before")
    @classmethod
    def _none_by_name(cls, value: object) -> object:
        """The word none says on the command line what null says in a file."""
        return None if value == "none" else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.last_rank - self.first_rank + 1 < self.negatives:
            raise ValueError(
                f"ranks {self.first_rank} to {self.last_rank} hold fewer passages than negatives: "
                f"{self.negatives}; raise last_rank"
            )
        if self.min_score is not None and self.max_score is not None and self.min_score > self.max_score:
            raise ValueError(f"min_score is {self.min_score}, above max_score {self.max_score}")
        if self.scores == "second" and self.second is None:
            raise ValueError("scores: second needs a second model; name it under second")
        return self

    def rules(self) -> Rules:
        """What a hard negative is."""
        return Rules(
            count=self.negatives,
            first_rank=self.first_rank,
            last_rank=self.last_rank,
            absolute_margin=self.absolute_margin,
            relative_margin=self.relative_margin,
            min_score=self.min_score,
            max_score=self.max_score,
            pick=self.pick,
            seed=self.seed,
        )


@dataclass(frozen=True)
class _Setup:
    """A recipe with everything looked up that can be known before the work."""

    recipe: MineRecipe
    output: Path
    data: DataSet
    corpus: InputFile | None
    files: tuple[InputFile, ...]
    """Of the rows; none of a BEIR folder, whose rows stand in no file."""
    inputs: tuple[InputFile, ...]
    """Every file that is read."""
    models: tuple[ModelFolder, ...]
    """The first, and the second if there is one."""

    @property
    def work(self) -> Path:
        return self.output.with_name(self.output.name + ".partial")

    @property
    def finished_work(self) -> Path:
        """What the work folder is called while it is removed."""
        return self.work.with_name(self.work.name + ".done")

    @property
    def rejects_file(self) -> Path:
        """Where rows go that cannot be used."""
        return self.output.with_name(self.output.name + ".rejects.jsonl")

    @property
    def has_rows(self) -> bool:
        """Whether the work folder holds rows that were read to their end."""
        return any((self.work / "rows").glob("*/prepared.json"))

    @property
    def names(self) -> tuple[str, ...]:
        """The models as the user called them."""
        own = self.recipe.model or DEFAULT_MODEL
        return (own,) if self.recipe.second is None else (own, self.recipe.second)

    def request(self, known: tuple[InputIdentity, ...] = ()) -> Request:
        """What the output depends on."""
        recipe = self.recipe
        left_out = {
            *("pairs", "corpus", "output", "model", "second", "device", "threads", "batch_tokens", "offline"),
            *("cache", "wait_lock"),
        }
        settings = recipe.model_dump(mode="json", by_alias=True, exclude=left_out)
        first = Prompts(self.models[0].prompts, self.models[0].default_prompt)
        template = first.template(recipe.query_as or QUERY)
        return Request(
            model=fingerprint(self.models[0]),
            model_name=self.names[0],
            prompt={"name": template.name, "text": template.prefix},
            settings={
                **{name.replace("_", "-"): value for name, value in settings.items()},
                "second": fingerprint(self.models[1])[:12] if len(self.models) > 1 else None,
            },
            inputs=tuple(InputIdentity.of(file, known) for file in self.inputs),
        )


def plan(recipe: MineRecipe, *, overwrite: bool = False, open_engine: OpenEngine | None = None) -> Plan:
    """What `run` would do, for --dry-run: rows, texts, tokens, sizes and time. Writes nothing that stays.

    Reads PLANNED_ROWS rows and COUNT_SECONDS of the corpus at most, as `run` would. Raises GembError as `run`
    does before the work, for rows that cannot be used, too, and for what another request left.
    """
    setup = _prepare(recipe)
    found = _found(setup, overwrite=overwrite)
    with TemporaryDirectory(prefix="gemb-mine-") as folder:
        return _planned(setup, found, Path(folder), open_engine)


def _planned(
    setup: _Setup, found: Request | Report | None, work: Path, open_engine: OpenEngine | None
) -> Plan:
    """The plan, from the texts collected in an empty folder."""
    recipe = setup.recipe
    limit = min(recipe.limit or PLANNED_ROWS, PLANNED_ROWS)
    try:
        rows = _open_rows(setup.data.model_copy(update={"limit": limit}), work / "rows")
    except GembError as error:
        told, in_folder, _ = str(error).partition(f"; all are in {work}")
        if not in_folder:
            raise
        raise GembError(told) from error  # the file of all rejects goes with the folder
    with rows:
        complete = collect(
            rows, setup.corpus, work, lambda *_: None, stop_at=time.monotonic() + COUNT_SECONDS
        )
        complete &= rows.size < PLANNED_ROWS or recipe.limit == PLANNED_ROWS
        size, rejected, first_rejects = rows.size, rows.prepared.rejected, rows.prepared.first_rejects
    with TextSet(work) as texts:
        passages, queries, left_out, first_left_out = (
            texts.passages, texts.queries, texts.left_out, texts.first_left_out,
        )  # fmt: skip
    kept = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    passage_bytes = (work / PASSAGES).stat().st_size / passages
    row_bytes = (work / QUERIES).stat().st_size / queries + (1 + recipe.negatives) * passage_bytes
    embedded = [
        embed.plan(_embed_recipe(setup, number, name, work), open_engine=open_engine).data
        for number in range(len(setup.models))
        for name in (PASSAGES, QUERIES)
    ]
    complete &= all(data["rows_complete"] for data in embedded)
    tokens, seconds, vector_bytes = (
        sum(cast(float, data[key] or 0) for data in embedded) for key in ("tokens", "seconds", "bytes_needed")
    )
    # The mined rows lie in the work folder while they are copied to the output.
    needed = round(kept + vector_bytes + 2 * size * row_bytes)
    free = free_bytes(setup.output)
    about = "" if complete else "at least "
    notes = []
    if isinstance(found, Report):
        notes.append(f"{setup.output} is what is asked for: the run finds it done")
    elif found is not None:
        notes.append(f"{setup.work} is there from the same request: the run goes on with it")
    else:
        notes += [f"{path} is replaced" for path in (setup.output, setup.work) if path.exists()]
    if recipe.cache is not None:
        notes.append(f"the vectors that {recipe.cache} has are not computed again")
    shown = [
        ("pairs", f"{', '.join(recipe.pairs)}: {about}{counted(size, 'row')}"),
        ("passages", f"{about}{passages:,} different ones, {_passages_shown(setup)}"),
        ("queries", f"{about}{queries:,} different ones"),
        ("model", " and ".join(setup.names)),
        ("negatives", _rules_shown(recipe)),
        ("device", str(embedded[0]["device"])),
        ("tokens", f"{about or 'about '}{tokens:,.0f}"),
        ("time", f"{about or 'about '}{duration_of(seconds)} to embed; the search comes on top"),
        ("disk", f"{about or 'about '}{readable_bytes(needed)} needed, {readable_bytes(free)} free"),
    ]
    if rejected:
        shown.append(("rejected", f"{counted(rejected, 'row')}, the first {first_rejects[0]}"))
    if left_out:
        shown.append(("corpus", f"{counted(left_out, 'row')} left out, the first {first_left_out}"))
    shown += [("note", note) for note in notes]
    return Plan(
        title=f"would mine hard negatives for {about}{counted(size, 'row')} into {setup.output}",
        rows=shown,
        data={
            "recipe": resolved(recipe),
            "request": setup.request().as_json(),
            "rows": size,
            "rows_complete": complete,
            "rejected": rejected,
            "passages": passages,
            "passages_left_out": left_out,
            "queries": queries,
            "tokens": round(tokens),
            "seconds": round(seconds, 3),
            "bytes_needed": needed,
            "bytes_free": free,
            "notes": notes,
        },
        outputs=[setup.output],
    )


def run(
    recipe: MineRecipe,
    on_progress: OnProgress = ignore,
    *,
    overwrite: bool = False,
    open_engine: OpenEngine | None = None,
) -> Report:
    """Mine what the recipe says, or go on where an earlier run of it was stopped.

    `overwrite` replaces an output that exists, and drops what another request left unfinished.
    `open_engine` is for other engines than torch.

    Raises GembError with an exit code as docs/mine.md lists them; Interrupted after SIGINT or SIGTERM, when
    the state is saved (only in the main thread).
    """
    began = time.monotonic()
    with (
        Interrupts("interrupted before anything was mined; nothing is lost") as interrupts,
        ExitStack() as stack,
    ):
        with interrupts.at_once():
            setup = _prepare(recipe, announce=lambda line: on_progress(Event("mining", 0, note=line)))
            check_writable(setup.output)
            lock_file = setup.output.with_name(setup.output.name + ".lock")
            stack.enter_context(Lock(lock_file, str(setup.output), recipe.wait_lock))
            request = _begin(setup, overwrite=overwrite)
            if isinstance(request, Report):
                return request
        try:
            return _Job(setup, request, interrupts, on_progress, open_engine).run(began)
        except Interrupted as error:
            raise Interrupted(
                f"interrupted; what is done is kept in {setup.work}, run the same command again to go on",
                error.exit_code,
            ) from error


def _prepare(recipe: MineRecipe, announce: Callable[[str], None] = lambda _: None) -> _Setup:
    """Everything that can be checked before the work, checked; cheap things first."""
    if recipe.output is None:
        raise GembError("no output given; pass -o mined.jsonl")
    if recipe.output.suffix != ".jsonl":
        raise GembError(f"{recipe.output}: mined rows are written as .jsonl; choose such a name")
    if not recipe.pairs:
        raise GembError("no pairs given; gemb mine pairs.jsonl -o mined.jsonl")
    if not recipe.output.absolute().parent.is_dir():
        raise GembError(f"{recipe.output}: there is no folder {recipe.output.parent}; make it first")
    split = recipe.split or "train"
    beir = beir_files(recipe.pairs[0], split) if len(recipe.pairs) == 1 else None
    corpus = recipe.corpus if beir is None else recipe.corpus or str(beir[0].path)
    passages = None if corpus is None else resolve_inputs([corpus])[0]
    data = DataSet(
        path=recipe.pairs,
        prompts=NO_PROMPTS,
        shape=recipe.shape,
        columns=recipe.columns,
        corpus=None if beir else recipe.corpus,
        split=split,
        limit=recipe.limit,
    )
    files = beir if beir is not None else tuple(resolve_inputs(recipe.pairs))
    known = {file.path for file in files}
    extra = (passages,) if passages is not None and passages.path not in known else ()
    inputs = (*files, *extra)
    for file in inputs:
        if file.is_stream:
            raise GembError(f"{file.name}: the rows are read many times; save the stream to a file")
    check_apart(recipe.output, inputs)
    wanted = [recipe.model] if recipe.second is None else [recipe.model, recipe.second]
    models = tuple(
        read_folder(find_model(model, offline=recipe.offline, announce=announce)) for model in wanted
    )
    first = Prompts(models[0].prompts, models[0].default_prompt)
    for name in (recipe.query_as or QUERY, recipe.passage_as):
        first.template(name)  # an unknown name shows now
    dims_of(models[0], recipe.model or DEFAULT_MODEL, recipe.dims, force=False)
    return _Setup(recipe, recipe.output, data, passages, () if beir else files, inputs, models)


def _begin(setup: _Setup, *, overwrite: bool) -> Request | Report:
    """The request, with its work folder made or found again; or the report of a job that is done."""
    work = setup.work
    with os_errors_explained(setup.finished_work):
        if setup.finished_work.exists():  # of a run that was killed while it tidied up
            shutil.rmtree(setup.finished_work)
    found = _found(setup, overwrite=overwrite)
    if found is not None:
        return found
    request = setup.request()
    with os_errors_explained(work):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
    write_json(work / "job.json", {"format": FORMAT, "request": request.as_json(), "versions": versions()})
    return request


def _found(setup: _Setup, *, overwrite: bool) -> Request | Report | None:
    """The unfinished job of this request, the report of the finished one, or None where to begin anew.

    Raises GembError for what is there and is not this request's, unless `overwrite`.
    """
    work, job = setup.work, setup.work / "job.json"
    begun = _begun(job, overwrite=overwrite)
    if begun is not None:
        differences = begun.differences(setup.request(begun.inputs))
        if not differences:
            return begun
        # Without rows nothing was done that could be lost.
        if not overwrite and setup.has_rows:
            raise refuse(
                f"{work} was begun by another request",
                differences,
                "run that request again to finish it, or pass --overwrite to start anew",
            )
    if overwrite:
        return None
    done = done_already(setup.output, [setup.output], setup.request)
    if done is None and not job.exists():
        with os_errors_explained(work):
            # Hidden files are those of a write that was killed.
            if work.exists() and any(not path.name.startswith(".") for path in work.iterdir()):
                raise GembError(f"{work} is in the way and is not gemb's; move it, or choose another output")
    return done


def _begun(job: Path, *, overwrite: bool) -> Request | None:
    """The request of the unfinished job that is there, if any; one that cannot be read is overwritten."""
    if not job.exists():
        return None
    try:
        kept = read_json(job)
        if kept.get("format") != FORMAT:
            raise other_version(job)
        return Request.from_json(kept.get("request"), job)
    except GembError:
        if overwrite:
            return None
        raise


class _Job:
    """One run, from its work folder to its report."""

    def __init__(
        self,
        setup: _Setup,
        request: Request,
        interrupts: Interrupts,
        on_progress: OnProgress,
        open_engine: OpenEngine | None,
    ) -> None:
        self._setup = setup
        self._request = request
        self._interrupts = interrupts
        self._on_progress = on_progress
        self._open_engine = open_engine
        self._embedded: list[dict[str, object]] = []

    def run(self, began: float) -> Report:
        """All stages, from where an earlier run stopped."""
        setup, work = self._setup, self._setup.work
        with ExitStack() as stack:
            with self._interrupts.at_once():
                rows = stack.enter_context(self._rows())
                if not TextSet.is_whole(work):
                    collect(rows, setup.corpus, work, self._heard("reading"))
                texts = stack.enter_context(TextSet(work))
            scorers = [self._scorer(number, texts) for number in range(len(setup.models))]
            miner = stack.enter_context(
                Miner(
                    rows,
                    texts,
                    scorers,
                    self._search(scorers[0]),
                    setup.recipe.rules(),
                    work,
                    files=setup.files,
                    columns=setup.recipe.columns,
                    written={"first": 0, "second": 1, "none": None}[setup.recipe.scores],
                )
            )
            tally = miner.run(self._interrupts.stop, self._heard("mining"))
            if self._interrupts.exit_code is not None and tally.rows < rows.size:
                raise Interrupted("interrupted", self._interrupts.exit_code)
            if setup.request(self._request.inputs).differences(self._request):
                raise GembError("an input changed while it was read; once it is at rest, pass --overwrite")
            report = self._report(rows, texts, tally, time.monotonic() - began)
            self._publish(rows, miner.path, report)
        return report

    def _rows(self) -> Rows:
        work = self._setup.work
        try:
            return _open_rows(self._setup.data, work / "rows", self._reading)
        except GembError as error:
            # A request that can never finish leaves nothing, unless the message names the rejects it left.
            if error.exit_code == Exit.USAGE and not TextSet.is_whole(work) and str(work) not in str(error):
                shutil.rmtree(work, ignore_errors=True)
            raise

    def _reading(self, name: str, rows: int) -> None:
        self._on_progress(Event(f"reading {name}", rows))

    def _heard(self, stage: str) -> Callable[[int, int | None], None]:
        return lambda done, total: self._on_progress(Event(stage, done, total))

    def _scorer(self, number: int, texts: TextSet) -> Scorer:
        """The vectors of one model, embedded unless they are there."""
        with self._interrupts.at_once():  # a signal between two jobs is heard here
            pass
        paths = []
        for name in (PASSAGES, QUERIES):
            what = name.removesuffix(".jsonl")
            wanted = _embed_recipe(self._setup, number, name, self._setup.work)
            report = embed.run(wanted, self._renamed(f"embedding {what}"), open_engine=self._open_engine)
            self._embedded.append({"texts": what, "model": self._setup.names[number], **report.data})
            paths.append(cast(Path, wanted.output))
        return Scorer.open(paths[0], paths[1], texts)

    def _search(self, scorer: Scorer) -> Search:
        if not self._setup.recipe.graph:
            return exact_search(scorer.passages)
        with self._interrupts.at_once():
            path = self._setup.work / "passages.usearch"
            return GraphSearch(scorer.passages, path, self._heard("building the graph")).candidates

    def _renamed(self, stage: str) -> OnProgress:
        return lambda event: self._on_progress(replace(event, stage=stage))

    def _report(self, rows: Rows, texts: TextSet, tally: Tally, seconds: float) -> Report:
        setup, recipe = self._setup, self._setup.recipe
        short = tally.rows - tally.by_count.get(recipe.negatives, 0)
        shown = [
            ("model", " and ".join(setup.names)),
            ("passages", f"{texts.passages:,} different ones, {_passages_shown(setup)}"),
            ("queries", f"{texts.queries:,} different ones"),
            ("rules", _rules_shown(recipe)),
            ("too close", f"{counted(tally.too_close, 'passage')} left out as possible positives"),
        ]
        if texts.left_out:
            left_out = counted(texts.left_out, "row")
            shown.append(("corpus", f"{left_out} left out, the first {texts.first_left_out}"))
        if rows.prepared.rejected:
            first = rows.prepared.first_rejects[0]
            shown.append(
                (
                    "rejected",
                    f"{counted(rows.prepared.rejected, 'row')}, the first {first}; see {setup.rejects_file}",
                )
            )
        for one in self._embedded:
            for key, said in (("rejected", "have no vector"), ("truncated", "were cut")):
                if one.get(key):
                    shown.append((str(one["texts"]), f"{one[key]:,} {said} ({one['model']})"))
        if short:
            shown.append(("fewer", f"{counted(short, 'row')} got fewer than {recipe.negatives}"))
        shown.append(("train with", _columns_shown(recipe)))
        return Report(
            title=f"mined {counted(tally.negatives, 'hard negative')} for {counted(tally.rows, 'row')} "
            f"into {setup.output} in {seconds:.1f} s",
            rows=shown,
            data={
                "output": str(setup.output),
                "rows": tally.rows,
                "rejected": rows.prepared.rejected,
                "precision": self._embedded[0].get("precision"),
                "negatives": tally.negatives,
                "rows_by_negatives": {str(count): tally.by_count[count] for count in sorted(tally.by_count)},
                "fewer": short,
                "fewer_because": tally.shortages,
                "too_close": tally.too_close,
                "passages": texts.passages,
                "passages_left_out": texts.left_out,
                "queries": texts.queries,
                "models": list(setup.names),
                "embedded": self._embedded,
                "seconds": round(seconds, 3),
            },
            outputs=[setup.output],
            tables=_tables(tally, recipe.negatives),
            exit_code=Exit.REJECTED if rows.prepared.rejected else Exit.DONE,
        )

    def _publish(self, rows: Rows, mined: Path, report: Report) -> None:
        setup = self._setup
        file = OutputFile(setup.output, mined.stat().st_size, file_digest(mined))
        # The record of what stood there before is no record of what comes in its place.
        record_path(setup.output).unlink(missing_ok=True)
        with os_errors_explained(setup.output):
            # A copy: a run that is killed before the record is written finds the mined rows again.
            with mined.open("rb") as source, atomic_write(setup.output) as target:
                shutil.copyfileobj(source, target)
            if rows.prepared.rejected:
                shutil.copyfile(rows.rejects_path, setup.rejects_file)
        keep_record(setup.output, self._request, report, [file], resolved(setup.recipe))
        with os_errors_explained(setup.work):
            # In one step, so that no part of it can be taken for a job that is to be gone on with.
            setup.work.rename(setup.finished_work)
            shutil.rmtree(setup.finished_work)


def _open_rows(data: DataSet, cache: Path, on_rows: OnRows = lambda *_: None) -> Rows:
    """The rows, prepared below `cache`. Raises GembError unless they are queries with positives."""
    try:
        rows = open_rows(data, cache, on_rows=on_rows)
    except GembError as error:
        if data.columns is None and "under columns:" in str(error):
            raise GembError(f"{error}; on the command line: {_COLUMNS_HINT}") from error
        raise
    if rows.shape != "pairs":
        shape = rows.shape
        rows.close()
        raise GembError(
            f"{rows.name}: the rows are {shape}, not queries with positives; "
            f"say which column is which with {_COLUMNS_HINT}, or pass --shape pairs"
        )
    return rows


def _embed_recipe(setup: _Setup, number: int, name: str, work: Path) -> embed.EmbedRecipe:
    """How a model, by number, embeds PASSAGES or QUERIES of a work folder."""
    recipe = setup.recipe
    own = number == 0  # the second model has its own prompts, sizes and lengths
    as_ = recipe.query_as if name == QUERIES else recipe.passage_as
    return embed.EmbedRecipe(
        inputs=(str(work / name),),
        output=work / (name.removesuffix(".jsonl") + (".npy" if own else ".second.npy")),
        model=setup.names[number],
        as_=(as_ if own else None) or (QUERY if name == QUERIES else None),
        dims=recipe.dims if own else None,
        normalise=True,
        max_tokens=recipe.max_tokens if own else None,
        on_error="skip",
        cache=recipe.cache,
        device=recipe.device,
        precision=recipe.precision,
        engine="torch",  # queries and passages alike, however few either are
        threads=recipe.threads,
        batch_tokens=recipe.batch_tokens,
        offline=recipe.offline,
    )


def _tables(tally: Tally, wanted: int) -> list[Table]:
    """How many rows got how many negatives, and why some got fewer."""
    rows = [[str(count), f"{tally.by_count[count]:,}"] for count in sorted(tally.by_count, reverse=True)]
    tables = [Table(["negatives", "rows"], rows, right_aligned=["negatives", "rows"])]
    if tally.shortages:
        reasons: Iterable[tuple[str, int]] = sorted(tally.shortages.items(), key=lambda entry: -entry[1])
        lines = [[reason, f"{count:,}"] for reason, count in reasons]
        tables.append(Table([f"fewer than {wanted} because", "rows"], lines, right_aligned=["rows"]))
    return tables


def _passages_shown(setup: _Setup) -> str:
    return "the positives" if setup.corpus is None else f"{setup.corpus.name} and the positives"


def _rules_shown(recipe: MineRecipe) -> str:
    said = [f"{recipe.pick} {recipe.negatives} of ranks {recipe.first_rank} to {recipe.last_rank}"]
    if recipe.relative_margin is not None:
        said.append(f"below positive - {recipe.relative_margin:g} |positive|")
    if recipe.absolute_margin is not None:
        said.append(f"below positive - {recipe.absolute_margin:g}")
    if recipe.min_score is not None:
        said.append(f"at least {recipe.min_score:g}")
    if recipe.max_score is not None:
        said.append(f"at most {recipe.max_score:g}")
    return ", ".join(said)


def _columns_shown(recipe: MineRecipe) -> str:
    """What a training recipe says to read the output."""
    if recipe.columns is None:
        return f"path: {recipe.output}" + (", shape: pairs" if recipe.shape == "pairs" else "")
    names = recipe.columns.model_dump(exclude_none=True) | {"negative": "negative"}
    return f"path: {recipe.output}, columns: {{{', '.join(f'{k}: {v}' for k, v in names.items())}}}"

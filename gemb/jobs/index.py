"""`gemb index`: documents into an index that can be searched, and kept like its input.

    report = run(IndexRecipe(inputs=("docs.jsonl",), output=Path("docs.gemb")))

Records are compared with what the index has; only those that are new or changed are embedded, by the same
windows as in `gemb embed`, and put into the index. An index that is there keeps its settings, so that the
same command, run again, brings it up to date. `gemb.jobs.index_setup` looks everything up,
`gemb.jobs.index_adding` does the work.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from gemb.jobs.index_adding import Run, open_torch_engine
from gemb.jobs.index_graph import graph_note, keep_graph
from gemb.jobs.index_planning import make_plan
from gemb.jobs.index_setup import OpenEngine, parse_passages, prepare
from gemb.jobs.interrupts import Interrupts
from gemb.jobs.setup import reject_limits
from gemb.jobs.watch import Watch
from gemb.recipe import InferenceRecipe, RecipeInput, RecipePath
from gemb.report import OnProgress, Plan, Report, ignore

__all__ = ["IndexRecipe", "OpenEngine", "plan", "run"]


class IndexRecipe(InferenceRecipe):
    """What `gemb index` is asked to do."""

    kind: ClassVar[str] = "index"

    inputs: tuple[RecipeInput, ...] = ()
    """Files, folders or patterns of documents, in this order; - is stdin."""
    output: RecipePath | None = None
    """The index folder; docs.gemb is a good name."""
    input_format: Literal["auto", "jsonl", "csv", "tsv", "parquet", "text", "document"] = "auto"
    """How the inputs are laid out; auto goes by the suffix, and by the first character of a pipe."""
    text_field: str | None = None
    """The field that is searched; by default the first of text, contents, content, passage, body, sentence,
    document."""
    title_field: str | None = None
    """The field that is put in front of the text as its title; by default title, where there is one."""
    id_field: str | None = None
    """The field that names a document; by default the first of id, _id, doc_id, docid, custom_id, else the
    line number."""
    keep: str = "all"
    """Which other fields are kept as metadata, for --where and to be shown: all, none, or names with commas
    between."""
    as_: str | None = None
    """What the documents are, which chooses the model's prompt: document, a prompt's name, or none for no
    prompt; by default document where the model has prompts."""
    vectors: RecipePath | None = None
    """Take these ready vectors and embed nothing: .npy, .parquet, .jsonl, .safetensors, .fbin or a folder of
    gemb embed; texts come from the inputs, or from the same file."""
    ids: RecipePath | None = None
    """The ids of --vectors, one a line; by default those that gemb embed wrote beside them, else those of the
    inputs."""
    vector_field: str | None = None
    """The column of a Parquet file that holds its vectors; by default embedding, embeddings or vector. With
    one input and without --vectors, the input is that file."""
    passages: str | None = None
    """How a long document is divided to be searched: auto (passages as long as the model takes), off (cut
    there), TOKENS or TOKENS:OVERLAP; by default auto, or as the index has it."""
    dims: int | None = Field(default=None, ge=1)
    """Keep only so many leading dims of each vector (Matryoshka); by default all that the model gives."""
    force: bool = False
    """Allow dims that the model was not trained for, and more tokens than it declares."""
    dtype: Literal["f16", "bf16", "f32", "int8"] | None = None
    """How a stored number is written; by default f16, or as the index has it."""
    prune: bool = False
    """Remove documents that the input no longer has; not done when the input was not read to its end."""
    compact: bool = True
    """Merge small parts at the end and build the graph of large ones, which makes searches quick."""
    empty: Literal["error", "skip"] = "error"
    """What becomes of an empty text, or of white space: refuse the row, or leave it out; always counted."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a refused row does: stop the job with its line and reason, or go to OUTPUT.rejects.jsonl while the
    job goes on and ends with exit code 3."""
    max_rejects: int | str | None = None
    """Stop when more rows are refused than this number, or this share (5%); implies --on-error skip."""
    limit_rows: int | None = Field(default=None, ge=1)
    """Add or change at most so many documents in this run, then stop with exit code 4 if there are more; the
    next run goes on there."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Stop after about so many seconds, with exit code 4 if more is left; the next run goes on there."""
    cache: RecipePath | None = None
    """A folder that keeps vectors by content, so that a text embedded before costs nothing; several runs may
    share it."""
    onnx: bool | None = None
    """Keep the model's ONNX graph in the cache, so that gemb search starts without torch; by default for
    models of up to 50 million parameters, where onnxruntime is installed."""
    wait_lock: float = Field(default=0.0, ge=0)
    """Seconds to wait while another run holds the output."""

    @field_validator("max_rejects")
    @classmethod
    def _check_max_rejects(cls, value: int | str | None) -> int | str | None:
        reject_limits(value)
        return value

    @field_validator("passages")
    @classmethod
    def _check_passages(cls, value: str | None) -> str | None:
        if value is not None:
            parse_passages(value, 1)
        return value

    @field_validator("keep")
    @classmethod
    def _check_keep(cls, value: str) -> str:
        if not all(name.strip() for name in value.split(",")):
            raise ValueError(f"{value!r} is neither all, none nor names of fields with commas between")
        return value


def plan(recipe: IndexRecipe, *, overwrite: bool = False, open_engine: OpenEngine | None = None) -> Plan:
    """What `run` would do, for --dry-run: documents, tokens, sizes, device and time. Writes nothing.

    Raises GembError as `run` does before its first text is embedded.
    """
    setup = prepare(recipe, overwrite=overwrite, announce=lambda line: None)
    return make_plan(setup, open_engine or open_torch_engine)


def run(
    recipe: IndexRecipe,
    on_progress: OnProgress = ignore,
    *,
    overwrite: bool = False,
    open_engine: OpenEngine | None = None,
) -> Report:
    """Make the index that the recipe asks for, or bring the one that is there up to date.

    `overwrite` makes it anew beside the one that is there, which can be searched until the new one is
    whole. `open_engine` is for other engines than torch.

    Raises GembError with the exit codes of gemb embed; LockedError (6) while another run holds the index;
    MismatchError (5) if it was made with another model, prompt, width or type; Interrupted after SIGINT or
    SIGTERM, when all that is done is kept (only in the main thread).
    """
    watch = Watch(on_progress, "indexing")
    with Interrupts("interrupted before any document of this run; nothing is lost") as interrupts:
        with interrupts.at_once():
            setup = prepare(recipe, overwrite=overwrite, announce=watch.note)
            graph_note(setup)  # what cannot be had shows now
        report = Run(setup, watch, on_progress, interrupts, open_engine or open_torch_engine).run()
        if open_engine is None or recipe.onnx:
            with interrupts.at_once():
                keep_graph(setup, watch.note)
        return report

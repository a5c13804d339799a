"""`gemb embed`: texts in, vectors out; the main job.

    report = run(EmbedRecipe(inputs=("docs.jsonl",), output=Path("docs.npy")))

`gemb.jobs.setup` looks everything up and checks it, `gemb.jobs.running` decides what is to be done and
does it: reading, tokenising and computing (`gemb.engine.windows`) beside checking, writing and the journal
(`gemb.jobs.writing`). See docs/embed.md for what users are promised.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from gemb.errors import GembError
from gemb.files import Lock, check_writable
from gemb.jobs.interrupts import Interrupts
from gemb.jobs.planning import make_plan
from gemb.jobs.running import Run
from gemb.jobs.setup import STDOUT, OpenEngine, open_torch_engine, prepare, reject_limits
from gemb.jobs.watch import Watch
from gemb.recipe import InferenceRecipe, RecipeInput, RecipePath
from gemb.report import OnProgress, Plan, Report, ignore
from gemb.vectors.shards import parse_shard

__all__ = ["EmbedRecipe", "OpenEngine", "is_stdout", "plan", "run", "split_words"]


class EmbedRecipe(InferenceRecipe):
    """What `gemb embed` is asked to do."""

    kind: ClassVar[str] = "embed"

    inputs: tuple[RecipeInput, ...] = ()
    """Files, folders or patterns to read, in this order; - is stdin."""
    output: RecipePath | None = None
    """Where the vectors go, by suffix: .npy, .parquet, .jsonl, .safetensors, .fbin; a folder; - is stdout."""
    input_format: Literal["auto", "jsonl", "csv", "tsv", "parquet", "text", "document"] = "auto"
    """How the inputs are laid out; auto goes by the suffix, and by the first character of a pipe."""
    text_field: str | None = None
    """The field that is embedded; by default the first of text, contents, content, passage, body, sentence,
    document."""
    title_field: str | None = None
    """The field that is put in front of the text as its title; by default title, where there is one."""
    id_field: str | None = None
    """The field that names a row; by default the first of id, _id, doc_id, docid, custom_id, else the line
    number."""
    as_: str | None = None
    """What the texts are, which chooses the model's prompt: document, query, a prompt's name, or none for no
    prompt; by default document where the model has prompts."""
    dims: int | None = Field(default=None, ge=1)
    """Keep only so many leading dims of each vector (Matryoshka), at unit length again; by default all that
    the model gives."""
    force: bool = False
    """Allow dims that the model was not trained for, and more tokens than it declares."""
    normalise: bool | None = None
    """Bring every vector to unit length; by default only those that --dims cuts, and what the model itself
    does."""
    dtype: Literal["f32", "f16", "bf16", "int8", "binary"] = "f32"
    """How a stored number is written; int8 ranges come from the first 8,192 rows and are stored with the
    output."""
    encoding: Literal["list", "base64"] = "list"
    """How .jsonl holds a vector: a list of numbers, or base64 of its little-endian bytes, which is smaller
    and quicker."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest text in tokens, prompt and special tokens counted; by default what the model declares."""
    on_long: Literal["truncate", "error", "skip", "chunk"] = "truncate"
    """What becomes of a longer text: cut it, refuse the row, leave it out, or write a row for each passage
    with the id ID#n; always counted."""
    empty: Literal["error", "skip"] = "error"
    """What becomes of an empty text, or of white space: refuse the row, or leave it out; always counted."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a refused row does: stop the job with its line and reason, or go to OUTPUT.rejects.jsonl while the
    job goes on and ends with exit code 3."""
    max_rejects: int | str | None = None
    """Stop when more rows are refused than this number, or this share (5%); implies --on-error skip."""
    limit_rows: int | None = Field(default=None, ge=1)
    """Read at most so many rows in this run, then stop with exit code 4 if there are more; the next run goes
    on there."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Stop after about so many seconds, with exit code 4 if more is left; the next run goes on there."""
    shard: str | None = None
    """Do only a part, i/n with i from 0 to n - 1: every n-th block of 4,096 rows; under torchrun
    RANK/WORLD_SIZE is the default."""
    join: bool = False
    """Join the outputs of all shards to one, after checking that they are complete; computes nothing."""
    cache: RecipePath | None = None
    """A folder that keeps vectors by content, so that a text embedded before costs nothing; several runs may
    share it."""
    wait_lock: float = Field(default=0.0, ge=0)
    """Seconds to wait while another run holds the output."""

    @field_validator("max_rejects")
    @classmethod
    def _check_max_rejects(cls, value: int | str | None) -> int | str | None:
        reject_limits(value)
        return value

    @field_validator("shard")
    @classmethod
    def _check_shard(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_shard(value)
            except GembError as error:
                raise ValueError(str(error).removeprefix("--shard ")) from error
        return value


def plan(recipe: EmbedRecipe, *, open_engine: OpenEngine | None = None) -> Plan:
    """What `run` would do, for --dry-run: rows, tokens, sizes, device and time. Writes nothing.

    Raises GembError as `run` does before its model is loaded, and for a join, which has nothing to plan.
    """
    if recipe.join:
        raise GembError("--join computes nothing that could be planned; leave out --dry-run, or --join")
    return make_plan(prepare(recipe), open_engine or open_torch_engine)


def run(
    recipe: EmbedRecipe,
    on_progress: OnProgress = ignore,
    *,
    overwrite: bool = False,
    open_engine: OpenEngine | None = None,
) -> Report:
    """Embed what the recipe says, or go on where an earlier run of it was stopped.

    `overwrite` replaces an output that exists, and drops what another request left unfinished.
    `open_engine` is for other engines than torch.

    Raises GembError with an exit code as docs/embed.md lists them; Interrupted after SIGINT or SIGTERM,
    when the state is saved (only in the main thread).
    """
    watch = Watch(on_progress)
    if recipe.join:
        from gemb.jobs.joining import join

        return join(recipe, watch, overwrite=overwrite)
    with Interrupts("interrupted before any row of this run; nothing is lost") as interrupts:
        with interrupts.at_once():
            setup = prepare(recipe, announce=watch.note)
        job = Run(setup, watch, interrupts, open_engine or open_torch_engine)
        if setup.is_stream:
            return job.to_stream()
        lock = Lock(setup.lock_file, str(setup.output), recipe.wait_lock, watch.note)
        with ExitStack() as stack:
            with interrupts.at_once():
                check_writable(setup.output)
                stack.enter_context(lock)
            return job.to_file(overwrite=overwrite)


def split_words(words: Sequence[str], recipe: str | None) -> tuple[str | None, list[str], list[str]]:
    """(recipe, overrides, inputs) of what stands on the command line.

    A first word that ends in .yaml or .yml is a recipe, and words like key=value after it are its overrides.
    """
    if recipe is None and words and words[0].endswith((".yaml", ".yml")):
        overrides = [word for word in words[1:] if "=" in word]
        return words[0], overrides, [word for word in words[1:] if "=" not in word]
    return recipe, [], list(words)


def is_stdout(recipe: EmbedRecipe) -> bool:
    """Whether the rows go to stdout."""
    return str(recipe.output) == STDOUT

"""What a job of `gemb embed` is about, looked up and checked before the model is loaded.

Nothing here is expensive, and nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemb.engine import Engine
from gemb.engine.encoder import load_tokeniser
from gemb.engine.opening import open_engine
from gemb.errors import GembError, MismatchError
from gemb.jobs.request import InputIdentity, Request
from gemb.jobs.writing import Limits
from gemb.model.folder import ModelFolder, fingerprint, read_folder
from gemb.model.hub import DEFAULT_MODEL, find_model
from gemb.text.prompts import Prompts, Template
from gemb.text.records import ReadOptions, check_fields, resolve_inputs
from gemb.text.tokenisation import Tokeniser
from gemb.vectors.layout import Layout, check_output, kind_of
from gemb.vectors.quantise import Int8Ranges
from gemb.vectors.shards import parse_shard, shard_path

if TYPE_CHECKING:
    from gemb.jobs.embed import EmbedRecipe
    from gemb.text.inputs import InputFile

STDOUT = "-"
FEW_BYTES = 32_768  # some 8,000 tokens: MiniLM in fp32 takes as long for them as torch to be imported


@dataclass(frozen=True)
class Setup:
    """A recipe with everything looked up and checked that can be known before the model is loaded."""

    recipe: EmbedRecipe
    output: Path
    """With the shard's name, if there is one."""
    inputs: list[InputFile]
    folder: ModelFolder
    model_name: str
    template: Template
    tokeniser: Tokeniser
    prompt_tokens: int
    """Leading tokens of each text that pooling leaves out."""
    dims: int
    """K, of the rows written."""
    normalise: bool
    shard: tuple[int, int] | None
    limits: Limits
    notes: tuple[str, ...]

    @property
    def is_stream(self) -> bool:
        """Whether rows go to stdout."""
        return str(self.output) == STDOUT

    @property
    def work(self) -> Path:
        """The folder of what is not finished."""
        return self.output.with_name(self.output.name + ".partial")

    @property
    def finished_work(self) -> Path:
        """What the work folder is called while it is removed."""
        return self.work.with_name(self.work.name + ".done")

    @property
    def lock_file(self) -> Path:
        """Held while the job runs."""
        return self.output.with_name(self.output.name + ".lock")

    @property
    def rejects_file(self) -> Path:
        """Where rejected rows go."""
        return self.output.with_name(self.output.name + ".rejects.jsonl")

    @property
    def has_id_lines(self) -> bool:
        """Whether the ids of the output stand one a line."""
        return kind_of(self.output) not in ("stream", "jsonl", "parquet")

    @property
    def reads_pipe(self) -> bool:
        """Whether an input can be read only once."""
        return any(file.is_stream for file in self.inputs)

    @property
    def has_few_texts(self) -> bool:
        """Whether the work is done before torch would be loaded.

        Told by the inputs alone, so that every run of the job says the same.
        """
        sizes = sum(file.size_bytes for file in self.inputs)
        return sizes <= FEW_BYTES and not self.reads_pipe and self.recipe.cache is None

    def layout(self, ranges: Int8Ranges | None) -> Layout:
        """The layout of the output."""
        stored = {
            "gemb": metadata.version("gemb"),
            "model": self.model_name,
            "fingerprint": fingerprint(self.folder),
            "prompt": self.template.name,
            "dims": str(self.dims),
        }
        return Layout(self.dims, self.recipe.dtype, self.recipe.encoding, stored, ranges)

    def request(self, known: tuple[InputIdentity, ...] = ()) -> Request:
        """What the output depends on; inputs that look like `known` ones are not read again."""
        recipe = self.recipe
        return Request(
            model=fingerprint(self.folder),
            model_name=self.model_name,
            prompt={"name": self.template.name, "text": self.template.prefix},
            settings={
                "dims": self.dims,
                "normalise": self.normalise,
                "dtype": recipe.dtype,
                "encoding": recipe.encoding if kind_of(self.output) == "jsonl" else "list",
                "precision": recipe.precision,
                "engine": recipe.engine,
                "max-tokens": self.tokeniser.max_tokens,
                # A row that is refused and one that is left out are both not in the output.
                "on-long": "skip" if recipe.on_long == "error" else recipe.on_long,
                "input-format": recipe.input_format,
                "text-field": recipe.text_field,
                "title-field": recipe.title_field,
                "id-field": recipe.id_field,
                "shard": None if self.shard is None else f"{self.shard[0]}/{self.shard[1]}",
            },
            inputs=tuple(InputIdentity.of(file, known) for file in self.inputs if not file.is_stream),
        )

    def read_options(self, start: int) -> ReadOptions:
        """How records are read from number `start` on."""
        return ReadOptions(
            text_field=self.recipe.text_field,
            title_field=self.recipe.title_field,
            id_field=self.recipe.id_field,
            use_titles=self.template.uses_titles,
            start=start,
        )


def prepare(recipe: EmbedRecipe, announce: Callable[[str], None] | None = None) -> Setup:
    """Everything that can be checked before the model is loaded, checked; cheap things first.

    `announce` hears of a download. Raises GembError for whatever does not fit.
    """
    if recipe.output is None:
        raise GembError("no output given; pass -o docs.npy, or -o - for JSON lines on stdout")
    shard, notes = _shard_here(recipe.shard)
    limits = limits_of(recipe.on_error, recipe.max_rejects)
    output = recipe.output
    if shard:
        if recipe.dtype == "int8":
            raise GembError(
                "--dtype int8 cannot be sharded: every shard would find other ranges; "
                "store f16 in the shards, or run one job on several --devices"
            )
        output = shard_path(output, *shard)
    if str(output) != STDOUT and not output.absolute().parent.is_dir():
        raise GembError(f"{output}: there is no folder {output.parent}; make it first")
    inputs = resolve_inputs(recipe.inputs, input_format=recipe.input_format)
    check_fields(
        inputs,
        ReadOptions(text_field=recipe.text_field, title_field=recipe.title_field, id_field=recipe.id_field),
    )
    path = find_model(recipe.model, offline=recipe.offline, announce=announce)
    folder = read_folder(path)
    model_name = recipe.model or DEFAULT_MODEL
    template = Prompts(folder.prompts, folder.default_prompt).template(recipe.as_)
    dims = dims_of(folder, model_name, recipe.dims, force=recipe.force)
    tokeniser = _tokeniser(recipe, folder, model_name)
    check_apart(output, inputs)
    setup = Setup(
        recipe=recipe,
        output=output,
        inputs=inputs,
        folder=folder,
        model_name=model_name,
        template=template,
        tokeniser=tokeniser,
        prompt_tokens=0 if folder.pooling.include_prompt else tokeniser.prompt_tokens(template.prefix),
        dims=dims,
        normalise=dims < folder.dims if recipe.normalise is None else recipe.normalise,
        shard=shard,
        limits=limits,
        notes=(*notes, *folder.notes),
    )
    check_output(output, setup.layout(any_ranges(dims) if recipe.dtype == "int8" else None))
    return setup


def check_apart(output: Path, inputs: Sequence[InputFile]) -> None:
    """Raises GembError if the output would replace an input, or be read as one by this run or the next."""
    if str(output) == STDOUT:
        return
    place = output.resolve()
    for file in inputs:
        if file.path is None:
            continue
        source = file.path.resolve()
        if source == place:
            raise GembError(f"{output} is an input, too; choose another output")
        if file.format == "folder" and place.is_relative_to(source):
            raise GembError(
                f"{output} lies in the input folder {file.name}, where its ids would be read as a text; "
                "choose an output outside of it"
            )
        if source.is_relative_to(place):
            raise GembError(
                f"the input {file.name} lies in the output folder {output}; choose another output"
            )


def any_ranges(dims: int) -> Int8Ranges:
    """Ranges to check a layout with, before the real ones are known."""
    return Int8Ranges(np.zeros(dims, dtype=np.float32), np.ones(dims, dtype=np.float32))


def _shard_here(text: str | None) -> tuple[tuple[int, int] | None, list[str]]:
    """The shard of this process, asked for or from its place under torchrun, and a note of the latter."""
    if text is not None:
        return parse_shard(text), []
    rank, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if rank.isdecimal() and world.isdecimal() and int(world) > 1:
        return (int(rank), int(world)), [f"shard {rank}/{world}, from RANK and WORLD_SIZE of torchrun"]
    return None, []


def reject_limits(value: int | str | None) -> tuple[int | None, float | None]:
    """(count, share) of --max-rejects. Raises ValueError if it is neither."""
    if value is None:
        return None, None
    text = str(value)
    number = text.removesuffix("%")
    try:
        limit = float(number)
    except ValueError:
        limit = -1.0
    if text.endswith("%") and 0 <= limit <= 100:
        return None, limit / 100
    if number.isdecimal():
        return int(number), None
    raise ValueError(f"{text!r} is neither a number of rows like 100 nor a share like 5%")


def limits_of(on_error: str, max_rejects: int | str | None) -> Limits:
    """How many rejects a job bears; `max_rejects` implies that it does not stop at the first."""
    count, share = reject_limits(max_rejects)
    stop = on_error == "stop" and max_rejects is None
    return Limits(stop_at_first=stop, count=count, share=share, text=str(max_rejects))


def dims_of(folder: ModelFolder, name: str, wanted: int | None, *, force: bool) -> int:
    """K, of the rows written: what is `wanted`, else what the folder asks for, else all.

    Raises MismatchError for more than the model gives, and for a size it was not trained for unless `force`.
    """
    full = folder.dims
    dims = wanted or folder.truncate_dims or full
    if dims > full:
        raise MismatchError(f"--dims {dims} is more than the {full} dims that {name} gives")
    trained = sorted({*folder.matryoshka_dims, full, folder.truncate_dims or full}, reverse=True)
    if wanted is not None and dims not in trained and not force:
        if folder.matryoshka_dims:
            listed = ", ".join(str(size) for size in trained)
            raise MismatchError(
                f"--dims {dims} is no size that {name} was trained for: {listed}; "
                "pass one of them, or --force to cut anyway"
            )
        raise MismatchError(
            f"--dims {dims}: {name} declares no smaller size than its {full} dims, and cutting a model that "
            "was not trained for it costs quality; pass --force to cut anyway"
        )
    return dims


def _tokeniser(recipe: EmbedRecipe, folder: ModelFolder, name: str) -> Tokeniser:
    if recipe.max_tokens is not None and recipe.max_tokens > folder.max_tokens and not recipe.force:
        raise MismatchError(
            f"--max-tokens {recipe.max_tokens:,} is more than the {folder.max_tokens:,} that {name} "
            "declares; pass --force to try it anyway"
        )
    return load_tokeniser(folder, recipe.max_tokens)


OpenEngine = Callable[[Setup, Callable[[str], None]], Engine]
"""Makes the engine of a job; the function it is given tells people one line."""


def open_torch_engine(setup: Setup, notice: Callable[[str], None]) -> Engine:
    """The engine that the recipe asks for: in this process, or in one process for each of several devices."""
    recipe = setup.recipe
    return open_engine(
        setup.folder,
        device=recipe.device,
        precision=recipe.precision,
        threads=recipe.threads,
        batch_tokens=recipe.batch_tokens,
        notice=notice,
        engine=recipe.engine,
        few_texts=setup.has_few_texts,
    )

"""What a job of `gemb index` is about, looked up and checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemb.engine.encoder import load_tokeniser
from gemb.engine.windows import Refusal
from gemb.errors import GembError, MismatchError, UnavailableError
from gemb.files import read_json
from gemb.jobs.record import record_path
from gemb.jobs.setup import check_apart, dims_of, limits_of
from gemb.jobs.writing import Limits
from gemb.model.folder import ModelFolder, fingerprint, read_folder
from gemb.model.hub import DEFAULT_MODEL, find_model
from gemb.retrieval.index_model import find_encoder, lasting_name, record_of, shown_model
from gemb.store import Document, Index, Settings
from gemb.store.catalogue import DATABASE, UnfinishedError, is_old_layout
from gemb.store.documents import metadata_json
from gemb.store.writer import check_free
from gemb.text.prompts import Prompts, Template
from gemb.text.records import ReadOptions, Record, check_fields, resolve_inputs
from gemb.text.tokenisation import Tokeniser
from gemb.vectors import VectorFile, open_vectors

if TYPE_CHECKING:
    from gemb.jobs.index import IndexRecipe
    from gemb.text.inputs import InputFile

Announce = Callable[[str], None]

CODE_DIMS = 256
"""The first stage of a Matryoshka model is its largest trained prefix of at most so many dims."""
_SCALARS = frozenset({str, int, float, bool, type(None)})
TEXT_FORMATS = frozenset({"text", "document", "folder"})
"""Formats without fields."""


@dataclass(frozen=True, slots=True)
class Passages:
    """How a long document is divided."""

    tokens: int
    """Of a passage at most, prompt, title and special tokens counted."""
    overlap: int
    """Tokens of a passage that the next one repeats, at most."""

    def __str__(self) -> str:
        return f"{self.tokens}:{self.overlap}"


@dataclass(frozen=True)
class Encoding:
    """The model of an index and how it is used on documents."""

    folder: ModelFolder
    name: str
    template: Template
    passages: Passages | None
    max_tokens: int

    def load_tokeniser(self) -> Tokeniser:
        """The tokeniser, which cuts or divides at `max_tokens`."""
        return load_tokeniser(self.folder, self.max_tokens)


@dataclass(frozen=True)
class IndexSetup:
    """A recipe with everything looked up and checked that can be known before the model is loaded."""

    recipe: IndexRecipe
    output: Path
    inputs: list[InputFile]
    settings: Settings
    """Of the index, there or to be made."""
    exists: bool
    """Whether documents are added to an index that is there."""
    replaces: bool
    """Whether the index is made beside one that is there, to take its place."""
    encoding: Encoding | None
    """None for ready vectors."""
    vectors: VectorFile | None
    """Ready vectors."""
    limits: Limits
    notes: tuple[str, ...]

    @property
    def rejects_file(self) -> Path:
        """Where rejected rows go."""
        return self.output.with_name(self.output.name + ".rejects.jsonl")

    @property
    def reads_pipe(self) -> bool:
        """Whether an input can be read only once."""
        return any(file.is_stream for file in self.inputs)

    @property
    def kept_fields(self) -> tuple[str, ...] | None:
        """The fields to keep as metadata; None for all."""
        return kept_fields(self.recipe.keep)

    @property
    def read_options(self) -> ReadOptions:
        """How records are read."""
        recipe, ready = self.recipe, self.vectors is not None
        return ReadOptions(
            text_field=recipe.text_field,
            title_field=recipe.title_field,
            id_field=recipe.id_field,
            use_titles=self.encoding is None or self.encoding.template.uses_titles,
            keep_fields=self.kept_fields != (),
            leave_out=_vector_fields(recipe) if ready else frozenset(),
            text_optional=ready,
        )


OpenEngine = Callable[[IndexSetup, Encoding, Announce], Any]
"""Makes the engine of a job; the function it is given tells people one line."""


def prepare(recipe: IndexRecipe, *, overwrite: bool, announce: Announce) -> IndexSetup:
    """Everything that can be checked before the model is loaded, checked; cheap things first.

    `announce` hears of a download. Raises GembError for whatever does not fit.
    """
    if recipe.vector_field is not None and recipe.vectors is None and len(recipe.inputs) == 1:
        # A table that brings its vectors is both: vectors, and what they are of.
        recipe = recipe.model_copy(update={"vectors": Path(recipe.inputs[0]), "inputs": ()})
    output = recipe.output
    if output is None:
        raise GembError("no output given; pass -o docs.gemb")
    if not output.absolute().parent.is_dir():
        raise GembError(f"{output}: there is no folder {output.parent}; make it first")
    limits = limits_of(recipe.on_error, recipe.max_rejects)
    replaces = overwrite and ((output / DATABASE).exists() or is_old_layout(output))
    if not replaces:
        check_free(output)
    have = None if replaces else present_settings(output)
    _check_vector_options(recipe)
    inputs = _inputs(recipe)
    check_apart(output, inputs)
    vectors = None
    if recipe.vectors is not None:
        vectors = open_vectors(recipe.vectors, column=recipe.vector_field)
    encoding: Encoding | None = None
    notes: list[str] = []
    beside = building_path(output)
    if not replaces and beside.exists():
        notes.append(
            f"{beside} is left of an --overwrite that was stopped: run it again to go on, or remove it"
        )
    if vectors is not None:
        settings = _settings_of_vectors(recipe, output, vectors, have, announce)
    else:
        settings, encoding = _settings_of_model(recipe, output, have, announce)
        notes += encoding.folder.notes
    setup = IndexSetup(
        recipe=recipe,
        output=output,
        inputs=inputs,
        settings=settings,
        exists=have is not None,
        replaces=replaces,
        encoding=encoding,
        vectors=vectors,
        limits=limits,
        notes=tuple(notes),
    )
    check_fields(inputs, setup.read_options)
    return setup


def building_path(output: Path) -> Path:
    """Where the index is made that takes the place of another one; a run that was stopped goes on there."""
    return output.with_name(f"{output.name}.building")


def present_settings(folder: Path) -> Settings | None:
    """The settings of the index at `folder`; None if there is none yet, or an empty beginning of one.

    Raises DamagedError (1), also where a file is missing or cut off, MismatchError (5) for another format.
    """
    database = folder / DATABASE
    if not database.exists() or not database.stat().st_size:
        return None
    try:
        with Index.open(folder) as index:
            return index.settings
    except UnfinishedError:
        return None


def document_of(record: Record, kept: tuple[str, ...] | None) -> Document | Refusal:
    """What the index keeps of a record, or why it cannot; `kept` are the fields to keep, None is all."""
    fields = record.fields
    if kept is not None and fields:
        fields = {name: fields[name] for name in kept if name in fields}
    document = Document(record.id, record.text, record.title or "", fields)
    if not _SCALARS.issuperset(map(type, fields.values())):
        try:
            metadata_json(document)
        except GembError as error:
            reason = f"{str(error).partition(': ')[2]}; leave the field out with --keep"
            return Refusal(record.source, record.line, record.index, record.id, reason)
    return document


def kept_fields(keep: str) -> tuple[str, ...] | None:
    """The fields that --keep names; None for `all`, none at all for `none`."""
    if keep == "all":
        return None
    return () if keep == "none" else tuple(dict.fromkeys(name.strip() for name in keep.split(",")))


def parse_passages(text: str, most: int) -> Passages | None:
    """What --passages asks for; `most` are the tokens that `auto` takes. None is `off`.

    Raises ValueError if it is no such thing.
    """
    if text == "off":
        return None
    if text == "auto":
        return Passages(most, 0)
    tokens, _, overlap = text.partition(":")
    if not tokens.isdecimal() or not (overlap or "0").isdecimal() or text.endswith(":") or not int(tokens):
        raise ValueError(f"{text!r} is neither auto, off, TOKENS nor TOKENS:OVERLAP, like 256 or 256:32")
    found = Passages(int(tokens), int(overlap or 0))
    if 2 * found.overlap > found.tokens:
        raise ValueError(
            f"{text!r}: an overlap of {found.overlap} is more than half of {found.tokens} tokens"
        )
    return found


def _check_vector_options(recipe: IndexRecipe) -> None:
    """Raises GembError for options that only ready vectors have, and for those they do not."""
    if recipe.vectors is None:
        for name, value in (("--ids", recipe.ids), ("--vector-field", recipe.vector_field)):
            if value is not None:
                raise GembError(f"{name} belongs to --vectors, which is not given")
        return
    if recipe.vector_field is not None and recipe.vectors.suffix.lower() != ".parquet":
        raise GembError(
            f"--vector-field names a column of a Parquet file, and {recipe.vectors} is none; leave it out"
        )
    for option, given in (
        ("--passages", recipe.passages),
        ("--as", recipe.as_),
        ("--cache", recipe.cache),
    ):
        if given is not None:
            raise GembError(f"{option} is for texts that are embedded here, not for --vectors; leave it out")


def _inputs(recipe: IndexRecipe) -> list[InputFile]:
    """The files to read; those of ready vectors hold the documents too, if their format has fields."""
    if recipe.inputs or recipe.vectors is None:
        return resolve_inputs(recipe.inputs, input_format=recipe.input_format)
    if recipe.ids is None and recipe.vectors.suffix.lower() in (".parquet", ".jsonl", ".ndjson"):
        return resolve_inputs([str(recipe.vectors)])
    return []


def _vector_fields(recipe: IndexRecipe) -> frozenset[str]:
    """The fields that hold vectors and are no metadata."""
    from gemb.vectors.parquet import VECTOR_COLUMNS  # here, because pyarrow is slow to import

    return frozenset({recipe.vector_field} if recipe.vector_field else VECTOR_COLUMNS)


# --- texts


def _settings_of_model(
    recipe: IndexRecipe, output: Path, have: Settings | None, announce: Announce
) -> tuple[Settings, Encoding]:
    """The settings of an index whose texts are embedded here, and by what."""
    if have is not None and not have.encoder:
        raise MismatchError(
            f"{output} holds ready vectors and no model to embed texts with; add ready vectors with "
            "--vectors, or make another index"
        )
    recorded = have.encoder if have else {}
    if have is not None:
        folder = find_encoder(output, recorded, recipe.model, offline=recipe.offline, announce=announce)
        name = recipe.model or str(recorded["model"])
    else:
        folder = read_folder(find_model(recipe.model, offline=recipe.offline, announce=announce))
        name = recipe.model or DEFAULT_MODEL
    document = recorded.get("document_prompt") or {}
    template = Prompts(folder.prompts, folder.default_prompt).template(recipe.as_ or document.get("name"))
    if document and template.prefix != document["text"]:
        raise _other(output, "prompt", repr(document["text"]), repr(template.prefix))
    passages, max_tokens = _passages(recipe, folder, name, recorded, output)
    if have is not None:
        _check_given(recipe, output, have)
        settings = Settings(have.dims, have.dtype, have.code_dims, have.encoder, have.words)
    else:
        dims = dims_of(folder, name, recipe.dims, force=recipe.force)
        encoder = record_of(
            folder, name, document=template, max_tokens=max_tokens, passages=str(passages or "off")
        )
        settings = Settings(dims, recipe.dtype or "f16", code_dims(folder, dims), encoder)
    return settings, Encoding(folder, name, template, passages, max_tokens)


def code_dims(folder: ModelFolder, dims: int) -> int:
    """The width of the first stage: the largest size of at most 256 that the model was trained for."""
    if dims <= CODE_DIMS:
        return dims
    return max((size for size in folder.matryoshka_dims if size <= CODE_DIMS), default=dims)


def _passages(
    recipe: IndexRecipe, folder: ModelFolder, name: str, recorded: Mapping[str, Any], output: Path
) -> tuple[Passages | None, int]:
    """How documents are divided, and the longest text in tokens; as recorded where the index is there."""
    most = folder.max_tokens
    made = recorded.get("passages")
    wanted = recipe.passages or made or "auto"
    try:
        passages = parse_passages(wanted, most)
    except ValueError as error:
        raise GembError(f"--passages {error}") from error
    if made is not None and str(passages or "off") != made:
        raise _other(output, "passages", made, str(passages or "off"))
    if passages is None:
        return None, recorded.get("max_tokens") or most
    if passages.tokens > most and not recipe.force:
        raise MismatchError(
            f"--passages {wanted} is more than the {most:,} tokens that {name} declares; "
            "pass --force to try it anyway"
        )
    return passages, passages.tokens


# --- ready vectors


def _settings_of_vectors(
    recipe: IndexRecipe, output: Path, vectors: VectorFile, have: Settings | None, announce: Announce
) -> Settings:
    """The settings of an index of ready vectors."""
    if not vectors.rows:
        raise GembError(f"{vectors.path}: no rows")
    encoder, folder = _encoder_of_vectors(recipe, vectors, announce)
    if have is not None:
        _check_given(recipe, output, have)
        known, found = have.encoder.get("fingerprint"), encoder.get("fingerprint")
        if known and not found:
            raise MismatchError(
                f"{output} holds vectors of {shown_model(have.encoder)}, and nothing says by what "
                f"{vectors.path} was made; if by the same, pass it with -m"
            )
        if known != found and found:
            made = shown_model(have.encoder) if have.encoder else "no known model"
            raise MismatchError(
                f"{output} holds vectors of {made}, but {vectors.path} was made by {shown_model(encoder)}; "
                "make another index for them"
            )
        if vectors.dims < have.dims:
            raise MismatchError(
                f"{output} holds {have.dims}-wide vectors, but those of {vectors.path} are {vectors.dims} "
                "wide; make another index for them"
            )
        if vectors.dims > have.dims and recipe.dims is None:
            raise MismatchError(
                f"{output} holds {have.dims}-wide vectors, but those of {vectors.path} are {vectors.dims} "
                f"wide; pass --dims {have.dims} to cut them"
            )
        return Settings(have.dims, have.dtype, have.code_dims, have.encoder, have.words)
    dims = recipe.dims or vectors.dims
    if dims > vectors.dims:
        raise MismatchError(f"--dims {dims} is more than the {vectors.dims} dims of {vectors.path}")
    trained = () if folder is None else folder.matryoshka_dims
    if dims < vectors.dims and dims not in trained and not recipe.force:
        raise MismatchError(
            f"--dims {dims}: nothing says that the vectors of {vectors.path} may be cut, and cutting those "
            "of a model that was not trained for it costs quality; pass --force to cut anyway"
        )
    width = dims if folder is None else code_dims(folder, dims)
    return Settings(dims, recipe.dtype or "f16", width, encoder)


def _encoder_of_vectors(
    recipe: IndexRecipe, vectors: VectorFile, announce: Announce
) -> tuple[dict[str, Any], ModelFolder | None]:
    """What is recorded of the model of ready vectors: what -m says, else what gemb embed wrote."""
    path = record_path(vectors.path)
    request = (read_json(path).get("request") if path.is_file() else None) or {}
    made = request.get("model")
    name = recipe.model or request.get("model_name")
    if name is None:
        return {}, None
    try:
        offline = recipe.offline or recipe.model is None  # a model that is only recorded is not downloaded
        folder = read_folder(find_model(name, offline=offline, announce=announce))
    except UnavailableError:
        if recipe.model is not None:
            raise
        folder = None
    if folder is not None and made not in (None, fingerprint(folder)):
        if recipe.model is not None:
            raise MismatchError(
                f"{path} says that {vectors.path} was made by {request['model_name']} ({made[:12]}), but "
                f"{recipe.model} is {fingerprint(folder)[:12]}; leave out -m, or give the one that made them"
            )
        folder = None  # another model lies under that name today
    prompt = request.get("prompt")
    longest = request.get("settings", {}).get("max-tokens")
    if folder is None:
        return {
            "model": lasting_name(name),
            "fingerprint": made,
            "document_prompt": prompt,
            "query_prompt": None,
            "model_dims": vectors.dims,
            "max_tokens": longest,
            "passages": "off",
        }, None
    if vectors.dims > folder.dims or (
        vectors.dims not in (folder.dims, folder.truncate_dims, *folder.matryoshka_dims)
        and made is None
        and not recipe.force
    ):
        raise MismatchError(
            f"{vectors.path} holds {vectors.dims}-wide vectors, but {name} gives {folder.dims} dims"
        )
    template = Prompts(folder.prompts, folder.default_prompt).template(None)
    encoder = record_of(
        folder, name, document=template, max_tokens=longest or folder.max_tokens, passages="off"
    )
    return {**encoder, "document_prompt": prompt or encoder["document_prompt"]}, folder


def _check_given(recipe: IndexRecipe, output: Path, have: Settings) -> None:
    """Raises MismatchError for an option that would make other vectors than the index has."""
    if recipe.dims is not None and recipe.dims != have.dims:
        raise _other(output, "dims", str(have.dims), str(recipe.dims))
    if recipe.dtype is not None and recipe.dtype != have.dtype:
        raise _other(output, "dtype", have.dtype, recipe.dtype)


def _other(output: Path, what: str, have: str, given: str) -> MismatchError:
    return MismatchError(
        f"{output} was made with {what} {have}, but this run asks for {given}; "
        "leave it out to add to the index, or pass --overwrite to make it anew"
    )

"""A searchable folder of documents: their vectors, their texts, and the fingerprint of the model.

    docs.gemb/
      gemb.json        model, prompt, dims, rows, and what the other two were when the index was finished
      vectors/         a folder of shards, as gemb embed writes it; rows are unit length
      documents.jsonl  id, title and text of each row, in the order of the vectors

`gemb.json` is written last, so a folder without it is unfinished; the same command goes on there. The search
over it is exact. A catalogue that takes changes one by one, and a graph, come with a later issue.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import orjson
from pydantic import Field

from gemb.errors import Exit, GembError, UnavailableError
from gemb.files import Lock, atomic_write, file_digest, os_errors_explained, read_json, write_json
from gemb.jobs import embed
from gemb.jobs.reporting import ON_LONG_HINT
from gemb.model.hub import DEFAULT_MODEL
from gemb.recipe import ComputeRecipe, RecipeInput, RecipePath, resolved
from gemb.report import Event, OnProgress, Report, ignore
from gemb.text.records import ReadOptions, Reject, read_records, resolve_inputs
from gemb.vectors import VectorFile, open_vectors
from gemb.vectors.layout import MANIFEST
from gemb.vectors.readers import LineIndex

FORMAT = "gemb index 1"
RECORD = "gemb.json"
VECTORS = "vectors"
DOCUMENTS = "documents.jsonl"
SHOWN_DIGITS = 12
"""How much of a fingerprint people see."""
_ROWS_BETWEEN_EVENTS = 1024


class IndexRecipe(ComputeRecipe):
    """What `gemb index` is asked to do."""

    kind: ClassVar[str] = "index"

    inputs: tuple[RecipeInput, ...] = ()
    """Files, folders or patterns of documents, in this order."""
    output: RecipePath | None = None
    """The index folder; docs.gemb is a good name."""
    text_field: str | None = None
    """The field that is searched; by default the first of text, contents, content, passage, body, sentence,
    document."""
    title_field: str | None = None
    """The field that is put in front of the text as its title; by default title, where there is one."""
    id_field: str | None = None
    """The field that names a document; by default the first of id, _id, doc_id, docid, custom_id, else the
    line number."""
    empty: Literal["error", "skip"] = "error"
    """What becomes of an empty text: refuse the row, or leave it out; always counted."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a refused row does: stop with its line and reason, or be left out while the job goes on and ends
    with exit code 3."""
    wait_lock: float = Field(default=0.0, ge=0)
    """Seconds to wait while another run holds the index."""


@dataclass(frozen=True)
class Document:
    """One row of an index, as it was read."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Index:
    """A finished index, open for reading; row numbers of vectors and documents are the same."""

    path: Path
    record: dict[str, Any]
    vectors: VectorFile
    lines: LineIndex

    @property
    def model(self) -> str:
        """The model's name, or its folder."""
        return str(self.record["model"])

    @property
    def fingerprint(self) -> str:
        """Of the model that made the vectors; 64 hex digits."""
        return str(self.record["fingerprint"])

    def document(self, row: int) -> Document:
        """The document of a row."""
        (line,) = self.lines.lines(row, row + 1)
        entry = orjson.loads(line)
        return Document(entry["id"], entry["title"], entry["text"])


def run(
    recipe: IndexRecipe,
    on_progress: OnProgress = ignore,
    *,
    overwrite: bool = False,
    open_engine: embed.OpenEngine | None = None,
) -> Report:
    """Make the index that the recipe says, or go on where an earlier run of it was stopped.

    `overwrite` replaces an index that exists, which can be searched until the new vectors are whole.
    `open_engine` is for other engines than torch.
    Raises GembError as gemb.jobs.embed does, and if `output` is something else than an index.
    """
    folder = recipe.output
    if folder is None:
        raise GembError("no output given; pass -o docs.gemb")
    if "-" in recipe.inputs:
        raise GembError(
            "an index reads its documents twice, so it cannot read a pipe; save them to a file first"
        )
    _check_ours(folder)
    with os_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder / "writer.lock", str(folder), wait_seconds=recipe.wait_lock):
        embedded = embed.run(_embed_recipe(recipe), on_progress, overwrite=overwrite, open_engine=open_engine)
        if embedded.exit_code not in (Exit.DONE, Exit.REJECTED):
            return embedded
        if (folder / RECORD).exists() and _is_whole(folder):
            done = f"{folder}: already done; nothing has changed"
            return Report(
                title=done,
                rows=_rows(embedded),
                data=embedded.data,
                outputs=[folder],
                exit_code=embedded.exit_code,
            )
        _write_documents(recipe, folder, on_progress)
        made = read_json(folder / VECTORS / RECORD)
        record = {
            "format": FORMAT,
            "model": _model_name(recipe),
            "fingerprint": made["request"]["model"],
            "prompt": made["request"]["prompt"],
            "recipe": resolved(recipe),
            "vectors_manifest": file_digest(folder / VECTORS / MANIFEST),
            "documents": file_digest(folder / DOCUMENTS),
        }
        with open_vectors(folder / VECTORS, verify=False) as vectors:
            record |= {"rows": vectors.rows, "dims": vectors.dims}
        write_json(folder / RECORD, record)
    return Report(
        title=f"indexed {record['rows']:,} documents into {folder}",
        rows=_rows(embedded),
        data={**embedded.data, "rows": record["rows"], "fingerprint": record["fingerprint"]},
        outputs=[folder],
        exit_code=embedded.exit_code,
    )


def open_index(path: Path) -> Index:
    """The index at `path`, with sizes and counts checked.

    Raises UnavailableError (7) if nothing is there, GembError if it is unfinished, damaged or no index.
    """
    if not path.exists():
        raise UnavailableError(f"there is no index {path}; make one with gemb index INPUT -o {path}")
    if not (path / RECORD).is_file():
        if (path / VECTORS).exists() or (path / f"{VECTORS}.partial").exists():
            raise GembError(f"{path} is not finished; run the gemb index command that began it again")
        raise GembError(
            f"{path} is no index: it has no {RECORD}; make one with gemb index INPUT -o NAME.gemb"
        )
    record = read_json(path / RECORD)
    if record.get("format") != FORMAT:
        if (path / MANIFEST).is_file():
            raise GembError(
                f"{path} holds vectors of gemb embed and no texts; "
                "make an index with gemb index INPUT -o NAME.gemb"
            )
        raise GembError(f"{path / RECORD} is not {FORMAT!r}; it was not written by gemb, or by a newer one")
    with os_errors_explained(path, "read"):
        if not (path / DOCUMENTS).is_file():
            raise GembError(f"{path / DOCUMENTS} is missing; run gemb index again with --overwrite")
        if file_digest(path / VECTORS / MANIFEST) != record.get("vectors_manifest"):
            raise GembError(
                f"{path / VECTORS} has changed since {path / RECORD} was written; "
                "run gemb index again with --overwrite"
            )
        vectors = open_vectors(path / VECTORS, verify=False)
        lines = LineIndex(path / DOCUMENTS)
    if not vectors.rows == lines.count == record["rows"]:
        raise GembError(
            f"{path} is damaged: {vectors.rows} vectors and {lines.count} documents, but {RECORD} says "
            f"{record['rows']}; run gemb index again with --overwrite"
        )
    return Index(path, record, vectors, lines)


def describe_index(path: Path) -> Report:
    """What `gemb info` shows of an index."""
    index = open_index(path)
    prompt = index.record["prompt"]
    rows = [
        ("documents", f"{index.vectors.rows:,}"),
        ("dims", str(index.vectors.dims)),
        ("model", f"{index.model} ({index.fingerprint[:SHOWN_DIGITS]})"),
        ("prompt", f"{prompt['name']}: {prompt['text']!r}"),
        ("search", "exact"),
    ]
    data = {
        "kind": "index",
        "path": str(path),
        "rows": index.vectors.rows,
        "dims": index.vectors.dims,
        "model": index.model,
        "fingerprint": index.fingerprint,
        "prompt": prompt,
    }
    return Report(title=f"{path}: an index of {index.vectors.rows:,} documents", rows=rows, data=data)


def _check_ours(folder: Path) -> None:
    """Return if `folder` is free to be an index. Raises GembError if it holds anything else."""
    if folder.is_file():
        raise GembError(f"{folder} is a file; an index is a folder, choose another name")
    if not folder.is_dir():
        return
    ours = (RECORD, DOCUMENTS, "writer.lock")
    names = [path.name for path in folder.iterdir()]
    others = [name for name in names if name not in ours and not name.startswith(VECTORS)]
    if others:
        raise GembError(
            f"{folder} exists and is no index: it has {', '.join(sorted(others)[:3])}; choose another name"
        )


def _embed_recipe(recipe: IndexRecipe) -> embed.EmbedRecipe:
    """The part of the work that gemb embed does."""
    shared = recipe.model_dump(exclude={"output"})
    return embed.EmbedRecipe(
        **shared,
        output=(recipe.output or Path()) / VECTORS,
        normalise=True,  # a dot product is then the cosine
    )


def _rows(embedded: Report) -> list[tuple[str, str]]:
    """What the embedding has to say to people; its files are parts of the index and no use alone."""
    # gemb index has no --on-long to point at.
    return [(label, text.removesuffix(ON_LONG_HINT)) for label, text in embedded.rows if label != "files"]


def _model_name(recipe: IndexRecipe) -> str:
    """How a later search, from any folder, finds the model."""
    name = recipe.model or DEFAULT_MODEL
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def _is_whole(folder: Path) -> bool:
    """Whether gemb.json is about the vectors that are there."""
    try:
        open_index(folder).vectors.close()
    except GembError:
        return False
    return True


def _write_documents(recipe: IndexRecipe, folder: Path, on_progress: OnProgress) -> None:
    """Write the documents of the vectors, by reading the input again.

    Raises GembError if it holds other documents than before.
    """
    with (
        open_vectors(folder / VECTORS, verify=False) as vectors,
        atomic_write(folder / DOCUMENTS) as file,
    ):
        ids = vectors.iter_ids()
        wanted = next(ids, None)
        done = 0
        for document in _documents(recipe):
            if document.id != wanted:
                continue  # rejected or left out by gemb embed, which has told it
            entry = {"id": document.id, "title": document.title, "text": document.text}
            file.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
            wanted = next(ids, None)
            done += 1
            if done % _ROWS_BETWEEN_EVENTS == 0 or wanted is None:
                on_progress(Event("storing texts", done, vectors.rows))
        if wanted is not None:
            raise GembError(
                f"the input changed while it was indexed: it no longer has {wanted!r} in its place; "
                "run the command again with --overwrite"
            )


def _documents(recipe: IndexRecipe) -> Iterator[Document]:
    options = ReadOptions(
        text_field=recipe.text_field, title_field=recipe.title_field, id_field=recipe.id_field
    )
    for record in read_records(resolve_inputs(recipe.inputs), options):
        if not isinstance(record, Reject):
            yield Document(record.id, record.title or "", record.text)

"""What `gemb info` shows of an index, read from its catalogue."""

from __future__ import annotations

from pathlib import Path

from gemb.files import readable_bytes
from gemb.report import Report, counted
from gemb.retrieval.index_model import shown_model
from gemb.store import Index
from gemb.store.catalogue import DATABASE, FORMAT, SEGMENTS, is_old_layout


def is_index(path: Path) -> bool:
    """Whether `path` is an index, of this format or of an older one."""
    return (path / DATABASE).is_file() or is_old_layout(path)


def describe_index(path: Path) -> Report:
    """The report on the index at `path`.

    Raises GembError as opening it does: MismatchError (5) for another format, DamagedError (1).
    """
    with Index.open(path) as index:
        state, settings = index.state, index.settings
        segments, fields = index.segments(), index.fields()
    database = sum(
        file.stat().st_size for file in path.iterdir() if file.name.startswith(DATABASE) and file.is_file()
    )
    vectors = sum(file.stat().st_size for file in (path / SEGMENTS).rglob("*") if file.is_file())
    encoder = settings.encoder
    graphs = sum(has_graph for _, _, _, has_graph in segments)
    dead = sum(rows - live for _, rows, live, _ in segments)
    each = f"{vectors / state.rows:,.0f} bytes a row" if state.rows else "no rows"
    passages = "" if state.rows == state.documents else f" in {counted(state.rows, 'passage')}"
    rows = [
        ("documents", f"{state.documents:,}{passages}"),
        ("vectors", f"{settings.dims} dims as {settings.dtype}, of unit length"),
        ("first stage", _first_stage(settings.code_dims, settings.dims)),
        ("segments", f"{len(segments):,}, {graphs:,} with a graph, {dead:,} dead rows"),
        ("model", shown_model(encoder) if encoder.get("fingerprint") else "none: its vectors came ready"),
    ]
    if encoder:
        rows += [
            ("document prompt", _prompt(encoder.get("document_prompt"))),
            ("query prompt", _prompt(encoder.get("query_prompt"))),
            ("passages", _passages(encoder.get("passages"), encoder.get("max_tokens"))),
        ]
    rows += [
        ("fields", ", ".join(f"{name} ({type_})" for name, type_ in fields.items()) or "none"),
        ("search by words", "yes" if settings.words else "no"),
        (
            "size on disk",
            f"{readable_bytes(database + vectors)}: {readable_bytes(vectors)} of vectors ({each}), "
            f"{readable_bytes(database)} of documents",
        ),
        ("generation", f"{state.generation:,}, format {FORMAT}"),
    ]
    data: dict[str, object] = {
        "kind": "index",
        "path": str(path),
        "documents": state.documents,
        "rows": state.rows,
        "dims": settings.dims,
        "dtype": settings.dtype,
        "first_stage_dims": settings.code_dims,
        "segments": [
            {"name": name, "rows": total, "live_rows": live, "graph": has_graph}
            for name, total, live, has_graph in segments
        ],
        "graphs": graphs,
        "dead_rows": dead,
        "model": encoder.get("model"),
        "fingerprint": encoder.get("fingerprint"),
        "document_prompt": encoder.get("document_prompt"),
        "query_prompt": encoder.get("query_prompt"),
        "model_dims": encoder.get("model_dims"),
        "max_tokens": encoder.get("max_tokens"),
        "passages": encoder.get("passages"),
        "fields": fields,
        "words": settings.words,
        "bytes": database + vectors,
        "bytes_documents": database,
        "bytes_vectors": vectors,
        "bytes_per_row": round(vectors / state.rows, 3) if state.rows else None,
        "generation": state.generation,
        "format": FORMAT,
    }
    return Report(title=f"{path}: an index of {counted(state.documents, 'document')}", rows=rows, data=data)


def _first_stage(code_dims: int, dims: int) -> str:
    prefix = f"the first {code_dims} dims" if code_dims < dims else f"all {dims} dims"
    return f"int8 codes of {prefix}"


def _prompt(prompt: dict[str, str] | None) -> str:
    if prompt is None:
        return "not recorded; the model's own"
    return f"{prompt['name']}: {prompt['text']!r}" if prompt["text"] else f"{prompt['name']} (no text)"


def _passages(passages: str | None, max_tokens: int | None) -> str:
    if passages is None:
        return "not recorded"
    if passages == "off":
        return "off" if max_tokens is None else f"off; texts are cut at {max_tokens:,} tokens"
    tokens, _, overlap = passages.partition(":")
    repeated = "" if overlap == "0" else f", {overlap} of them repeated in the next"
    return f"of at most {int(tokens):,} tokens{repeated}"

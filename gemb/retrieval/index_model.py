"""The model of an index: what is recorded of it when the index is made, and how it is found again.

`Settings.encoder` of an index holds

    model            a name, or the absolute path of a folder
    fingerprint      64 hex digits of everything the vectors depend on
    document_prompt  {"name", "text"} of what stands before a document
    query_prompt     the same for a query; None where it was not known, then it is the model's own
    model_dims       width of the model's vectors, before any cut
    max_tokens       longest text, or passage, in tokens
    passages         "off", or "TOKENS:OVERLAP" of a passage of a long document

and nothing at all where the vectors came from elsewhere and nobody said by which model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gemb.errors import GembError, MismatchError, UnavailableError
from gemb.model.folder import ModelFolder, fingerprint, read_folder
from gemb.model.hub import DEFAULT_MODEL, find_model
from gemb.text.prompts import QUERY, Prompts, Template

SHOWN_DIGITS = 12
"""How much of a fingerprint people see."""


def record_of(
    folder: ModelFolder, name: str | None, *, document: Template, max_tokens: int, passages: str
) -> dict[str, Any]:
    """What an index keeps of the model in `folder`, which the user called `name`; JSON values only."""
    query = Prompts(folder.prompts, folder.default_prompt).template(QUERY)
    return {
        "model": lasting_name(name),
        "fingerprint": fingerprint(folder),
        "document_prompt": {"name": document.name, "text": document.prefix},
        "query_prompt": {"name": query.name, "text": query.prefix},
        "model_dims": folder.dims,
        "max_tokens": max_tokens,
        "passages": passages,
    }


def lasting_name(name: str | None) -> str:
    """How a later run, in any working folder, finds the model: a folder by its absolute path."""
    name = name or DEFAULT_MODEL
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def find_encoder(
    index: Path,
    encoder: Mapping[str, Any],
    model: str | None,
    *,
    offline: bool,
    announce: Callable[[str], None],
) -> ModelFolder:
    """The folder of the model that made an index: `model` where one is given, else the recorded one.

    An index that has no model recorded takes any `model`; that the widths agree is then the caller's to
    check, and no cut may make them agree.

    Raises MismatchError (5) if it is another model than the recorded one, UnavailableError (7) if it cannot
    be had, GembError if none is recorded and none is given.
    """
    if not encoder and model is None:
        raise GembError(
            f"{index} has vectors without a model, so that a text cannot be embedded for it; "
            "pass the model that made them with -m, or search with --vectors, --like or --lexical"
        )
    name = model or str(encoder["model"])
    try:
        folder = read_folder(find_model(name, offline=offline, announce=announce))
    except UnavailableError as error:
        raise UnavailableError(f"{_made_by(index, encoder, model)}: {error}") from error
    if encoder and (found := fingerprint(folder)) != encoder["fingerprint"]:
        raise MismatchError(
            f"{index} holds vectors of {shown_model(encoder)}, but {name} is {found[:SHOWN_DIGITS]}; "
            "use the model that made the index, or index the documents again"
        )
    return folder


def shown_model(encoder: Mapping[str, Any]) -> str:
    """The recorded model for people: name and the first digits of its fingerprint."""
    return f"{encoder['model']} ({encoder['fingerprint'][:SHOWN_DIGITS]})"


def _made_by(index: Path, encoder: Mapping[str, Any], model: str | None) -> str:
    """What a model that cannot be had was wanted for."""
    if not encoder:
        return f"{index} has no model recorded, and {model} cannot be had"
    made = f"{index} was made by {shown_model(encoder)}"
    if model is None:
        return f"{made}, which cannot be had (pass its present place with -m)"
    return f"{made}, and {model}, given with -m, cannot be had"

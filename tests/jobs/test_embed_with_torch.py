"""The embed job on the real engine: what the files hold is what `Encoder.embed` gives, to the bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb import Encoder
from gemb.errors import Exit, GembError
from gemb.jobs import embed as job
from gemb.jobs.embed import EmbedRecipe
from gemb.model.hub import minilm_folder
from gemb.report import Event
from gemb.vectors import open_vectors
from tests.conftest import DATA
from tests.models import tiny_folder

SETTINGS: dict[str, Any] = {"device": "cpu", "precision": "fp32", "threads": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMB_CACHE", str(tmp_path / "user-cache"))


def texts_of(count: int) -> list[str]:
    random = np.random.default_rng(4)
    return [
        " ".join(f"w{number}" for number in random.integers(4, 200, random.integers(1, 60)))
        for _ in range(count)
    ]


def write(path: Path, texts: list[str]) -> str:
    path.write_text(
        "".join(json.dumps({"id": str(row), "text": text}) + "\n" for row, text in enumerate(texts))
    )
    return str(path)


def vectors_of(path: Path) -> NDArray[np.float32]:
    with open_vectors(path) as vectors:
        return np.array(vectors.block(0, vectors.rows))


@pytest.mark.parametrize("sort", ["bert", "gemma3"])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_the_file_holds_what_the_encoder_gives(tmp_path: Path, sort: str, include_prompt: bool) -> None:
    model = tiny_folder(tmp_path / "model", sort, include_prompt=include_prompt)
    texts = texts_of(80)
    job.run(
        EmbedRecipe(
            inputs=(write(tmp_path / "docs.jsonl", texts),),
            output=tmp_path / "docs.npy",
            model=str(model),
            **SETTINGS,
        )
    )
    wanted = Encoder.load(model, device="cpu", precision="fp32").embed(texts)
    np.testing.assert_array_equal(vectors_of(tmp_path / "docs.npy"), wanted)


def test_batches_of_any_size_and_any_number_of_threads_give_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", "gemma3")
    source = write(tmp_path / "docs.jsonl", texts_of(60))
    files = []
    for number, settings in enumerate(
        ({"threads": 1}, {"threads": 2, "batch_tokens": 7}, {"threads": 3, "batch_tokens": 100_000})
    ):
        output = tmp_path / f"{number}.npy"
        recipe = EmbedRecipe(inputs=(source,), output=output, model=str(model), **{**SETTINGS, **settings})
        job.run(recipe)
        files.append(output.read_bytes())
    assert files[0] == files[1] == files[2]


def test_two_processes_give_the_bytes_of_one_and_one_of_them_may_be_killed(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", "bert")
    source = write(tmp_path / "docs.jsonl", texts_of(3000))
    recipe = EmbedRecipe(inputs=(source,), output=tmp_path / "one.npy", model=str(model), **SETTINGS)
    job.run(recipe)
    killed: list[int] = []
    notes: list[str] = []

    def kill_a_child(event: Event) -> None:
        if event.note:
            notes.append(event.note)
        if event.done > 200 and not killed:
            tasks = Path(f"/proc/{os.getpid()}/task")
            children = [child for path in tasks.glob("*/children") for child in path.read_text().split()]
            workers = [
                int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ]
            killed.append(workers[-1])
            os.kill(killed[0], signal.SIGKILL)

    settings = {**SETTINGS, "device": "cpu,cpu", "batch_tokens": 64}
    report = job.run(
        EmbedRecipe(inputs=(source,), output=tmp_path / "two.npy", model=str(model), **settings), kill_a_child
    )
    assert (tmp_path / "two.npy").read_bytes() == (tmp_path / "one.npy").read_bytes()
    assert notes == ["the process of cpu died (killed by SIGKILL); going on with 1"]
    assert str(report.data["device"]).startswith("2 processes: cpu (")


@pytest.mark.parametrize("precision", ["fp16", "f16"])
def test_float16_is_refused(tmp_path: Path, precision: str) -> None:
    with pytest.raises(ValueError, match="float16 gives NaN in Gemma models"):
        EmbedRecipe(precision=precision)  # type: ignore[arg-type]


def test_a_device_that_is_not_there_is_told(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", "bert")
    recipe = EmbedRecipe(
        inputs=(write(tmp_path / "docs.jsonl", ["w5"]),),
        output=tmp_path / "docs.npy",
        model=str(model),
        device="cuda:7",
    )
    with pytest.raises(GembError, match="--device cuda:7: "):
        job.run(recipe)


@pytest.mark.skipif(minilm_folder() is None, reason="the extra minilm is not installed")
def test_minilm_embeds_real_documents_as_its_encoder_does(tmp_path: Path) -> None:
    corpus = DATA / "retrieval/scifact/corpus.jsonl"
    if not corpus.exists():
        pytest.skip(f"{corpus} is not there")
    with corpus.open(encoding="utf-8") as file:
        documents = [json.loads(next(file)) for _ in range(24)]
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps(document) + "\n" for document in documents), "utf-8")
    report = job.run(
        EmbedRecipe(inputs=(str(source),), output=tmp_path / "docs.npy", model="minilm", **SETTINGS)
    )
    assert report.exit_code == Exit.DONE
    wanted = Encoder.load("minilm", device="cpu", precision="fp32").embed(
        [document["text"] for document in documents], titles=[document["title"] for document in documents]
    )
    np.testing.assert_array_equal(vectors_of(tmp_path / "docs.npy"), wanted)

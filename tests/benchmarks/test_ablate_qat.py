"""The ablation of training for a format: arms that differ in the format alone, and the share of a gap."""

import gzip
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import ablate, ablate_qat
from gemb.jobs.distill import DistillRecipe
from gemb.quantization.roles import grid_of, role_of
from gemb.recipe import load, resolved
from gemb.training.recipe import flat
from tests.models import tiny_folder


def recipe_of(arm: str) -> dict[str, object]:
    return flat(resolved(load(ablate_qat.ARMS / f"{arm}.yaml", DistillRecipe)))


def test_the_arms_differ_in_the_format_alone_and_each_is_a_recipe() -> None:
    assert {file.stem for file in ablate_qat.ARMS.glob("*.yaml")} == set(ablate_qat.FORMATS)
    assert len(list(ablate_qat.wanted())) == 1 + 3 * len(ablate_qat.FORMATS)
    one, other = (recipe_of(arm) for arm in ablate_qat.FORMATS)
    different = {key: (one.get(key), other.get(key)) for key in one.keys() | other.keys()}
    assert {key: both for key, both in different.items() if both[0] != both[1]} == {
        "qat.format": ablate_qat.FORMATS
    }


def test_no_file_that_is_asked_is_trained_on() -> None:
    trained = " ".join((ablate_qat.ARMS / f"{arm}.yaml").read_text() for arm in ablate_qat.FORMATS)
    assert not any(name in trained for name in ablate_qat.PAIRS)


def test_a_snapped_folder_holds_the_weights_on_the_grids_of_their_roles(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", "gemma3", dense=[{}])
    (tmp_path / "model/run").mkdir()
    target = ablate_qat.snapped_folder(tmp_path / "model", tmp_path / "int4", "int4")
    for part in ("", "2_Dense"):
        before, after = (
            load_file(place / part / "model.safetensors") for place in (tmp_path / "model", target)
        )
        for name, weight in before.items():
            role = role_of(name, weight.shape)
            expected = weight if role is None else grid_of(role, "int4").snap(weight)
            assert torch.equal(after[name], expected)
    assert not (target / "run").exists()


def test_pairs_become_a_task_whose_equal_positives_are_one_document(tmp_path: Path) -> None:
    rows = [{"anchor": f"a{row}", "positive": f"p{row // 2}"} for row in range(9_000)]
    with gzip.open(tmp_path / "some.jsonl.gz", "wb") as file:
        file.write(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
    task = ablate_qat.task_of_pairs(tmp_path / "some.jsonl.gz")
    asked = range(0, 9_000, 3)  # 9,000 rows are more than twice 4,000
    assert task.name == "some"
    assert task.roles["queries"].texts == [f"a{row}" for row in asked]
    documents = task.roles["documents"].texts
    assert len(documents) == len(set(documents)) == len(task.document_ids)
    for query, row in zip(task.query_ids, asked, strict=True):
        (document,) = task.qrels[query]
        assert documents[task.document_ids.index(document)] == f"p{row // 2}"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ablate_qat, "LINES", tmp_path / "results" / "ablations-qat.jsonl")
    return tmp_path / "results"


def line(arm: str, seed: int, **measures: float) -> dict[str, Any]:
    forms = {f"{name} sts [{form}]": value for form, value in measures.items() for name in ("one", "other")}
    return {"arm": arm, "seed": seed, "recipe": ablate_qat.digest_of(arm), "measures": forms}


def test_the_share_is_that_of_the_mean_over_the_seeds_that_are_there(place: Path) -> None:
    for one in (
        line("source", 0, float=0.71, int4=0.65, mixed=0.75),
        line("int4", 1, int4=0.66),
        line("int4", 2, int4=0.70),
        line("mixed", 3, mixed=0.74),
    ):
        ablate.append(one, ablate_qat.LINES)
    found = dict(ablate_qat.shares(ablate_qat.finished(), "int4"))
    assert list(found) == ["one sts", "other sts", "mean sts of 2"]
    for row in found.values():
        assert row == pytest.approx(
            {"float": 0.71, "without": 0.65, "with": 0.68, "spread": 0.02 * 2**0.5, "share": 0.5, "seeds": 2}
        )
    page = ablate_qat.table(ablate_qat.finished())
    assert "| one sts | 0.7100 | 0.6500 | 0.6800 ± 0.0283 | 50% |" in page
    assert "| mean sts of 2 | 0.7100 | 0.7500 | 0.7400 ± 0.0000 | no gap |" in page
    assert "Partial: 4 of 7 runs; missing mixed/1, mixed/2, int4/3." in page


def test_without_the_source_there_is_nothing_to_compare_with(place: Path) -> None:
    ablate.append(line("int4", 1, int4=0.66), ablate_qat.LINES)
    assert list(ablate_qat.shares(ablate_qat.finished(), "int4")) == []
    assert ablate_qat.table(ablate_qat.finished()).rstrip().endswith("No run yet.")


def test_lines_of_a_changed_recipe_or_half_a_line_are_missing(place: Path) -> None:
    ablate.append(line("int4", 1, int4=0.5), ablate_qat.LINES)
    ablate.append({**line("int4", 2, int4=0.5), "recipe": "other"}, ablate_qat.LINES)
    with ablate_qat.LINES.open("ab") as file:
        file.write(b'{"arm": "int4", "se')
    assert set(ablate_qat.finished()) == {("int4", 1)}
    ablate.append(line("int4", 3, int4=0.5), ablate_qat.LINES)
    assert set(ablate_qat.finished()) == {("int4", 1), ("int4", 3)}

import json
from pathlib import Path
from typing import Any

import pytest

from gemb.engine.encoder import Encoder
from gemb.engine.torch_engine import TorchEngine
from gemb.errors import Exit, GembError
from gemb.jobs import eval as job
from gemb.jobs.eval import EvalRecipe
from tests.conftest import ROOT
from tests.evaluation.test_retrieval import write_beir

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DATA = ROOT.parent / "shared/data"
VERBS = ("sleeps", "eats", "sings")
PAIRS = [
    ("a cat sits on the mat", "a cat is sitting on a mat", 5.0),
    ("a man plays the guitar", "a man is eating an apple", 0.5),
    ("two dogs run in a field", "dogs are running outside", 4.0),
    ("the plane is landing", "a woman peels a potato", 0.0),
]


@pytest.fixture
def sts(tmp_path: Path) -> Path:
    path = tmp_path / "sts.jsonl"
    rows = [{"sentence1": first, "sentence2": second, "score": score} for first, second, score in PAIRS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*data: Path, **settings: Any) -> Any:  # noqa: ANN401
    recipe = EvalRecipe(
        model="minilm", data=tuple(str(path) for path in data), threads=1, precision="fp32", **settings
    )
    return job.run(recipe)


def test_a_result_takes_the_place_of_a_result_alone(tmp_path: Path, sts: Path) -> None:
    results, picture = tmp_path / "new/results.json", tmp_path / "new/sizes.png"
    for _ in range(2):
        run(sts, dims=(384, 64), output=results, plot=picture)
    before = sts.read_bytes()
    notes, photo = tmp_path / "notes.json", tmp_path / "photo.png"
    notes.write_text('{"a": 1}')
    photo.write_bytes(b"\x89PNG\r\n\x1a\n")
    for settings, message in (
        ({"plot": sts}, f"--plot {sts} is no .png file; give it a name that ends so"),
        (
            {"space": tmp_path / "s.jpg"},
            f"--space {tmp_path}/s.jpg is no .png file; give it a name that ends so",
        ),
        ({"output": sts}, f"--output {sts} is no .json file; give it a name that ends so"),
        (
            {"output": notes},
            f"--output {notes} exists and is no result of gemb eval; choose another path, or remove it",
        ),
        (
            {"plot": photo},
            f"--plot {photo} exists and is no result of gemb eval; choose another path, or remove it",
        ),
        (
            {"plot": picture, "space": picture},
            f"--plot and --space are both {picture}; give each a file of its own",
        ),
    ):
        with pytest.raises(GembError) as caught:
            run(sts, **settings)
        assert str(caught.value) == message
    assert sts.read_bytes() == before
    assert notes.read_text() == '{"a": 1}'


def test_every_data_set_is_scored_in_every_view(tmp_path: Path, sts: Path) -> None:
    output = tmp_path / "results.json"
    report = run(write_beir(tmp_path / "sea"), sts, dims=(384, 64), dtype=("f32", "int8"), output=output)
    lines = [
        (result["data"], result["dims"], result["dtype"], result["bytes"])
        for result in report.data["results"]
    ]
    views = [(384, "f32", 1536), (384, "int8", 384), (64, "f32", 256), (64, "int8", 64)]
    assert lines == [(name, *view) for name in ("sea", "sts") for view in views]
    assert report.data["results"][0]["value"] == 1.0
    assert report.data["results"][4]["value"] == pytest.approx(1.0)
    assert report.data["means"][0] == {
        "dims": 384,
        "dtype": "f32",
        "bytes": 1536,
        "value": pytest.approx(1.0),
    }
    assert json.loads(output.read_text())["results"] == report.data["results"]
    assert [row[0] for row in report.tables[0].rows] == ["sea"] * 4 + ["sts"] * 4 + ["mean"] * 4


def test_a_picture_is_drawn(tmp_path: Path, sts: Path) -> None:
    report = run(sts, dims=(384, 64), plot=tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
    assert report.outputs == [tmp_path / "sizes.png"]


def test_a_model_against_itself_ties_and_passes_the_gate(sts: Path) -> None:
    report = run(sts, against="minilm", fail_on_regression=True)
    assert report.exit_code == Exit.DONE
    (verdict,) = report.data["verdicts"]
    assert (verdict["verdict"], verdict["difference"], verdict["against"]) == ("TIE", 0, pytest.approx(1.0))


def test_a_regression_ends_with_the_exit_code_of_a_gate(sts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemb.evaluation import Comparison

    monkeypatch.setattr(job, "compare", lambda mine, other, seed: Comparison(-0.2, -0.3, -0.1))
    assert run(sts, against="minilm", fail_on_regression=True).exit_code == Exit.GATE
    assert run(sts, against="minilm").exit_code == Exit.DONE


def translations(path: Path) -> Path:
    texts = [f"{animal} {verb} here" for animal in ("a cat", "a dog", "a cow", "an owl") for verb in VERBS]
    path.write_text("".join(f"{text}\t{text.upper()} NOW\n" for text in texts))
    return path


def test_a_space_is_drawn_and_its_numbers_are_in_the_results(tmp_path: Path) -> None:
    report = run(translations(tmp_path / "loud.tsv"), space=tmp_path / "space.png", dims=(64,))
    assert (tmp_path / "space.png").read_bytes().startswith(b"\x89PNG")
    assert report.outputs == [tmp_path / "space.png"]
    (space,) = report.data["space"]
    assert (space["data"], space["dims"], space["pairs"]) == ("loud", 64, 12)
    assert space["top1_similarity"]["count"] == 12
    assert 0 <= space["probe_accuracy"] <= 1
    assert any(name == "space" and line.startswith("minilm, loud: probe ") for name, line in report.rows)


def test_a_second_evaluation_with_a_cache_computes_nothing(
    sts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(sts)
    first = run(sts, cache=tmp_path / "cache")
    monkeypatch.setattr(TorchEngine, "forward", lambda *_: pytest.fail("computed again"))
    second = run(sts, cache=tmp_path / "cache")
    assert plain.data["results"] == first.data["results"] == second.data["results"]


def test_a_metric_under_its_bound_ends_with_the_exit_code_of_a_gate(sts: Path) -> None:
    report = run(sts, fail_under=("pearson", 1.5))
    assert report.exit_code == Exit.GATE
    pearson = report.data["results"][0]["metrics"]["pearson"]
    assert ("under", f"sts, 384 f32: pearson {pearson:.4f} is under 1.5") in report.rows
    assert run(sts, fail_under=("pearson", 0.1)).exit_code == Exit.DONE
    with pytest.raises(GembError) as caught:
        run(sts, fail_under=("ndcg@10", 0.1))
    assert str(caught.value) == "--fail-under: no data set has ndcg@10; there is spearman, pearson"


def test_data_without_two_towers_have_no_space_and_no_model_is_loaded(
    sts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(GembError, match=r"^sts is similarity, which has no queries and documents; --space"):
        run(sts, space=tmp_path / "space.png")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data": ()}, GembError, "no data given; gemb eval MODEL scifact/ stsb.test.jsonl"),
        (
            {"data": ("x.jsonl",), "fail_on_regression": True},
            GembError,
            "--fail-on-regression compares with another model; name it with --against",
        ),
        (
            {"data": ("nothing.jsonl",)},
            GembError,
            "there is no nothing.jsonl to evaluate on; check the path",
        ),
    ],
)
def test_mistakes_show_before_a_model_is_loaded(
    settings: dict[str, Any], error: type[GembError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(error) as caught:
        job.run(EvalRecipe(**settings))
    assert str(caught.value) == message


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_known_data_give_the_known_figures() -> None:
    report = run(DATA / "retrieval/time", DATA / "sts/stsb/stsb-en.test.jsonl")
    found = {result["data"]: result["metrics"] for result in report.data["results"]}
    assert found["time"]["nDCG@10"] == pytest.approx(0.5832, abs=5e-4)
    assert found["time"]["R@100"] == pytest.approx(0.8983, abs=5e-4)
    assert found["stsb-en"]["spearman"] == pytest.approx(0.8203, abs=5e-4)
    assert found["stsb-en"]["pearson"] == pytest.approx(0.8274, abs=5e-4)

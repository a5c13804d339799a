"""`gemb distill` from recipe to model folder: what is learnt, kept, dropped and refused, and a kill."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gemb.engine.encoder import Encoder
from gemb.errors import GembError, Interrupted, MismatchError, UnavailableError
from gemb.jobs.distill import DistillRecipe, plan, run
from gemb.model.folder import read_folder
from gemb.recipe import load
from gemb.report import Event, Report
from tests.conftest import Finished
from tests.jobs.test_train import write_pairs
from tests.models import tiny_folder

RECIPE = """model: ./base
teacher:
  model: ./teacher
  prompts: {query: none, passage: none}
data:
  - {path: pairs.jsonl, prompts: {query: query, passage: document}}
evaluation:
  pairs: [{path: held-out.jsonl, prompts: {query: query, passage: document}}]
losses:
  - {name: matching, projection: true}
  - {name: contrastive, weight: 0.1}
  - {name: spread_out, weight: 0.1}
batch: {pairs: 8}
optimizer: {learning_rate: 3e-3}
steps: 6
checkpoint: {every: 2}
precision: fp32
threads: 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a student, a wider teacher of another family, data, and a recipe."""
    folder = tmp_path_factory.mktemp("distill")
    tiny_folder(folder / "base", "gemma3")
    tiny_folder(folder / "teacher", "bert", dense=[{"out_features": 96}])
    write_pairs(folder / "pairs.jsonl")
    write_pairs(folder / "held-out.jsonl", 12, seed=1)
    (folder / "r.yaml").write_text(RECIPE, "utf-8")
    return folder


def distilled(place: Path, output: Path, *changes: str, **more: Any) -> Report:  # noqa: ANN401
    return run(load(place / "r.yaml", DistillRecipe, changes, {"output": output}), **more)


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Report, Path]:
    """The uninterrupted run."""
    output = place / "whole"
    return distilled(place, output), output


def losses(output: Path, name: str) -> list[float]:
    lines = (output / "run" / "metrics.jsonl").read_text().splitlines()
    return [one[f"loss/{name}"] for one in map(json.loads, lines) if f"loss/{name}" in one]


def test_the_student_comes_closer_to_the_teacher_and_each_term_is_logged(whole: tuple[Report, Path]) -> None:
    matching = losses(whole[1], "matching")
    assert matching[-1] < matching[0]
    assert len(losses(whole[1], "contrastive")) == len(losses(whole[1], "spread_out")) == 6


def test_the_map_to_the_teacher_is_trained_kept_in_checkpoints_and_dropped(
    place: Path, tmp_path: Path
) -> None:
    distilled(place, tmp_path / "out", "checkpoint.keep_after=true", "checkpoint.keep=3")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert names == load_file(place / "base" / "model.safetensors").keys()
    checkpoints = sorted((tmp_path / "out" / "run" / "checkpoints").iterdir())
    maps = [load_file(one / "weights.safetensors")["to_teacher.weight"] for one in checkpoints]
    assert maps[0].shape == (96, 64)
    assert not torch.equal(maps[0], maps[-1])
    assert Encoder.load(tmp_path / "out", threads=1).embed(["w4 w5"]).shape == (1, 64)


def test_the_report_tells_the_share_of_the_teachers_quality(whole: tuple[Report, Path]) -> None:
    report, output = whole
    measures = json.loads((output / "gemb.json").read_text())["measures"]
    (name,) = measures["after"]
    teacher = report.data["teacher"]
    assert isinstance(teacher, dict)
    assert teacher["share"] == pytest.approx(measures["after"][name] / measures["teacher"][name])
    assert dict(report.rows)[f"{name}, of the teacher's"] == (
        f"{measures['after'][name]:.3f} of {measures['teacher'][name]:.3f}"
    )
    assert report.title.startswith("distilled ")
    assert f" taught by {teacher['name']} with gemb " in (output / "README.md").read_text()


def test_the_teachers_quality_is_what_it_reaches_with_its_own_prompts(
    place: Path, whole: tuple[Report, Path]
) -> None:
    encoder = Encoder.load(place / "teacher", threads=1, precision="fp32")
    rows = [json.loads(line) for line in (place / "held-out.jsonl").read_text().splitlines()]
    queries = encoder.embed([row["query"] for row in rows], as_="none")
    passages = encoder.embed([row["positive"] for row in rows], as_="none")
    ranks = np.argsort(-(queries @ passages.T), axis=1).argsort(axis=1).diagonal()
    gains = np.where(ranks < 10, 1 / np.log2(ranks + 2), 0)
    (value,) = json.loads((whole[1] / "gemb.json").read_text())["measures"]["teacher"].values()
    assert value == pytest.approx(gains.mean())


@pytest.mark.parametrize(
    ("prompts", "names", "prefixes"),
    [
        ("{query: none, passage: none}", ("none", "none"), ("", "")),
        ("{query: query, passage: document}", ("query", "document"), ("", "")),
        ('{query: {text: "w9 "}, passage: {text: "w8 w7 "}}', ("none", "none"), ("w9 ", "w8 w7 ")),
    ],
)
def test_the_value_of_matching_is_the_distance_to_the_teachers_vectors(
    place: Path, tmp_path: Path, prompts: str, names: tuple[str, str], prefixes: tuple[str, str]
) -> None:
    # One step of all rows, so that the first line of the metrics is of the first student and all texts.
    changes = ["losses=[{name: matching}]", "batch.pairs=48", "steps=1", f"teacher.prompts={prompts}"]
    distilled(place, tmp_path / "out", *changes)
    teacher = Encoder.load(place / "teacher", threads=1, precision="fp32")
    student = Encoder.load(place / "base", threads=1, precision="fp32")
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    expected = 0.0
    for role in ("query", "positive", "negative"):
        is_passage = role != "query"
        texts = [row[role] for row in rows if role in row]
        mine = student.embed(texts, as_="document" if is_passage else "query")
        # Of the wider teacher the first 64 coordinates, at unit length.
        given = [prefixes[is_passage] + text for text in texts]
        theirs = teacher.embed(given, as_=names[is_passage], dims=64)
        expected += float(np.linalg.norm(mine - theirs, axis=1).mean())
    assert losses(tmp_path / "out", "matching")[0] == pytest.approx(expected, rel=1e-4)


def test_without_hard_negatives_their_part_is_missing(
    place: Path, tmp_path: Path, whole: tuple[Report, Path]
) -> None:
    distilled(place, tmp_path / "out", "losses.0.hard_negatives=false", "steps=1")
    assert losses(tmp_path / "out", "matching")[0] < losses(whole[1], "matching")[0] * 0.8


def test_a_text_is_never_given_to_the_teacher_twice(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gemb.engine.torch_engine import TorchEngine

    real = TorchEngine.forward
    rows: list[int] = []

    def counted(self: TorchEngine, batch: Any) -> Any:  # noqa: ANN401
        rows.append(len(batch.lengths))
        return real(self, batch)

    monkeypatch.setattr(TorchEngine, "forward", counted)
    cache = f"teacher.cache={tmp_path / 'cache'}"
    distilled(place, tmp_path / "one", cache, "evaluation.pairs=[]", "epochs=3", "steps=null")
    texts = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    assert sum(rows) == sum(len(row) for row in texts)
    rows.clear()
    distilled(place, tmp_path / "two", cache, "evaluation.pairs=[]", "seed=3")
    assert not rows


def test_vectors_taken_ahead_give_the_same_student(
    place: Path, tmp_path: Path, whole: tuple[Report, Path]
) -> None:
    stages: list[str] = []

    def hear(event: Event) -> None:
        stages.append(event.stage)

    recipe = load(place / "r.yaml", DistillRecipe, ["teacher.ahead=true"], {"output": tmp_path / "out"})
    run(recipe, hear)
    assert "asking the teacher" in stages
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        whole[1] / "model.safetensors"
    ).read_bytes()


def test_a_distillation_stopped_in_the_middle_goes_on_to_the_same_student(
    place: Path, tmp_path: Path, whole: tuple[Report, Path]
) -> None:
    output = tmp_path / "stopped"

    def stop(event: Event) -> None:
        if event.stage == "training" and event.done == 3:
            os.kill(os.getpid(), 15)

    with pytest.raises(Interrupted):
        distilled(place, output, on_progress=stop)
    distilled(place, output)
    assert (output / "model.safetensors").read_bytes() == (whole[1] / "model.safetensors").read_bytes()


def test_a_student_is_cut_from_another_model(place: Path, tmp_path: Path) -> None:
    changes = ["model=null", f"student={{from: {place / 'base'}, keep_layers: [0, 2], keep_vocab: data}}"]
    report = distilled(place, tmp_path / "out", *changes)
    assert report.title.startswith(f"distilled {place / 'base'}, layers 0 2, vocabulary of data on ")
    before, after = (load_file(folder / "model.safetensors") for folder in (place / "base", tmp_path / "out"))
    (table,) = (name for name in before if "embed_tokens" in name)
    assert len(after[table]) < len(before[table])
    assert len(after) < len(before)
    assert Encoder.load(tmp_path / "out", threads=1).embed(["w4 w5"], as_="query").shape == (1, 64)


def test_the_vocabulary_of_a_student_may_come_from_files(place: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "w4 w5 w6"}\n{"title": "w7", "text": "w8"}\n')
    student = f"{{from: {place / 'base'}, keep_vocab: [{tmp_path / 'texts.jsonl'}], vocabulary: 9}}"
    distilled(place, tmp_path / "out", "model=null", f"student={student}", "steps=1")
    sizes = [
        json.loads((folder / "config.json").read_text())["vocab_size"]
        for folder in (place / "base", tmp_path / "out")
    ]
    assert sizes[1] < sizes[0]


def test_a_small_random_student_is_made_on_the_spot(place: Path, tmp_path: Path) -> None:
    prompts = "data.0.prompts={query: none, passage: none}"
    nothing = "evaluation.pairs=[]"
    distilled(place, tmp_path / "out", "model=null", "student={from: tiny-gemma3}", prompts, nothing)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 192


RANDOM = {
    "model_type": "gemma3_text",
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "use_bidirectional_attention": True,
}
NO_PROMPTS = ("model=null", "data.0.prompts=none", "evaluation.pairs.0.prompts=none")


def test_a_student_of_a_config_has_its_shape_and_weights_of_the_seed(place: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**RANDOM, "num_hidden_layers": 3}))
    student = f"student={{config: {tmp_path / 'config.json'}, tokenizer: {place / 'teacher'}}}"
    report = distilled(place, tmp_path / "out", *NO_PROMPTS, student, "max_tokens=40")
    assert report.title.startswith("distilled gemma3_text with random weights on ")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (48, 3, 200)
    assert losses(tmp_path / "out", "matching")[-1] < losses(tmp_path / "out", "matching")[0]
    encoder = Encoder.load(tmp_path / "out", threads=1)
    assert encoder.embed(["w4 w5"], as_="none").shape == (1, 48)
    assert read_folder(tmp_path / "out").max_tokens == 40
    # The same keys in the recipe make the same student.
    keys = json.dumps({**RANDOM, "num_hidden_layers": 3})
    student = f"student={{config: {keys}, tokenizer: {place / 'teacher'}}}"
    distilled(place, tmp_path / "keys", *NO_PROMPTS, student, "max_tokens=40")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "keys"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_student_of_another_config_is_another_run_and_overwrite_makes_it(
    place: Path, tmp_path: Path
) -> None:
    def stop(event: Event) -> None:
        if event.stage == "training" and event.done == 3:
            os.kill(os.getpid(), 15)

    def student(width: int) -> str:
        keys = json.dumps({**RANDOM, "hidden_size": width})
        return f"student={{config: {keys}, tokenizer: {place / 'teacher'}}}"

    with pytest.raises(Interrupted):
        distilled(place, tmp_path / "out", *NO_PROMPTS, student(48), on_progress=stop)
    with pytest.raises(GembError, match=r"student\.config\.hidden_size was 48, now 32"):
        distilled(place, tmp_path / "out", *NO_PROMPTS, student(32))
    distilled(place, tmp_path / "out", *NO_PROMPTS, student(32), overwrite=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 32


@pytest.mark.parametrize(
    ("config", "tokenizer", "message"),
    [
        ("PLACE/absent.json", "teacher",
         "cannot read PLACE/absent.json: no such file or folder; check the path"),
        ("PLACE/bare.json", "teacher",
         "PLACE/bare.json has no model_type; give that of transformers, such as gemma3_text"),
        ('{"hidden_size": 48}', "teacher",
         "student.config has no model_type; give that of transformers, such as gemma3_text"),
        (json.dumps(RANDOM), "empty", "PLACE/empty has no tokenizer.json; name a folder with one"),
        (json.dumps({**RANDOM, "vocab_size": 150}), "teacher",
         "the config's vocab_size is 150, but the tokenizer in PLACE/teacher has 200 entries; "
         "leave vocab_size out"),
        (json.dumps({**RANDOM, "hiden_size": 48}), "teacher",
         "a gemma3_text has no hiden_size; did you mean hidden_size?"),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_student_is_told(
    place: Path, tmp_path: Path, config: str, tokenizer: str, message: str
) -> None:
    (place / "bare.json").write_text('{"hidden_size": 48}')
    (place / "empty").mkdir(exist_ok=True)
    student = f"student={{config: {config}, tokenizer: {place / tokenizer}}}"
    with pytest.raises(GembError) as caught:
        distilled(place, tmp_path / "out", *NO_PROMPTS, student.replace("PLACE", str(place)))
    assert str(caught.value) == message.replace("PLACE", str(place))


def test_score_matching_teaches_without_a_map(place: Path, tmp_path: Path) -> None:
    distilled(place, tmp_path / "out", "losses=[{name: score_matching}]")
    values = losses(tmp_path / "out", "score_matching")
    assert values[-1] < values[0]


@pytest.mark.parametrize("name", ["matching", "contrastive", "score_matching"])
def test_in_batch_negatives_are_told_only_where_a_term_has_them(
    place: Path, tmp_path: Path, name: str
) -> None:
    events: list[Event] = []
    terms = "losses=[{name: matching, projection: true}" + (
        "]" if name == "matching" else f", {{name: {name}}}]"
    )
    distilled(place, tmp_path / "out", terms, "steps=1", on_progress=events.append)
    notes = [event.note for event in events]
    told = [note for note in notes if note.startswith("each query has 7 in-batch negatives")]
    assert len(told) == (name != "matching")
    assert ("each batch has 8 pairs" in notes) is (name == "matching")


def test_a_layer_that_the_model_does_not_have_is_told_where_it_was_written(
    place: Path, tmp_path: Path
) -> None:
    file = tmp_path / "r.yaml"
    student = "student:\n  from: BASE\n  keep_layers: [0, 9]\n".replace("BASE", str(place / "base"))
    file.write_text(
        student + RECIPE.removeprefix("model: ./base\n").replace("./teacher", str(place / "teacher"))
        .replace("pairs.jsonl", str(place / "pairs.jsonl"))
        .replace("held-out.jsonl", str(place / "held-out.jsonl")), "utf-8"
    )  # fmt: skip
    message = f"{place / 'base'} has no layer 9; keep_layers takes 0 to 3"
    with pytest.raises(GembError) as caught:
        run(load(file, DistillRecipe, (), {"output": tmp_path / "out"}))
    assert str(caught.value) == f"{file}: 1 problem\n  line 3: student.keep_layers: {message}"
    assert caught.value.exit_code == 2
    changes = ["model=null", f"student={{from: {place / 'base'}, keep_layers: [0, 9]}}"]
    with pytest.raises(GembError) as caught:
        distilled(place, tmp_path / "out", *changes)
    assert str(caught.value) == f"{place / 'r.yaml'}: 1 problem\n  student: {message}"


def test_a_plan_tells_the_terms_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    found = plan(load(place / "r.yaml", DistillRecipe, (), {"output": tmp_path / "out"}))
    terms = found.data["terms"]
    assert isinstance(terms, dict)
    assert set(terms) == {"matching", "contrastive", "spread_out"}
    assert found.title == f"would distil {place / 'base'} into {tmp_path / 'out'}"
    assert dict(found.rows)["teacher"] == f"{place / 'teacher'}, 96 wide"
    assert not any(tmp_path.iterdir())


def test_a_finished_distillation_is_not_done_again_and_another_teacher_is_another_run(
    place: Path, whole: tuple[Report, Path]
) -> None:
    assert distilled(place, whole[1]).data["already_done"]
    with pytest.raises(GembError) as caught:
        distilled(place, whole[1], "teacher.model=minilm")
    assert "teacher.model was " in str(caught.value)


def test_a_teacher_whose_weights_changed_meanwhile_is_refused(place: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.stage == "training" and event.done == 3:
            os.kill(os.getpid(), 15)

    tiny_folder(tmp_path / "teacher", "bert")
    changed = f"teacher.model={tmp_path / 'teacher'}"
    with pytest.raises(Interrupted):
        distilled(place, tmp_path / "out", changed, on_progress=stop)
    tiny_folder(tmp_path / "teacher", "bert", pooling="cls")
    with pytest.raises(GembError) as caught:
        distilled(place, tmp_path / "out", changed)
    assert "model teacher was " in str(caught.value)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            ["teacher=null"],
            GembError,
            "no teacher given; a distillation needs one, such as teacher: {model: minilm}",
        ),
        (["teacher.model=/nowhere"], UnavailableError, None),
        (["teacher.prompts.query=qury"], MismatchError, None),
        (
            ["teacher.max_tokens=9000"],
            MismatchError,
            "teacher.max_tokens is 9,000, but TEACHER takes 48 at most; lower it",
        ),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(
    place: Path, tmp_path: Path, changes: list[str], kind: type[GembError], message: str | None
) -> None:
    with pytest.raises(kind) as caught:
        distilled(place, tmp_path / "out", *changes)
    if message is not None:
        assert str(caught.value) == message.replace("TEACHER", str(place / "teacher"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["losses=[{name: contrastive}]"],
            "losses (contrastive) use no teacher; add - name: matching, or use gemb train",
        ),
        (
            ["student={from: minilm}"],
            "model and student are both given; the student is one of them",
        ),
        (
            ["teacher={}"],
            "neither model nor vectors is given; a teacher is one of them",
        ),
        (
            ["student={from: minilm, keep_layers: [2, 1]}", "model=null"],
            "keep_layers is [2, 1]; give each layer once, ascending from 0",
        ),
        (
            ["student={from: minilm, vocabulary: 9}", "model=null"],
            "vocabulary is counted over the texts of keep_vocab; give those, too",
        ),
        (
            ["student={config: c.json}", "model=null"],
            "config and tokenizer go together; give both, or from",
        ),
        (
            ["student={from: minilm, config: c.json, tokenizer: minilm}", "model=null"],
            "from and config are both given; a student is cut from a model, or made anew",
        ),
        (
            ["student={config: c.json, tokenizer: minilm, keep_layers: [1]}", "model=null"],
            "a student of a config is made anew and has nothing to keep; use from",
        ),
        (
            ["student={from: tiny-gemma3, keep_layers: [1]}", "model=null"],
            "tiny-gemma3 is made anew and has nothing to keep; name another model",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(
    place: Path, tmp_path: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(GembError) as caught:
        load(place / "r.yaml", DistillRecipe, changes, {"output": tmp_path / "out"})
    assert message in str(caught.value)


def test_distillation_from_the_command_line(
    place: Path, tmp_path: Path, gemb: Callable[..., Finished]
) -> None:
    output = tmp_path / "out"
    done = gemb("distill", place / "r.yaml", "steps=2", "-o", output, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["teacher"]["dims"] == 96
    assert (output / "model.safetensors").is_file()
    done = gemb("distill", place / "r.yaml", "steps=3", "-o", output, "--overwrite", "--dry-run")
    assert (done.code, "exists and will be replaced" in " ".join(done.out.split())) == (0, True)
    done = gemb("distill", place / "r.yaml", "teacher=null", "-o", tmp_path / "other")
    assert (done.code, done.err) == (
        2,
        "gemb: no teacher given; a distillation needs one, such as teacher: {model: minilm}\n",
    )

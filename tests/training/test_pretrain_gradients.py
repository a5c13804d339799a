"""Gradients of rows: the same in chunks and over ranks, and at first those of the cross-attention alone."""

import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gemb.model.trainable.language_model import LanguageBatch, TeacherStates
from gemb.text.denoising import NO_TARGET
from gemb.training.checkpoints import Checkpoints
from gemb.training.gradients import Gradients, MemoryPlan, Stopped
from gemb.training.loop import Batches, Hooks, Length, Progress, Training
from gemb.training.pretrain_batches import PretrainBatch
from gemb.training.pretrain_gradients import LanguageGradients
from gemb.training.pretrain_rows import row_maker
from gemb.training.ranks import Ranks
from tests.training.pretrain_fakes import CONFIG, TinyLanguageModel, tokeniser
from tests.training.test_pretrain_rows import piece, recipe

WHOLE = MemoryPlan(1 << 20, 1 << 20)


def batch(objective: str = "ul2", rows: int = 12) -> PretrainBatch:
    made = row_maker(recipe(objective), tokeniser(), CONFIG, 34)
    pieces = [piece(2 + 5 * number % 29, number) for number in range(rows)]
    return PretrainBatch("texts", [made.of(one, 0, 0) for one in pieces], sum(len(one.ids) for one in pieces))


def learned(
    plan: MemoryPlan = WHOLE, objective: str = "ul2", ranks: Ranks | None = None
) -> tuple[Gradients, dict[str, Tensor]]:
    model = TinyLanguageModel()
    named = list(model.named_parameters())
    found = LanguageGradients(model, named, ranks=ranks or Ranks())(batch(objective), 0)(
        plan, threading.Event()
    )
    return found, {name: one.grad for name, one in named if one.grad is not None}


def close(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tokens", [30, 64, 200])
def test_gradients_of_chunks_are_those_of_the_whole_batch(tokens: int) -> None:
    whole, gradients = learned()
    cut, others = learned(MemoryPlan(tokens, tokens))
    close(gradients, others)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
    assert cut.measures == pytest.approx(whole.measures)


class OneOf(Ranks):
    """A rank whose sums are taken by the test."""

    def sum_gradients(self, parameters: object) -> None:
        """Leaves them apart."""

    def any(self, here: bool) -> bool:
        """Of this rank alone."""
        return here

    def total(self, values: object) -> list[float]:
        """Of this rank alone."""
        return list(values)  # type: ignore[call-overload, no-any-return]


def test_the_sum_over_ranks_is_the_gradient_of_one() -> None:
    whole, gradients = learned()
    parts = [learned(ranks=OneOf(index, 3)) for index in range(3)]
    close({name: sum(part[1][name] for part in parts) for name in gradients}, gradients)  # type: ignore[misc]
    assert sum(part[0].loss for part in parts) == pytest.approx(whole.loss, rel=1e-6)


def test_the_loss_is_the_mean_over_the_targets_of_all_rows() -> None:
    made = batch("causal")
    model = TinyLanguageModel()
    sums = [model.loss(made.take([row])) for row in range(len(made.rows))]
    assert made.targets == sum(one.tokens for one in sums)
    found, _ = learned(objective="causal")
    assert found.loss == pytest.approx(sum(one.cross_entropy for one in sums) / made.targets, rel=1e-5)
    assert found.measures["accuracy"] == sum(one.correct for one in sums) / made.targets


def test_a_stop_between_chunks_is_told() -> None:
    model = TinyLanguageModel()
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        LanguageGradients(model, list(model.named_parameters()))(batch(), 0)(WHOLE, stop)


def test_a_teacher_that_is_the_text_itself_teaches_cross_entropy() -> None:
    made = batch("prefix_lm")

    def sure(asked: LanguageBatch) -> TeacherStates:
        targets = asked.targets[asked.targets != NO_TARGET]
        scores = torch.full((len(targets), 75), -torch.inf)
        scores[torch.arange(len(targets)), torch.from_numpy(targets).long()] = 0.0
        return TeacherStates(scores, scores)

    model = TinyLanguageModel()
    named = list(model.named_parameters())
    taught = LanguageGradients(model, named, teacher=sure)(made, 0)(WHOLE, threading.Event())
    gradients = {name: one.grad.clone() for name, one in named if one.grad is not None}
    plain, others = learned(objective="prefix_lm")
    assert taught.loss == pytest.approx(plain.loss, rel=1e-5)
    assert taught.measures["cross_entropy"] == pytest.approx(plain.loss, rel=1e-5)
    close(gradients, others)


class Repeated(Batches[PretrainBatch]):
    """The same batch again and again."""

    position = None

    def __iter__(self) -> Iterator[PretrainBatch]:
        """Without an end."""
        while True:
            yield batch()


def test_in_the_warm_up_only_the_cross_attention_changes_and_then_all_does(tmp_path: Path) -> None:
    model = TinyLanguageModel()
    named = list(model.named_parameters())
    seen: list[dict[str, Tensor]] = [{name: one.detach().clone() for name, one in named}]
    hooks = Hooks(on_step=lambda report: seen.append({name: one.detach().clone() for name, one in named}))
    Training(
        model=model,
        parameters=[one for _, one in named],
        optimizer=torch.optim.AdamW([one for _, one in named], lr=0.01, weight_decay=0.1),
        learn=LanguageGradients(model, named, frozenset({"cross_attn"}), steps_alone=3),
        batches=Repeated(),
        length=Length(steps=5),
        rate=lambda share: 1.0,
        clip=lambda parameters: float(nn.utils.clip_grad_norm_(parameters, math.inf)),
        checkpoints=Checkpoints(tmp_path),
        metrics=None,
        progress=Progress(WHOLE),
        hooks=hooks,
    ).run(threading.Event())
    for step in range(5):
        before, after = seen[step], seen[step + 1]
        assert not torch.equal(after["cross_attn"], before["cross_attn"])
        for name in ("table", "head"):
            assert torch.equal(after[name], before[name]) == (step < 3)


def test_rows_of_a_batch_are_packed_in_order_with_their_sources() -> None:
    made = batch(rows=3)
    taken = made.take([2, 0])
    rows = [made.rows[2].row, made.rows[0].row]

    def joined(parts: list[NDArray[np.int32]]) -> list[int]:
        return np.concatenate(parts).tolist()  # type: ignore[no-any-return]

    assert taken.ids.tolist() == joined([one.ids for one in rows])
    assert taken.targets.tolist() == joined([one.targets for one in rows])
    assert taken.source_ids.tolist() == joined([one.source for one in rows])
    assert taken.source_lengths.tolist() == [len(one.source) for one in rows]
    assert not len(batch("causal").take([0]).source_lengths)

"""Every way to the gradient of a batch gives the same gradient."""

import threading
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gemb.errors import MachineError
from gemb.training.batches import TrainingBatch
from gemb.training.gradients import (
    Gradients,
    MemoryPlan,
    Stopped,
    batch_gradients,
    chunks,
    graph_bytes,
    plan_memory,
)
from tests.training.fakes import TinyEncoder, tiny_batch

WHOLE = MemoryPlan(tokens_per_chunk=10_000, tokens_with_graph=10_000)


def loss_of(vectors: Tensor) -> tuple[Tensor, Mapping[str, float]]:
    """Every row is compared with every other, as a contrastive loss does."""
    unit = nn.functional.normalize(vectors, dim=1)
    loss = torch.logsumexp(unit @ unit.T / 0.1, dim=1).mean()
    return loss, {"all": float(loss.detach())}


def gradients_of(
    encoder: TinyEncoder, batch: TrainingBatch, plan: MemoryPlan, seed: int = 3
) -> tuple[Gradients, list[Tensor]]:
    """The loss and the gradients of all parameters."""
    encoder.zero_grad()
    torch.manual_seed(seed)
    parameters = list(encoder.parameters())
    found = batch_gradients(encoder, parameters, batch, loss_of, plan)
    return found, [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


@pytest.mark.parametrize("tokens", [1, 7, 23, 60])
@pytest.mark.parametrize("keeps", [True, False])
def test_gradients_of_chunks_equal_those_of_the_whole_batch(tokens: int, keeps: bool) -> None:
    encoder, batch = TinyEncoder(dropout=0.0).double(), tiny_batch(pairs=6)
    whole, expected = gradients_of(encoder, batch, WHOLE)
    plan = MemoryPlan(tokens, 10_000 if keeps else 0)
    found, gradients = gradients_of(encoder, batch, plan)
    assert found.encoded_twice is not keeps
    assert found.loss == pytest.approx(whole.loss, rel=1e-12)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


def test_gradients_equal_those_of_one_plain_graph() -> None:
    encoder, batch = TinyEncoder(dropout=0.0).double(), tiny_batch(pairs=6)
    _, gradients = gradients_of(encoder, batch, MemoryPlan(9, 0))
    encoder.zero_grad()
    loss, _ = loss_of(encoder(torch.from_numpy(batch.ids), batch.lengths))
    torch.autograd.backward(loss)
    for mine, parameter in zip(gradients, encoder.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("plan", [WHOLE, MemoryPlan(9, 0)])
def test_parameters_of_the_loss_get_the_gradient_of_one_plain_graph(plan: MemoryPlan) -> None:
    encoder, batch = TinyEncoder(dropout=0.0).double(), tiny_batch(pairs=6)
    head = nn.Linear(8, 5, bias=False).double()

    def mapped(vectors: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        return loss_of(head(vectors))

    every = [*encoder.parameters(), *head.parameters()]
    batch_gradients(encoder, every, batch, mapped, plan, loss_parameters=list(head.parameters()))
    found = [parameter.grad for parameter in every]
    for parameter in every:
        parameter.grad = None
    loss, _ = mapped(encoder(torch.from_numpy(batch.ids), batch.lengths))
    torch.autograd.backward(loss)
    for mine, parameter in zip(found, every, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-10, atol=1e-13)


def test_dropout_draws_the_same_masks_when_a_chunk_is_encoded_again() -> None:
    encoder, batch = TinyEncoder(dropout=0.3), tiny_batch(pairs=6)
    kept, expected = gradients_of(encoder, batch, MemoryPlan(20, 10_000))
    after_kept = torch.rand(1)
    again, gradients = gradients_of(encoder, batch, MemoryPlan(20, 0))
    after_again = torch.rand(1)
    assert again.encoded_twice
    assert not kept.encoded_twice
    assert again.loss == kept.loss
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    assert after_again == after_kept  # both leave the generator where one pass over the chunks leaves it


def test_dropout_without_the_random_numbers_put_back_gives_other_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder, batch = TinyEncoder(dropout=0.3), tiny_batch(pairs=6)
    _, expected = gradients_of(encoder, batch, MemoryPlan(20, 10_000))
    monkeypatch.setattr("gemb.training.random_numbers.RandomState.restore", lambda self: None)
    _, gradients = gradients_of(encoder, batch, MemoryPlan(20, 0))
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(gradients, expected, strict=True))


def test_chunks_hold_every_row_once_and_no_more_tokens_than_asked_for() -> None:
    lengths = np.array([3, 9, 1, 4, 4, 20, 2], np.int32)
    cut = chunks(lengths, 10)
    assert sorted(int(row) for rows in cut for row in rows) == list(range(7))
    assert [int(lengths[rows].sum()) for rows in cut] == [20, 9, 8, 6]  # the long text stands alone
    assert chunks(np.zeros(0, np.int32), 10) == []


def test_a_stop_between_two_chunks_leaves_the_step() -> None:
    stop = threading.Event()
    encoder, batch = TinyEncoder(dropout=0.0), tiny_batch(pairs=4)

    def stopping(vectors: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        stop.set()
        return loss_of(vectors)

    with pytest.raises(Stopped):
        batch_gradients(encoder, list(encoder.parameters()), batch, stopping, MemoryPlan(5, 0), stop=stop)


def test_a_chunk_that_does_not_fit_is_a_memory_error() -> None:
    class Full(TinyEncoder):
        def forward(
            self, ids: Tensor, lengths: NDArray[np.int32], prompt_tokens: NDArray[np.int32] | None = None
        ) -> Tensor:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    encoder = Full(dropout=0.0)
    with pytest.raises(MemoryError, match="a chunk does not fit the memory"):
        batch_gradients(encoder, list(encoder.parameters()), tiny_batch(), loss_of, WHOLE)


def test_another_error_of_the_model_passes_unchanged() -> None:
    class Broken(TinyEncoder):
        def forward(
            self, ids: Tensor, lengths: NDArray[np.int32], prompt_tokens: NDArray[np.int32] | None = None
        ) -> Tensor:
            raise RuntimeError("shapes do not match")

    encoder = Broken(dropout=0.0)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        batch_gradients(encoder, list(encoder.parameters()), tiny_batch(), loss_of, WHOLE)


def test_a_loss_of_nothing_gives_no_gradient() -> None:
    encoder = TinyEncoder(dropout=0.0)
    found = batch_gradients(
        encoder, list(encoder.parameters()), tiny_batch(), lambda vectors: (vectors.new_zeros(()), {}), WHOLE
    )
    assert found.loss == 0.0
    assert all(p.grad is None or not p.grad.to_dense().any() for p in encoder.parameters())


def test_graph_bytes_grow_with_the_tokens_and_count_no_parameter() -> None:
    encoder = TinyEncoder(dropout=0.0)
    parameters = list(encoder.parameters())
    few = graph_bytes(encoder, parameters, np.array([8] * 4, np.int32))
    many = graph_bytes(encoder, parameters, np.array([8] * 16, np.int32))
    assert 3.0 < many / few < 4.5
    assert few < sum(parameter.nbytes for parameter in parameters) + 32 * 8 * 4 * 20


def test_plan_keeps_what_fits_and_refuses_a_text_that_does_not() -> None:
    assert plan_memory(100.0, 1_000_000, 512, None, 4_096) == MemoryPlan(4_096, 10_000)
    assert plan_memory(100.0, 100_000, 512, None, 4_096) == MemoryPlan(1_000, 1_000)
    assert plan_memory(100.0, 1_000_000, 512, 600, 4_096) == MemoryPlan(600, 10_000)
    with pytest.raises(MachineError) as error:
        plan_memory(2.0**21, 2**30, 1_024, None, 4_096)
    assert str(error.value) == (
        "one text of 1,024 tokens needs about 2.0 GiB, but the memory budget is 1.0 GiB; "
        "lower data max_tokens, or raise batch.memory_gib"
    )


def test_halving_a_plan_keeps_no_more_than_one_chunk() -> None:
    assert MemoryPlan(4_096, 10_000).halved() == MemoryPlan(2_048, 2_048)
    assert MemoryPlan(4_096, 1_000).halved() == MemoryPlan(2_048, 1_000)

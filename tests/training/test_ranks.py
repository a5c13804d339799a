"""Two processes over gloo train as one does."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gemb.errors import GembError
from gemb.training.gradients import MemoryPlan, batch_gradients
from gemb.training.ranks import Ranks, ranks_of_environment
from gemb.training.teaching import new_projection
from tests.training.fakes import SparseEncoder, TinyEncoder, on_ranks, tiny_batch
from tests.training.test_gradients import loss_of


def train(ranks: Ranks, target: Path) -> None:
    """The gradients of one batch, written by every rank."""
    results: dict[str, torch.Tensor] = {}
    for name, encoder in (("dense", TinyEncoder()), ("sparse", SparseEncoder())):
        parameters = list(encoder.parameters())
        for keeps in (True, False):
            encoder.zero_grad()
            plan = MemoryPlan(11, 10_000 if keeps else 0)
            found = batch_gradients(encoder, parameters, tiny_batch(7, 3), loss_of, plan, ranks=ranks)
            for number, parameter in enumerate(parameters):
                assert parameter.grad is not None
                results[f"{name} {keeps} {number}"] = parameter.grad.to_dense()
            results[f"{name} {keeps} loss"] = torch.tensor(found.loss)
    tiny, head = TinyEncoder(), new_projection(8, 12, seed=1)
    mapped = list(head.parameters())
    every = [*tiny.parameters(), *mapped]
    batch_gradients(
        tiny,
        every,
        tiny_batch(7, 3),
        lambda vectors: loss_of(head(vectors)),
        MemoryPlan(11, 0),
        loss_parameters=mapped,
        ranks=ranks,
    )
    for number, trained in enumerate(every):
        assert trained.grad is not None
        results[f"mapped {number}"] = trained.grad
    assert ranks.any(ranks.index == 1) is (ranks.count > 1)
    assert ranks.smallest(10 + ranks.index) == 10
    ranks.wait()
    torch.save(results, target / f"{ranks.count}-{ranks.index}.pt")


def test_two_ranks_have_the_gradients_of_one(tmp_path: Path) -> None:
    train(Ranks(), tmp_path)
    on_ranks(2, train, tmp_path)
    alone = torch.load(tmp_path / "1-0.pt")
    for index in (0, 1):
        together = torch.load(tmp_path / f"2-{index}.pt")
        assert together.keys() == alone.keys()
        for name in alone:
            torch.testing.assert_close(together[name], alone[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_row_is_encoded_by_one_rank_and_tokens_are_shared_evenly(count: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 64).astype(np.int32)
    shares = [Ranks(index, count).rows(lengths) for index in range(count)]
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(64))
    assert all(np.array_equal(share, np.sort(share)) for share in shares)
    tokens = [int(lengths[share].sum()) for share in shares]
    assert max(tokens) - min(tokens) <= lengths.max()


def test_ranks_that_are_no_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GembError) as error, ranks_of_environment("cpu"):
        pass
    assert str(error.value) == "RANK=2 and WORLD_SIZE=2 are no rank and number of ranks; use torchrun"

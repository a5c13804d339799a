"""nDCG@10 among held-out pairs equals the formula worked out by loops."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemb.text.tokenisation import Encoded
from gemb.training.held_out import (
    Evaluations,
    HeldOutPairs,
    Measured,
    encode_all,
    is_full_size,
    measure_name,
)
from tests.training.fakes import TinyEncoder


def numbered(count: int) -> Encoded:
    """Texts of one token each: their number."""
    return Encoded(
        np.arange(count, dtype=np.int32),
        np.ones(count, np.int32),
        np.zeros(count, np.int32),
        np.zeros(count, np.bool_),
        0,
    )


class Table:
    """Vectors by number; queries first, since both are asked for with the same ids."""

    def __init__(self, queries: Tensor, candidates: Tensor) -> None:
        self._turns = [queries, candidates]

    def __call__(
        self, ids: Tensor, lengths: NDArray[np.int32], prompt_tokens: NDArray[np.int32] | None = None
    ) -> Tensor:
        """The rows asked for."""
        del lengths, prompt_tokens
        found = self._turns[0][ids]
        self._turns.reverse()
        return found


def reference(cosines: Tensor, relevant: set[int]) -> float:
    """Binary nDCG@10 by its definition; of equal cosines the wrong candidates come first."""
    order = sorted(range(len(cosines)), key=lambda place: (-float(cosines[place]), place in relevant))
    gain = sum(1 / math.log2(rank + 2) for rank, place in enumerate(order[:10]) if place in relevant)
    return gain / sum(1 / math.log2(rank + 2) for rank in range(min(10, len(relevant))))


@pytest.mark.parametrize("most", [1, 3])
def test_ndcg_equals_its_definition_at_every_size(most: int) -> None:
    random = torch.Generator().manual_seed(most)
    queries, candidates = (torch.randn(30, 6, generator=random) for _ in range(2))
    candidates[7] = candidates[3]  # equal cosines
    choose = np.random.default_rng(0)
    relevant = [{int(place) for place in choose.choice(30, choose.integers(1, most + 1), replace=False)}
                for _ in range(30)]  # fmt: skip
    held_out = HeldOutPairs("x", numbered(30), numbered(30), relevant, (6, 2))
    measured = held_out.measure(Table(queries, candidates), "cpu", 1000)
    for size, name in ((6, "x/nDCG@10"), (2, "x/nDCG@10/2")):
        unit = [torch.nn.functional.normalize(rows[:, :size], dim=1) for rows in (queries, candidates)]
        cosines = unit[0] @ unit[1].T
        expected = [reference(row, right) for row, right in zip(cosines, relevant, strict=True)]
        np.testing.assert_allclose(measured.scores[name], expected, atol=1e-12)
    assert measured.histograms["x/positive"].sum() == 30
    assert measured.main() == pytest.approx(measured.scores["x/nDCG@10"].mean())


def test_a_model_that_gives_one_vector_for_all_finds_nothing() -> None:
    same = torch.ones(40, 4)
    held_out = HeldOutPairs("x", numbered(40), numbered(40), [{place} for place in range(40)], (4,))
    assert held_out.measure(Table(same, same), "cpu", 1000).main() == 0.0


def test_texts_are_encoded_alike_in_chunks_and_at_once_and_in_their_order() -> None:
    encoder = TinyEncoder()
    lengths = np.array([3, 9, 1, 4], np.int32)
    ids = np.arange(17, dtype=np.int32)
    texts = Encoded(ids, lengths, np.zeros(4, np.int32), np.zeros(4, np.bool_), 0)
    whole = encoder(torch.from_numpy(ids), lengths)
    for tokens in (1, 5, 100):
        found = encode_all(encoder, texts, "cpu", tokens)
        assert not found.requires_grad
        torch.testing.assert_close(found, whole)


def test_names_tell_the_size() -> None:
    assert measure_name("docs/nDCG@10", 64, 64) == "docs/nDCG@10"
    assert measure_name("docs/nDCG@10", 32, 64) == "docs/nDCG@10/32"
    assert is_full_size("docs/nDCG@10")
    assert not is_full_size("docs/nDCG@10/32")


def test_several_evaluations_are_one() -> None:
    class Fixed:
        def __init__(self, name: str, value: float) -> None:
            self._measured = Measured({name: np.array([value])}, {}, {f"{name}/rho/2": 9.0})

        def measure(self, encoder: object, device: str, tokens_per_chunk: int) -> Measured:
            return self._measured

    both = Evaluations([Fixed("a", 0.2), Fixed("b", 0.6)]).measure(TinyEncoder(), "cpu", 10)
    assert both.means() == {"a": 0.2, "b": 0.6, "a/rho/2": 9.0, "b/rho/2": 9.0}
    assert both.main() == pytest.approx(0.4)

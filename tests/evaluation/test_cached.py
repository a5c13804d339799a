"""A cache in front of an engine: the same vectors, computed once."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.engine import BatchFailure, run_batches
from gemb.engine.cache import VectorCache
from gemb.engine.torch_engine import TorchEngine
from gemb.errors import GembError
from gemb.evaluation.cached import CachedEngine, load_cached
from gemb.jobs import embed
from gemb.text.batches import Batch

CONTEXT = ["model", "cpu", "fp32"]


class SumEngine:
    """A vector is (sum, length, 1) of its ids; an id of 13 gives no vector."""

    dims = 3
    batch_tokens = 64
    workers = 2
    precision = "fp32"
    device_line = "nowhere"
    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.rows = 0

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        self.rows += len(batch.rows)
        parts = np.split(batch.ids, np.cumsum(batch.lengths)[:-1])
        rows = [[np.nan] * 3 if 13 in ids else [ids.sum(), len(ids), 1] for ids in parts]
        return np.array(rows, np.float32)

    def close(self) -> None:
        pass


def batch_of(*texts: list[int], prompt_tokens: int = 0) -> Batch:
    ids = np.array([number for text in texts for number in text], np.int32)
    lengths = np.array([len(text) for text in texts], np.int32)
    return Batch(ids, lengths, np.arange(len(texts)), prompt_tokens)


@pytest.fixture
def engine() -> SumEngine:
    return SumEngine()


@pytest.fixture
def cached(engine: SumEngine, tmp_path: Path) -> Iterator[CachedEngine]:
    cached = CachedEngine(engine, tmp_path / "cache", CONTEXT)
    yield cached
    cached.close()


def test_vectors_are_the_engine_s_and_only_new_texts_are_computed(
    cached: CachedEngine, engine: SumEngine
) -> None:
    first, mixed = batch_of([1, 2, 3], [4, 5]), batch_of([7, 8, 9], [1, 2, 3], [4, 5], [6])
    np.testing.assert_array_equal(cached.forward(first), SumEngine().forward(first))
    assert engine.rows == 2
    np.testing.assert_array_equal(cached.forward(mixed), SumEngine().forward(mixed))
    assert engine.rows == 4
    np.testing.assert_array_equal(cached.forward(mixed), SumEngine().forward(mixed))
    assert engine.rows == 4


def test_a_text_with_a_prompt_left_out_or_of_another_model_is_another(
    cached: CachedEngine, engine: SumEngine, tmp_path: Path
) -> None:
    cached.forward(batch_of([1, 2, 3]))
    cached.forward(batch_of([1, 2, 3], prompt_tokens=1))
    assert engine.rows == 2
    CachedEngine(engine, tmp_path / "cache", ["other", "cpu", "fp32"]).forward(batch_of([1, 2, 3]))
    assert engine.rows == 3


def test_what_is_no_vector_is_not_remembered(cached: CachedEngine, engine: SumEngine, tmp_path: Path) -> None:
    for _ in range(2):
        (first, second) = run_batches(cached, [batch_of([1, 13], [2])])
        assert isinstance(first[1], BatchFailure)
        assert not isinstance(second[1], BatchFailure)
    assert engine.rows == 3  # two, then the bad one again
    cache = VectorCache(tmp_path / "cache", context=CONTEXT, dims=3)
    assert not cache.find([cache.key(np.array([1, 13], np.int32), 0)])
    cache.close()


def test_a_lowered_budget_reaches_the_engine(cached: CachedEngine, engine: SumEngine) -> None:
    cached.batch_tokens = 8
    assert (engine.batch_tokens, cached.batch_tokens) == (8, 8)


def test_a_folder_that_cannot_be_a_cache_shows_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("gemb.evaluation.cached.open_engine", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(GembError, match=r"file cannot be used as a cache: .*; pass another --cache"):
        load_cached("minilm", tmp_path / "file")
    with pytest.raises(GembError, match=r"^max_tokens is 9,999, but minilm takes 256 at most$"):
        load_cached("minilm", tmp_path / "cache", max_tokens=9999)


def test_what_gemb_embed_kept_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a cat sits on the mat", "two dogs run in a field"]
    source = tmp_path / "texts.txt"
    source.write_text("\n".join(texts) + "\n")
    vectors, cache = tmp_path / "vectors.npy", tmp_path / "cache"
    embed.run(
        embed.EmbedRecipe(
            model="minilm",
            inputs=(str(source),),
            output=vectors,
            cache=cache,
            threads=1,
            precision="fp32",
        )
    )
    monkeypatch.setattr(TorchEngine, "forward", lambda *_: pytest.fail("computed again"))
    cached = load_cached("minilm", cache, threads=1, precision="fp32")
    np.testing.assert_array_equal(cached.embed(texts), np.load(vectors))
    cached.close()

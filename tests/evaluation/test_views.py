import numpy as np
import pytest

from gemb.errors import Exit, GembError
from gemb.evaluation import View, evaluate
from gemb.evaluation.pairs import Similarity
from gemb.evaluation.tasks import Texts
from gemb.evaluation.views import Viewed, ranges_for
from tests.evaluation.conftest import DIMS, WordEncoder

ROWS = np.random.default_rng(1).standard_normal((50, 32)).astype(np.float32)


@pytest.mark.parametrize(
    ("view", "size"),
    [(View(768), 3072), (View(256, "f16"), 512), (View(256, "int8"), 256), (View(256, "binary"), 32)],
)
def test_a_view_knows_its_bytes(view: View, size: int) -> None:
    assert view.bytes == size


@pytest.mark.parametrize(("dtype", "error"), [("f32", 1e-7), ("f16", 1e-3), ("bf16", 8e-3), ("int8", 2e-2)])
def test_a_stored_type_rounds_as_much_as_it_should(dtype: str, error: float) -> None:
    view = View(16, dtype)  # type: ignore[arg-type]
    seen = Viewed(ROWS, view, ranges_for(ROWS, view)).all()
    exact = ROWS[:, :16] / np.linalg.norm(ROWS[:, :16], axis=1, keepdims=True)
    worst = np.abs(seen - exact).max()
    assert worst <= error
    assert dtype == "f32" or worst > error / 100
    np.testing.assert_allclose(np.linalg.norm(seen, axis=1), 1, rtol=1e-5)


def test_binary_keeps_the_signs() -> None:
    seen = Viewed(ROWS, View(16, "binary"), None).all()
    np.testing.assert_array_equal(np.sign(seen), np.sign(ROWS[:, :16]))


def test_texts_are_embedded_once_for_all_views(encoder: WordEncoder) -> None:
    texts = {
        "firsts": Texts(["a b", "c d", "e f"], ("STS",)),
        "seconds": Texts(["a b", "c x", "y z"], ("STS",)),
    }
    task = Similarity("s", texts, [5.0, 3.0, 0.0])
    results = list(evaluate(encoder, [task], [View(DIMS), View(8), View(DIMS, "int8"), View(DIMS, "binary")]))
    assert len(encoder.seen) == 2
    assert [result.view.dims for result in results] == [DIMS, 8, DIMS, DIMS]
    assert results[0].score.value == pytest.approx(1.0)


def test_progress_counts_the_texts_of_a_task(encoder: WordEncoder) -> None:
    texts = {"firsts": Texts(["a", "b"], ()), "seconds": Texts(["a", "c"], ())}
    told: list[tuple[int, int]] = []
    list(
        evaluate(
            encoder,
            [Similarity("s", texts, [1.0, 0.0])],
            on_texts=lambda task, done, total: told.append((done, total)),
        )
    )
    assert told == [(2, 4), (4, 4)]


@pytest.mark.parametrize(
    ("view", "message", "code"),
    [
        (View(DIMS + 1), f"--dims {DIMS + 1} is more than the model's {DIMS}", Exit.MISMATCH),
        (View(12, "binary"), "binary vectors have a multiple of 8 dims, not 12", Exit.USAGE),
    ],
)
def test_views_that_cannot_be_are_told_before_a_text_is_embedded(
    encoder: WordEncoder, view: View, message: str, code: Exit
) -> None:
    with pytest.raises(GembError) as caught:
        list(evaluate(encoder, [Similarity("s", {"firsts": Texts(["a"], ())}, [1.0])], [view]))
    assert str(caught.value) == message
    assert caught.value.exit_code == code
    assert encoder.seen == []

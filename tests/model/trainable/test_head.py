"""The language model head: chunks equal the whole, gradients equal those of autograd, a teacher too."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gemb.model.trainable import head
from gemb.model.trainable.head import TeacherStates, head_loss

torch.set_num_threads(1)

PLACES, WIDTH, VOCABULARY = 37, 12, 53


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def walk(loss: Tensor, *, keep: bool = False) -> None:
    """The backward pass."""
    loss.backward(retain_graph=keep)  # type: ignore[no-untyped-call]


def targets_of(count: int = PLACES) -> Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(9))


def leaves(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """States and table that want gradients."""
    return (
        (drawn(PLACES, WIDTH) * scale).requires_grad_(),
        drawn(VOCABULARY, WIDTH, seed=1).requires_grad_(),
    )


def teacher_of(**settings: Any) -> TeacherStates:  # noqa: ANN401
    return TeacherStates(drawn(PLACES, 7, seed=2), drawn(VOCABULARY, 7, seed=3), **settings)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def plain(
    states: Tensor, table: Tensor, softcap: float | None = None, teacher: TeacherStates | None = None
) -> Tensor:
    """The loss from all scores at once, by autograd."""
    scores = capped(states @ table.T, softcap)
    cross_entropy = F.cross_entropy(scores, targets_of(), reduction="sum")
    if teacher is None:
        return cross_entropy
    theirs = capped(teacher.states @ teacher.table.T, teacher.softcap)
    temperature = teacher.temperature
    divergence = F.kl_div(
        F.log_softmax(scores / temperature, -1),
        F.softmax(theirs / temperature, -1),
        reduction="sum",
    )
    return teacher.share * temperature**2 * divergence + (1 - teacher.share) * cross_entropy


@pytest.fixture(params=[1, 5, 1000])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and pieces of few tokens, of some, and all at once."""
    monkeypatch.setattr(head, "CHUNK_TOKENS", (request.param, request.param))
    monkeypatch.setattr(head, "PIECE_NUMBERS", VOCABULARY * max(1, request.param // 2))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    "teacher",
    [None, teacher_of(), teacher_of(softcap=1.5, temperature=3.0), teacher_of(temperature=0.7, share=0.3)],
    ids=["none", "alone", "capped and warm", "mixed and cool"],
)
def test_value_and_gradients_equal_those_of_the_whole_matrix(
    chunks: None, softcap: float | None, teacher: TeacherStates | None
) -> None:
    own, theirs = leaves(), leaves()

    found = head_loss(*own, targets_of(), softcap=softcap, teacher=teacher)
    expected = plain(*theirs, softcap, teacher)
    walk(found.total / 7)
    walk(expected / 7)

    torch.testing.assert_close(found.total, expected.detach(), rtol=1e-12, atol=0)
    for left, right in zip(own, theirs, strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-10, atol=1e-12)


def test_cross_entropy_and_correct_targets_are_told_beside_a_teachers_term() -> None:
    states, table = leaves(scale=3.0)
    scores = states @ table.T
    found = head_loss(states, table, targets_of(), teacher=teacher_of())

    assert float(found.cross_entropy) == pytest.approx(
        float(F.cross_entropy(scores, targets_of(), reduction="sum").detach()), rel=1e-12
    )
    assert int(found.correct) == int((scores.argmax(-1) == targets_of()).sum())


def test_a_teacher_that_is_sure_of_the_targets_is_cross_entropy() -> None:
    own, theirs = leaves(), leaves()
    sure = TeacherStates(1e3 * F.one_hot(targets_of(), VOCABULARY).double(), torch.eye(VOCABULARY).double())

    distilled = head_loss(*own, targets_of(), teacher=sure).total
    plain_loss = head_loss(*theirs, targets_of()).total
    walk(distilled)
    walk(plain_loss)

    torch.testing.assert_close(distilled, plain_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(own[0].grad, theirs[0].grad, rtol=1e-10, atol=1e-12)


def test_a_teacher_that_agrees_costs_nothing_and_teaches_nothing() -> None:
    states, table = leaves()
    same = TeacherStates(states.detach(), table.detach(), softcap=2.0, temperature=4.0)

    total = head_loss(states, table, targets_of(), softcap=2.0, teacher=same).total
    walk(total)

    assert abs(float(total.detach())) < 1e-12
    assert states.grad is not None
    assert float(states.grad.abs().max()) < 1e-12


def test_a_loss_worked_out_by_hand() -> None:
    # Scores 1 and 0 where the second is right: log(e + 1).
    found = head_loss(
        torch.ones(1, 1), torch.tensor([[1.0], [0.0]]), torch.tensor([1]), softcap=None, teacher=None
    )
    assert float(found.total) == pytest.approx(1.313262, abs=1e-6)
    assert int(found.correct) == 0


def test_no_target_is_a_loss_of_zero_with_a_graph() -> None:
    states = torch.zeros(0, WIDTH, requires_grad=True)
    table = torch.ones(VOCABULARY, WIDTH, requires_grad=True)
    total = head_loss(states, table, targets_of(0)).total
    walk(total)
    assert float(total.detach()) == 0
    assert table.grad is not None
    assert not table.grad.any()


def test_what_needs_no_gradient_gets_none() -> None:
    states, table = leaves()
    walk(head_loss(states, table.detach(), targets_of()).total)
    assert states.grad is not None
    with torch.no_grad():
        assert not head_loss(states, table, targets_of()).total.requires_grad


def test_products_in_bf16_keep_the_loss_and_the_gradients_in_fp32() -> None:
    states, table = (leaf.detach().float().requires_grad_() for leaf in leaves(scale=0.3))
    wide_states, wide_table = leaves(scale=0.3)

    found = head_loss(states, table, targets_of(), softcap=2.0, dtype=torch.bfloat16)
    walk(found.total)
    walk(plain(wide_states, wide_table, 2.0))

    assert found.total.dtype == torch.float32
    assert float(found.total.detach()) == pytest.approx(
        float(plain(wide_states, wide_table, 2.0).detach()), rel=2e-3
    )
    for narrow, wide in ((states.grad, wide_states.grad), (table.grad, wide_table.grad)):
        assert narrow is not None
        assert wide is not None
        assert narrow.dtype == torch.float32
        cosine = F.cosine_similarity(narrow.double().flatten(), wide.flatten(), dim=0)
        assert float(cosine) > 0.9995


def test_scores_of_all_targets_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_TOKENS", (8, 8))
    count = 4096
    states = drawn(count, WIDTH).requires_grad_()
    table = drawn(VOCABULARY, WIDTH, seed=1).requires_grad_()
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
            result = func(*args, **(kwargs or {}))
            sizes.extend(one.numel() for one in [result] if isinstance(one, Tensor))
            return result

    with Watch():  # type: ignore[no-untyped-call]
        walk(head_loss(states, table, torch.randint(VOCABULARY, (count,))).total)

    assert max(sizes) == count * WIDTH < count * VOCABULARY


def test_a_graph_that_was_walked_is_told() -> None:
    total = head_loss(*leaves(), targets_of()).total
    walk(total, keep=True)
    with pytest.raises(
        RuntimeError, match="the graph of this loss was walked before; compute the loss again"
    ):
        walk(total)


@pytest.mark.parametrize(("places", "tokens"), [(PLACES - 1, VOCABULARY), (PLACES, VOCABULARY + 1)])
def test_a_teacher_of_other_targets_or_tokens_is_refused(places: int, tokens: int) -> None:
    teacher = TeacherStates(drawn(places, 7), drawn(tokens, 7))
    with pytest.raises(ValueError, match="the teacher has") as told:
        head_loss(*leaves(), targets_of(), teacher=teacher)
    assert str(told.value) == (
        f"the teacher has {places} states and {tokens} tokens, but the student has {PLACES} and {VOCABULARY}"
    )

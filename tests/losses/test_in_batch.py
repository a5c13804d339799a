"""Contrastive losses: equal to their formulas, to the plain form and to sentence-transformers."""

import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemb.losses import GECKO, GTE, QWEN3, Guide, LeftOut, all_sizes, contrastive, count_left_out, samtone
from tests.losses import plain
from tests.losses.goldens import NEGATIVES, OWNER, POSITIVES, QUERIES, SIX_DIGITS, TEMPERATURE

Case = dict[str, Any]


def batch(rows: int, width: int, negatives: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    """A batch with repeated texts, whose hard negatives belong to rows unevenly."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype)

    case: Case = {
        "queries": normal(rows),
        "positives": normal(rows),
        "query_hashes": torch.randint(0, 3 * rows, (rows,), generator=generator),
        "positive_hashes": torch.randint(0, 3 * rows, (rows,), generator=generator),
    }
    case["positives"] += case["queries"]
    if negatives:
        case["negatives"] = normal(negatives)
        case["owner"] = torch.randint(0, rows, (negatives,), generator=generator)
        case["negative_hashes"] = torch.randint(0, 3 * rows, (negatives,), generator=generator)
        case["negatives"] += case["queries"][case["owner"]]
    return case


def guide_of(case: Case, margin: float = 0.0, relative: bool = False) -> Guide:
    generator = torch.Generator().manual_seed(9)

    def seen(name: str) -> Tensor | None:
        if name not in case:
            return None
        rows: Tensor = case[name]
        noise = torch.randn(len(rows), 5, generator=generator, dtype=torch.float64)
        return rows[:, :5].double() + noise

    queries, positives = seen("queries"), seen("positives")
    if queries is None or positives is None:
        raise ValueError("a batch has queries and positives")
    return Guide(queries, positives, seen("negatives"), margin=margin, relative=relative)


OPTIONS: dict[str, Case] = {
    "embeddinggemma": {},
    "no hardness": {"hardness": 0.0},
    "in-batch hardness": {"hardened": "in_batch", "hardness": 9.0},
    "all hardness": {"hardened": "all"},
    "all rows' negatives": {"negatives_of": "all"},
    "all rows' negatives, in-batch hardness": {"negatives_of": "all", "hardened": "in_batch"},
    "all rows' negatives, all hardness": {"negatives_of": "all", "hardened": "all"},
    "gecko": {"also": GECKO, "hardness": 0.0},
    "qwen3": {"also": QWEN3},
    "gte": {"also": GTE},
    "gte, all rows' negatives": {"also": GTE, "negatives_of": "all"},
    "guide": {"margin": 0.1, "also": GTE, "negatives_of": "all"},
    "relative guide": {"margin": 0.2, "relative": True},
}


def prepared(name: str, case: Case) -> Case:
    options = dict(OPTIONS[name])
    if "margin" in options:
        options["guide"] = guide_of(case, options.pop("margin"), options.pop("relative", False))
    return {**case, **options}


def one_row(i: int, case: Case) -> Case:
    """The part of a batch that a process with row i alone has."""
    queries = case["queries"]
    return {**case, "queries": queries[i : i + 1], "all_queries": queries, "offset": i}


def gradients(loss: Callable[..., Tensor], case: Case, **options: object) -> list[Tensor]:
    """Of the sum over sizes, each with its own weight, with respect to queries, positives and negatives."""
    names = [name for name in ("queries", "positives", "negatives") if name in case]
    leaves: Case = {name: case[name].clone().requires_grad_() for name in names}
    terms = loss(**{**case, **leaves, **options})
    factors = torch.arange(1, len(terms) + 1, dtype=terms.dtype)
    return list(torch.autograd.grad((terms * factors).sum(), list(leaves.values())))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_form_is_its_formula_row_by_row(name: str) -> None:
    case = prepared(name, batch(7, 6, 9))
    rows = [plain.contrastive_row(i, temperature=0.2, **case) for i in range(7)]
    for i in range(7):
        mine = contrastive(**one_row(i, case), temperature=0.2)
        torch.testing.assert_close(mine, torch.tensor([rows[i]], dtype=torch.float64), rtol=0, atol=1e-12)
    mean = torch.tensor([sum(rows) / 7], dtype=torch.float64)
    torch.testing.assert_close(contrastive(**case, temperature=0.2), mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_every_form_equals_the_plain_one_at_all_sizes(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    # The temperature divides the rounding of the cosines; 6e-8 / 0.1 leaves some room below 1e-6.
    case = prepared(name, batch(37, 24, 40, dtype)) | {"temperature": 0.1}
    sizes = (24, 3, 16, 8)
    mine, theirs = contrastive(**case, sizes=sizes), plain.contrastive(**case, sizes=sizes)
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=0)
    expected = gradients(plain.contrastive, case, sizes=sizes)
    # The last weights are those that `gradients` gives the terms, and then nothing is computed twice.
    for weights in (None, (1, 2, 3, 4)):
        found = gradients(contrastive, case, sizes=sizes, weights=weights)
        for given, wanted in zip(found, expected, strict=True):
            assert float((given - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize("name", OPTIONS)
def test_panels_and_tiles_of_any_height_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = prepared(name, batch(37, 24, 40)) | {"sizes": (24, 3, 16)}
    value, expected = contrastive(**case), gradients(contrastive, case)
    monkeypatch.setattr(all_sizes, "PANEL_ROWS", 20)
    monkeypatch.setattr(all_sizes, "TILE_NUMBERS", 1)
    torch.testing.assert_close(contrastive(**case), value, rtol=1e-12, atol=0)
    for given, wanted in zip(gradients(contrastive, case), expected, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_gradient_is_the_derivative_of_the_value(name: str) -> None:
    # The hardness weight is a constant to the gradient but not to the value.
    case = prepared(name, batch(4, 6, 5)) | {"hardness": 0.0}
    names = ("queries", "positives", "negatives")
    leaves = [case[name].clone().requires_grad_() for name in names]

    def loss(*tensors: Tensor) -> Tensor:
        return contrastive(
            **{**case, **dict(zip(names, tensors, strict=True))}, temperature=0.3, sizes=(4, 6)
        )

    assert torch.autograd.gradcheck(loss, leaves, atol=1e-7)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_mean_over_processes_is_the_loss_of_the_whole_batch(name: str) -> None:
    case = prepared(name, batch(12, 8, 10))

    def over_processes(**options: object) -> Tensor:
        whole: Case = options
        parts = []
        for start in range(0, 12, 4):
            mine = {**whole, "queries": whole["queries"][start : start + 4], "all_queries": whole["queries"]}
            parts.append(contrastive(**mine, offset=start))
        return torch.stack(parts).mean(0)

    whole = contrastive(**case, sizes=(4, 8))
    torch.testing.assert_close(over_processes(**case, sizes=(4, 8)), whole, rtol=1e-12, atol=0)
    for given, wanted in zip(
        gradients(over_processes, case, sizes=(4, 8)), gradients(contrastive, case, sizes=(4, 8)), strict=True
    ):
        torch.testing.assert_close(given, wanted, rtol=0, atol=1e-12)


def test_own_negatives_may_stay_on_their_process() -> None:
    case = batch(12, 8, 10)
    parts = []
    for start in range(0, 12, 4):
        local = (case["owner"] >= start) & (case["owner"] < start + 4)
        kept = {key: case[key][local] for key in ("negatives", "owner", "negative_hashes")}
        queries = case["queries"][start : start + 4]
        parts.append(contrastive(**{**case, **kept, "queries": queries}, offset=start))
    torch.testing.assert_close(torch.stack(parts).mean(0), contrastive(**case), rtol=1e-12, atol=0)


SENTENCE_TRANSFORMERS: dict[str, tuple[Case, Case]] = {
    "pairs": ({}, {}),
    "hard negatives": (
        {"negatives_of": "all", "hardness": 5.0},
        {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
    ),
    "llave": (
        {"negatives_of": "all", "hardness": 9.0, "hardened": "in_batch"},
        {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    ),
    "all negatives": (
        {"negatives_of": "all", "hardness": 2.0, "hardened": "all"},
        {"hardness_mode": "all_negatives", "hardness_strength": 2.0},
    ),
    "gte": (
        {"negatives_of": "all", "hardness": 0.0, "also": GTE},
        {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
    ),
}


@pytest.mark.parametrize("name", SENTENCE_TRANSFORMERS)
def test_the_forms_of_sentence_transformers_are_equal_in_value_and_gradient(name: str) -> None:
    mine, theirs = SENTENCE_TRANSFORMERS[name]
    columns = [batch(9, 8, 0, seed=seed)["queries"].requires_grad_() for seed in range(4 if mine else 2)]
    loss = MultipleNegativesRankingLoss(nn.Identity(), scale=20.0, **theirs)  # type: ignore[arg-type]
    expected = loss.compute_loss_from_embeddings(columns, torch.empty(0))
    wanted = torch.autograd.grad(expected, columns)
    negatives: Case = {}
    if mine:
        negatives = {"negatives": torch.cat(columns[2:]), "owner": torch.arange(9).repeat(2)}
    found = contrastive(columns[0], columns[1], **negatives, **mine, temperature=0.05)
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=0)
    for given, want in zip(torch.autograd.grad(found.sum(), columns), wanted, strict=True):
        torch.testing.assert_close(given, want, rtol=0, atol=1e-12)


def test_samtone_is_gecko_without_hard_negatives_and_swapping_the_sides_changes_nothing() -> None:
    case = batch(6, 8, 0)
    queries, positives = case["queries"], case["positives"]
    one_side = samtone(queries, positives, both_sides=False, temperature=0.1)
    torch.testing.assert_close(one_side, contrastive(queries, positives, also=GECKO, temperature=0.1))
    both = samtone(queries, positives, temperature=0.1)
    torch.testing.assert_close(both, samtone(positives, queries, temperature=0.1))
    parts = [
        samtone(queries[i : i + 2], positives, all_queries=queries, offset=i, temperature=0.1)
        for i in (0, 2, 4)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(0), both)


def test_samtone_is_the_plain_loss_plus_the_log_of_one_and_the_share_of_queries() -> None:
    case = batch(5, 6, 0)
    queries, positives = case["queries"], case["positives"]
    for i in range(5):
        cosines = [plain.cosine(queries[i], queries[j]) for j in range(5) if j != i]
        same_tower = torch.tensor(cosines, dtype=torch.float64).div(0.1).exp().sum()
        crossed = torch.tensor([plain.cosine(queries[i], positives[j]) for j in range(5)]).double().div(0.1)
        mine = {"queries": queries[i : i + 1], "positives": positives, "offset": i, "temperature": 0.1}
        more = contrastive(**mine, all_queries=queries, also=GECKO) - contrastive(**mine)
        expected = torch.log1p(same_tower / crossed.exp().sum())
        torch.testing.assert_close(more[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_lengths_order_and_rotation_change_nothing(name: str) -> None:
    case = batch(8, 6, 7)
    value = contrastive(**prepared(name, case))
    generator = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    for key in ("queries", "positives", "negatives"):
        length = torch.rand(len(case[key]), 1, generator=generator, dtype=torch.float64) + 0.1
        moved = {**prepared(name, case), key: case[key] * length}
        torch.testing.assert_close(contrastive(**moved), value, rtol=1e-12, atol=1e-12)
    turned = {key: case[key] @ rotation for key in ("queries", "positives", "negatives")}
    torch.testing.assert_close(
        contrastive(**{**prepared(name, case), **turned}), value, rtol=1e-11, atol=1e-12
    )
    order = torch.randperm(8, generator=generator)
    places = torch.empty_like(order)
    places[order] = torch.arange(8)
    mixed = {key: case[key][order] for key in ("queries", "positives", "query_hashes", "positive_hashes")}
    mixed = {**case, **mixed, "owner": places[case["owner"]]}
    options = prepared(name, case)
    if "guide" in options:
        guide = options["guide"]
        options["guide"] = Guide(
            guide.queries[order], guide.positives[order], guide.negatives, guide.margin, guide.relative
        )
    torch.testing.assert_close(contrastive(**{**options, **mixed}), value, rtol=1e-12, atol=1e-12)


def test_each_rows_gradient_is_orthogonal_to_the_row() -> None:
    case = prepared("gte, all rows' negatives", batch(6, 8, 5))
    for gradient, key in zip(
        gradients(contrastive, case), ("queries", "positives", "negatives"), strict=True
    ):
        torch.testing.assert_close((gradient * case[key]).sum(1), torch.zeros(len(gradient)).double())


def test_more_rows_never_lower_a_rows_loss_and_a_mask_never_raises_it() -> None:
    case = batch(8, 6, 0)
    queries, positives = case["queries"], case["positives"]
    before = [contrastive(queries[:1], positives[:rows]).item() for rows in range(1, 9)]
    assert before == sorted(before)
    masked = contrastive(**case)
    assert masked < contrastive(queries, positives)
    assert contrastive(queries[:1], positives[:1]).item() == 0


def test_only_prefix_coordinates_get_gradient_and_a_rotation_that_mixes_prefixes_changes_the_value() -> None:
    case = batch(5, 8, 4)
    del case["negative_hashes"]  # no negative is left out
    for gradient in gradients(contrastive, case, sizes=(2, 5)):
        assert gradient[:, :5].abs().min() > 0
        assert gradient[:, 5:].abs().max() == 0
    turned = {key: case[key].flip(1) for key in ("queries", "positives", "negatives")}
    assert not torch.allclose(contrastive(**{**case, **turned}, sizes=(2,)), contrastive(**case, sizes=(2,)))
    cut = {key: case[key][:, :5] for key in ("queries", "positives", "negatives")}
    torch.testing.assert_close(contrastive(**{**case, **cut}), contrastive(**case, sizes=(5,)))


def test_a_batch_of_one_text_leaves_the_positives_alone_in_the_denominator() -> None:
    case = batch(5, 6, 0)
    case["query_hashes"] = torch.zeros(5, dtype=torch.int64)
    assert contrastive(**case).item() == 0
    for gradient in gradients(contrastive, case):
        assert gradient.abs().max() == 0
    assert contrastive(**case, also=GECKO).item() == 0
    for gradient in gradients(contrastive, case, also=GECKO, temperature=0.01):
        assert gradient.abs().max() == 0


def test_a_single_pair_has_no_loss_and_no_gradient() -> None:
    case = batch(1, 6, 0)
    assert contrastive(**case, also=GECKO).item() == 0
    for gradient in gradients(contrastive, case, also=GECKO):
        assert gradient.abs().max() == 0


def test_rows_of_zeros_have_similarity_zero_and_no_gradient() -> None:
    case = batch(6, 6, 5)
    for key in ("queries", "positives", "negatives"):
        case[key][2] = 0
        case[key][3, :2] = 0
    value = contrastive(**case, sizes=(2, 6))
    torch.testing.assert_close(value, plain.contrastive(**case, sizes=(2, 6)))
    for gradient in gradients(contrastive, case, sizes=(2, 6)):
        assert gradient.isfinite().all()
        assert gradient[2].abs().max() == 0


def test_far_logits_neither_overflow_nor_vanish() -> None:
    case = batch(6, 6, 5, torch.float32)
    case["positives"] = -case["queries"]
    forms: list[Case] = [{}, {"negatives_of": "all"}]
    for options in forms:
        value = contrastive(**case, **options, temperature=0.002)
        wanted = plain.contrastive(**case, **options, temperature=0.002)
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=0)
        found = gradients(contrastive, case, **options, temperature=0.002)
        expected = gradients(plain.contrastive, case, **options, temperature=0.002)
        for given, want in zip(found, expected, strict=True):
            assert float((given - want).norm() / want.norm()) < 1e-4


def test_not_a_number_is_not_hidden() -> None:
    case = batch(6, 6, 0)
    case["positives"][3, 0] = torch.nan
    assert contrastive(**case).isnan().all()


def test_half_precision_is_computed_in_float32() -> None:
    case = batch(6, 8, 5, torch.bfloat16)
    whole = {key: value.float() if value.is_floating_point() else value for key, value in case.items()}
    found = gradients(contrastive, case, sizes=(4, 8))
    assert found[0].dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(contrastive(**case), contrastive(**whole), rtol=1e-6, atol=0)
    for given, want in zip(found, gradients(contrastive, whole, sizes=(4, 8)), strict=True):
        torch.testing.assert_close(given.float(), want, rtol=1e-2, atol=1e-2)


def test_a_backward_pass_can_be_repeated() -> None:
    case = batch(6, 8, 5)
    queries = case["queries"].requires_grad_()
    loss = contrastive(**case, sizes=(4, 8)).sum()
    first = torch.autograd.grad(loss, queries, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(3 * loss, queries)[0], 3 * first)


def rows_of(
    queries: Tensor = QUERIES, positives: Tensor = POSITIVES, negatives: Tensor | None = None, **more: object
) -> list[float]:
    case: Case = {"queries": queries, "positives": positives, "temperature": TEMPERATURE, **more}
    if negatives is not None:
        case.update(negatives=negatives, owner=OWNER)
    return [contrastive(**one_row(i, case)).item() for i in range(3)]


def test_the_rows_of_the_golden_batch() -> None:
    near = pytest.approx
    assert rows_of() == near([0.001442, 0.336390, 0.856079], abs=SIX_DIGITS)
    assert rows_of(negatives=NEGATIVES, hardness=0.0) == near([0.289728, 0.587451, 1.210128], abs=SIX_DIGITS)
    hard = rows_of(negatives=NEGATIVES, hardness=5.0)
    assert hard == near([3.117265, 1.498769, 3.906100], abs=SIX_DIGITS)
    same = QUERIES[:1].expand(3, -1)
    hashes = torch.zeros(3, dtype=torch.int64)
    masked = rows_of(same, negatives=NEGATIVES, query_hashes=hashes)
    assert masked == near([3.117201, 4.199434, 5.006715], abs=SIX_DIGITS)
    assert rows_of(also=GECKO) == near([0.026966, 1.273676, 0.856309], abs=SIX_DIGITS)
    backwards = rows_of(POSITIVES, QUERIES, also=GECKO)
    assert backwards == near([0.009573, 3.095044, 0.007999], abs=SIX_DIGITS)


def test_the_means_of_the_golden_batch() -> None:
    def mean(**options: object) -> float:
        case: Case = {"queries": QUERIES, "positives": POSITIVES, "negatives": NEGATIVES, "owner": OWNER}
        return float(contrastive(**{**case, **options}, temperature=TEMPERATURE))

    near = pytest.approx
    assert mean(negatives=None, owner=None) == near(0.397971, abs=SIX_DIGITS)
    assert mean(hardness=0.0) == near(0.695769, abs=SIX_DIGITS)
    assert mean() == near(2.840711, abs=SIX_DIGITS)
    repeated = torch.stack([QUERIES[0], QUERIES[1], QUERIES[0]])
    hashes = torch.tensor([7, 8, 7])
    assert mean(queries=repeated) == near(6.348549, abs=SIX_DIGITS)
    assert mean(queries=repeated, query_hashes=hashes) == near(4.185800, abs=SIX_DIGITS)
    both = contrastive(QUERIES, POSITIVES, NEGATIVES, owner=OWNER, temperature=0.1, sizes=(4, 2))
    assert both.tolist() == near([2.840711, 6.181576], abs=SIX_DIGITS)
    one_side = samtone(QUERIES, POSITIVES, both_sides=False, temperature=0.1)
    assert float(one_side) == near(0.718984, abs=SIX_DIGITS)
    two_sides = samtone(QUERIES, POSITIVES, temperature=0.1)
    assert float(two_sides - one_side) == near(1.037539, abs=SIX_DIGITS)


def test_the_mask_read_to_the_letter_would_be_another_loss() -> None:
    rows = [
        plain.contrastive_row(
            i, QUERIES, POSITIVES, NEGATIVES, owner=OWNER, temperature=0.1, literal_mask=True
        )
        for i in range(3)
    ]
    assert sum(rows) / 3 == pytest.approx(2.734562, abs=SIX_DIGITS)


def test_the_hardness_weight_is_a_constant_to_the_gradient() -> None:
    # With unit rows that are orthogonal to all else, the gradient along the negative is that of its cosine.
    negatives = NEGATIVES.clone().requires_grad_()
    one: Case = {"owner": OWNER[:1], "temperature": 0.1, "hardness": 5.0}
    loss = contrastive(QUERIES[:1], POSITIVES, negatives[:1], **one)
    gradient = torch.autograd.grad(loss.sum(), negatives)[0][0]
    q, h = (rows[0] / rows[0].norm() for rows in (QUERIES, NEGATIVES))
    along = (q - (q @ h) * h) / NEGATIVES[0].norm()  # of the cosine
    assert float(gradient @ along / (along @ along)) == pytest.approx(9.556580, abs=SIX_DIGITS)


def test_a_guide_drops_what_it_finds_better_than_the_positive_and_nothing_else() -> None:
    queries = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    # Cosines with each query: -0.8 (the first row's positive), -0.6, -0.9.
    teacher = torch.tensor([[-0.8, 0.6], [-0.6, 0.8], [-0.9, 0.19**0.5]])
    one: Case = {"queries": torch.eye(3)[:1], "positives": torch.eye(3), "temperature": 1.0}

    def kept(margin: float, relative: bool) -> int:
        """How many denominators' terms of 1 are left beside that of the positive, e."""
        guide = Guide(queries, teacher, margin=margin, relative=relative)
        return round((contrastive(**one, guide=guide).add(1).exp().item()) - torch.e)

    assert kept(0.0, relative=False) == 1
    assert kept(0.0, relative=True) == 1
    # A threshold of margin * positive on a negative score would rise above it and keep both.
    assert kept(0.05, relative=True) == 1
    assert kept(0.2, relative=True) == 0
    assert kept(0.2, relative=False) == 0
    assert kept(-0.3, relative=False) == 2


def test_what_is_left_out_is_counted_as_in_loops() -> None:
    case = batch(9, 6, 12)
    guide = guide_of(case, margin=0.1)
    hashes = {key: value for key, value in case.items() if key.endswith("_hashes")}
    duplicates, false_negatives, candidates = 0, 0, 0
    for i in range(9):
        limit = plain.cosine(guide.queries[i], guide.positives[i]) - 0.1
        for j in set(range(9)) - {i}:
            repeats = any(case[key][i] == case[key][j] for key in ("query_hashes", "positive_hashes"))
            duplicates += repeats
            false_negatives += not repeats and plain.cosine(guide.queries[i], guide.positives[j]) > limit
            candidates += 1
        for n in range(12):
            if case["owner"][n] == i and guide.negatives is not None:
                repeats = bool(case["negative_hashes"][n] == case["positive_hashes"][i])
                duplicates += repeats
                false_negatives += not repeats and plain.cosine(guide.queries[i], guide.negatives[n]) > limit
                candidates += 1
    found = count_left_out(9, 9, owner=case["owner"], guide=guide, **hashes)
    assert found == LeftOut(duplicates, false_negatives, candidates)
    assert min(duplicates, false_negatives) > 0
    assert count_left_out(9, 9, owner=case["owner"], **hashes) == LeftOut(duplicates, 0, candidates)
    halves = [
        count_left_out(rows, 9, offset=start, owner=case["owner"], guide=guide, **hashes)
        for start, rows in ((0, 4), (4, 5))
    ]
    assert sum(half.false_negatives for half in halves) == false_negatives
    assert sum(half.candidates for half in halves) == candidates


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (9,)}, "Matryoshka size 9 is not in 1..8, the width of the embeddings"),
        ({"sizes": ()}, "no Matryoshka size is given; None means the full width, 8"),
        ({"sizes": (4, 4)}, "Matryoshka sizes (4, 4) name one size twice"),
        ({"temperature": 0.0}, "temperature is 0.0, not above 0"),
        ({"temperature": float("nan")}, "temperature is nan, not above 0"),
        ({"hardness": -1.0}, "hardness is -1.0, not 0 or more"),
        ({"weights": (1.0, 2.0)}, "2 weights stand against 1 Matryoshka sizes"),
        ({"offset": 1}, "4 queries from offset 1 have no positive each among 4"),
        ({"owner": None}, "3 negatives have 0 owners; each belongs to one row"),
        ({"queries": torch.empty(0, 8)}, "there are no queries; the mean over no rows has no value"),
        (
            {"queries": torch.ones(2, 8), "also": GTE},
            "2 queries stand against 4 positives; all_queries has one for each",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: Case, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        contrastive(**{**batch(4, 8, 3), **change})


class Accounting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors alive after each operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: list[weakref.ref[Tensor]] = []
        self.peak_bytes = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        self._made += [weakref.ref(leaf) for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        alive = [tensor for tensor in (reference() for reference in self._made) if tensor is not None]
        self._made = [weakref.ref(tensor) for tensor in alive]
        storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in alive)}
        self.peak_bytes = max(self.peak_bytes, sum(storages.values()))
        return made


@pytest.mark.parametrize("also", [(), GECKO])
def test_four_sizes_need_less_memory_than_one_matrix_of_the_batch_squared(also: tuple[Any, ...]) -> None:
    case = batch(2048, 16, 0, torch.float32)
    leaves = {key: case[key].requires_grad_() for key in ("queries", "positives")}
    square = 4 * 2048**2
    peaks, kept = [], []
    for loss in (contrastive, plain.contrastive):
        saved: list[int] = []

        def keep(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel() * tensor.element_size())
            return tensor

        with (
            Accounting() as accounting,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            terms = loss(**leaves, also=also, sizes=(16, 8, 4, 2))
            torch.autograd.grad(terms.sum(), list(leaves.values()))
        peaks.append(accounting.peak_bytes / square)
        kept.append(sum(saved) / square)
    assert peaks[0] < 1 + len(also)
    assert kept[0] < 0.05
    assert peaks[1] > 4
    assert kept[1] > 4

"""What a training recipe accepts, and the words with which it refuses the rest."""

from pathlib import Path

import pytest

from gemb.errors import GembError
from gemb.recipe import load, resolved
from gemb.training.pretrain_recipe import PretrainRecipe
from gemb.training.recipe import ContrastiveTerm, SpreadOutTerm, TrainRecipe, flat

DATA = "data: [{path: pairs.jsonl, prompts: none}]\n"


def loaded(tmp_path: Path, text: str) -> TrainRecipe:
    file = tmp_path / "r.yaml"
    file.write_text(DATA + text, encoding="utf-8")
    return load(file, TrainRecipe)


def refusal(tmp_path: Path, text: str) -> str:
    """The problems, each on a line."""
    with pytest.raises(GembError) as error:
        loaded(tmp_path, text)
    assert error.value.exit_code == 2
    return str(error.value).partition("\n")[2]


def test_terms_are_read_by_their_names(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, "losses: [{name: contrastive, hardness: 0}, {name: spread_out, weight: 0.1}]")
    assert recipe.losses == (
        ContrastiveTerm(name="contrastive", hardness=0.0),
        SpreadOutTerm(name="spread_out", weight=0.1),
    )


def test_the_default_loss_is_the_contrastive_one(tmp_path: Path) -> None:
    assert loaded(tmp_path, "").losses == (ContrastiveTerm(name="contrastive"),)


def test_steps_on_the_command_line_take_the_place_of_the_tokens_of_a_recipe() -> None:
    recipe = load("tiny_decoder", PretrainRecipe)
    shorter = load("tiny_decoder", PretrainRecipe, ["steps=5"])
    assert (recipe.steps, recipe.tokens) == (None, 400_000)
    assert (shorter.steps, shorter.tokens) == (5, None)
    with pytest.raises(GembError) as error:
        load("tiny_decoder", PretrainRecipe, ["steps=5"], {"tokens": 900})
    assert str(error.value).endswith(
        "steps and tokens are both given; set one to null, as a run has one length"
    )


def test_every_problem_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    text = """batch: {pares: 4}
losses:
  - {name: contrastive, temprature: 0.1}
  - {name: spread_out, hardness: 3}
  - {name: spred_out}
  - {weight: 2}
optimizer: {learning_rate: fast}
"""
    assert refusal(tmp_path, text).split("\n") == [
        "  line 2: batch.pares: no such key; did you mean pairs?",
        "  line 4: losses.0.temprature: no such key; did you mean temperature?",
        "  line 5: losses.1.hardness: no such key; the keys are weight, name",
        "  line 6: losses.2: name 'spred_out' is not one of contrastive, same_tower, spread_out, "
        "orthogonality, similarity, cosine_error, matching, score_matching; did you mean spread_out?",
        "  line 7: losses.3: no name, which says what kind it is",
        "  line 8: optimizer.learning_rate: 'fast' is not a number",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "ema: 0.9\naverage: {name: last}",
            "ema and average are both given; ema is short for an average, so leave it out",
        ),
        (
            "average: {name: swa}",
            "line 2: average: name 'swa' is not one of ema, last",
        ),
        (
            "losses: [{name: contrastive, false_negatives: {}}]",
            "false_negatives names nobody who finds them; give model, vectors, or own: true",
        ),
        (
            "losses: [{name: contrastive, false_negatives: {own: true, model: minilm}}]",
            "line 2: losses.0.false_negatives: own is true, but a teacher is given, too; "
            "leave one of them out",
        ),
        (
            "losses: [{name: contrastive, false_negatives: {own: true, absolute_margin: 0, "
            "relative_margin: 0.1}}]",
            "line 2: losses.0.false_negatives: absolute_margin and relative_margin are both given; "
            "give one of them",
        ),
        (
            "losses: [{name: contrastive, false_negatives: {vectors: v.npy}}]",
            "line 2: losses.0.false_negatives: vectors and texts go together; give both, or a model",
        ),
        (
            "steps: 5\nepochs: 2.0",
            "steps and epochs are both given; set one to null, as a run has one length",
        ),
        ("losses: []", "losses is empty; give at least one term, such as - name: contrastive"),
        (
            "losses: [{name: spread_out}, {name: spread_out}]",
            "losses has spread_out twice; give it once, with the weight that it shall have",
        ),
        (
            "batch: {pairs: 1}\nlosses: [{name: contrastive}, {name: spread_out}]",
            "spread_out compares the examples of a batch, but batch.pairs is 1; give at least 2",
        ),
        ("losses: [{name: matching}]", "matching needs a teacher; use gemb distill"),
        (
            "precision: fp16",
            "line 2: precision: 'fp16' is refused: float16 gives NaN in Gemma models; use bf16 or fp32",
        ),
        (
            "matryoshka: {sizes: [8, 8]}",
            "line 2: matryoshka: sizes are [8, 8]; each is at least 1 and stands there once",
        ),
        (
            "matryoshka: {sizes: [8, 4], weights: [1.0]}",
            "line 2: matryoshka: 1 weights for 2 sizes; give one for each",
        ),
        (
            "matryoshka: {sizes: [8], weights: [0.0]}",
            "line 2: matryoshka: weights are [0.0]; each is more than 0",
        ),
    ],
)
def test_an_impossible_wish_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    assert refusal(tmp_path, text) == f"  {problem}"


def test_sizes_begin_with_the_full_width() -> None:
    recipe = TrainRecipe.model_validate_json('{"matryoshka": {"sizes": [64, 128], "weights": [0.5, 2.0]}}')
    assert recipe.sizes(256) == ((256, 128, 64), (1.0, 2.0, 0.5))
    assert recipe.sizes(128) == ((128, 64), (2.0, 0.5))
    with pytest.raises(ValueError, match="sizes has 128, but the model's vectors are 96 wide; give"):
        recipe.sizes(96)


def test_a_resolved_recipe_is_flat_with_dotted_keys(tmp_path: Path) -> None:
    leaves = flat(resolved(loaded(tmp_path, "matryoshka: {sizes: [4]}")))
    assert leaves["data.0.path"] == "pairs.jsonl" or str(leaves["data.0.path"]).endswith("/pairs.jsonl")
    assert leaves["matryoshka.sizes.0"] == 4
    assert leaves["losses.0.name"] == "contrastive"
    assert leaves["freeze"] == []

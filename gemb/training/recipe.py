"""The recipe of a training run: what `gemb train` reads. Imports no torch, so that help is quick."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from gemb.recipe import ComputeRecipe, Recipe, RecipeInput, RecipePath
from gemb.training.data_recipe import DataSet, MixtureSettings, check_shares
from gemb.training.teacher_recipe import FalseNegatives


class BatchSettings(Recipe):
    """How many examples make a step, and how they are cut to fit the memory."""

    pairs: int = Field(default=64, ge=1)
    """Examples of one optimizer step, all devices together; each is a negative of all the others."""
    memory_gib: float | None = Field(default=None, gt=0)
    """GiB that the graphs of a batch may take; beyond it texts are encoded twice (GradCache), with the same
    gradients; by default half of what is free."""


class LossTerm(Recipe):
    """What all terms of a loss have in common."""

    batches: ClassVar[frozenset[str]] = frozenset({"pairs"})
    """The kinds of batches that the term is for; in others it is left out."""
    needs_teacher: ClassVar[bool] = False
    """Whether the term compares with a teacher's vectors."""

    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """What the term is multiplied with in the sum of all terms."""


class ContrastiveTerm(LossTerm):
    """In-batch contrastive loss with hard negatives (EmbeddingGemma, arXiv 2509.20354, eq. 2 and 3)."""

    name: Literal["contrastive"]
    """contrastive: a query finds its positive among those of all examples and its own hard negatives."""
    temperature: float = Field(default=0.05, gt=0)
    """Divides the cosines; not published for EmbeddingGemma, 0.05 is ours."""
    hardness: float = Field(default=5.0, ge=0)
    """How much more a hard negative counts the closer it is, alpha in the paper; 0 turns it off."""
    hardened: Literal["own", "in_batch", "all"] = "own"
    """What hardness applies to: the example's own hard negatives (EmbeddingGemma), the candidates of other
    examples (LLaVE), or all."""
    negatives_of: Literal["own", "all"] = "own"
    """Whose hard negatives a query sees: its own (EmbeddingGemma), or all (sentence-transformers)."""
    also: Literal["none", "gecko", "qwen3", "gte"] = "none"
    """Further negatives in the same softmax: queries (gecko), queries and positives of the same side (qwen3),
    or all four directions (gte)."""
    mask_duplicates: bool = True
    """Never take an equal text for a negative."""
    false_negatives: FalseNegatives | None = None
    """Nor a text that a teacher finds about as good as the positive; by default there is none."""


class SameTowerTerm(LossTerm):
    """Same-tower negatives (SamToNe, arXiv 2306.02516)."""

    name: Literal["same_tower"]
    """same_tower: the contrastive loss with the other queries among the negatives; takes its place."""
    temperature: float = Field(default=0.01, gt=0)
    """Divides the cosines; 0.01 is that of the group's paper before."""
    both_sides: bool = True
    """Also from passages to queries, with the other passages among the negatives."""
    mask_duplicates: bool = False
    """Never take an equal text for a negative; the paper has no mask."""


class SpreadOutTerm(LossTerm):
    """Spread-out regulariser (EmbeddingGemma, eq. 4)."""

    name: Literal["spread_out"]
    """spread_out: the mean squared cosine of different texts, of queries and of positives."""


class OrthogonalityTerm(LossTerm):
    """Global orthogonal regulariser (Zhang et al. 2017, arXiv 1708.06320)."""

    name: Literal["orthogonality"]
    """orthogonality: the cosines of queries with others' positives get the moments of the sphere's."""


class SimilarityTerm(LossTerm):
    """Ranking of scored pairs (CoSENT)."""

    batches = frozenset({"scored"})

    name: Literal["similarity"]
    """similarity: scored pairs are to be ranked as their scores (CoSENT)."""
    temperature: float = Field(default=0.05, gt=0)
    """Divides the cosines."""


class CosineErrorTerm(LossTerm):
    """Regression of scored pairs on their cosine."""

    batches = frozenset({"scored"})

    name: Literal["cosine_error"]
    """cosine_error: the squared difference of cosine and score, with scores from -1 to 1."""


class MatchingTerm(LossTerm):
    """Embedding matching with a teacher (EmbeddingGemma, eq. 5)."""

    batches = frozenset({"pairs", "scored"})
    needs_teacher = True

    name: Literal["matching"]
    """matching: the distance of every vector to the teacher's."""
    distance: Literal["l2", "squared", "cosine"] = "l2"
    """l2 as in EmbedDistill, which the paper cites; squared; or 1 - cosine."""
    hard_negatives: bool = True
    """Match hard negatives, too, as EmbeddingGemma does and EmbedDistill does not."""
    projection: bool = False
    """Learn a map from the student's vectors to the teacher's, which is dropped after the training; without
    it, the wider ones are cut to the others' width, as is right where they are made to be cut."""


class ScoreMatchingTerm(LossTerm):
    """Matching of the distributions over the candidates of a batch with a teacher's."""

    needs_teacher = True

    name: Literal["score_matching"]
    """score_matching: KL divergence of the in-batch scores from the teacher's."""
    temperature: float = Field(default=0.05, gt=0)
    """Divides the cosines of the student."""
    teacher_temperature: float | None = Field(default=None, gt=0)
    """Divides the cosines of the teacher; by default the student's."""


AnyTerm = Annotated[
    ContrastiveTerm
    | SameTowerTerm
    | SpreadOutTerm
    | OrthogonalityTerm
    | SimilarityTerm
    | CosineErrorTerm
    | MatchingTerm
    | ScoreMatchingTerm,
    Field(discriminator="name"),
]


class MatryoshkaSettings(Recipe):
    """The widths at which the vectors are trained to be cut (arXiv 2205.13147)."""

    sizes: tuple[int, ...] = ()
    """Widths, the full one not needed; by default only the full one is trained."""
    weights: tuple[float, ...] = ()
    """What the loss at each of the sizes is multiplied with; by default 1."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(size < 1 for size in self.sizes) or len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"sizes are {list(self.sizes)}; each is at least 1 and stands there once")
        if self.weights and len(self.weights) != len(self.sizes):
            raise ValueError(f"{len(self.weights)} weights for {len(self.sizes)} sizes; give one for each")
        if any(not weight > 0 for weight in self.weights):
            raise ValueError(f"weights are {list(self.weights)}; each is more than 0")
        return self


class OptimizerSettings(Recipe):
    """How the weights are changed by the gradients."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the matrices of the layers with adamw for the rest."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Largest learning rate, after the warm-up."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay of matrices; vectors such as norms and biases have none."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's mean of the gradients."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's mean of the squared gradients."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to AdamW's denominator."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Longer gradients, all parameters together, are cut to this norm; null never cuts."""


class ScheduleSettings(Recipe):
    """How the learning rate goes over the run."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls after the warm-up: along a cosine, in a line, or not at all."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the run in which it rises from 0 in a line."""
    floor: float = Field(default=0.0, ge=0, lt=1)
    """What it falls to, as a share of the largest."""


class EvaluationSettings(Recipe):
    """What is measured before the first step, now and then, and at the end."""

    pairs: tuple[DataSet, ...] = ()
    """Held-out pairs: each query looks for its positive among the positives of all; nDCG@10."""
    sets: tuple[RecipeInput, ...] = ()
    """BEIR folders and files of scored pairs, as `gemb eval` takes them."""
    every: int | None = Field(default=None, ge=1)
    """Steps from one evaluation to the next; by default only before the first step and at the end."""
    limit: int = Field(default=2000, ge=2)
    """Pairs taken of each held-out data set, from the first on."""


class CheckpointSettings(Recipe):
    """When the state is saved, and what stays."""

    every: int | None = Field(default=None, ge=1)
    """Steps from one checkpoint to the next; by default a tenth of the run, and never more than 1,000."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints that stay, the newest ones; the best one stays besides."""
    result: Literal["last", "best"] = "last"
    """Which weights become the model: those of the last step, or of the best evaluation."""
    keep_after: bool = False
    """Leave the checkpoints in OUTPUT/run when the run is done."""


class LowRankSettings(Recipe):
    """Low-rank training (LoRA, arXiv 2106.09685)."""

    rank: int = Field(default=8, ge=1)
    """Rank of what is added to a matrix; the fewer, the less is trained and kept."""
    alpha: float = Field(default=16.0, gt=0, allow_inf_nan=False)
    """What is added is multiplied with alpha / rank, as in peft."""
    targets: tuple[str, ...] = ("*",)
    """Matrices by patterns of their names such as `*q_proj.weight`; by default all of attention,
    feed-forwards and projections."""


class EmaAverage(Recipe):
    """The exponential average of the weights of all steps."""

    name: Literal["ema"]
    """ema: each step's weights count a little less than those of the next one."""
    decay: float = Field(default=0.999, gt=0, lt=1)
    """What the average keeps of itself at each step."""


class LastAverage(Recipe):
    """The mean of the last weights that were kept (LAWA, arXiv 2209.14981; T5Gemma has 5)."""

    name: Literal["last"]
    """last: the mean of the weights at the last few times."""
    checkpoints: int = Field(default=5, ge=1)
    """How many times; a copy of the weights is kept in memory and in the checkpoints for each."""
    every: int | None = Field(default=None, ge=1)
    """Steps from one time to the next; by default a tenth of the run, and never more than 1,000."""


class RunRecipe(ComputeRecipe):
    """What all recipes of `gemb train` have in common, whatever is learned."""

    kind: ClassVar[str] = "train"
    alternatives: ClassVar[tuple[str, ...]] = ("steps", "epochs", "tokens")

    output: RecipePath | None = None
    """The folder of the finished model; until then OUTPUT.partial holds the run."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """How the weights are changed."""
    schedule: ScheduleSettings = ScheduleSettings()
    """How the learning rate goes over the run."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of the run. Only one of steps, epochs and tokens is given; one on the command line
    takes the place of the recipe's."""
    epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Passes over the data; by default 1 where neither steps nor tokens are given."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens to train on, those of prompts counted."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the hidden numbers that are left out at random while training."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, by patterns of their names such as `*embed_tokens*`."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Short for an `average` of name ema with this decay, such as 0.999."""
    average: Annotated[EmaAverage | LastAverage, Field(discriminator="name")] | None = None
    """An average of the weights, which is what is evaluated and becomes the model."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """When the state is saved."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """What all random numbers follow from."""
    tensorboard: bool = False
    """Write OUTPUT/run/tensorboard as well; needs the package tensorboard."""
    fail_on_regression: bool = False
    """End with exit code 8 if the evaluation says that the model became worse."""
    wait_lock: float = Field(default=0.0, ge=0)
    """Seconds to wait while another run holds the output."""

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        lengths = [name for name in self.alternatives if getattr(self, name) is not None]
        if len(lengths) > 1:
            raise ValueError(
                f"{' and '.join(lengths)} are both given; set one to null, as a run has one length"
            )
        if self.ema is not None and self.average is not None:
            raise ValueError("ema and average are both given; ema is short for an average, so leave it out")
        return self

    @property
    def averaging(self) -> EmaAverage | LastAverage | None:
        """The average of the weights that becomes the model; None where the last weights do."""
        return self.average if self.ema is None else EmaAverage(name="ema", decay=self.ema)


class QatSettings(Recipe):
    """Quantisation-aware training: the weights are seen as their export will have them (EmbeddingGemma)."""

    format: Literal["int4", "int8", "mixed"]
    """What `gemb quantize` will make of the model: int4 or int8 in blocks of 32 numbers, or mixed, the third
    format of the paper: attention in int8 and all else in int4, with one scale a row."""
    start: float = Field(default=0.5, ge=0, lt=1)
    """Share of the run that goes before it; not published, half of the run is ours."""

    def __str__(self) -> str:
        """`int4 from 50 % of the run on`."""
        return f"{self.format} from {self.start:.0%} of the run on".replace("%", " %")


class TrainRecipe(RunRecipe):
    """What `gemb train` is asked to do with pairs of texts."""

    data: tuple[DataSet, ...] = ()
    """The data sets; a path `docstrings` is made on the spot from the Python standard library."""
    mixture: MixtureSettings = MixtureSettings()
    """How the batches of several data sets are mixed."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest text in tokens, prompt and special tokens counted; by default what the model declares, and at
    most 512."""
    batch: BatchSettings = BatchSettings()
    """How many examples make a step."""
    losses: tuple[AnyTerm, ...] = (ContrastiveTerm(name="contrastive"),)
    """The terms of the loss, added up; each is logged apart."""
    matryoshka: MatryoshkaSettings = MatryoshkaSettings()
    """Widths to which the vectors may be cut later."""
    dropout: float | None = Field(default=None, ge=0, lt=1)  # type: ignore[assignment]  # may be left open
    """Share of the hidden numbers that are left out at random while training; by default the shares of hidden
    numbers and of attention weights that the model's config.json has."""
    qat: QatSettings | None = None
    """Train for an integer format; by default for floats. Scores after the first step are those of the
    quantised model, and the folder keeps the weights in full precision."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """What is measured before, during and after."""
    lora: LowRankSettings | None = None
    """Train a sum of low rank beside each matrix, and nothing else; the model that is saved is the sum."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data:
            check_shares(self.data, self.mixture)
        names = [term.name for term in self.losses]
        if not names:
            raise ValueError("losses is empty; give at least one term, such as - name: contrastive")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"losses has {twice} twice; give it once, with the weight that it shall have")
        if self.batch.pairs == 1 and (alone := sorted({"spread_out", "orthogonality"} & set(names))):
            raise ValueError(
                f"{alone[0]} compares the examples of a batch, but batch.pairs is 1; give at least 2"
            )
        if self.kind == "train" and (taught := [term.name for term in self.losses if term.needs_teacher]):
            raise ValueError(f"{taught[0]} needs a teacher; use gemb distill")
        finder = self.finder
        if self.kind == "train" and finder is not None and not (finder.own or finder.is_given):
            raise ValueError("false_negatives names nobody who finds them; give model, vectors, or own: true")
        return self

    @property
    def finder(self) -> FalseNegatives | None:
        """Who finds false negatives; None where nobody does."""
        found = (term.false_negatives for term in self.losses if isinstance(term, ContrastiveTerm))
        return next(found, None)

    def sizes(self, width: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The Matryoshka sizes, largest first, and the weight of each, for a model that is `width` wide.

        Raises ValueError if a size is larger than that.
        """
        given = dict(zip(self.matryoshka.sizes, self.matryoshka.weights or [1.0] * width, strict=False))
        if larger := [size for size in given if size > width]:
            raise ValueError(
                f"matryoshka.sizes has {larger[0]}, but the model's vectors are {width} wide; "
                f"give sizes below {width}"
            )
        weights = {width: 1.0, **given}
        sizes = tuple(sorted(weights, reverse=True))
        return sizes, tuple(weights[size] for size in sizes)


NOT_COMPARED = frozenset({
    "output", "device", "threads", "offline", "tensorboard", "fail_on_regression", "wait_lock",
    "checkpoint.every", "checkpoint.keep", "checkpoint.keep_after",
})  # fmt: skip
"""Keys that may differ when a run is continued: they change when and where, not what is learned."""


def flat(values: object, prefix: str = "") -> dict[str, object]:
    """The leaves of nested mappings and lists, by dotted key: {"data.0.weight": 0.3}."""
    if isinstance(values, dict):
        items: Sequence[tuple[object, object]] = list(values.items())
    elif isinstance(values, list) and values:
        items = list(enumerate(values))
    else:
        return {prefix: values}
    return {
        key: leaf
        for name, value in items
        for key, leaf in flat(value, f"{prefix}.{name}" if prefix else str(name)).items()
    }

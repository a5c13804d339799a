"""The recipe of a pretraining run: what `gemb train` reads where the recipe has an `objective`.

Imports no torch, so that help is quick.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gemb.recipe import ModelName, Recipe, RecipeInput
from gemb.training.recipe import RunRecipe


class SpansDenoiser(Recipe):
    """Spans taken out of the whole row."""

    name: Literal["spans"]
    """spans: random spans of about the same length."""
    mean_span: float = Field(ge=1, allow_inf_nan=False)
    """Tokens of a span in the mean."""
    rate: float = Field(gt=0, lt=1)
    """Share of the tokens that are taken out."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """How often it is drawn, against the weights of the others."""
    mode: str | None = None
    """A token put before the text that names the denoiser, such as <unused99>; T5Gemma tells of none."""


class SuffixDenoiser(Recipe):
    """One span at the end, as in prefix language modelling."""

    name: Literal["suffix"]
    """suffix: the end of the row."""
    rate: float = Field(gt=0, lt=1)
    """Share of the tokens that are taken out."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """How often it is drawn, against the weights of the others."""
    mode: str | None = None
    """A token put before the text that names the denoiser."""


AnyDenoiser = Annotated[SpansDenoiser | SuffixDenoiser, Field(discriminator="name")]

T5GEMMA2_DENOISERS: tuple[SpansDenoiser | SuffixDenoiser, ...] = (
    SpansDenoiser(name="spans", mean_span=3, rate=0.15),
    SpansDenoiser(name="spans", mean_span=12, rate=0.5),
    SpansDenoiser(name="spans", mean_span=32, rate=0.15),
    SpansDenoiser(name="spans", mean_span=32, rate=0.5),
    SuffixDenoiser(name="suffix", rate=0.75, weight=4),
)
"""T5Gemma 2 (arXiv 2512.14856): 1:1:1:1:4."""


class Ul2Objective(Recipe):
    """A mixture of denoisers (UL2, arXiv 2205.05131)."""

    name: Literal["ul2"]
    """ul2: the encoder reads a row with spans taken out, the decoder restores them; for encoder-decoders."""
    denoisers: tuple[AnyDenoiser, ...] = T5GEMMA2_DENOISERS
    """One is drawn for each row; by default those of T5Gemma 2."""
    sentinels: tuple[str, ...] = ("<unused{}>", "<extra_id_{}>")
    """Names of the tokens that stand for a span, {} being its number from 0; the first pattern that the
    tokenizer knows is taken. Gemma's and T5's by default; which T5Gemma 2 took is not published."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.denoisers:
            raise ValueError("denoisers is empty; give at least one, such as - {name: suffix, rate: 0.75}")
        if without := [one for one in self.sentinels if "{}" not in one]:
            raise ValueError(f"sentinels has {without[0]}, which has no {{}} for the number of the span")
        return self


class PrefixObjective(Recipe):
    """Prefix language modelling (T5Gemma, arXiv 2504.06225)."""

    name: Literal["prefix_lm"]
    """prefix_lm: the encoder reads the first half of a row, the decoder goes on; for encoder-decoders."""


class CausalObjective(Recipe):
    """Causal language modelling."""

    name: Literal["causal"]
    """causal: every token is predicted from those before it; for decoders."""


class MaskedObjective(Recipe):
    """Masked next-token prediction (LLM2Vec, arXiv 2404.05961)."""

    name: Literal["mntp"]
    """mntp: masked tokens are predicted from the state before each, all tokens seen; for decoders and what
    gemb adapt made of them."""
    rate: float = Field(default=0.2, gt=0, lt=1)
    """Share of the tokens that are masked."""
    mask_token: str | None = None
    """The token that stands for a masked one; by default <mask>, [MASK] or _, whichever there is."""


AnyObjective = Annotated[
    Ul2Objective | PrefixObjective | CausalObjective | MaskedObjective, Field(discriminator="name")
]


class TeacherLogits(Recipe):
    """A decoder whose probabilities are learnt (T5Gemma's prefix_lm, and Gemma 2)."""

    model: ModelName
    """The decoder: a folder or a name on the Hugging Face hub; of the student's vocabulary."""
    weight: float = Field(default=1.0, gt=0, le=1)
    """Share of its term; the rest of 1 is that of the texts themselves."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Divides the scores of both."""


class RowBatchSettings(Recipe):
    """How much text makes a step, and how it is cut to fit the memory."""

    tokens: int = Field(default=8192, ge=2)
    """Tokens of one optimizer step, all devices together; rows are packed, never padded."""
    memory_gib: float | None = Field(default=None, gt=0)
    """GiB that the graphs of a chunk may take; by default half of what is free."""


class PretrainEvaluation(Recipe):
    """What is measured before the first step, now and then, and at the end."""

    texts: tuple[RecipeInput, ...] = ()
    """Held-out texts: perplexity and share of tokens predicted, of the beginning of each."""
    every: int | None = Field(default=None, ge=1)
    """Steps from one evaluation to the next; by default only before the first step and at the end."""
    limit: int = Field(default=500, ge=2)
    """Texts taken, from the first on."""
    samples: int = Field(default=4, ge=0)
    """Texts that the finished model goes on with, into run/samples.jsonl."""
    sample_tokens: int = Field(default=48, ge=1)
    """Longest such continuation."""


class PretrainRecipe(RunRecipe):
    """What `gemb train` is asked to do with plain texts."""

    objective: AnyObjective
    """What is learned: ul2, prefix_lm, causal or mntp."""
    data: tuple[RecipeInput, ...] = ()
    """Files of texts as gemb embed reads them, each read as a whole every epoch; `docstrings` is made on the
    spot from the Python standard library."""
    text_field: str | None = None
    """The field that holds the text; by default the first of text, contents, content, passage, body,
    sentence, document."""
    max_tokens: int | None = Field(default=None, ge=8)
    """Longest row in tokens, special ones counted; longer texts become several rows. By default what the
    model takes, and at most 512."""
    batch: RowBatchSettings = RowBatchSettings()
    """How much text makes a step."""
    teacher: TeacherLogits | None = None
    """A decoder to learn from; for prefix_lm and causal."""
    cross_attention_only: int = Field(default=0, ge=0)
    """Steps at the beginning in which only the cross-attention learns; 1,000 for T5Gemma 9B-2B."""
    evaluation: PretrainEvaluation = PretrainEvaluation()
    """What is measured before, during and after."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        name = self.objective.name
        if self.teacher is not None and name in ("ul2", "mntp"):
            raise ValueError(
                f"a teacher reads texts as they are, which {name} does not; "
                "take prefix_lm or causal, or no teacher"
            )
        if self.cross_attention_only and name in ("causal", "mntp"):
            raise ValueError(
                f"cross_attention_only is for encoder-decoders, and {name} for decoders; leave it out"
            )
        return self

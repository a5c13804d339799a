"""The recipe of a distillation: that of a training, with a teacher and a student. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from gemb.recipe import ModelName, Recipe, RecipeInput
from gemb.training.recipe import AnyTerm, MatchingTerm, TrainRecipe
from gemb.training.teacher_recipe import TeacherSettings


class ModelConfig(Recipe):
    """A config.json of transformers; its keys are those of the `model_type`, and checked when it is built."""

    model_config = ConfigDict(extra="allow")

    model_type: str = ""
    """The family, such as gemma3_text or bert; always needed."""


class StudentSettings(Recipe):
    """Which model is made to begin with."""

    from_: ModelName = "minilm"
    """The model that the student is cut from, or `tiny-gemma3` for small random weights."""
    config: RecipeInput | ModelConfig | None = None
    """In place of `from`, a model of random weights: a config.json of transformers, or its keys. What it
    leaves out is what transformers has for it; the table gets a row for each entry of the tokenizer."""
    tokenizer: ModelName | None = None
    """Whose tokenizer a student of a `config` gets: a folder, a name on the Hugging Face hub, or `minilm`."""
    keep_layers: tuple[int, ...] = ()
    """Layers that stay, counted from 0; by default all."""
    keep_vocab: Literal["data"] | tuple[RecipeInput, ...] | None = None
    """Texts whose tokens stay in vocabulary, table and tokenizer: files of rows, or `data` for those of the
    recipe's data sets; by default all tokens stay."""
    vocabulary: int | None = Field(default=None, ge=1)
    """Of the tokens of these texts so many stay, the most frequent ones, special ones and single characters
    besides; rarer words are then told by shorter pieces. By default all of them stay."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.config is not None and "from_" in self.model_fields_set:
            raise ValueError("from and config are both given; a student is cut from a model, or made anew")
        if (self.config is None) is not (self.tokenizer is None):
            raise ValueError("config and tokenizer go together; give both, or from")
        if self.config is not None and (self.keep_layers or self.keep_vocab is not None):
            raise ValueError("a student of a config is made anew and has nothing to keep; use from")
        if self.from_ == "tiny-gemma3" and (self.keep_layers or self.keep_vocab is not None):
            raise ValueError("tiny-gemma3 is made anew and has nothing to keep; name another model")
        kept = list(self.keep_layers)
        if kept != sorted(set(kept)) or (kept and kept[0] < 0):
            raise ValueError(f"keep_layers is {kept}; give each layer once, ascending from 0")
        if self.vocabulary is not None and self.keep_vocab is None:
            raise ValueError("vocabulary is counted over the texts of keep_vocab; give those, too")
        return self

    @property
    def label(self) -> str:
        """What reports call the student: `minilm, layers 0 2 5, vocabulary of data`."""
        if self.config is not None:
            family = self.config if isinstance(self.config, str) else self.config.model_type
            return f"{family} with random weights"
        parts = [self.from_]
        if self.keep_layers:
            parts.append(f"layers {' '.join(map(str, self.keep_layers))}")
        if self.keep_vocab is not None:
            files = [self.keep_vocab] if isinstance(self.keep_vocab, str) else self.keep_vocab
            size = f"{self.vocabulary:,} tokens" if self.vocabulary else "vocabulary"
            parts.append(f"{size} of {' '.join(files)}")
        return ", ".join(parts)


class DistillRecipe(TrainRecipe):
    """What `gemb distill` is asked to do; all that `gemb train` takes, and a teacher."""

    kind: ClassVar[str] = "distill"

    teacher: TeacherSettings | None = None
    """Whose vectors are learnt."""
    student: StudentSettings | None = None
    """A model made from another one; in place of `model`."""
    dropout: float | None = Field(default=0.0, ge=0, lt=1)
    """Share of the hidden numbers that are left out at random while training; null takes the shares of the
    model's config.json. The vectors to be matched are made without."""
    losses: tuple[AnyTerm, ...] = (MatchingTerm(name="matching"),)
    """The terms of the loss; at least one of matching and score_matching."""

    @model_validator(mode="after")
    def _check_teaching(self) -> Self:
        if self.model is not None and self.student is not None:
            raise ValueError("model and student are both given; the student is one of them")
        if not any(term.needs_teacher for term in self.losses):
            names = ", ".join(term.name for term in self.losses)
            raise ValueError(f"losses ({names}) use no teacher; add - name: matching, or use gemb train")
        return self

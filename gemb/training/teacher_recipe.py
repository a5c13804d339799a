"""Whose vectors a training asks for besides the model's own: a teacher's. Imports no torch."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from gemb.recipe import ModelName, Recipe, RecipeInput, RecipePath
from gemb.text.prompts import DOCUMENT, QUERY
from gemb.training.data_recipe import RolePrompts


class VectorSource(Recipe):
    """A model, or stored vectors, as a training asks for them."""

    model: ModelName | None = None
    """A folder, a name on the Hugging Face hub, or `minilm`; its width and tokenizer may differ."""
    vectors: RecipeInput | None = None
    """Vectors of any origin in place of a model, as `gemb embed` writes and reads them, found by the texts
    of `texts`."""
    texts: RecipeInput | None = None
    """The texts that `vectors` belong to: rows of id and text."""
    prompts: RolePrompts = RolePrompts(query=QUERY, passage=DOCUMENT)
    """The teacher's prompt for each role, apart from the student's; by default what it declares."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest text of the teacher in its tokens; by default what it declares, and at most 512."""
    ahead: bool = False
    """Get the vectors of the whole run before the first step; by default those of each batch when it comes,
    and what came before is never computed again."""
    cache: RecipePath | None = None
    """A folder that keeps the vectors by content, for later runs too; by default it goes with the run."""

    @property
    def is_given(self) -> bool:
        """Whether a model or vectors are named."""
        return self.model is not None or self.vectors is not None

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.model is not None and self.vectors is not None:
            raise ValueError("model and vectors are both given; a teacher is one of them")
        if (self.vectors is None) is not (self.texts is None):
            raise ValueError("vectors and texts go together; give both, or a model")
        return self


class TeacherSettings(VectorSource):
    """Whose vectors the student learns."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.is_given:
            raise ValueError("neither model nor vectors is given; a teacher is one of them")
        return self


class FalseNegatives(VectorSource):
    """Who finds the candidates that are about as good as the positive, and how good that is.

    Such a candidate is likely a right answer that nobody marked, and is taken for no negative. With none of
    model, vectors and own it is the teacher of a distillation who finds them.
    """

    own: bool = False
    """The model itself as it is at each step, without a teacher."""
    absolute_margin: float | None = Field(default=None, allow_inf_nan=False)
    """A negative scores at most positive minus this: 0, the default, is GISTEmbed's (arXiv 2402.16829), -0.1
    with `own` Qwen3-Embedding's (arXiv 2506.05176)."""
    relative_margin: float | None = Field(default=None, allow_inf_nan=False)
    """A negative scores at most positive minus |positive| times this: 0.05 is NV-Retriever's (arXiv
    2407.15831), 95 percent of the positive."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.own and self.is_given:
            raise ValueError("own is true, but a teacher is given, too; leave one of them out")
        if self.absolute_margin is not None and self.relative_margin is not None:
            raise ValueError("absolute_margin and relative_margin are both given; give one of them")
        return self

    @property
    def margin(self) -> float:
        """That of `gemb.losses.Guide`."""
        given = self.absolute_margin if self.relative_margin is None else self.relative_margin
        return 0.0 if given is None else given

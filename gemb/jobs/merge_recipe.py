"""The recipe of `gemb merge`: mergekit's keys for whole models, and what gemb adds to them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Field, field_validator

from gemb.errors import GembError
from gemb.merging.catalogue import METHODS, Method, MethodName, TensorSettings, Variant
from gemb.recipe import ModelName, Recipe, RecipeInput, RecipePath
from gemb.report import counted

Gradient: TypeAlias = float | tuple[float, ...]
"""One number, or several that stand at equal distances from the first layer to the last."""

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_BEHIND_POOLING = re.compile(r"\d+_")


class Filtered(Recipe):
    """A value for the tensors whose name holds a text."""

    filter: str | None = None
    """A part of the names of tensors, such as self_attn; none or * for all."""
    value: Gradient = 1.0
    """One number, or several over the layers."""


Value: TypeAlias = float | tuple[float, ...] | tuple[Filtered, ...]
"""A number, numbers over the layers, or a list of filters, of which the first that fits holds."""


class MergeParameters(Recipe):
    """Parameters of all models, or of one."""

    weight: Value | None = None
    """How much of a model; 1 by default."""
    density: Value | None = None
    """The share of a delta that is kept, above 0 and at most 1."""
    epsilon: Value | None = None
    """Half the width of the range of densities in DELLA; 0.15 by default."""
    gamma: Value | None = None
    """The share of the largest entries that breadcrumbs leave out; 0.01 by default."""
    t: Value | None = None
    """The way from the first model (0) to the second (1) of slerp; 0.5 by default."""
    lambda_: Value | None = None
    """Multiplies the merged delta; 1 by default."""
    normalize: bool | None = None
    """Divide by the sum of the weights; by default linear, and methods that elect signs, do."""
    rescale: bool | None = None
    """Make up for what DARE and DELLA drop; they do by default."""
    filter_wise: bool | None = None
    """Take each row for itself in model stock."""
    max_iter: int | None = Field(default=None, ge=1)
    """Steps of the Karcher mean, at most; 10 by default."""
    tol: float | None = Field(default=None, gt=0)
    """Radians; a shorter step ends the Karcher mean; 1e-5 by default."""
    int8_mask: bool | None = None
    """Read for mergekit's sake; it saves memory there and changes no result."""


def _from_name(value: object) -> object:
    """A model by its name alone; lists are tuples behind a validator, where JSON is Python already."""
    return {"model": value} if isinstance(value, str) else _with_tuples(value)


def _with_tuples(value: object) -> object:
    if isinstance(value, list):
        return tuple(_with_tuples(part) for part in value)
    if isinstance(value, dict):
        return {key: _with_tuples(part) for key, part in value.items()}
    return value


class Ingredient(Recipe):
    """One model, and what holds for it alone."""

    model: ModelName = ""
    """A folder, or a name on the Hugging Face hub."""
    parameters: MergeParameters = MergeParameters()
    """What holds for this model; it goes before the parameters of all."""


class MergeRecipe(Recipe):
    """What `gemb merge` is asked to do. A recipe of mergekit with whole models is one, too."""

    kind: ClassVar[str] = "merge"

    merge_method: MethodName = "linear"
    """How to merge; linear is the (weighted) soup."""
    models: tuple[Annotated[Ingredient, BeforeValidator(_from_name)], ...] = ()
    """The models to merge, by name or with parameters of their own."""
    base_model: ModelName | None = None
    """The model that the others were trained from; needed by all that merges deltas."""
    parameters: MergeParameters = MergeParameters()
    """What holds for all models."""
    weights: tuple[float, ...] = ()
    """One weight a model, in their order; the same as their parameters.weight."""
    variant: Variant = "paper"
    """Whose rules hold where mergekit does not do what a method's paper says: paper or mergekit."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the merged weights; by default that of the first model. Sums are always float32."""
    out_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The same, and goes before dtype, as in mergekit."""
    last: int | None = Field(default=None, ge=2)
    """Merge the last so many checkpoints of the one run that is given as the model."""
    decay: float | None = Field(default=None, gt=0, le=1)
    """With last: a checkpoint weighs so much of the one after it, which makes the average exponential."""
    data: tuple[RecipeInput, ...] = ()
    """Data sets, as for gemb eval: the merged model gets a verdict against the best of the models."""
    choose: Literal["greedy", "weights"] | None = None
    """Choose weights by the data: greedy adds models one by one while that does not harm (model soups),
    weights tries mixtures."""
    budget: int = Field(default=20, ge=1)
    """Merged models that are evaluated to choose weights, at most."""
    fail_on_regression: bool = False
    """End with exit code 8 if the merged model is worse than the best of the models."""
    max_memory: float | None = Field(default=None, gt=0)
    """GiB that the tensors at work may take: blocks become smaller, and a method that needs a tensor as a
    whole is refused where it does not fit; by default blocks of 4 million numbers, and whatever it takes."""
    seed: int = Field(default=42, ge=0)
    """Of what is dropped at random, and of the mixtures tried."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps; several with commas."""
    threads: int | None = Field(default=None, ge=1)
    """Processor threads; by default all that this process may use."""
    offline: bool = False
    """Never open a connection; a model that is not on this machine is an error."""
    output: RecipePath | None = None
    """The folder of the merged model; it must not exist."""
    tokenizer_source: str | None = None
    """Read for mergekit's sake: the tokenizers must be the same, so it does not matter whose is taken."""
    slices: object = None
    """Of mergekit; not supported."""
    modules: object = None
    """Of mergekit; not supported."""
    tokenizer: object = None
    """Of mergekit; not supported."""
    chat_template: object = None
    """Of mergekit; not supported."""

    @field_validator("slices", "modules", "tokenizer", "chat_template")
    @classmethod
    def _refuse(cls, value: object) -> object:
        if value is not None:
            raise ValueError(
                "not supported: gemb merges whole models with one tokenizer; list them in models"
            )
        return value

    @property
    def method(self) -> Method:
        """What the method needs and does."""
        return METHODS[self.merge_method]

    def ingredients(self) -> tuple[Ingredient, ...]:
        """The models that are merged, without the base that some recipes list among them.

        Slerp begins at the base, if there is one.

        Raises GembError for models that the method cannot merge.
        """
        name, method, base = self.merge_method, self.method, self.base_model
        if base is not None and method.base == "none":
            raise GembError(f"{name} has no base; leave out base_model, or list {base} in models")
        if base is None and method.base == "needed":
            raise GembError(
                f"{name} starts from the model that the others were trained from; "
                "name it with --base-model (base_model in a recipe)"
            )
        others = tuple(one for one in self.models if one.model != base)
        if name == "slerp":
            both = others if base is None else (Ingredient(model=base), *others)
            if len(both) != 2:
                raise GembError(f"slerp merges two models, not {len(both)}; karcher merges any number")
            return both
        fewest = method.fewest if method.base == "needed" else 2
        if len(others) < fewest:
            kind = "beside its base" if method.base == "needed" else "at least"
            raise GembError(
                f"{name} merges {'two models' if fewest == 2 else 'one model'} {kind}, and {len(others)} "
                f"{'is' if len(others) == 1 else 'are'} given; name more, or a run's checkpoints by --last"
            )
        if self.weights and len(self.weights) != len(others):
            weights_given, models_given = counted(len(self.weights), "weight"), counted(len(others), "model")
            raise GembError(f"{weights_given} for {models_given}; give one a model")
        return others

    def settings(self, tensor: str, layers: int, weights: Sequence[float] = ()) -> TensorSettings:
        """The parameters of a tensor, of a backbone with `layers`; `weights` go before those of the recipe.

        Raises GembError for a number that the method cannot use.
        """
        place = place_of(tensor, layers)
        merged = self.ingredients()
        by_paper = self.variant == "paper"

        def each(name: str, default: float) -> tuple[float, ...]:
            return tuple(self._number(name, default, tensor, place, one.parameters) for one in merged)

        own = each("weight", 1.0)
        given = tuple(weights) or self.weights or own
        normalises = self.merge_method == "linear" or (
            self.method.elects and (by_paper or self.merge_method in ("ties", "della"))
        )
        settings = TensorSettings(
            weights=given,
            densities=each("density", self.method.density if by_paper else 1.0),
            epsilons=each("epsilon", 0.15),
            outliers=each("gamma", 0.01),
            scale=self._number("lambda", 1.0, tensor, place),
            share=self._number("t", 0.5, tensor, place),
            normalise=normalises if self.parameters.normalize is None else self.parameters.normalize,
            rescale="none" if self.parameters.rescale is False else "probability" if by_paper else "norm",
            by_row=bool(self.parameters.filter_wise),
            steps=self.parameters.max_iter or 10,
            tolerance=self.parameters.tol or 1e-5,
        )
        self._check(settings, tensor)
        return settings

    def filters(self) -> Iterator[str]:
        """Every filter of the recipe."""
        for parameters in (self.parameters, *(one.parameters for one in self.models)):
            for field in type(parameters).model_fields:
                value = getattr(parameters, field)
                for part in value if isinstance(value, tuple) else ():
                    if isinstance(part, Filtered) and part.filter not in (None, "*"):
                        yield str(part.filter)

    def _number(
        self, name: str, default: float, tensor: str, place: float, own: MergeParameters | None = None
    ) -> float:
        field = "lambda_" if name == "lambda" else name
        for parameters in (own, self.parameters):
            value = None if parameters is None else _evaluated(getattr(parameters, field), tensor, place)
            if value is not None:
                if not math.isfinite(value):
                    raise GembError(f"{name} is {value:g}; it must be a finite number")
                return value
        return default

    def _check(self, settings: TensorSettings, tensor: str) -> None:
        for weight in settings.weights:
            if not math.isfinite(weight):
                raise GembError(f"weight is {weight:g}; it must be a finite number")
        averages = settings.normalise and not (self.method.elects or self.merge_method == "slerp")
        if averages or self.merge_method in ("multislerp", "karcher"):
            total = sum(settings.weights)
            if abs(total) < 1e-8:
                raise GembError(f"the weights sum to {total:g} at {tensor}; their sum divides, so change one")
        if self.merge_method == "slerp" and not 0 <= settings.share <= 1:
            raise GembError(f"t is {settings.share:g}; it must be from 0, the first model, to 1, the second")
        if self.method.thinning == "nothing":
            return
        for density, epsilon in zip(settings.densities, settings.epsilons, strict=True):
            if not 0 < density <= 1:
                raise GembError(f"density is {density:g}; it must be above 0 and at most 1")
            if self.method.thinning == "rank" and density < 1:
                if not 0 < density - epsilon <= density + epsilon < 1:
                    raise GembError(
                        f"density {density:g} and epsilon {epsilon:g} give chances from "
                        f"{density - epsilon:g} to {density + epsilon:g}; they must lie between 0 and 1"
                    )
        for share in settings.outliers if self.method.thinning == "between" else ():
            if not 0 <= share < 1:
                raise GembError(f"gamma is {share:g}; it must be at least 0 and below 1")


def place_of(tensor: str, layers: int) -> float:
    """Where a tensor stands for a gradient: 0 in the first layer, 1 in the last and behind pooling.

    What else is outside the layers (the table, a last norm) takes the first number, as in mergekit.
    """
    if found := _LAYER.search(tensor):
        return int(found[1]) / (layers - 1) if layers > 1 else 1.0
    return 1.0 if _BEHIND_POOLING.match(tensor) else 0.0


def layers_of(tensors: Sequence[str]) -> int:
    """How many layers the names of tensors count."""
    return 1 + max((int(found[1]) for name in tensors if (found := _LAYER.search(name))), default=0)


def _evaluated(value: Value | None, tensor: str, place: float) -> float | None:
    """The number that a value has for a tensor; None where none of its filters fits."""
    if value is None or isinstance(value, float | int):
        return value
    for part in value:
        if isinstance(part, Filtered):
            if part.filter in (None, "*") or str(part.filter) in tensor:
                return _evaluated(part.value, tensor, place)
    numbers = [part for part in value if not isinstance(part, Filtered)]
    if not numbers:
        return None
    scaled = place * (len(numbers) - 1)
    first = int(scaled)
    last = min(first + 1, len(numbers) - 1)
    return numbers[first] + (scaled - first) * (numbers[last] - numbers[first])

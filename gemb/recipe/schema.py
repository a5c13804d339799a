"""`Recipe`, the base of every command's recipe, and the types of paths in it.

A relative path in a recipe file is relative to that file; one from the command line, or from a recipe that
gemb ships, is relative to the working folder. The types say which texts are paths; `load` moves them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator


def key_of(field: str) -> str:
    """The key of a field in a file, and the word of its option: `as` for `as_`, a word of Python."""
    return field.rstrip("_")


class Recipe(BaseModel):
    """All that one run is asked to do. Frozen; unknown keys and loose types (`'8'` for 8) are refused.

    Sequences are tuples, choices are `Literal`, parts are other `Recipe` classes, and every field has a
    default, a docstring of one sentence and, where the type cannot say it, its unit.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        alias_generator=key_of,
        populate_by_name=True,
    )

    kind: ClassVar[str] = ""
    """The command that runs this recipe, as `kind:` names it in a file; empty for a part of a recipe."""
    alternatives: ClassVar[tuple[str, ...]] = ()
    """Keys of which a run has one: one that the command line gives takes the place of the file's."""

    _origin: Any = PrivateAttr(default=None)  # set by gemb.recipe.loading.load


@dataclass(frozen=True)
class PathRule:
    """Which texts of a field are paths relative to the recipe file."""

    explicit: bool
    """Only those that begin with `.` or `~`: the others may be names."""

    def resolve(self, text: str, folder: Path) -> str:
        """The text as a path from the working folder; `folder` is the recipe file's, `-` a stream."""
        is_path = text.startswith(("./", "../", "~")) or text in (".", "..") if self.explicit else text != "-"
        return str(folder / Path(text).expanduser()) if is_path else text


RecipePath = Annotated[Path, PathRule(explicit=False)]
"""A file or folder."""

RecipeInput = Annotated[str, PathRule(explicit=False)]
"""A file, folder or pattern to read; `-` is stdin."""

ModelName = Annotated[str, PathRule(explicit=True)]
"""A model by name, or its folder; in a recipe file a folder beside it is written `./enc`."""


class ComputeRecipe(Recipe):
    """What every recipe that runs a model has in common: which model, and on what."""

    model: ModelName | None = None
    """The model: a folder, a name on the Hugging Face hub, or `minilm`; without it, the installed default."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps; several with commas."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Numbers used in the computation; auto takes what is fast and exact enough here, and says why."""
    threads: int | None = Field(default=None, ge=1)
    """Processor threads; by default all that this process may use."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens computed at once; by default what suits the device."""
    offline: bool = False
    """Never open a connection; a model that is not on this machine is an error."""

    @field_validator("precision", mode="before")
    @classmethod
    def _check_precision(cls, value: object) -> object:
        if isinstance(value, str) and (reason := refused_precision(value)):
            raise ValueError(f"{value!r} is refused: {reason}")
        return value


class InferenceRecipe(ComputeRecipe):
    """What every recipe that only embeds has in common."""

    engine: Literal["auto", "torch", "onnx"] = "auto"
    """What runs the model: torch, or onnxruntime, which starts sooner; auto is onnx for a query or a few
    texts where the model has a graph, in its folder or in the cache, else torch."""


def refused_precision(name: str) -> str | None:
    """Why a precision that people know from elsewhere is not offered; None for any other word."""
    if name in ("fp16", "f16", "float16", "half"):
        return "float16 gives NaN in Gemma models; use bf16 or fp32"
    if name in ("int8", "i8"):
        return (
            "without a compiled kernel it is no faster than bf16; use bf16, or --dtype int8 for small vectors"
        )
    return None


def resolved(recipe: Recipe) -> dict[str, object]:
    """Everything `recipe` says, defaults included, as plain JSON values: what `gemb.json` keeps."""
    kind = {"kind": recipe.kind} if recipe.kind else {}
    return {**kind, **recipe.model_dump(mode="json", by_alias=True)}


def json_schema(model: type[Recipe]) -> dict[str, Any]:
    """The JSON schema of a recipe file of this kind, for editors."""
    schema = model.model_json_schema()
    if model.kind:
        kind = {"const": model.kind, "description": "The command that runs this recipe.", "type": "string"}
        schema["properties"] = {"kind": kind, **schema.get("properties", {})}
    return schema

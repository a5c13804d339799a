"""The part of a training recipe that says which data are used, and in which proportions."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from gemb.recipe import Recipe, RecipeInput
from gemb.text.prompts import NONE

Shape = Literal["pairs", "scored", "labelled"]
"""What a row is: a query with its positives and negatives; two texts and a score; one text and its label."""

Names = str | tuple[str, ...]


def name_of_paths(paths: Sequence[str]) -> str:
    """What reports call some files: the name of the first file or folder, without suffixes.

    Of a pattern it is what stands before its first wildcard, `qa` of `qa-*.jsonl`, or else its folder's name.
    """
    path = Path(paths[0])
    name = path.name.partition(".")[0]
    if not path.exists() and (wildcard := re.search(r"[*?[]", name)):
        name = name[: wildcard.start()].rstrip("-_") or path.parent.name
    return name or paths[0]


class ColumnNames(Recipe):
    """Which column has which role; columns that are not named are left out."""

    query: str | None = None
    """The column of the query (anchor, question)."""
    positive: Names | None = None
    """The column, or columns, of the positives; a column may hold a list."""
    negative: Names | None = None
    """The column, or columns, of the hard negatives; a column may hold a list, and may be empty in a row."""
    title: str | None = None
    """The column of the title of a positive that is one text."""
    first: str | None = None
    """The column of the first text of a scored pair."""
    second: str | None = None
    """The column of the second text of a scored pair."""
    score: str | None = None
    """The column of the score of a scored pair, a number; higher is closer."""
    text: str | None = None
    """The column of a labelled text."""
    label: str | None = None
    """The column of its label, a text or an integer."""

    @model_validator(mode="after")
    def _check_roles(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if not any(set(_ROLES[shape]) <= set(given) for shape in _ROLES):
            raise ValueError(
                f"{', '.join(given) or 'nothing'} is not enough; name query and positive, "
                "or first, second and score, or text and label"
            )
        shape = self.shape
        extra = [name for name in given if name not in (*_ROLES[shape], *_OPTIONAL[shape])]
        if extra:
            raise ValueError(f"{' and '.join(extra)} cannot stand beside {' and '.join(_ROLES[shape])}")
        return self

    @property
    def shape(self) -> Shape:
        """The shape that these roles make."""
        return next(shape for shape, roles in _ROLES.items() if all(getattr(self, role) for role in roles))


_ROLES: dict[Shape, tuple[str, ...]] = {
    "pairs": ("query", "positive"),
    "scored": ("first", "second", "score"),
    "labelled": ("text", "label"),
}
_OPTIONAL: dict[Shape, tuple[str, ...]] = {"pairs": ("negative", "title"), "scored": (), "labelled": ()}


class PromptText(Recipe):
    """A prompt that the model does not declare."""

    text: str = ""
    """What stands before the text, its last space included."""


class RolePrompts(Recipe):
    """The prompt of each role: the name of a prompt of the model, `none`, or {text: "..."}."""

    query: str | PromptText
    """The prompt of queries, of the first texts of scored pairs, and of labelled texts as queries."""
    passage: str | PromptText
    """The prompt of positives and negatives, and of the second texts of scored pairs."""


NO_PROMPTS = RolePrompts(query=NONE, passage=NONE)
"""What `prompts: none` stands for."""


class DataSet(Recipe):
    """One data set; every batch is drawn from one of them."""

    path: RecipeInput | tuple[RecipeInput, ...]
    """Files of rows (.jsonl, .csv, .tsv, .parquet, also .gz and .zst), patterns, or one BEIR folder."""
    prompts: RolePrompts
    """The prompt of each role, {query: ..., passage: ...}, or none for no prompts at all."""
    name: str | None = None
    """What reports call it; by default the name of its first file or folder."""
    shape: Literal["auto", "pairs", "scored", "labelled"] = "auto"
    """What a row is; auto tells it by the names of the columns."""
    columns: ColumnNames | None = None
    """Which column has which role, where their names do not tell."""
    format: Literal["auto", "jsonl", "csv", "tsv", "parquet"] = "auto"
    """How the rows are laid out; auto tells it by the suffix."""
    header: tuple[str, ...] | None = None
    """The names of the columns of CSV and TSV files that have no header line."""
    quoting: bool = True
    """Whether texts in CSV and TSV may stand in double quotes; if not, a quote is a character like others."""
    split: str = "train"
    """Which qrels/SPLIT.tsv of a BEIR folder is read."""
    corpus: RecipeInput | None = None
    """The documents (id, text, title) behind rows that hold the ids of passages, not their texts."""
    weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Share of the batches, against the weights of the other data sets."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens to train on; the data set then gets its share of the batches, and all end together."""
    pairs: int | None = Field(default=None, ge=1)
    """Examples of a batch of this data set, all devices together; by default as for all data sets."""
    negatives: int = Field(default=1, ge=0)
    """Hard negatives that an example brings into a batch; of more in its row each epoch takes the next."""
    drop_prompts: float = Field(default=0.0, ge=0, le=1)
    """Probability that a text goes without its prompt, so that the model works without, too."""
    unique_id: bool = True
    """Labelled texts only: mark the texts of an example, so that other examples are no false negatives."""
    limit: int | None = Field(default=None, ge=1)
    """Usable rows to take, from the first on; by default all."""

    @field_validator("prompts", mode="before")
    @classmethod
    def _expand_none(cls, value: object) -> object:
        return {"query": NONE, "passage": NONE} if value == NONE else value

    @field_validator("path")
    @classmethod
    def _check_path(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("no path given")
        return value

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.columns and self.shape not in ("auto", self.columns.shape):
            raise ValueError(f"shape is {self.shape}, but the columns are those of {self.columns.shape}")
        if self.weight is not None and self.tokens is not None:
            raise ValueError("weight and tokens are both given; a data set has one of them")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a sequence."""
        return (self.path,) if isinstance(self.path, str) else self.path


class MixtureSettings(Recipe):
    """How the batches of several data sets are mixed; a batch is always of one of them."""

    temperature: float = Field(default=1.0, gt=0)
    """The share of a data set is its rows to the power of 1/temperature; 1 is by size, inf is evenly."""
    no_duplicates: bool = True
    """Keep examples that share a text out of one batch, where the data set allows it."""


def check_shares(data: tuple[DataSet, ...], settings: MixtureSettings) -> None:
    """Raises ValueError unless all data sets have their share in one way; for the validator of a recipe."""
    if not data:
        raise ValueError("no data set given")
    for key in ("weight", "tokens"):
        without = [index for index, one in enumerate(data) if getattr(one, key) is None]
        if 0 < len(without) < len(data):
            raise ValueError(f"data.{without[0]} has no {key}, but others have; give it to all or to none")
    if data[0].weight is not None and not any(one.weight for one in data):
        raise ValueError("every weight is 0")
    if settings.temperature != 1 and (data[0].weight is not None or data[0].tokens is not None):
        key = "weight" if data[0].weight is not None else "tokens"
        raise ValueError(f"temperature has no effect beside {key}; leave one of them out")


__all__ = [
    "NO_PROMPTS",
    "ColumnNames",
    "DataSet",
    "MixtureSettings",
    "PromptText",
    "RolePrompts",
    "Shape",
    "check_shares",
    "name_of_paths",
]

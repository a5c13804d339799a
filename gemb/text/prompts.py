"""Prompts: what a model wants in front of a query or a document, and how a title goes in.

The strings are those of the model's config_sentence_transformers.json. The roles follow
sentence-transformers' `encode_query` and `encode_document`; titles follow the model where its
document prompt has a place for one (EmbeddingGemma: `title: none | text: `), else BEIR.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum

from gemb.errors import GembError, MismatchError

NONE = "none"
DOCUMENT = "document"
QUERY = "query"

_DOCUMENT_NAMES = ("document", "Document", "passage", "corpus")
_EMPTY_TITLE = "title: none |"  # EmbeddingGemma's model card


class Titles(Enum):
    """What becomes of a record's title."""

    SLOT = "slot"
    """It takes the place of `none` in `title: none | text: `."""
    JOINED = "joined"
    """It stands before the text, with a space between (BEIR)."""
    IGNORED = "ignored"
    """Queries have none."""


@dataclass(frozen=True, slots=True)
class Template:
    """What stands around a text before it is tokenised."""

    name: str
    """The name in the model folder; `document`, `query` or `none` where the model declares none for it."""
    prefix: str
    """As declared; "" is no prompt."""
    titles: Titles

    @property
    def uses_titles(self) -> bool:
        """False if `render` ignores titles."""
        return self.titles is not Titles.IGNORED

    def render(self, text: str, title: str | None = None) -> str:
        """The whole text that is tokenised. A title that is empty, white space or None adds nothing."""
        if title is None or self.titles is Titles.IGNORED or not title or title.isspace():
            return self.prefix + text
        if self.titles is Titles.SLOT:
            return self.prefix.replace(_EMPTY_TITLE, f"title: {title} |", 1) + text
        return f"{self.prefix}{title} {text}" if text else self.prefix + title

    def example(self) -> str:
        """A rendered example, for people."""
        if self.titles is Titles.IGNORED:
            return self.render("who wrote the first compiler?")
        return self.render("Grace Hopper wrote the first compiler.", "Compilers")


@dataclass(frozen=True)
class Prompts:
    """The prompts that a model folder declares."""

    by_name: Mapping[str, str]
    default: str | None
    """The name of the prompt that is used where no role has one of its own."""

    @classmethod
    def from_config(cls, config: Mapping[str, object], *, source: str) -> "Prompts":
        """The prompts in a parsed config_sentence_transformers.json; none where it has no `prompts`.

        `source` names the file in messages. Raises GembError for a prompt that is not a string and a
        `default_prompt_name` that is not declared.
        """
        declared = config.get("prompts") or {}
        if not isinstance(declared, Mapping):
            raise GembError(f"{source}: prompts is {declared!r}, not an object of names and strings")
        problems = [
            f"prompts.{name} is {text!r}, not a string"
            for name, text in declared.items()
            if not isinstance(text, str)
        ]
        if problems:
            raise GembError(f"{source}: {'; '.join(problems)}")
        default = config.get("default_prompt_name")
        if default is not None and default not in declared:
            raise GembError(
                f"{source}: default_prompt_name is {default!r}, but the prompts are {_names(declared)}"
            )
        return cls(
            {name: str(text) for name, text in declared.items()},
            str(default) if default is not None else None,
        )

    def template(self, as_: str | None) -> Template:
        """The template for a role or a prompt name.

        A declared name wins. `document` then is the first declared of document, Document, passage, corpus;
        `query` is query; a role without a prompt of its own takes the default prompt, else none. `none` is
        no prompt. None is `document` where prompts are declared, else `none`.

        Raises MismatchError for an unknown name, with the names there are.
        """
        if as_ is None:
            as_ = DOCUMENT if self.by_name else NONE
        if as_ in self.by_name:
            return self._named(as_, role=as_)
        if as_ == NONE:
            return Template(NONE, "", Titles.JOINED)
        if as_ not in (DOCUMENT, QUERY):
            close = get_close_matches(as_, [*self.by_name, DOCUMENT, QUERY, NONE], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise MismatchError(f"the model has no prompt {as_!r}; it has {self._choices()}{hint}")
        names = [name for name in _DOCUMENT_NAMES if name in self.by_name] if as_ == DOCUMENT else []
        if self.default is not None:
            names.append(self.default)
        return self._named(names[0], role=as_) if names else Template(as_, "", _titles(as_, ""))

    def first_of(self, names: Sequence[str]) -> str:
        """The first of `names` that is declared or a role; where none is, the default, or none."""
        for name in names:
            if name in self.by_name or name in (DOCUMENT, QUERY):
                return name
        return self.default or NONE

    def all_templates(self) -> list[Template]:
        """One template a declared prompt, in the order declared."""
        return [self._named(name, role=name) for name in self.by_name]

    def _named(self, name: str, *, role: str) -> Template:
        prefix = self.by_name[name]
        return Template(name, prefix, _titles(role, prefix))

    def _choices(self) -> str:
        return f"{_names(self.by_name)}, and none for no prompt" if self.by_name else "no prompts; use none"


def _titles(role: str, prefix: str) -> Titles:
    if _EMPTY_TITLE in prefix:
        return Titles.SLOT
    # "query", "Retrieval-query", "SearchQuery". Other prompts (Clustering, STS) are for texts of any kind,
    # and a title that is part of such a text must not be lost.
    return Titles.IGNORED if QUERY in role.lower() else Titles.JOINED


def _names(declared: Mapping[str, object]) -> str:
    return ", ".join(declared) or "none are declared"

"""A tokenizer with fewer entries, that gives the texts it was cut for the same tokens as before.

Works on the parsed tokenizer.json of the `tokenizers` library. What must stay beside the tokens that occur:

- WordPiece takes the longest entry that fits; among fewer it is the same, as long as it is there.
- BPE applies the merge of lowest rank; all merges on the way to a token that occurs stay, in their order.
- Unigram takes the best path, which stays the best among fewer; the score of what is unknown follows from the
  lowest score of all, so that this entry stays, too.
- Special tokens, the bytes of a byte fallback and, without one, entries of a single character stay, so that
  other texts can still be told.

W entries stay; the new id of an entry is its place among them, in the order of the old ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from tokenizers import Tokenizer

from gemb.errors import MismatchError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class CutVocabulary:
    """What is left of a tokenizer."""

    kept: Sequence[int]
    """[W], the old ids."""
    tokenizer: Mapping[str, Any]
    """The new tokenizer.json."""

    @property
    def new_ids(self) -> dict[int, int]:
        """New id by old id."""
        return {old: new for new, old in enumerate(self.kept)}


def cut_vocabulary(
    tokenizer: Mapping[str, Any], used: Iterable[int], *, named: Iterable[str] = (), rows: int | None = None
) -> CutVocabulary:
    """The tokenizer.json `tokenizer` without the entries that nothing needs.

    `used` are the ids that occur in the texts; `named` are tokens that other files name. Ids from `rows` on
    have no row in the model's table and are left out.

    Raises MismatchError for a kind of tokenizer that is not known here.
    """
    model = tokenizer["model"]
    kind = str(model.get("type") or ("BPE" if "merges" in model else None))
    entries = _entries(model, kind)
    added = list(tokenizer.get("added_tokens") or ())
    of_token = {**entries, **{token["content"]: token["id"] for token in added}}
    token_of = {number: token for token, number in of_token.items()}

    kept = {number for number in used if number in token_of}
    kept |= {token["id"] for token in added if token.get("special")}
    kept |= {of_token[token] for token in [*named, str(model.get("unk_token"))] if token in of_token}
    has_bytes = bool(model.get("byte_fallback"))
    for token, number in entries.items():
        if has_bytes and _BYTE_TOKEN.fullmatch(token):
            kept.add(number)
        elif not has_bytes and len(_bare(token, model)) == 1:
            kept.add(number)
    merges: list[int] = []
    if kind == "BPE":
        pairs = [_pair(merge) for merge in model["merges"]]
        on_the_way = _Merges(pairs)
        for number in sorted(kept):
            on_the_way.trace(token_of[number])
        merges = sorted(on_the_way.ranks)
        kept |= {entries[token] for token in on_the_way.tokens if token in entries}
    if kind == "Unigram":
        scores = [score for _, score in model["vocab"]]
        kept |= {model["unk_id"]} - {None}
        kept.add(min(range(len(scores)), key=scores.__getitem__))
    if rows is not None:
        kept = {number for number in kept if number < rows}

    ordered = sorted(kept)
    new_ids = {old: new for new, old in enumerate(ordered)}
    new_model = {**model}
    if kind == "Unigram":
        new_model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new_ids]
        new_model["unk_id"] = None if model["unk_id"] is None else new_ids[model["unk_id"]]
    else:
        new_model["vocab"] = {
            token: new_ids[number] for token, number in entries.items() if number in new_ids
        }
    if kind == "BPE":
        new_model["merges"] = [model["merges"][rank] for rank in merges]
    changed = {
        **tokenizer,
        "model": new_model,
        "added_tokens": [{**token, "id": new_ids[token["id"]]} for token in added if token["id"] in new_ids],
        "post_processor": _processor(tokenizer.get("post_processor"), new_ids),
        "truncation": None,
        "padding": _padding(tokenizer.get("padding"), new_ids),
    }
    _check(changed, {token_of[old]: new for old, new in new_ids.items()})
    return CutVocabulary(ordered, changed)


def _entries(model: Mapping[str, Any], kind: str) -> dict[str, int]:
    """Id by token of the model itself."""
    if kind == "Unigram":
        return {piece: number for number, (piece, _) in enumerate(model["vocab"])}
    if kind in ("WordPiece", "WordLevel", "BPE"):
        affixed = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
        if kind == "BPE" and affixed:
            raise MismatchError(f"a BPE tokenizer with {affixed[0]} cannot be cut; keep the whole vocabulary")
        return dict(model["vocab"])
    raise MismatchError(
        f"a tokenizer of the kind {kind} cannot be cut; known are WordPiece, WordLevel, BPE and Unigram"
    )


def _bare(token: str, model: Mapping[str, Any]) -> str:
    """The token without what says that it goes on a word."""
    return token.removeprefix(str(model.get("continuing_subword_prefix") or "\0"))


def _pair(merge: Sequence[str] | str) -> tuple[str, str]:
    """The two sides of a merge, which older files write with a space between."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


class _Merges:
    """The merges that lead to tokens, and what they merge on the way.

    Merges never cross the borders of a final token, so that inside it they are those of the token alone.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self.ranks: set[int] = set()
        self.tokens: set[str] = set()
        self._rank = {pair: rank for rank, pair in enumerate(pairs)}

    def trace(self, token: str) -> None:
        """Add what leads to `token`; nothing for one that no merges lead to (bytes, added tokens)."""
        symbols = list(token)
        passed, ranks = set(symbols), set()
        while len(symbols) > 1:
            candidates = (
                (self._rank.get((symbols[place], symbols[place + 1]), len(self._rank)), place)
                for place in range(len(symbols) - 1)
            )
            rank, place = min(candidates)
            if rank == len(self._rank):
                return
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
            passed.add(symbols[place])
            ranks.add(rank)
        self.ranks |= ranks
        self.tokens |= passed


def _processor(processor: Mapping[str, Any] | None, new_ids: Mapping[int, int]) -> dict[str, Any] | None:
    """A post-processor with new ids."""
    if processor is None:
        return None
    changed = dict(processor)
    match processor.get("type"):
        case "Sequence":
            changed["processors"] = [_processor(one, new_ids) for one in processor["processors"]]
        case "TemplateProcessing":
            changed["special_tokens"] = {
                name: {**token, "ids": [new_ids[number] for number in token["ids"]]}
                for name, token in processor["special_tokens"].items()
            }
        case "BertProcessing" | "RobertaProcessing":
            for key in ("sep", "cls"):
                token, number = processor[key]
                changed[key] = [token, new_ids[number]]
    return changed


def _padding(padding: Mapping[str, Any] | None, new_ids: Mapping[int, int]) -> dict[str, Any] | None:
    if padding is None:
        return None
    return {**padding, "pad_id": new_ids.get(padding.get("pad_id", 0), 0)}


def _check(tokenizer: Mapping[str, Any], expected: Mapping[str, int]) -> None:
    """Makes sure that the library reads the new ids as they are meant.

    Raises MismatchError if it numbers an added token otherwise.
    """
    vocabulary = Tokenizer.from_str(orjson.dumps(tokenizer).decode()).get_vocab(with_added_tokens=True)
    wrong = [token for token, number in expected.items() if vocabulary.get(token) != number]
    if wrong or len(vocabulary) != len(expected):
        about = f", such as {wrong[0]!r}" if wrong else ""
        raise MismatchError(
            f"the tokenizer numbers its added tokens in a way that cannot be cut{about}; "
            "keep the whole vocabulary"
        )

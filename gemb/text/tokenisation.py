"""Token ids of texts, equal to transformers' and sentence-transformers', with every lost token counted.

B texts, T their packed tokens, L tokens of one text.

What transformers 5.23 (AutoTokenizer, and with it sentence-transformers 6.2) does with a folder that has
a tokenizer.json, found by reading and running it, and followed here:

- `add_bos_token` and `add_eos_token` of tokenizer_config.json are dropped: the post-processor of
  tokenizer.json alone says which special tokens stand around a text (Gemma: bos; EmbeddingGemma: bos, eos).
  Only without a tokenizer.json do they count, and then transformers itself builds the tokenizer here.
- The classes with a constructor of their own (BertTokenizer, MPNetTokenizer, LlamaTokenizer and others) keep
  vocabulary, merges and post-processor of tokenizer.json and build normaliser and pre-tokeniser anew.
  For BERT and MPNet that means `do_lower_case` (true if absent), `strip_accents` and
  `tokenize_chinese_chars` of tokenizer_config.json win; for Llama, Metaspace takes the place of `Prepend`,
  so that no second `▁` stands before a text that starts with a space. For Gemma, Qwen and XLM-R the new parts
  equal those of the published files.
- TokenizersBackend, PreTrainedTokenizerFast, and any class on a model type that is known to name a wrong
  one (ModernBERT, Qwen2), take tokenizer.json as it is.
- Special tokens that only tokenizer_config.json names are added to the vocabulary.
- sentence-transformers' `do_lower_case` puts `Lowercase` before the normaliser unless one is there.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Tokenizer, models, normalizers, pre_tokenizers

from gemb.errors import GembError, MismatchError, UnavailableError

# Real text has 3 to 6 characters a token; a text with more than this is tried again with a longer piece.
_CHARACTERS_PER_TOKEN = 16
_SPARE_CHARACTERS = 2048  # so that the piece also holds the margin of `_settled` for a tiny max_tokens
# A single word of so many characters ends there: the library needs 0.5 s for a million of them, and on ten
# million spaces the regular expressions of byte-level tokenisers give up with a panic.
_MOST_CHARACTERS = 1 << 20
# A slice is tokenised at a time: the library's encodings take some 100 bytes a token, too much for a window.
_SLICE_CHARACTERS = 1 << 18
_BOUNDARIES_TRIED = 256
_FIRST_PASSAGE_CHARACTERS_PER_TOKEN = 6

_BERT_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MPNetTokenizer")
_BERT_MODEL_TYPES = ("bert", "distilbert", "electra", "mpnet")
# Model types whose declared class transformers ignores, or overrides by the plain backend.
_PLAIN_MODEL_TYPES = (
    "modernbert",
    "modernbert-decoder",
    "mistral",
    "mixtral",
    "ministral",
    "mistral3",
    "phi3",
)
_BLANKS = " \t\n\r▁ĠĉĊč"  # as they are, in SentencePiece, in byte-level vocabularies
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

# Where a passage may end, best first. Positions after the match.
_BORDERS = (
    re.compile(r"\n[^\S\n]*\n\s*"),  # a paragraph
    re.compile(r"[.!?…][\"'”’)\]]*\s+|[。！？][”」』）]*\s*"),  # a sentence
    re.compile(r"\n\s*"),
    re.compile(r"\s+"),
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of B texts, packed without padding, special tokens included."""

    ids: NDArray[np.int32]
    """[T], the texts one after the other."""
    lengths: NDArray[np.int32]
    """[B], tokens of each; their sum is T. 0 is possible for a tokeniser without special tokens."""
    lost: NDArray[np.int32]
    """[B], tokens that were cut away; 0 is a whole text."""
    estimated: NDArray[np.bool_]
    """[B], True where only the beginning of a very long text was tokenised: `lost` is reckoned from it."""
    prompt_tokens: int
    """How many leading tokens of every text are the prompt and stay out of the pooling; usually 0."""

    def take(self, rows: NDArray[np.integer[Any]]) -> "Encoded":
        """The texts with these numbers, in this order."""
        lengths = self.lengths[rows]
        starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        shifts = starts[rows] - (np.cumsum(lengths, dtype=np.int64) - lengths)
        source = np.arange(int(lengths.sum())) + np.repeat(shifts, lengths)
        return replace(
            self,
            ids=self.ids[source],
            lengths=lengths,
            lost=self.lost[rows],
            estimated=self.estimated[rows],
        )


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a text that fits the model."""

    start: int
    """Characters; the first passage starts at 0, each other where the one before ends, or before that."""
    end: int
    text: str
    """What to embed: the characters from `start` to `end` without white space around them."""


class Tokeniser:
    """Texts to token ids, at most `max_tokens` each, special tokens kept.

    Truncation and padding of the library are off; cutting is done here, so that it can be counted.
    The ids equal those of transformers with `truncation=True, max_length=max_tokens`. Not thread-safe.
    """

    def __init__(
        self, backend: Tokenizer, *, max_tokens: int, keep: Literal["beginning", "end"] = "beginning"
    ) -> None:
        """A tokeniser over `backend`, which it changes. `keep` is the part of a long text that stays.

        Raises GembError if `max_tokens` leaves no room beside the special tokens.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._keep = keep
        frame = backend.encode("a")
        special = frame.special_tokens_mask
        before = special.index(0) if 0 in special else len(special)
        self._before: list[int] = frame.ids[:before]
        self._after: list[int] = frame.ids[before + special.count(0) :]
        self._table_rows: int | None = None
        self.max_tokens = max_tokens
        self.special_tokens = len(self._before) + len(self._after)
        if max_tokens <= self.special_tokens:
            raise GembError(
                f"max_tokens is {max_tokens}, but the special tokens alone take {self.special_tokens}; "
                f"the smallest is {self.special_tokens + 1}"
            )

    @classmethod
    def load(cls, folder: Path, *, max_tokens: int, lower_case: bool = False) -> "Tokeniser":
        """The tokeniser in `folder`, from its tokenizer.json, else through transformers (slower to load).

        `lower_case` is sentence-transformers' `do_lower_case`.

        Raises UnavailableError if there is no tokeniser that can be loaded, GembError if a file is damaged.
        """
        config = _read_object(folder / "tokenizer_config.json")
        file = folder / "tokenizer.json"
        if file.is_file():
            try:
                backend = Tokenizer.from_buffer(file.read_bytes())
            except ValueError as error:
                raise GembError(f"{file}: not a tokenizer.json: {error}; fetch the model again") from error
            _build_like_transformers(backend, config, _read_object(folder / "config.json"))
            _add_special_tokens(backend, config, folder)
        else:
            backend = _through_transformers(folder)
        if lower_case:
            _lower_case(backend)
        side = config.get("truncation_side", "right")
        return cls(backend, max_tokens=max_tokens, keep="end" if side == "left" else "beginning")

    @property
    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The special tokens before and behind every text."""
        return tuple(self._before), tuple(self._after)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name, such as `<mask>`; None where the vocabulary lacks it."""
        found: int | None = self._backend.token_to_id(token)
        return found

    @property
    def ids(self) -> Mapping[str, int]:
        """The id of every token by its name, added tokens included."""
        found: Mapping[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens shown."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    @property
    def entries(self) -> int:
        """Entries of the vocabulary, tokens that were added to it not counted."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    @cached_property
    def largest_id(self) -> int:
        """The largest token id there is, added tokens included. Takes 0.2 s for 262,144 entries."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def check_vocabulary(self, table_rows: int) -> None:
        """Makes sure that every id has a row in an embedding table of `table_rows` rows.

        Added special tokens beyond the table are legal (Gemma's `<image_soft_token>` is one); where a text
        holds one, special tokens in that text are tokenised as plain text.

        Raises MismatchError if the vocabulary itself is larger than the table.
        """
        if self.entries > table_rows:
            raise MismatchError(
                f"the tokenizer has ids up to {self.entries - 1:,}, but the model's vocab_size is "
                f"{table_rows:,}; tokenizer and weights are not of one model"
            )
        self._table_rows = table_rows

    def prompt_tokens(self, prefix: str) -> int:
        """How many leading tokens sentence-transformers leaves out for `include_prompt: false`.

        It tokenises the prompt alone and takes off one token if the last is a special one. A space at the
        end of the prompt can merge into the next word; then the count is one off, there as here.
        """
        if not prefix:
            return 0
        ids = self._backend.encode(prefix).ids
        special = {
            number for number, token in self._backend.get_added_tokens_decoder().items() if token.special
        }
        return len(ids) - (bool(ids) and ids[-1] in special)

    def encode(self, texts: Sequence[str], *, prompt_tokens: int = 0) -> Encoded:
        """The token ids of rendered texts, in order. `prompt_tokens` is handed through.

        Of a text of more than 16 characters a token allowed, only as much is tokenised as settles the tokens
        that are kept (see `_settled`): the kept ids do not depend on that. Only a text whose first million
        characters settle too few, such as one word of that length, loses what stands behind them.

        Raises GembError for a text with a lone surrogate; MismatchError for an id outside the model's table.
        """
        parts: list[NDArray[np.int32]] = []
        lengths = np.empty(len(texts), np.int32)
        lost = np.zeros(len(texts), np.int32)
        estimated = np.zeros(len(texts), np.bool_)
        try:
            for first, last in _slices(texts):
                rows = self._encode_slice(texts[first:last], first, lost, estimated)
                lengths[first:last] = [len(ids) for ids in rows]
                parts.append(np.fromiter(chain.from_iterable(rows), np.int32, int(lengths[first:last].sum())))
        except TypeError as error:
            raise _refused(texts, error) from error
        ids = np.concatenate(parts) if parts else np.empty(0, np.int32)
        return Encoded(ids, lengths, lost, estimated, prompt_tokens)

    def split(self, text: str, render: Callable[[str], str] | None = None) -> list[str]:
        """The texts of `passages`."""
        return [passage.text for passage in self.passages(text, render)]

    def passages(
        self, text: str, render: Callable[[str], str] | None = None, *, overlap_tokens: int = 0
    ) -> list[Passage]:
        """`text` in passages that each fit into `max_tokens` once rendered, special tokens counted.

        `render` puts the prompt (and a title) around a passage. A passage ends at the last paragraph in the
        second half of what fits, else at the last sentence, line, white space, or token. The spans follow
        one another and cover the text; each begins with at most `overlap_tokens` of the one before, from a
        sentence or a word on. Where the prompt alone leaves no room, the rest of the text is one passage,
        which is too long.
        """
        render = render or str
        passages: list[Passage] = []
        start = covered = 0
        while start < len(text):
            first = len(text) - len(text[start:].lstrip()) if text[start].isspace() else start
            if first == len(text):  # nothing but white space is left
                if passages:
                    passages[-1] = replace(passages[-1], end=first)
                break
            end = first + self._passage_length(text, first, render, covered - first)
            if end <= covered:
                start = covered  # beside the overlap there is no room
                continue
            passages.append(Passage(start, end, text[first:end].rstrip()))
            start = covered = end
            if overlap_tokens and end < len(text):
                start -= self._tail_length(text[first:end], overlap_tokens)
        return passages or [Passage(0, len(text), "")]

    def _tail_length(self, passage: str, tokens: int) -> int:
        """Characters at the end of a passage that are at most `tokens`, from the first border in them on."""
        offsets = self._backend.encode(passage, add_special_tokens=False).offsets
        if tokens >= len(offsets):
            return 0  # a passage that is all overlap would come again
        start = offsets[-tokens][0]
        for border in _BORDERS:
            # A border may begin before the tail; it is where one ends that a passage can begin.
            ends = (match.end() for match in border.finditer(passage, max(0, start - 1)))
            begin = next((end for end in ends if start <= end < len(passage)), None)
            if begin is not None:
                return len(passage) - begin
        return 0

    def _encode_slice(
        self, texts: Sequence[str], offset: int, lost: NDArray[np.int32], estimated: NDArray[np.bool_]
    ) -> list[list[int]]:
        """The ids of each text, cut; fills `lost` and `estimated` from `offset` on."""
        limit = self.max_tokens * _CHARACTERS_PER_TOKEN + _SPARE_CHARACTERS
        pieces = list(texts)
        long = (
            [row for row, text in enumerate(texts) if len(text) > limit] if self._keep == "beginning" else []
        )
        for row in long:
            pieces[row] = ""
        rows = [encoding.ids for encoding in self._backend.encode_batch_fast(pieces)]
        for row in long:
            rows[row], unread = self._encode_beginning(texts[row], limit)
            lost[offset + row] = unread  # raised below by what is cut off
            estimated[offset + row] = unread > 0
        if self._table_rows is not None:
            for row, ids in enumerate(rows):
                if ids and max(ids) >= self._table_rows:
                    rows[row] = self._encode_plainly(texts[row], self._table_rows)
                    lost[offset + row] = estimated[offset + row] = 0  # this is the whole text
        for row, ids in enumerate(rows):
            if len(ids) > self.max_tokens:
                lost[offset + row] += len(ids) - self.max_tokens
                rows[row] = self._cut(ids)
        return rows

    def _cut(self, ids: list[int]) -> list[int]:
        """At most `max_tokens` of `ids`; the special tokens around them stay."""
        if self._keep == "beginning":
            return ids[: self.max_tokens - len(self._after)] + self._after
        return self._before + ids[len(ids) - self.max_tokens + len(self._before) :]

    def _encode_plainly(self, text: str, table_rows: int) -> list[int]:
        """The ids of `text` with special tokens in it taken for plain text."""
        self._backend.encode_special_tokens = True
        try:
            ids = self._backend.encode(text).ids
        finally:
            self._backend.encode_special_tokens = False
        if max(ids) >= table_rows:
            token = self._backend.id_to_token(max(ids))
            raise MismatchError(
                f"the tokenizer gives id {max(ids):,} ({token!r}), but the model's vocab_size is "
                f"{table_rows:,}; tokenizer and weights are not of one model"
            )
        return ids

    def _encode_beginning(self, text: str, limit: int) -> tuple[list[int], int]:
        """The ids of a long enough beginning of `text`, and about how many tokens the rest has.

        The rest is taken to have as many tokens a character as the beginning, and one at least; 0 is no rest.
        """
        wanted = self.max_tokens - self.special_tokens
        while limit < len(text):
            encoding = self._backend.encode(text[:limit], add_special_tokens=False)
            if limit >= _MOST_CHARACTERS or self._settled(encoding, wanted, limit):
                unread = round((len(text) - limit) * len(encoding.ids) / limit)
                return self._before + encoding.ids + self._after, max(1, unread)
            limit = min(limit * 4, max(limit, _MOST_CHARACTERS))
        return self._backend.encode(text).ids, 0

    def _settled(self, encoding: Encoding, wanted: int, characters: int) -> bool:
        """True if the first `wanted` ids cannot change when more text follows the `characters` encoded ones.

        They cannot if somewhere behind them is a boundary between tokens that every continuation keeps,
        with more characters behind it than any token has. Such boundaries are:

        - Between two words of the pre-tokeniser, with two more words behind. All published pre-tokenisers
          go from left to right and look ahead at most to the next word, but for those that group digits
          from the right: with them, nothing between digits is settled.
        - Inside a word of a BPE model, after token t, if for each token w with which the rest of the word
          can start, the word tw is encoded as t, w. For no merge can cross such a boundary: take the first
          that does. All merges before it happened on one side, and those in t and w in the same order as
          when tw is encoded alone, so the same merge would cross it there.
        - Inside a word of a Unigram model, if no piece of the vocabulary covers both sides of it: every
          segmentation is cut there, so the best one is the best of each side.
        """
        margin = 4 * self._longest_token  # a normaliser may put two or three characters into one
        words, offsets = encoding.word_ids, encoding.offsets
        last = len(words)
        while last > wanted and offsets[last - 1][0] + margin > characters:
            last -= 1
        tokens = _Tokens(self._backend, encoding.ids, words)
        first = max(wanted, 1)
        for boundary in range(first, last):
            if self._groups_digits_from_the_right and tokens.may_be_between_digits(boundary):
                continue
            if tokens.starts_word(boundary):
                if tokens.words_after(boundary) >= 2:
                    return True
            elif self._swallows_blanks and tokens.is_between_blanks(boundary):
                continue
            elif boundary < first + _BOUNDARIES_TRIED and self._keeps(tokens, boundary):
                return True
        return False

    def _keeps(self, tokens: "_Tokens", boundary: int) -> bool:
        """True for a boundary inside a word that stays whatever follows the word."""
        model = self._backend.model
        if isinstance(model, models.BPE):
            return self._bpe_keeps(model, tokens, boundary)
        return isinstance(model, models.Unigram) and self._unigram_keeps(tokens, boundary)

    def _bpe_keeps(self, model: models.BPE, tokens: "_Tokens", boundary: int) -> bool:
        if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
            return False
        left = tokens[boundary - 1]
        if model.byte_fallback and (_BYTE_TOKEN.fullmatch(left) or _BYTE_TOKEN.fullmatch(tokens[boundary])):
            return True  # a byte of a character that is in no token
        rest = tokens.text_after(boundary, self._longest_token)
        for length in range(1, len(rest) + 1):
            right = rest[:length]
            if self._backend.token_to_id(right) is None or len(model.tokenize(right)) != 1:
                continue
            if [token.value for token in model.tokenize(left + right)] != [left, right]:
                return False
        return True

    def _unigram_keeps(self, tokens: "_Tokens", boundary: int) -> bool:
        longest = self._longest_token
        # An unknown token hides its characters, but a piece with one of them would have won over it.
        left, right = tokens.text_before(boundary, longest), tokens.text_after(boundary, longest)
        return not any(
            self._backend.token_to_id(left[-before:] + right[:after]) is not None
            for before in range(1, len(left) + 1)
            for after in range(1, min(len(right), longest - before) + 1)
        )

    @cached_property
    def _groups_digits_from_the_right(self) -> bool:
        """True if the first word of a run of digits depends on its length but is not all of it."""
        sizes = [7, 8, 9]
        firsts = []
        for size in sizes:
            run = self._backend.encode("7" * size, add_special_tokens=False)
            in_first = zip(run.offsets, run.word_ids, strict=True)
            firsts.append(max((end for (_, end), word in in_first if word == 0), default=0))
        return firsts != sizes and len(set(firsts)) > 1

    @cached_property
    def _swallows_blanks(self) -> bool:
        """True if some added token takes all the blanks before it, however many (`[MASK]` of ModernBERT)."""
        return any(token.lstrip for token in self._backend.get_added_tokens_decoder().values())

    @cached_property
    def _longest_token(self) -> int:
        """Characters of the longest token, added ones included."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    def _passage_length(self, text: str, start: int, render: Callable[[str], str], least: int) -> int:
        """Characters of the passage at `start`, at least 1; it ends at a border behind `least`, if it can."""
        size = self.max_tokens * _FIRST_PASSAGE_CHARACTERS_PER_TOKEN
        while True:
            window = text[start : start + size]
            rendered = render(window)
            encoding = self._backend.encode(rendered)
            if len(encoding) > self.max_tokens:
                break
            if start + size >= len(text):
                return len(window)
            size *= 4
        # The first token that is cut off starts here, counted from the start of the window.
        first_lost = encoding.offsets[self.max_tokens - len(self._after)][0] - (len(rendered) - len(window))
        length = first_lost
        while length > 0:
            length = _border(window, length, least)
            if len(self._backend.encode(render(window[:length].strip()))) <= self.max_tokens:
                return length
            length -= 1  # rare: alone, the passage has more tokens than at the start of the window
        return len(text) - start


class _Tokens:
    """The strings of some ids, looked up when asked for, and the words they are in."""

    def __init__(self, backend: Tokenizer, ids: list[int], words: list[int | None]) -> None:
        self._backend = backend
        self._ids = ids
        self._words = [-1 if word is None else word for word in words]  # numbered from left to right

    def __getitem__(self, position: int) -> str:
        return self._backend.id_to_token(self._ids[position]) or ""

    def starts_word(self, position: int) -> bool:
        return self._words[position - 1] != self._words[position]

    def words_after(self, position: int) -> int:
        """Words behind the one at `position`."""
        return self._words[-1] - self._words[position]

    def may_be_between_digits(self, boundary: int) -> bool:
        """False if one side of it is no digit; what is not ASCII in byte-level tokens may be a digit."""
        sides = (self[boundary - 1][-1:], self[boundary][:1])
        return all(side.isdigit() or not side.isascii() for side in sides)

    def is_between_blanks(self, boundary: int) -> bool:
        return not any(side.strip(_BLANKS) for side in (self[boundary - 1], self[boundary]))

    def text_after(self, boundary: int, characters: int) -> str:
        """The next `characters` of the word behind `boundary`, or less if it ends."""
        text = ""
        for position in range(boundary, len(self._ids)):
            if len(text) >= characters or self._words[position] != self._words[boundary]:
                break
            text += self[position]
        return text[:characters]

    def text_before(self, boundary: int, characters: int) -> str:
        """The last `characters` of the word before `boundary`, or less if it starts there."""
        text = ""
        for position in range(boundary - 1, -1, -1):
            if len(text) >= characters or self._words[position] != self._words[boundary]:
                break
            text = self[position] + text
        return text[-characters:]


def _slices(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Ranges that cover `texts`, of about a million characters each."""
    first = characters = 0
    for row, text in enumerate(texts):
        characters += len(text)
        if characters >= _SLICE_CHARACTERS:
            yield first, row + 1
            first, characters = row + 1, 0
    if first < len(texts):
        yield first, len(texts)


def _border(window: str, length: int, least: int) -> int:
    """The best place to end a passage of `window` that may have `length` characters.

    It is in the second half, and behind `least` characters.
    """
    half = max(length // 2, least)
    for border in _BORDERS:
        ends = [match.end() for match in border.finditer(window, half, length)]
        if ends:
            return ends[-1]
    while length > 1 and length < len(window) and unicodedata.combining(window[length]):
        length -= 1
    return length


def _refused(texts: Sequence[object], error: TypeError) -> Exception:
    """What to raise for texts that the library refuses with `error`."""
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            return TypeError(f"text {row} is of type {type(text).__name__}, not str")
        try:
            text.encode()
        except UnicodeEncodeError as undecodable:
            return GembError(
                f"text {row} has a lone surrogate (half a character) at character "
                f"{undecodable.start}; text.encode('utf-8', 'replace').decode() replaces it"
            )
    return error


def _read_object(file: Path) -> Mapping[str, Any]:
    """The JSON object in `file`; empty if there is no such file."""
    try:
        data = orjson.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except orjson.JSONDecodeError as error:
        raise GembError(f"{file}: broken JSON: {error}; fetch the model again") from error
    if not isinstance(data, dict):
        raise GembError(f"{file}: not a JSON object; fetch the model again")
    return data


def _build_like_transformers(backend: Tokenizer, config: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """The parts that transformers' tokeniser classes build anew: see the module's docstring."""
    declared = config.get("tokenizer_class") or model.get("tokenizer_class")
    name = declared.removesuffix("Fast") if isinstance(declared, str) else None
    model_type = model.get("model_type")
    if model_type in _PLAIN_MODEL_TYPES:
        return
    is_bert = name in _BERT_CLASSES or (name is None and model_type in _BERT_MODEL_TYPES)
    if is_bert and isinstance(backend.normalizer, normalizers.BertNormalizer):
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=config.get("tokenize_chinese_chars", True),
            strip_accents=config.get("strip_accents"),
            lowercase=config.get("do_lower_case", True),
        )
    is_llama = name == "LlamaTokenizer"
    is_byte_level = isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel | pre_tokenizers.Sequence)
    if is_llama and not is_byte_level and isinstance(backend.model, models.BPE):
        add_space = config.get("add_prefix_space")
        first = "always" if config.get("legacy", False) else "first"
        scheme = "never" if add_space is False else first
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)


def _add_special_tokens(backend: Tokenizer, config: Mapping[str, Any], folder: Path) -> None:
    """Adds the special tokens that only tokenizer_config.json or special_tokens_map.json names."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder")
    named = dict(config)
    if declared is None:
        named = {**_read_object(folder / "special_tokens_map.json"), **named}
    candidates: list[Any] = [value for key, value in named.items() if key.endswith("_token")]
    for key in ("extra_special_tokens", "additional_special_tokens"):
        extra = named.get(key) or []
        candidates += extra.values() if isinstance(extra, dict) else extra
    for candidate in candidates:
        content = candidate.get("content") if isinstance(candidate, dict) else candidate
        if isinstance(content, str) and content not in known:
            known.add(content)
            backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])


def _lower_case(backend: Tokenizer) -> None:
    """Puts `Lowercase` first, unless there is one; BertNormalizer's own does not count, as there."""
    parts: list[normalizers.Normalizer] = []
    if isinstance(backend.normalizer, normalizers.Sequence):
        parts = [backend.normalizer[position] for position in range(len(backend.normalizer))]
    elif backend.normalizer is not None:
        parts = [backend.normalizer]
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])


def _through_transformers(folder: Path) -> Tokenizer:
    """The tokeniser that transformers builds from other files (vocab.txt, a SentencePiece model)."""
    if not folder.is_dir() or not any(
        file.name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece")) for file in folder.iterdir()
    ):
        raise UnavailableError(
            f"{folder}: holds no tokenizer.json and no other tokenizer file; fetch the model again"
        )
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise UnavailableError(
            f"{folder}: no tokenizer.json, and transformers cannot load the tokenizer: {error}"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UnavailableError(
            f"{folder}: no tokenizer.json, and {type(loaded).__name__} of transformers cannot give one; "
            "take a folder of the model that has it"
        )
    return backend

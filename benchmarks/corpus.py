"""The texts the benchmarks embed: real ones, cut and sampled so that no peer is treated unfairly.

`docs`     technical prose and code with the length mix of a documentation search: median about 120
           Gemma tokens, a tail to 512.
`prose`    novels and essays, the same mix; characters predict tokens well here.
`queries`  one line, about a dozen tokens.
`uniform`  passages of 256 tokens or more: all the same length once MiniLM has cut them.

The texts come from `../shared/data` where that folder lies beside the repository, otherwise from the
docstrings and sources of the Python standard library, which every machine has. Seeds are fixed.
"""

import ast
import gzip
import json
import random
import statistics
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.models import SHARED_DATA
from gemb.errors import GembError

NAMES = ("docs", "prose", "queries", "uniform")
SEED = 20
CANDIDATES = 33
"""Windows looked at for each window taken."""
MEDIAN_CHARACTERS = 480
"""Of a passage; about 120 Gemma tokens in this mix of prose and code."""
SPREAD = 0.8
"""Deviation of the logarithm of the length: 95 of 100 passages stay below 3.7 medians."""
LONGEST_CHARACTERS = 1800
"""About 512 Gemma tokens; where a real index would cut its passages."""
UNIFORM_CHARACTERS = 1400
"""At least 256 tokens of MiniLM."""
PROSE_SOURCE = "gutenberg-books"
QUERY_SETS = ("scifact", "tldr-commands")


@dataclass(frozen=True, slots=True)
class Corpus:
    """All texts of one kind, shortest first (in characters), and where they come from."""

    name: str
    origin: str
    texts: tuple[str, ...]


def corpus(name: str) -> Corpus:
    """The corpus called `name` (one of NAMES).

    Raises GembError if there is none of that name.
    """
    if name not in NAMES:
        raise GembError(f"no corpus {name!r}; choose from {', '.join(NAMES)}")
    shared = (SHARED_DATA / "text" / "docs.train.jsonl.gz").is_file()
    if name == "queries":
        texts = list(_shared_queries() if shared else _docstring_lines())
    else:
        documents = (
            _shared_documents(prose=name == "prose") if shared else _library_documents(code=name != "prose")
        )
        texts = list(_passages(documents, uniform=name == "uniform"))
    origin = "shared/data" if shared else f"Python {sysconfig.get_python_version()} standard library"
    return Corpus(name, origin, tuple(sorted(set(texts), key=lambda text: (len(text), text))))


@dataclass(frozen=True, slots=True)
class Sample:
    """Texts drawn from a corpus, with their token counts in one model."""

    corpus: str
    origin: str
    texts: tuple[str, ...]
    lengths: tuple[int, ...]
    padding_of_corpus: float
    """Computed per real token over all windows that were looked at: what `padding(32)` should be near."""

    @property
    def tokens(self) -> int:
        """Real tokens of all texts."""
        return sum(self.lengths)

    def padding(self, batch_size: int) -> float:
        """Computed per real token when texts are sorted by characters and padded, as most peers do."""
        by_characters = sorted(range(len(self.texts)), key=lambda row: -len(self.texts[row]))
        batches = [
            by_characters[start : start + batch_size] for start in range(0, len(self.texts), batch_size)
        ]
        return sum(len(batch) * max(self.lengths[row] for row in batch) for batch in batches) / self.tokens

    def as_dict(self) -> dict[str, object]:
        """The figures of the sample as JSON values, without the texts."""
        ordered = sorted(self.lengths)
        return {
            "corpus": self.corpus,
            "origin": self.origin,
            "texts": len(self.texts),
            "tokens": self.tokens,
            "tokens_median": statistics.median(ordered),
            "tokens_mean": self.tokens / len(ordered),
            "tokens_p95": ordered[int(0.95 * (len(ordered) - 1))],
            "tokens_longest": ordered[-1],
            "computed_per_real_token_sorted_by_characters_batch_32": self.padding(32),
            "the_same_over_the_corpus": self.padding_of_corpus,
        }


def sample(
    whole: Corpus, texts: int, window: int, count_tokens: Callable[[Sequence[str]], Sequence[int]]
) -> Sample:
    """`texts` texts of a corpus: windows of `window` neighbours in length, typical ones, shuffled.

    A peer that sorts its input by length and computes batches of `window` then meets the batches it
    would meet in the whole corpus; a plain random sample would charge it for padding it wouldn't pay.
    The corpus, sorted by length, is cut into one part a window. CANDIDATES windows of each part are
    tokenised, and the one nearest to their average in padding and in length is taken: a few windows
    by position alone were off by 15 % in padding, to either side.

    Raises GembError if `texts` is no multiple of `window` or the corpus is too small.
    """
    if texts % window or texts < window:
        raise GembError(
            f"{texts} texts are not a multiple of windows of {window}; "
            f"try --texts {max(1, texts // window) * window}"
        )
    if texts > len(whole.texts):
        raise GembError(
            f"corpus {whole.name} has {len(whole.texts)} texts but {texts} are asked for; use fewer --texts"
        )
    parts = texts // window
    starts = [_window_starts(len(whole.texts), window, part, parts) for part in range(parts)]
    positions = sorted({row for part in starts for start in part for row in range(start, start + window)})
    counts = dict(zip(positions, count_tokens([whole.texts[row] for row in positions]), strict=True))
    computed = real = 0
    chosen: list[int] = []
    for part in starts:
        lengths = [[counts[row] for row in range(start, start + window)] for start in part]
        computed += sum(window * max(candidate) for candidate in lengths)
        real += sum(map(sum, lengths))
        start = part[_most_typical(lengths)]
        chosen.extend(range(start, start + window))
    random.Random(SEED).shuffle(chosen)
    return Sample(
        whole.name,
        whole.origin,
        tuple(whole.texts[row] for row in chosen),
        tuple(counts[row] for row in chosen),
        computed / real,
    )


def _most_typical(windows: Sequence[Sequence[int]]) -> int:
    """Which window's padded and real token counts are nearest to the average of all."""
    padded = [max(lengths) * len(lengths) for lengths in windows]
    real = [sum(lengths) for lengths in windows]
    means = statistics.mean(padded), statistics.mean(real)
    return min(
        range(len(windows)),
        key=lambda index: abs(padded[index] / means[0] - 1) + abs(real[index] / means[1] - 1),
    )


def _window_starts(rows: int, window: int, part: int, parts: int) -> list[int]:
    """Where the candidate windows of one of `parts` equal parts of `rows` rows begin, evenly spread."""
    first, room = part * rows // parts, (part + 1) * rows // parts - part * rows // parts - window
    return sorted({first + max(0, room) * index // (CANDIDATES - 1) for index in range(CANDIDATES)})


def _passages(documents: Iterable[str], *, uniform: bool) -> Iterator[str]:
    """Passages of whole paragraphs; each passage has a length of its own, drawn before it is filled."""
    draw = random.Random(SEED)

    def target() -> int:
        if uniform:
            return UNIFORM_CHARACTERS
        return min(LONGEST_CHARACTERS, round(draw.lognormvariate(0, SPREAD) * MEDIAN_CHARACTERS))

    for document in documents:
        passage, wanted = "", target()
        for paragraph in document.split("\n\n"):
            if not paragraph.strip():
                continue
            passage = f"{passage}\n\n{paragraph}" if passage else paragraph
            if len(passage) < wanted:
                continue
            # A paragraph longer than the draw is cut where the draw says: at the next white space.
            while len(passage) >= wanted:
                cut = passage.find(" ", wanted)
                if cut < 0 or cut > LONGEST_CHARACTERS:
                    cut = min(len(passage), LONGEST_CHARACTERS)
                if uniform:
                    cut = max(cut, min(len(passage), UNIFORM_CHARACTERS))
                yield passage[:cut].strip("\n")
                passage, wanted = passage[cut:].strip("\n"), target()
                if not passage.strip():
                    passage = ""
                    break


def _shared_documents(*, prose: bool) -> Iterator[str]:
    for name in ("docs.train.jsonl.gz", "docs.valid.jsonl.gz"):
        with gzip.open(SHARED_DATA / "text" / name, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                if prose and row["source"] == PROSE_SOURCE:
                    yield "\n\n".join(filter(_is_running_text, row["text"].split("\n\n")))
                elif not prose and row["kind"] in ("doc", "code"):
                    yield row["text"]


def _is_running_text(paragraph: str) -> bool:
    """False for contents, indexes, verse and other languages: what is indented or has digits or accents."""
    letters = sum(character.isascii() and not character.isdigit() for character in paragraph)
    return not paragraph.startswith(" ") and letters > 0.98 * len(paragraph)


def _shared_queries() -> Iterator[str]:
    for name in QUERY_SETS:
        path = SHARED_DATA / "retrieval" / name / "queries.jsonl"
        with path.open(encoding="utf-8") as lines:
            yield from (json.loads(line)["text"].strip() for line in lines)


def _library_documents(*, code: bool) -> Iterator[str]:
    """Docstrings of the standard library, with `code` its sources too, in the order of the file names."""
    for source in _library_sources():
        docstrings = _docstrings(source)
        if docstrings:
            yield "\n\n".join(docstrings)
        if code:
            yield source


def _docstring_lines() -> Iterator[str]:
    for source in _library_sources():
        for docstring in _docstrings(source):
            yield docstring.split("\n", 1)[0].strip()


def _library_sources() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        yield path.read_text(encoding="utf-8")


def _docstrings(source: str) -> Sequence[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # old escapes in the library's own strings
        tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [docstring for docstring in found if docstring]

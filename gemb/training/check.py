"""What `gemb train --check` shows of the data before any step: repeats, leaks, lengths, what is cut off.

All usable rows are read once. Memory: 8 bytes a text for the hashes, and the texts of nothing but the sample.
"""

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemb.report.result import Report, Table, counted
from gemb.training.columns import Example, Text
from gemb.training.data_recipe import DataSet
from gemb.training.drawing import Draws, DrawState, text_hash
from gemb.training.examples import Rows, open_rows
from gemb.training.mixture import Member, Mixture
from gemb.training.permutation import key_of

SAMPLED_EXAMPLES = 10_000
"""So many examples of a data set are tokenised for the lengths; the error of a share is at most 1 %."""
_TOKENISED_AT_ONCE = 256
_SHOWN_EXAMPLES = 3
_SHOWN_CHARACTERS = 160
_MANY_REPEATS = 0.05  # of the rows; from there on a warning
_MUCH_CUT = 0.05  # of the texts

_WORDS = re.compile(r"\w+")


@dataclass(frozen=True)
class Lengths:
    """Tokens of the sampled texts of a role, prompts and special tokens included, before they are cut."""

    texts: int
    mean: float
    median: int
    percentile_95: int
    longest: int
    """A lower bound where it is far beyond what the model takes."""
    truncated: int
    """Texts longer than the model takes."""
    histogram: Mapping[int, int]
    """Upper bound (a power of two) to texts with so many tokens or fewer, and more than the bound before."""


@dataclass(frozen=True)
class Overlap:
    """Rows of a data set with a text of an evaluation set; equal up to case, punctuation and white space."""

    queries: int
    """Rows whose query is a query there (whose text is any text there, for texts without roles)."""
    passages: int
    """Rows with a positive that is a passage there; harmless where both use one corpus."""
    pairs: int
    """Rows with both: the answer itself is trained on."""


@dataclass(frozen=True)
class SetCheck:
    """What was found in one data set."""

    name: str
    shape: str
    rows: int
    rejected: int
    reasons: Mapping[str, int]
    first_rejects: Sequence[str]
    columns: Sequence[str]
    share: float
    repeated_queries: int
    """Rows whose query stood in a row before."""
    repeated_positives: int
    """Positives that stood before."""
    repeated_pairs: int
    """Rows with a query and a positive that stood together before."""
    lengths: Mapping[str, Lengths]
    """By role: query, positive, negative."""
    overlaps: Mapping[str, Overlap]
    """By evaluation set."""
    examples: Sequence[Mapping[str, Sequence[str]]]
    """A few, by role, as they are tokenised; long ones cut."""

    def warnings(self) -> list[str]:
        """What should be looked at before the run."""
        found = []
        for what, count in (("queries", self.repeated_queries), ("pairs", self.repeated_pairs)):
            if count > _MANY_REPEATS * self.rows and not (what == "queries" and self.shape != "pairs"):
                found.append(f"{self.name}: {count / self.rows:.0%} of the {what} are repeats")
        for role, lengths in self.lengths.items():
            if lengths.truncated > _MUCH_CUT * lengths.texts:
                share = lengths.truncated / lengths.texts
                found.append(f"{self.name}: {share:.0%} of the texts as {role} are cut to the model's length")
        for name, overlap in self.overlaps.items():
            if overlap.queries:
                found.append(
                    f"{self.name}: {counted(overlap.queries, 'row')} with a query of evaluation set {name}, "
                    f"{overlap.pairs:,} of them with its answer; the scores there would be too good"
                )
        if self.rejected:
            found.append(f"{self.name}: {counted(self.rejected, 'row')} rejected, {self.first_rejects[0]}")
        return found


@dataclass(frozen=True)
class DataCheck:
    """What was found in all data sets."""

    sets: Sequence[SetCheck]

    @property
    def warnings(self) -> list[str]:
        """Those of all data sets."""
        return [warning for one in self.sets for warning in one.warnings()]

    def report(self) -> Report:
        """The same for people and programs."""
        rows = [("warning", warning) for warning in self.warnings]
        for one in self.sets:
            rows.append((one.name, f"{one.shape}, {'; '.join(one.columns)}"))
            rows += [(reason, f"{count:,} rejected") for reason, count in one.reasons.items()]
            for number, example in enumerate(one.examples, 1):
                shown = "\n".join(f"{role}: {text!r}" for role, texts in example.items() for text in texts)
                rows.append((f"example {number}", shown))
        return Report(
            title=f"checked {counted(sum(one.rows for one in self.sets), 'usable row')} of "
            f"{counted(len(self.sets), 'data set')}, {counted(len(self.warnings), 'warning')}",
            rows=rows,
            data={"sets": [asdict(one) for one in self.sets], "warnings": self.warnings},
            tables=[self._sizes(), self._lengths(), *self._overlaps()],
        )

    def _sizes(self) -> Table:
        columns = ("data set", "rows", "rejected", "share", "repeated queries", "positives", "pairs")
        return Table(
            columns,
            [
                (
                    one.name,
                    f"{one.rows:,}",
                    f"{one.rejected:,}",
                    f"{one.share:.1%}",
                    f"{one.repeated_queries:,}",
                    f"{one.repeated_positives:,}",
                    f"{one.repeated_pairs:,}",
                )
                for one in self.sets
            ],
            title="rows",
            right_aligned=columns[1:],
        )

    def _lengths(self) -> Table:
        columns = ("data set", "role", "texts", "mean", "median", "95 %", "longest", "cut", "histogram")
        return Table(
            columns,
            [
                (
                    one.name,
                    role,
                    f"{lengths.texts:,}",
                    f"{lengths.mean:.1f}",
                    f"{lengths.median:,}",
                    f"{lengths.percentile_95:,}",
                    f"{lengths.longest:,}",
                    f"{lengths.truncated / lengths.texts:.1%}",
                    "  ".join(f"<={bound}: {count:,}" for bound, count in lengths.histogram.items()),
                )
                for one in self.sets
                for role, lengths in one.lengths.items()
            ],
            title="tokens of a sample",
            right_aligned=columns[2:-1],
        )

    def _overlaps(self) -> Iterator[Table]:
        columns = ("data set", "evaluation set", "queries", "passages", "pairs")
        rows = [
            (one.name, name, f"{overlap.queries:,}", f"{overlap.passages:,}", f"{overlap.pairs:,}")
            for one in self.sets
            for name, overlap in one.overlaps.items()
        ]
        if rows:
            yield Table(columns, rows, title="rows also in evaluation sets", right_aligned=columns[2:])


def check(
    mixture: Mixture,
    *,
    cache: Path,
    evaluation: Sequence[DataSet] = (),
    sampled_examples: int = SAMPLED_EXAMPLES,
) -> DataCheck:
    """What is in the data of `mixture`, and how much of it stands in the evaluation sets, too.

    Of an evaluation set the judged queries and their passages count. `cache` is the folder of `Mixture.open`.
    Not to be called while the mixture is iterated.

    Raises GembError for an evaluation set that cannot be read.
    """
    held_out: dict[str, _HeldOut] = {}
    for one in evaluation:
        with open_rows(one, cache) as rows:
            held_out[rows.name] = _HeldOut.of(rows)
    return DataCheck(
        [
            _check(mixture, member, rows, data, held_out, sampled_examples)
            for member, rows, data in zip(mixture.members, mixture.rows, mixture.data, strict=True)
        ]
    )


def normalised(text: Text) -> str:
    """A text as overlaps are looked for: title and text, lower case, words with single spaces between.

    A text without words is itself.
    """
    joined = text.joined()
    return " ".join(_WORDS.findall(joined.casefold())) or joined.strip()


@dataclass(frozen=True)
class _HeldOut:
    """Hashes of the normalised texts of an evaluation set."""

    queries: frozenset[int]
    passages: frozenset[int]
    pairs: frozenset[tuple[int, int]]

    @classmethod
    def of(cls, rows: Rows) -> "_HeldOut":
        queries: set[int] = set()
        passages: set[int] = set()
        pairs: set[tuple[int, int]] = set()
        for number in range(rows.size):
            query, positives = _hashed(rows.example(number))
            queries.add(query)
            passages.update(positives)
            pairs.update((query, positive) for positive in positives)
        if rows.shape != "pairs":  # the two texts of a scored pair have no roles
            queries |= passages
            passages = queries
            pairs |= {(second, first) for first, second in pairs}
        return cls(frozenset(queries), frozenset(passages), frozenset(pairs))

    def overlap(self, rows: Rows) -> Overlap:
        found = [0, 0, 0]
        for number in range(rows.size):
            query, positives = _hashed(rows.example(number))
            found[0] += query in self.queries
            found[1] += not self.passages.isdisjoint(positives)
            found[2] += any((query, positive) in self.pairs for positive in positives)
        return Overlap(*found)


def _hashed(example: Example) -> tuple[int, list[int]]:
    return key_of(normalised(example.query)), [key_of(normalised(text)) for text in example.positives]


def _check(
    mixture: Mixture,
    member: Member,
    rows: Rows,
    data: DataSet,
    held_out: Mapping[str, _HeldOut],
    sampled_examples: int,
) -> SetCheck:
    queries, positives, pairs = array("q"), array("q"), array("q")
    for number in range(rows.size):
        example = rows.example(number)
        query = text_hash(example.query)
        of_row = sorted(map(text_hash, example.positives))
        queries.append(query)
        positives.extend(of_row)
        pairs.append(hash((query, *of_row)))
    lengths, examples = _sampled(mixture, member, rows, data, sampled_examples)
    prepared = rows.prepared
    return SetCheck(
        name=rows.name,
        shape=rows.shape,
        rows=rows.size,
        rejected=prepared.rejected,
        reasons=prepared.reasons,
        first_rejects=prepared.first_rejects,
        columns=prepared.columns,
        share=member.share,
        repeated_queries=_repeats(queries),
        repeated_positives=_repeats(positives),
        repeated_pairs=_repeats(pairs),
        lengths=lengths,
        overlaps={name: one.overlap(rows) for name, one in held_out.items()},
        examples=examples,
    )


def _repeats(hashes: "array[int]") -> int:
    values = np.sort(np.frombuffer(hashes, np.int64))
    return int((values[1:] == values[:-1]).sum())


def _sampled(
    mixture: Mixture, member: Member, rows: Rows, data: DataSet, count: int
) -> tuple[dict[str, Lengths], list[dict[str, list[str]]]]:
    """The lengths by role, and some examples, of the first draws of seed 0."""
    draws = Draws(rows, data, seed=0, size=1, no_duplicates=False, needs_negatives=False, state=DrawState())
    roles = ("query", "positive", "negative")
    tokens: dict[str, list[NDArray[np.int64]]] = {role: [] for role in roles}
    examples: list[dict[str, list[str]]] = []
    count = min(count, rows.size)
    for start in range(0, count, _TOKENISED_AT_ONCE):
        texts: dict[str, list[str]] = {role: [] for role in roles}
        for number in range(start, min(start + _TOKENISED_AT_ONCE, count)):
            draw = draws.draw(number)
            for place, text in enumerate(draw.texts):
                template = member.passage if place else member.query
                texts[roles[min(place, 2)]].append(template.render(text.text, text.title))
            if len(examples) < _SHOWN_EXAMPLES:
                examples.append(_shown(texts, len(draw.negatives)))
        for role, of_role in texts.items():
            encoded = mixture.tokeniser.encode(of_role)
            tokens[role].append(encoded.lengths.astype(np.int64) + encoded.lost)
    found = {role: np.concatenate(parts) for role, parts in tokens.items()}
    longest = mixture.tokeniser.max_tokens
    return {role: _lengths(values, longest) for role, values in found.items() if len(values)}, examples


def _shown(texts: Mapping[str, Sequence[str]], negatives: int) -> dict[str, list[str]]:
    """The last example of these, cut for people."""
    of_roles = {"query": 1, "positive": 1, "negative": negatives}
    return {role: [_cut(text) for text in texts[role][-count:]] for role, count in of_roles.items() if count}


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _lengths(tokens: NDArray[np.int64], max_tokens: int) -> Lengths:
    bounds, counts = np.unique(np.ceil(np.log2(np.maximum(tokens, 1))).astype(int), return_counts=True)
    return Lengths(
        texts=len(tokens),
        mean=float(tokens.mean()),
        median=int(np.median(tokens)),
        percentile_95=int(np.percentile(tokens, 95)),
        longest=int(tokens.max()),
        truncated=int((tokens > max_tokens).sum()),
        histogram={1 << bound: count for bound, count in zip(bounds.tolist(), counts.tolist(), strict=True)},
    )

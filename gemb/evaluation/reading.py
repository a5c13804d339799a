"""Which task a folder or file of the user is, told by its shape; and the reading of all but BEIR folders."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemb.errors import GembError
from gemb.evaluation.labels import Classification, Clustering, drawn
from gemb.evaluation.pairs import PairClassification, Similarity
from gemb.evaluation.ranking import Bitext, Reranking
from gemb.evaluation.retrieval import is_beir, read_beir
from gemb.evaluation.tasks import Task, Texts
from gemb.report import counted
from gemb.text.inputs import lines_of, open_bytes, resolve_inputs
from gemb.text.records import EMPTY_TEXT, ReadOptions, Record, read_records

KINDS = (
    "retrieval", "similarity", "pair-classification", "classification", "clustering", "bitext", "reranking",
)  # fmt: skip
FIRST_FIELDS = ("sentence1", "text1", "anchor", "query", "question1")
SECOND_FIELDS = ("sentence2", "text2", "positive", "question2")
SCORE_FIELDS = ("score", "similarity_score", "similarity")
POSITIVE_LABELS = ("1", "true", "True", "entailment", "paraphrase", "duplicate", "equivalent")
_KNOWN_SHAPES = (
    "evaluation knows BEIR folders (retrieval); sentence1, sentence2, score (similarity) or label "
    "(pair-classification); text, label (classification, clustering); query, docs, labels (reranking); "
    "and two columns of a .tsv (bitext)"
)

Fields = Mapping[str, object]


@dataclass(frozen=True)
class Choices:
    """What the user says about the reading of data."""

    kind: str | None = None
    """One of KINDS; None goes by the shape."""
    split: str | None = None
    """test, dev, ...; None is test, or what there is."""
    positive: str | None = None
    """The label of pairs that belong together."""
    samples: int = 8
    """Texts a label that a probe learns from."""
    draws: int = 10
    seed: int = 42


def read_task(path: Path, choices: Choices) -> Task:
    """The task of a file or folder.

    Raises GembError if it is not there, or its rows are no such task's.
    """
    if not path.exists():
        raise GembError(f"there is no {path} to evaluate on; check the path")
    if path.is_dir() and is_beir(path):
        if choices.kind not in (None, "retrieval"):
            raise GembError(f"{path} is a retrieval data set (corpus, queries, qrels), not {choices.kind}")
        return read_beir(path, split=choices.split)
    train, test = _splits(path, choices.split)
    kind = choices.kind or _kind_of(test)
    if kind == "retrieval":
        raise GembError(f"{path} is no BEIR folder: it needs corpus.jsonl, queries.jsonl and qrels/test.tsv")
    name = path.name.partition(".")[0] if path.is_file() else path.name
    return _READERS[kind](name, train, test, choices)


def _splits(path: Path, split: str | None) -> tuple[Path | None, Path]:
    """The files for learning, if there is one, and for the test."""
    if path.is_file():
        return None, path
    there = {
        part: file
        for file in sorted(path.iterdir())
        if file.is_file()
        for part in ("train", "dev", "validation", "test")
        if part in file.name.split(".")
    }
    wanted = [split] if split else ["test", "dev", "validation"]
    test = next((there[part] for part in wanted if part in there), None)
    if test is None:
        raise GembError(
            f"{path} has no {split or 'test'} file; "
            + (f"it has {', '.join(there)}" if there else "name a file, or a folder with test.jsonl")
        )
    return there.get("train"), test


def _kind_of(path: Path) -> str:
    """The kind of the rows of a file."""
    if _is_bitext(path):
        return "bitext"
    fields = _first_fields(path)
    if {"query", "docs", "labels"} <= fields or {"query", "positive", "negative"} <= fields:
        return "reranking"
    if fields.intersection(FIRST_FIELDS) and fields.intersection(SECOND_FIELDS):
        if fields.intersection(SCORE_FIELDS):
            return "similarity"
        if "label" in fields:
            return "pair-classification"
    if {"text", "label"} <= fields:
        return "classification"
    raise GembError(f"{path}:1: no task has the fields {', '.join(sorted(fields))}; {_KNOWN_SHAPES}")


def _is_bitext(path: Path) -> bool:
    if ".tsv" not in path.name:
        return False
    (file,) = resolve_inputs([str(path)], input_format="text")
    with open_bytes(file) as stream:
        first = next(lines_of(file, stream), b"").decode("utf-8", "replace").rstrip("\r\n").split("\t")
    return len(first) == 2 and not {"text", "label", "sentence1", "query"}.intersection(first)


def _first_fields(path: Path) -> set[str]:
    for _, row in _rows(path):
        return set(row)
    raise GembError(f"{path}: no rows")


def _rows(path: Path, *, needs_text: bool = False) -> Iterator[tuple[int, Fields]]:
    """(line, fields) of every row; its text is `text`, whatever it is called.

    Raises GembError for a broken one.
    """
    options = ReadOptions(keep_fields=True, text_optional=not needs_text)
    for row in read_records(resolve_inputs([str(path)]), options):
        if isinstance(row, Record):
            yield row.line, {**row.fields, "text": row.text} if row.text else row.fields
        elif row.reason == EMPTY_TEXT:
            yield row.line, {"text": ""}
        else:
            raise GembError(str(row))


def _text(path: Path, line: int, row: Fields, names: Sequence[str]) -> str:
    """The first of some fields. Raises GembError where none is there, or it is no string."""
    name = next((name for name in names if name in row), None)
    if name is None:
        raise GembError(f'{path}:{line}: no "{names[0]}"; this line has {", ".join(row) or "no fields"}')
    value = row[name]
    if not isinstance(value, str):
        raise GembError(f'{path}:{line}: "{name}" is {value!r}, not a string')
    return value


def _left_out(count: int, what: str) -> list[str]:
    return [f"{counted(count, what)} with an empty text left out"] if count else []


def _read_pairs(
    path: Path, value_of: Callable[[int, Fields], object]
) -> tuple[dict[str, list[str]], list[object], list[str]]:
    """Texts by role, what belongs to each pair, and what was left out."""
    firsts: list[str] = []
    seconds: list[str] = []
    values: list[object] = []
    empty = 0
    for line, row in _rows(path):
        pair = _text(path, line, row, FIRST_FIELDS), _text(path, line, row, SECOND_FIELDS)
        value = value_of(line, row)
        if not pair[0].strip() or not pair[1].strip():
            empty += 1
            continue
        firsts.append(pair[0])
        seconds.append(pair[1])
        values.append(value)
    if not firsts:
        raise GembError(f"{path}: no pair with two texts")
    return {"firsts": firsts, "seconds": seconds}, values, _left_out(empty, "pair")


def _read_similarity(name: str, train: Path | None, test: Path, choices: Choices) -> Task:
    def score(line: int, row: Fields) -> float:
        value = next((row[field] for field in SCORE_FIELDS if field in row), None)
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise GembError(f'{test}:{line}: "score" is {value!r}, not a number')
        return number

    texts, scores, notes = _read_pairs(test, score)
    if len(set(scores)) < 2:
        raise GembError(f"{test}: every score is {scores[0]}; a correlation needs different ones")
    roles = {role: Texts(own, ("STS",)) for role, own in texts.items()}
    return Similarity(name, roles, [float(str(score)) for score in scores], notes=notes)


def _read_pair_classification(name: str, train: Path | None, test: Path, choices: Choices) -> Task:
    texts, labels, notes = _read_pairs(test, lambda line, row: _label(test, line, row))
    kinds = sorted({str(label) for label in labels})
    # A number among several, 0, 1 and 2 say, may be any class; only words tell what they are.
    known = [label for label in POSITIVE_LABELS if len(kinds) == 2 or not label.isdigit()]
    positive = choices.positive or next((label for label in known if label in kinds), None)
    if positive not in kinds or len(kinds) < 2:
        raise GembError(
            f"{test}: the labels are {', '.join(kinds)}; name the one that says yes with --positive"
        )
    roles = {role: Texts(own, ("PairClassification", "STS")) for role, own in texts.items()}
    return PairClassification(name, roles, [label == positive for label in labels], notes=notes)


def _label(path: Path, line: int, row: Fields) -> str:
    value = row.get("label")
    if not isinstance(value, str | int) or value == "":
        raise GembError(f'{path}:{line}: "label" is {value!r}, not a string or an integer')
    return str(value)


def _read_labelled(path: Path) -> tuple[list[str], list[str], int]:
    """Texts, labels, and how many texts were empty."""
    texts: list[str] = []
    labels: list[str] = []
    empty = 0
    for line, row in _rows(path, needs_text=True):
        text = _text(path, line, row, ("text",))
        if not text.strip():
            empty += 1
            continue
        texts.append(text)
        labels.append(_label(path, line, row))
    if len(set(labels)) < 2:
        raise GembError(f"{path}: {len(set(labels))} different labels; a task needs two")
    return texts, labels, empty


def _read_classification(name: str, train: Path | None, test: Path, choices: Choices) -> Task:
    texts, labels, empty = _read_labelled(test)
    notes = _left_out(empty, "text")
    if train is None:
        # Every second text of each label, so that both halves know all labels that come twice.
        seen: Counter[str] = Counter()
        halves: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
        for text, label in zip(texts, labels, strict=True):
            halves[seen[label] % 2].append((text, label))
            seen[label] += 1
        learnt, held = halves
        notes.append("no file to learn from: every second text of a label is for the test")
    else:
        texts_to_learn, labels_to_learn, empty_to_learn = _read_labelled(train)
        learnt = list(zip(texts_to_learn, labels_to_learn, strict=True))
        held = list(zip(texts, labels, strict=True))
        notes += _left_out(empty_to_learn, "training text")
    if not held:
        raise GembError(f"{test}: no label comes twice, so that nothing is left for the test")
    draws = drawn([label for _, label in learnt], choices.samples, choices.draws, choices.seed)
    used = sorted({number for draw in draws for number in draw})  # the others need not be embedded
    place = {number: position for position, number in enumerate(used)}
    roles = {
        "train": Texts([learnt[number][0] for number in used], ("Classification",)),
        "test": Texts([text for text, _ in held], ("Classification",)),
    }
    return Classification(
        name,
        roles,
        [learnt[number][1] for number in used],
        [label for _, label in held],
        [[place[number] for number in draw] for draw in draws],
        choices.seed,
        notes=notes,
    )


def _read_clustering(name: str, train: Path | None, test: Path, choices: Choices) -> Task:
    texts, labels, empty = _read_labelled(test)
    roles = {"texts": Texts(texts, ("Clustering",))}
    return Clustering(name, roles, labels, choices.draws, choices.seed, notes=_left_out(empty, "text"))


def _read_bitext(name: str, train: Path | None, test: Path, choices: Choices) -> Task:
    (file,) = resolve_inputs([str(test)], input_format="text")
    sides: tuple[list[str], list[str]] = ([], [])
    with open_bytes(file) as stream:
        for line, raw in enumerate(lines_of(file, stream), 1):
            pair = raw.decode("utf-8", "replace").rstrip("\r\n").split("\t")
            if len(pair) != 2 or not pair[0].strip() or not pair[1].strip():
                raise GembError(f"{test}:{line}: not two texts with a tab between")
            for side, text in zip(sides, pair, strict=True):
                side.append(text)
    if not sides[0]:
        raise GembError(f"{test}: no rows")
    names = ("BitextMining", "STS")
    return Bitext(name, {"firsts": Texts(sides[0], names), "seconds": Texts(sides[1], names)})


def _read_reranking(name: str, train: Path | None, test: Path, choices: Choices) -> Task:
    queries: list[str] = []
    candidates: list[str] = []
    labels: list[bool] = []
    first = [0]
    one_sided = 0
    for line, row in _rows(test):
        own = _candidates(test, line, row)
        right = [label for _, label in own]
        if all(right) or not any(right):
            one_sided += 1
            continue
        queries.append(_text(test, line, row, ("query",)))
        candidates += [text for text, _ in own]
        labels += right
        first.append(len(candidates))
    if not queries:
        raise GembError(f"{test}: no query has both right and wrong candidates")
    queries_out = "1 query" if one_sided == 1 else f"{one_sided:,} queries"
    notes = [f"{queries_out} left out: all candidates are right, or none"] if one_sided else []
    roles = {
        "queries": Texts(queries, ("query",)),
        "candidates": Texts(candidates, ("document",)),
    }
    return Reranking(name, roles, first, labels, notes=notes)


def _candidates(path: Path, line: int, row: Fields) -> list[tuple[str, bool]]:
    """(text, is right) of the candidates of a row: docs and labels, or positive and negative."""
    if "docs" in row:
        docs, labels = row["docs"], row.get("labels")
        if not isinstance(docs, list) or not isinstance(labels, list) or len(docs) != len(labels):
            raise GembError(f'{path}:{line}: "docs" and "labels" must be lists of one length')
        for label in labels:
            if not isinstance(label, bool | int | float):
                raise GembError(f"{path}:{line}: the label {label!r} is no number")
        pairs = [(text, label > 0) for text, label in zip(docs, labels, strict=True)]
    else:
        sides = [(row.get(field), field == "positive") for field in ("positive", "negative")]
        pairs = [
            (text, right)
            for texts, right in sides
            for text in (texts if isinstance(texts, list) else [texts])
        ]
    for text, _ in pairs:
        if not isinstance(text, str) or not text.strip():
            raise GembError(f"{path}:{line}: the candidate {text!r} is no text")
    return pairs


_READERS: Mapping[str, Callable[[str, Path | None, Path, Choices], Task]] = {
    "similarity": _read_similarity,
    "pair-classification": _read_pair_classification,
    "classification": _read_classification,
    "clustering": _read_clustering,
    "bitext": _read_bitext,
    "reranking": _read_reranking,
}

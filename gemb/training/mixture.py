"""Batches from several data sets, each from one of them, tokenised ahead and resumable to the bit.

Every rank draws the same examples, which costs little, and renders and tokenises its own part of each batch.
Nothing here depends on the number of threads, or on time.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from gemb.engine.ahead import ReadAhead
from gemb.errors import GembError, MismatchError
from gemb.text.prompts import NONE, Prompts, Template
from gemb.text.tokenisation import Tokeniser
from gemb.training.batches import TrainingBatch
from gemb.training.data_recipe import DataSet, MixtureSettings, PromptText
from gemb.training.drawing import Draw, Draws, DrawState
from gemb.training.examples import OnRows, Prepared, Rows, name_of, open_rows
from gemb.training.permutation import key_of, random64

_VERSION = 1
_AHEAD_BATCHES = 2
_SAMPLED_EXAMPLES = 512  # of which the tokens of an example are estimated; the error is a few per cent
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio


@dataclass(slots=True)
class Counts:
    """What the batches of one data set held so far; of several ranks each counts its own texts."""

    batches: int = 0
    examples: int = 0
    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    """Texts that were cut to the model's length."""
    lost_tokens: int = 0
    """Tokens that were cut away."""
    without_prompt: int = 0
    """Texts whose prompt was dropped."""


@dataclass(frozen=True)
class Member:
    """One data set of a mixture."""

    name: str
    prepared: Prepared
    pairs: int
    """Examples of a batch, all ranks together."""
    query: Template
    passage: Template
    share: float = 0.0
    """Of the batches; the shares sum to 1."""


@dataclass(frozen=True)
class _Options:
    """What all batches of a mixture have in common."""

    seed: int
    rank: int
    ranks: int
    no_duplicates: bool
    leave_out_prompts: bool
    needs_negatives: bool
    keep_texts: bool


class Mixture:
    """An endless stream of training batches; `position` is where a later `open` goes on.

    The data set of batch k is told by frac(u + k / golden ratio) against the shares: after any number of
    batches each data set has had its share to within a few batches, without a period (Weyl's sequence).
    """

    def __init__(
        self,
        members: Sequence[Member],
        rows: Sequence[Rows],
        data: Sequence[DataSet],
        tokeniser: Tokeniser,
        options: _Options,
        planned_batches: int | None,
        position: Mapping[str, Any] | None,
    ) -> None:
        self.members = members
        self.planned_batches = planned_batches
        """With token budgets the number of batches that uses them up, about; else None."""
        self.rows = rows
        self.data = data
        self.tokeniser = tokeniser
        self._options = options
        self._lock = threading.Lock()  # held while a batch is made, in whichever thread
        self._closed = False
        self._first_place = key_of("mixture", options.seed)
        ends = np.cumsum([member.share for member in members])
        self._ends = [int(end * (1 << 64)) for end in (ends / ends[-1]).tolist()]
        self._position = self._beginning() if position is None else self._checked(position)

    @classmethod
    def open(
        cls,
        data: Sequence[DataSet],
        settings: MixtureSettings,
        *,
        tokeniser: Tokeniser,
        prompts: Prompts,
        cache: Path,
        pairs: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        leave_out_prompts: bool = False,
        needs_negatives: bool = True,
        keep_texts: bool = False,
        position: Mapping[str, Any] | None = None,
        notice: Callable[[str], None] = lambda _: None,
        on_rows: OnRows = lambda _name, _rows: None,
    ) -> Self:
        """The mixture of `data`, at its beginning or at the `position` of an earlier one.

        The mixture has `tokeniser` for itself while it is iterated. `cache` is a folder for indices and
        unpacked rows. `pairs` are the examples of a batch, all ranks together, where the data set does not
        say; a data set with fewer rows has smaller batches. `leave_out_prompts` is True for a model that
        pools without its prompts. `needs_negatives` is False for losses that compare nothing within a batch.
        `keep_texts` fills `TrainingBatch.texts`. A position fits any number of ranks. `notice` hears of
        rejected rows and of smaller batches.

        Raises GembError for what is wrong with data, shares, sizes; MismatchError for an unknown prompt and
        a position that belongs to other data or settings.
        """
        _check_names(data)
        options = _Options(
            seed, rank, ranks, settings.no_duplicates, leave_out_prompts, needs_negatives, keep_texts
        )
        with ExitStack() as opened:
            rows = [
                opened.enter_context(open_rows(one, cache, notice=notice, on_rows=on_rows)) for one in data
            ]
            members = []
            for one, its in zip(data, rows, strict=True):
                if its.prepared.rejected:
                    notice(_rejections(its))
                size = _batch_size(one.pairs or pairs, its, ranks, notice)
                if needs_negatives:
                    _check_negatives(its, one, size)
                members.append(Member(its.name, its.prepared, size, *templates(one, prompts)))
            weights, planned = _weights(data, rows, members, settings, tokeniser, options)
            members = [
                replace(member, share=weight / sum(weights))
                for member, weight in zip(members, weights, strict=True)
            ]
            mixture = cls(members, rows, data, tokeniser, options, planned, position)
            opened.pop_all()
        return mixture

    @property
    def position(self) -> dict[str, Any]:
        """JSON-able: where the batch after the last one that was given begins."""
        return self._position

    @property
    def step(self) -> int:
        """Batches given so far, those before a resume counted."""
        return int(self._position["step"])

    @property
    def counts(self) -> dict[str, Counts]:
        """What the batches given so far held, by data set."""
        return {name: Counts(**one["counts"]) for name, one in self._position["data"].items()}

    @property
    def draws(self) -> dict[str, DrawState]:
        """How the draws of each data set went so far: repeated examples, batches without negatives."""
        return {name: _draw_state(one) for name, one in self._position["data"].items()}

    @property
    def batches_per_epoch(self) -> int:
        """Batches that hold as many examples as all data sets together."""
        per_batch = sum(member.share * member.pairs for member in self.members)
        return max(1, round(sum(member.prepared.size for member in self.members) / per_batch))

    def __iter__(self) -> Iterator[TrainingBatch]:
        """The batches from `position` on, made ahead in a thread; one iteration at a time."""
        ahead = ReadAhead(self._batches(), depth=_AHEAD_BATCHES, stop=threading.Event(), name="gemb-batches")
        try:
            for batch, position in ahead:
                self._position = position
                yield batch
        finally:
            ahead.close()

    def close(self) -> None:
        """Closes the files."""
        with self._lock:
            self._closed = True
            for rows in self.rows:
                rows.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _beginning(self) -> dict[str, Any]:
        data = {
            member.name: {
                "fingerprint": member.prepared.fingerprint,
                "pairs": member.pairs,
                "share": member.share,
                "draws": asdict(DrawState()),
                "counts": asdict(Counts()),
            }
            for member in self.members
        }
        return {"version": _VERSION, "seed": self._options.seed, "step": 0, "data": data}

    def _checked(self, position: Mapping[str, Any]) -> dict[str, Any]:
        """The position, if this mixture gives from there on what the one that saved it would have given."""
        now = self._beginning()
        saved = position["data"]
        problems = [
            f"{key} was {position[key]} and is {now[key]}"
            for key in ("version", "seed")
            if position[key] != now[key]
        ]
        if list(saved) != list(now["data"]):
            problems.append(f"the data sets were {', '.join(saved)} and are {', '.join(now['data'])}")
        else:
            for name, one in now["data"].items():
                if saved[name]["fingerprint"] != one["fingerprint"]:
                    problems.append(f"the files or columns of {name} have changed")
                problems += [
                    f"{key} of {name} was {saved[name][key]:g} and is {one[key]:g}"
                    for key in ("pairs", "share")
                    if saved[name][key] != one[key]
                ]
        if problems:
            raise MismatchError(
                f"the data are not those of the run that is resumed: {'; '.join(problems)}; "
                "restore them, or start another run"
            )
        return dict(position)

    def _batches(self) -> Iterator[tuple[TrainingBatch, dict[str, Any]]]:
        """Each batch with the position after it."""
        step, data, options = self.step, self._position["data"], self._options
        with self._lock:
            draws = [
                Draws(
                    rows,
                    one,
                    seed=options.seed,
                    size=member.pairs,
                    no_duplicates=options.no_duplicates,
                    needs_negatives=options.needs_negatives,
                    state=_draw_state(data[member.name]),
                )
                for rows, one, member in zip(self.rows, self.data, self.members, strict=True)
            ]
            makers = [
                _Maker(member, rows, one, self.tokeniser, options)
                for member, rows, one in zip(self.members, self.rows, self.data, strict=True)
            ]
        while True:
            place = (self._first_place + step * _GOLDEN) % (1 << 64)
            chosen = next(number for number, end in enumerate(self._ends) if place < end)
            member = self.members[chosen]
            part = member.pairs // options.ranks
            counts = Counts(**data[member.name]["counts"])
            with self._lock:
                if self._closed:
                    return
                drawn = draws[chosen].batch()[options.rank * part : (options.rank + 1) * part]
                batch = makers[chosen].batch(drawn, counts)
            step += 1
            after = {"draws": asdict(draws[chosen].state), "counts": asdict(counts)}
            data = {**data, member.name: {**data[member.name], **after}}
            yield batch, {"version": _VERSION, "seed": options.seed, "step": step, "data": data}


def templates(data: DataSet, prompts: Prompts) -> tuple[Template, Template]:
    """The templates of queries and of passages of a data set.

    Raises MismatchError for a name that is none of the model's prompts.
    """
    found = []
    for role in ("query", "passage"):
        wanted: str | PromptText = getattr(data.prompts, role)
        try:
            if isinstance(wanted, PromptText):
                found.append(Prompts({role: wanted.text}, None).template(role))
            else:
                found.append(prompts.template(wanted))
        except MismatchError as error:
            raise MismatchError(f"{name_of(data)}: prompts.{role}: {error}") from error
    return found[0], found[1]


class _Maker:
    """Turns the drawn examples of one data set into batches."""

    def __init__(
        self, member: Member, rows: Rows, data: DataSet, tokeniser: Tokeniser, options: _Options
    ) -> None:
        self._member = member
        self._rows = rows
        self._drop_prompts = data.drop_prompts
        self._tokeniser = tokeniser
        self._keep_texts = options.keep_texts
        self._key = key_of("prompts", options.seed, member.name)
        self._bare = Prompts({}, None).template(NONE)
        self._prompt_tokens = {
            template.prefix: tokeniser.prompt_tokens(template.prefix) if options.leave_out_prompts else 0
            for template in (member.query, member.passage, self._bare)
        }

    def batch(self, draws: Sequence[Draw], counts: Counts) -> TrainingBatch:
        """The batch of these examples; adds what it holds to `counts`."""
        # Each text as its example and its place there: all queries, all positives, all negatives.
        places = [(draw, place) for place in (0, 1) for draw in draws]
        places += [(draw, 2 + number) for draw in draws for number in range(len(draw.negatives))]
        used = [self._template(draw, place) for draw, place in places]
        texts = [draw.texts[place] for draw, place in places]
        rendered = [
            template.render(text.text, text.title) for template, text in zip(used, texts, strict=True)
        ]
        encoded = self._tokeniser.encode(rendered)
        for number in np.flatnonzero(encoded.lengths == 0)[:1].tolist():
            place = self._rows.place(places[number][0].row)
            raise GembError(
                f"{place}: the tokenizer finds no token in {rendered[number]!r}; leave the row out"
            )
        counts.batches += 1
        counts.examples += len(draws)
        counts.texts += len(texts)
        counts.tokens += len(encoded.ids)
        counts.truncated += int((encoded.lost > 0).sum())
        counts.lost_tokens += int(encoded.lost.sum())
        counts.without_prompt += sum(template is self._bare for template in used)
        is_scored = self._rows.shape == "scored"
        return TrainingBatch(
            dataset=self._member.name,
            kind="scored" if is_scored else "pairs",
            ids=encoded.ids,
            lengths=encoded.lengths,
            prompt_tokens=np.array([self._prompt_tokens[template.prefix] for template in used], np.int32),
            pairs=len(draws),
            owner=np.repeat(np.arange(len(draws)), [len(draw.negatives) for draw in draws]),
            hashes=np.array([draw.hashes[place] for draw, place in places], np.int64),
            scores=np.array([draw.score for draw in draws], np.float32) if is_scored else None,
            texts=[text.joined() for text in texts] if self._keep_texts else None,
        )

    def _template(self, draw: Draw, place: int) -> Template:
        """The template of a text of an example: its role's, or the bare one for a prompt that is dropped.

        Each text has a coin of its own. If a query and its positive kept or lost their prompts together, the
        prompt would tell which passage is the positive.
        """
        if random64(self._key, draw.number, place) < self._drop_prompts * 2.0**64:
            return self._bare
        return self._member.passage if place else self._member.query


def _draw_state(saved: Mapping[str, Any]) -> DrawState:
    return DrawState(**{**saved["draws"], "waiting": tuple(saved["draws"]["waiting"])})


def _check_names(data: Sequence[DataSet]) -> None:
    names = [name_of(one) for one in data]
    for name in names:
        if names.count(name) > 1:
            raise GembError(f"two data sets are called {name}; give them names of their own with name:")


def _rejections(rows: Rows) -> str:
    """What is told of the rows that cannot be used."""
    prepared = rows.prepared
    total = prepared.rejected + prepared.size
    return (
        f"{rows.name}: {prepared.rejected:,} of {total:,} rows rejected, the first: "
        f"{prepared.first_rejects[0]}; all are in {rows.rejects_path}"
    )


def _batch_size(wanted: int, rows: Rows, ranks: int, notice: Callable[[str], None]) -> int:
    """Examples of a batch, all ranks together."""
    if wanted % ranks:
        raise GembError(f"{rows.name}: {wanted} pairs a batch cannot be divided by {ranks} processes")
    if wanted <= rows.size:
        return wanted
    size = rows.size // ranks * ranks
    if not size:
        raise GembError(f"{rows.name}: {rows.size:,} usable rows are too few for {ranks} processes")
    notice(f"{rows.name}: batches of {size:,} instead of {wanted:,}, for there are {rows.size:,} usable rows")
    return size


def _check_negatives(rows: Rows, data: DataSet, size: int) -> None:
    """Raises GembError if no batch can hold anything to tell a positive from."""
    prepared = rows.prepared
    if rows.shape == "labelled":
        if len(prepared.labels) == 1:
            raise GembError(
                f'{rows.name}: all rows have the label "{next(iter(prepared.labels))}"; '
                "labelled texts need two labels, of two texts each"
            )
        return
    if rows.shape == "scored" or (prepared.with_negatives and data.negatives):
        return
    for is_equal, role in ((prepared.all_queries_equal, "query"), (prepared.all_positives_equal, "positive")):
        if is_equal:
            raise GembError(
                f"{rows.name}: all {rows.size:,} usable rows have the same {role} and no hard negative, "
                "so that there is nothing to tell a positive from"
            )
    if size == 1:
        raise GembError(
            f"{rows.name}: a batch of 1 pair without a hard negative has nothing to tell the positive from; "
            "make pairs larger"
        )


def _weights(
    data: Sequence[DataSet],
    rows: Sequence[Rows],
    members: Sequence[Member],
    settings: MixtureSettings,
    tokeniser: Tokeniser,
    options: _Options,
) -> tuple[list[float], int | None]:
    """The weight of each data set in batches; with token budgets also their sum, else None."""
    if any(one.weight is not None for one in data):
        return [one.weight or 0.0 for one in data], None
    if any(one.tokens is not None for one in data):
        batches = [
            (one.tokens or 0) / (_mean_tokens(its, one, member, tokeniser, options) * member.pairs)
            for one, its, member in zip(data, rows, members, strict=True)
        ]
        return batches, max(1, round(sum(batches)))
    largest = max(its.size for its in rows)  # so that no power overflows
    return [(its.size / largest) ** (1 / settings.temperature) for its in rows], None


def _mean_tokens(rows: Rows, data: DataSet, member: Member, tokeniser: Tokeniser, options: _Options) -> float:
    """Tokens of an example, from a sample that all ranks and all resumed runs have in common."""
    draws = Draws(
        rows,
        data,
        seed=options.seed,
        size=min(_SAMPLED_EXAMPLES, rows.size),
        no_duplicates=False,
        needs_negatives=False,
        state=DrawState(),
    )
    sampled = draws.batch()
    batch = _Maker(member, rows, data, tokeniser, options).batch(sampled, Counts())
    return len(batch.ids) / len(sampled)

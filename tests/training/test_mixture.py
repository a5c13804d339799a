"""Batches: what is in one, in which order, resumed to the bit, and what cannot be mixed."""

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from gemb.errors import GembError, MismatchError
from gemb.text.prompts import Prompts
from gemb.text.tokenisation import Tokeniser
from gemb.training.batches import TrainingBatch
from gemb.training.columns import Text
from gemb.training.data_recipe import NO_PROMPTS, DataSet, MixtureSettings, PromptText, RolePrompts
from gemb.training.drawing import Draws, DrawState, text_hash
from gemb.training.examples import open_rows
from gemb.training.mixture import Mixture

MAX_TOKENS = 8
WORDS = 2000
PROMPTS = Prompts({"query": "ask ", "document": "title: none | text: "}, None)


def tokeniser(*, special: bool = True) -> Tokeniser:
    """Words to numbers, `<s>` before and `</s>` behind."""
    words = ["<unk>", "<s>", "</s>", "ask", "say", "title:", "none", "|", "text:"]
    vocabulary = {word: number for number, word in enumerate([*words, *(f"w{n}" for n in range(WORDS))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        backend.add_special_tokens(["<s>", "</s>"])
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return Tokeniser(backend, max_tokens=MAX_TOKENS)


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short names in messages."""
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: Sequence[dict[str, Any]]) -> str:
    Path(name).write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return name


def pairs(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    return [{"anchor": f"w{n} a", "positive": f"w{n} b"} for n in range(first, first + count)]


def mixture(*data: DataSet, pairs: int = 4, seed: int = 0, **options: Any) -> Mixture:  # noqa: ANN401
    defaults: dict[str, Any] = {
        "settings": MixtureSettings(),
        "tokeniser": tokeniser(),
        "prompts": PROMPTS,
        "cache": Path("cache"),
        "keep_texts": True,
    }
    return Mixture.open(data, pairs=pairs, seed=seed, **{**defaults, **options})


def take(source: Mixture, count: int) -> list[TrainingBatch]:
    return list(islice(source, count))


def equal(one: TrainingBatch, other: TrainingBatch) -> bool:
    arrays = ("ids", "lengths", "prompt_tokens", "owner", "hashes", "scores")
    return (
        (one.dataset, one.kind, one.pairs, one.texts) == (other.dataset, other.kind, other.pairs, other.texts)
        and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays[:-1])
        and (one.scores is None) == (other.scores is None)
        and (one.scores is None or np.array_equal(one.scores, other.scores))  # type: ignore[arg-type]
    )


def queries(batch: TrainingBatch) -> list[str]:
    assert batch.texts is not None
    return list(batch.texts[: batch.pairs])


def failure(*data: DataSet, **options: Any) -> str:  # noqa: ANN401
    with pytest.raises(GembError) as error:
        mixture(*data, **options)
    return str(error.value)


# What is in a batch.


def test_queries_then_positives_then_negatives_tokenised_with_their_prompts() -> None:
    rows = [
        {"query": f"w{n}", "pos": [{"text": f"w{10 + n}", "title": "w9"}], "neg": [f"w{20 + n}"] * (n % 2)}
        for n in range(4)
    ]
    data = DataSet(path=write("a.jsonl", rows), prompts=RolePrompts(query="query", passage="document"))
    (batch,) = take(mixture(data, leave_out_prompts=True), 1)
    assert batch.texts is not None
    assert (batch.dataset, batch.kind, batch.pairs, batch.scores) == ("a", "pairs", 4, None)
    order = [int(text[1:]) for text in batch.texts[:4]]
    assert sorted(order) == [0, 1, 2, 3]
    assert batch.texts[4:8] == [f"w9 w{10 + n}" for n in order]
    owners = [place for place, n in enumerate(order) if n % 2]
    assert batch.owner.tolist() == owners
    assert batch.texts[8:] == [f"w{20 + order[owner]}" for owner in owners]
    rendered = (
        [f"ask w{n}" for n in order]
        + [f"title: w9 | text: w{10 + n}" for n in order]
        + [f"title: none | text: w{20 + order[owner]}" for owner in owners]
    )
    encoded = tokeniser().encode(rendered)
    assert batch.ids.tolist() == encoded.ids.tolist()
    assert batch.lengths.tolist() == encoded.lengths.tolist()
    # `<s> ask`, `<s> title: none | text:`
    assert batch.prompt_tokens.tolist() == [2] * 4 + [5] * 6
    hashed = [Text(f"w{n}") for n in order] + [Text(f"w{10 + n}", "w9") for n in order]
    assert batch.hashes.tolist()[:8] == [text_hash(text) for text in hashed]
    for array, kind in ((batch.ids, np.int32), (batch.lengths, np.int32), (batch.prompt_tokens, np.int32)):
        assert array.dtype == kind
    assert batch.owner.dtype == batch.hashes.dtype == np.int64


def test_a_model_that_pools_its_prompts_leaves_none_of_their_tokens_out() -> None:
    data = DataSet(path=write("a.jsonl", pairs(4)), prompts=RolePrompts(query="query", passage="document"))
    (batch,) = take(mixture(data), 1)
    assert not batch.prompt_tokens.any()


def test_the_hash_of_a_text_is_the_same_on_every_machine() -> None:
    assert text_hash(Text("one")) == -3957126355335908812
    assert text_hash(Text("one", "two")) == text_hash(Text("two one"))


def test_scored_pairs_keep_their_scores_and_may_repeat_texts() -> None:
    rows = [{"sentence1": "w1", "sentence2": f"w{n}", "score": n / 2} for n in range(2, 10)]
    (batch,) = take(mixture(DataSet(path=write("a.jsonl", rows), prompts=NO_PROMPTS), pairs=8), 1)
    assert (batch.kind, batch.pairs, len(batch.owner)) == ("scored", 8, 0)
    assert batch.texts is not None
    assert batch.scores is not None
    assert batch.scores.dtype == np.float32
    assert {text: float(score) for text, score in zip(batch.texts[8:], batch.scores, strict=True)} == {
        f"w{n}": n / 2 for n in range(2, 10)
    }


def test_labelled_texts_are_paired_by_label_and_marked_apart() -> None:
    rows = [{"text": f"w{n}", "label": n % 3} for n in range(30)]
    source = mixture(DataSet(path=write("a.jsonl", rows), prompts=NO_PROMPTS), pairs=6)
    for batch in take(source, 10):
        assert batch.texts is not None
        marks, numbers = zip(*((text[:8], int(text[10:])) for text in batch.texts), strict=True)
        assert batch.owner.tolist() == list(range(6))
        assert len(set(marks)) == 6
        for example in range(6):
            assert marks[example] == marks[6 + example] == marks[12 + example]
            query, positive, negative = (numbers[place + example] for place in (0, 6, 12))
            assert query != positive
            assert query % 3 == positive % 3 != negative % 3


def test_labelled_texts_without_marks_are_plain() -> None:
    rows = [{"text": f"w{n}", "label": n % 2} for n in range(8)]
    data = DataSet(path=write("a.jsonl", rows), prompts=NO_PROMPTS, unique_id=False, negatives=3)
    (batch,) = take(mixture(data, pairs=2, settings=MixtureSettings(no_duplicates=False)), 1)
    assert batch.texts is not None
    assert set(batch.texts) <= {f"w{n}" for n in range(8)}
    assert batch.owner.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_label_with_one_frequent_text_still_gives_another_text_as_positive() -> None:
    rows = [{"text": "w1", "label": "x"}] * 200 + [{"text": f"w{n}", "label": n % 2} for n in range(2, 9)]
    rows += [{"text": "w9", "label": "x"}]
    data = DataSet(path=write("a.jsonl", rows), prompts=NO_PROMPTS, unique_id=False)
    source = mixture(data, pairs=2, settings=MixtureSettings(no_duplicates=False))
    for batch in take(source, 100):
        assert batch.texts is not None
        assert all(batch.texts[place] != batch.texts[2 + place] for place in range(2))


def test_several_positives_and_negatives_take_turns_over_the_epochs() -> None:
    rows = [
        {"query": f"w{n}", "pos": [f"p{n}{x}" for x in "abc"], "neg": [f"n{n}{x}" for x in "abcde"]}
        for n in range(4)
    ]
    data = DataSet(path=write("a.jsonl", rows), prompts=NO_PROMPTS, negatives=2)
    used: dict[str, Counter[str]] = {}
    for batch in take(mixture(data), 15):
        assert batch.texts is not None
        for place, text in enumerate(batch.texts[4:8]):
            used.setdefault(batch.texts[place] + "p", Counter())[text] += 1
        for owner, text in zip(batch.owner, batch.texts[8:], strict=True):
            used.setdefault(batch.texts[owner] + "n", Counter())[text] += 1
    starts = [batch.texts[8:12] for batch in take(mixture(data), 2) if batch.texts is not None]
    assert not set(starts[0]) & set(starts[1])  # an epoch goes on where the one before stopped
    for n in range(4):
        assert used[f"w{n}p"] == {f"p{n}{x}": 5 for x in "abc"}
        assert used[f"w{n}n"] == {f"n{n}{x}": 6 for x in "abcde"}


def test_no_negatives_are_taken_where_none_are_wanted() -> None:
    rows = [{"query": f"w{n}", "pos": f"p{n}", "neg": [f"n{n}"]} for n in range(4)]
    data = DataSet(path=write("a.jsonl", rows), prompts=NO_PROMPTS, negatives=0)
    assert len(take(mixture(data), 1)[0].owner) == 0


def test_truncated_texts_and_lost_tokens_are_counted() -> None:
    rows = [{"anchor": f"w{n}", "positive": f"w{n} " + "x " * (n + 4)} for n in range(4)]
    source = mixture(DataSet(path=write("a.jsonl", rows), prompts=NO_PROMPTS))
    assert source.counts["a"].texts == 0
    (batch,) = take(source, 1)
    counts = source.counts["a"]
    # 7, 8, 9 and 10 tokens with the special ones; 8 fit.
    assert (counts.truncated, counts.lost_tokens) == (2, 3)
    assert (counts.batches, counts.examples, counts.texts, counts.tokens) == (1, 4, 8, len(batch.ids))


def test_a_prompt_is_dropped_from_each_text_by_its_own_coin() -> None:
    prompts = RolePrompts(query=PromptText(text="say "), passage="document")
    data = DataSet(path=write("a.jsonl", pairs(400)), prompts=prompts, drop_prompts=0.25)
    source = mixture(data, pairs=400, leave_out_prompts=True)
    (batch,) = take(source, 1)
    is_bare = batch.prompt_tokens == 0
    starts = np.cumsum(batch.lengths) - batch.lengths
    assert np.array_equal(batch.ids[starts + 1] >= 9, is_bare)  # after <s> a word and not a prompt
    of_queries, of_passages = is_bare[:400], is_bare[400:]
    assert source.counts["a"].without_prompt == is_bare.sum()
    # Four standard deviations of 400 coins.
    assert of_queries.mean() == pytest.approx(0.25, abs=0.087)
    assert of_passages.mean() == pytest.approx(0.25, abs=0.087)
    assert (of_queries & of_passages).mean() == pytest.approx(0.0625, abs=0.049)


@pytest.mark.parametrize(("probability", "bare"), [(0.0, 0), (1.0, 8)])
def test_prompts_are_always_or_never_dropped_at_the_ends(probability: float, bare: int) -> None:
    prompts = RolePrompts(query="query", passage="document")
    data = DataSet(path=write("a.jsonl", pairs(4)), prompts=prompts, drop_prompts=probability)
    source = mixture(data)
    take(source, 1)
    assert source.counts["a"].without_prompt == bare


# The order of the examples.


def test_an_epoch_holds_every_row_once_and_each_epoch_has_its_own_order() -> None:
    data = DataSet(path=write("a.jsonl", pairs(40)), prompts=NO_PROMPTS)
    source = mixture(data)
    assert source.batches_per_epoch == 10
    batches = [queries(batch) for batch in take(source, 30)]
    epochs = [[text for batch in batches[start : start + 10] for text in batch] for start in (0, 10, 20)]
    assert all(sorted(epoch) == sorted(f"w{n} a" for n in range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_seed_decides_the_order() -> None:
    data = DataSet(path=write("a.jsonl", pairs(40)), prompts=NO_PROMPTS)
    one, same, other = (take(mixture(data, seed=seed), 5) for seed in (1, 1, 2))
    assert all(map(equal, one, same))
    assert not any(map(equal, one, other))


def test_the_order_does_not_depend_on_how_the_rows_are_stored() -> None:
    write("a.jsonl", pairs(40))
    csv = "".join(f"{row['anchor']},{row['positive']}\n" for row in pairs(40))
    Path("a.csv").write_text("anchor,positive\n" + csv)
    one, other = (take(mixture(DataSet(path=path, prompts=NO_PROMPTS)), 12) for path in ("a.jsonl", "a.csv"))
    assert all(map(equal, one, other))


def test_ranks_share_each_batch_out() -> None:
    rows = [{"query": f"w{n}", "pos": f"p{n}", "neg": [f"n{n}"] * (n % 3)} for n in range(40)]
    data = DataSet(path=write("a.jsonl", rows), prompts=NO_PROMPTS, negatives=2)
    whole = take(mixture(data, pairs=8), 6)
    parts = [take(mixture(data, pairs=8, rank=rank, ranks=4), 6) for rank in range(4)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert [share.pairs for share in shares] == [2, 2, 2, 2]
        assert queries(batch) == [text for share in shares for text in queries(share)]
        assert batch.owner.tolist() == [
            2 * rank + owner for rank, share in enumerate(shares) for owner in share.owner.tolist()
        ]


def test_a_data_set_smaller_than_a_batch_has_smaller_batches_and_says_so() -> None:
    heard: list[str] = []
    data = DataSet(path=write("a.jsonl", pairs(7)), prompts=NO_PROMPTS)
    source = mixture(data, pairs=64, ranks=2, notice=heard.append)
    assert source.members[0].pairs == 6
    assert heard == ["a: batches of 6 instead of 64, for there are 7 usable rows"]


def test_rejected_rows_are_told_with_the_first_of_them_and_where_all_are() -> None:
    heard: list[str] = []
    rows = [*pairs(3), {"anchor": "same", "positive": "same"}]
    source = mixture(DataSet(path=write("a.jsonl", rows), prompts=NO_PROMPTS), pairs=3, notice=heard.append)
    (folder,) = Path("cache").iterdir()
    assert heard == [
        "a: 1 of 4 rows rejected, the first: a.jsonl:4: the positive equals the query; "
        f"all are in {folder}/rejects.jsonl"
    ]
    assert source.rows[0].rejects_path.read_bytes().count(b"\n") == 1


# No text twice in a batch.


def repeats(batch: TrainingBatch) -> int:
    texts = batch.hashes[: 2 * batch.pairs].tolist()
    return len(texts) - len(set(texts))


def test_no_batch_holds_a_text_twice_where_the_data_allow_it() -> None:
    rows = [{"anchor": f"w{n}", "positive": f"p{n // 5}"} for n in range(200)]
    data = DataSet(path=write("a.jsonl", rows), prompts=NO_PROMPTS)
    source = mixture(data, pairs=16)
    batches = take(source, 50)
    assert [repeats(batch) for batch in batches] == [0] * 50
    assert source.draws["a"].repeated == 0
    seen = Counter(text for batch in batches for text in queries(batch))
    assert seen.total() == 800
    assert set(seen) == {f"w{n}" for n in range(200)}
    # Without the rule there are repeats: the data can show the difference.
    plain = mixture(data, pairs=16, settings=MixtureSettings(no_duplicates=False))
    assert sum(map(repeats, take(plain, 50))) > 50


def test_a_hard_negative_is_nobodys_positive_in_its_batch() -> None:
    rows = [{"anchor": f"w{n}", "positive": f"p{n}", "negative": f"p{(n + 1) % 40}"} for n in range(40)]
    source = mixture(DataSet(path=write("a.jsonl", rows), prompts=NO_PROMPTS), pairs=8)
    for batch in take(source, 20):
        own, negatives = np.split(batch.hashes, [2 * batch.pairs])
        assert not set(own.tolist()) & set(negatives.tolist())


def grid(queries: int, positives: int) -> list[dict[str, Any]]:
    """Every query with every positive, so that an example can be kept waiting by two others."""
    return [{"anchor": f"w{q}", "positive": f"p{p}"} for q in range(queries) for p in range(positives)]


@pytest.mark.parametrize(
    ("rows", "share"),
    [(grid(1, 300) + pairs(100, first=10), 0.6), (grid(12, 12), 0.01)],
    ids=["one query", "a grid"],
)
def test_repeats_that_cannot_be_kept_apart_are_counted_and_nothing_spins(
    rows: list[dict[str, Any]], share: float
) -> None:
    source = mixture(DataSet(path=write("a.jsonl", rows), prompts=NO_PROMPTS), pairs=8)
    batches = take(source, 200)
    state = source.draws["a"]
    assert 0 < state.repeated <= share * 1600
    # An example that repeats something repeats its query, its positive or both.
    assert state.repeated <= sum(map(repeats, batches)) <= 2 * state.repeated
    assert len(state.waiting) <= 4 * 8
    # Every draw was used or waits.
    assert state.drawn == 200 * 8 + len(state.waiting) + 8 * state.without_negatives


def test_batches_without_anything_to_tell_a_positive_from_are_left_out_and_counted() -> None:
    rows = [{"anchor": "w1", "positive": f"p{n}"} for n in range(12)] + pairs(1, first=10)
    data = DataSet(path=write("a.jsonl", rows), prompts=NO_PROMPTS)
    source = mixture(data, pairs=2)
    batches = take(source, 6)
    assert all(len(set(queries(batch))) == 2 for batch in batches)
    assert source.draws["a"].without_negatives > 0
    # Losses that compare nothing within a batch have use for all of them.
    everything = mixture(data, pairs=2, needs_negatives=False)
    take(everything, 6)
    assert everything.draws["a"].without_negatives == 0


# Several data sets.


def three(**keys: Sequence[Any]) -> list[DataSet]:
    return [
        DataSet(
            path=write(f"{name}.jsonl", pairs(size)),
            prompts=NO_PROMPTS,
            **{key: values[number] for key, values in keys.items()},
        )
        for number, (name, size) in enumerate({"a": 160, "b": 40, "c": 10}.items())
    ]


def shares(source: Mixture) -> list[float]:
    return [member.share for member in source.members]


def test_every_batch_is_of_one_data_set_and_shares_are_kept_closely() -> None:
    source = mixture(*three(weight=[5.0, 3.0, 2.0]))
    names = [batch.dataset for batch in take(source, 1000)]
    counts = Counter(names)
    assert [counts[name] for name in "abc"] == [pytest.approx(share, abs=3) for share in (500, 300, 200)]
    # Also in every part, which independent draws would miss by 16.
    assert max(abs(names[start : start + 100].count("a") - 50) for start in range(900)) <= 3
    assert {name: count.batches for name, count in source.counts.items()} == counts


def test_a_weight_of_zero_leaves_a_data_set_out() -> None:
    source = mixture(*three(weight=[1.0, 0.0, 1.0]))
    assert {batch.dataset for batch in take(source, 200)} == {"a", "c"}


def test_shares_follow_the_size_to_the_power_of_one_by_temperature() -> None:
    assert shares(mixture(*three())) == pytest.approx([160 / 210, 40 / 210, 10 / 210])
    warm = mixture(*three(), settings=MixtureSettings(temperature=2.0))
    assert shares(warm) == pytest.approx(np.sqrt([160, 40, 10]) / np.sqrt([160, 40, 10]).sum())
    even = mixture(*three(), settings=MixtureSettings(temperature=float("inf")))
    assert shares(even) == pytest.approx([1 / 3] * 3)


def test_token_budgets_are_used_up_together() -> None:
    # An example of `a` has 2 x 4 tokens, one of `long` 2 x 8.
    long = [{"anchor": f"w{n} " + "x " * 5, "positive": f"p{n} " + "y " * 5} for n in range(100)]
    data = [
        DataSet(path=write("a.jsonl", pairs(100)), prompts=NO_PROMPTS, tokens=8000),
        DataSet(path=write("long.jsonl", long), prompts=NO_PROMPTS, tokens=4000),
    ]
    source = mixture(*data)
    assert source.planned_batches == 8000 // 32 + round(4000 / 64)
    take(source, source.planned_batches)
    assert source.counts["a"].tokens == pytest.approx(8000, abs=3 * 32)
    assert source.counts["long"].tokens == pytest.approx(4000, abs=3 * 64)


def test_a_data_set_may_have_its_own_batch_size() -> None:
    source = mixture(*three(pairs=[8, None, 2]))
    sizes = {batch.dataset: batch.pairs for batch in take(source, 100)}
    assert sizes == {"a": 8, "b": 4, "c": 2}


# Resuming.


@pytest.fixture
def mixed() -> list[DataSet]:
    repeated = [{"anchor": f"w{n % 7}", "positive": f"p{n}", "negative": f"n{n}"} for n in range(60)]
    labelled = [{"text": f"w{n}", "label": n % 5} for n in range(50)]
    scored = [{"sentence1": f"w{n}", "sentence2": f"p{n}", "score": n} for n in range(30)]
    prompts = RolePrompts(query="query", passage="document")
    return [
        DataSet(path=write("repeated.jsonl", repeated), prompts=prompts, drop_prompts=0.3),
        DataSet(path=write("labelled.jsonl", labelled), prompts=NO_PROMPTS),
        DataSet(path=write("scored.jsonl", scored), prompts=NO_PROMPTS),
    ]


@pytest.mark.parametrize("stop", [0, 1, 7, 33])
def test_a_resumed_mixture_goes_on_to_the_bit(mixed: list[DataSet], stop: int) -> None:
    whole = take(mixture(*mixed), 60)
    first = mixture(*mixed)
    take(first, stop)
    first.close()
    saved = json.loads(json.dumps(first.position))
    resumed = mixture(*mixed, position=saved)
    assert resumed.step == stop
    assert all(map(equal, take(resumed, 60 - stop), whole[stop:]))
    assert resumed.counts == _finished(mixture(*mixed), 60).counts
    assert any(one["draws"]["waiting"] for one in resumed.position["data"].values())


def _finished(source: Mixture, count: int) -> Mixture:
    take(source, count)
    return source


def test_the_position_is_that_of_the_batches_given_and_not_of_those_made_ahead(
    mixed: list[DataSet],
) -> None:
    source = mixture(*mixed)
    iterator = iter(source)
    next(iterator)
    threading.Event().wait(0.2)  # two more are made meanwhile
    assert source.step == 1
    following = next(iterator)
    _close(iterator)
    resumed = mixture(*mixed)
    take(resumed, 1)
    assert equal(take(resumed, 1)[0], following)


def _close(iterator: Iterator[TrainingBatch]) -> None:
    getattr(iterator, "close")()  # noqa: B009  # it is a generator


def test_a_position_fits_another_number_of_ranks(mixed: list[DataSet]) -> None:
    one = mixture(*mixed)
    take(one, 9)
    whole = take(one, 5)
    two = mixture(*mixed, ranks=2)
    take(two, 9)
    parts = [take(mixture(*mixed, rank=rank, ranks=2, position=two.position), 5) for rank in (0, 1)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert queries(batch) == queries(first) + queries(second)


def test_a_position_of_other_data_or_settings_is_refused(mixed: list[DataSet]) -> None:
    source = mixture(*mixed)
    take(source, 3)
    write("scored.jsonl", [{"sentence1": f"w{n}", "sentence2": f"q{n}", "score": n} for n in range(30)])
    with pytest.raises(MismatchError) as error:
        mixture(*mixed, seed=1, pairs=8, position=source.position)
    assert str(error.value) == (
        "the data are not those of the run that is resumed: seed was 0 and is 1; "
        "pairs of repeated was 4 and is 8; pairs of labelled was 4 and is 8; the files or columns of scored "
        "have changed; pairs of scored was 4 and is 8; restore them, or start another run"
    )
    with pytest.raises(MismatchError) as error:
        mixture(*mixed[:2], position=source.position)
    assert str(error.value) == (
        "the data are not those of the run that is resumed: the data sets were repeated, labelled, scored "
        "and are repeated, labelled; restore them, or start another run"
    )


def test_iterating_again_goes_on_and_closing_in_the_middle_is_clean(mixed: list[DataSet]) -> None:
    whole = take(mixture(*mixed), 12)
    source = mixture(*mixed)
    pieces = [batch for _ in range(4) for batch in take(source, 3)]
    assert all(map(equal, pieces, whole))
    iterator = iter(source)
    next(iterator)
    source.close()  # while the thread works ahead


# What cannot be mixed.


def test_what_leaves_nothing_to_learn_from_is_refused() -> None:
    same = write("same.jsonl", [{"anchor": "w1", "positive": f"p{n}"} for n in range(9)])
    assert failure(DataSet(path=same, prompts=NO_PROMPTS)) == (
        "same: all 9 usable rows have the same query and no hard negative, so that there is nothing to tell "
        "a positive from"
    )
    mixture(DataSet(path=same, prompts=NO_PROMPTS), needs_negatives=False).close()
    many = DataSet(path=write("many.jsonl", pairs(9)), prompts=NO_PROMPTS)
    assert failure(many, pairs=1) == (
        "many: a batch of 1 pair without a hard negative has nothing to tell the positive from; "
        "make pairs larger"
    )
    rows = [{"text": f"w{n}", "label": "x"} for n in range(9)]
    assert failure(DataSet(path=write("one.jsonl", rows), prompts=NO_PROMPTS)) == (
        'one: all rows have the label "x"; labelled texts need two labels, of two texts each'
    )


def test_batches_that_never_have_a_negative_end_in_an_error() -> None:
    data = DataSet(
        path=write("a.jsonl", [{"anchor": "w1", "positive": f"p{n}"} for n in range(9)]), prompts=NO_PROMPTS
    )
    rows = open_rows(data, Path("cache"))
    draws = Draws(rows, data, seed=0, size=3, no_duplicates=True, needs_negatives=True, state=DrawState())
    with pytest.raises(GembError) as error:
        draws.batch()
    assert str(error.value) == (
        "a: for 100 epochs the examples of each batch repeated one text, so that there was nothing to tell a "
        "positive from; add other rows, or hard negatives"
    )


def test_sizes_names_and_prompts_that_do_not_fit_are_refused() -> None:
    data = DataSet(path=write("a.jsonl", pairs(9)), prompts=NO_PROMPTS)
    assert failure(data, pairs=5, ranks=2) == "a: 5 pairs a batch cannot be divided by 2 processes"
    assert failure(data, pairs=16, ranks=16) == "a: 9 usable rows are too few for 16 processes"
    assert failure(data, data) == "two data sets are called a; give them names of their own with name:"
    wrong = DataSet(path="a.jsonl", prompts=RolePrompts(query="querry", passage="document"))
    assert failure(wrong) == (
        "a: prompts.query: the model has no prompt 'querry'; it has query, document, and none for no prompt; "
        "did you mean query?"
    )


def test_a_text_in_which_the_tokeniser_finds_nothing_is_named() -> None:
    data = DataSet(
        path=write("a.jsonl", [*pairs(3), {"anchor": "\u200b", "positive": "w5"}]), prompts=NO_PROMPTS
    )
    bare = tokeniser(special=False)
    bare._backend.normalizer = normalizers.Replace("\u200b", " ")
    source = mixture(data, tokeniser=bare)
    with pytest.raises(GembError) as error:
        take(source, 1)
    assert str(error.value) == ("a.jsonl:4: the tokenizer finds no token in '\\u200b'; leave the row out")

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from gemb.errors import MismatchError
from gemb.model.vocabulary import cut_vocabulary
from tests.conftest import DATA

TEXTS = [
    "the lighthouse keeper lights the lamp every evening",
    "a lamp lights the evening; a keeper keeps it",
    "café, naïve, ångström and 42 other words",
    "unhappiness unhappily happier happiest, happy?",
    "海が深い。 the sea is deep 🙂",
    "",
    "   spaces   around   ",
] + [f"number {number} of {number * 7919 % 1000} things" for number in range(80)]
FEW = TEXTS[:6]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]


def trained(kind: str) -> Tokenizer:
    """A tokenizer of each kind, with special tokens around a text."""
    common: dict[str, Any] = {"special_tokens": SPECIAL, "show_progress": False}
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=250, **common)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", **common)
    elif kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **common
        )
    elif kind == "fallback":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        common["special_tokens"] = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=480, limit_alphabet=40, **common)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(**common)
    tokenizer.train_from_iterator(TEXTS, trainer)
    around = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=around)
    tokenizer.add_tokens(["lighthouse keeper", "never seen"])
    return tokenizer


def cut(tokenizer: Tokenizer, texts: list[str], **options: Any) -> tuple[Tokenizer, list[int]]:  # noqa: ANN401
    used = {number for encoding in tokenizer.encode_batch(texts) for number in encoding.ids}
    found = cut_vocabulary(json.loads(tokenizer.to_str()), used, **options)
    return Tokenizer.from_str(json.dumps(found.tokenizer)), list(found.kept)


KINDS = ("wordpiece", "unigram", "bytes", "fallback", "wordlevel")


@pytest.mark.parametrize("kind", KINDS)
def test_texts_get_the_same_tokens_from_fewer(kind: str) -> None:
    before = trained(kind)
    after, kept = cut(before, FEW)
    assert after.get_vocab_size() == len(kept) < before.get_vocab_size()
    for text in FEW:
        assert after.encode(text).tokens == before.encode(text).tokens
        assert [kept[number] for number in after.encode(text).ids] == before.encode(text).ids
        assert after.encode(text, FEW[0]).tokens == before.encode(text, FEW[0]).tokens
        assert after.decode(after.encode(text).ids) == before.decode(before.encode(text).ids)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_stay_and_added_ones_only_where_they_occur(kind: str) -> None:
    after, _ = cut(trained(kind), FEW)
    assert all(after.token_to_id(token) is not None for token in SPECIAL)
    assert after.token_to_id("lighthouse keeper") is not None
    assert after.token_to_id("never seen") is None
    named, _ = cut(trained(kind), FEW, named=["never seen"])
    assert named.token_to_id("never seen") is not None


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bytes", "fallback"])
def test_other_texts_can_still_be_told(kind: str) -> None:
    before = trained(kind)
    after, _ = cut(before, FEW)
    other = "numbered things"
    assert after.encode(other).tokens != before.encode(other).tokens  # else the test shows nothing
    assert "<unk>" not in after.encode(other).tokens
    # "b" is in none of the texts: with a byte fallback it is told by its byte
    pieces = "".join(after.encode(other).tokens[1:-1]).replace("##", "").replace("<0x62>", "b")
    assert pieces.replace("▁", "").replace("Ġ", "") == other.replace(" ", "")


def test_the_lowest_score_stays_because_the_unknown_follows_from_it() -> None:
    # "q" is unknown alone, at 10 below the lowest score: -30.5 - 1 loses against -30, -25 - 1 would win.
    pieces = [("<unk>", 0.0), ("qa", -15.0), ("b", -15.0), ("ab", -1.0), ("rare", -20.5)]
    before = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    after, _ = cut(before, ["qab", "ab"])
    assert before.encode("qab").tokens == ["qa", "b"]
    assert after.encode("qab").tokens == ["qa", "b"]


def test_entries_behind_the_table_go() -> None:
    before = trained("bytes")
    after, kept = cut(before, FEW, rows=before.get_vocab_size() - 2)
    assert after.token_to_id("lighthouse keeper") is None
    assert kept[-1] < before.get_vocab_size() - 2


def test_padding_gets_its_new_id() -> None:
    before = trained("wordlevel")
    number = before.token_to_id("things")
    before.enable_padding(pad_id=number, pad_token="things")
    after, kept = cut(before, ["things"])
    assert json.loads(after.to_str())["padding"]["pad_id"] == kept.index(number or 0)


def test_merges_are_found_in_both_spellings() -> None:
    parsed = json.loads(trained("bytes").to_str())
    parsed["model"]["merges"] = [" ".join(merge) for merge in parsed["model"]["merges"]]
    before = Tokenizer.from_str(json.dumps(parsed))
    used = {number for encoding in before.encode_batch(FEW) for number in encoding.ids}
    after = Tokenizer.from_str(json.dumps(cut_vocabulary(parsed, used).tokenizer))
    assert [after.encode(text).tokens for text in FEW] == [before.encode(text).tokens for text in FEW]


def test_a_kind_that_is_not_known_is_refused() -> None:
    with pytest.raises(MismatchError) as caught:
        cut_vocabulary({"model": {"type": "Syllables", "vocab": {}}}, [])
    assert str(caught.value) == (
        "a tokenizer of the kind Syllables cannot be cut; known are WordPiece, WordLevel, BPE and Unigram"
    )
    with pytest.raises(MismatchError, match="a BPE tokenizer with end_of_word_suffix cannot be cut"):
        cut_vocabulary(
            {"model": {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "</w>"}}, []
        )


@pytest.fixture(scope="module")
def gemma() -> Any:  # noqa: ANN401
    file = DATA / "models/gemma3-tokenizer/tokenizer.json"
    if not file.exists():
        pytest.skip("needs ../shared/data")
    return json.loads(file.read_text())


@pytest.mark.slow
def test_gemmas_tokenizer_keeps_the_tokens_of_real_texts(gemma: Any) -> None:  # noqa: ANN401
    import gzip

    before = Tokenizer.from_str(json.dumps(gemma))
    with gzip.open(DATA / "text/docs.valid.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"][:4000] for line in file]
    encoded = before.encode_batch(texts)
    found = cut_vocabulary(gemma, {number for one in encoded for number in one.ids}, rows=262_144)
    after = Tokenizer.from_str(json.dumps(found.tokenizer))
    assert 256 < len(found.kept) < 40_000
    assert [one.tokens for one in after.encode_batch(texts)] == [one.tokens for one in encoded]

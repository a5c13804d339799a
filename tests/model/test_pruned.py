import json
from pathlib import Path

import numpy as np
import pytest
import sentence_transformers
import tokenizers
from safetensors.torch import load_file

from gemb import Encoder
from gemb.errors import GembError, MismatchError
from gemb.model.folder import read_folder
from gemb.model.hub import find_model
from gemb.model.pruned import write_pruned
from gemb.text.tokenisation import Tokeniser
from tests.models import random_texts, tiny_folder

TEXTS = random_texts([3, 9, 17, 1, 30], seed=2)
CUTTABLE = (
    "gemma3",
    "gemma2",
    "t5gemma",
    "llama without causality",
    "bert",
    "distilbert",
    "xlm-roberta",
    "modernbert",
)


def encoder(folder: Path) -> Encoder:
    return Encoder.load(folder, threads=1, precision="fp32")


@pytest.mark.parametrize("name", CUTTABLE)
def test_a_cut_model_gives_the_same_vectors_here_and_in_sentence_transformers(
    tmp_path: Path, name: str
) -> None:
    source = tiny_folder(tmp_path / "source", name)
    pruned = write_pruned(read_folder(source), tmp_path / "cut", keep_layers=(0, 2), texts=TEXTS)
    assert pruned.layers == (4, 2)
    assert pruned.vocabulary[1] < pruned.vocabulary[0] == 200
    ours = encoder(tmp_path / "cut").embed(TEXTS, as_="none")
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "cut"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)  # two implementations in fp32
    whole = encoder(source).embed(TEXTS, as_="none")
    assert np.abs(ours - whole).max() > 0.01  # the layers that went did something


def test_of_many_tokens_the_most_frequent_stay_and_rare_words_become_pieces(tmp_path: Path) -> None:
    source = read_folder(find_model("minilm"))
    texts = ["the model reads the words"] * 3 + ["photosynthesis"]
    whole = write_pruned(source, tmp_path / "whole", texts=texts)
    fewer = write_pruned(source, tmp_path / "fewer", texts=texts, largest=6)  # [CLS], [SEP] and four words
    assert fewer.vocabulary[1] == whole.vocabulary[1] - 3
    pieces = {}
    for name in ("whole", "fewer"):
        tokeniser = Tokeniser.load(tmp_path / name, max_tokens=64, lower_case=True)
        pieces[name] = [int(tokeniser.encode([text]).lengths[0]) for text in texts[2:]]
        unknown = tokenizers.Tokenizer.from_file(str(tmp_path / name / "tokenizer.json")).encode(texts[3])
        assert "[UNK]" not in unknown.tokens
    assert pieces["whole"] == [7, 5]
    assert pieces["fewer"] == [7, 2 + len("photosynthesis")]


@pytest.mark.parametrize("name", ["gemma3", "bert", "roberta", "embedding_gemma2"])
def test_fewer_entries_change_no_vector_of_the_texts(tmp_path: Path, name: str) -> None:
    source = tiny_folder(tmp_path / "source", name)
    pruned = write_pruned(read_folder(source), tmp_path / "cut", texts=TEXTS)
    assert pruned.parameters[1] < pruned.parameters[0]
    for as_ in ("none", "query", "document"):
        cut, whole = encoder(tmp_path / "cut"), encoder(source)
        np.testing.assert_array_equal(cut.embed(TEXTS, as_=as_), whole.embed(TEXTS, as_=as_))


def test_layers_keep_their_weights_and_their_kind(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", "gemma3")
    write_pruned(read_folder(source), tmp_path / "cut", keep_layers=(1, 2))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "cut/model.safetensors")
    for name, tensor in after.items():
        old = name.replace("layers.1.", "layers.2.").replace("layers.0.", "layers.1.")
        assert tensor.equal(before[old]), name
    kinds = [json.loads((place / "config.json").read_text()) for place in (source, tmp_path / "cut")]
    assert kinds[1]["layer_types"] == kinds[0]["layer_types"][1:3]
    assert len(set(kinds[1]["layer_types"])) == 2
    assert kinds[1]["num_hidden_layers"] == 2
    assert len(after) < len(before)


def test_kinds_of_layers_that_only_a_pattern_tells_are_written_out(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", "gemma3", config={"layer_types": None})
    write_pruned(read_folder(source), tmp_path / "cut", keep_layers=(0, 2, 3))
    config = json.loads((tmp_path / "cut/config.json").read_text())
    # every third layer of the four sees the whole text
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]


def test_ids_that_files_name_are_the_new_ones(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", "bert", config={"pad_token_id": 0, "sep_token_id": 199})
    write_pruned(read_folder(source), tmp_path / "cut", texts=["w5 w9"])
    config = json.loads((tmp_path / "cut/config.json").read_text())
    tokenizer = json.loads((tmp_path / "cut/tokenizer.json").read_text())["model"]["vocab"]
    assert config["vocab_size"] == len(tokenizer)
    assert (config["pad_token_id"], config["sep_token_id"]) == (0, tokenizer["w199"])
    assert {"w5", "w9", "w7", "w11", "w199", "<pad>", "</s>", "<s>", "<unk>"} <= set(tokenizer)  # prompts too
    assert "w100" not in tokenizer


def test_dense_modules_are_taken_along(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", "bert", dense=[{"out_features": 96}], layer_norm=True)
    write_pruned(read_folder(source), tmp_path / "cut")
    np.testing.assert_array_equal(encoder(tmp_path / "cut").embed(TEXTS), encoder(source).embed(TEXTS))


def test_minilm_is_cut_to_a_corpus_whose_texts_keep_their_tokens(tmp_path: Path) -> None:
    texts = ["The keeper lights the lamp.", "Unhappily, nobody saw it; 42 ships passed!", "naïve café"]
    source = Path(find_model("minilm"))
    pruned = write_pruned(read_folder(source), tmp_path / "cut", texts=texts)
    assert pruned.vocabulary[0] == 30_522
    assert pruned.vocabulary[1] < 2_500  # 1,994 entries are single characters
    cut = encoder(tmp_path / "cut")
    np.testing.assert_array_equal(cut.embed(texts), encoder(source).embed(texts))
    assert cut.embed(["zebras"]).shape == (1, 384)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("bert", {"keep_layers": (2, 1)}, GembError,
         "keep_layers is [2, 1]; give each layer once, ascending from 0"),
        ("bert", {"keep_layers": (0, 4)}, MismatchError,
         "keep_layers has 4, but {source} has layers 0 to 3"),
        ("embedding_gemma2", {"keep_layers": (0,)}, MismatchError,
         "{source}: the layers of embedding_gemma2_text share tensors and cannot be cut; "
         "leave out keep_layers"),
        ("bert", {"texts": []}, GembError,
         "keep_vocab gives no text; name files with texts in them, or leave it out"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_told_and_nothing_is_left(
    tmp_path: Path, name: str, options: dict[str, object], error: type[GembError], message: str
) -> None:
    source = tiny_folder(tmp_path / "source", name)
    with pytest.raises(error) as caught:
        write_pruned(read_folder(source), tmp_path / "cut", **options)  # type: ignore[arg-type]
    assert str(caught.value) == message.format(source=source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_that_exists_is_not_replaced(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", "bert")
    with pytest.raises(GembError, match="exists; choose another path for the model, or move it away"):
        write_pruned(read_folder(source), source, keep_layers=(0,))

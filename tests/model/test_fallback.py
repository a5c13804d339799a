"""Families without a packed path run through transformers, exactly, safely, and said aloud."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gemb.device import processor
from gemb.errors import Exit, MismatchError, UnavailableError
from gemb.model.encoder import PackedEncoder
from gemb.model.fallback import TransformersBackbone
from gemb.model.folder import read_folder
from gemb.model.kernels import Kernels
from gemb.model.layout import Layout
from tests.models import SORTS, VOCABULARY, packed, random_texts, tiny_folder, tiny_model

TEXTS = random_texts((1, 5, 5, 20, 44, 60, 2, 5))
CPU = Kernels("cpu", torch.float32)


@pytest.mark.parametrize("name", [name for name in SORTS if name != "embedding_gemma2"])
def test_every_family_runs_through_transformers_as_it_does_packed(name: str, tmp_path: Path) -> None:
    folder = read_folder(tiny_folder(tmp_path / "model", name))
    ids, lengths, _ = packed(folder.path, TEXTS)
    layout = Layout.of(lengths)
    with torch.inference_mode():
        states = TransformersBackbone(folder, CPU).forward(torch.from_numpy(ids).long(), layout)
    ours = PackedEncoder(folder, CPU).states(ids, lengths)
    torch.testing.assert_close(states, ours, atol=2e-5, rtol=0)


def test_bf16_is_near(tmp_path: Path) -> None:
    if not processor().has_bf16:
        pytest.skip("this processor has no bf16 instructions")
    folder = read_folder(tiny_folder(tmp_path / "model", "mpnet"))
    ids, lengths, _ = packed(folder.path, TEXTS)
    exact, near = (
        PackedEncoder(folder, Kernels("cpu", dtype)).forward(ids, lengths)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert near.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, near).min() >= 0.9999


def test_filling_tokens_get_zeros(tmp_path: Path) -> None:
    folder = read_folder(tiny_folder(tmp_path / "model", "mpnet"))
    layout = Layout.of(np.array([3], dtype=np.int32), least_rows=16)
    with torch.inference_mode():
        states = TransformersBackbone(folder, CPU).forward(torch.arange(10, 26), layout)
    assert states.shape == (16, 64)
    assert states[3:].abs().max() == 0 < states[:3].abs().min()


def test_the_encoder_of_an_encoder_decoder_runs_alone(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "bert")
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    torch.manual_seed(4)
    model = transformers.T5Model(config).eval()  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    ids, lengths, _ = packed(folder, TEXTS)
    encoder = PackedEncoder(read_folder(folder), CPU)
    assert encoder.notes == [
        "runs through transformers' own module, slower: model type 't5' is not among its families"
    ]
    with torch.no_grad():
        theirs = model.encoder(torch.from_numpy(ids[: lengths[0]]).long()[None]).last_hidden_state[0]
    torch.testing.assert_close(encoder.states(ids, lengths)[: lengths[0]], theirs, atol=2e-5, rtol=0)


def test_settings_of_the_transformer_module_hold(tmp_path: Path) -> None:
    """sentence_bert_config.json may override keys of config.json, and the override counts."""
    folder = tiny_folder(tmp_path / "model", "mpnet")
    settings = {"max_seq_length": 48, "do_lower_case": False, "config_args": {"num_hidden_layers": 1}}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings), "utf-8")
    ids, lengths, _ = packed(folder, TEXTS)
    whole = tiny_model("mpnet")
    with torch.no_grad():
        text = torch.from_numpy(ids[: lengths[0]]).long()[None]
        states = whole(text, output_hidden_states=True).hidden_states
    ours = PackedEncoder(read_folder(folder), CPU).states(ids, lengths)[: lengths[0]]
    torch.testing.assert_close(ours, states[1][0], atol=2e-5, rtol=0)


def test_transformers_keeps_quiet_and_its_loudness_comes_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = read_folder(tiny_folder(tmp_path / "model", "mpnet"))
    level = transformers.logging.get_verbosity()
    with caplog.at_level(logging.DEBUG):
        TransformersBackbone(folder, CPU)
    assert capfd.readouterr() == ("", "")
    assert transformers.logging.get_verbosity() == level


def test_an_attention_that_is_not_installed_here_is_not_asked_for(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "mpnet", config={"_attn_implementation": "flash_attention_2"})
    ids, lengths, _ = packed(folder, TEXTS)
    plain = tiny_folder(tmp_path / "plain", "mpnet")
    ours, theirs = (PackedEncoder(read_folder(one), CPU).forward(ids, lengths) for one in (folder, plain))
    assert torch.equal(ours, theirs)


# --- what is refused


def refused(folder: Path, **config: Any) -> str:  # noqa: ANN401
    """The message about a folder whose config.json has these keys besides."""
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**settings, **config}), "utf-8")
    with pytest.raises(MismatchError) as caught:
        PackedEncoder(read_folder(folder), CPU)
    assert caught.value.exit_code == Exit.MISMATCH
    return str(caught.value)


def test_an_unknown_model_type_is_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "bert")
    assert refused(folder, model_type="my-bert") == (
        f"{folder / 'config.json'}: the model type 'my-bert' is known neither to gemb nor to the installed "
        "transformers; use a model of another family, or a newer transformers"
    )


def test_code_of_the_author_is_never_run(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "bert")
    (folder / "modeling.py").write_text("raise SystemExit('code of the folder was run')")
    code = {"AutoConfig": "modeling.MyConfig", "AutoModel": "modeling.MyModel"}
    assert refused(folder, model_type="my-bert", auto_map=code) == (
        f"{folder / 'config.json'}: the model type 'my-bert' is known neither to gemb nor to the installed "
        "transformers; it needs code of its author (auto_map), which gemb never runs; "
        "use a model of another family, or a newer transformers"
    )


def test_a_known_family_with_code_beside_it_runs_without_that_code(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "mpnet")
    (folder / "modeling.py").write_text("raise SystemExit('code of the folder was run')")
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    settings["auto_map"] = {"AutoModel": "modeling.MyModel"}
    (folder / "config.json").write_text(json.dumps(settings), "utf-8")
    read = read_folder(folder)
    assert PackedEncoder(read, CPU).backbone.width == 64
    assert "config.json names code of the folder's author (auto_map); gemb never runs it" in read.notes


def test_an_encoder_decoder_that_cannot_be_split_is_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "bert")
    assert refused(folder, model_type="bart", d_model=64, is_encoder_decoder=True) == (
        f"{folder / 'config.json'}: the model type 'bart' is an encoder-decoder whose encoder transformers "
        "does not load alone; use a folder that holds the encoder only"
    )


def test_missing_tensors_are_not_made_up(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "mpnet")
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if "layer.1.attention" in name and "weight" in name:
            del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError) as caught:
        PackedEncoder(read_folder(folder), CPU)
    assert str(caught.value) == (
        f"{folder} lacks 5 tensors that the model type 'mpnet' needs: "
        "encoder.layer.1.attention.LayerNorm.weight, encoder.layer.1.attention.attn.k.weight, "
        "encoder.layer.1.attention.attn.o.weight, ...; download the model again"
    )


def test_what_transformers_cannot_load_is_told_in_one_line(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "mpnet")
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"] = torch.zeros(VOCABULARY, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnavailableError) as caught:
        PackedEncoder(read_folder(folder), CPU)
    message = str(caught.value)
    assert message.startswith(f"{folder} cannot be loaded by transformers: ")
    assert message.endswith("; load it there by hand to see the whole message")
    assert "\n" not in message


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "mpnet")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that would run code")
    with pytest.raises(UnavailableError, match=r"only as pickle \(pytorch_model\.bin\)"):
        PackedEncoder(read_folder(folder), CPU)

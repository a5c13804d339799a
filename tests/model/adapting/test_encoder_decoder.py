"""Decoders as encoder-decoders: each half is what it was made of, and the encoder comes out again."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutput

from gemb.errors import GateError, GembError, MachineError, MismatchError, UnavailableError
from gemb.model.adapting import REPORT, Wanted, encoder_decoder_maps, encoder_decoder_proofs
from gemb.model.adapting import plan as plan_encoder
from gemb.model.adapting import write as write_encoder
from gemb.model.adapting.encoder_decoder import EncoderDecoder, plan, write
from gemb.model.adapting.streaming import new, whole, write_pieces
from gemb.model.folder import read_folder
from gemb.model.weights import read_header
from tests.models import VOCABULARY, _write_tokenizer, tiny_model

Made = Callable[[str], tuple[Path, Path, EncoderDecoder]]
"""The encoder's source, the encoder-decoder's folder and what was seen, by its name below."""
SORTS = {"t5gemma": "gemma2 as a decoder", "t5gemma2": "gemma3 as a decoder"}
NAMES = ("t5gemma", "t5gemma2", "unbalanced")
SAME = 1e-6  # logits and states are about 1: the same sums, in another process or order
OTHER_WIDTH: Mapping[str, Any] = {"hidden_size": 48, "num_hidden_layers": 3, "layer_types": None}


def decoder(place: Path, sort: str, *, dtype: str = "float32", shard: str = "1GB", **settings: Any) -> Path:  # noqa: ANN401
    """A tiny decoder as people publish it, with its head; random anew where `settings` make it another."""
    model = tiny_model(sort)
    config = deepcopy(model.config)  # a model made of it writes its dtype there
    if settings:
        config = type(config)(**{**config.to_dict(), **settings})
        torch.manual_seed(1)
    causal: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    if not settings:
        causal.base_model.load_state_dict(model.state_dict())
    causal.tie_weights()
    causal.to(getattr(torch, dtype)).save_pretrained(place, max_shard_size=shard)
    _write_tokenizer(place, 0, special=True)
    return place


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Encoder-decoders of tiny decoders, each made once."""
    place = tmp_path_factory.mktemp("adapted")

    @cache
    def source(kind: str) -> Path:
        return decoder(place / f"{kind}-source", SORTS[kind])

    @cache
    def folders(name: str) -> tuple[Path, Path, EncoderDecoder]:
        its = source("t5gemma" if name == "unbalanced" else name)
        other = None
        if name == "unbalanced":
            small = decoder(place / "small", SORTS["t5gemma"], **OTHER_WIDTH)
            other = read_folder(small)
        return its, place / name, write(plan(read_folder(its), other), place / name)

    return folders


def loaded(folder: Path, **options: Any) -> Any:  # noqa: ANN401  # any model class
    model: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval().requires_grad_(False)


def source_of(folder: Path) -> Any:  # noqa: ANN401
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def changed(folder: Path, copy: Path, **keys: Any) -> Path:  # noqa: ANN401  # JSON values
    """A copy of `folder` with other keys in its config.json."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text("utf-8"))
    (copy / "config.json").write_text(json.dumps({**config, **keys}), "utf-8")
    return copy


IDS = torch.randint(100, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(3))
TEXT = torch.randint(100, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(4))


def causal_masks(config: Any, length: int) -> dict[str, Any]:  # noqa: ANN401
    """The decoder's masks as transformers makes them."""
    given = {
        "config": config,
        "inputs_embeds": torch.zeros(1, length, config.hidden_size),
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": torch.arange(length)[None],
        "allow_is_causal_skip": False,
    }
    return {
        "full_attention": create_causal_mask(**given),
        "sliding_attention": create_sliding_window_causal_mask(**given),
    }


# --- each half is what it was made of (method of T5Gemma, arXiv 2504.06225, section 3)


@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_under_the_causal_mask_gives_the_states_of_its_source(name: str, made: Made) -> None:
    its, target, _ = made(name)
    source = source_of(its).model
    encoder = loaded(target).get_encoder()
    masks = causal_masks(source.config, IDS.shape[1])
    causal = encoder(input_ids=IDS, attention_mask=masks).last_hidden_state
    expected = source(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(causal, expected, atol=SAME, rtol=0)
    assert (encoder(input_ids=IDS).last_hidden_state - expected).abs().max() > 0.1


@pytest.mark.parametrize("kind", SORTS)
def test_of_one_layer_without_a_window_only_the_last_state_stays(kind: str, tmp_path: Path) -> None:
    its = decoder(tmp_path / "its", SORTS[kind], num_hidden_layers=1, layer_types=["full_attention"])
    write(plan(read_folder(its)), tmp_path / "out")
    states = loaded(tmp_path / "out").get_encoder()(input_ids=IDS).last_hidden_state
    expected = source_of(its).model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(states[:, -1], expected[:, -1], atol=SAME, rtol=0)
    assert ((states - expected)[:, :-1].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("silenced", ["o_proj", "post_cross_attn_layernorm"])
@pytest.mark.parametrize("name", ["t5gemma", "unbalanced"])
def test_the_decoder_without_cross_attention_gives_the_logits_of_its_source(
    name: str, silenced: str, made: Made
) -> None:
    its, target, _ = made(name)
    model = loaded(target)
    for layer in model.get_decoder().layers:
        if silenced == "o_proj":
            layer.cross_attn.o_proj.weight.zero_()
        else:
            layer.post_cross_attn_layernorm.weight.fill_(-1)  # the stored gain lacks 1
    source = source_of(its.parent / "small" if name == "unbalanced" else its)
    logits = model(input_ids=TEXT, decoder_input_ids=IDS).logits
    torch.testing.assert_close(logits, source(input_ids=IDS).logits, atol=SAME, rtol=0)


def test_merged_attention_with_no_key_of_the_encoder_gives_the_logits_of_the_source(made: Made) -> None:
    its, target, _ = made("t5gemma2")
    model = loaded(target)
    states = BaseModelOutput(last_hidden_state=model.get_encoder()(input_ids=TEXT).last_hidden_state)
    nothing = torch.zeros_like(TEXT)
    logits = model(encoder_outputs=states, attention_mask=nothing, decoder_input_ids=IDS).logits
    expected = source_of(its)(input_ids=IDS).logits
    torch.testing.assert_close(logits, expected, atol=3e-5, rtol=0)  # sums over more keys
    assert (model(encoder_outputs=states, decoder_input_ids=IDS).logits - expected).abs().max() > 0.1


def test_cross_attention_starts_as_the_self_attention_beside_it_and_shares_nothing(made: Made) -> None:
    layers = loaded(made("t5gemma")[1]).get_decoder().layers
    for layer in layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            its, own = (getattr(part, name).weight for part in (layer.cross_attn, layer.self_attn))
            assert torch.equal(its, own)
            its.add_(1)
            assert not torch.equal(its, own)
        for place in ("pre", "post"):
            its, own = (getattr(layer, f"{place}_{part}_attn_layernorm").weight for part in ("cross", "self"))
            assert torch.equal(its, own)


def test_cross_attention_to_its_own_input_is_self_attention_without_positions(made: Made) -> None:
    model = loaded(made("t5gemma")[1])
    stream = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
    unturned = (torch.ones(1, 9, 16), torch.zeros(1, 9, 16))
    for layer in model.get_decoder().layers:
        across, _ = layer.cross_attn(stream, None, stream)
        itself, _ = layer.self_attn(stream, unturned, None)
        assert torch.equal(across, itself)


def test_merged_attention_is_a_mixture_of_self_and_cross_attention(made: Made) -> None:
    # out = w * self + (1 - w) * cross, w the share of the weights that falls on the decoder's own keys.
    model = loaded(made("t5gemma2")[1], attn_implementation="eager").double()
    attention = model.get_decoder().layers[2].self_attn
    attention.o_proj.weight.copy_(torch.eye(64))
    random = torch.Generator().manual_seed(2)
    stream, text = (torch.randn(1, length, 64, dtype=torch.float64, generator=random) for length in (7, 5))
    turned = model.get_decoder().rotary_emb(stream, torch.arange(7)[None], "full_attention")
    nothing = torch.finfo(torch.float64).min
    masks = torch.full((2, 7, 12), nothing, dtype=torch.float64)
    masks[0, :, :7].triu_(1)  # of the decoder's own keys
    masks[1, :, 7:] = 0  # of the encoder's

    def attended(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, weights, _ = attention(stream, turned, mask[None, None], text)
        return output.view(7, 4, 16), weights[0].sum(-1).T

    both, share = attended(masks.amax(0))
    alone, _ = attended(masks[0])
    across, _ = attended(masks[1])
    mixture = share[..., None] * alone + (1 - share)[..., None] * across
    torch.testing.assert_close(both, mixture, atol=1e-6, rtol=0)  # its softmax is in fp32
    assert 0.01 < share.min() < share.max() < 0.99


def test_positions_of_the_encoder_are_not_turned_in_merged_attention(made: Made) -> None:
    model = loaded(made("t5gemma2")[1])
    states = model.get_encoder()(input_ids=TEXT).last_hidden_state

    def said(shift: int, mask: torch.Tensor) -> torch.Tensor:
        output = model.get_decoder()(
            input_ids=IDS,
            position_ids=torch.arange(IDS.shape[1])[None] + shift,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            use_cache=False,
        )
        return torch.as_tensor(output.last_hidden_state)

    nothing, all_of_it = torch.zeros_like(TEXT), torch.ones_like(TEXT)
    torch.testing.assert_close(said(20, nothing), said(0, nothing), atol=1e-4, rtol=0)
    assert (said(20, all_of_it) - said(0, all_of_it)).abs().max() > 1e-2


def test_three_modules_share_one_table(made: Made) -> None:
    model = loaded(made("t5gemma2")[1])
    parts = (model.get_encoder().get_input_embeddings(), model.get_decoder().embed_tokens)
    tables = [*(part.weight for part in parts), model.lm_head.out_proj.weight]
    assert len({table.data_ptr() for table in tables}) == 1
    assert len({part.eoi_embedding.data_ptr() for part in parts}) == 1


# --- two models


def test_halves_of_different_widths_get_new_cross_attention_of_both(made: Made) -> None:
    _, target, _ = made("unbalanced")
    report = json.loads((target / REPORT).read_text())
    random = {entry["name"] for entry in report["tensors"] if entry["origin"] == "new, random"}
    assert random == {
        f"model.decoder.layers.{layer}.cross_attn.{part}_proj.weight" for layer in range(3) for part in "qkvo"
    }
    assert (report["balanced"], report["cross_attention_only"]) == (False, 1000)
    model = loaded(target)
    attention = model.get_decoder().layers[1].cross_attn
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (32, 64)
    assert (attention.q_proj.weight.shape, attention.o_proj.weight.shape) == ((64, 48), (48, 64))
    numbers = torch.cat([tensor.flatten() for name, tensor in model.state_dict().items() if name in random])
    assert numbers.std().item() == pytest.approx(0.02, rel=0.02)  # initializer_range
    assert report["random_parameters"] == len(numbers)


def test_new_cross_attention_follows_from_the_seed_alone(made: Made, tmp_path: Path) -> None:
    its, target, _ = made("unbalanced")
    small = read_folder(its.parent / "small")
    for name, seed in (("again", 42), ("other", 7)):
        write(plan(read_folder(its), small, seed=seed), tmp_path / name)
    first, again, other = (
        load_file(folder / "model.safetensors") for folder in (target, tmp_path / "again", tmp_path / "other")
    )
    key = "model.decoder.layers.{}.cross_attn.k_proj.weight"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[key.format(0)], other[key.format(0)])
    assert not torch.equal(first[key.format(0)], first[key.format(1)])


def test_halves_of_t5gemma_2_may_differ_in_depth(made: Made, tmp_path: Path) -> None:
    its, _, _ = made("t5gemma2")
    small = decoder(tmp_path / "small", SORTS["t5gemma2"], num_hidden_layers=2, layer_types=None)
    file = small / "model.safetensors"
    table = load_file(its / "model.safetensors")["model.embed_tokens.weight"]
    save_file({**load_file(file), "model.embed_tokens.weight": table}, file, metadata={"format": "pt"})
    write(plan(read_folder(its), read_folder(small)), tmp_path / "out")
    assert len(loaded(tmp_path / "out").get_decoder().layers) == 2
    assert json.loads((tmp_path / "out" / REPORT).read_text())["cross_attention_only"] == 0


# --- the folder


@pytest.mark.parametrize("name", NAMES)
def test_every_proof_is_made(name: str, made: Made) -> None:
    _, target, written = made(name)
    seen = written.proofs
    assert seen.encoder_source_difference == seen.saved_difference == 0
    small = [
        seen.decoder_source_difference,
        seen.route_difference,
        seen.padding_difference,
        seen.decoder_padding_difference,
        seen.cache_difference,
    ]
    assert max(small) < 1e-5
    ways = dict(seen.implementations)
    if name == "t5gemma2":
        assert (seen.route_tokens, set(seen.encoder_reaches)) == (4, {"window −3 to +4", "full"})
        assert seen.route_difference_beyond is not None
        assert seen.route_difference_beyond > 1e-3
        assert set(seen.decoder_reaches) == {"window −7 to +0", "full, causal"}
    else:
        assert ways.pop("sdpa").startswith("not offered: T5GemmaForConditionalGeneration does not support")
        assert (seen.route_tokens, seen.route_difference_beyond) == (None, None)
        assert set(seen.encoder_reaches) == {"window ±5", "full"}
        assert set(seen.decoder_reaches) == {"window −4 to +0", "full, causal"}
    assert set(ways.values()) == {"bidirectional"}
    assert json.loads((target / REPORT).read_text())["proofs"]["cache_difference"] == seen.cache_difference


@pytest.mark.parametrize("name", NAMES)
def test_layer_by_layer_the_verdicts_are_those_of_the_whole(name: str, made: Made, tmp_path: Path) -> None:
    its, _, whole_model = made(name)
    other = read_folder(its.parent / "small") if name == "unbalanced" else None
    adaptation = plan(read_folder(its), other)
    seen = write(adaptation, tmp_path / "out", memory_bytes=adaptation.proving_bytes - 1).proofs
    assert (seen.by_layer, whole_model.proofs.by_layer) == (True, False)
    for figure in ("implementations", "encoder_reaches", "decoder_reaches", "route_tokens"):
        assert getattr(seen, figure) == getattr(whole_model.proofs, figure)
    assert seen.encoder_source_difference == seen.saved_difference == 0
    small = (seen.decoder_source_difference, seen.route_difference, seen.cache_difference)
    assert max(small) < 1e-5
    assert (seen.route_difference_beyond is None) == (name != "t5gemma2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_layer_by_layer_a_layer_of_another_is_seen(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spelt = (*encoder_decoder_maps._RENAMED, ("layers.3.mlp.up_proj", "layers.2.mlp.up_proj"))
    with monkeypatch.context() as patch:
        patch.setattr(encoder_decoder_maps, "_RENAMED", spelt)
        patch.setattr(encoder_decoder_maps._Half, "refuse", lambda self: None)
        adaptation = plan(read_folder(made("t5gemma2")[0]))
    with pytest.raises(GateError, match="of layer 3 alone, with the causal mask kept, the encoder's states"):
        write(adaptation, tmp_path / "out", memory_bytes=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_tensors_have_the_names_that_transformers_writes_and_each_is_told(
    name: str, made: Made, tmp_path: Path
) -> None:
    _, target, _ = made(name)
    ours = load_file(target / "model.safetensors")
    loaded(target).save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    report = json.loads((target / REPORT).read_text())
    assert {entry["name"] for entry in report["tensors"]} == set(ours)
    assert report["left_out"] == []
    cross = [
        entry for entry in report["tensors"] if entry["name"].endswith("layers.1.cross_attn.k_proj.weight")
    ]
    if name == "t5gemma":
        (entry,) = cross
        assert (entry["origin"], entry["from"]) == ("copied", ["model.layers.1.self_attn.k_proj.weight"])


@pytest.mark.parametrize("kind", SORTS)
def test_shards_and_dtype_are_those_of_the_source(kind: str, tmp_path: Path) -> None:
    its = decoder(tmp_path / "its", SORTS[kind], dtype="bfloat16", shard="60KB")
    write(plan(read_folder(its)), tmp_path / "out")
    largest = max(file.stat().st_size for file in its.glob("*.safetensors"))
    files = list((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(files) > 4
    assert max(file.stat().st_size for file in files) < 1.2 * largest  # headers are longer
    before = {name: tensor for file in its.glob("*.safetensors") for name, tensor in load_file(file).items()}
    after = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for half in ("encoder", "decoder"):
        assert torch.equal(
            after[f"model.{half}.layers.3.pre_self_attn_layernorm.weight"],
            before["model.layers.3.input_layernorm.weight"],
        )
    assert loaded(tmp_path / "out").config.dtype == torch.float32  # as asked for above
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_new_tensors_lie_among_ranges_of_bytes(tmp_path: Path) -> None:
    old, bits = torch.arange(6.0).view(2, 3), torch.arange(5, dtype=torch.bfloat16)
    save_file({"old": old}, tmp_path / "source.safetensors")
    spec = read_header(tmp_path / "source.safetensors")["old"]
    made_bits = bits.view(torch.uint8).numpy().tobytes()
    pieces = [new("bits", "BF16", (5,), lambda: made_bits), whole("kept", spec)]
    pieces.append(new("zeros", "F32", (4, 2), lambda: bytes(32)))
    write_pieces(pieces, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert torch.equal(written["kept"], old)
    assert torch.equal(written["bits"], bits)
    assert torch.equal(written["zeros"], torch.zeros(4, 2))


def multimodal(place: Path, end_of_image: int) -> Path:
    """Gemma 3 with a vision tower, whose vocabulary ends an image with the id given."""
    text = tiny_model(SORTS["t5gemma2"])
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 14, "patch_size": 14, "model_type": "siglip_vision_model"}
    config = transformers.Gemma3Config(
        text_config=text.config.to_dict(),
        vision_config=vision,
        mm_tokens_per_image=1,
        eoi_token_index=end_of_image,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.state_dict())
    model.save_pretrained(place)
    _write_tokenizer(place, 0, special=True)
    return place


def test_the_token_that_ends_an_image_keeps_its_state(tmp_path: Path) -> None:
    its = multimodal(tmp_path / "its", int(IDS[0, 5]))
    adaptation = plan(read_folder(its))
    assert any("vision_tower" in name for name in adaptation.tensors.left_out)
    written = write(adaptation, tmp_path / "out")
    assert written.proofs.encoder_source_difference == 0
    states, expected = (
        model(input_ids=IDS, attention_mask=causal_masks(model.config, IDS.shape[1])).last_hidden_state
        for model in (loaded(tmp_path / "out").get_encoder().text_model, tiny_model(SORTS["t5gemma2"]))
    )
    torch.testing.assert_close(states, expected, atol=SAME, rtol=0)
    (entry,) = (
        entry
        for entry in json.loads((tmp_path / "out" / REPORT).read_text())["tensors"]
        if entry["name"].endswith("eoi_embedding")
    )
    assert entry["origin"] == f"row {int(IDS[0, 5])} scaled"


def test_dropout_and_what_generation_starts_with_are_written(made: Made, tmp_path: Path) -> None:
    its = changed(made("t5gemma")[0], tmp_path / "its")
    (its / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9], "bos_token_id": 2}))
    write(plan(read_folder(its), dropout=0.1), tmp_path / "out")
    config = loaded(tmp_path / "out").config
    assert (config.dropout_rate, config.encoder.dropout_rate, config.decoder.attention_dropout) == (0.1,) * 3
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "bos_token_id": 2,
        "eos_token_id": [1, 9],
        "pad_token_id": 0,
        "decoder_start_token_id": 2,
    }


# --- the encoder comes out again


@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_taken_out_is_the_one_made_of_the_decoder_itself(
    name: str, made: Made, tmp_path: Path
) -> None:
    its, target, _ = made(name)
    wanted = Wanted(projections=(32,), prompts={"query": "w7 "}, keep_layers=(0, 2, 3))
    texts = ["w5 w6 w7", "w199 w20"]
    taken = write_encoder(plan_encoder(read_folder(target), wanted, texts=texts), tmp_path / "taken")
    write_encoder(plan_encoder(read_folder(its), wanted, texts=texts), tmp_path / "direct")
    for file in ("config.json", "tokenizer.json", "modules.json", "config_sentence_transformers.json"):
        contents = [json.loads((tmp_path / way / file).read_text()) for way in ("taken", "direct")]
        assert contents[0] == contents[1], file
    one, two = (load_file(tmp_path / way / "model.safetensors") for way in ("taken", "direct"))
    assert set(one) == set(two)
    assert all(torch.equal(one[key], two[key]) for key in one)
    seen = taken.proofs
    assert max(seen.source_difference, seen.gemb_difference) < 1e-5
    assert (seen.source_tokens, seen.class_difference) == (4 if name == "t5gemma2" else None, None)


def test_the_encoder_of_a_trained_model_is_its_own(made: Made, tmp_path: Path) -> None:
    # Not by way of the source: its weights have moved on.
    folder = changed(made("t5gemma2")[1], tmp_path / "trained")
    tensors = load_file(folder / "model.safetensors")
    noise = torch.Generator().manual_seed(8)
    moved = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=noise) for name, tensor in tensors.items()
    }
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    write_encoder(plan_encoder(read_folder(folder), Wanted()), tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    key = "self_attn.q_norm.weight"
    assert torch.equal(out[f"layers.1.{key}"], moved[f"model.encoder.layers.1.{key}"])
    taken = transformers.AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    states = taken(input_ids=IDS[:, :4]).last_hidden_state
    expected = loaded(folder).get_encoder()(input_ids=IDS[:, :4]).last_hidden_state
    torch.testing.assert_close(states, expected, atol=SAME, rtol=0)


@pytest.mark.slow  # a process that imports sentence-transformers
def test_folders_load_and_generate_where_gemb_is_blocked(made: Made, tmp_path: Path) -> None:
    folders = {}
    for name in NAMES:
        target = made(name)[1]
        write_encoder(plan_encoder(read_folder(target), Wanted()), tmp_path / name)
        folders[name] = [str(target), str(tmp_path / name)]
    program = """
import json, sys
sys.modules["gemb"] = None
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
texts = ["w5 w6", "w10"]  # as long as the shortest window at most
for name, (folder, encoder) in json.loads(sys.argv[1]).items():
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    said = [
        model.generate(**batch, use_cache=use_cache, do_sample=False, min_new_tokens=12, max_new_tokens=12)
        for use_cache in (True, False)
    ]
    assert said[0].shape == (2, 13), said[0].shape
    assert torch.equal(*said), name
    with torch.inference_mode():
        states = model.get_encoder()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    vectors = SentenceTransformer(encoder, device="cpu").encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(vectors, pooled, atol=1e-5, rtol=0, msg=name)
"""
    subprocess.run(
        [sys.executable, "-c", program, json.dumps(folders)], check=True, capture_output=True, cwd=tmp_path
    )


# --- what fails keeps nothing


def test_swapped_tensors_are_seen_and_nothing_is_kept(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swaps = (("up_proj", "x"), ("gate_proj", "up_proj"), ("x", "gate_proj"))
    monkeypatch.setattr(encoder_decoder_maps, "_RENAMED", (*encoder_decoder_maps._RENAMED, *swaps))
    with pytest.raises(GateError) as told:
        write(plan(read_folder(made("t5gemma")[0])), tmp_path / "out")
    assert str(told.value).startswith(
        f"{tmp_path / 'out'} is not kept, a proof failed: with the causal mask kept, the encoder's states "
        "are not the source's (off by "
    )
    assert list(tmp_path.iterdir()) == []


def test_another_window_of_the_decoder_is_seen(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = encoder_decoder_maps.encoder_decoder_config

    def wrong(*args: Any, **keys: Any) -> dict[str, Any]:  # noqa: ANN401
        config = right(*args, **keys)
        config["decoder"]["sliding_window"] = 3
        return config

    monkeypatch.setattr("gemb.model.adapting.encoder_decoder.encoder_decoder_config", wrong)
    with pytest.raises(GateError, match="without the encoder, the decoder's logits are not its source's"):
        write(plan(read_folder(made("t5gemma2")[0])), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_that_does_not_hear_or_looks_ahead_is_seen(made: Made) -> None:
    model = loaded(made("t5gemma")[1])
    said, text = IDS[:1, :9], TEXT[:1, :9]
    assert encoder_decoder_proofs._who_the_decoder_sees(model, said, text) < 1e-5
    for layer in model.get_decoder().layers:
        layer.cross_attn.o_proj.weight.zero_()
    with pytest.raises(GateError, match="the decoder does not see the encoder's text from end to end"):
        encoder_decoder_proofs._who_the_decoder_sees(model, said, text)
    ahead = loaded(made("t5gemma")[1])
    ahead.get_decoder().config.is_causal = False
    with pytest.raises(GateError, match="the decoder sees tokens that are not said yet"):
        encoder_decoder_proofs._who_the_decoder_sees(ahead, said, text)


def test_tensors_that_the_class_does_not_know_are_seen(made: Made, tmp_path: Path) -> None:
    folder = changed(made("t5gemma")[1], tmp_path / "folder")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.encoder.norm.bias"] = tensors.pop("model.encoder.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GateError) as told:
        encoder_decoder_proofs.load_encoder_decoder(folder)
    assert str(told.value) == (
        "transformers does not load its tensors (model.encoder.norm.bias, model.encoder.norm.weight)"
    )


# --- bad input


def refused(source: Path, other: Path | None = None) -> GembError:
    with pytest.raises(GembError) as told:
        plan(read_folder(source), None if other is None else read_folder(other))
    return told.value


def test_models_that_become_no_encoder_decoder_are_told_why(made: Made, tmp_path: Path) -> None:
    llama = decoder(tmp_path / "llama", "llama")
    error = refused(llama)
    assert isinstance(error, MismatchError)
    assert str(error) == (
        f"{llama}: gemb makes no encoder-decoder of the model type 'llama'; it makes a T5Gemma of gemma2, "
        "and a T5Gemma 2 of gemma3_text and the text part of gemma3"
    )
    its, target, _ = made("t5gemma")
    assert str(refused(target)) == (
        f"{target}: t5gemma is an encoder-decoder already; --to encoder takes its encoder"
    )
    encoder = changed(its, tmp_path / "encoder", is_causal=False)
    assert str(refused(encoder)) == (
        f"{encoder}: gemma2 is bidirectional already; an encoder-decoder is made of a decoder, "
        "such as google/gemma-2-2b"
    )
    untied = changed(its, tmp_path / "untied", tie_word_embeddings=False)
    assert str(refused(untied)) == (
        f"{untied / 'config.json'}: tie_word_embeddings is false, but the head of t5gemma is its decoder's "
        "table; choose a model whose head is tied"
    )
    unpadded = changed(its, tmp_path / "unpadded", pad_token_id=None)
    assert str(refused(unpadded)) == (
        f"{unpadded / 'config.json'}: pad_token_id is null, but t5gemma tells padding by it; "
        "set it to the id of a token that no text has"
    )
    quantised = changed(its, tmp_path / "quantised", quantization_config={"quant_method": "gptq"})
    assert str(refused(quantised)) == (
        f"{quantised / 'config.json'}: the weights are quantised, which cannot be adapted; "
        "use the model that they were made from"
    )


def test_halves_that_do_not_fit_are_told_with_all_reasons(made: Made, tmp_path: Path) -> None:
    gemma2, gemma3 = made("t5gemma")[0], made("t5gemma2")[0]

    def reasons(one: Path, two: Path) -> list[str]:
        first, *rest = str(refused(one, two)).splitlines()
        assert first == f"{one} and {two} do not become one encoder-decoder; choose a pair that fits"
        return [line.removeprefix("  ") for line in rest]

    assert reasons(gemma2, gemma3) == ["model_type is gemma2 and gemma3_text; both halves are of one family"]
    narrow: Mapping[str, Any] = {"hidden_size": 48, "vocab_size": 220}
    assert reasons(gemma3, decoder(tmp_path / "narrow", SORTS["t5gemma2"], **narrow)) == [
        "the vocabulary has 200 and 220 entries; one tokenizer serves both halves",
        "hidden_size is 64 and 48; T5Gemma 2 needs one width, "
        "of the families here only Gemma 2 has halves of different ones",
    ]
    anew = decoder(tmp_path / "anew", SORTS["t5gemma2"], attention_dropout=0.1)
    assert reasons(gemma3, anew) == ["their token embeddings differ; T5Gemma 2 has one table for both halves"]
    other = changed(gemma2, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["truncation"] = None
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    plan(read_folder(gemma2), read_folder(other))  # spelt in another way
    words = tokenizer["model"]["vocab"]
    words["w5"], words["w6"] = words["w6"], words["w5"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert reasons(gemma2, other) == ["their tokenizers differ; one tokenizer serves both halves"]


def test_shapes_that_do_not_fit_are_told_tensor_by_tensor(made: Made, tmp_path: Path) -> None:
    folder = changed(made("t5gemma")[0], tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(16, 64)
    tensors["model.layers.2.self_attn.k_norm.weight"] = torch.zeros(16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert str(refused(folder)) == (
        f"{folder}: 3 tensors not as config.json makes a gemma2; download the model again\n"
        "  no model.layers.0.mlp.up_proj.weight\n"
        "  model.layers.1.self_attn.k_proj.weight [16, 64], not [32, 64]\n"
        "  unknown model.layers.2.self_attn.k_norm.weight"
    )


def test_a_missing_and_a_truncated_shard_are_told(tmp_path: Path) -> None:
    folder = decoder(tmp_path / "source", SORTS["t5gemma"], shard="60KB")
    file = sorted(folder.glob("model-*.safetensors"))[2]
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    error = refused(folder)
    assert isinstance(error, UnavailableError)
    assert f"{file} is damaged: cut short at {len(content) - 10:,} of {len(content):,} bytes" in str(error)
    file.unlink()
    count = len(list(folder.glob("model-*.safetensors"))) + 1
    assert str(refused(folder)) == (
        f"{folder} lacks 1 of its {count} weight files: {file.name}; download the model again"
    )


def test_an_odd_window_is_refused_before_it_is_in_the_way(made: Made, tmp_path: Path) -> None:
    folder = changed(made("t5gemma2")[0], tmp_path / "source", sliding_window=257)
    assert str(refused(folder)) == (
        f"{folder / 'config.json'}: sliding_window is 257, an odd number, which the bidirectional flag "
        "cannot halve; was it saved by an older transformers? set it to 256 or 512, whichever the model was "
        "trained with"
    )


def test_a_tokenizer_of_another_model_is_refused(made: Made, tmp_path: Path) -> None:
    folder = changed(made("t5gemma")[0], tmp_path / "source")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["more"] = VOCABULARY
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert str(refused(folder)) == (
        "the tokenizer has ids up to 200, but the model's vocab_size is 200; "
        "tokenizer and weights are not of one model"
    )


def test_an_encoder_taken_out_has_no_mask_to_keep(made: Made) -> None:
    target = made("t5gemma")[1]
    with pytest.raises(MismatchError) as told:
        plan_encoder(read_folder(target), Wanted(causal=True))
    assert str(told.value) == (
        f"{target}: the encoder of t5gemma is bidirectional already, with no mask to keep; "
        "leave out --attention causal"
    )


def test_an_output_that_exists_and_a_full_disk_are_refused(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptation = plan(read_folder(made("t5gemma")[0]))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(GembError, match="there exists; choose another path for the model, or move it away"):
        write(adaptation, tmp_path / "there")
    monkeypatch.setattr("gemb.files.free_bytes", lambda path: 1000)
    with pytest.raises(MachineError, match=r"out needs about 66\.5 MiB, but 1000 B is free"):
        write(adaptation, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]

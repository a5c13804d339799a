"""Decoders as encoders: the same weights, the states that transformers gives, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gemb.errors import GateError, GembError, MachineError, MismatchError, UnavailableError
from gemb.model.adapting import REPORT, Adapted, Wanted, key_maps, plan, proofs, write
from gemb.model.attention import CAUSAL, FULL, Reach, reach_of_layers
from gemb.model.encoder import PackedEncoder
from gemb.model.folder import read_folder
from gemb.model.kernels import Kernels
from gemb.model.trainable import TrainableEncoder
from gemb.text.tokenisation import Tokeniser
from tests.conftest import DATA, ROOT
from tests.models import SORTS, VOCABULARY, Sort, _write_tokenizer, packed, random_texts, tiny_model

_MODERN = {"local_attention": 8, "cls_token_id": 2, "sep_token_id": 1}
FAMILIES = ("gemma3_text", "gemma2", "llama", "mistral", "qwen3", "modernbert-decoder")
_SORTS: Mapping[str, str] = {
    "gemma3_text": "gemma3 as a decoder",
    "gemma2": "gemma2 as a decoder",
    "llama": "llama",
    "mistral": "mistral as a decoder",
    "qwen3": "qwen3",
    "modernbert-decoder": "modernbert as a decoder",
}
Made = Callable[[str], tuple[Path, Path, Adapted]]
"""Source, target and what was seen, by family."""
STORIES = DATA / "models" / "stories260K-hf"
SAME_ORDER = 1e-6  # states are about 1: the same sums in the same order, in another process or class


@pytest.fixture(autouse=True, scope="module")
def modernbert_decoder() -> Iterator[None]:
    """The tiny models have one more, which no other test needs."""
    with pytest.MonkeyPatch.context() as patch:
        more = {"modernbert as a decoder": Sort("ModernBertDecoder", _MODERN, is_causal=True)}
        patch.setattr("tests.models.SORTS", {**SORTS, **more})
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The folder of a tiny decoder, and of an encoder made of it, each made once."""
    place = tmp_path_factory.mktemp("adapted")

    @cache
    def folders(family: str) -> tuple[Path, Path, Adapted]:
        source = decoder(place / f"{family}-source", family)
        target = place / family
        adapted = write(plan(read_folder(source), Wanted(projections=(96, 32))), target)
        return source, target, adapted

    return folders


def decoder(place: Path, family: str, *, dtype: torch.dtype = torch.float32, shard: str = "1GB") -> Path:
    """A tiny decoder as people publish it, head and all."""
    model = tiny_model(_SORTS[family])
    causal: Any = transformers.AutoModelForCausalLM.from_config(model.config)  # type: ignore[no-untyped-call]
    causal.base_model.load_state_dict(model.state_dict())
    causal.tie_weights()
    causal.to(dtype).save_pretrained(place, max_shard_size=shard)
    _write_tokenizer(place, 0, special=True)
    return place


def states_of(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ANN401
    with torch.inference_mode():
        states: torch.Tensor = model.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
    return states


def loaded(folder: Path) -> Any:  # noqa: ANN401  # any model class
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)


def changed(folder: Path, copy: Path, **keys: Any) -> Path:  # noqa: ANN401  # JSON values
    """A copy of `folder` with other keys in its config.json."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text("utf-8"))
    (copy / "config.json").write_text(json.dumps({**config, **keys}), "utf-8")
    return copy


IDS = torch.randint(100, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[1, 21:] = 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_encoder_is_the_decoder_without_its_mask(family: str, made: Made) -> None:
    _, target, _ = made(family)
    model = tiny_model(_SORTS[family])
    if family == "gemma3_text":
        # The flag has to be there when the config is made: it halves the window.
        given = {**model.config.to_dict(), "use_bidirectional_attention": True}
        reference = transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**given))
    else:
        config = type(model.config)(**{**model.config.to_dict(), "is_causal": False})
        reference = type(model)(config)
    reference.load_state_dict(model.state_dict())
    ours, theirs = (states_of(one, IDS, MASK) for one in (loaded(target), reference))
    assert (ours - theirs)[MASK.bool()].abs().max() < SAME_ORDER
    causal = states_of(model, IDS, MASK)
    assert (ours - causal)[MASK.bool()].abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_proof_is_made(family: str, made: Made) -> None:
    seen = made(family)[2].proofs
    assert seen.source_difference == seen.saved_difference == 0
    assert seen.class_difference == (0 if family in ("llama", "modernbert-decoder") else None)
    assert max(seen.padding_difference, seen.gemb_difference) < 1e-5
    ways = dict(seen.implementations)
    if family == "gemma2":  # its scores are capped, which torch's own kernel cannot do
        assert ways.pop("sdpa").startswith("not offered: Gemma2Model does not support")
    assert set(ways.values()) == {"bidirectional"}
    assert any(name.startswith("default (") for name in ways)
    window, full = {
        "gemma3_text": ("window ±4", "full"),  # half of 8
        "gemma2": ("window ±5", "full"),
        "mistral": ("window ±6", "window ±6"),
        "modernbert-decoder": ("window ±4", "full"),
    }.get(family, ("full", "full"))
    assert set(seen.reaches) == {window, full}
    assert len(seen.reaches) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_mask_gives_the_states_of_the_source(family: str, made: Made, tmp_path: Path) -> None:
    source, _, _ = made(family)
    wanted = Wanted(causal=True, pooling="lasttoken")
    adapted = write(plan(read_folder(source), wanted), tmp_path / "out")
    assert torch.equal(states_of(loaded(tmp_path / "out"), IDS), states_of(tiny_model(_SORTS[family]), IDS))
    ways = {name: way for name, way in adapted.proofs.implementations.items() if "not offered" not in way}
    assert set(ways.values()) == {"causal"}


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("family", "settings", "reaches"),
    [
        ("llama", {"rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True}, {"full"}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, {"window ±4", "full"}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 4}, {"full"}),
        ("mistral", {"sliding_window": None}, {"full"}),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
            {"full", "window ±5"},
        ),
        (
            "modernbert-decoder",
            {"global_attn_every_n_layers": 2, "attention_bias": True},
            {"window ±4", "full"},
        ),
    ],
)
def test_rotary_scaling_biases_and_windows_are_kept(
    family: str, settings: dict[str, Any], reaches: set[str], tmp_path: Path
) -> None:
    model = tiny_model(_SORTS[family])
    given = {
        key: value for key, value in model.config.to_dict().items() if key not in ("layer_types", *settings)
    }
    if "rope_scaling" in settings:
        del given["rope_parameters"]
    torch.manual_seed(0)
    varied: Any = transformers.AutoModelForCausalLM.from_config(type(model.config)(**{**given, **settings}))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, parameter in varied.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    varied.save_pretrained(tmp_path / "source")
    _write_tokenizer(tmp_path / "source", 0, special=True)
    adapted = write(plan(read_folder(tmp_path / "source"), Wanted()), tmp_path / "out")
    assert adapted.proofs.source_difference == 0
    assert set(adapted.proofs.reaches) == reaches
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "rope_parameters" not in config  # the spelling that older tools read


@pytest.mark.slow  # a process that imports sentence-transformers
def test_folders_load_bidirectionally_where_gemb_is_blocked(made: Made, tmp_path: Path) -> None:
    targets = {family: made(family)[1] for family in FAMILIES}
    text, other = "w5 w6 w7 w8 w9", "w5 w6 w7 w8 w99"
    program = f"""
import sys, json
sys.modules["gemb"] = None
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
vectors = {{}}
for family, folder in json.loads(sys.argv[1]).items():
    model = SentenceTransformer(folder, device="cpu")
    vectors[family] = model.encode([{text!r}, "w10"]).tolist()
    ids = model.tokenize([{text!r}, {other!r}])["input_ids"]
    with torch.inference_mode():
        first, second = AutoModel.from_pretrained(folder)(ids).last_hidden_state
    assert (first[1] != second[1]).any(), family
json.dump(vectors, open(sys.argv[2], "w"))
"""
    words = [json.dumps({name: str(path) for name, path in targets.items()}), str(tmp_path / "vectors.json")]
    subprocess.run([sys.executable, "-c", program, *words], check=True, capture_output=True, cwd=tmp_path)
    vectors = json.loads((tmp_path / "vectors.json").read_text())
    for family, target in targets.items():
        encoder = PackedEncoder(read_folder(target), Kernels("cpu", torch.float32))
        ids, lengths, rows = packed(target, [text, "w10"])
        ours = encoder.forward(ids, lengths)[torch.from_numpy(rows)]
        assert ours.shape == (2, 32)
        np.testing.assert_allclose(ours.numpy(), vectors[family], atol=1e-5, err_msg=family)


def test_tensors_are_bytes_of_the_source_also_where_both_are_in_shards(tmp_path: Path) -> None:
    source = decoder(tmp_path / "source", "modernbert-decoder", dtype=torch.bfloat16, shard="60KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    before = {
        name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    adaptation = plan(read_folder(source), Wanted())
    write(adaptation, tmp_path / "whole")
    write(adaptation, tmp_path / "shards", shard_bytes=50_000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    for folder in ("whole", "shards"):
        files = sorted((tmp_path / folder).glob("*.safetensors"))
        after = {name: tensor for file in files for name, tensor in load_file(file).items()}
        joined = [f"model.layers.1.attn.{part}_proj.weight" for part in "qkv"]
        assert torch.equal(after["layers.1.attn.Wqkv.weight"], torch.cat([before[name] for name in joined]))
        table = "embeddings.tok_embeddings.weight"
        assert torch.equal(after[table], before[f"model.{table}"])
        assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_of_a_multimodal_checkpoint_the_text_part_is_taken(tmp_path: Path) -> None:
    text = tiny_model("gemma3 as a decoder")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 14, "patch_size": 14, "model_type": "siglip_vision_model"}
    config = transformers.Gemma3Config(
        text_config=text.config.to_dict(), vision_config=vision, mm_tokens_per_image=1
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.state_dict())
    model.save_pretrained(tmp_path / "source")
    _write_tokenizer(tmp_path / "source", 0, special=True)
    config_file = tmp_path / "source" / "config.json"
    settings = json.loads(config_file.read_text())
    del settings["text_config"]["model_type"]  # some folders leave it out
    config_file.write_text(json.dumps(settings))
    adaptation = plan(read_folder(tmp_path / "source"), Wanted())
    assert adaptation.config["model_type"] == "gemma3_text"
    assert any(name.startswith("vision_tower.") for name in adaptation.tensors.left_out)
    write(adaptation, tmp_path / "out")
    assert {name.partition(".")[0] for name in load_file(tmp_path / "out" / "model.safetensors")} == {
        "embed_tokens", "layers", "norm",
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_layers_and_tokens_leave_the_states_of_what_stays(
    family: str,
    made: Made,
    tmp_path: Path,
) -> None:
    source, whole, _ = made(family)
    texts = random_texts([12, 7], seed=9)
    wanted = Wanted(keep_layers=(0, 1, 3), prompts={"query": "w50 w51 "})
    adaptation = plan(read_folder(source), wanted, texts=texts)
    write(adaptation, tmp_path / "out")
    before, after = (
        Tokeniser.load(folder, max_tokens=48, lower_case=False) for folder in (source, tmp_path / "out")
    )
    assert adaptation.cut is not None
    kept = np.array(adaptation.cut.kept)
    for text in [*texts, f"w50 w51 {texts[0]}"]:
        assert kept[after.encode([text]).ids].tolist() == before.encode([text]).ids.tolist()
    assert {0, 1, 2, 3} <= set(kept.tolist())  # special tokens, though no text has them
    assert len(kept) < VOCABULARY
    reference = loaded(whole)
    reference.layers = torch.nn.ModuleList(reference.layers[layer] for layer in (0, 1, 3))
    reference.config.num_hidden_layers = 3
    if getattr(reference.config, "layer_types", None):
        reference.config.layer_types = [reference.config.layer_types[layer] for layer in (0, 1, 3)]
    old = torch.from_numpy(before.encode(texts[:1]).ids.astype(np.int64))[None]
    new = torch.from_numpy(after.encode(texts[:1]).ids.astype(np.int64))[None]
    assert torch.equal(states_of(loaded(tmp_path / "out"), new), states_of(reference, old))


def test_the_report_tells_every_tensor_and_the_proofs(made: Made) -> None:
    _, target, _ = made("modernbert-decoder")
    report = json.loads((target / REPORT).read_text())
    names = {entry["name"]: entry for entry in report["tensors"]}
    with safe_open(target / "model.safetensors", "pt") as weights:
        assert set(names) - {"2_Dense/linear.weight", "3_Dense/linear.weight"} == set(weights.keys())
    assert names["layers.2.attn.Wqkv.weight"] == {
        "name": "layers.2.attn.Wqkv.weight",
        "dtype": "F32",
        "shape": [192, 64],
        "origin": "joined",
        "from": [f"model.layers.2.attn.{part}_proj.weight" for part in "qkv"],
    }
    assert names["2_Dense/linear.weight"]["origin"] == "new"
    assert "lm_head.norm.weight" in report["left_out"]
    assert report["proofs"]["source_difference"] == 0
    assert report["attention"] == "bidirectional"


def test_projections_follow_from_the_seed_alone(made: Made, tmp_path: Path) -> None:
    source, target, _ = made("llama")
    for name, seed in (("same", 42), ("other", 7)):
        write(plan(read_folder(source), Wanted(projections=(96, 32), seed=seed)), tmp_path / name)
    matrices = [
        load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"]
        for folder in (target, tmp_path / "same", tmp_path / "other")
    ]
    assert matrices[0].shape == (96, 64)
    assert matrices[0].abs().max() <= 1 / 8
    assert torch.equal(matrices[0], matrices[1])
    assert not torch.equal(matrices[0], matrices[2])


def test_dropout_prompts_pooling_and_length_are_written(made: Made, tmp_path: Path) -> None:
    wanted = Wanted(
        dropout=0.1,
        pooling="cls",
        normalise=False,
        prompts={"query": "w9 "},
        default_prompt="query",
        max_tokens=20,
    )
    write(plan(read_folder(made("modernbert-decoder")[0]), wanted), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    rates = {"attention_dropout", "embedding_dropout", "mlp_dropout"}
    assert {key: config[key] for key in rates} == dict.fromkeys(rates, 0.1)
    folder = read_folder(tmp_path / "out")
    assert folder.pooling.modes == ("cls",)
    assert not folder.normalizes
    assert (folder.prompts, folder.default_prompt, folder.max_tokens) == ({"query": "w9 "}, "query", 20)


OWN_POOLINGS: Mapping[str, dict[str, Any]] = {
    "first-k": {"pool_tokens": 3},
    "last-k": {"pool_tokens": 2},
    "attention-query": {"pool_heads": 8},
    "attention-kv": {"pool_probes": 6},
}


@pytest.mark.parametrize("mode", OWN_POOLINGS)
def test_a_pooling_of_gemb_alone_is_written_so_that_nothing_else_runs_it(
    mode: str, made: Made, tmp_path: Path
) -> None:
    wanted = Wanted(pooling=mode, projections=(32,), **OWN_POOLINGS[mode])  # type: ignore[arg-type]
    adapted = write(plan(read_folder(made("llama")[0]), wanted), tmp_path / "out")
    folder = read_folder(tmp_path / "out")
    pooling = folder.pooling
    assert (pooling.modes, pooling.is_own) == ((mode,), True)
    assert pooling.tokens == OWN_POOLINGS[mode].get("pool_tokens")
    if mode.startswith("attention"):
        assert pooling.heads == OWN_POOLINGS[mode].get("pool_heads", 4)
        tensors = load_file(tmp_path / "out" / "1_Pooling" / "model.safetensors")
        shapes = {f"1_Pooling/{name}": tuple(tensor.shape) for name, tensor in tensors.items()}
        assert shapes.items() <= adapted.new.items()
        for name, tensor in tensors.items():
            if "probe" in name:
                assert 0.7 < tensor.std() < 1.3
            else:
                assert 0.12 < tensor.abs().max() <= 1 / 8
    notice = (tmp_path / "out" / "README.md").read_text()
    assert pooling.described in notice
    assert "sentence-transformers\nrefuses this folder" in notice
    with pytest.raises(ValueError, match=r"references the module class 'gemb\.Pooling'"):
        sentence_transformers.SentenceTransformer(str(tmp_path / "out"))
    with pytest.raises(ImportError, match='Module "gemb" does not define a "Pooling"'):
        sentence_transformers.SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True)
    ids, lengths, _ = packed(tmp_path / "out", random_texts([9, 4]))
    assert PackedEncoder(folder, Kernels("cpu", torch.float32)).forward(ids, lengths).shape == (2, 32)


def test_weights_of_a_pooling_follow_from_the_seed_alone(made: Made, tmp_path: Path) -> None:
    found = []
    for name, seed in (("one", 42), ("same", 42), ("other", 7)):
        wanted = Wanted(pooling="attention-kv", seed=seed)
        write(plan(read_folder(made("llama")[0]), wanted), tmp_path / name)
        found.append(load_file(tmp_path / name / "1_Pooling" / "model.safetensors")["value_probes.weight"])
    assert found[0].shape == (128, 64)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(("mode", "standard"), [("first-k", "cls"), ("last-k", "lasttoken")])
def test_one_token_is_the_mode_that_sentence_transformers_has(
    mode: str, standard: str, made: Made, tmp_path: Path
) -> None:
    wanted = Wanted(pooling=mode, pool_tokens=1)  # type: ignore[arg-type]
    write(plan(read_folder(made("gemma3_text")[0]), wanted), tmp_path / "out")
    folder = read_folder(tmp_path / "out")
    assert folder.pooling.modes == (standard,)
    texts = random_texts([9, 4])
    expected = sentence_transformers.SentenceTransformer(str(tmp_path / "out")).encode(texts)
    ids, lengths, rows = packed(tmp_path / "out", texts)
    vectors = PackedEncoder(folder, Kernels("cpu", torch.float32)).forward(ids, lengths)[rows]
    assert np.abs(vectors.numpy() - expected).max() < 1e-6
    assert not (tmp_path / "out" / "README.md").exists()


def test_an_adapted_folder_can_be_trained(made: Made) -> None:
    for family in ("gemma3_text", "llama"):
        encoder = TrainableEncoder.load(read_folder(made(family)[1]))
        assert sum(parameter.numel() for parameter in encoder.parameters()) > 100_000


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs {STORIES}")
def test_a_real_decoder_becomes_an_encoder_of_its_own_tokenizer(tmp_path: Path) -> None:
    texts = ["Once upon a time, there was a little girl named Lily.", "She loved to play outside."]
    adaptation = plan(read_folder(STORIES), Wanted(), texts=texts)
    adapted = write(adaptation, tmp_path / "out")
    assert adapted.proofs.source_difference == adapted.proofs.class_difference == 0
    before, after = (
        Tokeniser.load(folder, max_tokens=99, lower_case=False) for folder in (STORIES, tmp_path / "out")
    )
    assert adaptation.cut is not None
    assert len(adaptation.cut.kept) < 512
    kept = np.array(adaptation.cut.kept)
    assert kept[after.encode(texts).ids].tolist() == before.encode(texts).ids.tolist()


# --- memory


def test_weights_larger_than_the_allowed_memory_are_written(tmp_path: Path) -> None:
    # One table of 60 MB in each of two sparse files, and 24 MB to work with: RLIMIT_DATA counts what a
    # process makes, not the files that it reads.
    program = """
import resource, sys
from pathlib import Path
from gemb.model.adapting.streaming import Piece, joined, rows_of, write_pieces
from gemb.model.weights import TensorSpec
files = [Path(sys.argv[1]) / name for name in "ab"]
specs = [TensorSpec("t", "F32", (15_000, 1000), file, 16, 16 + 60_000_000) for file in files]
pieces = [joined("both", specs), rows_of("rows", specs[0], range(1, 15_000, 1000))]
started = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (started + (24 << 20),) * 2)
write_pieces(pieces, Path(sys.argv[2]))
try:
    bytearray(60_000_000)
except MemoryError:
    sys.exit(0)
sys.exit("the limit holds nothing")
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    for name in "ab":
        with (tmp_path / name).open("wb") as file:
            file.truncate(16 + 60_000_000)
    (tmp_path / "out").mkdir()
    words = [str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 120_000_000
    (tmp_path / "out" / "model.safetensors").unlink()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A decoder of 105 MB in bfloat16, in shards of 41 MB at most, the head in one of its own."""
    folder = tmp_path_factory.mktemp("large")
    config = transformers.LlamaConfig(
        vocab_size=52_000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=7,
        num_attention_heads=6,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="41MB")
    _write_tokenizer(folder, 0, special=True)
    yield folder
    shutil.rmtree(folder)


def test_a_model_larger_than_the_allowed_memory_is_adapted_and_proved(large: Path, tmp_path: Path) -> None:
    # RLIMIT_DATA counts what a process makes, not the files that it reads, and all that threads set aside for
    # their allocations, of which there is less with one arena. A first adaptation loads the code.
    program = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from gemb.errors import GateError
from gemb.model.adapting import Wanted, plan, write
from gemb.model.folder import read_folder
small, large, out = map(Path, sys.argv[1:4])
allowed = int(sys.argv[4])
write(plan(read_folder(small), Wanted()), out / "small", memory_bytes=1)
adaptation = plan(read_folder(large), Wanted())
started = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (started + allowed,) * 2)
adapted = write(adaptation, out / "large", memory_bytes=allowed)
print(adapted.proofs.by_layer, len(adapted.proofs.reaches), adapted.proofs.source_difference)
try:
    write(adaptation, out / "whole", memory_bytes=1 << 40)
except (MemoryError, RuntimeError, GateError) as error:
    print("whole:", type(error).__name__)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    shards = [file.stat().st_size for file in large.glob("*.safetensors")]
    allowed = int(1.5 * max(shards))
    assert len(shards) == 3
    needed = plan(read_folder(large), Wanted()).size_bytes
    assert allowed < needed < sum(shards)
    small = decoder(tmp_path / "source", "llama")
    words = [str(small), str(large), str(tmp_path), str(allowed)]
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True 7 0.0", "whole: RuntimeError"]
    shutil.rmtree(tmp_path / "large")


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_proved_alone_say_what_the_whole_says(family: str, made: Made, tmp_path: Path) -> None:
    texts, wanted = random_texts([40, 90]), Wanted(keep_layers=(0, 1, 3))
    adaptation = plan(read_folder(made(family)[0]), wanted, texts=texts)
    whole, layers = (
        write(adaptation, tmp_path / name, memory_bytes=memory).proofs
        for name, memory in (("whole", 1 << 40), ("layers", 1))
    )
    assert (whole.by_layer, layers.by_layer) == (False, True)
    for name in ("source_difference", "class_difference", "implementations", "reaches", "saved_difference"):
        assert getattr(whole, name) == getattr(layers, name)
    assert max(layers.padding_difference, layers.gemb_difference) < 1e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layers", "whole"]


# --- what fails keeps nothing


def test_a_swapped_tensor_of_one_layer_is_told_with_the_layer(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = key_maps._renumbered

    def swapped(name: str, keep_layers: tuple[int, ...]) -> str:
        other = name.replace("up_proj", "x").replace("gate_proj", "up_proj").replace("x", "gate_proj")
        return right(other if name.startswith("layers.2.") else name, keep_layers)

    monkeypatch.setattr(key_maps, "_renumbered", swapped)
    adaptation = plan(read_folder(made("llama")[0]), Wanted())
    told = "a proof failed: of layer 2 alone, with the causal mask kept, its states are not the source's"
    with pytest.raises(GateError, match=told):
        write(adaptation, tmp_path / "out", memory_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_another_window_of_one_layer_is_told_with_the_layer(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptation = plan(read_folder(made("gemma3_text")[0]), Wanted())

    def narrower(config: Mapping[str, Any]) -> Any:  # noqa: ANN401
        reaches = reach_of_layers(config)
        return tuple(reach if reach == FULL else Reach(3, 3) for reach in reaches or ())

    monkeypatch.setattr(proofs, "reach_of_layers", narrower)
    with pytest.raises(GateError) as told:
        write(adaptation, tmp_path / "out", memory_bytes=1)
    assert "of layer 0 alone, layer 0 sees window ±4, but config.json says window ±3" in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_a_swapped_tensor_is_seen_and_nothing_is_kept(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = key_maps._renumbered

    def swapped(name: str, keep_layers: tuple[int, ...]) -> str:
        return right(
            name.replace("up_proj", "x").replace("gate_proj", "up_proj").replace("x", "gate_proj"),
            keep_layers,
        )

    monkeypatch.setattr(key_maps, "_renumbered", swapped)
    adaptation = plan(read_folder(made("llama")[0]), Wanted())
    with pytest.raises(GateError, match="with the causal mask kept, its states are not the source's"):
        write(adaptation, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_class_that_stays_causal_is_seen_and_nothing_is_kept(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As a transformers that does not heed the key would: older than 5.2.
    adaptation = plan(read_folder(made("qwen3")[0]), Wanted())
    load = transformers.AutoModel.from_pretrained

    def heedless(folder: Path, **options: Any) -> Any:  # noqa: ANN401
        model = load(folder, **options)
        model.config.is_causal = True
        return model

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", heedless)
    with pytest.raises(GateError) as told:
        write(adaptation, tmp_path / "out")
    assert str(told.value) == (
        f"{tmp_path / 'out'} is not kept, a proof failed: with the attention default (sdpa) transformers "
        "computes causal, not bidirectional (seen in the first state when the last token is changed); "
        "try another release of transformers"
    )
    assert list(tmp_path.iterdir()) == []


def test_another_window_than_declared_is_seen(made: Made) -> None:
    model, reaches = loaded(made("gemma3_text")[1]), [Reach(4, 4), Reach(4, 4), FULL, Reach(4, 4)]
    assert proofs.measured_reaches(model, reaches) == ("window ±4", "window ±4", "full", "window ±4")
    with pytest.raises(GateError, match=r"layer 1 sees window ±4, but config.json says window ±5"):
        proofs.measured_reaches(model, [Reach(4, 4), Reach(5, 5), FULL, Reach(4, 4)])
    with pytest.raises(GateError, match=r"layer 2 sees full, but config.json says full, causal"):
        proofs.measured_reaches(model, [Reach(4, 4), Reach(4, 4), CAUSAL, Reach(4, 4)])


# --- bad input


def refused(folder: Path, wanted: Wanted | None = None) -> GembError:
    with pytest.raises(GembError) as told:
        plan(read_folder(folder), wanted or Wanted())
    return told.value


def test_an_unknown_family_is_told_with_those_known(made: Made, tmp_path: Path) -> None:
    folder = changed(made("llama")[0], tmp_path / "source", model_type="gpt_neox")
    error = refused(folder)
    assert isinstance(error, MismatchError)
    assert str(error) == (
        f"{folder}: gemb cannot adapt the model type 'gpt_neox'; it knows gemma3_text, gemma2, llama, "
        "mistral, qwen3, modernbert-decoder, and the text part of gemma3"
    )


def test_an_encoder_is_told_to_be_one(made: Made) -> None:
    folder = made("gemma3_text")[1]
    assert str(refused(folder)) == (
        f"{folder}: gemma3_text is bidirectional already; of an encoder only --keep-layers and --keep-vocab "
        "make another one"
    )


def test_an_odd_window_cannot_be_halved(made: Made, tmp_path: Path) -> None:
    folder = changed(made("gemma3_text")[0], tmp_path / "source", sliding_window=257)
    assert str(refused(folder)) == (
        f"{folder / 'config.json'}: sliding_window is 257, an odd number, which the bidirectional flag "
        "cannot halve; was it saved by an older transformers? set it to 256 or 512, whichever the model was "
        "trained with"
    )
    plan(read_folder(folder), Wanted(causal=True))


def test_shapes_that_do_not_fit_are_told_tensor_by_tensor(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(made("llama")[0], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(95, 64)
    del tensors["model.layers.2.mlp.down_proj.weight"]
    tensors["model.layers.3.mlp.fourth.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert str(refused(folder)) == (
        f"{folder}: 3 tensors not as config.json makes a llama; download the model again\n"
        "  model.layers.1.mlp.up_proj.weight [95, 64], not [96, 64]\n"
        "  no model.layers.2.mlp.down_proj.weight\n"
        "  unknown model.layers.3.mlp.fourth.weight"
    )


def test_a_missing_and_a_truncated_shard_are_told(tmp_path: Path) -> None:
    folder = decoder(tmp_path / "source", "llama", shard="100KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    with pytest.raises(UnavailableError, match=f"{shard.name} is damaged: cut short at"):
        read_folder(folder)
    shard.unlink()
    with pytest.raises(UnavailableError, match=rf"lacks 1 of its \d weight files: {shard.name}"):
        read_folder(folder)


def test_settings_that_do_not_fit_are_refused(made: Made, tmp_path: Path) -> None:
    source = made("llama")[0]
    assert str(refused(source, Wanted(keep_layers=(0, 4)))) == (
        f"keep_layers has 4, but {source} has layers 0 to 3"
    )
    assert str(refused(source, Wanted(max_tokens=65))) == (
        f"max_tokens is 65, but {source} was trained with 64 positions; choose fewer"
    )
    assert str(refused(source, Wanted(prompts={"query": "q"}, default_prompt="document"))) == (
        "default_prompt is 'document', but the prompts are query"
    )
    assert str(refused(source, Wanted(pooling="attention-query", pool_heads=5))) == (
        "pool_heads is 5, which does not divide the 64 numbers of a token; choose another"
    )
    quantised = changed(source, tmp_path / "quantised", quantization_config={"bits": 4})
    assert str(refused(quantised)).startswith(f"{quantised / 'config.json'}: the weights are quantised")


def test_a_tokenizer_of_another_model_is_refused(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(made("llama")[0], folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["w200"] = VOCABULARY
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = (
        "the tokenizer has ids up to 200, but the model's vocab_size is 200; "
        "tokenizer and weights are not of one model"
    )
    assert str(refused(folder)) == message
    with pytest.raises(MismatchError, match=message):
        plan(read_folder(folder), Wanted(), texts=["w5"])


def test_an_output_that_exists_and_a_full_disk_are_refused(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adaptation = plan(read_folder(made("llama")[0]), Wanted())
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(GembError, match="there exists; choose another path for the model, or move it away"):
        write(adaptation, tmp_path / "there")
    monkeypatch.setattr("gemb.files.free_bytes", lambda path: 1000)
    with pytest.raises(MachineError, match=r"out needs about .* MiB, but 1000 B is free"):
        write(adaptation, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]

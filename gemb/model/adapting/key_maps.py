"""Which decoders become which encoders, under which names and with which keys of config.json.

The encoder of an encoder-decoder is taken in the same way: its weights under the names of a class that
AutoModel loads alone.
A class that is bidirectional by itself is preferred, since no version of transformers can overlook it; else
the decoder keeps its class and config.json has the one key that its family heeds. No code goes with a folder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from gemb.errors import MismatchError
from gemb.model.adapting.streaming import Piece, joined, rows_of, whole
from gemb.model.attention import is_bidirectional, reach_of_layers
from gemb.model.folder import ModelFolder
from gemb.model.pruned import renumber
from gemb.model.vocabulary import CutVocabulary
from gemb.model.weights import Weights


@dataclass(frozen=True)
class Family:
    """How a family of decoders becomes bidirectional; the names of tensors are those of the text model."""

    target: str
    """`model_type` of the encoder."""
    architecture: str
    """Its class in transformers."""
    switch: Mapping[str, object] = field(default_factory=dict)
    """Keys of config.json that make it bidirectional."""
    joins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensors of the encoder that are several of the decoder, one below the other, by the end of the name."""
    table: str = "embed_tokens.weight"
    """[V, D], the token embeddings."""
    dropouts: tuple[str, ...] = ("attention_dropout",)
    """The rates that the encoder's class has for training."""
    hidden_dropout: str = "hidden_dropout_prob"
    """The rate of hidden numbers; BERT's name for it, which gemb heeds, where the class has none."""
    part: str = ""
    """What stands before the names in the source, where its text model is a part of it."""
    spellings: Mapping[str, str] = field(default_factory=dict)
    """Parts of names that the source spells in another way, by the encoder's spelling."""


_NOT_CAUSAL = MappingProxyType({"is_causal": False})
# transformers halves the window for this flag: 512 is 256 to each side.
_BOTH_WAYS = MappingProxyType({"use_bidirectional_attention": True})
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "gemma3_text": Family("gemma3_text", "Gemma3TextModel", _BOTH_WAYS),
        # T5Gemma's encoder is the same layer, but AutoModel does not load it alone.
        "gemma2": Family("gemma2", "Gemma2Model", _NOT_CAUSAL),
        "llama": Family("eurobert", "EuroBertModel"),
        "mistral": Family("mistral", "MistralModel", _NOT_CAUSAL),
        "qwen3": Family("qwen3", "Qwen3Model", _NOT_CAUSAL),
        "modernbert-decoder": Family(
            "modernbert",
            "ModernBertModel",
            joins={"attn.Wqkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj")},
            table="embeddings.tok_embeddings.weight",
            dropouts=("attention_dropout", "embedding_dropout", "mlp_dropout"),
            hidden_dropout="mlp_dropout",
        ),
    }
)
"""By `model_type` of the decoder's text part."""

_NORMS = MappingProxyType(
    {
        "input_layernorm": "pre_self_attn_layernorm",
        "post_attention_layernorm": "post_self_attn_layernorm",
    }
)
ENCODERS: Mapping[str, Family] = MappingProxyType(
    {
        "t5_gemma_module": Family("gemma2", "Gemma2Model", _NOT_CAUSAL, part="encoder.", spellings=_NORMS),
        # A window of 512 is -255 to +256 there, and 256 to each side here: no class has the former alone.
        "t5gemma2_text": Family(
            "gemma3_text", "Gemma3TextModel", _BOTH_WAYS, part="encoder.", spellings=_NORMS
        ),
    }
)
"""What becomes of the encoder of an encoder-decoder, by `model_type` of its text part."""

_TEXT_PARTS = MappingProxyType(
    {"gemma3": "gemma3_text", "t5gemma": "t5_gemma_module", "t5gemma2": "t5gemma2_text"}
)
_CAUSAL_CLASSES: Mapping[str, str] = MappingProxyType(
    {"llama": "LlamaModel", "modernbert-decoder": "ModernBertDecoderModel"}
)
# What a config says of the decoder's files, of generation and of other tasks.
_NOT_TAKEN = frozenset({
    "architectures", "auto_map", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "_name_or_path", "_attn_implementation", "attn_implementation", "use_bidirectional_attention",
    "is_causal", "mask_token_id", "cache_implementation", "sliding_window_pattern", "_sliding_window_pattern",
    "global_attn_every_n_layers", "rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq",
    "global_rope_theta", "local_rope_theta", "final_logit_softcapping", "tie_word_embeddings",
})  # fmt: skip


def family_of(source: ModelFolder) -> Family:
    """How the model of `source` becomes an encoder.

    Raises MismatchError if it is one already, or of a family that is not known here.
    """
    config = text_config(source)
    if is_encoder_decoder(source.config):
        return ENCODERS[config["model_type"]]
    reaches = reach_of_layers(config)
    if reaches and is_bidirectional(reaches):
        raise MismatchError(
            f"{source.path}: {config['model_type']} is bidirectional already; "
            "of an encoder only --keep-layers and --keep-vocab make another one"
        )
    if config["model_type"] not in FAMILIES:
        raise MismatchError(
            f"{source.path}: gemb cannot adapt the model type {config['model_type']!r}; "
            f"it knows {', '.join(FAMILIES)}, and the text part of gemma3"
        )
    return FAMILIES[config["model_type"]]


def is_encoder_decoder(config: Mapping[str, Any]) -> bool:
    """Whether the model of this config.json has an encoder to take out, and a decoder."""
    is_known = config.get("model_type") in ("t5gemma", "t5gemma2")
    return is_known and bool(config.get("is_encoder_decoder", True))  # left out, it is that of their classes


def text_config(source: ModelFolder) -> dict[str, Any]:
    """The config of the text backbone, an encoder-decoder's encoder; `model_type` may be left out there."""
    inner = dict(source.text_config)
    return {"model_type": _TEXT_PARTS.get(source.family, source.family), **inner}


def adapted_config(
    source: ModelFolder,
    *,
    causal: bool,
    keep_layers: tuple[int, ...],
    dropout: float,
    cut: CutVocabulary | None,
) -> dict[str, Any]:
    """config.json of the encoder, complete, in the spelling of EmbeddingGemma's time, which all tools read.

    `keep_layers` names layers from 0; empty keeps all. `dropout` is the rate for fine-tuning.
    Raises MismatchError for a window that the bidirectional flag cannot halve.
    """
    from transformers import CONFIG_MAPPING

    given = text_config(source)
    kind = given.pop("model_type")
    family = family_of(source)
    if causal and kind in ENCODERS:
        raise MismatchError(
            f"{source.path}: the encoder of {source.family} is bidirectional already, with no mask to keep; "
            "leave out --attention causal"
        )
    # Read by its own class, so that what the source leaves out is what it means there.
    settings = CONFIG_MAPPING[kind](**{key: value for key, value in given.items() if key != "is_causal"})
    read = settings.to_dict()
    own = {*type(settings).__annotations__, *given}
    config = {key: read[key] for key in own if key in read and key not in _NOT_TAKEN}
    target = CONFIG_MAPPING[kind if causal else family.target]
    if not causal and family.target != kind:
        config = {key: value for key, value in config.items() if key in target.__annotations__}
    config.update(_older_rope(read.get("rope_parameters") or {}, kind))
    if isinstance(config.get("layer_types"), list) and keep_layers:
        config["layer_types"] = [config["layer_types"][layer] for layer in keep_layers]
    config["num_hidden_layers"] = len(keep_layers) or read["num_hidden_layers"]
    config.update(dict.fromkeys(family.dropouts, dropout))
    if dropout:
        config[family.hidden_dropout] = dropout
    if cut is not None:
        renumber(config, cut.new_ids)
        config["vocab_size"] = len(cut.kept)
    if not causal and family.target == "eurobert":
        # The class wants one within the vocabulary, and does nothing with it.
        end = config.get("eos_token_id")
        config["mask_token_id"] = (end[0] if isinstance(end, list) else end) or 0
    window = config.get("sliding_window")
    if (
        "use_bidirectional_attention" in family.switch
        and not causal
        and isinstance(window, int)
        and window % 2
    ):
        raise MismatchError(
            f"{source.transformer.folder / 'config.json'}: sliding_window is {window}, an odd number, which "
            "the bidirectional flag cannot halve; was it saved by an older transformers? set it to "
            f"{window - 1} or {2 * (window - 1)}, whichever the model was trained with"
        )
    return {
        "architectures": [_architecture(kind, family, causal=causal)],
        "model_type": kind if causal else family.target,
        **dict(sorted(config.items())),
        **({} if causal else family.switch),
        "torch_dtype": source.weights().dtype,
        "use_cache": False,
    }


def causal_config(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The decoder's config that an adapted `config` would be without its switch; `kind` is its model type."""
    family = FAMILIES[kind]
    return {**{key: value for key, value in config.items() if key not in family.switch}, "model_type": kind}


def _architecture(kind: str, family: Family, *, causal: bool) -> str:
    return _CAUSAL_CLASSES.get(kind, family.architecture) if causal else family.architecture


def _older_rope(parameters: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Rotary settings as config.json spelt them before `rope_parameters`."""
    if kind == "modernbert-decoder":
        return {
            "global_rope_theta": parameters["full_attention"]["rope_theta"],
            "local_rope_theta": parameters["sliding_attention"]["rope_theta"],
        }
    older: dict[str, Any] = {}
    if "sliding_attention" in parameters:
        older["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    is_scaled = scaling.get("rope_type", "default") != "default"
    return {"rope_theta": parameters["rope_theta"], "rope_scaling": scaling if is_scaled else None, **older}


@dataclass(frozen=True)
class Origin:
    """A tensor of the encoder: what it is written from, and how that is told."""

    piece: Piece
    sources: tuple[str, ...]
    """Names in the source's files."""
    change: str
    """`copied`, `joined` or `rows kept`."""


@dataclass(frozen=True)
class TensorMap:
    """Every tensor of the encoder, and every one of the source that it does not have."""

    origins: tuple[Origin, ...]
    left_out: tuple[str, ...]


def map_tensors(
    source: ModelFolder,
    config: Mapping[str, Any],
    *,
    causal: bool,
    keep_layers: tuple[int, ...],
    cut: CutVocabulary | None,
) -> TensorMap:
    """Where each tensor of the encoder with the adapted `config` comes from.

    Names and shapes are those of transformers' own class. Raises MismatchError with every tensor that is
    missing, has another shape, or is in a layer without being known there.
    """
    weights = source.weights()
    family = family_of(source)
    prefix = prefix_of_table(weights, family.part + family.table) + family.part
    problems: list[str] = []
    origins: list[Origin] = []
    used: set[str] = set()
    for name, shape in _expected(
        config, rows=weights.shape(prefix + family.table)[0] if cut else None
    ).items():
        old = _renumbered(name, keep_layers)
        parts = () if causal else _parts(old, family)
        names = tuple(prefix + _spelt(part, family) for part in parts or (old,))
        missing = [part for part in names if part not in weights]
        problems += [f"no {part}" for part in missing]
        if missing:
            continue
        used.update(names)
        specs = [weights.spec(part) for part in names]
        piece = joined(name, specs) if parts else whole(name, specs[0])
        if piece.shape != shape or any(spec.shape[1:] != shape[1:] for spec in specs):
            found = " and ".join(f"{spec.name} {list(spec.shape)}" for spec in specs)
            problems.append(f"{found}, not {list(shape)}")
            continue
        change = "joined" if parts else "copied"
        if cut is not None and old == family.table:
            piece, change = rows_of(name, specs[0], cut.kept), "rows kept"
        origins.append(Origin(piece, names, change))
    left_out = tuple(name for name in weights if name not in used)
    problems += [f"unknown {name}" for name in left_out if _belongs(name, prefix, keep_layers, config)]
    refuse_tensors(source, problems)
    return TensorMap(tuple(origins), left_out)


def refuse_tensors(source: ModelFolder, problems: Collection[str]) -> None:
    """Raises MismatchError with all `problems` of the tensors of `source`, unless there are none."""
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems)
        count = f"{len(problems)} tensor{'s' if len(problems) != 1 else ''}"
        kind = text_config(source)["model_type"]
        raise MismatchError(
            f"{source.path}: {count} not as config.json makes a {kind}; download the model again\n{shown}"
        )


def _expected(config: Mapping[str, Any], *, rows: int | None) -> dict[str, tuple[int, ...]]:
    """Shape by name of every tensor of the class; with `rows` the table has so many, as before a cut."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModel

    settings = dict(config) if rows is None else {**config, "vocab_size": rows}
    kind = str(settings.pop("model_type"))
    with torch.device("meta"):
        model = AutoModel.from_config(CONFIG_MAPPING[kind](**settings))  # type: ignore[no-untyped-call]
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def prefix_of_table(weights: Weights, table: str) -> str:
    """What stands before the names of the text model. Raises MismatchError if there is no such model."""
    found = next((name for name in weights if name == table or name.endswith(f".{table}")), None)
    return (weights.spec(table).name if found is None else found).removesuffix(table)


def _renumbered(name: str, keep_layers: tuple[int, ...]) -> str:
    """The name in the source of a tensor of the encoder: layer i is its layer keep_layers[i]."""
    head, mark, rest = name.partition("layers.")
    if not keep_layers or not mark:
        return name
    number, _, tail = rest.partition(".")
    return f"{head}layers.{keep_layers[int(number)]}.{tail}"


def _spelt(name: str, family: Family) -> str:
    """The name as the source spells it."""
    for ours, its in family.spellings.items():
        name = name.replace(f".{ours}.", f".{its}.")
    return name


def _parts(name: str, family: Family) -> tuple[str, ...]:
    """The tensors that `name` is joined from; empty where it is one."""
    for whole_name, parts in family.joins.items():
        for ending in (".weight", ".bias"):
            if name.endswith(whole_name + ending):
                start = name.removesuffix(whole_name + ending)
                return tuple(f"{start}{part}{ending}" for part in parts)
    return ()


def split_back(tensors: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Tensors of an encoder under the names of the decoder's class: what was joined is apart again."""
    apart: dict[str, Any] = {}
    for name, tensor in tensors.items():
        parts = _parts(name, FAMILIES[kind])
        pieces = tensor.chunk(len(parts)) if parts else (tensor,)
        apart.update(zip(parts or (name,), pieces, strict=True))
    return apart


def _belongs(name: str, prefix: str, keep_layers: tuple[int, ...], config: Mapping[str, Any]) -> bool:
    """Whether a tensor that is not used stands in a layer that is; buffers of old folders do not count."""
    if not name.startswith(f"{prefix}layers.") or name.endswith("inv_freq"):
        return False
    number = name.removeprefix(f"{prefix}layers.").partition(".")[0]
    kept = keep_layers or range(config["num_hidden_layers"])
    return number.isdecimal() and int(number) in kept

"""A model folder as gemb understands it: backbone, pooling, projections, prompts, lengths and identity.

Both spellings of sentence-transformers are read (up to 5.x, and 6.x), and a bare transformers folder.
Nothing here imports torch or runs code of the folder; what gemb does not know is refused by name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import orjson

from gemb.errors import MismatchError, UnavailableError
from gemb.model.grid_weights import GGUF_FILE, GgufWeights
from gemb.model.identity import content_digest, is_remembered
from gemb.model.weights import TensorSpec, Weights, has_safetensors

__all__ = [
    "DenseSettings",
    "LayerNormSettings",
    "ModelFolder",
    "ModuleSpec",
    "PoolingMode",
    "PoolingSettings",
    "Weights",
    "fingerprint",
    "read_folder",
]

OwnPoolingMode: TypeAlias = Literal["first-k", "last-k", "attention-query", "attention-kv"]
PoolingMode: TypeAlias = Literal[
    "cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", OwnPoolingMode
]
ModuleKind: TypeAlias = Literal["transformer", "pooling", "dense", "layer_norm", "normalize"]

# In the order in which sentence-transformers concatenates several modes.
_MODE_FLAGS: Mapping[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_KINDS: Mapping[str, ModuleKind] = {
    "Transformer": "transformer",
    "Pooling": "pooling",
    "Dense": "dense",
    "LayerNorm": "layer_norm",
    "Normalize": "normalize",
}
OWN_POOLINGS: tuple[OwnPoolingMode, ...] = get_args(OwnPoolingMode)
"""What no module of sentence-transformers computes; see `gemb.model.pooling`."""
OWN_POOLING_TYPE = "gemb.Pooling"
"""The type that modules.json gives them; there is no such class, so that nothing else runs such a folder."""
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")
"""The activations of a Dense module that gemb computes, by their class name in torch.nn."""

# Their first position stands after the padding id: position ids run from padding_idx + 1 = 2.
_OFFSET_POSITIONS = frozenset({
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "data2vec-text",
})  # fmt: skip
# Families whose positions are a table: a text longer than the table cannot be computed at all.
_TABLE_POSITIONS = _OFFSET_POSITIONS | {"bert", "distilbert", "electra", "albert", "gpt2", "xlm"}
_SANE_TOKENS = 10_000_000  # transformers writes 1e30 for "no limit known"
_TRANSFORMER_CONFIGS = (
    "sentence_bert_config.json", "sentence_roberta_config.json", "sentence_distilbert_config.json",
    "sentence_camembert_config.json", "sentence_albert_config.json", "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)  # fmt: skip
_VOCABULARIES = (
    "vocab.txt", "vocab.json", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "spm.model",
)  # fmt: skip
# Keys of config.json that no vector depends on: they may change when a folder is only saved again.
_NOISE = frozenset({
    "_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "id2label",
    "label2id", "_attn_implementation_autoset", "attn_implementation", "gradient_checkpointing",
    "initializer_range", "output_attentions", "output_hidden_states", "return_dict", "problem_type",
    "cache_implementation", "attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob",
    "classifier_dropout", "embedding_dropout", "mlp_dropout", "torchscript", "chunk_size_feed_forward",
    "transformers.js_config",
})  # fmt: skip
_HIDDEN_DROPOUTS = ("hidden_dropout_prob", "dropout_rate", "mlp_dropout", "dropout")  # one a family
_ATTENTION_DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob")
_EMBEDDING_GEMMA_DIMS = (768, 512, 256, 128)  # EmbeddingGemma, arXiv 2509.20354, and its model card
_EMBEDDING_GEMMA_QUERY = "task: search result | query: "


@dataclass(frozen=True, slots=True)
class PoolingSettings:
    """How token states become one vector; several modes are concatenated in the order given."""

    modes: tuple[PoolingMode, ...]
    include_prompt: bool
    """Whether the tokens of the prompt take part."""
    width: int | None
    """D of the token states as the folder declares it; None if it does not."""
    tokens: int | None = None
    """K of first-k and last-k."""
    heads: int | None = None
    """H of attention pooling."""
    probes: int | None = None
    """P of attention-kv."""

    @property
    def is_own(self) -> bool:
        """Whether only gemb computes it."""
        return self.modes[0] in OWN_POOLINGS

    @property
    def described(self) -> str:
        """The modes and their sizes in words."""
        sizes = {"tokens": self.tokens, "heads": self.heads, "probes": self.probes}
        given = [f"{size:,} {name}" for name, size in sizes.items() if size is not None]
        return " and ".join(self.modes) + (f" of {', '.join(given)}" if given else "")

    def shapes(self, width: int) -> dict[str, tuple[int, int]]:
        """Shape of each tensor of attention pooling on states[T, width], by name; {} for the other modes."""
        square = (width, width)
        match self.modes[0]:
            case "attention-query":
                return {"probe.weight": (1, width), "key.weight": square, "value.weight": square}
            case "attention-kv":
                probes = (self.probes or 0, width)
                return {
                    "query.weight": square, "key_probes.weight": probes, "value_probes.weight": probes,
                }  # fmt: skip
        return {}


@dataclass(frozen=True, slots=True)
class DenseSettings:
    """A linear layer on the pooled vector: `activation(weight @ x + bias)`, plus x where `residual`."""

    in_features: int
    out_features: int
    bias: bool
    activation: str
    """Class name in torch.nn, one of ACTIVATIONS."""
    residual: bool


@dataclass(frozen=True, slots=True)
class LayerNormSettings:
    """A torch.nn.LayerNorm over the pooled vector, with its default epsilon."""

    dimension: int


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One step from token ids to the vector; `settings` is None for transformer and normalize."""

    kind: ModuleKind
    folder: Path
    """Where its files are; need not exist for normalize."""
    settings: PoolingSettings | DenseSettings | LayerNormSettings | None = None
    gguf: Path | None = None
    """The model.gguf that holds the weights of all modules; None where each has its own."""

    @property
    def has_weights(self) -> bool:
        """Whether it has tensors of its own."""
        if isinstance(self.settings, PoolingSettings):
            return self.settings.heads is not None
        return self.kind in {"transformer", "dense", "layer_norm"}

    def weights(self) -> Weights:
        """The tensors of a module that has any; headers are read now."""
        if self.gguf is None:
            return Weights.read(self.folder)
        return GgufWeights.of_module(self.gguf, self.folder)


@dataclass(frozen=True)
class ModelFolder:
    """What a folder declares, checked: the parts are known, in an order that works, and weights are there."""

    path: Path
    config: Mapping[str, Any]
    """config.json of the backbone, with the overrides of the Transformer module applied."""
    family: str
    """`model_type` of config.json."""
    modules: tuple[ModuleSpec, ...]
    """transformer, pooling, then dense, layer_norm and normalize in the order of the folder."""
    tokenizer_folder: Path
    """Holds tokenizer.json, or the older files that transformers turns into one."""
    prompts: Mapping[str, str]
    default_prompt: str | None
    similarity: str
    """cosine, dot, euclidean or manhattan."""
    dims: int
    """D of the vectors before any cut."""
    truncate_dims: int | None
    """The cut that the folder asks for by itself."""
    matryoshka_dims: tuple[int, ...]
    """The sizes the model was trained for, largest first; empty if it declares none."""
    max_tokens: int
    """Longest text in tokens, special tokens and prompt counted."""
    max_tokens_reason: str
    do_lower_case: bool
    """Whether texts are lower-cased before the tokenizer, as its Transformer module asks."""
    notes: tuple[str, ...] = field(default=())
    """What was assumed or left out, one sentence each; shown to the user."""

    @property
    def transformer(self) -> ModuleSpec:
        """The backbone."""
        return self.modules[0]

    @property
    def pooling(self) -> PoolingSettings:
        """The settings of the pooling module."""
        return cast(PoolingSettings, self.modules[1].settings)

    @property
    def normalizes(self) -> bool:
        """Whether the folder itself brings its vectors to unit length."""
        return self.modules[-1].kind == "normalize"

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of `config` that describes the text backbone; `config` itself unless it nests one."""
        return _text_config(self.config)

    @property
    def dropout_rates(self) -> tuple[float, float]:
        """Shares of hidden numbers and of attention weights that config.json has for training; else 0."""
        config = self.text_config
        hidden, attention = (
            next((float(config[key]) for key in keys if isinstance(config.get(key), int | float)), 0.0)
            for keys in (_HIDDEN_DROPOUTS, _ATTENTION_DROPOUTS)
        )
        return hidden, attention

    def weights(self) -> Weights:
        """The tensors of the backbone, names as they stand in the files; headers are read now."""
        return self.transformer.weights()


def read_folder(path: Path) -> ModelFolder:
    """The model folder at `path`, read and checked; headers of weights are looked at, tensors are not.

    Weights are model.safetensors of each module, or one model.gguf that `gemb quantize` wrote.

    Raises UnavailableError (7) if something is missing or damaged, MismatchError (5) if a part is unknown.
    """
    if not path.is_dir():
        raise UnavailableError(
            f"{path} is not a folder; a model is a folder with config.json and model.safetensors"
        )
    notes: list[str] = []
    entries = _module_entries(path)
    declared = _read_object(path / "config_sentence_transformers.json", required=False)
    backbone = path if entries is None else entries[0][1]
    settings = _transformer_settings(backbone, notes)
    config = _backbone_config(path, backbone, settings, notes)
    if entries is None:
        modules = _bare_modules(path, config, notes)
    else:
        modules = _modules(entries, path / "modules.json", notes)
    if (path / GGUF_FILE).exists() and not has_safetensors(backbone):
        modules = tuple(replace(module, gguf=path / GGUF_FILE) for module in modules)
    width = _hidden_width(config)
    dims = _check_widths(modules, width, path)
    for module in modules:
        if module.kind == "pooling" and module.has_weights:
            _check_pooling_weights(module)
        elif module.has_weights:
            module.weights()
    prompts = _prompts(declared, path / "config_sentence_transformers.json")
    default = declared.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise MismatchError(
            f"{path / 'config_sentence_transformers.json'}: default_prompt_name is {default!r}, "
            f"but the prompts are {', '.join(prompts) or 'none'}"
        )
    tokenizer_folder = _tokenizer_folder(path, backbone)
    max_tokens, reason = _max_tokens(config, settings, tokenizer_folder, notes)
    truncate = declared.get("truncate_dim")
    return ModelFolder(
        path=path,
        config=config,
        family=config["model_type"],
        modules=modules,
        tokenizer_folder=tokenizer_folder,
        prompts=prompts,
        default_prompt=default,
        similarity=str(declared.get("similarity_fn_name") or "cosine"),
        dims=dims,
        truncate_dims=truncate if isinstance(truncate, int) and 0 < truncate < dims else None,
        matryoshka_dims=_matryoshka_dims(path, config, declared, modules, prompts, dims),
        max_tokens=max_tokens,
        max_tokens_reason=reason,
        do_lower_case=bool(settings.get("do_lower_case", False)),
        notes=tuple(notes),
    )


def fingerprint(folder: ModelFolder, digests: Mapping[TensorSpec, str] | None = None) -> str:
    """64 hex digits for everything the vectors of `folder` depend on; people are shown the first 12.

    Weights, tokenizer, modules, prompts and lengths count, by content; names, paths, sharding and the model
    card do not. The weights are read once and the result is remembered (see gemb.model.identity); tensors
    that have a digest in `digests` are not read at all.
    Raises UnavailableError if a weight is NaN or infinite, or a file cannot be read.
    """
    tokenizer_config = _read_object(folder.tokenizer_folder / "tokenizer_config.json", required=False)
    settings = {
        "config": _without_noise(folder.config),
        "modules": [[module.kind, _plain(module.settings)] for module in folder.modules],
        "prompts": {name: text for name, text in folder.prompts.items() if text},
        "default_prompt": folder.default_prompt,
        "similarity": folder.similarity,
        "truncate_dims": folder.truncate_dims,
        "max_tokens": folder.max_tokens,
        "do_lower_case": folder.do_lower_case,
        "tokenizer": {
            key: tokenizer_config[key]
            for key in ("add_bos_token", "add_eos_token", "do_lower_case", "add_prefix_space")
            if tokenizer_config.get(key) is not None
        },
    }
    return content_digest(*_content(folder), settings, digests)


def is_fingerprinted(folder: ModelFolder) -> bool:
    """Whether `fingerprint` is remembered, and need not read the weights."""
    return is_remembered(*_content(folder))


def _content(folder: ModelFolder) -> tuple[list[Weights], list[Path]]:
    """What counts by its content in the identity of `folder`: all tensors, and the files of the tokenizer."""
    tokenizer = folder.tokenizer_folder / "tokenizer.json"
    others = [tokenizer] if tokenizer.exists() else _tokenizer_files(folder.tokenizer_folder)
    return [module.weights() for module in folder.modules if module.has_weights], others


# --- modules --------------------


def _module_entries(path: Path) -> list[tuple[str, Path]] | None:
    """(type, folder) of each entry of modules.json in order; None if there is no such file."""
    file = path / "modules.json"
    if not file.exists():
        return None
    listed = cast(list[Any], _read_json(file))
    entries: list[tuple[str, Path]] = []
    try:
        for entry in sorted(listed, key=lambda one: one.get("idx", 0)):
            place = path / entry["path"]
            if not place.resolve().is_relative_to(path.resolve()):
                raise UnavailableError(
                    f"{file}: the module folder {entry['path']!r} is outside of the model folder"
                )
            entries.append((entry["type"], place))
    except (TypeError, KeyError, AttributeError):
        raise UnavailableError(f"{file}: not a list of objects with type and path") from None
    if not entries:
        raise UnavailableError(f"{file}: no modules")
    known = ", ".join(_KINDS)
    for kind, _ in entries:
        name = str(kind).rpartition(".")[2]
        if kind == OWN_POOLING_TYPE:
            continue
        if not str(kind).startswith("sentence_transformers."):
            raise MismatchError(
                f"{file}: the module {kind} is code of the folder's author, which gemb never runs; "
                f"gemb knows {known}"
            )
        if name in {"Router", "Asym"}:
            raise MismatchError(
                f"{file}: the module {kind} sends queries and documents to different models; "
                f"gemb knows {known}; point -m at one of its sub-folders' models instead"
            )
        if name not in _KINDS and name != "Dropout":
            raise MismatchError(f"{file}: gemb does not know the module {kind}; it knows {known}")
    if str(entries[0][0]).rpartition(".")[2] != "Transformer":
        raise MismatchError(f"{file}: the first module is {entries[0][0]}; gemb needs a Transformer there")
    return entries


def _modules(entries: list[tuple[str, Path]], file: Path, notes: list[str]) -> tuple[ModuleSpec, ...]:
    modules: list[ModuleSpec] = []
    for type_name, place in entries:
        name = type_name.rpartition(".")[2]
        if name == "Dropout":
            notes.append("the Dropout module is left out; it does nothing outside of training")
            continue
        kind = _KINDS[name]
        settings: PoolingSettings | DenseSettings | LayerNormSettings | None = None
        if kind == "pooling":
            is_own = type_name == OWN_POOLING_TYPE
            settings = (_own_pooling if is_own else _pooling)(place / "config.json")
        elif kind == "dense":
            settings = _dense(place / "config.json")
        elif kind == "layer_norm":
            settings = LayerNormSettings(_positive(_read_object(place / "config.json"), "dimension", place))
        elif kind == "normalize":
            _check_names(_read_object(place / "config.json", required=False), place / "config.json")
        modules.append(ModuleSpec(kind, place, settings))
    kinds = [module.kind for module in modules]
    if (
        len(kinds) < 2
        or kinds[1] != "pooling"
        or kinds.count("pooling") > 1
        or kinds.count("transformer") > 1
    ):
        raise MismatchError(
            f"{file}: the modules are {', '.join(kinds)}; "
            "gemb needs one transformer, one pooling, then any dense, layer_norm and normalize"
        )
    return tuple(modules)


def _bare_modules(path: Path, config: Mapping[str, Any], notes: list[str]) -> tuple[ModuleSpec, ...]:
    """Transformer and pooling of a folder without modules.json, by the rule of sentence-transformers 6.2."""
    architectures = config.get("architectures") or []
    generates = any(str(name).endswith("ForCausalLM") for name in architectures)
    if generates and config.get("is_causal") is not False:
        mode: PoolingMode = "lasttoken"
        reason = f"{architectures[0]} is a decoder"
    elif generates:
        mode, reason = "mean", f"{architectures[0]} has is_causal=false"
    else:
        mode, reason = "mean", f"{architectures[0] if architectures else config['model_type']} is an encoder"
    notes.append(
        f"no modules.json: pooling {mode} is assumed because {reason}, as sentence-transformers does"
    )
    pooling = PoolingSettings((mode,), include_prompt=True, width=None)
    return (ModuleSpec("transformer", path), ModuleSpec("pooling", path, pooling))


def _pooling(file: Path) -> PoolingSettings:
    """Pooling settings in either spelling."""
    settings = _read_object(file)
    named = settings.get("pooling_mode")
    if named is None:
        modes = [mode for key, mode in _MODE_FLAGS.items() if settings.get(key)]
        unknown = [key for key, on in settings.items() if key.startswith("pooling_mode_") and on]
        unknown = [key for key in unknown if key not in _MODE_FLAGS]
        modes = modes or ["mean"]
    else:
        names = [named] if isinstance(named, str) else list(named)
        modes = [mode for name in names for mode in _MODE_FLAGS.values() if mode == name]
        unknown = [str(name) for name in names if name not in modes]
    if unknown or not modes:
        raise MismatchError(
            f"{file}: gemb does not know the pooling {', '.join(unknown) or 'of no mode'}; "
            f"it knows {', '.join(_MODE_FLAGS.values())}"
        )
    width = settings.get("embedding_dimension", settings.get("word_embedding_dimension"))
    return PoolingSettings(
        tuple(modes),
        include_prompt=bool(settings.get("include_prompt", True)),
        width=width if isinstance(width, int) else None,
    )


def _own_pooling(file: Path) -> PoolingSettings:
    """Settings of a pooling that only gemb computes."""
    settings = _read_object(file)
    mode = settings.get("pooling_mode")
    if mode not in OWN_POOLINGS:
        raise MismatchError(
            f"{file}: gemb does not know the pooling {mode!r}; of its own it knows {', '.join(OWN_POOLINGS)}"
        )
    width = _positive(settings, "embedding_dimension", file)
    takes_some = mode in ("first-k", "last-k")
    heads = None if takes_some else _positive(settings, "heads", file)
    if heads is not None and width % heads:
        raise MismatchError(f"{file}: {heads} heads do not divide the {width} numbers of a token")
    return PoolingSettings(
        (mode,),
        include_prompt=bool(settings.get("include_prompt", True)),
        width=width,
        tokens=_positive(settings, "tokens", file) if takes_some else None,
        heads=heads,
        probes=_positive(settings, "probes", file) if mode == "attention-kv" else None,
    )


def _check_pooling_weights(module: ModuleSpec) -> None:
    """Raises MismatchError where the tensors of attention pooling are not those of its settings."""
    pooling = cast(PoolingSettings, module.settings)
    weights = module.weights()
    for name, shape in pooling.shapes(cast(int, pooling.width)).items():
        if weights.shape(name) != shape:
            raise MismatchError(
                f"{weights.spec(name).file}: {name} is {list(weights.shape(name))}, "
                f"not {list(shape)} as in {module.folder / 'config.json'}"
            )


def _dense(file: Path) -> DenseSettings:
    settings = _read_object(file)
    _check_names(settings, file)
    # torch.nn.modules.linear.Identity and the like; a missing key means Tanh to sentence-transformers.
    full = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = full.rpartition(".")[2]
    if not full.startswith("torch.nn.") or activation not in ACTIVATIONS:
        raise MismatchError(
            f"{file}: gemb does not know the activation_function {full!r}; "
            f"it knows {', '.join(ACTIVATIONS)} of torch.nn"
        )
    return DenseSettings(
        in_features=_positive(settings, "in_features", file),
        out_features=_positive(settings, "out_features", file),
        bias=bool(settings.get("bias", True)),
        activation=activation,
        residual=bool(settings.get("use_residual", False)),
    )


def _check_names(settings: Mapping[str, Any], file: Path) -> None:
    """Refuse a module that reads or writes something else than the pooled vector."""
    for key in ("module_input_name", "module_output_name"):
        name = settings.get(key) or "sentence_embedding"
        if name != "sentence_embedding":
            raise MismatchError(
                f"{file}: {key} is {name!r}; gemb gives one vector a text and knows only 'sentence_embedding'"
            )


def _check_widths(modules: tuple[ModuleSpec, ...], width: int | None, path: Path) -> int:
    """D of the vectors; raises MismatchError where one part's output does not fit the next one's input."""
    pooling = cast(PoolingSettings, modules[1].settings)
    if width is not None and pooling.width is not None and width != pooling.width:
        raise MismatchError(
            f"{modules[1].folder / 'config.json'}: pools {pooling.width} numbers a token, "
            f"but the backbone of {path} gives {width}"
        )
    per_token = width if width is not None else pooling.width
    if per_token is None:
        raise MismatchError(
            f"{path / 'config.json'}: no hidden_size, and no width in the pooling settings either"
        )
    dims = per_token * len(pooling.modes)
    for module in modules[2:]:
        match module.settings:
            case DenseSettings(in_features=wanted) | LayerNormSettings(dimension=wanted) if wanted != dims:
                raise MismatchError(
                    f"{module.folder / 'config.json'}: takes {wanted} numbers, "
                    f"but the part before gives {dims}"
                )
            case DenseSettings(out_features=gives):
                dims = gives
    return dims


# --- backbone --------------------


def _transformer_settings(backbone: Path, notes: list[str]) -> Mapping[str, Any]:
    """sentence_bert_config.json of the Transformer module, or an older name of it; {} if there is none."""
    for name in _TRANSFORMER_CONFIGS:
        file = backbone / name
        if not file.exists():
            continue
        settings = _read_object(file)
        task = settings.get("transformer_task", "feature-extraction")
        output = settings.get("module_output_name") or "token_embeddings"
        if task != "feature-extraction" or output != "token_embeddings":
            raise MismatchError(
                f"{file}: transformer_task {task!r} with output {output!r}; "
                "gemb knows 'feature-extraction' with 'token_embeddings'"
            )
        for key in ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs"):
            given = settings.get(key)
            harmless = {
                "attn_implementation",
                "torch_dtype",
                "dtype",
                "device_map",
                "padding_side",
                "trust_remote_code",
            }
            other = sorted(set(given) - harmless) if isinstance(given, Mapping) else []
            if other:
                notes.append(f"{name}: {key} {', '.join(other)} not used by gemb")
        return settings
    return {}


def _backbone_config(
    path: Path, backbone: Path, settings: Mapping[str, Any], notes: list[str]
) -> Mapping[str, Any]:
    file = backbone / "config.json"
    if not file.exists():
        if (backbone / "adapter_config.json").exists():
            raise UnavailableError(
                f"{backbone} holds an adapter (adapter_config.json), not a whole model; "
                "merge it into its base model and save that folder"
            )
        there = sorted(one.name for one in path.iterdir())
        listed = (
            f"it has {', '.join(there[:5])}{', ...' if len(there) > 5 else ''}" if there else "it is empty"
        )
        raise UnavailableError(f"{path} is not a model folder: no {file.relative_to(path)}; {listed}")
    config = dict(_read_object(file))
    for key in ("config_args", "config_kwargs"):
        overrides = settings.get(key)
        if isinstance(overrides, Mapping):
            used = {name: value for name, value in overrides.items() if name != "trust_remote_code"}
            config.update(used)
            if used:
                notes.append(f"config.json with {', '.join(sorted(used))} of the Transformer module's {key}")
    if not isinstance(config.get("model_type"), str):
        raise UnavailableError(f"{file}: no model_type, so the family of the model cannot be told")
    if config.get("auto_map"):
        notes.append("config.json names code of the folder's author (auto_map); gemb never runs it")
    text = _text_config(config)
    window = text.get("sliding_window")
    if text.get("use_bidirectional_attention") and isinstance(window, int) and window % 2:
        # transformers 4.57 saved the window that it had halved for itself: 512 became 257.
        notes.append(
            f"sliding_window is {window}, an odd number: was it halved when saved? "
            f"a token sees {window // 2} to each side, as in transformers"
        )
    return config


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text part of a config: its `text_config`, the `encoder` of an encoder-decoder, or all of it."""
    for key in ("text_config", "encoder"):
        inner = config.get(key)
        if isinstance(inner, Mapping):
            return _text_config(inner)
    return config


def _hidden_width(config: Mapping[str, Any]) -> int | None:
    """D of the token states that the backbone gives; None if config.json does not say."""
    text = _text_config(config)
    # EmbeddingGemma 2 projects its states inside of the backbone, from hidden_size to embedding_dim.
    projected = (
        text.get("embedding_dim") if str(text.get("model_type", "")).startswith("embedding_gemma2") else None
    )
    for width in (
        projected,
        text.get("hidden_size"),
        text.get("d_model"),
        text.get("dim"),
        text.get("n_embd"),
    ):
        if isinstance(width, int):
            return width
    return None


def _tokenizer_folder(path: Path, backbone: Path) -> Path:
    for place in (backbone, path):
        if (place / "tokenizer.json").exists():
            return place
    for place in (backbone, path):
        if _tokenizer_files(place):
            return place
    raise UnavailableError(f"{path} has no tokenizer: no tokenizer.json; download the model again")


def _tokenizer_files(place: Path) -> list[Path]:
    """The files of a tokenizer without tokenizer.json, in a fixed order; empty without a vocabulary."""
    vocabularies = [place / name for name in _VOCABULARIES if (place / name).exists()]
    additions = [place / name for name in ("merges.txt", "added_tokens.json", "special_tokens_map.json")]
    return vocabularies + [file for file in additions if file.exists()] if vocabularies else []


def _max_tokens(
    config: Mapping[str, Any], settings: Mapping[str, Any], tokenizer_folder: Path, notes: list[str]
) -> tuple[int, str]:
    """Longest text in tokens, and where that number comes from."""
    text = _text_config(config)
    family = str(config["model_type"])
    table = text.get("max_position_embeddings", text.get("n_positions"))
    positions = table if isinstance(table, int) and table > 0 else None
    if positions is not None and family in _OFFSET_POSITIONS:
        positions -= 2
    file = tokenizer_folder / "tokenizer_config.json"
    length = _read_object(file, required=False).get("model_max_length")
    tokenizer_limit = int(length) if isinstance(length, int | float) and 0 < length <= _SANE_TOKENS else None
    declared = settings.get("max_seq_length")
    if isinstance(declared, int) and declared > 0:
        limit, reason = declared, "max_seq_length of the Transformer module"
        # A table of positions ends; rotary and relative positions do not, so there the author's word holds.
        if positions is not None and family in _TABLE_POSITIONS and declared > positions:
            notes.append(f"max_seq_length {declared} is cut to the {positions} positions of the model")
            limit, reason = positions, "positions of the model"
        return limit, reason
    if tokenizer_limit is not None and (positions is None or tokenizer_limit <= positions):
        return tokenizer_limit, "model_max_length of the tokenizer"
    if positions is not None:
        return positions, "positions of the model"
    notes.append("no maximum length is declared; 512 tokens are assumed")
    return 512, "assumed"


# --- prompts, sizes --------------------


def _prompts(declared: Mapping[str, Any], file: Path) -> Mapping[str, str]:
    """The prompts by name; some are empty, as sentence-transformers 6 writes them where there are none."""
    prompts = declared.get("prompts") or {}
    if not isinstance(prompts, Mapping) or not all(isinstance(text, str) for text in prompts.values()):
        raise UnavailableError(f"{file}: prompts is not an object of name to text")
    return dict(prompts)


def _matryoshka_dims(
    path: Path,
    config: Mapping[str, Any],
    declared: Mapping[str, Any],
    modules: tuple[ModuleSpec, ...],
    prompts: Mapping[str, str],
    dims: int,
) -> tuple[int, ...]:
    """The sizes the model was trained for, largest first, from the first source that names any.

    Sources: `matryoshka_dims` in config_sentence_transformers.json, `matryoshka_dimensions` in config.json,
    the loss settings in the model card of sentence-transformers, and last the known sizes of EmbeddingGemma,
    whose folder does not declare them. It is told by its shape: gemma3_text with two Dense modules that lead
    back to 768 and the published query prompt; or EmbeddingGemma 2's own family with 768 dims.
    """
    sizes = (
        declared.get("matryoshka_dims")
        or config.get("matryoshka_dimensions")
        or _card_dims(path / "README.md")
    )
    if not sizes:
        dense = [module.settings for module in modules if module.kind == "dense"]
        first = (
            config["model_type"] == "gemma3_text"
            and len(dense) == 2
            and _EMBEDDING_GEMMA_QUERY in prompts.values()
        )
        second = str(config["model_type"]).startswith("embedding_gemma2")
        sizes = _EMBEDDING_GEMMA_DIMS if dims == _EMBEDDING_GEMMA_DIMS[0] and (first or second) else ()
    return tuple(sorted({size for size in sizes if isinstance(size, int) and 0 < size <= dims}, reverse=True))


def _card_dims(card: Path) -> list[int]:
    """`matryoshka_dims` as the model card's header or its loss settings list them; empty if they do not."""
    if not card.exists():
        return []
    text = card.read_text("utf-8", errors="replace")
    found = re.search(r'"?matryoshka_dims"?\s*:\s*\[([\d\s,]+)\]', text)
    if found:
        return [int(size) for size in found[1].split(",") if size.strip()]
    block = re.search(r"^matryoshka_dims:\s*\n((?:\s*-\s*\d+\s*\n)+)", text, re.MULTILINE)
    return [int(size) for size in re.findall(r"\d+", block[1])] if block else []


# --- files --------------------


def _read_json(file: Path) -> object:
    try:
        value: object = orjson.loads(file.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UnavailableError(
            f"{file}:{error.lineno}: not JSON ({error.msg}); download the model again"
        ) from None
    except OSError as error:
        raise UnavailableError(f"{file} cannot be read: {error.strerror}; download the model again") from None
    return value


def _read_object(file: Path, *, required: bool = True) -> Mapping[str, Any]:
    """A JSON object; {} for a missing file that is not required."""
    if not required and not file.exists():
        return {}
    value = _read_json(file)
    if not isinstance(value, dict):
        raise UnavailableError(f"{file}: not a JSON object; download the model again")
    return value


def _positive(settings: Mapping[str, Any], key: str, file: Path) -> int:
    value = settings.get(key)
    if not isinstance(value, int) or value <= 0:
        raise UnavailableError(f"{file}: {key} is {value!r}, not a positive whole number")
    return value


def _plain(settings: PoolingSettings | DenseSettings | LayerNormSettings | None) -> dict[str, Any] | None:
    """Settings as JSON values: without what is not set, and a pooling's width, which the backbone has."""
    if settings is None:
        return None
    values = {name: getattr(settings, name) for name in settings.__slots__ if name != "width"}
    return {name: value for name, value in values.items() if value is not None}


def _without_noise(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without nulls and without what no vector depends on, at every depth."""
    return {
        key: _without_noise(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _NOISE and value is not None
    }

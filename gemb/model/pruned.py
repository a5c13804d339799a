"""A smaller model cut out of another one: some of its layers, and the part of its vocabulary that texts need.

    write_pruned(read_folder(path), Path("student"), keep_layers=(0, 2, 5), texts=corpus)

The result is a complete sentence-transformers folder. Its weights are those of the source, to the bit; a
distillation then teaches them to work together again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from gemb.errors import GembError, MismatchError
from gemb.files import atomic_write, read_json, write_json
from gemb.model.attention import layer_types
from gemb.model.folder import ModelFolder
from gemb.model.tensor_file import save_tensors
from gemb.model.vocabulary import CutVocabulary, cut_vocabulary
from gemb.model.weights import Weights
from gemb.text.prompts import Prompts
from gemb.text.tokenisation import Tokeniser

if TYPE_CHECKING:
    from torch import Tensor

_LAYER = re.compile(r"((?:.*\.)?(?:layer|layers)\.)(\d+)(\..*)")
_COUNTS = ("num_hidden_layers", "n_layers")
_PER_LAYER = ("embedding_gemma2", "embedding_gemma2_text")
"""Families with tensors that hold a part for each layer side by side."""
_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")
"""Families whose positions count from the id of the padding."""
_TABLE = re.compile(
    r"(word_embeddings|embed_tokens\w*|tok_embeddings|shared|lm_head|decoder)\.(weight|bias)$"
)
_STALE = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
"""Older forms of the tokenizer, which would still have all entries."""
_TEXTS_AT_ONCE = 1024
_BEGINNING_CHARACTERS = 256
"""Of a text behind a prompt: the prompt changes no token further on."""
_WHOLE_TOKENS = 1 << 30


@dataclass(frozen=True)
class Pruned:
    """What was cut, before and after."""

    layers: tuple[int, int]
    vocabulary: tuple[int, int]
    """Rows of the table."""
    parameters: tuple[int, int]
    """Of all modules, the table counted."""


def write_pruned(
    source: ModelFolder,
    target: Path,
    *,
    keep_layers: Sequence[int] = (),
    texts: Iterable[str] | None = None,
    largest: int | None = None,
) -> Pruned:
    """Write to `target` the model of `source` with fewer layers, and with the entries that `texts` need.

    `keep_layers` counts from 0, ascending; without it all stay. `texts`, read once as a stream, get the same
    tokens as before, at any length, with every prompt of the model; None keeps the whole vocabulary. Special
    tokens always stay. What other texts need is told in `gemb.model.vocabulary`. Of the tokens that occur
    `largest` keeps only so many, the most frequent ones; rarer words are then told by shorter pieces.

    Raises MismatchError for a layer that is not there and for a model or tokenizer that cannot be cut,
    GembError if `target` exists or cannot be written; then nothing is left there.
    """
    from gemb.model.trainable.saving import appearing, copy_files

    weights = source.weights()
    layers = count_layers(source, weights)
    kept_layers = tuple(keep_layers) or tuple(range(layers))
    check_layers(source, kept_layers, layers)
    rows = int(source.text_config["vocab_size"])
    cut = None if texts is None else vocabulary_for(source, texts, rows, largest)
    with appearing(target) as place:
        for folder in {source.path, source.tokenizer_folder, *(module.folder for module in source.modules)}:
            copy_files(folder, place / folder.relative_to(source.path))
        backbone = place / source.transformer.folder.relative_to(source.path)
        tensors = _tensors(weights, kept_layers, cut, rows)
        after = _save(tensors, backbone / "model.safetensors")
        others = 0
        for module in source.modules[1:]:
            if (module.folder / "model.safetensors").exists() and module.folder != source.transformer.folder:
                own = Weights.read(module.folder)
                copy = place / module.folder.relative_to(source.path) / "model.safetensors"
                others += _save({name: own.tensor(name) for name in own}, copy)
        for name in ("config.json", "generation_config.json"):
            if (backbone / name).exists():
                _write_config(backbone / name, source, kept_layers, layers, cut)
        if cut is not None:
            write_tokenizer(place / source.tokenizer_folder.relative_to(source.path), cut)
    vocabulary = (rows, rows if cut is None else len(cut.kept))
    return Pruned((layers, len(kept_layers)), vocabulary, (weights.parameters + others, after + others))


def count_layers(source: ModelFolder, weights: Weights) -> int:
    """How many layers the backbone has. Raises MismatchError if its tensors cannot be told by layer."""
    declared = next((int(source.text_config[key]) for key in _COUNTS if key in source.text_config), 0)
    found = {int(match[2]) for name in weights if (match := _LAYER.fullmatch(name))}
    if found != set(range(declared)) or not found:
        raise MismatchError(
            f"{source.path}: config.json has {declared} layers, but the weights name {len(found)}; "
            "its layers cannot be cut"
        )
    return declared


def check_layers(source: ModelFolder, kept: Sequence[int], layers: int) -> None:
    """Raises GembError unless `kept` are layers of the model, ascending, and it can do without the others."""
    if list(kept) != sorted(set(kept)):
        raise GembError(f"keep_layers is {list(kept)}; give each layer once, ascending from 0")
    if kept[-1] >= layers or kept[0] < 0:
        raise MismatchError(
            f"keep_layers has {kept[0] if kept[0] < 0 else kept[-1]}, "
            f"but {source.path} has layers 0 to {layers - 1}"
        )
    if len(kept) < layers and source.family in _PER_LAYER:
        raise MismatchError(
            f"{source.path}: the layers of {source.family} share tensors and cannot be cut; "
            "leave out keep_layers"
        )


def vocabulary_for(
    source: ModelFolder, texts: Iterable[str], rows: int, largest: int | None
) -> CutVocabulary:
    """The vocabulary that the texts need."""
    file = source.tokenizer_folder / "tokenizer.json"
    if not file.is_file():
        raise MismatchError(
            f"{source.tokenizer_folder} has no tokenizer.json, so that its vocabulary cannot be cut; "
            "save the tokenizer with a newer transformers, or keep the whole vocabulary"
        )
    tokeniser = Tokeniser.load(
        source.tokenizer_folder, max_tokens=_WHOLE_TOKENS, lower_case=source.do_lower_case
    )
    tokeniser.check_vocabulary(rows)
    templates = Prompts(source.prompts, source.default_prompt).all_templates()
    prefixes = sorted({template.render("") for template in templates} - {""})
    counts = np.zeros(tokeniser.largest_id + 1, dtype=np.int64)

    def count(some: Sequence[str]) -> None:
        nonlocal counts
        counts += np.bincount(tokeniser.encode(some).ids, minlength=len(counts))

    stream = iter(texts)
    seen = 0
    while some := list(islice(stream, _TEXTS_AT_ONCE)):
        seen += len(some)
        count(some)
        for prefix in prefixes:
            count([prefix + text[:_BEGINNING_CHARACTERS] for text in some])
    if not seen:
        raise GembError("keep_vocab gives no text; name files with texts in them, or leave it out")
    count([*prefixes, ""])
    frequent = np.argsort(-counts, kind="stable")[:largest]
    used = {*frequent[counts[frequent] > 0].tolist(), *_declared_ids(source.config)}
    named = _named_tokens(source.tokenizer_folder)
    cut = cut_vocabulary(read_json(file), used, named=named, rows=rows)
    padding = int(source.text_config.get("pad_token_id") or 0)
    if source.family in _FROM_PADDING and cut.new_ids.get(padding) != padding:
        raise MismatchError(
            f"{source.path}: its positions count from the id of the padding, {padding}, which would change; "
            "keep the whole vocabulary"
        )
    return cut


def _named_tokens(folder: Path) -> Iterator[str]:
    """The tokens that the settings of the tokenizer name."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            for key, value in read_json(folder / name).items():
                token = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(token, str):
                    yield token


def _declared_ids(config: Mapping[str, Any]) -> Iterator[int]:
    """The ids of tokens that config.json names."""
    for part in _parts(config):
        for key, value in part.items():
            for number in value if isinstance(value, list) else [value]:
                if _is_id(key, number):
                    yield number


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config and those nested in it."""
    return [config, *(part for part in config.values() if isinstance(part, Mapping))]


def _is_id(key: str, value: object) -> bool:
    names_one = key.endswith(("_token_id", "_token_index"))
    return names_one and isinstance(value, int) and not isinstance(value, bool)


def _tensors(
    weights: Weights, kept: Sequence[int], cut: CutVocabulary | None, rows: int
) -> dict[str, Tensor]:
    """The tensors that stay, under their new names."""
    import torch

    place = {layer: number for number, layer in enumerate(kept)}
    index = None if cut is None else torch.tensor(cut.kept)
    tensors = {}
    for name in weights:
        if match := _LAYER.fullmatch(name):
            if int(match[2]) not in place:
                continue
            tensors[f"{match[1]}{place[int(match[2])]}{match[3]}"] = weights.tensor(name)
        elif index is not None and _TABLE.search(name) and weights.shape(name)[0] >= rows:
            tensors[name] = weights.tensor(name)[index]
        else:
            tensors[name] = weights.tensor(name)
    if index is not None and not any(_TABLE.search(name) for name in weights):
        raise MismatchError(f"{weights.folder}: no tensor is known as the table of its vocabulary")
    return tensors


def _save(tensors: Mapping[str, Tensor], path: Path) -> int:
    """Writes the tensors and gives the number of their elements."""
    save_tensors(path, tensors)
    return sum(tensor.numel() for tensor in tensors.values())


def _write_config(
    path: Path, source: ModelFolder, kept: Sequence[int], layers: int, cut: CutVocabulary | None
) -> None:
    """config.json with the new counts and ids."""
    config = read_json(path)
    kinds = layer_types(source.text_config)
    new_ids = None if cut is None else cut.new_ids
    for part in _parts(config):
        if not isinstance(part, dict):
            continue
        is_text = any(key in part for key in _COUNTS)
        for key in _COUNTS:
            if part.get(key) == layers:
                part[key] = len(kept)
        if is_text and len(kept) < layers and len(set(kinds)) > 1:
            part["layer_types"] = [kinds[layer] for layer in kept]
        elif isinstance(part.get("layer_types"), list):
            part["layer_types"] = [part["layer_types"][layer] for layer in kept]
        if new_ids is not None:
            renumber(part, new_ids)
            if "vocab_size" in part:
                part["vocab_size"] = len(new_ids)
    write_json(path, config)


def renumber(part: dict[str, Any], new_ids: Mapping[int, int]) -> None:
    """New ids for the tokens that a config names; null for one that is in no table."""
    for key, value in part.items():
        if isinstance(value, list) and value and all(_is_id(key, number) for number in value):
            part[key] = [new_ids[number] for number in value if number in new_ids]
        elif _is_id(key, value):
            part[key] = new_ids.get(value)


def write_tokenizer(folder: Path, cut: CutVocabulary) -> None:
    """The new tokenizer.json, and what stands beside it, with new ids."""
    for name in _STALE:
        (folder / name).unlink(missing_ok=True)
    with atomic_write(folder / "tokenizer.json") as file:
        file.write(orjson.dumps(cut.tokenizer))
    for name in ("added_tokens.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        settings, new_ids = read_json(path), cut.new_ids
        if name == "added_tokens.json":
            settings = {token: new_ids[number] for token, number in settings.items() if number in new_ids}
        elif "added_tokens_decoder" in settings:
            settings["added_tokens_decoder"] = {
                str(new_ids[int(number)]): token
                for number, token in settings["added_tokens_decoder"].items()
                if int(number) in new_ids
            }
        write_json(path, settings)

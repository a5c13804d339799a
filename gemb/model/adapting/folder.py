"""The files of an adapted folder beside its weights, in the layout of EmbeddingGemma's time.

sentence-transformers 6 reads that layout to the same vectors, and tools that know no newer one read it too.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import orjson
from numpy.typing import NDArray

from gemb.errors import MismatchError
from gemb.files import atomic_write, os_errors_explained, read_json, write_json
from gemb.model.folder import OWN_POOLING_TYPE, ModelFolder, PoolingMode, PoolingSettings
from gemb.model.pruned import write_tokenizer
from gemb.model.tensor_file import save_tensors
from gemb.model.vocabulary import CutVocabulary
from gemb.text.tokenisation import Tokeniser

Pooling: TypeAlias = PoolingMode

_FLAGS: Mapping[PoolingMode, str] = {
    "cls": "cls_token",
    "mean": "mean_tokens",
    "max": "max_tokens",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens",
    "lasttoken": "lasttoken",
}
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.txt",
    "vocab.json", "merges.txt", "added_tokens.json", "sentencepiece.bpe.model", "spiece.model",
)  # fmt: skip


def pooling_of(mode: Pooling, width: int, *, tokens: int | None, heads: int, probes: int) -> PoolingSettings:
    """The pooling of states[T, width]; first-k and last-k of one token are the modes that have another name.

    Raises MismatchError if `heads` do not divide the width.
    """
    if mode in ("first-k", "last-k") and tokens == 1:
        mode, tokens = "cls" if mode == "first-k" else "lasttoken", None
    if not mode.startswith("attention-"):
        return PoolingSettings((mode,), include_prompt=True, width=width, tokens=tokens)
    if width % heads:
        raise MismatchError(
            f"pool_heads is {heads}, which does not divide the {width} numbers of a token; choose another"
        )
    return PoolingSettings(
        (mode,),
        include_prompt=True,
        width=width,
        heads=heads,
        probes=probes if mode == "attention-kv" else None,
    )


def write_modules(
    folder: Path,
    *,
    width: int,
    pooling: PoolingSettings,
    projections: Sequence[int],
    normalise: bool,
    prompts: Mapping[str, str],
    default_prompt: str | None,
    max_tokens: int,
    seed: int,
) -> dict[str, tuple[int, ...]]:
    """Write what comes after the token states [T, width]; gives the shape of each new tensor.

    The Dense layers have no bias and no activation, as EmbeddingGemma's (arXiv 2509.20354, section 2). How
    they begin is not published; ours begin as torch.nn.Linear, uniform within 1 / root of their inputs.
    """
    kinds = ["Transformer", "Pooling", *["Dense"] * len(projections), *["Normalize"] * normalise]
    random = np.random.default_rng(seed)
    entries = [
        {
            "idx": number,
            "name": str(number),
            "path": "" if number == 0 else f"{number}_{kind}",
            "type": OWN_POOLING_TYPE
            if kind == "Pooling" and pooling.is_own
            else f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]
    with atomic_write(folder / "modules.json") as file:
        file.write(orjson.dumps(entries, option=orjson.OPT_INDENT_2))
    for entry in entries[1:]:
        (folder / str(entry["path"])).mkdir()
    new = _write_pooling(folder / "1_Pooling", width, pooling, random)
    new |= _write_projections(folder, width, projections, random)
    if pooling.is_own:
        _write_notice(folder, pooling)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "prompts": dict(prompts),
            "default_prompt_name": default_prompt,
            "similarity_fn_name": "cosine",
        },
    )
    return new


def _write_pooling(
    place: Path, width: int, pooling: PoolingSettings, random: np.random.Generator
) -> dict[str, tuple[int, ...]]:
    """The pooling's settings, and new weights where it has any; gives their shapes.

    How they begin is not published; ours begin as in torch, probes as Embedding and matrices as Linear.
    """
    mode = pooling.modes[0]
    if not pooling.is_own:
        flags = {f"pooling_mode_{flag}": mode == one for one, flag in _FLAGS.items()}
        settings = {"word_embedding_dimension": width, **flags, "include_prompt": True}
        write_json(place / "config.json", settings)
        return {}
    sizes = {"tokens": pooling.tokens, "heads": pooling.heads, "probes": pooling.probes}
    write_json(
        place / "config.json",
        {
            "pooling_mode": mode,
            "embedding_dimension": width,
            "include_prompt": True,
            **{name: size for name, size in sizes.items() if size is not None},
        },
    )
    shapes = pooling.shapes(width)
    tensors = {
        name: random.standard_normal(shape).astype(np.float32) if "probe" in name else _linear(random, shape)
        for name, shape in shapes.items()
    }
    if tensors:
        _save(tensors, place)
    return {f"{place.name}/{name}": shape for name, shape in shapes.items()}


def _write_notice(folder: Path, pooling: PoolingSettings) -> None:
    """README.md that says what runs the folder, for people who look at it without gemb."""
    text = f"""---
library_name: gemb
---

# An encoder that gemb runs

Its pooling is {pooling.described}, which no module of sentence-transformers computes. sentence-transformers
refuses this folder; transformers loads the backbone alone. gemb embeds and trains with it:

```sh
gemb embed docs.jsonl -o docs.npy --model FOLDER
```
"""
    with atomic_write(folder / "README.md") as file:
        file.write(text.encode())


def _write_projections(
    folder: Path, width: int, projections: Sequence[int], random: np.random.Generator
) -> dict[str, tuple[int, ...]]:
    new: dict[str, tuple[int, ...]] = {}
    for number, size in enumerate(projections, 2):
        place = folder / f"{number}_Dense"
        write_json(
            place / "config.json",
            {
                "in_features": width,
                "out_features": size,
                "bias": False,
                "activation_function": "torch.nn.modules.linear.Identity",
            },
        )
        matrix = _linear(random, (size, width))
        _save({"linear.weight": matrix}, place)
        new[f"{number}_Dense/linear.weight"] = matrix.shape
        width = size
    return new


def _linear(random: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    """A matrix[O, I] as torch.nn.Linear begins, uniform within 1 / root of I."""
    bound = shape[1] ** -0.5
    return random.uniform(-bound, bound, shape).astype(np.float32)


def _save(tensors: dict[str, NDArray[np.float32]], place: Path) -> None:
    import torch

    save_tensors(place / "model.safetensors", {name: torch.from_numpy(one) for name, one in tensors.items()})


def check_vocabulary(source: ModelFolder, rows: int) -> None:
    """Makes sure that the tokenizer has no entries beyond a table of `rows` rows.

    It is read as JSON where it is that: a tokenizer to work with would keep nine times its file in memory.
    Raises MismatchError if it has, UnavailableError and GembError if it cannot be loaded.
    """
    folder = source.tokenizer_folder
    file = folder / "tokenizer.json"
    entries = read_json(file).get("model", {}).get("vocab") if file.is_file() else None
    if entries is None or len(entries) > rows:
        Tokeniser.load(folder, max_tokens=source.max_tokens).check_vocabulary(rows)


def write_tokenizer_files(
    source: ModelFolder, folder: Path, *, max_tokens: int, cut: CutVocabulary | None
) -> str | None:
    """Copy the tokenizer, cut or whole; gives the token that pads where the source names none for it.

    sentence-transformers needs one to make a batch; it is masked, so that which one it is does not matter.
    """
    for name in _TOKENIZER_FILES:
        if (source.tokenizer_folder / name).is_file():
            with os_errors_explained(folder / name):
                shutil.copyfile(source.tokenizer_folder / name, folder / name)
    if cut is not None:
        write_tokenizer(folder, cut)
    path = folder / "tokenizer_config.json"
    settings: dict[str, Any] = read_json(path) if path.is_file() else {}
    stand_in = None
    if not settings.get("pad_token") and not _names_padding(folder):
        named = (settings.get(key) for key in ("eos_token", "unk_token", "bos_token"))
        token = next((token for token in named if token), None)
        stand_in = token.get("content") if isinstance(token, dict) else token
        if stand_in is not None:
            settings["pad_token"] = stand_in
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    settings["model_max_length"] = max_tokens
    # A chat template is of no use to an encoder, and names tokens that a cut vocabulary may lack.
    settings.pop("chat_template", None)
    write_json(path, settings)
    return stand_in


def _names_padding(folder: Path) -> bool:
    path = folder / "special_tokens_map.json"
    return path.is_file() and bool(read_json(path).get("pad_token"))

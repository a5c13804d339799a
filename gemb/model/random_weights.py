"""A model folder with random weights from a config of transformers: a student that has learnt nothing yet."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import orjson

from gemb.errors import GembError, MismatchError
from gemb.files import atomic_write, os_errors_explained, write_json

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.txt",
    "vocab.json", "merges.txt", "added_tokens.json", "sentencepiece.bpe.model", "spiece.model",
)  # fmt: skip


def write_random(
    config: Mapping[str, Any],
    tokenizer: Path,
    target: Path,
    *,
    seed: int,
    max_tokens: int = 512,
    prompts: Mapping[str, str] | None = None,
) -> int:
    """Write to `target` a complete sentence-transformers folder; gives the number of parameters.

    `config` is a config.json with its `model_type`; what it leaves out is what transformers has for it. The
    weights are drawn as transformers draws them, from `seed` alone, in fp32. The tokenizer files are those of
    the folder `tokenizer`; without a `vocab_size` the table has a row for each of its entries. States are
    averaged over the tokens and brought to unit length.

    Raises MismatchError for a config that transformers cannot build and a table smaller than the vocabulary,
    GembError if `target` exists or cannot be written; then nothing is left there.
    """
    from gemb.model.trainable.saving import appearing

    entries = _entries(tokenizer)
    rows = int(config.get("vocab_size") or entries)
    if rows < entries:
        raise MismatchError(
            f"the config's vocab_size is {rows:,}, but the tokenizer in {tokenizer} has {entries:,} entries; "
            "leave vocab_size out"
        )
    model = _model({**config, "vocab_size": rows}, seed)
    with appearing(target) as place:
        model.save_pretrained(place)
        for name in _TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                with os_errors_explained(place / name):
                    shutil.copyfile(tokenizer / name, place / name)
        width = model.config.get_text_config().hidden_size
        write_mean_pooling(place, width, max_tokens=max_tokens, prompts=prompts)
    return sum(parameter.numel() for parameter in model.parameters())


def write_mean_pooling(
    folder: Path, width: int, *, max_tokens: int, prompts: Mapping[str, str] | None = None
) -> None:
    """Make a sentence-transformers folder of one of transformers whose states are `width` wide.

    States are averaged over the tokens and brought to unit length.
    """
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": "" if number == 0 else f"{number}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]
    with atomic_write(folder / "modules.json") as file:
        file.write(orjson.dumps(modules, option=orjson.OPT_INDENT_2))
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": dict(prompts or {}), "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    for name in ("1_Pooling", "2_Normalize"):
        (folder / name).mkdir(exist_ok=True)
    write_json(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True, "include_prompt": True},
    )


def _entries(tokenizer: Path) -> int:
    """How many ids a tokenizer has, added tokens counted."""
    from tokenizers import Tokenizer

    file = tokenizer / "tokenizer.json"
    if not file.is_file():
        raise GembError(f"{tokenizer} has no tokenizer.json; name a folder with one")
    vocabulary = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    return max(vocabulary.values(), default=-1) + 1


def _model(config: Mapping[str, Any], seed: int) -> Any:  # noqa: ANN401  # transformers is untyped here
    """The model of a config, with the weights of a seed."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoModel

    family = str(config.get("model_type"))
    if family not in CONFIG_MAPPING:
        raise MismatchError(f"transformers knows no model_type {family!r}; check the config")
    given = {key: value for key, value in config.items() if key != "model_type"}
    _check_keys(family, given)
    try:
        settings = CONFIG_MAPPING[family](**given)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModel.from_config(settings, dtype=torch.float32)  # type: ignore[no-untyped-call]
    except (ArithmeticError, KeyError, RuntimeError, StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise MismatchError(f"transformers cannot build a {family} of this config: {reason}") from error


def _check_keys(family: str, given: Mapping[str, Any]) -> None:
    """Raises MismatchError for a key that transformers would leave unused, where one it uses is close.

    Other unknown keys are let through: the config.json of a published model may hold some.
    """
    from transformers import CONFIG_MAPPING

    known = CONFIG_MAPPING[family]
    names = [name.lstrip("_") for name in (*known().to_dict(), *known.attribute_map)]
    for key in given:
        close = get_close_matches(key.lstrip("_"), names, n=1, cutoff=0.8)
        if key.lstrip("_") not in names and close:
            raise MismatchError(f"a {family} has no {key}; did you mean {close[0]}?")

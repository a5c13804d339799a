"""What the recipe tiny_decoder needs and every machine has: docstrings as texts, and a small decoder.

The texts are those of gemb.jobs.quickstart, whole: the words of a dotted name, then its docstring. The model
is a Gemma 3 decoder of random weights whose tokenizer has Gemma's special tokens for denoising as well, so
that it can go the whole way to an encoder-decoder and an encoder.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemb.files import os_errors_explained, write_json
from gemb.jobs.quickstart import (
    DOCSTRINGS,
    GEMMA3,
    HELD_OUT,
    data_set_of,
    random_gemma3,
    words_of,
    write_data_sets,
    write_tokenizer,
)
from gemb.model.tensor_file import save_tensors
from gemb.training.material import Material

TINY_GEMMA3_DECODER = "tiny-gemma3-decoder"
"""The name of the model."""

_SENTINELS = 64  # spans of a row of 1,280 tokens with the denoisers of T5Gemma 2
_CONFIG: Mapping[str, Any] = {
    **GEMMA3,
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "tie_word_embeddings": True,
    "use_bidirectional_attention": False,
}


def write_texts(folder: Path) -> dict[str, Path]:
    """Write the texts below `folder` unless they are there; the file of each data set by its name.

    Raises UnavailableError if this Python has no sources.
    """
    from gemb.jobs.demo import docstrings

    def rows() -> Iterator[tuple[str, Mapping[str, str]]]:
        for found in docstrings(Path(sysconfig.get_path("stdlib"))):
            yield data_set_of(found.text), {"text": f"{words_of(found.name)}\n\n{found.text}"}

    return write_data_sets(folder, "{}-texts.jsonl", rows())


def write_tiny_decoder(folder: Path, texts: Iterator[str], seed: int) -> None:
    """Write a transformers folder of a Gemma 3 decoder, random weights and a vocabulary made from `texts`.

    1.6 M parameters, half of them the table. Besides Gemma's usual special tokens it has `<mask>` and
    `<unused0>` to `<unused63>`. The same texts and seed give the same folder.
    """
    with os_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    more = ["<mask>", *(f"<unused{number}>" for number in range(_SENTINELS))]
    entries = write_tokenizer(
        folder, texts, more=more, frame="<bos> $A", max_tokens=_CONFIG["max_position_embeddings"]
    )
    tensors = {f"model.{name}": one for name, one in random_gemma3(_CONFIG, entries, seed).items()}
    save_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", {**_CONFIG, "vocab_size": entries})
    ids = {key: _CONFIG[key] for key in ("pad_token_id", "eos_token_id", "bos_token_id")}
    write_json(folder / "generation_config.json", ids)


MATERIAL = Material((DOCSTRINGS, HELD_OUT), TINY_GEMMA3_DECODER, write_texts, write_tiny_decoder)

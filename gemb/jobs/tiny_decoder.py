"""What the recipe tiny_decoder needs and every machine has: docstrings as texts, and a small decoder.

The texts are those of gemb.jobs.quickstart, whole: the words of a dotted name, then its docstring. The model
is a Gemma 3 decoder of random weights whose tokenizer has Gemma's special tokens for denoising as well, so
that it can go the whole way to an encoder-decoder and an encoder.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from gemb.errors import UnavailableError
from gemb.files import atomic_write, os_errors_explained, write_json
from gemb.jobs.quickstart import (
    DOCSTRINGS,
    HELD_OUT,
    data_set_of,
    random_gemma3,
    words_of,
    write_tokenizer,
)
from gemb.model.tensor_file import save_tensors
from gemb.text.records import ReadOptions, Record, read_records

if TYPE_CHECKING:
    from gemb.text.inputs import InputFile

TINY_GEMMA3_DECODER = "tiny-gemma3-decoder"
"""The name of the model."""

_SENTINELS = 64  # spans of a row of 1,280 tokens with the denoisers of T5Gemma 2
_POSITIONS = 512
_CONFIG: Mapping[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "max_position_embeddings": _POSITIONS,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": False,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "dtype": "float32",
}


def write_texts(folder: Path) -> dict[str, Path]:
    """Write the texts below `folder` unless they are there; the file of each data set by its name.

    Raises UnavailableError if this Python has no sources.
    """
    from gemb.jobs.demo import docstrings

    files = {name: folder / f"{name}-texts.jsonl" for name in (DOCSTRINGS, HELD_OUT)}
    if all(file.is_file() for file in files.values()):
        return files
    lines: dict[str, list[bytes]] = {name: [] for name in files}
    for found in docstrings(Path(sysconfig.get_path("stdlib"))):
        row = {"text": f"{words_of(found.name)}\n\n{found.text}"}
        lines[data_set_of(found.text)].append(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    if not all(lines.values()):
        raise UnavailableError("this Python has no sources of its standard library; use another Python")
    with os_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        with atomic_write(file) as stream:
            stream.writelines(lines[name])
    return files


def write_tiny_decoder(folder: Path, texts: Iterator[str], seed: int) -> None:
    """Write a transformers folder of a Gemma 3 decoder, random weights and a vocabulary made from `texts`.

    1.6 M parameters, half of them the table. Besides Gemma's usual special tokens it has `<mask>` and
    `<unused0>` to `<unused63>`. The same texts and seed give the same folder.
    """
    with os_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    more = ["<mask>", *(f"<unused{number}>" for number in range(_SENTINELS))]
    entries = write_tokenizer(folder, texts, more=more, frame="<bos> $A", max_tokens=_POSITIONS)
    tensors = {f"model.{name}": one for name, one in random_gemma3(_CONFIG, entries, seed).items()}
    save_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", {**_CONFIG, "vocab_size": entries})
    ids = {key: _CONFIG[key] for key in ("pad_token_id", "eos_token_id", "bos_token_id")}
    write_json(folder / "generation_config.json", ids)


@dataclass(frozen=True)
class _Material:
    """The texts and the model of this module, as gemb.training.pretrain_setup asks for them."""

    data_names: Sequence[str] = (DOCSTRINGS, HELD_OUT)
    model_name: str = TINY_GEMMA3_DECODER

    def write_data(self, folder: Path) -> Mapping[str, Path]:
        """See write_texts."""
        return write_texts(folder)

    def write_model(
        self, folder: Path, files: Sequence[InputFile], text_field: str | None, seed: int
    ) -> None:
        """See write_tiny_decoder."""
        rows = read_records(files, ReadOptions(text_field=text_field, use_titles=False))
        write_tiny_decoder(folder, (row.text for row in rows if isinstance(row, Record)), seed)


MATERIAL = _Material()

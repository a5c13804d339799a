"""What `gemb train quickstart` needs and every machine has: pairs from docstrings, and a model to begin with.

The pairs come from the Python standard library: the words of a dotted name find its docstring, and the first
paragraph of a docstring finds the rest. A tenth of the docstrings is held out, equal ones on the same side.
The model is a small Gemma 3 encoder with random weights whose vocabulary is made from the
texts, so that nothing is downloaded.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from gemb.errors import UnavailableError
from gemb.files import atomic_write, os_errors_explained, write_json
from gemb.model.random_weights import write_mean_pooling
from gemb.model.tensor_file import save_tensors
from gemb.training.material import Material

if TYPE_CHECKING:
    from torch import Tensor

DOCSTRINGS = "docstrings"
HELD_OUT = "docstrings-held-out"
"""The names of the data sets, as a recipe gives them for a path."""

TINY_GEMMA3 = "tiny-gemma3"
"""The name of the model."""

_HELD_OUT_TENTHS = 1
_LONGEST = 800
"""Characters of a passage; the rest says little more, and costs time."""

VOCABULARY = 6000
"""Entries of the tokenizer, the special ones included."""
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
_MAX_TOKENS = 256
_WIDTH = 192
GEMMA3: Mapping[str, Any] = {
    "model_type": "gemma3_text",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attention_dropout": 0.0,
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
"""What config.json of a small Gemma 3 has beside its shape; the ids are those of `write_tokenizer`."""
_CONFIG: Mapping[str, Any] = {
    **GEMMA3,
    "architectures": ["Gemma3TextModel"],
    "hidden_size": _WIDTH,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 512,
    "layer_types": ["full_attention"] * 3,
    "use_bidirectional_attention": True,
}


def write_docstrings(folder: Path) -> dict[str, Path]:
    """Write the pairs below `folder` unless they are there; the file of each data set by its name.

    Raises UnavailableError if this Python has no sources.
    """

    def rows() -> Iterator[tuple[str, Mapping[str, str]]]:
        for name, query, positive in docstring_pairs(Path(sysconfig.get_path("stdlib"))):
            yield name, {"query": query, "positive": positive}

    return write_data_sets(folder, "{}.jsonl", rows())


def write_data_sets(
    folder: Path, pattern: str, rows: Iterator[tuple[str, Mapping[str, str]]]
) -> dict[str, Path]:
    """Write rows of (data set, fields) below `folder` unless all files are there; each file by its data set.

    A file is called as `pattern` with the data set for {}. Raises UnavailableError if one has no rows.
    """
    files = {name: folder / pattern.format(name) for name in (DOCSTRINGS, HELD_OUT)}
    if all(file.is_file() for file in files.values()):
        return files
    lines: dict[str, list[bytes]] = {name: [] for name in files}
    for name, row in rows:
        lines[name].append(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    if not all(lines.values()):
        raise UnavailableError("this Python has no sources of its standard library; use another Python")
    with os_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        with atomic_write(file) as stream:
            stream.writelines(lines[name])
    return files


def docstring_pairs(library: Path) -> Iterator[tuple[str, str, str]]:
    """(data set, query, positive) of the docstrings below `library`, in a fixed order."""
    from gemb.jobs.demo import docstrings

    for found in docstrings(library):
        name = data_set_of(found.text)
        summary, _, body = found.text.partition("\n\n")
        words = words_of(found.name)
        yield name, words, found.text[:_LONGEST]
        if len(body.strip()) >= 40:
            yield name, " ".join(summary.split()), f"{words}: {body.strip()}"[:_LONGEST]


def data_set_of(text: str) -> str:
    """On which side a docstring is; equal ones are on the same."""
    digest = blake2b(text.encode(), digest_size=4).digest()
    return HELD_OUT if int.from_bytes(digest, "big") % 10 < _HELD_OUT_TENTHS else DOCSTRINGS


def words_of(name: str) -> str:
    """`json decoder JSON Decoder raw decode` for json.decoder.JSONDecoder.raw_decode."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return " ".join(re.sub(r"[._#]+", " ", spaced).split())


def write_tiny_gemma3(folder: Path, texts: Iterator[str], seed: int) -> None:
    """Write a sentence-transformers folder with random weights and a vocabulary made from `texts`.

    2.3 M parameters, of which half are the table; mean pooling, unit length. The same texts and seed give
    the same folder.
    """
    with os_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    entries = write_tokenizer(folder, texts)
    save_tensors(folder / "model.safetensors", random_gemma3(_CONFIG, entries, seed))
    write_json(folder / "config.json", {**_CONFIG, "vocab_size": entries})
    write_mean_pooling(folder, _WIDTH, max_tokens=_MAX_TOKENS)


def random_gemma3(config: Mapping[str, Any], entries: int, seed: int) -> dict[str, Tensor]:
    """Random weights of a Gemma 3 backbone with a table of so many entries, by their names in its files."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    width, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    inner = config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (entries, width), "norm.weight": (width,)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (queries, width),
                "self_attn.k_proj": (keys, width),
                "self_attn.v_proj": (keys, width),
                "self_attn.o_proj": (width, queries),
                "self_attn.q_norm": (head,),
                "self_attn.k_norm": (head,),
                "mlp.gate_proj": (inner, width),
                "mlp.up_proj": (inner, width),
                "mlp.down_proj": (width, inner),
                "input_layernorm": (width,),
                "post_attention_layernorm": (width,),
                "pre_feedforward_layernorm": (width,),
                "post_feedforward_layernorm": (width,),
            }.items()
        }
    # Gemma's norms multiply by 1 + weight. Those after a sublayer begin at a tenth, so that the layers add
    # little to the words at first: what random layers add is noise (as LayerScale, arXiv 2103.17239).
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            # Scaled by the root of the width, the table's rows then have a root mean square of 1.
            deviation = width**-0.5 if name == "embed_tokens.weight" else config["initializer_range"]
            torch.nn.init.normal_(tensor, std=deviation, generator=generator)
        elif "post_" in name:
            tensor.fill_(-0.9)
    return tensors


def write_tokenizer(
    folder: Path,
    texts: Iterator[str],
    *,
    more: Sequence[str] = (),
    frame: str = "<bos> $A <eos>",
    max_tokens: int = _MAX_TOKENS,
) -> int:
    """A byte-level BPE tokenizer of the texts, with special tokens around each as in `frame`.

    Gives its entries. `more` are special tokens besides `<pad>`, `<eos>`, `<bos>`, `<unk>`, which are 0 to 3.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*_SPECIAL, *more],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    with atomic_write(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=False).encode())
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), _SPECIAL, strict=True))
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_tokens, **names},
    )
    return int(tokenizer.get_vocab_size())


MATERIAL = Material((DOCSTRINGS, HELD_OUT), TINY_GEMMA3, write_docstrings, write_tiny_gemma3)

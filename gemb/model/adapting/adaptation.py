"""From a decoder's folder to an encoder's: planned from headers, written as a stream, proved, then kept."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemb.device import free_memory_bytes
from gemb.errors import GateError, GembError, MismatchError
from gemb.files import check_writable, write_json
from gemb.model.adapting.folder import (
    Pooling,
    check_vocabulary,
    pooling_of,
    write_modules,
    write_tokenizer_files,
)
from gemb.model.adapting.key_maps import (
    TensorMap,
    adapted_config,
    family_of,
    is_encoder_decoder,
    map_tensors,
    text_config,
)
from gemb.model.adapting.streaming import SHARD_BYTES, write_pieces
from gemb.model.folder import ModelFolder, PoolingSettings
from gemb.model.pruned import check_layers, vocabulary_for
from gemb.model.vocabulary import CutVocabulary

if TYPE_CHECKING:
    from gemb.model.adapting.proofs import Proofs

REPORT = "adapt_report.json"
DEFAULT_TOKENS = 2048
"""EmbeddingGemma's longest text (arXiv 2509.20354, section 2)."""
_FP32_BYTES = 4
_BESIDE_BYTES = 64 << 20
"""What configs, tokenizer and the copy that a proof saves need besides."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the encoder is to be."""

    causal: bool = False
    """Keep the decoder's mask."""
    pooling: Pooling = "mean"
    pool_tokens: int | None = None
    """K of first-k and last-k."""
    pool_heads: int = 4
    """Of attention pooling."""
    pool_probes: int = 128
    """Keys and values of attention-kv."""
    projections: tuple[int, ...] = ()
    """Width after each Dense layer behind the pooling."""
    normalise: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    max_tokens: int | None = None
    dropout: float = 0.0
    keep_layers: tuple[int, ...] = ()
    """From 0, ascending; empty is all."""
    seed: int = 42


@dataclass(frozen=True)
class Adaptation:
    """An adaptation that fits, before anything is written."""

    source: ModelFolder
    wanted: Wanted
    kind: str
    """`model_type` of the decoder."""
    config: Mapping[str, Any]
    """config.json of the encoder."""
    tensors: TensorMap
    cut: CutVocabulary | None
    max_tokens: int
    pooling: PoolingSettings

    @property
    def size_bytes(self) -> int:
        """Of all tensors of the backbone."""
        return sum(origin.piece.size_bytes for origin in self.tensors.origins)

    @property
    def proving_bytes(self) -> int:
        """Of memory, to prove it whole: a model beside another in fp32."""
        return 2 * _FP32_BYTES * sum(math.prod(origin.piece.shape) for origin in self.tensors.origins)


@dataclass(frozen=True)
class Adapted:
    """What was written and proved."""

    proofs: Proofs
    new: Mapping[str, tuple[int, ...]]
    """Shape of each tensor that no source has, by its file's folder and name."""
    padding_token: str | None
    """What stands in for a padding token that the source does not name."""
    writing_seconds: float
    proving_seconds: float


def plan(
    source: ModelFolder, wanted: Wanted, *, texts: Iterable[str] | None = None, largest: int | None = None
) -> Adaptation:
    """The adaptation of `source`, from its config and headers; with `texts` the vocabulary is cut to theirs.

    Special tokens always stay. Of the texts' tokens `largest` stay, the most frequent ones; None keeps all.
    Raises MismatchError for a family that is not known, an encoder, tensors or a tokenizer that do not fit,
    and layers that are not there; GembError for a default prompt without a text.
    """
    family_of(source)
    if wanted.default_prompt is not None and wanted.default_prompt not in wanted.prompts:
        raise GembError(
            f"default_prompt is {wanted.default_prompt!r}, but the prompts are "
            f"{', '.join(wanted.prompts) or 'none'}"
        )
    if source.config.get("quantization_config"):
        raise MismatchError(
            f"{source.path / 'config.json'}: the weights are quantised, which cannot be adapted; "
            "use the model that they were made from"
        )
    causal, kept = wanted.causal, wanted.keep_layers
    whole = adapted_config(source, causal=causal, keep_layers=(), dropout=wanted.dropout, cut=None)
    if kept:
        check_layers(source, kept, int(whole["num_hidden_layers"]))
    cut = None
    if texts is None:
        check_vocabulary(source, int(whole["vocab_size"]))
    else:
        prompted = replace(source, prompts=wanted.prompts, default_prompt=wanted.default_prompt)
        cut = vocabulary_for(prompted, texts, int(whole["vocab_size"]), largest)
    config = adapted_config(source, causal=causal, keep_layers=kept, dropout=wanted.dropout, cut=cut)
    tensors = map_tensors(source, config, causal=causal, keep_layers=kept, cut=cut)
    positions = int(config["max_position_embeddings"])
    max_tokens = wanted.max_tokens or min(positions, DEFAULT_TOKENS)
    if max_tokens > positions:
        raise MismatchError(
            f"max_tokens is {max_tokens:,}, but {source.path} was trained with {positions:,} positions; "
            "choose fewer"
        )
    pooling = pooling_of(
        wanted.pooling,
        int(config["hidden_size"]),
        tokens=wanted.pool_tokens,
        heads=wanted.pool_heads,
        probes=wanted.pool_probes,
    )
    kind = text_config(source)["model_type"]
    return Adaptation(source, wanted, kind, config, tensors, cut, max_tokens, pooling)


def write(
    adaptation: Adaptation,
    target: Path,
    *,
    about: Mapping[str, object] | None = None,
    shard_bytes: int = SHARD_BYTES,
    memory_bytes: int | None = None,
) -> Adapted:
    """Write the folder `target` and prove it; `about` goes into adapt_report.json with what was seen.

    Where the whole model does not fit into `memory_bytes` (None: what is free), a decoder is proved layer by
    layer.

    Raises GateError for a proof that fails, GembError if `target` exists, MachineError without space for it;
    then nothing is left there.
    """
    from gemb.model.adapting.proofs import prove
    from gemb.model.adapting.slices import prove_by_layer
    from gemb.model.trainable.saving import appearing

    wanted, source = adaptation.wanted, adaptation.source
    # A proof saves the model once more, in fp32, and removes it.
    check_writable(target, adaptation.size_bytes * 3 + _BESIDE_BYTES)
    began = time.monotonic()
    with appearing(target) as place:
        pieces = [origin.piece for origin in adaptation.tensors.origins]
        write_pieces(pieces, place, shard_bytes=shard_bytes)
        write_json(place / "config.json", adaptation.config)
        new = write_modules(
            place,
            width=int(adaptation.config["hidden_size"]),
            pooling=adaptation.pooling,
            projections=wanted.projections,
            normalise=wanted.normalise,
            prompts=wanted.prompts,
            default_prompt=wanted.default_prompt,
            max_tokens=adaptation.max_tokens,
            seed=wanted.seed,
        )
        padding = write_tokenizer_files(source, place, max_tokens=adaptation.max_tokens, cut=adaptation.cut)
        written = time.monotonic()
        kept_ids = None if adaptation.cut is None else adaptation.cut.kept
        fits = adaptation.proving_bytes <= (memory_bytes or free_memory_bytes("cpu") or math.inf)
        try:
            proofs = (prove if fits or is_encoder_decoder(source.config) else prove_by_layer)(
                place,
                source,
                adaptation.kind,
                causal=wanted.causal,
                keep_layers=wanted.keep_layers,
                kept_ids=kept_ids,
            )
        except GateError as error:
            raise GateError(
                f"{target} is not kept, a proof failed: {error}; try another release of transformers"
            ) from error
        proved = time.monotonic()
        adapted = Adapted(proofs, new, padding, written - began, proved - written)
        write_json(place / REPORT, {**(about or {}), **as_json(adaptation, adapted)})
    return adapted


def as_json(adaptation: Adaptation, adapted: Adapted) -> dict[str, object]:
    """Every tensor and where it came from, what is new, what was left out, and the proofs."""
    tensors = [
        {
            "name": origin.piece.name,
            "dtype": origin.piece.dtype,
            "shape": origin.piece.shape,
            "origin": origin.change,
            "from": origin.sources,
        }
        for origin in adaptation.tensors.origins
    ]
    fresh = [
        {"name": name, "dtype": "F32", "shape": shape, "origin": "new", "from": []}
        for name, shape in adapted.new.items()
    ]
    return {
        "source": str(adaptation.source.path),
        "source_model_type": adaptation.kind,
        "model_type": adaptation.config["model_type"],
        "attention": "causal" if adaptation.wanted.causal else "bidirectional",
        "tensors": [*tensors, *fresh],
        "left_out": adaptation.tensors.left_out,
        "kept_layers": adaptation.wanted.keep_layers or "all",
        "kept_vocabulary": "all" if adaptation.cut is None else len(adaptation.cut.kept),
        "padding_token_added": adapted.padding_token,
        "proofs": adapted.proofs.as_json(),
        "seconds": {"writing": adapted.writing_seconds, "proofs": adapted.proving_seconds},
    }

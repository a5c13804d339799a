"""From one decoder's folder, or two, to an encoder-decoder's: planned, written as a stream, proved, kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemb.device import free_memory_bytes
from gemb.errors import GateError
from gemb.files import check_writable, read_json, write_json
from gemb.model.adapting.adaptation import REPORT
from gemb.model.adapting.encoder_decoder_maps import (
    WARM_UP_STEPS,
    Pair,
    check_pair,
    encoder_decoder_config,
    map_halves,
)
from gemb.model.adapting.folder import check_vocabulary, write_tokenizer_files
from gemb.model.adapting.key_maps import TensorMap, adapted_config
from gemb.model.adapting.streaming import SHARD_BYTES, write_pieces
from gemb.model.folder import ModelFolder

if TYPE_CHECKING:
    from gemb.model.adapting.encoder_decoder_proofs import EncoderDecoderProofs

_BESIDE_BYTES = 64 << 20
"""What configs and tokenizer need besides."""
_FP32_BYTES = 4


@dataclass(frozen=True)
class EncoderDecoderAdaptation:
    """An adaptation that fits, before anything is written."""

    pair: Pair
    config: Mapping[str, Any]
    """config.json of the encoder-decoder."""
    tensors: TensorMap

    @property
    def size_bytes(self) -> int:
        """Of all tensors."""
        return sum(origin.piece.size_bytes for origin in self.tensors.origins)

    @property
    def needs_bytes(self) -> int:
        """Of disk: a proof saves the model once more, in fp32, and removes it."""
        return self.size_bytes + self.parameters * _FP32_BYTES + _BESIDE_BYTES

    @property
    def proving_bytes(self) -> int:
        """Of memory, to prove it whole: itself beside a source in fp32."""
        return 2 * self.parameters * _FP32_BYTES

    @property
    def parameters(self) -> int:
        """Numbers of all tensors."""
        return sum(prod(origin.piece.shape) for origin in self.tensors.origins)

    @property
    def random_parameters(self) -> int:
        """Numbers that no source has and that a training has to find."""
        return sum(
            prod(origin.piece.shape) for origin in self.tensors.origins if origin.change == "new, random"
        )

    @property
    def warm_up_steps(self) -> int:
        """Steps in which `gemb train` should train the cross-attention alone; 0 where it is not random."""
        return WARM_UP_STEPS if self.random_parameters else 0


@dataclass(frozen=True)
class EncoderDecoder:
    """What was written and proved."""

    proofs: EncoderDecoderProofs
    padding_token: str | None
    """What stands in for a padding token that the source does not name."""
    writing_seconds: float
    proving_seconds: float


def plan(
    source: ModelFolder, decoder: ModelFolder | None = None, *, dropout: float = 0.0, seed: int = 42
) -> EncoderDecoderAdaptation:
    """The encoder-decoder of `source`, or of `source` as encoder and `decoder`, from configs and headers.

    Balanced, a cross-attention starts as the self-attention of its layer; of two models it is random, by
    `seed`. Raises MismatchError for families that become none, halves that do not fit, and tensors or a
    tokenizer that are not as config.json says.
    """
    pair = Pair(source, source if decoder is None else decoder)
    check_pair(pair)
    # Its encoder is to be taken out again: a window that the encoder's class cannot have is refused now.
    adapted_config(source, causal=False, keep_layers=(), dropout=0.0, cut=None)
    config = encoder_decoder_config(pair, dropout=dropout)
    check_vocabulary(source, int(config["decoder"]["vocab_size"]))
    return EncoderDecoderAdaptation(pair, config, map_halves(pair, config, seed=seed))


def write(
    adaptation: EncoderDecoderAdaptation,
    target: Path,
    *,
    about: Mapping[str, object] | None = None,
    memory_bytes: int | None = None,
) -> EncoderDecoder:
    """Write the folder `target` and prove it; `about` goes into adapt_report.json with what was seen.

    Weights are in shards as large as the source's, if those are in several. Where the whole model does not
    fit into `memory_bytes` (None: what is free), it is proved layer by layer. Raises GateError for a proof
    that fails, GembError if `target` exists, MachineError without space; then nothing is left there.
    """
    from gemb.model.adapting.encoder_decoder_proofs import prove
    from gemb.model.adapting.encoder_decoder_slices import prove_by_layer
    from gemb.model.trainable.saving import appearing

    source = adaptation.pair.encoder
    check_writable(target, adaptation.needs_bytes)
    began = time.monotonic()
    with appearing(target) as place:
        write_pieces(
            [origin.piece for origin in adaptation.tensors.origins],
            place,
            shard_bytes=_shard_bytes(source),
        )
        write_json(place / "config.json", adaptation.config)
        write_json(place / "generation_config.json", dict(_generation(adaptation)))
        positions = int(adaptation.config["decoder"]["max_position_embeddings"])
        padding = write_tokenizer_files(source, place, max_tokens=positions, cut=None)
        written = time.monotonic()
        fits = adaptation.proving_bytes <= (memory_bytes or free_memory_bytes("cpu") or inf)
        try:
            proofs = (prove if fits else prove_by_layer)(place, adaptation.pair)
        except GateError as error:
            raise GateError(
                f"{target} is not kept, a proof failed: {error}; try another release of transformers"
            ) from error
        made = EncoderDecoder(proofs, padding, written - began, time.monotonic() - written)
        write_json(place / REPORT, {**(about or {}), **as_json(adaptation, made)})
    return made


def _shard_bytes(source: ModelFolder) -> int:
    files = source.weights().files
    return max(file.stat().st_size for file in files) if len(files) > 1 else SHARD_BYTES


def _generation(adaptation: EncoderDecoderAdaptation) -> Iterator[tuple[str, object]]:
    """What generate() starts, pads and ends with: the source's own settings first.

    T5Gemma's decoder starts with the beginning token, as its class does in training.
    """
    file = adaptation.pair.decoder.path / "generation_config.json"
    given = read_json(file) if file.is_file() else {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        yield key, given.get(key, adaptation.config["decoder"].get(key))
    yield "decoder_start_token_id", adaptation.config["decoder"].get("bos_token_id")


def as_json(adaptation: EncoderDecoderAdaptation, made: EncoderDecoder) -> dict[str, object]:
    """Every tensor and where it came from, what is new, what was left out, what to train first, the proofs.

    The tensors of `model.decoder` come from the decoder's source, all others from the encoder's.
    """
    pair = adaptation.pair
    return {
        "source": str(pair.encoder.path),
        "decoder_source": str(pair.decoder.path),
        "source_model_type": pair.kind,
        "model_type": adaptation.config["model_type"],
        "balanced": pair.is_balanced,
        "tensors": [
            {
                "name": origin.piece.name,
                "dtype": origin.piece.dtype,
                "shape": origin.piece.shape,
                "origin": origin.change,
                "from": origin.sources,
            }
            for origin in adaptation.tensors.origins
        ],
        "left_out": adaptation.tensors.left_out,
        "parameters": adaptation.parameters,
        "random_parameters": adaptation.random_parameters,
        "cross_attention_only": adaptation.warm_up_steps,
        "padding_token_added": made.padding_token,
        "proofs": made.proofs.as_json(),
        "seconds": {"writing": made.writing_seconds, "proofs": made.proving_seconds},
    }

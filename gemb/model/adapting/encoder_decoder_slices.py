"""An encoder-decoder proved layer by layer, for a model that is larger than the memory allowed.

As in `gemb.model.adapting.slices`, a slice is a folder cut out as ranges of bytes; here it has one layer of
each half, and stands beside one layer of each source. A layer of the decoder reads what a slice's encoder
gives it; the same weights in the same class do the same with what the whole encoder gives.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemb.errors import GateError
from gemb.files import read_json, write_json
from gemb.model.adapting.encoder_decoder_maps import Pair
from gemb.model.adapting.encoder_decoder_proofs import EncoderDecoderProofs, prove
from gemb.model.adapting.slices import Cut, cut_config, slice_rows, source_config, write_slice
from gemb.model.adapting.streaming import Piece, rows_of, whole, write_pieces
from gemb.model.folder import ModelFolder, ModuleSpec
from gemb.model.weights import Weights

_TABLE = "embed_tokens.weight"


def prove_by_layer(folder: Path, pair: Pair) -> EncoderDecoderProofs:
    """The proofs of `gemb.model.adapting.encoder_decoder_proofs.prove`, one layer of each half at a time.

    Differences are the largest of all slices. Raises GateError with the layer for the first that fails.
    """
    weights, config = Weights.read(folder), read_json(folder / "config.json")
    encoder = config["encoder"].get("text_config", config["encoder"])
    depths = (int(encoder["num_hidden_layers"]), int(config["decoder"]["num_hidden_layers"]))
    rows = slice_rows(int(config["decoder"]["vocab_size"]))
    seen: list[EncoderDecoderProofs] = []
    for layer in range(max(depths)):
        # Where the other half is deeper, the last one of this one is proved again.
        first, second = (Cut((min(layer, depth - 1),), rows) for depth in depths)
        with tempfile.TemporaryDirectory(prefix=".gemb-", dir=folder.parent) as place:
            both = Path(place) / "both"
            _write_slice(both, weights, config, first, second)
            sources = (
                _source_slice(Path(place) / "encoder", pair.encoder, first, pair.kind),
                _source_slice(Path(place) / "decoder", pair.decoder, second, pair.kind),
            )
            try:
                seen.append(prove(both, Pair(*sources)))
            except GateError as error:
                raise GateError(f"of layer {layer} alone, {error}") from error
    return _joined(seen, *depths)


def _source_slice(place: Path, source: ModelFolder, cut: Cut, kind: str) -> ModelFolder:
    config = source_config(source, kind)
    write_slice(place, source.weights(), config, cut, _TABLE)
    modules = (ModuleSpec("transformer", place), *source.modules[1:])
    return replace(source, path=place, config=cut_config(config, cut), family=kind, modules=modules)


def _write_slice(
    place: Path, weights: Weights, config: Mapping[str, Any], encoder: Cut, decoder: Cut
) -> None:
    """Write the folder of an encoder-decoder with one layer of each half."""
    taken = {"encoder": str(encoder.layers[0]), "decoder": str(decoder.layers[0])}
    pieces: list[Piece] = []
    for name in weights:
        half, _, inner = name.removeprefix("model.").partition(".")
        number, _, tail = inner.removeprefix("layers.").partition(".")
        if inner == _TABLE:
            pieces.append(rows_of(name, weights.spec(name), encoder.rows))
        elif not inner.startswith("layers."):
            pieces.append(whole(name, weights.spec(name)))
        elif number == taken[half]:
            pieces.append(whole(f"model.{half}.layers.0.{tail}", weights.spec(name)))
    place.mkdir()
    write_pieces(pieces, place)
    first = dict(config["encoder"])
    if "text_config" in first:
        # No row of a slice ends an image.
        first["text_config"] = cut_config(first["text_config"], encoder)
        first["eoi_token_index"] = len(encoder.rows)
    else:
        first = cut_config(first, encoder)
    second = cut_config(config["decoder"], decoder)
    top = {key: second[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(place / "config.json", {**config, **top, "encoder": first, "decoder": second})


def _joined(
    seen: Sequence[EncoderDecoderProofs], encoder_layers: int, decoder_layers: int
) -> EncoderDecoderProofs:
    """What was seen of all slices together."""
    tokens = [one.route_tokens for one in seen if one.route_tokens is not None]
    beyond = [one.route_difference_beyond for one in seen if one.route_difference_beyond is not None]
    return replace(
        seen[0],
        encoder_source_difference=max(one.encoder_source_difference for one in seen),
        decoder_source_difference=max(one.decoder_source_difference for one in seen),
        route_tokens=min(tokens, default=None),
        route_difference=max(one.route_difference for one in seen),
        route_difference_beyond=max(beyond, default=None),
        padding_difference=max(one.padding_difference for one in seen),
        decoder_padding_difference=max(one.decoder_padding_difference for one in seen),
        encoder_reaches=tuple(one.encoder_reaches[0] for one in seen[:encoder_layers]),
        decoder_reaches=tuple(one.decoder_reaches[0] for one in seen[:decoder_layers]),
        cache_difference=max(one.cache_difference for one in seen),
        saved_difference=max(one.saved_difference for one in seen),
        by_layer=True,
    )

"""An adapted encoder proved layer by layer, for a model that is larger than the memory allowed.

What is proved of a whole model is proved of slices of it: folders of one layer each, with the final norm and
some rows of the table, cut out of what was written and out of the source as ranges of bytes. The same weights
in the same class compute the same, so that a layer that agrees with the source's on what the slice embeds
agrees on any states; together the slices say what the whole would.

A layer that has not the tensors of a first one (ModernBERT's first has no norm before attention) is proved
behind the first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from gemb.errors import GateError
from gemb.files import write_json
from gemb.model.adapting.key_maps import FAMILIES, prefix_of_table, text_config
from gemb.model.adapting.proofs import Proofs, load_encoder, prove_folder
from gemb.model.adapting.streaming import Piece, rows_of, whole, write_pieces
from gemb.model.folder import ModelFolder, ModuleSpec, read_folder
from gemb.model.weights import Weights

ROWS = 64
"""Of the table in a slice; the probes need few, no two the same."""
# Keys that say the types of layers by their number, which a slice changes.
_PATTERNS = frozenset({"sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers"})


@dataclass(frozen=True)
class Cut:
    """Which layers and rows of a model go into a slice."""

    layers: tuple[int, ...]
    rows: tuple[int, ...]
    """Ascending ids."""


def prove_by_layer(
    folder: Path,
    source: ModelFolder,
    kind: str,
    *,
    causal: bool,
    keep_layers: Sequence[int],
    kept_ids: Sequence[int] | None,
) -> Proofs:
    """The proofs of `gemb.model.adapting.proofs.prove`, with one layer or two in memory at a time.

    Differences are the largest of all slices. Raises GateError with the layer for the first that fails.
    """
    adapted = read_folder(folder)
    table = FAMILIES[kind].table
    rows = slice_rows(int(adapted.config["vocab_size"]))
    old_rows = rows if kept_ids is None else tuple(kept_ids[row] for row in rows)
    config = source_config(source, kind)
    seen: list[Proofs] = []
    for layers in _slices(adapted.weights(), int(adapted.config["num_hidden_layers"])):
        old_layers = tuple(keep_layers[layer] for layer in layers) if keep_layers else layers
        with tempfile.TemporaryDirectory(prefix=".gemb-", dir=folder.parent) as place:
            ours, theirs = Path(place) / "encoder", Path(place) / "source"
            write_slice(ours, adapted.weights(), adapted.config, Cut(layers, rows), table)
            write_slice(theirs, source.weights(), config, Cut(old_layers, old_rows), table)
            modules = (ModuleSpec("transformer", ours), *adapted.modules[1:])
            one = replace(adapted, config=cut_config(adapted.config, Cut(layers, rows)), modules=modules)
            try:
                seen.append(prove_folder(one, partial(load_encoder, theirs), kind, causal=causal))
            except GateError as error:
                raise GateError(f"of layer {layers[-1]} alone, {error}") from error
    return _joined(seen)


def _slices(weights: Weights, layers: int) -> Iterator[tuple[int, ...]]:
    """The layers of each slice; the last is the one that is proved."""
    names: dict[int, set[str]] = {layer: set() for layer in range(layers)}
    for name in weights:
        number, _, rest = name.partition("layers.")[2].partition(".")
        if number.isdecimal():
            names[int(number)].add(rest)
    for layer in range(layers):
        yield (layer,) if names[layer] == names[0] else (0, layer)


def slice_rows(entries: int) -> tuple[int, ...]:
    """Ids of the rows of a slice, from the upper half of the vocabulary, away from special tokens."""
    upper = np.random.default_rng(6).permutation(entries - entries // 2)[:ROWS]
    return tuple(sorted((entries // 2 + upper).tolist()))


def source_config(source: ModelFolder, kind: str) -> dict[str, Any]:
    """The config of the source's text model with all that it leaves out, as its class reads it."""
    from transformers import CONFIG_MAPPING

    given = {key: value for key, value in text_config(source).items() if key != "model_type"}
    config: dict[str, Any] = orjson.loads(CONFIG_MAPPING[kind](**given).to_json_string(use_diff=False))
    return config


def cut_config(config: Mapping[str, Any], cut: Cut) -> dict[str, Any]:
    """`config` of a model that has only these layers and rows; ids of tokens are in no probe and become 0."""
    kept = {key: value for key, value in config.items() if key not in _PATTERNS}
    for key, value in kept.items():
        if key.endswith("_token_id") and value is not None:
            kept[key] = 0
    if isinstance(kept.get("layer_types"), list):
        kept["layer_types"] = [kept["layer_types"][layer] for layer in cut.layers]
    return {**kept, "num_hidden_layers": len(cut.layers), "vocab_size": len(cut.rows)}


def write_slice(place: Path, weights: Weights, config: Mapping[str, Any], cut: Cut, table: str) -> None:
    """Write the folder of a slice; names of tensors are those of the text model alone."""
    prefix = prefix_of_table(weights, table)
    numbers = {str(layer): number for number, layer in enumerate(cut.layers)}
    pieces: list[Piece] = []
    for name in weights:
        own = name.removeprefix(prefix)
        head, _, tail = own.removeprefix("layers.").partition(".")
        if not name.startswith(prefix) or name.endswith("inv_freq"):
            continue
        if own == table:
            pieces.append(rows_of(own, weights.spec(name), cut.rows))
        elif not own.startswith("layers."):
            pieces.append(whole(own, weights.spec(name)))
        elif head in numbers:
            pieces.append(whole(f"layers.{numbers[head]}.{tail}", weights.spec(name)))
    place.mkdir()
    write_pieces(pieces, place)
    write_json(place / "config.json", cut_config(config, cut))


def _joined(seen: Sequence[Proofs]) -> Proofs:
    """What was seen of all slices together."""
    first = seen[0]
    between_classes = [one.class_difference for one in seen if one.class_difference is not None]
    return replace(
        first,
        source_difference=max(one.source_difference for one in seen),
        class_difference=max(between_classes, default=None),
        padding_difference=max(one.padding_difference for one in seen),
        reaches=tuple(one.reaches[-1] for one in seen),
        saved_difference=max(one.saved_difference for one in seen),
        gemb_difference=max(one.gemb_difference for one in seen),
        by_layer=True,
    )

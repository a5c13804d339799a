"""How far each layer of a backbone sees, told from config.json alone, as transformers 5.23 runs it.

The same key means different windows in different families, and a decoder is an encoder only if its config
says so in the one way that its family heeds. The rules here were read from transformers and are tested
against it by changing one token and watching which states move.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ENCODERS = frozenset({
    "bert", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "distilbert",
    "electra", "albert", "mpnet", "deberta", "deberta-v2", "eurobert", "data2vec-text", "ernie", "nomic_bert",
})  # fmt: skip
_DECODERS = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "gpt_neox"})
_SLIDING = "sliding_attention"


@dataclass(frozen=True, slots=True)
class Reach:
    """How many positions before and after itself a token attends to; None is all of them."""

    left: int | None
    right: int | None

    def __str__(self) -> str:
        if self.left is None:
            return "full" if self.right is None else "full, causal"
        if self.left == self.right:
            return f"window ±{self.left}"
        return f"window −{self.left} to +{self.right}"


FULL = Reach(None, None)
CAUSAL = Reach(None, 0)


def reach_of_layers(config: Mapping[str, Any]) -> tuple[Reach, ...] | None:
    """The reach of every layer in order; `config` is that of the text backbone.

    None for a family whose rules are not known here.
    """
    family = str(config.get("model_type"))
    if family in _ENCODERS:
        return (FULL,) * _layers(config)
    rule = _RULES.get(family)
    if rule is None:
        return None
    full, window = rule(config)
    return tuple(window if kind == _SLIDING else full for kind in layer_types(config))


def is_bidirectional(layers: Sequence[Reach]) -> bool:
    """Whether no layer is causal."""
    return all(reach.right != 0 for reach in layers)


def describe(layers: Sequence[Reach]) -> str:
    """One line: `24 layers, bidirectional; 20 window ±256, 4 full (6, 12, 18, 24)`; layers count from 1."""
    direction = "bidirectional" if is_bidirectional(layers) else "causal: a token sees only what is before it"
    count = f"{len(layers)} layer{'s' if len(layers) != 1 else ''}, {direction}"
    kinds = sorted(dict.fromkeys(layers), key=lambda reach: -layers.count(reach))
    if len(kinds) == 1:
        return f"{count}; all {kinds[0]}"
    places = [[place for place, reach in enumerate(layers, 1) if reach == kind] for kind in kinds]
    shown = [f"{len(places[0])} {kinds[0]}"]
    for kind, where in zip(kinds[1:], places[1:], strict=True):
        shown.append(f"{len(where)} {kind} ({', '.join(map(str, where))})")
    return f"{count}; {', '.join(shown)}"


def _gemma3(config: Mapping[str, Any]) -> tuple[Reach, Reach]:
    window = int(config.get("sliding_window") or 4096)
    if config.get("use_bidirectional_attention"):
        # The flag halves the window when the config is read; is_causal=false beside it adds one.
        radius = window // 2 + (config.get("is_causal") is False)
        return FULL, Reach(radius, radius)
    return _by_causality(config)


def _by_causality(config: Mapping[str, Any]) -> tuple[Reach, Reach]:
    """A decoder: an encoder only with `is_causal: false`, and then with the whole window on both sides."""
    window = int(config.get("sliding_window") or 4096)
    if config.get("is_causal") is False:
        return FULL, Reach(window, window)
    return CAUSAL, Reach(window - 1, 0)


def _radius(config: Mapping[str, Any]) -> tuple[Reach, Reach]:
    """T5Gemma's encoder and EmbeddingGemma 2: the window is a radius."""
    window = int(config.get("sliding_window") or {"t5gemma": 4096}.get(str(config.get("model_type")), 512))
    return FULL, Reach(window, window)


def _t5gemma2(config: Mapping[str, Any]) -> tuple[Reach, Reach]:
    """T5Gemma 2's encoder: half the window on each side, one less on the left."""
    window = int(config.get("sliding_window") or 4096)
    return FULL, Reach((window + 1) // 2 - 1, window // 2)


def _modernbert(config: Mapping[str, Any]) -> tuple[Reach, Reach]:
    radius = int(config.get("local_attention") or 128) // 2
    return FULL, Reach(radius, radius)


_RULES = {
    "gemma3_text": _gemma3,
    "gemma2": _by_causality,
    "t5gemma": _radius,
    "t5_gemma_module": _radius,
    "t5gemma2_text": _t5gemma2,
    "embedding_gemma2_text": _radius,
    "modernbert": _modernbert,
    **dict.fromkeys(_DECODERS, _by_causality),
}


def _layers(config: Mapping[str, Any]) -> int:
    return int(config.get("num_hidden_layers") or config.get("n_layers") or 0)


def layer_types(config: Mapping[str, Any]) -> list[str]:
    """The kind of each layer, as declared, or by the pattern that the family has when it is not."""
    family = str(config.get("model_type"))
    layers = _layers(config)
    declared = config.get("layer_types")
    if family == "mistral":
        return [_SLIDING if config.get("sliding_window", 4096) else "full_attention"] * layers
    if isinstance(declared, list):
        return [str(kind) for kind in declared]
    if family in ("gemma3_text", "t5gemma2_text", "embedding_gemma2_text"):
        pattern = int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6)
        return [_SLIDING if place % pattern else "full_attention" for place in range(1, layers + 1)]
    if family in ("gemma2", "t5gemma", "t5_gemma_module"):
        return [_SLIDING if place % 2 else "full_attention" for place in range(1, layers + 1)]
    if family == "modernbert":
        every = int(config.get("global_attn_every_n_layers") or 3)
        return [_SLIDING if place % every else "full_attention" for place in range(layers)]
    if family.startswith("qwen") and config.get("use_sliding_window") and config.get("sliding_window"):
        first = int(config.get("max_window_layers") or 28)
        return [_SLIDING if place >= first else "full_attention" for place in range(layers)]
    return ["full_attention"] * layers

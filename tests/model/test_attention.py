"""The reach of layers: told from config.json, and seen in transformers by changing one token."""

from typing import Any

import pytest
import torch
import transformers

from gemb.model.attention import Reach, describe, is_bidirectional, reach_of_layers

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "max_position_embeddings": 64,
}
TOKENS = 33
SAME = torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(2))
DISTURBANCE = torch.randn(64, generator=torch.Generator().manual_seed(3))
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3 with the flag": ("Gemma3Text", "Gemma3TextModel", {**MIXED, "use_bidirectional_attention": True}),
    "gemma3 without causality": ("Gemma3Text", "Gemma3TextModel", {**MIXED, "is_causal": False}),
    "gemma3 with both": (
        "Gemma3Text",
        "Gemma3TextModel",
        {**MIXED, "is_causal": False, "use_bidirectional_attention": True},
    ),
    "gemma3 as a decoder": ("Gemma3Text", "Gemma3TextModel", MIXED),
    "gemma2 without causality": ("Gemma2", "Gemma2Model", {**MIXED, "is_causal": False}),
    "gemma2 with a flag it does not heed": (
        "Gemma2",
        "Gemma2Model",
        {**MIXED, "use_bidirectional_attention": True},
    ),
    "modernbert": ("ModernBert", "ModernBertModel", {**MIXED, "local_attention": 8}),
    "embeddinggemma 2": ("EmbeddingGemma2Text", "EmbeddingGemma2TextModel", {**MIXED, "global_head_dim": 8}),
    "qwen3 without causality": ("Qwen3", "Qwen3Model", {"is_causal": False}),
    "qwen3 as a decoder": ("Qwen3", "Qwen3Model", {}),
    "qwen3 with a window": (
        "Qwen3",
        "Qwen3Model",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "is_causal": False},
    ),
    "llama without causality": ("Llama", "LlamaModel", {"is_causal": False}),
    "mistral with a window": ("Mistral", "MistralModel", {"sliding_window": 8, "is_causal": False}),
    "mistral as a decoder": ("Mistral", "MistralModel", {"sliding_window": 8}),
    "eurobert": ("EuroBert", "EuroBertModel", {"mask_token_id": 4}),
    "bert": ("Bert", "BertModel", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_reach_is_what_moves_in_transformers(name: str) -> None:
    """One token changes; the states of exactly the tokens that attend to it change, layer by layer alone."""
    family, model_class, settings = CASES[name]
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **settings})
    told = reach_of_layers(config.to_dict())
    assert told is not None
    model = getattr(transformers, model_class)._from_config(config, attn_implementation="eager").eval()
    everything = TOKENS // 2  # the changed token is in the middle
    assert [reach_seen(model, layer) for layer in range(2)] == [
        Reach(*(everything if side is None else side for side in (reach.left, reach.right))) for reach in told
    ]


def reach_seen(model: torch.nn.Module, layer: int) -> Reach:
    """The reach of one layer: a token whose output moves with another's input attends to that one."""
    layers = next(part for name, part in model.named_modules() if name.endswith(("layers", "layer")))
    middle = TOKENS // 2
    states: list[torch.Tensor] = []
    change = False

    def disturb(
        module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[object, ...]:
        hidden = arguments[0] if arguments else named["hidden_states"]
        hidden = SAME[None, :, : hidden.shape[2]].clone()
        if change:
            hidden[0, middle] += DISTURBANCE[: hidden.shape[2]]
        return (
            ((hidden, *arguments[1:]), named)
            if arguments
            else (arguments, {**named, "hidden_states": hidden})
        )

    def keep(module: torch.nn.Module, arguments: object, output: torch.Tensor | tuple[torch.Tensor]) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).detach().reshape(TOKENS, -1))

    handles = [
        layers[layer].register_forward_pre_hook(disturb, with_kwargs=True),
        layers[layer].register_forward_hook(keep),
    ]
    with torch.no_grad():
        model(torch.full((1, TOKENS), 5))
        change = True
        model(torch.full((1, TOKENS), 5))
    for handle in handles:
        handle.remove()
    moved = torch.nonzero((states[0] != states[1]).any(-1)).flatten()
    return Reach(left=int(moved.max()) - middle, right=middle - int(moved.min()))


def test_windows_of_the_published_models_are_those_of_the_papers() -> None:
    gemma = {"model_type": "gemma3_text", "num_hidden_layers": 24, "sliding_window": 512,
             "use_bidirectional_attention": True, "_sliding_window_pattern": 6}  # fmt: skip
    layers = reach_of_layers(gemma)
    assert layers is not None
    assert describe(layers) == "24 layers, bidirectional; 20 window ±256, 4 full (6, 12, 18, 24)"
    assert is_bidirectional(layers)
    encoder = reach_of_layers({"model_type": "t5gemma2_text", "num_hidden_layers": 6, "sliding_window": 512})
    assert encoder is not None
    assert encoder[0] == Reach(255, 256)


def test_a_decoder_is_called_causal() -> None:
    layers = reach_of_layers({"model_type": "llama", "num_hidden_layers": 3})
    assert layers == (Reach(None, 0),) * 3
    assert describe(layers) == "3 layers, causal: a token sees only what is before it; all full, causal"


def test_an_unknown_family_is_not_guessed() -> None:
    assert reach_of_layers({"model_type": "mamba", "num_hidden_layers": 3}) is None


def test_one_bert_layer_reads_well() -> None:
    layers = reach_of_layers({"model_type": "bert", "num_hidden_layers": 1})
    assert layers is not None
    assert describe(layers) == "1 layer, bidirectional; all full"

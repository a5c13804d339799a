"""Rotary frequencies from the spellings that config.json has had."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from gemb.model.families import NotPacked
from gemb.model.kernels import Rotary


def rotary(
    config: Mapping[str, Any],
    channels: int,
    layer_type: str = "full_attention",
    *,
    theta_key: str = "rope_theta",
    default_theta: float = 10_000.0,
    is_scaled: bool = True,
) -> Rotary:
    """The rotary positions of layers of `layer_type` (full_attention, sliding_attention) with C channels.

    Reads `rope_parameters`, nested by layer type or not; what they leave out comes from the older spelling:
    `theta_key`, and `rope_scaling` where `is_scaled` (older Gemma 3 means it for full layers only).
    Raises NotPacked for a kind of scaling other than default, linear and llama3.
    """
    given = config.get("rope_parameters") or {}
    parameters = given.get(layer_type) if layer_type in given else given
    older = config.get("rope_scaling") if is_scaled else None
    parameters = {"rope_theta": config.get(theta_key), **(older or {}), **(parameters or {})}
    theta = float(parameters["rope_theta"] or default_theta)
    if float(parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise NotPacked("its rotary positions turn only a part of each head")
    # The same steps in the same precision as transformers, so that the angles are equal to the bit.
    frequencies = 1.0 / theta ** (torch.arange(0, channels, 2, dtype=torch.int64).float() / channels)
    match parameters.get("rope_type") or parameters.get("type") or "default":
        case "default":
            return Rotary(frequencies)
        case "linear":
            return Rotary(frequencies / float(parameters["factor"]))
        case "llama3":
            return Rotary(_llama3(frequencies, parameters))
        case kind:
            raise NotPacked(f"its rotary scaling {kind!r} is none of default, linear, llama3")


def _llama3(frequencies: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1's scaling: long waves are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = (float(parameters[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(parameters["original_max_position_embeddings"])
    waves = 2 * math.pi / frequencies
    blend = (context / waves - low) / (high - low)
    between = (1 - blend) * frequencies / factor + blend * frequencies
    stretched = torch.where(waves > context / low, frequencies / factor, between)
    return torch.where(waves < context / high, frequencies, stretched)

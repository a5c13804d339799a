"""EmbeddingGemma 2's text part (`embedding_gemma2_text` in transformers).

Gemma 3's layer with plain gains, a norm on values too, no score scale, wider heads in full layers, and a
third sub-layer: the token embeddings, projected anew for each layer, gate a bottleneck beside the stream.
The states are projected to the width of the vectors at the end. Of an `embedding_gemma2` folder the text
part is taken.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gemb.model.blocks import Backbone, Projection
from gemb.model.families import activation_of, prefix_of
from gemb.model.families.gated import GEMMA_NORMS, Traits, gated_backbone, projection_of
from gemb.model.families.rope import rotary
from gemb.model.kernels import Kernels, Rotary, add_normed_, rms_norm
from gemb.model.weights import Weights

# What transformers takes where config.json leaves it out.
DEFAULTS = {"num_attention_heads": 4, "hidden_activation": "gelu_pytorch_tanh"}
TRAITS = Traits(
    norms=GEMMA_NORMS,
    scales_embeddings=True,
    norms_queries_and_keys=True,
    norms_values=True,
    score_scale=1.0,
)


class PerLayerEmbedding:
    """stream + norm(output(activation(gate(stream)) * norm(signal(embedded)))), all times a scalar.

    The signal of a layer is computed when the layer needs it: for all layers at once it would be as large as
    the stream times their number.
    """

    def __init__(
        self,
        kernels: Kernels,
        activation: str,
        *,
        signal: Projection,
        signal_gain: Tensor,
        gate: Projection,
        output: Projection,
        output_gain: Tensor,
        scalar: float,
        epsilon: float,
    ) -> None:
        output = output.after(signal_gain)
        self._signal = kernels.linear(signal.weight, signal.bias)
        self._gate = kernels.linear(gate.weight, gate.bias)
        self._output = kernels.linear(output.weight, output.bias)
        self._output_gain = kernels.vector(output_gain)
        self._activation = activation
        self._scalar = scalar
        self._epsilon = epsilon
        self._dtype = kernels.dtype

    def __call__(self, stream: Tensor, embedded: Tensor) -> None:
        """Change the fp32 stream[T, D] in place by embedded[T, D], in the dtype of the kernels."""
        signal = rms_norm(self._signal(embedded).float(), None, self._epsilon).to(self._dtype)
        gated = self._gate.activated(stream.to(self._dtype), self._activation) * signal
        add_normed_(stream, self._output(gated), self._output_gain, self._epsilon)
        if self._scalar != 1:
            stream *= self._scalar


def build(config: Mapping[str, Any], weights: Weights, kernels: Kernels) -> Backbone:
    """The text backbone of an EmbeddingGemma 2 checkpoint."""
    config = {**DEFAULTS, **config}
    prefix = prefix_of(weights, "ple.per_layer_model_projection.weight")
    epsilon = float(config.get("rms_norm_eps", 1e-6))
    activation = activation_of(config["hidden_activation"])
    signals = weights.tensor(f"{prefix}ple.per_layer_model_projection.weight")
    signal_gain = weights.tensor(f"{prefix}ple.per_layer_projection_norm.weight").float()
    signal_width = len(signal_gain)

    def rotary_of(layer_type: str, channels: int) -> Rotary:
        theta = 10_000.0 if layer_type == "sliding_attention" else 1_000_000.0
        return rotary(config, channels, layer_type, default_theta=theta)

    def extra_of(layer: int) -> PerLayerEmbedding:
        at = f"{prefix}layers.{layer}."
        signal = signals[layer * signal_width : (layer + 1) * signal_width]
        return PerLayerEmbedding(
            kernels,
            activation,
            signal=Projection(signal).times(signals.shape[1] ** -0.5),
            signal_gain=signal_gain,
            gate=projection_of(weights, f"{at}ple_block.per_layer_input_gate"),
            output=projection_of(weights, f"{at}ple_block.per_layer_projection"),
            output_gain=weights.tensor(f"{at}ple_block.post_per_layer_input_norm.weight"),
            scalar=float(weights.tensor(f"{at}layer_scalar")),
            epsilon=epsilon,
        )

    return gated_backbone(
        config,
        weights,
        kernels,
        TRAITS,
        prefix=prefix,
        rotary_of=rotary_of,
        extra_of=extra_of,
        projection=projection_of(weights, f"{prefix}embedding_projection"),
    )

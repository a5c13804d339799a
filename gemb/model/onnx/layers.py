"""The layers of a trainable backbone as ONNX operators.

The f32 graph has operators of ONNX only. Whole-number weights go into onnxruntime's MatMulNBits and
GatherBlockQuantized, which turn blocks back into fp32 when they are used; activations stay fp32, so that a
vector does not depend on its batch as it does after onnxruntime's dynamic quantisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemb.errors import MismatchError
from gemb.model.attention import FULL, Reach
from gemb.model.kernels import Rotary
from gemb.model.onnx.graph import MICROSOFT, Graph, Value
from gemb.model.trainable.bert import BertBackbone, LayerNorm
from gemb.model.trainable.blocks import Attention, FeedForward
from gemb.model.trainable.functions import Norm
from gemb.model.trainable.gated import GatedBackbone
from gemb.model.trainable.parameters import Tensors
from gemb.quantization.grids import BLOCK, BlockGrid
from gemb.quantization.roles import role_of

FORBIDDEN = -1e30
"""Added to the score of a token that is not seen; minus infinity gives NaN where none is seen at all."""
ROWS_AT_ONCE = 8192
"""Of a table that is quantised: 25 MB at 768 wide."""
FLOAT, INT64 = 1, 7  # TensorProto's numbers, for Cast


class LayerWriter:
    """Writes layers into a graph; `ids` and `mask` are its inputs, int64[B, L]."""

    def __init__(
        self, graph: Graph, names: Mapping[int, str], grid: BlockGrid | None, longest: int, source: str
    ) -> None:
        self.graph = graph
        self._names = names  # of a parameter by its id()
        self._grid = grid
        self._longest = longest  # tokens, for the table of turns
        self._source = source
        self.is_exact = True
        """Whether all weights so far are in the graph as they are in the model, to the bit."""
        self.ids = graph.input("input_ids", ["batch_size", "sequence_length"])
        self.mask = graph.input("attention_mask", ["batch_size", "sequence_length"])
        length = graph.op("Gather", graph.op("Shape", self.ids), graph.constant([1]))  # int64[1]
        self._length = length
        scalar = graph.op("Squeeze", length)
        self._positions = graph.op(
            "Range", graph.constant(np.array(0)), scalar, graph.constant(np.array(1))
        )  # int64[L]
        self._biases: dict[tuple[Reach, bool], Value] = {}
        self._turns: dict[int, tuple[Value, Value]] = {}

    # --- weights

    def table(self, layer: Tensors, ids: Value) -> Value:
        """Rows of `layer`, fp32[..., D], for int64 `ids`[...]."""
        grid = self._grid_of(layer)
        name = self._name_of(layer)
        if grid is None:
            return self.graph.op("Gather", self.graph.weight(name, _array(layer.matrix)), ids)
        codes, scales = self._packed([layer], grid)
        return self.graph.op(
            "GatherBlockQuantized",
            self.graph.weight(name, codes.reshape(len(codes), -1)),
            ids,
            self.graph.weight(f"{name}.scales", scales),
            domain=MICROSOFT,
            bits=grid.bits,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )

    def linear(self, x: Value, layers: Sequence[Tensors]) -> Value:
        """x[..., I] through all `layers`, their outputs side by side, [..., O]."""
        graph, name = self.graph, "+".join(self._name_of(layer) for layer in layers)
        grid = self._grid_of(layers[0])
        if grid is None:
            weight = torch.cat([layer.matrix.detach() for layer in layers])
            product = graph.op("MatMul", x, graph.weight(name, _array(weight.T)))
        else:
            codes, scales = self._packed(layers, grid)
            product = graph.op(
                "MatMulNBits",
                x,
                graph.weight(name, codes),
                graph.weight(f"{name}.scales", scales.reshape(-1)),
                domain=MICROSOFT,
                K=layers[0].matrix.shape[1],
                N=len(codes),
                bits=grid.bits,
                block_size=BLOCK,
                accuracy_level=1,  # activations stay fp32
            )
        if all(layer.shift is None for layer in layers):
            return product
        biases = [
            torch.zeros(len(layer.matrix)) if layer.shift is None else layer.shift.detach()
            for layer in layers
        ]
        return graph.op("Add", product, self._vector(torch.cat(biases)))

    def _packed(
        self, layers: Sequence[Tensors], grid: BlockGrid
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Codes uint8[O, blocks, bytes of a block] as onnxruntime packs them, and scales fp32[O, blocks].

        Raises MismatchError if the rows are no whole blocks.
        """
        codes, scales = [], []
        for layer in layers:
            for rows in torch.split(layer.matrix.detach(), ROWS_AT_ONCE):
                try:
                    quantised = grid.quantise(rows)
                except ValueError as error:
                    raise MismatchError(
                        f"{self._source}: {self._name_of(layer)}: {error}; export f32 instead"
                    ) from error
                self.is_exact &= torch.equal(grid.dequantise(quantised), rows)
                # Stored without a sign: 0 stands in the middle, as both operators take it by default.
                code = (quantised.codes + (1 << (grid.bits - 1))).view(torch.uint8)  # wraps, as it should
                # Of a pair in a byte, the first is in the low half.
                codes.append(code[:, ::2] | code[:, 1::2] << 4 if grid.bits == 4 else code)
                scales.append(quantised.scales.float())
        all_scales = torch.cat(scales)
        return torch.cat(codes).reshape(*all_scales.shape, -1).numpy(), all_scales.numpy()

    def _grid_of(self, layer: Tensors) -> BlockGrid | None:
        """The grid of a weight: where every quantised format of gemb has whole numbers, and nowhere else."""
        role = role_of(self._name_of(layer), layer.matrix.shape)
        return None if role is None else self._grid

    def _name_of(self, layer: Tensors) -> str:
        return self._names[id(layer.matrix)]

    def _vector(self, values: Tensor) -> Value:
        return self.graph.constant(_array(values))

    # --- norms and activations

    def norm(self, x: Value, norm: Norm, gain: Tensor) -> Value:
        """Norm of x over the last axis, times `gain`."""
        gains = self._vector(gain.detach() + norm.offset)
        if norm.is_centred:
            return self.graph.op("LayerNormalization", x, gains, axis=-1, epsilon=norm.epsilon)
        return self.graph.op("Mul", self._unit(x, norm.epsilon), gains)

    def layer_norm(self, x: Value, norm: LayerNorm) -> Value:
        """LayerNorm with gain and bias."""
        shift = norm.layer.shift
        bias = () if shift is None else (self._vector(shift),)
        gain = self._vector(norm.layer.matrix)
        return self.graph.op("LayerNormalization", x, gain, *bias, axis=-1, epsilon=norm.epsilon)

    def _unit(self, x: Value, epsilon: float) -> Value:
        """X over the root of its mean square; onnxruntime knows the pattern and makes one operator of it."""
        graph = self.graph
        square = graph.op("ReduceMean", graph.op("Pow", x, graph.constant(2.0)), graph.constant([-1]))
        return graph.op("Div", x, graph.op("Sqrt", graph.op("Add", square, graph.constant(epsilon))))

    def activation(self, x: Value, name: str) -> Value:
        """X through one of `gemb.model.kernels.ACTIVATIONS`."""
        match name:
            case "gelu":
                return self.graph.op("Gelu", x)
            case "gelu_tanh":
                return self.graph.op("Gelu", x, approximate="tanh")
            case "silu":
                return self.graph.op("Mul", x, self.graph.op("Sigmoid", x))
            case "relu":
                return self.graph.op("Relu", x)
        raise ValueError(f"{name!r} is no activation")

    # --- sub-layers

    def attention(self, x: Value, attention: Attention) -> Value:
        """What attention brings back of x[B, L, D]."""
        graph, settings = self.graph, attention.settings
        heads, shared, channels = settings.heads, settings.shared, settings.channels
        joined = self.linear(x, attention.inputs)
        every = graph.op("Reshape", joined, graph.constant([0, 0, heads + 2 * shared, channels]))
        turning, values = graph.split(
            "Split", every, graph.constant([heads + shared, shared]), outputs=2, axis=2
        )
        scale = settings.scale
        if settings.norm is not None and attention.query_gain is not None and attention.key_gain is not None:
            gains = [(attention.query_gain.matrix + settings.norm.offset) * scale] * heads
            gains += [attention.key_gain.matrix + settings.norm.offset] * shared
            unit = self._unit(turning, settings.norm.epsilon)
            turning = graph.op("Mul", unit, self._vector(torch.stack(gains).detach()))
            scale = 1.0
        if attention.rotary is not None:
            turning = self._turned(turning, attention.rotary)
        queries, keys = graph.split("Split", turning, graph.constant([heads, shared]), outputs=2, axis=2)
        if scale != 1:
            queries = graph.op("Mul", queries, graph.constant(scale))
        queries = graph.op("Transpose", queries, perm=[0, 2, 1, 3])  # [B, H, L, C]
        keys = graph.op("Transpose", keys, perm=[0, 2, 3, 1])  # [B, G, C, L]
        values = graph.op("Transpose", values, perm=[0, 2, 1, 3])  # [B, G, L, C]
        # With one shared head, or as many as there are, the axes of both fit as they are.
        is_grouped = 1 < shared < heads
        if is_grouped:
            shape = graph.constant([0, shared, heads // shared, -1, channels])
            queries = graph.op("Reshape", queries, shape)  # [B, G, H / G, L, C]
            keys, values = (graph.op("Unsqueeze", part, graph.constant([2])) for part in (keys, values))
        scores = graph.op("MatMul", queries, keys)
        if settings.softcap is not None:
            cap = graph.constant(settings.softcap)
            scores = graph.op("Mul", graph.op("Tanh", graph.op("Div", scores, cap)), cap)
        scores = graph.op("Add", scores, self._bias(settings.reach, is_grouped=is_grouped))
        mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), values)
        if is_grouped:
            mixed = graph.op("Reshape", mixed, graph.constant([0, heads, -1, channels]))
        mixed = graph.op("Transpose", mixed, perm=[0, 2, 1, 3])
        mixed = graph.op("Reshape", mixed, graph.constant([0, 0, heads * channels]))
        return self.linear(mixed, [attention.output])

    def feed_forward(self, x: Value, layer: FeedForward) -> Value:
        """What a feed-forward brings back of x[B, L, D]."""
        wide = self.linear(x, layer.inputs)
        if layer.is_gated:
            gate, up = self.graph.split("Split", wide, outputs=2, axis=-1, num_outputs=2)
            return self.linear(
                self.graph.op("Mul", self.activation(gate, layer.activation), up), [layer.down]
            )
        return self.linear(self.activation(wide, layer.activation), [layer.down])

    def _turned(self, heads: Value, rotary: Rotary) -> Value:
        """heads[B, L, H, C] with the halves of each turned by the angles of its position."""
        graph = self.graph
        cosines, sines = self._turns_of(rotary)
        first, second = graph.split("Split", heads, outputs=2, axis=-1, num_outputs=2)
        real = graph.op("Sub", graph.op("Mul", first, cosines), graph.op("Mul", second, sines))
        imaginary = graph.op("Add", graph.op("Mul", second, cosines), graph.op("Mul", first, sines))
        return graph.op("Concat", real, imaginary, axis=-1)

    def _turns_of(self, rotary: Rotary) -> tuple[Value, Value]:
        """Cosines and sines of the positions of this batch, fp32[L, 1, C / 2]."""
        if id(rotary) not in self._turns:
            # fp32 positions times fp32 frequencies, as transformers has it, for equal angles.
            angles = torch.arange(self._longest).float()[:, None] * rotary._frequencies.float()
            number = len(self._turns)
            parts = {"cosines": angles.cos(), "sines": angles.sin()}
            cosines, sines = (
                self.graph.op(
                    "Slice",
                    self.graph.weight(f"rotary.{number}.{name}", _array(part * rotary._factor)[:, None]),
                    self.graph.constant([0]),
                    self._length,
                    self.graph.constant([0]),
                )
                for name, part in parts.items()
            )
            self._turns[id(rotary)] = cosines, sines
        return self._turns[id(rotary)]

    def _bias(self, reach: Reach, *, is_grouped: bool) -> Value:
        """What is added to scores, fp32[B, 1, 1 or L, L], 0 for what is seen; grouped has one axis more."""
        key = (reach, is_grouped)
        if key not in self._biases:
            graph = self.graph
            if is_grouped:
                self._biases[key] = graph.op(
                    "Unsqueeze", self._bias(reach, is_grouped=False), graph.constant([1])
                )
                return self._biases[key]
            seen = graph.op("Cast", graph.op("Unsqueeze", self.mask, graph.constant([1, 2])), to=9)
            if reach != FULL:
                seen = graph.op("And", seen, self._within(reach))
            self._biases[key] = graph.op("Where", seen, graph.constant(0.0), graph.constant(FORBIDDEN))
        return self._biases[key]

    def _within(self, reach: Reach) -> Value:
        """Whether a token (last axis) lies within reach of another, bool[L, L]."""
        graph = self.graph
        rows = graph.op("Unsqueeze", self._positions, graph.constant([1]))
        ahead = graph.op("Sub", graph.op("Unsqueeze", self._positions, graph.constant([0])), rows)
        sides = []
        if reach.left is not None:
            sides.append(graph.op("GreaterOrEqual", ahead, graph.constant(np.array(-reach.left))))
        if reach.right is not None:
            sides.append(graph.op("LessOrEqual", ahead, graph.constant(np.array(reach.right))))
        return sides[0] if len(sides) == 1 else graph.op("And", *sides)

    # --- backbones

    def gated(self, backbone: GatedBackbone) -> Value:
        """States[B, L, D] of a gated transformer."""
        graph = self.graph
        x = self.table(backbone.table, self.ids)
        if backbone.embedding_scale != 1:
            x = graph.op("Mul", x, graph.constant(float(backbone.embedding_scale)))
        if backbone.embedding_gain is not None:
            x = self.norm(x, backbone.norm, backbone.embedding_gain.matrix)

        def joined(x: Value, back: Value, gain: Tensors | None) -> Value:
            return graph.op("Add", x, back if gain is None else self.norm(back, layer.norm, gain.matrix))

        for layer in backbone.layers:
            gain = layer.attention_gain
            normed = x if gain is None else self.norm(x, layer.norm, gain.matrix)
            x = joined(x, self.attention(normed, layer.attention), layer.after_attention)
            normed = self.norm(x, layer.norm, layer.feed_forward_gain.matrix)
            x = joined(x, self.feed_forward(normed, layer.feed_forward), layer.after_feed_forward)
        return self.norm(x, backbone.norm, backbone.final_gain.matrix)

    def bert(self, backbone: BertBackbone) -> Value:
        """States[B, L, D] of BERT and its kin."""
        graph = self.graph
        positions = backbone.positions.matrix.detach()
        if backbone.types is not None:
            positions = positions + backbone.types.matrix.detach()[0]
        table = graph.weight(self._name_of(backbone.positions), _array(positions))
        places = self._positions
        if backbone.padding is not None:
            # RoBERTa does not count padding, wherever it stands, and gives it the place `padding`.
            padding = graph.constant(np.array(backbone.padding))
            counts = graph.op("Cast", graph.op("Not", graph.op("Equal", self.ids, padding)), to=INT64)
            number = graph.op("CumSum", counts, graph.constant(np.array(1)))
            places = graph.op("Add", graph.op("Mul", number, counts), padding)
        x = graph.op("Add", self.table(backbone.table, self.ids), graph.op("Gather", table, places))
        x = self.layer_norm(x, backbone.norm)
        for layer in backbone.layers:
            back = self.attention(x, layer.attention)
            x = self.layer_norm(graph.op("Add", x, back), layer.attention_norm)
            back = self.feed_forward(x, layer.feed_forward)
            x = self.layer_norm(graph.op("Add", x, back), layer.norm)
        return x

    # --- pooling

    def pooled(self, states: Value, modes: Sequence[str], few: int = 1) -> Value:
        """States[B, L, D] -> [B, D * len(modes)], tokens that the mask leaves out left out.

        `few` is K of first-k and last-k.
        """
        graph = self.graph
        parts = []
        for mode in modes:
            if mode == "max":
                seen = graph.op("Cast", graph.op("Unsqueeze", self.mask, graph.constant([2])), to=9)
                kept = graph.op("Where", seen, states, graph.constant(FORBIDDEN))
                parts.append(graph.op("ReduceMax", kept, graph.constant([1]), keepdims=0))
                continue
            shares = graph.op("Unsqueeze", self._shares(mode, few), graph.constant([1]))  # [B, 1, L]
            parts.append(graph.op("Squeeze", graph.op("MatMul", shares, states), graph.constant([1])))
        return parts[0] if len(parts) == 1 else graph.op("Concat", *parts, axis=-1)

    def _shares(self, mode: str, few: int) -> Value:
        """The share of each token in its text's vector, fp32[B, L]."""
        graph = self.graph
        last_axis = graph.constant([1])
        mask = graph.op("Cast", self.mask, to=FLOAT)
        number = graph.op("Mul", graph.op("CumSum", mask, graph.constant(np.array(1))), mask)  # from 1
        count = graph.op("ReduceSum", mask, last_axis)

        match mode:
            case "first-k" | "last-k":
                least = graph.op("Min", count, graph.constant(float(few)))
                if mode == "first-k":
                    seen = graph.op("LessOrEqual", number, graph.constant(float(few)))
                else:
                    seen = graph.op("Greater", number, graph.op("Sub", count, least))
                # Left-out tokens have number 0, which is below K.
                return graph.op("Div", graph.op("Mul", graph.op("Cast", seen, to=FLOAT), mask), least)
            case "cls":
                return graph.op("Cast", graph.op("Equal", number, graph.constant(1.0)), to=FLOAT)
            case "lasttoken":
                return graph.op("Cast", graph.op("Equal", number, count), to=FLOAT)
            case "mean":
                return graph.op("Div", mask, count)
            case "mean_sqrt_len_tokens":
                return graph.op("Div", mask, graph.op("Sqrt", count))
            case "weightedmean":
                return graph.op("Div", number, graph.op("ReduceSum", number, last_axis))
        raise ValueError(f"{mode!r} is no pooling mode")


def _array(values: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(values.detach().float().numpy())

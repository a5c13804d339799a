"""A model folder ready to run: packed token ids in, vectors out.

The backbone runs packed where its family is known (`gemb.model.families`), else through transformers'
own module. Pooling and the modules after it are fp32 throughout.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gemb.errors import MismatchError
from gemb.model.blocks import Backbone
from gemb.model.families import NotPacked, family
from gemb.model.folder import DenseSettings, LayerNormSettings, ModelFolder, ModuleSpec
from gemb.model.kernels import Kernels
from gemb.model.layout import Layout
from gemb.model.pooling import LINEAR_MODES, attention_pooling, pool, pool_by_attention
from gemb.model.weights import DTYPE_NAMES, QUANTISED, Weights

Step = Callable[[Tensor], Tensor]
"""[B, D] -> [B, D'] in fp32."""


class PackedEncoder:
    """The forward pass of one model folder on one device."""

    def __init__(self, folder: ModelFolder, kernels: Kernels) -> None:
        self.kernels = kernels
        self.folder = folder
        self.notes: list[str] = []
        """What runs otherwise than packed, and why."""
        self._modes = folder.pooling.modes
        self._attention = attention_pooling(folder.modules[1], kernels.device)
        self._include_prompt = folder.pooling.include_prompt
        self.backbone = self._backbone(folder)
        self._steps = _steps(folder.modules[2:], kernels.device)
        self._projects_late = self.backbone.projection is not None and LINEAR_MODES.issuperset(self._modes)

    def _backbone(self, folder: ModelFolder) -> Backbone:
        config = {"model_type": folder.family, **folder.text_config}
        weights = folder.weights()
        _check_dtypes(folder, weights)
        try:
            return family(config["model_type"]).build(config, weights, self.kernels)
        except NotPacked as reason:
            from gemb.model.fallback import TransformersBackbone

            self.notes.append(f"runs through transformers' own module, slower: {reason}")
            return TransformersBackbone(folder, self.kernels)

    @torch.inference_mode()
    def states(self, ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> Tensor:
        """int32 ids[T] of packed texts and their lengths[B] -> fp32 states[T, D] of every token."""
        states, layout = self._run(ids, lengths)
        return self._project(states)[: layout.tokens]

    @torch.inference_mode()
    def forward(self, ids: NDArray[np.int32], lengths: NDArray[np.int32], prompt_tokens: int = 0) -> Tensor:
        """int32 ids[T] of packed texts and their lengths[B] -> fp32 vectors[B, D] on the device.

        Equal lengths must be neighbours; the first `prompt_tokens` of each text are its prompt.
        """
        states, layout = self._run(ids, lengths)
        if not self._projects_late:
            states = self._project(states)
        skip = 0 if self._include_prompt else prompt_tokens
        if self._attention is None:
            vectors = pool(states, layout, self._modes, skip, few=self.folder.pooling.tokens or 1)
        else:
            vectors = pool_by_attention(states, layout, self._attention, skip)
        if self._projects_late:
            each_mode = vectors.view(layout.rows * len(self._modes), self.backbone.width)
            vectors = self._project(each_mode).view(layout.rows, -1)
        for step in self._steps:
            vectors = step(vectors)
        return vectors

    def _run(self, ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> tuple[Tensor, Layout]:
        """States of all tokens, filling ones included, before the projection; and how they lie."""
        layout = Layout.of(
            lengths,
            least_rows=self.kernels.least_rows,
            row_step=self.kernels.row_step,
            device=self.kernels.device,
        )
        tokens = torch.from_numpy(ids).to(self.kernels.device).long()
        if layout.filled > layout.tokens:
            tokens = F.pad(tokens, (0, layout.filled - layout.tokens))
        return self.backbone.forward(tokens, layout), layout

    def _project(self, x: Tensor) -> Tensor:
        projection = self.backbone.projection
        return x if projection is None else projection(x.to(self.kernels.dtype)).float()


def _check_dtypes(folder: ModelFolder, weights: Weights) -> None:
    """Raises MismatchError if the weights of the backbone are quantised in a way that gemb does not know."""
    known = DTYPE_NAMES.keys() | QUANTISED.keys()
    quantised = [name for name in weights if weights.spec(name).dtype not in known and "weight" in name]
    settings = folder.config.get("quantization_config")
    if not quantised and (not settings or _is_packed(settings, weights)):
        return
    seen = f" ({quantised[0]} is {weights.spec(quantised[0]).dtype})" if quantised else ""
    raise MismatchError(
        f"{folder.transformer.folder / 'config.json'}: the weights are quantised{seen}, which gemb does not "
        "compute with; use the model that they were made from"
    )


def _is_packed(settings: Mapping[str, Any], weights: Weights) -> bool:
    """Whether `settings` are those of transformers' packed Gemma layout in 4 and 8 bits, which gemb reads."""
    each = [settings, *(settings.get("module_quant_configs") or {}).values()]
    bits = {one.get("num_bits", settings.get("num_bits", 4)) for one in each}
    return settings.get("quant_method") == "gemma" and bits <= {4, 8} and weights.is_quantised


def _steps(modules: Sequence[ModuleSpec], device: str) -> list[Step]:
    """The modules after pooling. Neighbouring Dense layers with nothing between them become one matrix."""
    steps: list[Step] = []
    waiting: _Affine | None = None  # linear layers not followed by anything yet, as one
    for module in modules:
        settings = module.settings
        if isinstance(settings, DenseSettings):
            weights = module.weights()
            dense = _Affine.read(weights, "linear", device, has_bias=settings.bias)
            if settings.residual:
                steps += [] if waiting is None else [waiting]
                square = settings.in_features == settings.out_features
                shortcut = None if square else _Affine.read(weights, "residual", device, has_bias=False)
                steps.append(_Residual(dense, getattr(nn, settings.activation)(), shortcut))
                waiting = None
                continue
            waiting = dense if waiting is None else dense.after(waiting)
            if settings.activation == "Identity":
                continue
            steps += [waiting, getattr(nn, settings.activation)()]
            waiting = None
            continue
        if waiting is not None:
            steps.append(waiting)
            waiting = None
        if isinstance(settings, LayerNormSettings):
            weights = module.weights()
            gain, bias = (weights.tensor(f"norm.{part}").float().to(device) for part in ("weight", "bias"))
            steps.append(partial(F.layer_norm, normalized_shape=gain.shape, weight=gain, bias=bias))
        elif module.kind == "normalize":
            steps.append(F.normalize)
    return steps if waiting is None else [*steps, waiting]


@dataclass(frozen=True)
class _Affine:
    """x[B, I] -> x @ matrix.T + bias, [B, O], in fp32; a row does not depend on the others."""

    matrix: Tensor
    bias: Tensor | None

    @classmethod
    def read(cls, weights: Weights, name: str, device: str, *, has_bias: bool) -> "_Affine":
        matrix = weights.tensor(f"{name}.weight").float().contiguous().to(device)
        return cls(matrix, weights.tensor(f"{name}.bias").float().to(device) if has_bias else None)

    def after(self, first: "_Affine") -> "_Affine":
        """The one layer that equals `first`, then this one."""
        moved = None if first.bias is None else self.matrix @ first.bias
        bias = moved if self.bias is None else self.bias if moved is None else moved + self.bias
        return _Affine((self.matrix.double() @ first.matrix.double()).float(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.linear(x, self.matrix, self.bias)
        # One row at a time: a product's rows would depend on their number. B is small.
        return torch.cat([F.linear(row, self.matrix, self.bias) for row in torch.split(x, 1)])


@dataclass(frozen=True)
class _Residual:
    """activation(linear(x)) + x, or + shortcut(x) where the widths differ."""

    linear: _Affine
    activation: Step
    shortcut: _Affine | None

    def __call__(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x)) + (x if self.shortcut is None else self.shortcut(x))

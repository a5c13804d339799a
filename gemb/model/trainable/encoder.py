"""A model folder ready to be trained: packed token ids in, vectors with a graph out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gemb.errors import MismatchError
from gemb.model.families import FAMILIES, NotPacked
from gemb.model.folder import DenseSettings, LayerNormSettings, ModelFolder, ModuleSpec
from gemb.model.layout import Layout, packed_places
from gemb.model.pooling import tensor_names, with_tensors
from gemb.model.trainable import bert, embedding_gemma2, gated
from gemb.model.trainable.blocks import Computation, Recompute, TrainableBackbone
from gemb.model.trainable.low_rank import add_low_rank, summed
from gemb.model.trainable.parameters import UPDATE, ParameterTree, Tensors
from gemb.model.trainable.pooling import pool, pool_by_attention
from gemb.model.trainable.quantised import FakeQuantisation
from gemb.model.trainable.saving import SavedDtype, save_folder
from gemb.quantization.roles import WeightFormat

Precision = Literal["fp32", "bf16"]
Step = Callable[[Tensor], Tensor]
"""[B, D] -> [B, D']."""
Pool = Callable[[Tensor, Layout, NDArray[np.int32], NDArray[np.int32]], Tensor]
"""states[T, D], how the texts lie, their lengths[B] and the tokens of each that take no part -> [B, D']."""

_BUILDERS: Mapping[str, Callable[[Mapping[str, Any], ParameterTree], TrainableBackbone]] = {
    "bert": bert.bert,
    "embedding_gemma2": embedding_gemma2.embedding_gemma2,
    "gemma2": gated.gemma2,
    "gemma3": gated.gemma3,
    "llama": gated.llama,
    "modernbert": gated.modernbert,
}
"""By the file of the family in `gemb.model.families`."""


class TrainableEncoder(nn.Module):
    """The differentiable packed forward of one model folder.

    Parameters are fp32 and called as in the files of the folder; those of a module after pooling begin with
    its folder (`2_Dense.linear.weight`). Texts stand one after another, nothing is padded and no mask is
    made, so that the vector of a text and its gradient do not depend on the other texts.
    """

    def __init__(self, folder: ModelFolder, computation: Computation) -> None:
        super().__init__()
        self.folder = folder
        self.computation = computation
        self._include_prompt = folder.pooling.include_prompt
        self._trees = {folder.transformer.folder: ""}
        config = {"model_type": folder.family, **folder.text_config}
        self._backbone = _backbone(folder, config, ParameterTree(self, folder.weights()))
        self._pool = self._pooling(folder.modules[1], folder.path)
        self._steps = [
            step for module in folder.modules[2:] if (step := self._step(module, folder.path)) is not None
        ]
        self._backbone.fuse()

    @classmethod
    def load(
        cls,
        folder: ModelFolder,
        *,
        device: str = "cpu",
        precision: Precision = "fp32",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        recompute: Recompute = "nothing",
        sparse_table: bool = True,
    ) -> Self:
        """The model of `folder` on `device`, in training.

        With `precision` bf16 products and attention are computed in bf16; parameters, norms and the stream
        stay fp32. See `Computation` for the rest.

        Raises MismatchError for a family that has no packed training, or quantised weights.
        """
        dtype = torch.bfloat16 if precision == "bf16" else None
        computation = Computation(
            dtype, dropout, recompute, sparse_table, attention_dropout=attention_dropout
        )
        return cls(folder, computation).to(device)

    @property
    def dims(self) -> int:
        """D of the vectors."""
        return self.folder.dims

    @property
    def table_name(self) -> str:
        """The name of the token table among the parameters; its gradient is sparse if asked for."""
        return next(
            name for name, parameter in self.named_parameters() if parameter is self._backbone.table.matrix
        )

    def forward(
        self,
        ids: Tensor,
        lengths: Tensor | NDArray[np.int32],
        prompt_tokens: Tensor | NDArray[np.int32] | None = None,
    ) -> Tensor:
        """ids[T] of packed texts and their lengths[R] -> vectors[R, D] in the order of the texts.

        `prompt_tokens`[R] says how many tokens of each text are its prompt; they are left out of pooling
        where the folder asks for it. Raises ValueError if the lengths are not those of `ids`.
        """
        sizes = _as_array(lengths)
        if len(sizes) == 0 or sizes.min() < 1 or int(sizes.sum()) != len(ids):
            raise ValueError(f"lengths of {int(sizes.sum())} tokens for {len(ids)} ids; each is 1 at least")
        order = np.argsort(-sizes, kind="stable")  # equal lengths side by side, longest first
        places = torch.from_numpy(packed_places(sizes, order)).to(ids.device)
        ids, sizes = ids[places], sizes[order]
        skip = np.zeros_like(sizes)
        if prompt_tokens is not None and not self._include_prompt:
            skip = _as_array(prompt_tokens)[order]
        device = self._backbone.table.matrix.device
        layout = Layout.of(sizes, device=str(device))
        self.computation.trains = self.training
        states = self._backbone.forward(ids.to(device).long(), layout, self.computation)
        vectors = self._pool(states, layout, sizes, skip)
        for step in self._steps:
            vectors = step(vectors)
        return vectors[torch.from_numpy(np.argsort(order)).to(device)]

    def quantisation(self, weight_format: WeightFormat) -> FakeQuantisation:
        """What lets the model compute with its weights as an export in `weight_format` has them.

        Raises MismatchError if the format cannot hold them.
        """
        return FakeQuantisation(self._layers(), self._backbone.table, weight_format, self._backbone.fuse)

    def train_low_rank(
        self, *, rank: int, alpha: float, targets: Sequence[str] = ("*",), seed: int = 0
    ) -> None:
        """Train sums of low rank in place of the matrices that match `targets`; all else stays as it is.

        Raises MismatchError as `add_low_rank` does.
        """
        add_low_rank(self._layers(), targets, rank=rank, alpha=alpha, seed=seed)
        self.requires_grad_(False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(f".{UPDATE}." in name)

    @contextmanager
    def summed(self) -> Iterator[list[Tensor]]:
        """Sums of low rank are made once for the block; gives what their gradients are left at.

        Where the weights are quantised they are made already.
        """
        layers = [
            layer for layer in self._layers().values() if UPDATE in layer._modules and layer.stand_in is None
        ]
        with summed(layers) as sums:
            if layers:
                self._backbone.fuse()
            yield sums

    def save(self, target: Path, *, dtype: SavedDtype = "float32") -> None:
        """A whole folder at `target`: that of `folder` with the weights as they are now.

        `dtype` "source" keeps each tensor's dtype of the source folder, which rounds where it is narrower.
        `target` appears at once or not at all. Raises GembError if it exists or cannot be written.
        """
        values = {name: parameter.detach() for name, parameter in self.named_parameters()}
        for name, layer in self._layers().items():
            if UPDATE in layer._modules:
                values[f"{name}.{layer.names[0]}"] = layer.matrix.detach()
        save_folder(
            self.folder, {place: _below(values, at) for place, at in self._trees.items()}, target, dtype
        )

    def _layers(self) -> dict[str, Tensors]:
        return {name: layer for name, layer in self.named_modules() if isinstance(layer, Tensors)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and conversions of torch, after which parameters lie together again."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._backbone.fuse()
        return self

    def _pooling(self, module: ModuleSpec, root: Path) -> Pool:
        """The pooling; what attention pooling has learnt becomes parameters."""
        settings = self.folder.pooling
        if not module.has_weights:
            return partial(pool, modes=settings.modes, few=settings.tokens or 1)
        tree = self._tree(module, root)
        layers = {name: tree.layer(name) for name in tensor_names(settings)}

        def pool_attending(
            states: Tensor, layout: Layout, lengths: NDArray[np.int32], skip: NDArray[np.int32]
        ) -> Tensor:
            tensors = {name: layer.matrix for name, layer in layers.items()}
            return pool_by_attention(states, layout, lengths, skip, with_tensors(settings, tensors))

        return pool_attending

    def _tree(self, module: ModuleSpec, root: Path) -> ParameterTree:
        """Makes the parameters of a module other than the backbone."""
        prefix = f"{module.folder.relative_to(root).as_posix()}."
        self._trees[module.folder] = prefix
        return ParameterTree(self, module.weights(), prefix)

    def _step(self, module: ModuleSpec, root: Path) -> Step | None:
        """One module after pooling."""
        settings = module.settings
        if module.kind == "normalize":
            return F.normalize
        tree = self._tree(module, root)
        if isinstance(settings, DenseSettings):
            return _dense(settings, tree)
        if isinstance(settings, LayerNormSettings):
            layer = tree.layer("norm")
            return lambda x: F.layer_norm(x, (x.shape[-1],), layer.matrix, layer.shift)
        return None


def _backbone(folder: ModelFolder, config: Mapping[str, Any], tree: ParameterTree) -> TrainableBackbone:
    place = folder.transformer.folder / "config.json"
    if folder.config.get("quantization_config"):
        raise MismatchError(
            f"{place}: the weights are quantised and cannot be trained; "
            "use the model that they were made from"
        )
    build = _BUILDERS.get(FAMILIES.get(config["model_type"], ""))
    reason = f"training does not know the model type {config['model_type']!r}"
    if build is not None:
        try:
            return build(config, tree)
        except NotPacked as error:
            reason = f"cannot be trained packed: {error}"
    known = sorted(name for name, file in FAMILIES.items() if file in _BUILDERS)
    raise MismatchError(f"{place}: {reason}; train a model of another type, one of {', '.join(known)}")


def _dense(settings: DenseSettings, tree: ParameterTree) -> Step:
    """A Dense module: `activation(weight @ x + bias)`, plus x where it is residual."""
    dense = tree.layer("linear")
    activation = getattr(nn, settings.activation)()
    if not settings.residual:
        return lambda x: activation(_linear(x, dense))
    if settings.in_features == settings.out_features:
        return lambda x: activation(_linear(x, dense)) + x
    shortcut = tree.layer("residual")
    return lambda x: activation(_linear(x, dense)) + _linear(x, shortcut)


def _linear(x: Tensor, layer: Tensors) -> Tensor:
    return F.linear(x, layer.matrix, layer.shift)


def _as_array(numbers: Tensor | NDArray[np.int32]) -> NDArray[np.int32]:
    array = numbers.cpu().numpy() if isinstance(numbers, Tensor) else numbers
    return np.ascontiguousarray(array, dtype=np.int32)


def _below(values: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The values whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in values.items() if name.startswith(prefix)}

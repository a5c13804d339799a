"""The tensors of a model folder as parameters, each under the name that its file has for it.

A family asks for what it computes with; only that becomes a parameter. What else a file holds (a pooler, a
language model head) is left alone and copied when the model is saved.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gemb.errors import MismatchError
from gemb.model.trainable.functions import stacked
from gemb.model.weights import DTYPE_NAMES, Weights
from gemb.quantization.grids import Grid

UPDATE = "low_rank"
"""The module below a layer that gives what is added to its weight, where there is one."""


class Tensors(nn.Module):
    """Weight and bias of one layer; what is computed with them stands elsewhere.

    They are read anew at every use, so that a parametrization (a low-rank update of a weight) takes effect.
    """

    names: tuple[str, str] = ("weight", "bias")
    """What the file calls them."""
    stand_in: Tensor | None = None
    """What is computed with in place of the weight, while that is quantised."""
    grid: Grid | None = None
    """The grid that rows are snapped to when they are looked up in this table, while that is quantised."""

    @property
    def matrix(self) -> Tensor:
        """The weight as it stands now."""
        if self.stand_in is not None:
            return self.stand_in
        weight: Tensor = getattr(self, self.names[0])
        update = self._modules.get(UPDATE)
        return weight if update is None else weight + update()

    @property
    def has_weight(self) -> bool:
        """Whether this is a layer, and not only the way to others."""
        return hasattr(self, self.names[0])

    @property
    def shift(self) -> Tensor | None:
        """The bias as it stands now; None where the layer has none."""
        bias: Tensor | None = getattr(self, self.names[1], None)
        return bias


class ParameterTree:
    """Makes parameters below `root` from the tensors of `weights`; names are those of the file.

    `prefix` stands before all names in `root`. Numbers are read into fp32 copies.
    """

    def __init__(self, root: nn.Module, weights: Weights, prefix: str = "") -> None:
        self.weights = weights
        self._root = root
        self._prefix = prefix

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def layer(self, name: str, names: tuple[str, str] = ("weight", "bias")) -> Tensors:
        """The layer `name`: its weight, and its bias if the file has one, which it calls `names`.

        Raises MismatchError if there is no weight, or it is quantised.
        """
        node = self._node(name)
        node.names = names
        for part in names:
            if part == names[0] or f"{name}.{part}" in self.weights:
                node.register_parameter(part, nn.Parameter(self._read(f"{name}.{part}")))
        return node

    def _read(self, name: str) -> Tensor:
        spec = self.weights.spec(name)
        if spec.dtype not in DTYPE_NAMES:
            raise MismatchError(
                f"{spec.file}: {name} is {spec.dtype}; quantised weights cannot be trained; "
                "use the model that they were made from"
            )
        return self.weights.tensor(name).float().clone()

    def _node(self, name: str) -> Tensors:
        """The module at `name`, made with all that are above it."""
        node: nn.Module = self._root
        for part in f"{self._prefix}{name}".split("."):
            if part not in node._modules:
                node.add_module(part, Tensors())
            node = node.get_submodule(part)
        if not isinstance(node, Tensors):
            raise ValueError(f"{name} is the name of another module")
        return node


def lay_together(layers: Sequence[Tensors]) -> None:
    """Put the weights of layers with the same input below each other in memory, and the biases.

    Each stays a parameter of its own; all together are then one matrix without a copy.
    """
    for place in (0, 1):
        parts: list[Tensor | None] = [layer._parameters.get(layer.names[place]) for layer in layers]
        if place == 0 and all(layer.stand_in is not None for layer in layers):
            parts = [layer.stand_in for layer in layers]
        present = [part for part in parts if part is not None]
        if len(present) < len(layers) or len(layers) < 2:
            continue
        whole = stacked([part.detach() for part in present])
        for part, piece in zip(present, torch.split(whole, [len(part) for part in present]), strict=True):
            part.data = piece

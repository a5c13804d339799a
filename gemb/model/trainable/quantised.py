"""Quantisation-aware training: a model computes with the weights that its export will have.

Fake quantisation with the straight-through estimator (Jacob et al., arXiv 1712.05877, section 3), as
EmbeddingGemma is fine-tuned (arXiv 2509.20354). Matrices are snapped to their grids once a block of code,
however many chunks a batch is cut into; of the token table only the rows that are looked up. The parameters
stay what they are, in full precision.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gemb.errors import MismatchError
from gemb.model.trainable.functions import embedded
from gemb.model.trainable.parameters import Tensors
from gemb.quantization.fake import fake_quantise
from gemb.quantization.grids import Grid
from gemb.quantization.roles import WeightFormat, grid_of, role_of


def looked_up(table: Tensors, ids: Tensor, scale: float = 1.0, *, is_sparse: bool = True) -> Tensor:
    """Rows ids[T] of a token table through its grid, if it has one now, times `scale`: [T, D].

    A scale of a grid never spans two rows, so this is the same to the bit as snapping the whole table first
    (262,144 rows in Gemma). The gradient holds only the rows that are used, see `embedded`.
    """
    if table.grid is None:
        return embedded(table.matrix, ids, scale, is_sparse=is_sparse)
    rows = fake_quantise(embedded(table.matrix, ids, is_sparse=is_sparse), table.grid)
    return rows if scale == 1 else rows * scale


class FakeQuantisation:
    """The weights of one model as its export in one format has them, for the blocks of `applied`.

    `layers` are all layers by name; those with a role are snapped (`gemb.quantization.roles`), norms, biases
    and all else stay. `fuse` lays together what is multiplied together.

    Raises MismatchError, all layers at once, if the rows of one cannot be stored on its grid.
    """

    def __init__(
        self,
        layers: Mapping[str, Tensors],
        table: Tensors,
        weight_format: WeightFormat,
        fuse: Callable[[], None],
    ) -> None:
        self._fuse = fuse
        self._table = table
        self._grids: dict[Tensors, Grid] = {}
        problems = []
        for name, layer in layers.items():
            weight = f"{name}.{layer.names[0]}"
            role = role_of(weight, layer.matrix.shape) if layer.has_weight else None
            if role is None:
                continue
            grid = self._grids[layer] = grid_of(role, weight_format)
            try:
                grid.round_unclamped(torch.zeros(1, layer.matrix.shape[1]))
            except ValueError as error:
                problems.append(f"  {weight}: {error}")
        if problems:
            raise MismatchError(
                "\n".join([
                    f"qat: the model has weights that {weight_format} cannot hold; train without qat, "
                    "or for the format mixed:",
                    *problems,
                ])
            )  # fmt: skip

    @contextmanager
    def applied(self) -> Iterator[list[Tensor]]:
        """The model computes with the snapped weights within the block.

        Gives what stands for the weights there: the backward passes within the block leave the gradients of
        matrices at these. When the block ends well, they are passed on to the parameters: as they are, and
        as 0 where a number lies past the highest code.
        """
        passed: list[tuple[GradientEdge, Tensor]] = []
        try:
            for layer, grid in self._grids.items():
                if layer is self._table:
                    layer.grid = grid
                    continue
                snapped = fake_quantise(layer.matrix, grid)
                layer.stand_in = snapped.detach().requires_grad_(snapped.requires_grad)
                if snapped.requires_grad:
                    passed.append((get_gradient_edge(snapped), layer.stand_in))
            self._fuse()
            yield [stand_in for _, stand_in in passed]
        finally:
            for layer in self._grids:
                layer.grid = layer.stand_in = None
        for edge, stand_in in passed:
            if stand_in.grad is not None:
                torch.autograd.backward(edge, stand_in.grad)
                stand_in.grad = None

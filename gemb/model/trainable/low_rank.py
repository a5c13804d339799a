"""Low-rank training (LoRA, arXiv 2106.09685): W stays as it is, W + scale * B A is computed with.

A[r, I] and B[O, r] are all that is trained; scale is alpha / r, A is drawn and B is 0, as in peft. The sum
is one of parameters, not of activations: it runs through the same packed forward as a full training, and a
saved model holds it, so that no adapter is left. peft wraps nn.Linear, of which the packed model has none.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gemb.errors import MismatchError
from gemb.model.trainable.parameters import UPDATE, Tensors
from gemb.quantization.roles import role_of


class LowRankUpdate(nn.Module):
    """scale * B A, of the shape of a weight[O, I]."""

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        drawn = torch.empty(rank, inputs)
        # What nn.Linear begins with, and peft: uniform to +-1 / sqrt(I).
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        self.a = nn.Parameter(drawn.to(weight.device))
        self.b = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))
        self._scale = scale

    def forward(self) -> Tensor:
        """What is added to the weight as it stands now."""
        return self._scale * (self.b @ self.a)


def add_low_rank(
    layers: Mapping[str, Tensors], targets: Sequence[str], *, rank: int, alpha: float, seed: int
) -> list[str]:
    """Give the matrices whose names match one of the patterns `targets` an update; gives those names.

    Matrices are those of attention, feed-forwards and projections; tables and norms have none. Raises
    MismatchError for a pattern that matches none, and a rank that is no lower than a matrix has anyway.
    """
    matrices = {f"{name}.{layer.names[0]}": layer for name, layer in layers.items() if layer.has_weight}
    matrices = {
        name: layer
        for name, layer in matrices.items()
        if role_of(name, layer.matrix.shape) not in (None, "embedding")
    }
    for pattern in targets:
        if not any(fnmatch(name, pattern) for name in matrices):
            raise MismatchError(
                f"lora.targets: no matrix is called {pattern}; the names are such as "
                f"{', '.join(list(matrices)[:3])}, and * stands for anything"
            )
    generator = torch.Generator().manual_seed(seed)
    chosen = [name for name in matrices if any(fnmatch(name, pattern) for pattern in targets)]
    for name in chosen:
        smaller = min(matrices[name].matrix.shape)
        if rank >= smaller:
            raise MismatchError(
                f"lora.rank is {rank}, but {name} is only {smaller} wide on one side; give a lower rank"
            )
    for name in chosen:
        layer = matrices[name]
        layer.add_module(UPDATE, LowRankUpdate(layer.matrix.detach(), rank, alpha / rank, generator))
    return chosen


@contextmanager
def summed(layers: Sequence[Tensors]) -> Iterator[list[Tensor]]:
    """The model computes with sums that are made once for the block, however many chunks a batch is cut into.

    Gives the sums: backward passes within the block leave gradients at these, which are passed on to A and B
    when the block ends well.
    """
    passed: list[tuple[GradientEdge, Tensor]] = []
    held = []
    try:
        for layer in layers:
            whole = layer.matrix
            held.append(layer)
            layer.stand_in = whole.detach().requires_grad_(whole.requires_grad)
            if whole.requires_grad:
                passed.append((get_gradient_edge(whole), layer.stand_in))
        yield [stand_in for _, stand_in in passed]
    finally:
        for layer in held:
            layer.stand_in = None
    for edge, stand_in in passed:
        if stand_in.grad is not None:
            torch.autograd.backward(edge, stand_in.grad)
            stand_in.grad = None

"""How gradients change weights: AdamW, Muon for matrices, clipping, and averages of the weights.

The token table is the largest parameter by far and few of its rows are used in a step, so its gradient is
sparse and only those rows are touched. V rows of a table, D width.
"""

import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

OptimizerName = Literal["adamw", "muon"]
NamedParameters = Iterable[tuple[str, nn.Parameter]]

_MUON_MOMENTUM = 0.95  # Jordan 2024, https://kellerjordan.github.io/posts/muon
_MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the same; the quintic's
_MUON_STEPS = 5
_MUON_SIZE = 0.2  # arXiv 2502.16982, section 2.2: the root mean square of AdamW's updates


class Optimizer(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101), and Muon (arXiv 2502.16982) for the groups that ask for it.

    A group is a dict with `params`, `weight_decay` and `update`, "adamw" or "muon". Where a gradient is
    sparse, AdamW changes only its rows: their moments are what plain AdamW's would be (for the steps in which
    a row was not used they fade as with a gradient of zero), and rows that are not used stay as they are.
    `state_dict` holds all there is: after `load_state_dict` the next steps are the same to the bit.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        momentum: float = _MUON_MOMENTUM,
    ) -> None:
        defaults = {
            "lr": learning_rate,
            "betas": betas,
            "eps": epsilon,
            "momentum": momentum,
            "weight_decay": 0.0,
            "update": "adamw",
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        for group in self.param_groups:
            used = [parameter for parameter in group["params"] if parameter.grad is not None]
            dense = [parameter for parameter in used if not parameter.grad.is_sparse]
            if group["update"] == "muon":
                self._muon(group, dense)
            else:
                self._adamw(group, dense)
                for parameter in used:
                    if parameter.grad.is_sparse:
                        self._adamw_rows(group, parameter)

    def _adamw(self, group: dict[str, Any], parameters: Sequence[nn.Parameter]) -> None:
        if not parameters:
            return
        states = [self._moments(parameter) for parameter in parameters]
        adamw(
            list(parameters),
            [_gradient(parameter) for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _adamw_rows(self, group: dict[str, Any], table: nn.Parameter) -> None:
        """The rows of table[V, D] that its sparse gradient holds."""
        gradient = _gradient(table).coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        state = self._moments(table)
        if "row_step" not in state:
            state["row_step"] = torch.zeros(len(table), device=table.device)  # exact up to 2**24 steps
        state["step"] += 1
        step = float(state["step"])
        beta1, beta2 = group["betas"]
        idle = (step - state["row_step"][rows]).to(values.dtype)[:, None]  # steps since the last use
        mean = state["exp_avg"][rows].mul_(beta1**idle).add_(values, alpha=1 - beta1)
        square = state["exp_avg_sq"][rows].mul_(beta2**idle).addcmul_(values, values, value=1 - beta2)
        state["exp_avg"].index_copy_(0, rows, mean)
        state["exp_avg_sq"].index_copy_(0, rows, square)
        state["row_step"].index_fill_(0, rows, step)
        size = square.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        moved = table[rows].mul_(1 - group["lr"] * group["weight_decay"])
        moved.addcdiv_(mean, size, value=-group["lr"] / (1 - beta1**step))
        table.index_copy_(0, rows, moved)

    def _moments(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The state of a parameter under AdamW, made at its first gradient."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = _untouched_zeros(parameter)
            state["exp_avg_sq"] = _untouched_zeros(parameter)
        return state

    def _muon(self, group: dict[str, Any], matrices: Sequence[nn.Parameter]) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        for alike in by_shape.values():
            directions = []
            for matrix in alike:
                gradient, state = _gradient(matrix), self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                state["momentum"].mul_(group["momentum"]).add_(gradient)
                directions.append(gradient.add(state["momentum"], alpha=group["momentum"]))  # Nesterov's
            updates = orthogonalised(torch.stack(directions))
            size = group["lr"] * _MUON_SIZE * math.sqrt(max(alike[0].shape))
            for matrix, update in zip(alike, updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-size)


def orthogonalised(matrices: Tensor) -> Tensor:
    """matrices[N, R, C] with singular values brought near 1 (between 0.7 and 1.2), by Newton-Schulz steps.

    A matrix that is 0 stays 0.
    """
    a, b, c = _MUON_COEFFICIENTS
    # bf16 is enough (Jordan 2024), and fast where there are units for it.
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(_MUON_STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    result: Tensor = (x.mT if is_tall else x).to(matrices.dtype)
    return result


def make_optimizer(
    parameters: NamedParameters,
    name: OptimizerName = "adamw",
    *,
    learning_rate: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    tables: Collection[str] = (),
) -> Optimizer:
    """The optimizer of the parameters that are trained.

    Matrices get the weight decay, and Muon's updates where `name` says so; vectors (gains, biases) and the
    `tables` of embeddings, by name, get AdamW's and no decay.

    Raises ValueError if nothing is trained.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter_name, parameter in parameters:
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and parameter_name not in tables
            (matrices if is_matrix else others).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay, "update": name},
        {"params": others, "weight_decay": 0.0, "update": "adamw"},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("no parameter is trained")
    return Optimizer(groups, learning_rate=learning_rate, betas=betas, epsilon=epsilon)


def clip_gradients(parameters: Iterable[nn.Parameter], most: float | None) -> float:
    """The norm of all gradients together, as it was; a larger one than `most` is cut to it, in place.

    Sparse gradients count as the dense ones they stand for. A norm that is not finite cuts nothing.
    """
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # rows of several chunks, added up
            gradients.append(parameter.grad.values())
        else:
            gradients.append(parameter.grad)
    if not gradients:
        return 0.0
    norms = torch.stack([torch.linalg.vector_norm(one).double() for one in gradients])
    norm = float(torch.linalg.vector_norm(norms))
    if most is not None and math.isfinite(norm) and norm > most:
        torch._foreach_mul_(gradients, most / norm)
    return norm


class MovingAverage:
    """The exponential average of weights: average = decay * average + (1 - decay) * weight, each update.

    The decay grows to `decay` over the first updates, (1 + n) / (10 + n), so that the random or foreign
    weights of the start are soon forgotten.
    """

    def __init__(self, parameters: NamedParameters, decay: float) -> None:
        self._parameters = dict(parameters)
        self._decay = decay
        self._averages = {name: one.detach().clone() for name, one in self._parameters.items()}
        self._updates = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        self._updates += 1
        count = int(self._updates)
        share = 1 - min(self._decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(list(self._averages.values()), list(self._parameters.values()), share)

    @staticmethod
    def parameter_of(key: str) -> str:
        """The name of the parameter that an entry of the state is of, where it is of one."""
        return key

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name, and how many updates there were."""
        return {**self._averages, "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` gave."""
        for name, average in self._averages.items():
            average.copy_(state[name])
        self._updates.copy_(state["updates"])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The weights are the averages within the block, and what they were after it."""
        with _applied(self._parameters, self._averages):
            yield


class LastAverage:
    """The mean of the weights at the last `count` updates (arXiv 2209.14981); keeps that many copies."""

    def __init__(self, parameters: NamedParameters, count: int) -> None:
        self._parameters = dict(parameters)
        self._copies: deque[dict[str, Tensor]] = deque(maxlen=count)

    def update(self) -> None:
        """Take in the weights as they are now; the oldest beyond the count go."""
        self._copies.append({name: one.detach().clone() for name, one in self._parameters.items()})

    def average(self) -> dict[str, Tensor]:
        """The means by name; the weights as they are where there was no update yet."""
        if not self._copies:
            return {name: one.detach() for name, one in self._parameters.items()}
        return {name: torch.stack([copy[name] for copy in self._copies]).mean(0) for name in self._parameters}

    @staticmethod
    def parameter_of(key: str) -> str:
        """The name of the parameter that an entry of the state is of."""
        return key.partition(".")[2]

    def state_dict(self) -> dict[str, Tensor]:
        """The copies by age and name, the oldest first."""
        return {f"{age}.{name}": one for age, copy in enumerate(self._copies) for name, one in copy.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` gave."""
        self._copies.clear()
        for age in range(len(state) // max(1, len(self._parameters))):
            self._copies.append(
                {name: state[f"{age}.{name}"].to(one.device) for name, one in self._parameters.items()}
            )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The weights are the means within the block, and what they were after it."""
        with _applied(self._parameters, self.average()):
            yield


@contextmanager
def _applied(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    own = {name: one.detach().clone() for name, one in parameters.items()}
    _copy(parameters, values)
    try:
        yield
    finally:
        _copy(parameters, own)


@torch.no_grad()
def _copy(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise ValueError("a parameter without a gradient")
    return parameter.grad


def _untouched_zeros(like: Tensor) -> Tensor:
    """Zeros of the same shape; on a CPU their memory is taken only where they are written to."""
    if like.device.type != "cpu":
        return torch.zeros_like(like)
    return torch.from_numpy(np.zeros(like.shape, str(like.dtype).removeprefix("torch.")))

"""What each method needs and does, by the name that mergekit's recipes use; nothing here loads torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Variant: TypeAlias = Literal["paper", "mergekit"]
"""Whose rules hold where mergekit does not do what the paper of a method says."""
Thinning: TypeAlias = Literal["nothing", "largest", "random", "rank", "between"]
"""Which entries of a delta go: none, all but the largest, random ones, by rank, outliers and the smallest."""
MethodName: TypeAlias = Literal[
    "linear",
    "task_arithmetic",
    "slerp",
    "multislerp",
    "karcher",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "model_stock",
]


@dataclass(frozen=True)
class Method:
    """One method."""

    base: Literal["needed", "optional", "none"]
    """Whether it starts from a model that the others were trained from."""
    thinning: Thinning = "nothing"
    elects: bool = False
    """Whether a sign is elected, as in TIES."""
    density: float = 1.0
    """By default, under the paper's rules."""
    is_whole: bool = False
    """Whether a tensor is needed as a whole; other methods take it in blocks of rows."""
    fewest: int = 1
    """Models beside the base; without a base it is two."""

    @property
    def has_deltas(self) -> bool:
        """Whether it adds deltas to a base."""
        return self.base == "needed" and not self.is_whole


METHODS: Mapping[MethodName, Method] = {
    "linear": Method("none"),
    "task_arithmetic": Method("needed"),
    "slerp": Method("optional", is_whole=True),
    "multislerp": Method("optional", is_whole=True),
    "karcher": Method("none", is_whole=True),
    "ties": Method("needed", "largest", elects=True, density=0.2),  # arXiv 2306.01708, section 4
    # The densities of these papers were searched for; those here are ours.
    "dare_linear": Method("needed", "random", density=0.5),
    "dare_ties": Method("needed", "random", elects=True, density=0.5),
    "della": Method("needed", "rank", elects=True, density=0.5),
    "della_linear": Method("needed", "rank", density=0.5),
    "breadcrumbs": Method("needed", "between", density=0.9),
    "breadcrumbs_ties": Method("needed", "between", elects=True, density=0.9),
    "model_stock": Method("needed", is_whole=True, fewest=2),
}


@dataclass(frozen=True)
class TensorSettings:
    """The parameters of one tensor, for N models beside the base."""

    weights: tuple[float, ...]
    """[N]"""
    densities: tuple[float, ...] = ()
    """[N], in (0, 1]."""
    epsilons: tuple[float, ...] = ()
    """[N], of DELLA."""
    outliers: tuple[float, ...] = ()
    """[N], the share of the largest entries that breadcrumbs leave out."""
    scale: float = 1.0
    """Of the merged delta: lambda of the papers."""
    share: float = 0.5
    """The way from the first to the second of slerp."""
    normalise: bool = True
    """Whether a weighted sum is divided by its weights."""
    rescale: Literal["probability", "norm", "none"] = "probability"
    by_row: bool = False
    """Whether model stock takes each row for itself."""
    steps: int = 10
    tolerance: float = 1e-5
    """Of the Karcher mean."""

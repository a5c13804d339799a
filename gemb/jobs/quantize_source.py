"""What a model that is to be quantised went through before: the grid it was trained for, that it lies on.

Rounding twice costs twice, and a wider grid brings nothing back: `History.warning` says so, with the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemb.files import read_json
from gemb.model.folder import ModelFolder
from gemb.quantization.formats import WeightFormat

if TYPE_CHECKING:
    from gemb.model.weights import Weights
    from gemb.quantization.grids import Grid

_ROWS = 4
"""Rows of a tensor that are looked at: of floats that were never rounded, not one lies on a grid."""
_FORMATS: tuple[WeightFormat, ...] = ("int4", "int8", "mixed")
_GGUF_OF: Mapping[str, str] = {"int4": "--gguf q4_0", "int8": "--gguf q8_0"}


@dataclass(frozen=True, slots=True)
class History:
    """What became of the weights of a model before."""

    trained_for: WeightFormat | None
    """The grid that it was trained for, as its gemb.json says."""
    rounded_to: WeightFormat | None
    """The grid that its weights lie on."""
    made_from: str | None
    """The model that gemb rounded it from."""

    @classmethod
    def of(cls, folder: ModelFolder) -> History:
        """From gemb.json of `folder`, and a few rows of each tensor."""
        file = folder.path / "gemb.json"
        record: Mapping[str, Any] = read_json(file) if file.exists() else {}
        # Only gemb quantize tells of a grid, and only of one that it rounded to.
        made_from = None if record.get("grid") is None else _inner(record, "source", "model")
        return cls(trained_for(folder), rounded_to(folder), made_from)

    def warning(self, grid: WeightFormat | None, *, gguf: bool, onnx: bool, lost: str) -> str | None:
        """Why an export to `grid` loses more than it must, and what to do; None if it does not.

        `lost` is the measured loss; `gguf` and `onnx` are the kind of export, for the advice.
        """
        if grid is None:
            return None
        if self.trained_for is not None and grid != self.trained_for:
            own = f"--onnx {self.trained_for}" if onnx and self.trained_for in _GGUF_OF else ""
            own = own or (_GGUF_OF.get(self.trained_for, "") if gguf else "")
            own = own or f"--format {self.trained_for}"
            return (
                f"the model was trained for {self.trained_for}, not {grid}: {lost}; "
                f"{own} is what it was trained for"
            )
        if self.rounded_to is not None and grid != self.rounded_to:
            source = self.made_from or "the model that it was made from"
            return (
                f"the source is rounded to {self.rounded_to} already: {grid} brings nothing of it back, and "
                f"rounds once more: {lost}; quantise {source} instead"
            )
        return None


def trained_for(folder: ModelFolder) -> WeightFormat | None:
    """The grid that `folder` was trained for, as its gemb.json says; None if for none."""
    file = folder.path / "gemb.json"
    told = _inner(read_json(file), "qat", "format") if file.exists() else None
    return next((one for one in _FORMATS if one == told), None)


def rounded_to(folder: ModelFolder) -> WeightFormat | None:
    """The grid that all weights of `folder` lie on which it rounds; None for floats that were never rounded.

    Weights in whole numbers say it themselves. Floats are rounded again: on their own grid they stay.
    """
    from gemb.quantization.roles import grid_of, role_of

    tensors = [
        (weights, name, role)
        for module in folder.modules
        if module.has_weights
        for weights in [module.weights()]
        for name in weights
        for role in [role_of(name, weights.shape(name))]
        if role is not None
    ]
    on = (one for one in _FORMATS if all(_lies_on(*each[:2], grid_of(each[2], one)) for each in tensors))
    return next(on, None) if tensors else None


def _lies_on(weights: Weights, name: str, grid: Grid) -> bool:
    import torch

    from gemb.model.weights import QUANTISED

    if weights.spec(name).dtype in QUANTISED:
        return weights.spec(name).dtype == grid.name.upper()
    rows, width = weights.shape(name)
    some = weights.table(name).rows(torch.arange(min(rows, _ROWS)))
    return width % 32 == 0 and bool(some.any()) and torch.equal(grid.snap(some), some)


def _inner(record: Mapping[str, Any], key: str, inner: str) -> str | None:
    """A text one level down in a JSON object."""
    told = record.get(key)
    text = told.get(inner) if isinstance(told, dict) else None
    return text if isinstance(text, str) else None

"""What a run asks of a teacher, and how much of its quality a student has.

R rows (texts) of a batch, D width of the student, E width of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gemb.device import Device
from gemb.training.batches import TrainingBatch
from gemb.training.data_recipe import DataSet
from gemb.training.held_out import Measured, is_full_size
from gemb.training.recipe import LossTerm, MatchingTerm
from gemb.training.run_folder import RunFolder


@dataclass(frozen=True)
class Teaching:
    """A teacher that is open."""

    name: str
    """What the user calls it."""
    fingerprint: str
    """Of all that its vectors depend on; a run of another teacher is another run."""
    dims: int
    """E."""
    vectors: Callable[[TrainingBatch], NDArray[np.float32]]
    """[R, E] of the texts of a batch, in their order."""
    measure: Callable[[], Measured | None]
    """Its scores in the evaluation of the run at full width; None where nobody can tell."""
    sizes: Sequence[int] = ()
    """Widths to which it says its vectors may be cut."""
    ahead: bool = False
    """Whether the vectors of the whole run are wanted before its first step."""
    notes: list[str] = field(default_factory=list)


OpenTeacher = Callable[[RunFolder, Device, Sequence[DataSet]], AbstractContextManager[Teaching]]
"""Opens the teacher of a run: for its folder, its device and the data sets of evaluation.pairs."""


def width_notes(teaching: Teaching, width: int, terms: Sequence[LossTerm]) -> list[str]:
    """What is to be said where a student that is `width` wide matches a part of the teacher's vectors."""
    matches_a_part = any(isinstance(term, MatchingTerm) and not term.projection for term in terms)
    if not matches_a_part or width >= teaching.dims or width in teaching.sizes:
        return []
    return [
        f"the teacher's {teaching.dims} dims are cut to the student's {width}, a size that {teaching.name} "
        "does not declare; projection: true of matching learns a map instead"
    ]


def new_projection(width: int, teacher_width: int, seed: int) -> nn.Linear:
    """A map from D to E to begin with: random, and length-preserving where E is not below D."""
    projection = nn.Linear(width, teacher_width, bias=False)
    nn.init.orthogonal_(projection.weight, generator=torch.Generator().manual_seed(seed))
    return projection


def share_of(student: Mapping[str, float], teacher: Mapping[str, float]) -> float | None:
    """The student's mean over the teacher's, of the measures that both have at full width."""
    names = [name for name in student if is_full_size(name) and name in teacher]
    total = sum(teacher[name] for name in names)
    return sum(student[name] for name in names) / total if total > 0 else None

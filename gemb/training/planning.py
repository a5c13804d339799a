"""What a run would do, for --dry-run: counted, measured on one batch, and nothing kept."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from gemb.errors import GembError
from gemb.files import free_bytes, readable_bytes
from gemb.report import Plan, Report, Table, counted
from gemb.report.progress import duration
from gemb.training.check import check
from gemb.training.data_recipe import DataSet, RolePrompts
from gemb.training.gradients import batch_gradients
from gemb.training.loop import total_parameters
from gemb.training.material import Material
from gemb.training.ranks import Ranks
from gemb.training.recipe import TrainRecipe
from gemb.training.run_folder import RunFolder
from gemb.training.session import (
    MemoryPlanner,
    load_encoder,
    make_loss,
    trainable_names,
    trained_parameters,
)
from gemb.training.setup import Setup, prepare
from gemb.training.teaching import OpenTeacher

if TYPE_CHECKING:
    from gemb.model.trainable import TrainableEncoder


def make_plan(
    recipe: TrainRecipe,
    material: Material,
    open_teacher: OpenTeacher | None = None,
    *,
    overwrite: bool = False,
) -> Plan:
    """A plan from opening the data and computing the gradients of one batch; `overwrite` as the run gets it.

    Raises GembError as a run does before its first step.
    """
    if recipe.output is None:
        raise GembError("no output given; pass -o runs/first")
    with _prepared(recipe, material, open_teacher) as setup:
        return _planned(setup, recipe.output, overwrite=overwrite)


def check_data(recipe: TrainRecipe, material: Material) -> Report:
    """What is in the data of a recipe, and how much of it stands in its evaluation sets, too.

    Raises GembError as a run does before its first step.
    """
    with _prepared(recipe, material) as setup:
        folders = tuple(
            DataSet(path=path, prompts=RolePrompts(query="none", passage="none"), split="test")
            for path in recipe.evaluation.sets
            if Path(path).is_dir()
        )
        found = check(setup.mixture, cache=setup.folder.data, evaluation=(*setup.held_out, *folders))
        return found.report()


@contextmanager
def _prepared(
    recipe: TrainRecipe, material: Material, open_teacher: OpenTeacher | None = None
) -> Iterator[Setup]:
    """The setup of a recipe in a folder that goes away."""
    with tempfile.TemporaryDirectory(prefix="gemb-plan-") as temporary:
        folder = RunFolder(Path(temporary) / "plan")
        folder.make(overwrite=False)
        with prepare(
            recipe, folder, Ranks(), material, lambda line: None, dry=True, open_teacher=open_teacher
        ) as setup:
            yield setup


def _dropout(encoder: TrainableEncoder) -> list[tuple[str, str]]:
    """What is left out at random, if anything."""
    hidden, attention = encoder.computation.dropout, encoder.computation.attention_dropout
    if not hidden and not attention:
        return []
    return [("dropout", f"{hidden:g} of the hidden numbers, {attention:g} of the attention weights")]


def _planned(setup: Setup, output: Path, *, overwrite: bool) -> Plan:
    recipe = setup.recipe
    encoder = load_encoder(setup)
    loss = make_loss(setup, encoder)
    trained = trained_parameters(encoder, recipe.freeze, trainable_names(encoder, recipe))
    parameters = [parameter for _, parameter in trained]
    memory = MemoryPlanner(setup, encoder).plan()
    batch = next(iter(setup.mixture))
    began = time.monotonic()
    with encoder.quantisation(recipe.qat.format).applied() if recipe.qat else nullcontext(), encoder.summed():
        found = batch_gradients(
            encoder,
            parameters,
            batch,
            loss.of(batch),
            memory,
            loss_parameters=loss.parameters,
            device=setup.device.name,
        )
    seconds = time.monotonic() - began
    tokens_per_second = len(batch.ids) / max(seconds, 1e-9)
    steps = setup.length.steps
    tokens = setup.length.tokens if steps is None else steps * len(batch.ids)
    total = tokens / tokens_per_second if tokens is not None else None
    numbers = total_parameters(encoder.parameters())
    checkpoint_bytes = 4 * 3 * total_parameters(parameters)
    needed = checkpoint_bytes * (recipe.checkpoint.keep + 1) + 4 * numbers
    twice = ", each text encoded twice" if found.encoded_twice else ""
    rows = [
        ("model", f"{setup.model_name}, {numbers:,} parameters, {total_parameters(parameters):,} trained"),
        *([("teacher", f"{setup.teaching.name}, {setup.teaching.dims} wide")] if setup.teaching else []),
        *_dropout(encoder),
        ("device", setup.device.line),
        ("length", f"{counted(steps, 'step')}" if steps is not None else f"{tokens:,} tokens"),
        ("batch", f"{batch.pairs:,} pairs, about {len(batch.ids):,} tokens; "
                  f"chunks of {memory.tokens_per_chunk:,}{twice}"),
        *([("qat", f"{recipe.qat}; loss and time here are with it")] if recipe.qat else []),
        ("loss", ", ".join(f"{name} {value:.4f}" for name, value in found.terms.items())),
        ("sizes", ", ".join(map(str, setup.sizes))),
        ("time", f"about {duration(total or 0.0)}, at {tokens_per_second:,.0f} tokens/s"),
        ("disk", f"about {readable_bytes(needed)} needed, {readable_bytes(free_bytes(output))} free"),
    ]  # fmt: skip
    notes = list(setup.notes)
    if output.exists():
        notes.append(
            f"{output} exists and will be replaced"
            if overwrite
            else f"{output} exists; if another recipe made it, the run will need --overwrite"
        )
    rows += [("note", note) for note in notes]
    members = [
        (member.name, f"{member.prepared.size:,}", f"{member.prepared.rejected:,}", f"{member.share:.1%}",
         member.query.prefix or "none", member.passage.prefix or "none")
        for member in setup.mixture.members
    ]  # fmt: skip
    return Plan(
        title=f"would {'distil' if setup.teaching else 'train'} {setup.model_name} into {output}",
        rows=rows,
        data={
            "steps": steps,
            "tokens": tokens,
            "seconds": None if total is None else round(total, 3),
            "tokens_per_second": round(tokens_per_second, 1),
            "parameters": numbers,
            "tokens_per_chunk": memory.tokens_per_chunk,
            "tokens_with_graph": memory.tokens_with_graph,
            "pairs": batch.pairs,
            "terms": dict(found.terms),
            "bytes_needed": needed,
            "data": {member.name: member.prepared.size for member in setup.mixture.members},
            "model": setup.model_name,
            "device": setup.device.line,
            "notes": notes,
        },
        outputs=[output],
        tables=[
            Table(
                ("data set", "rows", "rejected", "share", "query prompt", "passage prompt"),
                members,
                right_aligned=("rows", "rejected", "share"),
            )
        ],
    )

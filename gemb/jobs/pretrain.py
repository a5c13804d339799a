"""`gemb train` with an objective: texts in, a language model trained further out; resumable like the rest.

    report = run(load("tiny_decoder", PretrainRecipe, options={"output": Path("runs/decoder")}))

See docs/train.md, "Pretraining", for what users are promised.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gemb.errors import GembError
from gemb.files import free_bytes, readable_bytes
from gemb.jobs import tiny_decoder
from gemb.jobs.train import Begun, carry_out
from gemb.report import OnProgress, Plan, Report, counted, ignore
from gemb.report.progress import duration
from gemb.training.material import Material
from gemb.training.pretrain_recipe import PretrainRecipe
from gemb.training.run_folder import RunFolder

if TYPE_CHECKING:
    from gemb.training.pretrain_setup import PretrainSetup

__all__ = ["PretrainRecipe", "plan", "run"]


def plan(recipe: PretrainRecipe, material: Material = tiny_decoder.MATERIAL) -> Plan:
    """What `run` would do, for --dry-run, from reading some texts and computing the gradients of one batch.

    Writes nothing but a temporary folder that is gone afterwards. Raises GembError as `run` does before its
    first step.
    """
    from gemb.training.pretrain_setup import prepare
    from gemb.training.ranks import Ranks

    if recipe.output is None:
        raise GembError("no output given; pass -o runs/first")
    with tempfile.TemporaryDirectory(prefix="gemb-plan-") as temporary:
        folder = RunFolder(Path(temporary) / "plan")
        folder.make(overwrite=False)
        with prepare(recipe, folder, Ranks(), material, lambda line: None, dry=True) as setup:
            return _planned(setup, recipe.output)


def run(
    recipe: PretrainRecipe,
    on_progress: OnProgress = ignore,
    *,
    overwrite: bool = False,
    material: Material = tiny_decoder.MATERIAL,
) -> Report:
    """Train what the recipe says, or go on where an earlier run of it was stopped.

    The rest is as in `gemb.jobs.train.run`.
    """
    from gemb.training.pretrain_session import PretrainSession
    from gemb.training.pretrain_setup import prepare

    def opened(begun: Begun) -> PretrainSession:
        return PretrainSession(
            begun.stack.enter_context(
                prepare(recipe, begun.folder, begun.ranks, material, begun.watch.note, overwrite=overwrite)
            ),
            begun.watch,
        )

    return carry_out(recipe, opened, on_progress, overwrite=overwrite)


def _planned(setup: PretrainSetup, output: Path) -> Plan:
    from gemb.training.loop import total_parameters
    from gemb.training.pretrain_session import gradients_of, load_model, plan_chunks
    from gemb.training.run_session import trained_parameters

    recipe = setup.recipe
    model = load_model(setup)
    named = trained_parameters(model, recipe.freeze)
    memory = plan_chunks(setup, model)
    batch = next(iter(setup.batches))
    began = time.monotonic()
    found = gradients_of(setup, model, named)(batch, 0)(memory, threading.Event())
    speed = batch.tokens / max(1e-9, time.monotonic() - began)
    steps = setup.length.steps
    tokens = setup.length.tokens if steps is None else steps * batch.tokens
    seconds = (tokens or 0) / speed
    numbers = total_parameters(model.parameters())
    trained = total_parameters([parameter for _, parameter in named])
    needed = 4 * (numbers + 2 * trained) * (recipe.checkpoint.keep + 1) + 4 * numbers
    notes = list(setup.notes)
    if output.exists():
        notes.append(f"{output} exists; if another recipe made it, the run will need --overwrite")
    rows = [
        ("model", f"{setup.model_name}, {numbers:,} parameters, {trained:,} trained"),
        ("objective", recipe.objective.name),
        ("device", setup.device.line),
        ("length", counted(steps, "step") if steps is not None else f"{tokens:,} tokens"),
        ("batch", f"{batch.pairs:,} rows of at most {setup.maker.row_tokens:,} tokens, in all "
                  f"{batch.tokens:,}; {batch.targets:,} predicted; chunks of {memory.tokens_per_chunk:,}"),
        ("loss", f"{found.loss:.4f}"),
        ("time", f"about {duration(seconds)}, at {speed:,.0f} tokens/s"),
        ("disk", f"about {readable_bytes(needed)} needed, {readable_bytes(free_bytes(output))} free"),
        *(("note", note) for note in notes),
    ]  # fmt: skip
    return Plan(
        title=f"would train {setup.model_name} into {output}",
        rows=rows,
        data={
            "steps": steps,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(speed, 1),
            "parameters": numbers,
            "tokens_per_chunk": memory.tokens_per_chunk,
            "rows": batch.pairs,
            "targets": batch.targets,
            "loss": found.loss,
            "bytes_needed": needed,
            "model": setup.model_name,
            "device": setup.device.line,
            "notes": notes,
        },
        outputs=[output],
    )

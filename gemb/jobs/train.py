"""`gemb train`: pairs in, a fine-tuned encoder out; killed and rerun it goes on where it was.

    report = run(load("quickstart", TrainRecipe, options={"output": Path("runs/first")}))

`gemb.training.setup` looks everything up and checks it, `gemb.training.loop` does the steps, and
`gemb.training.run_folder` says what lies where. See docs/train.md for what users are promised.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemb.errors import Exit, GateError, GembError, Interrupted
from gemb.files import Lock, check_writable
from gemb.jobs import quickstart
from gemb.jobs.interrupts import Interrupts
from gemb.report import OnProgress, Plan, Report, ignore
from gemb.training.material import Material
from gemb.training.pretrain_recipe import PretrainRecipe
from gemb.training.recipe import RunRecipe, TrainRecipe
from gemb.training.run_folder import RunFolder
from gemb.training.watch import Watch

if TYPE_CHECKING:
    from gemb.training.ranks import Ranks
    from gemb.training.run_session import RunSession
    from gemb.training.teaching import OpenTeacher

__all__ = ["Begun", "PretrainRecipe", "TrainRecipe", "carry_out", "check", "plan", "recipe_for", "run"]

_NOTHING = "interrupted before the first step; nothing is lost"


def recipe_for(keys: Collection[str]) -> type[TrainRecipe | PretrainRecipe]:
    """What a recipe with these keys is read as: with an objective it is one of `gemb.jobs.pretrain`."""
    return PretrainRecipe if "objective" in keys else TrainRecipe


def plan(recipe: TrainRecipe, *, overwrite: bool = False) -> Plan:
    """What `run` would do, for --dry-run: rows, steps, tokens, memory, device and time.

    Writes nothing but a temporary folder that is gone afterwards. Raises GembError as `run` does before its
    first step.
    """
    from gemb.training.planning import make_plan

    return make_plan(recipe, quickstart.MATERIAL, overwrite=overwrite)


def check(recipe: TrainRecipe) -> Report:
    """What is in the data, for --check: repeats, rows of evaluation sets, lengths, what is cut, examples.

    Raises GembError as `run` does before its first step.
    """
    from gemb.training.planning import check_data

    return check_data(recipe, quickstart.MATERIAL)


def run(
    recipe: TrainRecipe,
    on_progress: OnProgress = ignore,
    *,
    overwrite: bool = False,
    material: Material = quickstart.MATERIAL,
    open_teacher: OpenTeacher | None = None,
) -> Report:
    """Train what the recipe says, or go on where an earlier run of it was stopped.

    `overwrite` replaces an output that exists, and drops what another recipe left unfinished. Under torchrun
    every rank calls this, and the first one writes and talks. `material` makes the data and the model that
    the recipe names but nobody has; `open_teacher` opens the teacher of a distillation.

    Raises GembError with an exit code as docs/train.md lists them; Interrupted after SIGINT or SIGTERM, when
    the state is saved (only in the main thread).
    """
    from gemb.training.session import Session
    from gemb.training.setup import prepare

    def opened(begun: Begun) -> Session:
        return Session(
            begun.stack.enter_context(
                prepare(
                    recipe,
                    begun.folder,
                    begun.ranks,
                    material,
                    begun.watch.note,
                    overwrite=overwrite,
                    open_teacher=open_teacher,
                )
            ),
            begun.watch,
        )

    return carry_out(recipe, opened, on_progress, overwrite=overwrite)


@dataclass(frozen=True)
class Begun:
    """A run whose folder is made and locked, whatever is learned in it."""

    folder: RunFolder
    ranks: Ranks
    watch: Watch
    stack: ExitStack
    """What is closed at the end of the run."""


def carry_out(
    recipe: RunRecipe,
    open_session: Callable[[Begun], RunSession[Any, Any, Any]],
    on_progress: OnProgress,
    *,
    overwrite: bool,
) -> Report:
    """Train a session to its end in the folder of a recipe; see `run` for what is promised and raised."""
    from gemb.training.ranks import ranks_of_environment
    from gemb.training.record import already_done
    from gemb.training.setup import pick_device

    if recipe.output is None:
        raise GembError("no output given; pass -o runs/first")
    folder = RunFolder(recipe.output)
    began = time.monotonic()
    with Interrupts(_NOTHING) as interrupts, ExitStack() as stack:
        with interrupts.at_once():
            ranks = stack.enter_context(ranks_of_environment(pick_device(recipe).name))
            watch = Watch(on_progress if ranks.is_first else ignore)
            if ranks.is_first:
                check_writable(folder.partial)
                recipe.output.absolute().parent.mkdir(parents=True, exist_ok=True)
                lock = Lock(folder.lock_file, str(recipe.output), recipe.wait_lock, watch.note)
                stack.enter_context(lock)
            if folder.is_finished and not folder.is_begun and not overwrite:
                return _gated(recipe, already_done(recipe, folder))
            if ranks.is_first:
                folder.make(overwrite=overwrite)
            ranks.wait()
            session = open_session(Begun(folder, ranks, watch, stack))
            stack.callback(session.close)
            session.open()
        is_done = session.train(interrupts.stop)
        if not is_done:
            saved = session.training.progress.step
            raise Interrupted(
                f"stopped at step {saved:,}; the state is saved in {folder.partial}; "
                "the same command goes on there",
                interrupts.exit_code or Exit.TERMINATED,
            )
        report = session.finish(time.monotonic() - began)
    return _gated(recipe, report)


def _gated(recipe: RunRecipe, report: Report) -> Report:
    """The report, of a run that was finished before as well. Raises GateError as fail_on_regression says."""
    if recipe.fail_on_regression and report.data.get("verdict") == "REGRESSION":
        raise GateError(f"{report.title}, but the model became worse: {report.data.get('verdict_line')}")
    return report

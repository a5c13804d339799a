"""`gemb distill`: a teacher and texts in, a smaller encoder out, that gives nearly the same vectors.

    report = run(load("distill_minilm", DistillRecipe, options={"output": Path("runs/student")}))

A distillation is a run of `gemb train` whose losses have a teacher, so all that docs/train.md promises holds;
docs/distill.md tells what is added.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from gemb.errors import GembError
from gemb.files import read_json
from gemb.jobs import quickstart, train
from gemb.recipe import refused
from gemb.report import OnProgress, Plan, Report, ignore
from gemb.training.data_recipe import PromptText
from gemb.training.distill_recipe import DistillRecipe, ModelConfig, StudentSettings
from gemb.training.material import Material
from gemb.training.teacher_recipe import TeacherSettings

__all__ = ["DistillRecipe", "plan", "run"]


def plan(recipe: DistillRecipe, *, overwrite: bool = False) -> Plan:
    """What `run` would do, for --dry-run, from one batch; the teacher's time for it is not in the estimate.

    Raises GembError as `run` does before its first step.
    """
    from gemb.training.model_teacher import opener
    from gemb.training.planning import make_plan

    wanted, teacher, material = _resolved(recipe)
    return make_plan(wanted, material, opener(wanted, teacher), overwrite=overwrite)


def run(recipe: DistillRecipe, on_progress: OnProgress = ignore, *, overwrite: bool = False) -> Report:
    """Distil what the recipe says, or go on where an earlier run of it was stopped.

    Raises GembError as `gemb.jobs.train.run` does, and for a teacher that cannot be had.
    """
    from gemb.training.model_teacher import opener

    wanted, teacher, material = _resolved(recipe)
    open_teacher = opener(wanted, teacher)
    return train.run(wanted, on_progress, overwrite=overwrite, material=material, open_teacher=open_teacher)


def _resolved(recipe: DistillRecipe) -> tuple[DistillRecipe, TeacherSettings, Material]:
    """The recipe with the student as its model, its teacher, and who makes the student."""
    if recipe.teacher is None:
        raise GembError("no teacher given; a distillation needs one, such as teacher: {model: minilm}")
    if recipe.student is None:
        return recipe, recipe.teacher, quickstart.MATERIAL
    student = recipe.student
    if student.config is not None:
        # The keys, not the file, are what the run depends on: a file that changed makes another run.
        student = student.model_copy(update={"config": _config(student.config)})
    wanted = recipe.model_copy(update={"student": student, "model": student.label})
    prompts = [
        prompt.text
        for data in recipe.data
        for prompt in (data.prompts.query, data.prompts.passage)
        if isinstance(prompt, PromptText)
    ]
    writer = _Student(student, prompts, recipe)
    material = replace(quickstart.MATERIAL, model_name=student.label, write_model=writer.write)
    return wanted, recipe.teacher, material


def _config(given: str | ModelConfig) -> ModelConfig:
    """The config of a student. Raises GembError if it cannot be read, or names no family."""
    name = given if isinstance(given, str) else "student.config"
    values = read_json(given) if isinstance(given, str) else given.model_dump()
    if not isinstance(values.get("model_type"), str) or not values["model_type"]:
        raise GembError(f"{name} has no model_type; give that of transformers, such as gemma3_text")
    return ModelConfig.model_validate(values)


@dataclass(frozen=True)
class _Student:
    """Writes the student of a recipe, which is made on the spot."""

    student: StudentSettings
    prompts: Sequence[str]
    """Texts that the recipe puts before others: they are tokens of the student, too."""
    recipe: DistillRecipe

    def write(self, folder: Path, texts: Iterator[str], seed: int) -> None:
        """Write the student's folder, cut from another model or of random weights.

        Raises GembError for what does not fit.
        """
        from gemb.model.folder import read_folder
        from gemb.model.hub import find_model
        from gemb.model.pruned import count_layers, write_pruned

        student = self.student
        if isinstance(student.config, ModelConfig):
            self._write_random(student.config, folder, seed)
            return
        if student.from_ == quickstart.TINY_GEMMA3:
            quickstart.MATERIAL.write_model(folder, texts, seed)
            return
        kept: Iterable[str] | None = None
        if student.keep_vocab is not None:
            kept = chain(
                texts if student.keep_vocab == "data" else _texts_of(student.keep_vocab), self.prompts
            )
        source = read_folder(find_model(student.from_, offline=self.recipe.offline))
        self._check_layers(count_layers(source, source.weights()))
        write_pruned(source, folder, keep_layers=student.keep_layers, texts=kept, largest=student.vocabulary)

    def _check_layers(self, layers: int) -> None:
        """Raises GembError, with the place in the recipe, for a layer that the model does not have."""
        kept = self.student.keep_layers
        if kept and kept[-1] >= layers:
            message = f"{self.student.from_} has no layer {kept[-1]}; keep_layers takes 0 to {layers - 1}"
            raise refused(self.recipe, ("student", "keep_layers"), message)

    def _write_random(self, config: ModelConfig, folder: Path, seed: int) -> None:
        from gemb.model.folder import read_folder
        from gemb.model.hub import find_model
        from gemb.model.random_weights import write_random
        from gemb.training.setup import USUAL_MAX_TOKENS

        tokenizer = find_model(self.student.tokenizer, offline=self.recipe.offline)
        if not (tokenizer / "tokenizer.json").is_file() and (tokenizer / "config.json").is_file():
            tokenizer = read_folder(tokenizer).tokenizer_folder
        write_random(
            config.model_dump(),
            tokenizer,
            folder,
            seed=seed,
            max_tokens=self.recipe.max_tokens or USUAL_MAX_TOKENS,
        )


def _texts_of(files: Sequence[str]) -> Iterator[str]:
    """The titles and texts of rows of files, as `gemb embed` reads them."""
    from gemb.text.inputs import resolve_inputs
    from gemb.text.records import ReadOptions, Record, read_records

    for row in read_records(resolve_inputs(files), ReadOptions()):
        if isinstance(row, Record):
            yield f"{row.title} {row.text}" if row.title else row.text

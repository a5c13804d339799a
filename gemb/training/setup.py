"""What a run of `gemb train` is about, looked up, made and checked before the model is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson

from gemb import device as devices
from gemb.device import Device
from gemb.engine.encoder import load_tokeniser
from gemb.errors import GembError, MismatchError
from gemb.model.folder import ModelFolder, fingerprint, read_folder
from gemb.recipe import resolved
from gemb.text.prompts import Prompts
from gemb.text.tokenisation import Tokeniser
from gemb.training.data_recipe import DataSet
from gemb.training.held_out import Evaluation, Evaluations, HeldOutPairs
from gemb.training.loop import Length
from gemb.training.material import Material
from gemb.training.mixture import Mixture
from gemb.training.ranks import Ranks
from gemb.training.recipe import RunRecipe, TrainRecipe, flat
from gemb.training.run_folder import RunFolder
from gemb.training.teaching import OpenTeacher, Teaching, width_notes

USUAL_MAX_TOKENS = 512
"""Texts are cut there unless the recipe says otherwise: most models declare far more than pairs need."""

PACKAGES = ("gemb", "torch", "numpy", "safetensors", "tokenizers")
"""Those whose versions are kept with a run."""


@dataclass
class Setup:
    """A recipe with everything looked up that can be known before the model is loaded."""

    recipe: TrainRecipe
    folder: RunFolder
    ranks: Ranks
    device: Device
    model: ModelFolder
    model_name: str
    tokeniser: Tokeniser
    prompts: Prompts
    data: tuple[DataSet, ...]
    """Those of the recipe, with the paths of what was made on the spot."""
    mixture: Mixture
    length: Length
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    held_out: tuple[DataSet, ...]
    """Those of evaluation.pairs, likewise."""
    evaluation: Evaluations | None
    request: Mapping[str, Any]
    reopened: Callable[[], Mixture]
    """The mixture once more, where it was when the setup was made; the caller closes it."""
    teaching: Teaching | None = None
    finder: Teaching | None = None
    """Who finds false negatives, where that is not the model itself."""
    notes: list[str] = field(default_factory=list)

    @property
    def total_steps(self) -> int | None:
        """Steps of the run; None where its length is in tokens."""
        return self.length.steps


@contextmanager
def prepare(
    recipe: TrainRecipe,
    folder: RunFolder,
    ranks: Ranks,
    material: Material,
    notice: Callable[[str], None],
    *,
    overwrite: bool = False,
    dry: bool = False,
    open_teacher: OpenTeacher | None = None,
) -> Iterator[Setup]:
    """Everything that can be checked before the model is loaded, checked; cheap things first.

    The mixture is open for the block, at its beginning or where the last checkpoint says. `dry` compares with
    no earlier run. `open_teacher` opens the teacher of a distillation.

    Raises GembError for whatever does not fit.
    """
    if not recipe.data:
        raise GembError("no data given; a recipe needs data, such as - {path: pairs.jsonl, prompts: none}")
    if recipe.checkpoint.result == "best" and not evaluated(recipe):
        raise GembError(
            "checkpoint.result is best, but nothing is evaluated; give evaluation.pairs or evaluation.sets"
        )
    device = pick_device(recipe)
    if overwrite and not dry and ranks.is_first:
        folder.forget_another(recipe_values(recipe))
    data, held_out = _with_material(recipe, folder, ranks, material)
    model_path, model_name = material.model(recipe, _texts_of(data, folder), folder, ranks, notice)
    model = read_folder(model_path)
    tokeniser = load_tokeniser(model, max_tokens_of(recipe.max_tokens, model.max_tokens))
    prompts = Prompts(model.prompts, model.default_prompt)
    try:
        sizes, weights = recipe.sizes(model.dims)
    except ValueError as error:
        raise MismatchError(str(error)) from error
    notes = list(model.notes)
    with ExitStack() as stack:
        teaching = stack.enter_context(open_teacher(folder, device, held_out)) if open_teacher else None
        if teaching is not None:
            notes += [*teaching.notes, *width_notes(teaching, model.dims, recipe.losses)]
        finder = teaching if recipe.finder is not None and not recipe.finder.own else None
        if recipe.finder is not None and recipe.finder.is_given:
            from gemb.training.model_teacher import opener

            open_finder = opener(recipe, recipe.finder, "false_negatives")
            finder = stack.enter_context(open_finder(folder, device, held_out))
            notes += finder.notes

        def opened(position: Mapping[str, Any] | None) -> Mixture:
            return Mixture.open(
                data,
                recipe.mixture,
                tokeniser=tokeniser,
                prompts=prompts,
                cache=folder.data,
                pairs=recipe.batch.pairs,
                seed=recipe.seed,
                leave_out_prompts=not model.pooling.include_prompt,
                needs_negatives=not all(term.name in _WITHOUT_NEGATIVES for term in recipe.losses),
                keep_texts=teaching is not None or finder is not None,
                position=position,
                notice=notice,
            )

        mixture = opened(None)
        request = _request(recipe, model, model_name, mixture, teaching, finder)
        position = None
        if not dry:
            if ranks.is_first:
                folder.begin(request, overwrite=overwrite)
            ranks.wait()
            position = saved_position(folder)
        if position is not None:
            mixture.close()
            mixture = opened(position)
        stack.enter_context(mixture)
        yield Setup(
            recipe=recipe,
            folder=folder,
            ranks=ranks,
            device=device,
            model=model,
            model_name=model_name,
            tokeniser=tokeniser,
            prompts=prompts,
            data=data,
            mixture=mixture,
            length=_length(recipe, mixture),
            sizes=sizes,
            weights=weights,
            held_out=held_out,
            evaluation=_evaluation(recipe, held_out, model, folder, prompts, sizes, ranks),
            request=request,
            reopened=lambda: opened(position),
            teaching=teaching,
            finder=finder,
            notes=notes,
        )


_WITHOUT_NEGATIVES = frozenset({"matching", "similarity", "cosine_error"})


def evaluated(recipe: TrainRecipe) -> bool:
    """Whether a recipe has anything measured."""
    return bool(recipe.evaluation.pairs or recipe.evaluation.sets)


def pick_device(recipe: RunRecipe) -> Device:
    """The device of this rank; its threads are set."""
    import torch

    wanted = recipe.device
    local = os.environ.get("LOCAL_RANK", "")
    if local.isdecimal() and wanted in ("auto", "cuda") and devices.pick("auto", "fp32").kind == "cuda":
        wanted = f"cuda:{local}"
    device = devices.pick(wanted, recipe.precision, recipe.threads)
    if device.kind == "cpu":
        torch.set_num_threads(device.threads)
    return device


def max_tokens_of(wanted: int | None, most: int) -> int:
    """Tokens of the longest text: as wanted, or as usual. Raises MismatchError for more than `most`."""
    if wanted is None:
        return min(USUAL_MAX_TOKENS, most)
    if wanted > most:
        raise MismatchError(f"max_tokens is {wanted:,}, but the model takes {most:,} at most; lower it")
    return wanted


def _with_material(
    recipe: TrainRecipe, folder: RunFolder, ranks: Ranks, material: Material
) -> tuple[tuple[DataSet, ...], tuple[DataSet, ...]]:
    """The data sets and the held-out ones, with the files of those that are made on the spot."""
    every = (*recipe.data, *recipe.evaluation.pairs)
    made = material.files((path for data in every for path in data.paths), folder, ranks)

    def placed(data: DataSet) -> DataSet:
        if not made.keys() & set(data.paths):
            return data
        paths = tuple(str(made.get(path, path)) for path in data.paths)
        name = data.name or (Path(data.paths[0]).name if data.paths[0] in made else None)
        return data.model_copy(update={"path": paths, "name": name})

    return tuple(map(placed, recipe.data)), tuple(map(placed, recipe.evaluation.pairs))


def _texts_of(data: Sequence[DataSet], folder: RunFolder) -> Iterator[str]:
    """All texts of the data sets."""
    from gemb.training.examples import open_rows

    for one in data:
        with open_rows(one, folder.data) as rows:
            for number in range(rows.size):
                example = rows.example(number)
                texts = (example.query, *example.positives, *example.negatives)
                yield from (text.joined() for text in texts)


def _request(
    recipe: TrainRecipe,
    model: ModelFolder,
    model_name: str,
    mixture: Mixture,
    teaching: Teaching | None,
    finder: Teaching | None,
) -> dict[str, Any]:
    """What the weights of a run depend on, for job.json and gemb.json."""
    others = {"teacher": teaching, "false_negatives": finder if finder is not teaching else None}
    taught = {key: one.fingerprint[:12] for key, one in others.items() if one is not None}
    return {
        "recipe": recipe_values(recipe),
        "model": {"name": model_name, "fingerprint": fingerprint(model)[:12], **taught},
        "data": {member.name: member.prepared.fingerprint[:12] for member in mixture.members},
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def recipe_values(recipe: RunRecipe) -> dict[str, Any]:
    """What a recipe says by dotted key; through JSON, so that it compares equal to what job.json gives."""
    values: dict[str, Any] = orjson.loads(orjson.dumps(flat(resolved(recipe))))
    return values


def saved_position(folder: RunFolder) -> Mapping[str, Any] | None:
    """The place in the data that the newest checkpoint holds; None where there is none."""
    from gemb.training.checkpoints import Checkpoints

    checkpoints = Checkpoints(folder.checkpoints)
    steps = checkpoints.steps()
    position = checkpoints.state(steps[-1]).get("position") if steps else None
    return position if isinstance(position, dict) else None


def _length(recipe: TrainRecipe, mixture: Mixture) -> Length:
    if recipe.steps is not None:
        return Length(steps=recipe.steps)
    if recipe.tokens is not None:
        return Length(tokens=recipe.tokens)
    if recipe.epochs is None and mixture.planned_batches is not None:
        return Length(steps=mixture.planned_batches)
    return Length(steps=max(1, round((recipe.epochs or 1.0) * mixture.batches_per_epoch)))


def _evaluation(
    recipe: TrainRecipe,
    held_out: Sequence[DataSet],
    model: ModelFolder,
    folder: RunFolder,
    prompts: Prompts,
    sizes: Sequence[int],
    ranks: Ranks,
) -> Evaluations | None:
    """The evaluations of a recipe, on the first rank; None where there are none."""
    if not evaluated(recipe) or not ranks.is_first:
        return None
    # The mixture has its tokeniser for itself.
    tokeniser = load_tokeniser(model, max_tokens_of(recipe.max_tokens, model.max_tokens))
    limit = recipe.evaluation.limit
    parts: list[Evaluation] = [
        HeldOutPairs.open(
            one, tokeniser=tokeniser, prompts=prompts, cache=folder.data, limit=limit, sizes=sizes
        )
        for one in held_out
    ]
    if recipe.evaluation.sets:
        from gemb.training.evaluated_sets import EvaluatedSets

        sets = EvaluatedSets(
            recipe.evaluation.sets,
            tokeniser=tokeniser,
            prompts=prompts,
            leave_out_prompts=not model.pooling.include_prompt,
            sizes=sizes,
            seed=recipe.seed,
        )
        parts.append(sets)
    return Evaluations(parts)

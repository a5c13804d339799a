"""`gemb quantize`: a model in fewer bits, or as a file that runs elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from gemb import recipe as recipes
from gemb.jobs.quantize import QuantizeRecipe

from ._options import (
    DryRunOption,
    JsonOption,
    QuietOption,
    RecipeOption,
    SetOption,
    VerboseOption,
    given,
    option,
)
from ._show import plan_or_run


def quantize(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="The model: a folder, or a name on the hub.")
    ] = None,
    output: Annotated[Path | None, option(QuantizeRecipe, "output")] = None,
    format: Annotated[str | None, option(QuantizeRecipe, "format")] = None,
    grid: Annotated[str | None, option(QuantizeRecipe, "grid")] = None,
    gguf: Annotated[str | None, option(QuantizeRecipe, "gguf")] = None,
    onnx: Annotated[str | None, option(QuantizeRecipe, "onnx")] = None,
    eval: Annotated[list[str] | None, option(QuantizeRecipe, "eval", metavar="DATA")] = None,
    max_drop: Annotated[float | None, option(QuantizeRecipe, "max_drop")] = None,
    device: Annotated[str | None, option(QuantizeRecipe, "device")] = None,
    threads: Annotated[int | None, option(QuantizeRecipe, "threads")] = None,
    seed: Annotated[int | None, option(QuantizeRecipe, "seed")] = None,
    offline: Annotated[bool | None, option(QuantizeRecipe, "offline")] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Quantise a model, or export it as GGUF or ONNX, and measure the loss.

    Example: gemb quantize runs/encoder -o encoder-int8 --format int8

    For llama.cpp: gemb quantize runs/encoder -o encoder.gguf --gguf q8_0

    For browsers: gemb quantize runs/encoder -o encoder-onnx --onnx int8
    """
    from gemb.jobs import quantize as job

    keys = {**given(QuantizeRecipe, locals()), "eval": None if eval is None else tuple(eval)}
    wanted = recipes.load(recipe, QuantizeRecipe, set_ or (), keys)
    plan_or_run(job, wanted, dry_run=dry_run, json=json, quiet=quiet, verbose=verbose)

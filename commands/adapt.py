"""`gemb adapt`: a decoder language model in, an encoder or an encoder-decoder out."""

from pathlib import Path
from typing import Annotated

import typer

from gemb import recipe as recipes
from gemb.jobs.adapt import AdaptRecipe

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


def adapt(
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="The decoder: a model folder, or a name on the hub."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to change, such as dropout=0.1."),
    ] = None,
    to: Annotated[str | None, option(AdaptRecipe, "to")] = None,
    decoder: Annotated[str | None, option(AdaptRecipe, "decoder", metavar="MODEL")] = None,
    output: Annotated[Path | None, option(AdaptRecipe, "output")] = None,
    attention: Annotated[str | None, option(AdaptRecipe, "attention")] = None,
    pooling: Annotated[str | None, option(AdaptRecipe, "pooling")] = None,
    pool_tokens: Annotated[int | None, option(AdaptRecipe, "pool_tokens")] = None,
    pool_heads: Annotated[int | None, option(AdaptRecipe, "pool_heads")] = None,
    pool_probes: Annotated[int | None, option(AdaptRecipe, "pool_probes")] = None,
    projections: Annotated[str | None, option(AdaptRecipe, "projections", metavar="WIDTHS")] = None,
    normalise: Annotated[bool | None, option(AdaptRecipe, "normalise")] = None,
    default_prompt: Annotated[str | None, option(AdaptRecipe, "default_prompt")] = None,
    max_tokens: Annotated[int | None, option(AdaptRecipe, "max_tokens")] = None,
    dropout: Annotated[float | None, option(AdaptRecipe, "dropout")] = None,
    keep_layers: Annotated[str | None, option(AdaptRecipe, "keep_layers", metavar="LAYERS")] = None,
    keep_vocab: Annotated[str | None, option(AdaptRecipe, "keep_vocab", metavar="FILE")] = None,
    vocabulary: Annotated[int | None, option(AdaptRecipe, "vocabulary")] = None,
    seed: Annotated[int | None, option(AdaptRecipe, "seed")] = None,
    max_memory: Annotated[float | None, option(AdaptRecipe, "max_memory", metavar="GIB")] = None,
    offline: Annotated[bool | None, option(AdaptRecipe, "offline")] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Turn a decoder into an encoder, or into an encoder-decoder, proved.

    Example: gemb adapt google/gemma-3-270m -o runs/encoder
    """
    from gemb.jobs import adapt as job

    keys = given(AdaptRecipe, locals())
    words = [*(changes or ()), *(set_ or ())]
    if source is not None and "=" in source and not Path(source).exists():
        words.insert(0, str(keys.pop("source")))  # the recipe has the source
    wanted = recipes.load(recipe, AdaptRecipe, words, keys)
    plan_or_run(job, wanted, dry_run=dry_run, json=json, quiet=quiet, verbose=verbose)

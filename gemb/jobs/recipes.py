"""The recipes that gemb ships: listing them, and copying one to change it."""

from pathlib import Path

from gemb.errors import GembError
from gemb.files import atomic_write
from gemb.recipe import shipped_recipes
from gemb.recipe.problems import did_you_mean
from gemb.report import Report, Table


def list_recipes() -> Report:
    """A table of the shipped recipes: name and what each does."""
    recipes = shipped_recipes()
    rows = [(recipe.name, recipe.summary) for recipe in recipes]
    return Report(
        title=f"{len(recipes)} recipe{'' if len(recipes) == 1 else 's'}",
        data={"recipes": [{"name": name, "summary": summary} for name, summary in rows]},
        tables=[Table(("name", "what it does"), rows)] if rows else [],
    )


def copy_recipe(name: str, output: Path | None, *, overwrite: bool = False) -> Report:
    """Write the shipped recipe `name` to `output`, by default its file name in the working folder.

    Raises GembError if there is no such recipe, or if the file exists and `overwrite` is not set.
    """
    found = {recipe.name: recipe for recipe in shipped_recipes()}
    if name not in found:
        hint = did_you_mean(name, list(found), listing="the recipes are")
        raise GembError(f"no recipe {name}{hint}")
    target = output or Path(Path(name).with_suffix(".yaml").name)
    if target.exists() and not overwrite:
        raise GembError(f"{target} exists; pass --overwrite to replace it, or -o to write elsewhere")
    with atomic_write(target) as file:
        file.write(found[name].text.encode())
    return Report(
        title=f"copied recipe {name} to {target}",
        data={"name": name, "output": str(target)},
        outputs=[target],
    )

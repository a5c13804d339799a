"""The recipes that come with gemb, found by name in a wheel, an editable install and a checkout alike."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


@dataclass(frozen=True)
class ShippedRecipe:
    """One recipe of gemb."""

    name: str
    """What the user types: its path under recipes/ without the suffix."""
    text: str
    """The file, comments included."""

    @property
    def summary(self) -> str:
        """The first comment line after its ` - `: what the recipe does."""
        first = self.text.partition("\n")[0]
        return first.partition(" - ")[2].strip().rstrip(".")


def shipped_recipes() -> list[ShippedRecipe]:
    """Every recipe that gemb ships, by name."""
    from importlib.resources import files

    found = _yaml_files(files("gemb.recipes"), "")
    return sorted((ShippedRecipe(name, text) for name, text in found), key=lambda recipe: recipe.name)


def _yaml_files(folder: "Traversable", prefix: str) -> "Iterator[tuple[str, str]]":
    """Name and text of every recipe below `folder`."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _yaml_files(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name.removesuffix(".yaml"), entry.read_text(encoding="utf-8")

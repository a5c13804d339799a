"""What is made on the spot where a recipe names it: data of this machine, a model with random weights.

Imports no torch, so that help is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemb.model.hub import DEFAULT_MODEL, find_model
from gemb.training.recipe import RunRecipe
from gemb.training.run_folder import RunFolder

if TYPE_CHECKING:
    from gemb.training.ranks import Ranks


@dataclass(frozen=True)
class Material:
    """The data sets and the model that a recipe may name though nobody has them, and who writes them."""

    data_names: Sequence[str]
    """What a path of data may be instead of a file."""
    model_name: str
    """What the model may be instead of a folder or a hub name."""
    write_data: Callable[[Path], Mapping[str, Path]]
    """Writes the data sets below a folder unless they are there; gives the file of each by its name."""
    write_model: Callable[[Path, Iterator[str], int], None]
    """Writes a model folder with a vocabulary made from texts, its random numbers those of a seed."""

    def files(self, paths: Iterable[str], folder: RunFolder, ranks: Ranks) -> dict[str, Path]:
        """The files of those of `paths` that are names of data sets, written unless they are there."""
        # A path of a recipe file was made relative to its folder; a file of that name goes before.
        named = {
            path: Path(path).name
            for path in paths
            if Path(path).name in self.data_names and not Path(path).exists()
        }
        if not named:
            return {}
        if ranks.is_first:
            self.write_data(folder.data)
        ranks.wait()
        written = self.write_data(folder.data)
        return {path: written[name] for path, name in named.items()}

    def model(
        self,
        recipe: RunRecipe,
        texts: Iterator[str],
        folder: RunFolder,
        ranks: Ranks,
        notice: Callable[[str], None],
    ) -> tuple[Path, str]:
        """The folder of the model that a recipe begins with, and what the user calls it.

        `texts` are read only where it is written. `notice` hears of a download.
        """
        if recipe.model != self.model_name:
            path = find_model(recipe.model, offline=recipe.offline, announce=notice)
            return path, recipe.model or DEFAULT_MODEL
        if ranks.is_first and not (folder.base / "config.json").is_file():
            self.write_model(folder.base, texts, recipe.seed)
        ranks.wait()
        return folder.base, self.model_name

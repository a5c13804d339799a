"""Embed, index and search text with small encoders.

`Encoder.load(folder).embed(texts)` and `Index.open(folder).search(text)` are the Python doors; `gemb --help`
shows the commands.
"""

from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemb.engine.encoder import Encoder
    from gemb.retrieval.index import Index

# A wheel holds gemb/commands and gemb/recipes; a checkout keeps both beside this package.
if not (Path(__file__).parent / "commands").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

__all__ = ["Encoder", "Index", "__version__"]

_HOMES = {"Encoder": "gemb.engine.encoder", "Index": "gemb.retrieval.index"}


def __getattr__(name: str) -> object:
    """Give the public names on first use, so that `import gemb` loads neither torch nor numpy."""
    if name == "__version__":
        try:
            return metadata.version("gemb")
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            return "0+unknown"
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gemb' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

"""Libraries that only evaluation needs; they come with an extra, and load when they are used."""

from importlib import import_module
from types import ModuleType

from gemb.errors import UnavailableError


def load(module: str, *, extra: str = "eval") -> ModuleType:
    """A module of an extra of gemb. Raises UnavailableError with the pip line where it is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise UnavailableError(
            f"{error.name} is not installed, which evaluation needs; pip install 'gemb[{extra}]'"
        ) from error

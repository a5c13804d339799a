"""From what a user calls a model to the folder that holds it: local first, no socket where none is needed."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache: `GEMB_CACHE`, else `XDG_CACHE_HOME`/gemb, else ~/.cache/gemb; may not exist yet."""
    own = os.environ.get("GEMB_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "gemb"

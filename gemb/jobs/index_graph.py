"""The ONNX graph of an index's model, in the user's cache: with it `gemb search` starts without torch."""

from __future__ import annotations

from importlib.util import find_spec

from gemb.engine.onnx_engine import find_graph, is_installed, write_cached_graph
from gemb.errors import GembError, MismatchError
from gemb.jobs.index_setup import Announce, IndexSetup

SMALL_PARAMETERS = 50_000_000
"""Up to here a graph costs a second and 200 MB, and a search is mostly the start of its process."""


def graph_note(setup: IndexSetup) -> str | None:
    """What becomes of the model's graph, for the plan; None if nothing does.

    Raises GembError if a graph is asked for and there is no model, or the extra `onnx` is not installed.
    """
    wanted, encoding = setup.recipe.onnx, setup.encoding
    if encoding is None:
        if wanted:
            raise GembError("--onnx is for the model of texts that are embedded here, not for --vectors")
        return None
    has_extra = is_installed() and find_spec("onnx") is not None
    if wanted and not has_extra:
        raise GembError("--onnx needs onnx and onnxruntime; pip install 'gemb[onnx]'")
    parameters = encoding.folder.weights().parameters
    if wanted is None:
        wanted = has_extra and parameters <= SMALL_PARAMETERS
    if not wanted or find_graph(encoding.folder) is not None:
        return None
    return (
        f"the ONNX graph of the model ({parameters / 1e6:,.0f} M parameters) goes into the cache, with which "
        "gemb search starts without torch; --no-onnx leaves it out"
    )


def keep_graph(setup: IndexSetup, announce: Announce) -> None:
    """Write the graph into the cache, if `graph_note` says so; `announce` hears of it.

    Raises MismatchError if it is asked for and the model's family has none.
    """
    note = graph_note(setup)
    if note is None or setup.encoding is None:
        return
    try:
        write_cached_graph(setup.encoding.folder)
    except MismatchError:
        if setup.recipe.onnx:
            raise
        return  # nobody asked, and torch searches as well
    announce(note)

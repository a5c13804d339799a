"""Where every tensor of an adapted model comes from, as a table that a person reads."""

import re
from collections.abc import Mapping

from gemb.model.adapting.key_maps import TensorMap
from gemb.report import Table, counted

_LAYER = re.compile(r"(.*?layers\.)(\d+)(\..*)")
_OF_IMAGES = re.compile(r"(.*?(?:vision_tower|multi_modal_projector)\.).*")


def tensor_table(tensors: TensorMap, new: Mapping[str, tuple[int, ...]] | None = None) -> Table:
    """Every tensor and its origin, `new` being shapes in other files.

    The same of all layers is one line, and so is all of a vision tower.
    """
    folded: dict[tuple[str, str, str, str], int] = {}
    for origin in tensors.origins:
        sources = " + ".join(_folded(name) for name in origin.sources)
        name = _folded(origin.piece.name)
        shape = "" if name.endswith(".*") else _shown(origin.piece.shape)
        key = (name, shape, origin.change, sources)
        folded[key] = folded.get(key, 0) + 1
    rows = [
        [name, str(count), shape, change, sources] for (name, shape, change, sources), count in folded.items()
    ]
    rows += [[name, "1", _shown(shape), "new, random", ""] for name, shape in (new or {}).items()]
    left: dict[str, int] = {}
    for name in tensors.left_out:
        left[_folded(name)] = left.get(_folded(name), 0) + 1
    rows += [["", str(count), "", "left out", name] for name, count in left.items()]
    title = counted(len(tensors.origins) + len(new or {}), "tensor")
    return Table(("tensor", "count", "shape", "origin", "from"), rows, title=title, right_aligned=("count",))


def _folded(name: str) -> str:
    if _OF_IMAGES.fullmatch(name):
        return _OF_IMAGES.sub(r"\1*", name)
    return _LAYER.sub(r"\1*\3", name)


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))

"""Where every tensor of an adapted model comes from, as a table and as a line that a person reads."""

import re
from collections import Counter
from collections.abc import Mapping

from gemb.model.adapting.key_maps import TensorMap
from gemb.report import Table, counted

_NEW = "new, random"
_LAYER = re.compile(r"(.*?layers\.)(\d+)(\..*)")
_OF_IMAGES = re.compile(r"(.*?(?:vision_tower|multi_modal_projector)\.).*")


def tensor_counts(tensors: TensorMap, new: Mapping[str, tuple[int, ...]] | None = None) -> str:
    """How many tensors have which origin: `14: 12 copied, 2 new, random`; `new` are shapes in other files."""
    counts = Counter(origin.change for origin in tensors.origins)
    counts[_NEW] += len(new or {})
    told = ", ".join(f"{count:,} {change}" for change, count in counts.items() if count)
    left = f"; {len(tensors.left_out):,} left out" if tensors.left_out else ""
    return f"{counts.total():,}: {told}{left}"


def tensor_table(tensors: TensorMap) -> Table:
    """Every tensor and its origin.

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
    left: dict[str, int] = {}
    for name in tensors.left_out:
        left[_folded(name)] = left.get(_folded(name), 0) + 1
    rows += [["", str(count), "", "left out", name] for name, count in left.items()]
    title = counted(len(tensors.origins), "tensor")
    return Table(("tensor", "count", "shape", "origin", "from"), rows, title=title, right_aligned=("count",))


def _folded(name: str) -> str:
    if _OF_IMAGES.fullmatch(name):
        return _OF_IMAGES.sub(r"\1*", name)
    return _LAYER.sub(r"\1*\3", name)


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))

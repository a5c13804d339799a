"""The index folder: a SQLite catalogue, immutable segments of vectors, and what searches them. No torch.

`Writer` changes an index, `Index` searches it; docs/index-format.md tells what lies on the disk.
"""

from gemb.store.catalogue import Settings, State
from gemb.store.documents import Document, Hit
from gemb.store.reader import Exported, Index, Neighbours
from gemb.store.writer import Changes, Compared, Step, Writer

__all__ = [
    "Changes",
    "Compared",
    "Document",
    "Exported",
    "Hit",
    "Index",
    "Neighbours",
    "Settings",
    "State",
    "Step",
    "Writer",
]

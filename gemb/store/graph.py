"""The first stage with a graph: usearch's HNSW over the codes of one segment (Malkov, arXiv 1603.09320).

usearch believes what it is given: a NaN ruins its results, a flipped byte loads silently, several crash the
process, and so does adding to a mapped index. So codes are made here from checked vectors, a file is
compared with its checksums as a whole before it is mapped, and a mapped graph has no way to add. N rows, C
dims of a code.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemb.errors import MachineError
from gemb.files import os_errors_explained, readable_bytes
from gemb.store.blocks import CheckedFile
from gemb.store.codes import CODE_LIMIT

CODES_OFFSET = 8
"""Where the codes begin in a graph file: behind two 4-byte counts, one row a slot."""
_HEAD_BYTES = 64
_LEVELS_OFFSET = (
    _HEAD_BYTES + 40
)  # five 8-byte counts: size, links a node, links on level 0, top level, entry
_NODE_HEAD_BYTES = 10  # 8-byte key, 2-byte level
_GROWTH_LIMIT = (
    2.0  # a file twice as large as it can be is not written on to: other tools filled disks that way
)


SMALLEST_EXPANSION = 128
EXPANSION_AT_100K = 220
EXPANSION_POWER = 0.6


@dataclass(frozen=True, slots=True)
class GraphShape:
    """What a graph is built with: links a node, candidates while adding, and while searching at least."""

    connectivity: int = 16
    expansion_add: int = 128
    expansion_search: int = 128


def search_expansion(rows: int) -> int:
    """Candidates that a search of a graph over `rows` rows keeps, for a recall@10 of 0.99 after rescoring.

    Measured with benchmarks/store/search.py: about 170 at 100,000 rows and 700 at a million, so it grows with
    the power 0.6 of the rows; both are taken with something to spare.
    """
    growth: float = (rows / 100_000) ** EXPANSION_POWER
    return max(SMALLEST_EXPANSION, round(EXPANSION_AT_100K * growth))


def expected_bytes(rows: int, dims: int, shape: GraphShape) -> int:
    """About the size of a graph file; levels above the first add some 5 % of the links."""
    links = 4 * (2 * shape.connectivity + 1) + 4 * (shape.connectivity + 1) / (shape.connectivity - 1)
    return int(rows * (dims + _NODE_HEAD_BYTES + 2 + links)) + _LEVELS_OFFSET + CODES_OFFSET


def build(
    path: Path,
    blocks: Iterable[tuple[int, NDArray[np.int8]]],
    rows: int,
    dims: int,
    shape: GraphShape,
    threads: int,
    on_rows: Callable[[int], None],
) -> None:
    """Writes the graph over `rows` codes to a new file; each block is its first row and its codes[n, C].

    `on_rows` hears the number of rows done. The whole graph is in memory until then, about `expected_bytes`.
    """
    from usearch.index import Index

    graph = Index(
        ndim=dims,
        metric="cos",  # usearch's inner product is wrong for int8
        dtype="i8",
        connectivity=shape.connectivity,
        expansion_add=shape.expansion_add,
        expansion_search=shape.expansion_search,
        enable_key_lookups=False,
    )
    for first, codes in blocks:
        if codes.min(initial=0) < -CODE_LIMIT:
            raise ValueError("a code is out of range")
        keys = np.arange(first, first + len(codes), dtype=np.uint64)
        graph.add(keys, codes, threads=threads)
        on_rows(first + len(codes))
    if len(graph) != rows:
        raise MachineError(f"the graph has {len(graph):,} rows instead of {rows:,}; run the command again")
    wanted = expected_bytes(rows, dims, shape)
    if graph.serialized_length > _GROWTH_LIMIT * wanted + (1 << 20):
        raise MachineError(
            f"a graph of {readable_bytes(graph.serialized_length)} is far above the "
            f"{readable_bytes(wanted)} of {rows:,} rows; it was not written"
        )
    with os_errors_explained(path):
        try:
            graph.save(os.fspath(path))
        except RuntimeError as error:  # usearch tells every failed write so, the disk being full among them
            raise OSError(_last_write_error(path), str(error)) from error


def slot_rows(path: Path, rows: int, dims: int) -> NDArray[np.uint32] | None:
    """The row of each slot of a graph file, [N]; None where the file is not laid out as usearch 2.26 does it.

    Threads add in no fixed order, and the codes in the file stand in the order of the slots.
    """
    with os_errors_explained(path, "read"):
        content = np.memmap(path, dtype=np.uint8, mode="r")
    counts = content[:CODES_OFFSET].view("<u4")
    head = CODES_OFFSET + rows * dims
    if counts.tolist() != [rows, dims] or bytes(content[head : head + 7]) != b"usearch":
        return None
    place = head + _HEAD_BYTES
    size, links, base_links, _, _ = content[place : place + 40].view("<u8").tolist()
    if size != rows:
        return None
    place = head + _LEVELS_OFFSET
    levels = content[place : place + 2 * rows].view("<i2").astype(np.int64)
    lengths = _NODE_HEAD_BYTES + 4 + 4 * base_links + levels * (4 + 4 * links)
    ends = place + 2 * rows + np.cumsum(lengths)
    if rows and int(ends[-1]) != len(content):
        return None
    begins = ends - lengths
    found = np.empty(rows, dtype=np.uint32)
    for start in range(0, rows, 65_536):
        part = begins[start : start + 65_536, None] + np.arange(4)  # a row number fits the key's low half
        found[start : start + 65_536] = content[part].view("<u4")[:, 0]
    return found


class Graph:
    """A graph of one segment, mapped read-only out of a file that was found whole."""

    def __init__(
        self, file: CheckedFile, checksums: NDArray[np.uint32], rows: int, dims: int, cache: Path | None
    ) -> None:
        from usearch.index import Index

        check_once(file, checksums, cache)
        self._file = file
        self._graph = Index(ndim=dims, metric="cos", dtype="i8", enable_key_lookups=False)
        self._graph.view(file.content)
        if len(self._graph) != rows:
            raise ValueError(f"{file.path} has {len(self._graph)} rows, not {rows}")

    def nearest(self, codes: NDArray[np.int8], count: int, expansion: int, threads: int) -> NDArray[np.int64]:
        """Rows[Q, count] near codes[Q, C], nearest first; -1 where fewer were found."""
        setattr(self._graph, "expansion_search", max(expansion, count))  # noqa: B010 - typed as read-only
        found = self._graph.search(codes, count, threads=threads)
        rows = np.atleast_2d(np.asarray(found.keys)).astype(np.int64)
        # usearch gives one query's matches without a count, cut to those that were found.
        counts = np.asarray(getattr(found, "counts", [rows.shape[1]]))
        if rows.shape[1] == count and counts.min(initial=count) == count:
            return rows
        wide = np.full((len(codes), count), -1, dtype=np.int64)
        wide[:, : rows.shape[1]] = rows
        wide[np.arange(count) >= counts[:, None]] = -1
        return wide


def check_once(file: CheckedFile, checksums: NDArray[np.uint32], cache: Path | None) -> None:
    """Returns if the file is whole; it is not read if size, times and inode are those of the last time.

    The memory of that lies in the user's cache folder, one empty file a checked state; None keeps no memory.
    """
    state = " ".join(map(str, file.identity)).encode()
    digest = hashlib.sha256(
        os.fsencode(file.path.resolve()) + b"\0" + state + checksums.tobytes()
    ).hexdigest()
    place = None if cache is None else cache / "verified" / digest
    if place is not None and place.exists():
        return
    file.check_all()
    if place is not None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        except OSError:
            pass  # the file is read again next time


def _last_write_error(path: Path) -> int:
    """The error number that a write to `path` gives now; usearch does not pass on what it met."""
    try:
        with path.open("ab") as file:
            file.write(bytes(1 << 16))
            file.flush()
    except OSError as error:
        return error.errno or 0
    return 0

"""One engine in a process of its own: commands as JSON lines on stdin, one JSON answer a line on stdout.

    {"do": "build", "rows": FILE, "count": N, "at": PATH}       an index of the first N rows, saved at PATH
    {"do": "open", "at": PATH}                                  ready to be searched
    {"do": "search", "queries": FILE, "k": 10, "batch": Q, "found": FILE, ...}   Q queries a call

An answer says what the command took and what memory the process has then. Only numpy and the engine are
imported, so that the peers run in an environment of their own. Results are saved as row numbers [Q, k],
-1 where there is none. Every engine gives what its users get: gemb, Chroma and LanceDB ids and texts out of
their store (`gemb-keys` keys alone), faiss numbers.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gemb.store.conditions import Condition

K = 10
BLOCK_ROWS = 5_000
TEXT = "passage number {row} of the benchmark"

Vectors = NDArray[np.float32]
Found = NDArray[np.int64]
Options = Mapping[str, Any]
"""What else a command says; which of it an engine reads, its code shows."""


class Rows:
    """The first `count` rows[N, D] of a .npy file, read in blocks: mapped, they would count as memory."""

    def __init__(self, path: Path, count: int) -> None:
        mapped = np.load(path, mmap_mode="r")
        self.dims = int(mapped.shape[1])
        self._path, self._count, self._offset = path, count, int(mapped.offset)

    def __iter__(self) -> Iterator[tuple[int, Vectors]]:
        """Yields the first row and the rows[n, D] of each block."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for start in range(0, self._count, BLOCK_ROWS):
                count = min(BLOCK_ROWS, self._count - start)
                block: Vectors = np.fromfile(file, "<f4", count * self.dims).reshape(count, self.dims)
                yield start, block


class Engine(Protocol):
    """What the commands do."""

    def build(self, rows: Rows, at: Path, options: Options) -> None:
        """An index over rows[N, D] in the order of their numbers, on the disk at `at`."""

    def open(self, at: Path, options: Options) -> None:
        """Ready for `search`."""

    def search(self, queries: Vectors, k: int, options: Options) -> Found:
        """The numbers[Q, k] of the nearest rows."""


class Gemb:
    """`gemb.store.Index.search`: ids, texts and metadata; default settings."""

    def build(self, rows: Rows, at: Path, options: Options) -> None:
        """As `Engine` says."""
        from gemb.store import Document, Settings, Writer

        with Writer.open(at, Settings(dims=rows.dims, code_dims=options.get("code_dims", 0))) as writer:
            for start, block in rows:
                numbers = range(start, start + len(block))
                documents = [
                    Document(str(row), TEXT.format(row=row), metadata={"part": row % 1000}) for row in numbers
                ]
                writer.put(documents, block, ready=True)
            writer.compact()

    def open(self, at: Path, options: Options) -> None:
        """As `Engine` says."""
        from gemb.store import Index

        self.index = Index.open(at, cache=at.parent / "cache")

    def search(self, queries: Vectors, k: int, options: Options) -> Found:
        """As `Engine` says."""
        hits = self.index.search(
            queries, k=k, exact=options.get("exact", False), where=self._where(options.get("where"))
        )
        found = np.full((len(queries), k), -1, dtype=np.int64)
        for query, own in enumerate(hits):
            found[query, : len(own)] = [int(hit.id) for hit in own]
        return found

    def _where(self, text: str | None) -> "Condition | None":
        from gemb.store import where

        return None if text is None else where.parse(text, self.index.fields())


class GembKeys(Gemb):
    """`gemb.store.Index.nearest`: keys and cosines alone."""

    def search(self, queries: Vectors, k: int, options: Options) -> Found:
        """As `Engine` says."""
        near = self.index.nearest(queries, k, exact=options.get("exact", False))
        return near.keys.astype(np.int64) - 1  # keys count from 1 in the order of indexing


class FaissHNSW:
    """faiss `IndexHNSWFlat`, float32, inner product."""

    def build(self, rows: Rows, at: Path, options: Options) -> None:
        """As `Engine` says."""
        import faiss

        faiss.omp_set_num_threads(1)
        index: Any = faiss.IndexHNSWFlat(rows.dims, options["links"], faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = options["expansion_add"]
        for _, block in rows:
            index.add(block)
        faiss.write_index(index, str(at))

    def open(self, at: Path, options: Options) -> None:
        """As `Engine` says."""
        import faiss

        faiss.omp_set_num_threads(1)
        self.index: Any = faiss.read_index(str(at))

    def search(self, queries: Vectors, k: int, options: Options) -> Found:
        """As `Engine` says."""
        self.index.hnsw.efSearch = options["expansion"]
        found: Found = self.index.search(queries, k)[1]
        return found


class FaissFlat:
    """faiss `IndexFlatIP`: every row, float32."""

    def build(self, rows: Rows, at: Path, options: Options) -> None:
        """As `Engine` says."""
        import faiss

        index = faiss.IndexFlatIP(rows.dims)
        for _, block in rows:
            index.add(block)
        faiss.write_index(index, str(at))

    def open(self, at: Path, options: Options) -> None:
        """As `Engine` says."""
        import faiss

        faiss.omp_set_num_threads(1)
        self.index: Any = faiss.read_index(str(at))

    def search(self, queries: Vectors, k: int, options: Options) -> Found:
        """As `Engine` says."""
        found: Found = self.index.search(queries, k)[1]
        return found


class Chroma:
    """Chroma's `PersistentClient`: HNSW float32; ids and texts."""

    def build(self, rows: Rows, at: Path, options: Options) -> None:
        """As `Engine` says."""
        import chromadb

        client = chromadb.PersistentClient(str(at), chromadb.Settings(anonymized_telemetry=False))
        hnsw = {
            "space": "cosine",
            "max_neighbors": options.get("links", 16),
            "ef_construction": options.get("expansion_add", 100),
            "ef_search": options["expansion"],
            "num_threads": 1,
        }
        collection = client.create_collection(
            "rows",
            configuration={"hnsw": hnsw},
            embedding_function=None,
        )
        for start, block in rows:
            numbers = range(start, start + len(block))
            collection.add(
                ids=[str(row) for row in numbers],
                embeddings=block,
                documents=[TEXT.format(row=row) for row in numbers],
            )

    def open(self, at: Path, options: Options) -> None:
        """As `Engine` says."""
        import chromadb

        client = chromadb.PersistentClient(str(at), chromadb.Settings(anonymized_telemetry=False))
        self.collection = client.get_collection("rows", embedding_function=None)
        if options.get("expansion"):
            self.collection.modify(configuration={"hnsw": {"ef_search": options["expansion"]}})

    def search(self, queries: Vectors, k: int, options: Options) -> Found:
        """As `Engine` says."""
        found = self.collection.query(
            query_embeddings=queries, n_results=k, include=["documents", "distances"]
        )
        return np.array([[int(id_) for id_ in ids] for ids in found["ids"]], dtype=np.int64)


class Lance:
    """LanceDB's embedded mode: IVF_HNSW_SQ with refining, its index nearest to this one; ids and texts."""

    def build(self, rows: Rows, at: Path, options: Options) -> None:
        """As `Engine` says."""
        import lancedb
        import pyarrow as pa

        dims = rows.dims
        schema = pa.schema(
            [("id", pa.string()), ("text", pa.string()), ("vector", pa.list_(pa.float32(), dims))]
        )

        def batches() -> Iterator[pa.RecordBatch]:
            for start, block in rows:
                numbers = range(start, start + len(block))
                ids = pa.array([str(row) for row in numbers])
                texts = pa.array([TEXT.format(row=row) for row in numbers])
                flat = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), dims)
                yield pa.RecordBatch.from_arrays([ids, texts, flat], schema=schema)

        table = lancedb.connect(str(at)).create_table("rows", batches(), schema=schema)
        table.create_index(
            metric="cosine", index_type=options["index"], vector_column_name="vector", num_partitions=1
        )

    def open(self, at: Path, options: Options) -> None:
        """As `Engine` says."""
        import lancedb

        self.table = lancedb.connect(str(at)).open_table("rows")

    def search(self, queries: Vectors, k: int, options: Options) -> Found:
        """As `Engine` says."""
        found = np.full((len(queries), k), -1, dtype=np.int64)
        for query, vector in enumerate(queries):
            search = self.table.search(vector).distance_type("cosine").limit(k)
            search = search.ef(options["expansion"]).refine_factor(options["refine"]).select(["id", "text"])
            ids = search.to_arrow()["id"].to_pylist()
            found[query, : len(ids)] = [int(id_) for id_ in ids]
        return found


ENGINES: dict[str, Callable[[], Engine]] = {
    "gemb": Gemb,
    "gemb-keys": GembKeys,
    "faiss-hnsw": FaissHNSW,
    "faiss-flat": FaissFlat,
    "chroma": Chroma,
    "lancedb": Lance,
}


def memory() -> dict[str, int]:
    """Bytes of this process: anonymous, mapped from files, and the peak of both."""
    names = {"RssAnon": "anonymous_bytes", "RssFile": "file_bytes", "VmHWM": "peak_bytes"}
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key in names:
            found[names[key]] = int(value.split()[0]) * 1024
    return found


def disk_bytes(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def main() -> None:
    """Answer commands until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    engine = ENGINES[sys.argv[1]]()
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        more: dict[str, object] = {}
        if do == "search":
            queries, batch = np.load(command.pop("queries")), command.pop("batch")
            k, save_at = command.pop("k", K), command.pop("found", None)
            wall, cpu = time.perf_counter(), time.process_time()
            parts = [
                engine.search(queries[start : start + batch], k, command)
                for start in range(0, len(queries), batch)
            ]
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if save_at:
                np.save(save_at, np.concatenate(parts))
        elif do == "build":
            at, count = Path(command.pop("at")), command.pop("count")
            rows = Rows(Path(command.pop("rows")), count)
            if at.is_dir():
                shutil.rmtree(at)
            at.unlink(missing_ok=True)
            wall, cpu = time.perf_counter(), time.process_time()
            engine.build(rows, at, command)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            more = {"disk_bytes": disk_bytes(at), "input": "read in blocks"}
        else:
            wall, cpu = time.perf_counter(), time.process_time()
            engine.open(Path(command.pop("at")), command)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        answers.write(json.dumps({"wall_seconds": wall, "cpu_seconds": cpu, **memory(), **more}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

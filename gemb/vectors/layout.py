"""How rows lie in an output: width, stored type, and which file formats can hold it.

B rows, K kept dims. A stored row is the K numbers of a text in the type on disk, little-endian:
float32, float16, the bit pattern of bfloat16 (uint16), int8, or K / 8 bytes of bits.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.files import read_json
from gemb.vectors.quantise import (
    Int8Ranges,
    from_bfloat16,
    from_binary,
    from_int8,
    to_bfloat16,
    to_binary,
    to_float16,
    to_int8,
)

DType = Literal["f32", "f16", "bf16", "int8", "binary"]
Encoding = Literal["list", "base64"]
Kind = Literal["npy", "safetensors", "fbin", "jsonl", "parquet", "shards", "stream"]

STORED: dict[DType, np.dtype[Any]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
    "int8": np.dtype("i1"),
    "binary": np.dtype("u1"),
}
KIND_OF_SUFFIX: dict[str, Kind] = {
    ".npy": "npy",
    ".safetensors": "safetensors",
    ".fbin": "fbin",
    ".i8bin": "fbin",
    ".u8bin": "fbin",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
BIN_DTYPES: dict[str, DType] = {".fbin": "f32", ".i8bin": "int8", ".u8bin": "binary"}
MANIFEST = "manifest.json"
RECORD = "gemb.json"
"""What a job keeps inside a folder that it made: request and report."""
SHARDS_FORMAT = "gemb shards 1"
SHARD_ENDING = re.compile(r"\.shard-\d{5,}-of-\d{5,}")
PART_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Layout:
    """What every row of an output has in common.

    `dims` is K. `encoding` concerns JSON lines only. `metadata` is stored where the format has a place
    for it (Parquet, safetensors, a folder's manifest). `ranges` are there for int8 and only then.
    `part_rows` is the length of a part of a folder; None takes parts of about 1 GiB.

    Raises GembError for dims that the type cannot hold.
    """

    dims: int
    dtype: DType = "f32"
    encoding: Encoding = "list"
    metadata: Mapping[str, str] = field(default_factory=dict)
    ranges: Int8Ranges | None = None
    part_rows: int | None = None

    def __post_init__(self) -> None:
        if self.dims < 1:
            raise ValueError(f"dims is {self.dims}")
        if self.dtype == "binary" and self.dims % 8:
            raise GembError(
                f"--dtype binary packs 8 dims a byte, but the vectors are {self.dims} wide; "
                f"pass --dims {max(8, self.dims // 8 * 8)}"
            )
        if (self.dtype == "int8") != (self.ranges is not None):
            raise ValueError(f"ranges belong to int8 and only to it; dtype is {self.dtype}")
        if self.ranges is not None and self.ranges.dims != self.dims:
            raise ValueError(f"the int8 ranges are {self.ranges.dims} wide but the vectors {self.dims}")

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """The numpy type of a stored number."""
        return STORED[self.dtype]

    @property
    def stored_width(self) -> int:
        """Numbers in a stored row: K, or K / 8 for binary."""
        return self.dims // 8 if self.dtype == "binary" else self.dims

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row."""
        return self.stored_width * self.stored_dtype.itemsize

    @property
    def rows_per_part(self) -> int:
        """Rows of a part of a folder; a multiple of 4,096 unless `part_rows` says otherwise."""
        return self.part_rows or max(4096, PART_BYTES // self.row_bytes // 4096 * 4096)

    def store(self, vectors: NDArray[np.float32]) -> tuple[NDArray[Any], int]:
        """The stored rows of vectors[B, K], contiguous, and how many values int8 had to clip (else 0).

        Raises GembError for a value beyond float16.
        """
        clipped = 0
        stored: NDArray[Any]
        match self.dtype:
            case "f32":
                stored = vectors
            case "f16":
                stored = to_float16(vectors)
            case "bf16":
                stored = to_bfloat16(vectors)
            case "int8" if self.ranges is not None:
                stored, clipped = to_int8(vectors, self.ranges)
            case _:
                stored = to_binary(vectors)
        return np.ascontiguousarray(stored, dtype=self.stored_dtype), clipped

    def load(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """The float32 values[B, K] of stored rows: exact, but mid-step for int8, +1 and -1 for binary."""
        match self.dtype:
            case "bf16":
                return from_bfloat16(stored)
            case "int8" if self.ranges is not None:
                return from_int8(stored, self.ranges)
            case "binary":
                return from_binary(stored)
            case _:
                return stored.astype(np.float32)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A finished file: where it lies, its size and the SHA-256 of its bytes (hexadecimal)."""

    path: Path
    bytes: int
    sha256: str

    def as_json(self) -> dict[str, object]:
        """The line that `NAME.gemb.json` and a manifest keep under "files", and readers check against."""
        return {"file": self.path.name, "bytes": self.bytes, "sha256": self.sha256}


def kind_of(output: Path | str) -> Kind:
    """The format that an output's name asks for.

    "-" is a stream; a name that ends in "/", has no suffix or is an existing folder is a folder of parts.

    Raises GembError for a suffix that is no vector format.
    """
    if str(output) == "-":
        return "stream"
    path = Path(output)
    is_named_folder = str(output).endswith(("/", os.sep)) or not path.suffix
    if is_named_folder or SHARD_ENDING.fullmatch(path.suffix) or path.is_dir():
        return "shards"
    kind = KIND_OF_SUFFIX.get(path.suffix.lower())
    if kind is None:
        raise GembError(
            f"{output}: no vector format ends in {path.suffix}; the formats are {', '.join(KIND_OF_SUFFIX)}, "
            "a folder (a name that ends in /), and - for JSON lines on stdout"
        )
    return kind


def ids_path(output: Path | str) -> Path:
    """Where the ids of a matrix file lie, one a line: `docs.ids.txt` for `docs.npy`."""
    return Path(output).with_suffix(".ids.txt")


def ranges_path(output: Path | str) -> Path:
    """Where the int8 ranges [2, dims] of a file lie that cannot hold them: `docs.ranges.npy`."""
    return Path(output).with_suffix(".ranges.npy")


def output_files(output: Path | str, layout: Layout) -> list[Path]:
    """Every path that a finished job leaves, the main one last; nothing for a stream."""
    kind = kind_of(output)
    path = Path(output)
    match kind:
        case "stream":
            return []
        case "parquet" | "shards":
            return [path]
    files = [] if kind == "jsonl" else [ids_path(path)]
    if layout.dtype == "int8" and kind != "safetensors":
        files.append(ranges_path(path))
    return [*files, path]


def check_output(output: Path | str, layout: Layout) -> Kind:
    """The format of `output`, which can hold `layout`; to ask before the expensive part.

    Raises GembError where the format has no such type, or a folder holds files that are not gemb's.
    """
    kind = kind_of(output)
    path = Path(output)
    if kind == "parquet" and layout.dtype == "bf16":
        raise GembError(
            f"{output}: Parquet has no bf16; pass --dtype f16 or f32, or write .npy or .safetensors"
        )
    if kind == "fbin" and BIN_DTYPES[path.suffix.lower()] != layout.dtype:
        choices = ", ".join(f"{suffix} for {dtype}" for suffix, dtype in BIN_DTYPES.items())
        raise GembError(f"{output}: {path.suffix} cannot hold {layout.dtype}; write {choices}")
    if kind == "stream" and layout.dtype == "int8":
        raise GembError(
            "a stream has no place for the int8 ranges; write to a file, or stream another --dtype"
        )
    if kind == "shards" and path.exists():
        check_replaceable(path)
    return kind


def check_replaceable(folder: Path) -> None:
    """Raises GembError unless `folder` is empty or holds only what its manifest lists, and a job's record."""
    if not folder.is_dir():
        raise GembError(f"{folder} is a file; a folder of parts cannot take its place, choose another output")
    names = {entry.name for entry in folder.iterdir()}
    if not names:
        return
    if MANIFEST not in names or read_json(folder / MANIFEST).get("format") != SHARDS_FORMAT:
        raise GembError(f"{folder} is not empty and was not written by gemb; choose another output")
    manifest = read_json(folder / MANIFEST)
    strange = names - {MANIFEST, RECORD, *(entry["file"] for entry in manifest.get("files", []))}
    if strange:
        raise GembError(
            f"{folder} holds files that gemb did not write ({', '.join(sorted(strange)[:5])}); "
            "choose another output"
        )


def estimated_bytes(output: Path | str, layout: Layout, rows: int, id_bytes: int = 16) -> int:
    """About how much disk a job of `rows` rows needs until it is done, with ids of `id_bytes` each."""
    row = layout.row_bytes + id_bytes
    match kind_of(output):
        case "stream":
            return 0
        case "parquet":
            row *= 2  # the rows are kept apart until the file is built from them
        case "jsonl" if layout.encoding == "base64":
            row = layout.row_bytes * 4 // 3 + id_bytes + 24
        case "jsonl":
            row = layout.stored_width * (4 if layout.dtype in ("int8", "binary") else 13) + id_bytes + 24
    return rows * row

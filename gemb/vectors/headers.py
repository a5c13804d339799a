"""The bytes before the rows in `.npy`, `.safetensors` and `.fbin` files, written and read.

A header that is written has the same length for any number of rows, so that it can be put in place
after the rows have been appended. B rows, K dims, W numbers in a stored row.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from gemb.errors import GembError
from gemb.vectors.layout import BIN_DTYPES, STORED, DType, Kind, Layout
from gemb.vectors.quantise import Int8Ranges

NPY_HEADER_BYTES = 128
# bfloat16 is |V2, as ml_dtypes saves it: two raw bytes that nobody takes for integers by mistake.
NPY_DESCR: dict[DType, str] = {"f32": "<f4", "f16": "<f2", "bf16": "|V2", "int8": "|i1", "binary": "|u1"}
NPY_DTYPES: dict[str, DType] = {
    "f4": "f32", "f8": "f32", "f2": "f16", "V2": "bf16", "i1": "int8", "u1": "binary"
}  # fmt: skip
SAFETENSORS_DTYPES: dict[str, DType] = {
    "F32": "f32", "F16": "f16", "BF16": "bf16", "I8": "int8", "U8": "binary"
}  # fmt: skip
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
SAFETENSORS_HEADER_LIMIT = 100_000_000  # the safetensors library's own
TENSOR_NAMES = ("embeddings", "embedding", "vectors")
BIN_ROWS_LIMIT = 2**32 - 1
WIDEST_COUNT = 10**19
OWN_PREFIX = "gemb."


@dataclass(frozen=True, slots=True)
class Header:
    """What a matrix file says about its rows: [rows, width] numbers begin at byte `offset`."""

    rows: int
    width: int
    dtype: DType
    numbers: np.dtype[Any]
    offset: int
    column_major: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    ranges: Int8Ranges | None = None


def own_metadata(layout: Layout) -> dict[str, str]:
    """The caller's metadata and what a reader needs to know beside them."""
    own = {"gemb.format": "1", "gemb.dtype": layout.dtype, "gemb.dims": str(layout.dims)}
    return {**layout.metadata, **own}


def foreign_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The caller's metadata alone."""
    return {key: value for key, value in metadata.items() if not key.startswith(OWN_PREFIX)}


def header_bytes(kind: Kind, layout: Layout, rows: int) -> bytes:
    """The header of a file with `rows` rows; its length does not depend on `rows`.

    Raises GembError where the format cannot count that many.
    """
    match kind:
        case "npy":
            return npy_header(layout, rows)
        case "safetensors":
            return safetensors_header(layout, rows)
        case "fbin" if rows > BIN_ROWS_LIMIT:
            raise GembError(
                f"an .fbin file counts at most {BIN_ROWS_LIMIT} rows, not {rows}; write .npy or a folder"
            )
        case "fbin":
            return struct.pack("<II", rows, layout.stored_width)
    raise ValueError(f"{kind} files have no header")


def npy_header(layout: Layout, rows: int) -> bytes:
    """What numpy's own `save` writes, 128 bytes."""
    shape = f"({rows}, {layout.stored_width})"
    text = f"{{'descr': '{NPY_DESCR[layout.dtype]}', 'fortran_order': False, 'shape': {shape}, }}"
    length = NPY_HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", length) + text.encode().ljust(length - 1) + b"\n"


def safetensors_header(layout: Layout, rows: int) -> bytes:
    """The header and, for int8, the tensor "ranges"[2, K]; the tensor "embeddings"[B, W] follows."""
    ranges = b"" if layout.ranges is None else layout.ranges.as_array().tobytes()

    def described(count: int) -> bytes:
        value: dict[str, object] = {"__metadata__": own_metadata(layout)}
        if ranges:
            value["ranges"] = {"dtype": "F32", "shape": [2, layout.dims], "data_offsets": [0, len(ranges)]}
        value["embeddings"] = {
            "dtype": SAFETENSORS_NAMES[layout.dtype],
            "shape": [count, layout.stored_width],
            "data_offsets": [len(ranges), len(ranges) + count * layout.row_bytes],
        }
        return json.dumps(value, separators=(",", ":")).encode()

    # Room for the widest count; what follows begins at a multiple of 64, for mapped reading.
    length = -(-(8 + len(described(WIDEST_COUNT))) // 64) * 64 - 8
    return struct.pack("<Q", length) + described(rows).ljust(length) + ranges


def read_header(path: Path, kind: Kind) -> Header:
    """What the file at `path` says it holds, checked against its size.

    Raises GembError where it is no such file, or is cut off or longer than it says.
    """
    with path.open("rb") as file:
        match kind:
            case "npy":
                header = read_npy_header(path, file)
            case "safetensors":
                header = read_safetensors_header(path, file)
            case _:
                header = read_bin_header(path, file)
    needed = header.offset + header.rows * header.width * header.numbers.itemsize
    size = path.stat().st_size
    if size != needed:
        state = "cut off" if size < needed else "too long"
        raise GembError(
            f"{path} is {state}: {size} bytes, but {header.rows} rows of {header.width} {header.dtype} "
            f"need {needed}; write it again"
        )
    return header


def read_npy_header(path: Path, file: IO[bytes]) -> Header:
    """The header of an `.npy` file of any writer."""
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, column_major, numbers = read(file)
    except (ValueError, SyntaxError) as error:
        raise GembError(f"{path} is no .npy file: its header cannot be read; write it again") from error
    if len(shape) != 2:
        raise GembError(f"{path} holds an array of shape {list(shape)}, not [rows, dims]")
    dtype = NPY_DTYPES.get(numbers.str[1:])
    if dtype is None:
        raise GembError(
            f"{path} holds {numbers} numbers; vectors are float32, float16, bfloat16, int8 or uint8 bits"
        )
    stored = STORED["bf16"] if dtype == "bf16" else numbers
    rows, width = shape
    return Header(rows, width, dtype, stored, file.tell(), column_major)


def read_bin_header(path: Path, file: IO[bytes]) -> Header:
    """The two counts of an `.fbin`, `.i8bin` or `.u8bin` file."""
    start = file.read(8)
    if len(start) < 8:
        raise GembError(f"{path} is cut off: {len(start)} bytes, but its header alone has 8; write it again")
    dtype = BIN_DTYPES[path.suffix.lower()]
    rows, width = struct.unpack("<II", start)
    return Header(rows, width, dtype, STORED[dtype], 8)


def read_safetensors_header(path: Path, file: IO[bytes]) -> Header:
    """The matrix of a safetensors file ("embeddings", or the only tensor), and the int8 ranges beside it."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(SAFETENSORS_HEADER_LIMIT, path.stat().st_size - 8):
        raise GembError(f"{path} is no safetensors file, or cut off in its header; write it again")
    try:
        tensors = json.loads(file.read(length))
        metadata = tensors.pop("__metadata__", {})
        others = [name for name in tensors if name != "ranges"]
        name = next(
            (name for name in TENSOR_NAMES if name in tensors), others[0] if len(others) == 1 else None
        )
        if name is None:
            raise GembError(
                f'{path} has no tensor "embeddings"; it has {", ".join(sorted(tensors)) or "none"}'
            )
        tensor = tensors[name]
        dtype = SAFETENSORS_DTYPES.get(tensor["dtype"])
        shape = tensor["shape"]
        begin = tensor["data_offsets"][0]
        if begin != max(other["data_offsets"][0] for other in tensors.values()):
            raise GembError(
                f'{path}: tensor "{name}" is not the last one in the file; keep it in a file of its own'
            )
        if len(shape) != 2 or dtype is None:
            raise GembError(
                f'{path}: tensor "{name}" is {tensor["dtype"]} of shape {shape}, not [rows, dims]'
            )
        ranges = None
        if dtype == "int8" and "ranges" in tensors:
            file.seek(8 + length + tensors["ranges"]["data_offsets"][0])
            values = np.frombuffer(file.read(8 * shape[1]), dtype="<f4")
            ranges = Int8Ranges.from_array(values.reshape(2, shape[1]))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise GembError(
            f"{path} is no safetensors file: its header cannot be read; write it again"
        ) from error
    rows, width = shape
    return Header(rows, width, dtype, STORED[dtype], 8 + length + begin, metadata=metadata, ranges=ranges)

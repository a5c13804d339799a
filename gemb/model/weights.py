"""The tensors of a safetensors file set, listed without loading and mapped one by one.

Headers are parsed here, with every rule of the format checked, so that a damaged file is told by name
before anything expensive starts. Bytes reach torch only in `Weights.tensor`.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from gemb.errors import MismatchError, UnavailableError
from gemb.files import file_digest, read_json

if TYPE_CHECKING:
    import torch

    from gemb.model.table import Table

ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one element by safetensors dtype name."""

DTYPE_NAMES: Mapping[str, str] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""The name people use for a safetensors dtype; others are shown as they stand."""

QUANTISED: Mapping[str, str] = {
    "Q4_0": "int4 in blocks of 32",
    "Q8_0": "int8 in blocks of 32",
    "INT4_ROW": "int4 with a scale a row",
    "INT8_ROW": "int8 with a scale a row",
}
"""The dtypes of tensors on an integer grid, in words; they are no dtypes of safetensors."""

_HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors format itself
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SINGLE = "model.safetensors"
_SHARDED = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor as the header of its file declares it; `start` and `stop` are byte positions in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorSpec]:
    """The tensors of one safetensors file by name, in file order; nothing but the header is read.

    Raises UnavailableError if the file is missing, cut short or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length_bytes = file.read(8)
            length = struct.unpack("<Q", length_bytes)[0] if len(length_bytes) == 8 else -1
            if not 2 <= length <= _HEADER_LIMIT_BYTES:
                raise _damaged(path, f"its first 8 bytes give no header length ({size:,} bytes in all)")
            if size < 8 + length:
                raise _damaged(path, f"cut short at {size:,} bytes, inside its header of {length:,} bytes")
            text = file.read(length)
    except FileNotFoundError:
        raise UnavailableError(f"{path} does not exist; download the model again") from None
    except OSError as error:
        raise UnavailableError(f"{path} cannot be read: {error.strerror}") from error
    try:
        header = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")

    data_start = 8 + length
    specs: dict[str, TensorSpec] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            specs[name] = _spec(path, name, entry, data_start)
    end = max((spec.stop for spec in specs.values()), default=data_start)
    if size < end:
        raise _damaged(path, f"cut short at {size:,} of {end:,} bytes")
    if size > end:
        raise _damaged(path, f"{size:,} bytes long, but its tensors end at {end:,}")
    return specs


def _spec(path: Path, name: str, entry: dict[str, Any], data_start: int) -> TensorSpec:
    """One header entry, checked: the byte range must be exactly shape times element size."""
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        whole = all(isinstance(number, int) and number >= 0 for number in (*shape, start, stop))
    except (TypeError, KeyError, ValueError):
        raise _damaged(path, f"the header entry of {name} is not dtype, shape and data_offsets") from None
    if dtype not in ITEM_BYTES:
        raise _damaged(path, f"{name} has the unknown dtype {dtype!r}; known are {', '.join(ITEM_BYTES)}")
    if not whole or stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _damaged(path, f"{name} claims {stop - start:,} bytes for {dtype} {list(shape)}")
    return TensorSpec(name, dtype, shape, path, data_start + start, data_start + stop)


def _damaged(path: Path, what: str) -> UnavailableError:
    return UnavailableError(f"{path} is damaged: {what}; download or copy it again")


class Weights:
    """The tensors of one folder: names, shapes and dtypes at once, the numbers on demand.

    Every header has been read and checked; no tensor has been.
    """

    def __init__(self, folder: Path, files: tuple[Path, ...], specs: Mapping[str, TensorSpec]) -> None:
        self.folder = folder
        self.files = files
        self._specs = dict(specs)
        self._open: dict[Path, Any] = {}

    @classmethod
    def read(cls, folder: Path) -> "Weights":
        """The weights of `folder`: `model.safetensors`, or the shards that its index names.

        Raises UnavailableError if there are none, only pickles, a shard is missing, or a file is damaged.
        """
        index = folder / _SHARDED
        if (folder / _SINGLE).exists():
            files: tuple[Path, ...] = (folder / _SINGLE,)
        elif index.exists():
            files = _shards(index)
        else:
            raise _no_weights(folder)
        specs: dict[str, TensorSpec] = {}
        for file in files:
            for name, spec in read_header(file).items():
                if name in specs:
                    raise _damaged(file, f"{name} stands in {specs[name].file.name} too")
                specs[name] = spec
        if len(files) > 1:
            _check_index(index, specs)
        from gemb.model.grid_weights import RowWeights, is_packed

        return RowWeights(folder, files, specs) if is_packed(specs) else cls(folder, files, specs)

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    @property
    def stored(self) -> Mapping[str, TensorSpec]:
        """The tensors as they stand in the files: those of `spec`, or what makes up one of them."""
        return self._specs

    @property
    def is_quantised(self) -> bool:
        """Whether some tensors lie on an integer grid."""
        return any(spec.dtype in QUANTISED for spec in self._specs.values())

    def plain(self, what: str) -> "Weights":
        """These weights. Raises MismatchError if some lie on an integer grid, and `what` needs floats."""
        if self.is_quantised:
            raise MismatchError(
                f"{self.files[0]}: the weights are quantised ({self.dtype}), and {what}; "
                "turn them back with gemb quantize MODEL --format f32 -o PLAIN"
            )
        return self

    def verify(self) -> None:
        """Compare the files with the checksums that gemb.json of their model has, if it has some.

        Raises UnavailableError if one differs.
        """
        for file in self.files:
            record, expected = _recorded(file)
            if expected is not None and file_digest(file) != expected:
                raise UnavailableError(
                    f"{file} is damaged: its checksum is not the one in {record}; export or copy it again, "
                    f"or remove {record} if you changed the weights"
                )

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(spec.stop - spec.start for spec in self.stored.values())

    @property
    def parameters(self) -> int:
        """How many numbers all tensors hold together."""
        return sum(spec.elements for spec in self._specs.values())

    @property
    def dtype(self) -> str:
        """The dtype that most bytes have, by the name people use (`float32`, `bfloat16`)."""
        total: dict[str, int] = {}
        for spec in self._specs.values():
            total[spec.dtype] = total.get(spec.dtype, 0) + spec.stop - spec.start
        most = max(total, key=lambda name: total[name], default="F32")
        return DTYPE_NAMES.get(most, most.lower())

    def spec(self, name: str) -> TensorSpec:
        """What the header says of `name`. Raises MismatchError if there is no such tensor."""
        try:
            return self._specs[name]
        except KeyError:
            near = [have for have in self._specs if have.endswith(name.rpartition(".")[2])][:3]
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise MismatchError(f"{self._where()} has no tensor {name}{hint}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of `name`. Raises MismatchError if there is no such tensor."""
        return self.spec(name).shape

    def tensor(self, name: str) -> "torch.Tensor":
        """`name` as a torch tensor that is mapped from the file: only the pages used become resident.

        It must not be written to. Raises MismatchError if there is no such tensor.
        """
        return self._read(self.spec(name).file, name)

    def table(self, name: str) -> "Table":
        """The rows of `name`[V, D], mapped from the file.

        Raises MismatchError if there is no such tensor.
        """
        from gemb.model.table import PlainTable

        return PlainTable(self.tensor(name))

    def _read(self, file: Path, name: str) -> "torch.Tensor":
        from safetensors import SafetensorError, safe_open

        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            tensor: torch.Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(file, str(error)) from error
        return tensor

    def _where(self) -> str:
        return str(self.files[0]) if len(self.files) == 1 else f"{self.folder} ({len(self.files)} shards)"


def _recorded(file: Path) -> tuple[Path, str | None]:
    """The gemb.json of the model that has `file`, and the SHA-256 that it has for it."""
    above = file.parent.parent
    for folder in (file.parent, *([above] if (above / "modules.json").exists() else [])):
        record = folder / "gemb.json"
        told = read_json(record).get("files") if record.exists() else None
        name = file.relative_to(folder).as_posix()
        for entry in told if isinstance(told, list) else ():
            if isinstance(entry, dict) and entry.get("file") == name:
                return record, entry.get("sha256")
    return file, None


def has_safetensors(folder: Path) -> bool:
    """Whether `folder` has weights as safetensors, in one file or several."""
    return (folder / _SINGLE).exists() or (folder / _SHARDED).exists()


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that a `model.safetensors.index.json` names, in order of name; all must exist."""
    try:
        names = sorted(set(orjson.loads(index.read_bytes())["weight_map"].values()))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise _damaged(index, 'it has no "weight_map" of tensor to file') from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise _damaged(index, f"{name!r} is not the name of a file beside it")
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise UnavailableError(
            f"{index.parent} lacks {len(missing)} of its {len(names)} weight files: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; download the model again"
        )
    return tuple(index.parent / name for name in names)


def _check_index(index: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Every tensor of the index is in the shard that it names."""
    for name, file in orjson.loads(index.read_bytes())["weight_map"].items():
        if name not in specs or specs[name].file.name != file:
            raise _damaged(index, f"it puts {name} into {file}, which does not hold it")


def _no_weights(folder: Path) -> UnavailableError:
    """Why `folder` has no usable weights, and what to do."""
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return UnavailableError(
            f"{folder} has its weights only as pickle ({', '.join(pickles[:3])}), which can run code when "
            "loaded and which gemb never opens; convert it where you trust it: "
            "python -c \"from transformers import AutoModel; AutoModel.from_pretrained('"
            f"{folder}').save_pretrained('{folder}', safe_serialization=True)\""
        )
    if (folder / "adapter_config.json").exists():
        return UnavailableError(
            f"{folder} holds an adapter (adapter_config.json), not a whole model; "
            "merge it into its base model and save that folder"
        )
    others = sorted(path.name for pattern in ("*.gguf", "*.onnx") for path in folder.glob(pattern))
    there = f" (only {', '.join(others[:3])})" if others else ""
    return UnavailableError(
        f"{folder} has no weights: no model.safetensors and no model.safetensors.index.json{there}; "
        "download the model again"
    )

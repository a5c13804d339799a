"""Weights on integer grids, read as if they were floats: a model.gguf, and transformers' packed Gemma layout.

Both give every tensor under the name that the plain folder has for it; `spec` tells how it is stored. A
tensor becomes float32 when it is read, a table of embeddings row by row (`gemb.model.table`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemb.errors import MismatchError
from gemb.model.weights import TensorSpec, Weights
from gemb.quantization.gguf_names import (
    NAMES_KEY,
    OWN_ARCHITECTURE,
    READ_ARCHITECTURES,
    from_gguf,
    part_of,
    shape_in_folder,
)
from gemb.quantization.gguf_reader import GgufFile, read_gguf

if TYPE_CHECKING:
    from torch import Tensor

    from gemb.model.table import Table
    from gemb.quantization.grids import Quantised, RowGrid

GGUF_FILE = "model.gguf"
"""What holds the weights of all modules of a folder in int4 or int8."""
_SCALE = "_scale"
_TABLE = "embedding_quantized"
_ROW_DTYPES: Mapping[str, tuple[str, int]] = {"U8": ("INT4_ROW", 2), "I8": ("INT8_ROW", 1)}
"""By the dtype in the file: our name of the grid, and how many codes are in a byte."""


class GgufWeights(Weights):
    """The tensors of one module in the model.gguf of its folder."""

    def __init__(self, folder: Path, file: GgufFile, specs: Mapping[str, TensorSpec]) -> None:
        super().__init__(folder, (file.path,), specs)
        self._file = file
        self._gguf_names = _names_of_part(file, folder.relative_to(file.path.parent))

    @classmethod
    def of_module(cls, path: Path, folder: Path) -> GgufWeights:
        """The tensors of the module in `folder`, which lies in that of the file `path`.

        Raises UnavailableError if the file is damaged, MismatchError if it is of another program.
        """
        state = path.stat()
        file = _opened(path, state.st_size, state.st_mtime_ns, state.st_ino)
        specs = {}
        for name, gguf_name in _names_of_part(file, folder.relative_to(path.parent)).items():
            stored = file.spec(gguf_name)
            shape = shape_in_folder(gguf_name, stored.shape, file.metadata)
            specs[name] = TensorSpec(name, stored.kind.name.upper(), shape, path, stored.start, stored.stop)
        return cls(folder, file, specs)

    @property
    def runs_in_llama_cpp(self) -> bool:
        """Whether llama.cpp computes the architecture that the file is written as."""
        return _architecture(self._file) != OWN_ARCHITECTURE

    def tensor(self, name: str) -> Tensor:
        """`name` in float32, as the plain folder has it. Raises MismatchError if there is no such tensor."""
        self.spec(name)
        own, metadata = self._gguf_names[name], self._file.metadata
        return from_gguf(_architecture(self._file), own, self._file.tensor(own), metadata)

    def table(self, name: str) -> Table:
        """The rows of `name`, dequantised as they are looked up."""
        from gemb.model.table import GridTable

        grid = self._file.spec(self._gguf_names[name]).kind.grid if name in self else None
        if grid is None:
            return super().table(name)

        def decode(rows: Tensor) -> Tensor:
            return grid.dequantise(grid.unpack(rows))

        return GridTable((self._file.rows(self._gguf_names[name]),), decode, self.spec(name).shape[-1])

    def verify(self) -> None:
        """Compare the file with the checksum it was written with. Raises UnavailableError if it differs."""
        self._file.verify()


class RowWeights(Weights):
    """Tensors of transformers' packed Gemma layout: whole numbers with one float32 scale a row."""

    def __init__(self, folder: Path, files: tuple[Path, ...], stored: Mapping[str, TensorSpec]) -> None:
        self._codes = dict(_packed(stored))
        hidden = {name for name in stored if name.endswith(_SCALE)} | set(self._codes.values())
        specs = {name: spec for name, spec in stored.items() if name not in hidden}
        for name, codes in self._codes.items():
            spec = stored[codes]
            grid, per_byte = _ROW_DTYPES[spec.dtype]
            shape = (*spec.shape[:-1], spec.shape[-1] * per_byte)
            specs[name] = TensorSpec(name, grid, shape, spec.file, spec.start, spec.stop)
        super().__init__(folder, files, specs)
        self._stored = dict(stored)

    @property
    def stored(self) -> Mapping[str, TensorSpec]:
        """The tensors as they stand in the files: codes, scales, and what is stored in floats."""
        return self._stored

    def tensor(self, name: str) -> Tensor:
        """`name`, in float32 where it lies on a grid.

        Raises MismatchError if there is no such tensor, or it was made for rounded activations.
        """
        spec = self.spec(name)
        if name not in self._codes:
            return super().tensor(name)
        self._check_activations(name)
        grid, codes, scales = self._parts(name)
        return grid.dequantise(_quantised(grid, codes, scales, spec.shape[-1]))

    def table(self, name: str) -> Table:
        """The rows of `name`, dequantised as they are looked up."""
        from gemb.model.table import GridTable

        width = self.spec(name).shape[-1]
        if name not in self._codes:
            return super().table(name)
        grid, codes, scales = self._parts(name)

        def decode(some_codes: Tensor, some_scales: Tensor) -> Tensor:
            return grid.dequantise(_quantised(grid, some_codes, some_scales, width))

        return GridTable((codes, scales), decode, width)

    def _parts(self, name: str) -> tuple[RowGrid, Tensor, Tensor]:
        from gemb.quantization.grids import INT4_ROW, INT8_ROW

        grid = INT4_ROW if self.spec(name).dtype == "INT4_ROW" else INT8_ROW
        codes = self._codes[name]
        return grid, self._mapped(codes), self._mapped(_scale_of(codes))

    def _mapped(self, name: str) -> Tensor:
        return self._read(self._stored[name].file, name)

    def _check_activations(self, name: str) -> None:
        for kind in ("input", "output"):
            scale = f"{name.removesuffix('.weight')}.{kind}_activation_scale"
            if scale in self._stored and bool(self._mapped(scale)):
                raise MismatchError(
                    f"{self._stored[scale].file}: {scale} is {float(self._mapped(scale)):g}; the model "
                    "rounds its activations, which gemb does not do; use the model that it was made from"
                )


def is_packed(stored: Mapping[str, TensorSpec]) -> bool:
    """Whether tensors are in transformers' packed Gemma layout."""
    return any(True for _ in _packed(stored))


def _packed(stored: Mapping[str, TensorSpec]) -> Iterator[tuple[str, str]]:
    """The name of each packed tensor in the plain folder, and of its codes in this one."""
    for name, spec in stored.items():
        scale = stored.get(_scale_of(name))
        if spec.dtype in _ROW_DTYPES and scale is not None and scale.shape == (*spec.shape[:-1], 1):
            yield name.removesuffix(_TABLE) + "weight" if name.endswith(_TABLE) else name, name


def _scale_of(codes: str) -> str:
    return f"{codes.removesuffix(_TABLE)}embedding{_SCALE}" if codes.endswith(_TABLE) else f"{codes}{_SCALE}"


def _quantised(grid: RowGrid, codes: Tensor, scales: Tensor, width: int) -> Quantised:
    from gemb.quantization.grids import Quantised

    return Quantised(grid.unpack(codes, width), scales)


@lru_cache(maxsize=4)
def _opened(path: Path, *_state: int) -> GgufFile:
    """The file, its header read once a process: a vocabulary stands in it. The checksum is compared later."""
    return read_gguf(path, verify=False)


def _names_of_part(file: GgufFile, part: Path) -> dict[str, str]:
    """The tensors of a module: by the name in the plain folder, that in the file."""
    names: Any = file.metadata.get(NAMES_KEY)
    if not isinstance(names, list) or len(names) != len(file.tensors):
        raise MismatchError(
            f"{file.path} was not written by gemb: it has no {NAMES_KEY} for its {len(file.tensors)} "
            "tensors; put model.safetensors of the model into the folder instead"
        )
    found, wanted = {}, part.as_posix()
    for full_name, gguf_name in zip(names, file.tensors, strict=True):
        own_part, name = part_of(full_name)
        if (own_part or ".") == wanted:
            found[name] = gguf_name
    return found


def _architecture(file: GgufFile) -> str:
    architecture = file.metadata.get("general.architecture")
    if architecture not in READ_ARCHITECTURES:
        raise MismatchError(
            f"{file.path} is of the architecture {architecture!r}; "
            f"gemb reads {', '.join(sorted(READ_ARCHITECTURES))}"
        )
    return str(architecture)

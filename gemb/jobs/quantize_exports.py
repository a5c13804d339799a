"""The ways to write a model anew: as model.gguf, in transformers' packed layout, or as plain safetensors.

Each gives an `Export`: what is told beforehand, and how the folder is written. The job proves what was
written and keeps it or not (`gemb.jobs.quantize`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gemb.errors import MismatchError
from gemb.files import read_json, write_json
from gemb.model.folder import DenseSettings, ModelFolder
from gemb.model.grid_weights import GGUF_FILE
from gemb.model.tensor_file import NewTensor, write_tensors
from gemb.model.weights import ITEM_BYTES, Weights
from gemb.quantization.formats import WeightFormat

if TYPE_CHECKING:
    from torch import Tensor

    from gemb.quantization.gguf_models import GgufForm
    from gemb.quantization.grids import Grid, RowGrid

Format = Literal["int8", "int4", "mixed", "unquantized", "bf16", "f32"]
GgufType = Literal["q4_0", "q8_0", "bf16", "f16", "f32"]
OnTensor = Callable[[str], None]

_ROWS_AT_ONCE = 4096  # of a table: 13 MB at 768 wide
_FLOATS: Mapping[str, str] = {"f32": "F32", "bf16": "BF16"}
_KINDS: Mapping[str, str] = {"int4": "q4_0", "int8": "q8_0"}
_WIDER = "bf16 or f32"
_WITHOUT_LLAMA_CPP = (
    "leave --gguf out for a folder that gemb runs (--format int8), or take --onnx int8 for onnxruntime"
)
# Heads that no vector depends on; llama.cpp has no place for them.
_HEADS = re.compile(r"(^|\.)(pooler|cls|lm_head|vocab_transform|vocab_projector|vocab_layer_norm)\.")
_INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})


@dataclass(frozen=True)
class Export:
    """One way to write a model."""

    label: str
    """As the user asked for it: int4, gguf q8_0."""
    grid: WeightFormat | None
    """The grid that its weights lie on; None for floats."""
    rows: Sequence[tuple[str, str]]
    """Label and value of what is worth telling."""
    size_bytes: int
    """Of the weights."""
    weights: int
    """How many numbers there are."""
    write: Callable[[Path, OnTensor], None] = field(repr=False)
    """Writes the weights into a folder that has all other files of the model."""

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file a weight."""
        return self.size_bytes * 8 / self.weights


@dataclass(frozen=True)
class _Stored:
    """One tensor of the source."""

    part: str
    """The folder of its module, relative to the model; "" for the model's own."""
    name: str
    weights: Weights

    @property
    def full(self) -> str:
        """Its name in messages."""
        return f"{self.part}/{self.name}" if self.part else self.name

    @property
    def origin(self) -> str:
        """Its file and name, for messages."""
        return f"{self.weights.spec(self.name).file}: {self.full}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights.shape(self.name)

    @property
    def is_number(self) -> bool:
        """Whether it holds numbers of the model, not positions and the like."""
        return self.weights.spec(self.name).dtype not in _INTEGERS

    def tensor(self) -> Tensor:
        return self.weights.tensor(self.name)

    def blocks(self) -> Iterator[Tensor]:
        """float32, in blocks of rows where it is a table of tokens."""
        import torch

        if not self.is_table:
            yield self.tensor().float()
            return
        table = self.weights.table(self.name)
        for start in range(0, self.shape[0], _ROWS_AT_ONCE):
            yield table.rows(torch.arange(start, min(start + _ROWS_AT_ONCE, self.shape[0])))

    @property
    def is_table(self) -> bool:
        from gemb.quantization.roles import role_of

        return role_of(self.name, self.shape) == "embedding"


def plain_export(folder: ModelFolder, wanted: Format, grid: WeightFormat | None) -> Export:
    """The model in floats: f32, bf16, or, as `unquantized`, f32 moved onto `grid`.

    Raises MismatchError for rows that the grid cannot hold.
    """
    dtype = _FLOATS.get(wanted, "F32")
    tensors = _tensors(folder)
    grids = {} if grid is None else _grids(tensors, grid)
    if grid is not None:
        _check_widths(tensors, grids, grid)

    def entry(one: _Stored) -> NewTensor:
        own = one.weights.spec(one.name).dtype
        if not one.is_number:
            return NewTensor(one.name, own, one.shape, lambda: [one.tensor()])
        return NewTensor(one.name, dtype, one.shape, partial(_floats, one, dtype, grids.get(one.full)))

    def write(place: Path, on_tensor: OnTensor) -> None:
        for part, entries in _by_part(tensors, entry).items():
            write_tensors(place / part / "model.safetensors", entries, on_tensor)
        _rewrite_config(folder, place, "float32" if dtype == "F32" else "bfloat16", None)

    numbers = [one for one in tensors if one.is_number]
    weights = sum(math.prod(one.shape) for one in numbers)
    told = [("weights", f"{'float32' if dtype == 'F32' else 'bfloat16'}, plain safetensors")]
    if grid is not None:
        told.append(("grid", f"{len(grids)} of {len(numbers)} tensors moved onto that of {grid}"))
    return Export(wanted, grid, told, weights * ITEM_BYTES[dtype], weights, write)


def packed_export(folder: ModelFolder) -> Export:
    """The model with one scale a row, int4 and attention in int8: transformers' packed Gemma layout.

    Dense modules, which transformers has none of, are stored the same way. Raises MismatchError for rows of
    an odd number of int4 codes.
    """
    tensors = [one for one in _tensors(folder) if not _HEADS.search(one.name)]
    grids = _grids(tensors, "mixed")
    _check_widths(tensors, grids, "mixed")
    entries = {one.full: _packed(one, grids.get(one.full)) for one in tensors}
    sizes = [entry.size_bytes for each in entries.values() for entry in each]

    def write(place: Path, on_tensor: OnTensor) -> None:
        for part in dict.fromkeys(one.part for one in tensors):
            own = [entry for one in tensors if one.part == part for entry in entries[one.full]]
            write_tensors(place / part / "model.safetensors", own, on_tensor)
        backbone = [one for one in tensors if one.part == _part(folder, folder.transformer.folder)]
        _rewrite_config(folder, place, "float32", _packed_config(folder, backbone, grids))

    told = [
        ("weights", "transformers' packed layout, one scale a row: attention int8, the rest int4"),
        *_left_out(folder, tensors),
    ]
    weights = sum(math.prod(one.shape) for one in tensors if one.is_number)
    return Export("mixed", "mixed", told, sum(sizes), weights, write)


def gguf_export(folder: ModelFolder, wanted: Format | None, gguf: GgufType | None) -> Export:
    """The model as one model.gguf: of the type `gguf` for llama.cpp, or in int4 or int8 for gemb.

    The latter runs in llama.cpp as well where that computes the model; where not, it is told why.
    Raises MismatchError for rows that are no whole blocks, and, with `gguf`, for what llama.cpp cannot do.
    """
    from gemb.quantization.gguf_layout import F32, KINDS
    from gemb.quantization.gguf_models import gguf_form, own_form
    from gemb.quantization.gguf_names import NAMES_KEY, full_name, to_gguf
    from gemb.quantization.gguf_writer import GgufTensor, write_gguf
    from gemb.quantization.roles import role_of

    kind = KINDS[gguf or _KINDS[str(wanted)]]
    model = _described(folder)
    told: list[tuple[str, str]] = []
    try:
        form = gguf_form(model, kind)
        alone = f"llama.cpp as {form.architecture}"
        runs_in = [("runs in", f"gemb, and alone in {alone}" if gguf is None else alone)]
    except MismatchError as reason:
        if gguf is not None:
            raise MismatchError(f"{reason}; {_WITHOUT_LLAMA_CPP}") from None
        form = own_form(model, kind)
        runs_in = [("runs in", "gemb"), ("llama.cpp", f"no: {reason}")]
    tensors = [one for one in _tensors(folder) if one.is_number and not _HEADS.search(one.name)]
    grid: WeightFormat | None = {"q4_0": "int4", "q8_0": "int8"}.get(kind.name)  # type: ignore[assignment]
    if grid is not None:
        _check_widths(tensors, _grids(tensors, grid), grid)
    metadata = {**form.metadata, NAMES_KEY: [full_name(one.part, one.name) for one in tensors]}

    def entry(one: _Stored) -> GgufTensor:
        name = form.name_of(one.part, one.name)
        own = kind if role_of(one.name, one.shape) is not None else F32
        shape = _gguf_shape(form, name, one.shape)
        return GgufTensor(
            name,
            shape,
            own,
            lambda: to_gguf(form.architecture, name, one.tensor(), form.metadata),
            one.origin,
        )

    entries = [entry(one) for one in tensors]

    def write(place: Path, on_tensor: OnTensor) -> None:
        def told_of(tensor: GgufTensor) -> GgufTensor:
            def load() -> Tensor:
                on_tensor(tensor.name)
                return tensor.load()

            return replace(tensor, load=load)

        try:
            write_gguf(place / GGUF_FILE, metadata, [told_of(one) for one in entries])
        except MismatchError as error:  # a number that is too large for the kind
            raise MismatchError(f"{error}; take {_WIDER}") from None

    told.append(("weights", f"{kind.name} in {GGUF_FILE if gguf is None else 'one GGUF file'}"))
    told += runs_in
    told += _left_out(folder, tensors)
    size = sum(one.kind.size_bytes(one.shape) for one in entries)
    weights = sum(math.prod(one.shape) for one in entries)
    return Export(f"gguf {gguf}" if gguf else str(wanted), grid, told, size, weights, write)


# --- what the source holds


def _tensors(folder: ModelFolder) -> list[_Stored]:
    return [
        _Stored(_part(folder, module.folder), name, weights)
        for module in folder.modules
        if module.has_weights
        for weights in [module.weights()]
        for name in weights
    ]


def _by_part(tensors: Sequence[_Stored], entry: Callable[[_Stored], NewTensor]) -> dict[str, list[NewTensor]]:
    parts: dict[str, list[NewTensor]] = {}
    for one in tensors:
        parts.setdefault(one.part, []).append(entry(one))
    return parts


def _grids(tensors: Sequence[_Stored], grid: WeightFormat) -> dict[str, Grid]:
    """The grid of each tensor that does not stay in floats, by its name in messages."""
    from gemb.quantization.roles import grid_of, role_of

    roles = {one.full: role_of(one.name, one.shape) for one in tensors if one.is_number}
    return {name: grid_of(role, grid) for name, role in roles.items() if role is not None}


def _check_widths(tensors: Sequence[_Stored], grids: Mapping[str, Grid], wanted: WeightFormat) -> None:
    """Raises MismatchError if a grid cannot hold the rows of a tensor."""
    if not grids:
        raise MismatchError("no tensor of the model is one that goes onto a grid; take bf16 or f32")
    step = 2 if wanted == "mixed" else 32
    bad = [one for one in tensors if one.full in grids and one.shape[-1] % step]
    if wanted == "mixed":
        bad = [one for one in bad if grids[one.full].bits == 4]
    if bad:
        of = f"{wanted} stores " + ("two codes a byte" if step == 2 else "rows in blocks of 32")
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        others = "bf16 or f32" if step == 2 else "mixed, bf16 or f32"
        raise MismatchError(
            f"{bad[0].full}{more} cannot be quantised: {of}, but its rows are {bad[0].shape[-1]} wide; "
            f"take {others}"
        )


def _left_out(folder: ModelFolder, kept: Sequence[_Stored]) -> list[tuple[str, str]]:
    names = {one.full for one in kept}
    left = [one.full for one in _tensors(folder) if one.full not in names]
    if not left:
        return []
    shown = f"{', '.join(left[:3])}{', ...' if len(left) > 3 else ''}"
    return [("left out", f"{shown}: no vector depends on it")]


def _part(folder: ModelFolder, place: Path) -> str:
    relative = place.relative_to(folder.path).as_posix()
    return "" if relative == "." else relative


# --- floats


def _floats(one: _Stored, dtype: str, grid: Grid | None) -> Iterator[Tensor]:
    import torch

    for block in one.blocks():
        snapped = block if grid is None else grid.snap(block)
        if not bool(snapped.isfinite().all()):
            kind = "bf16" if grid is None else grid.name
            raise MismatchError(
                f"{one.origin}: its largest size is {float(block.abs().max()):g}, which {kind} cannot hold; "
                f"take {_WIDER}"
            )
        yield snapped if dtype == "F32" else snapped.to(torch.bfloat16)


def _rewrite_config(
    folder: ModelFolder, place: Path, dtype: str, quantization: Mapping[str, object] | None
) -> None:
    """Let config.json say what dtype and layout the weights have now; transformers loads them so."""
    file = place / _part(folder, folder.transformer.folder) / "config.json"
    config = read_json(file)
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) is not None:
                part[key] = dtype
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    write_json(file, config)


# --- transformers' packed layout


def _packed(one: _Stored, grid: Grid | None) -> list[NewTensor]:
    """Codes and scales of one tensor under the names of transformers; a tensor in floats as float32."""
    from gemb.quantization.grids import RowGrid

    if not one.is_number:
        return [NewTensor(one.name, one.weights.spec(one.name).dtype, one.shape, lambda: [one.tensor()])]
    if not isinstance(grid, RowGrid):
        return [NewTensor(one.name, "F32", one.shape, partial(_floats, one, "F32", None))]
    rows, width = one.shape
    codes, scales = one.name, f"{one.name}_scale"
    if one.is_table:
        stem = one.name.removesuffix("weight")
        codes, scales = f"{stem}embedding_quantized", f"{stem}embedding_scale"
    shape = (rows, width if grid.bits == 8 else width // 2)
    dtype = "I8" if grid.bits == 8 else "U8"
    entries = [
        NewTensor(codes, dtype, shape, partial(_codes, one, grid)),
        NewTensor(scales, "F32", (rows, 1), partial(_scales, one, grid)),
    ]
    if not one.is_table and not one.part:
        entries += [_no_activation_scale(one, side) for side in ("input", "output")]
    return entries


def _no_activation_scale(one: _Stored, side: str) -> NewTensor:
    """A scale of 0: transformers then leaves activations as they are, and misses it otherwise."""
    import torch

    name = f"{one.name.removesuffix('.weight')}.{side}_activation_scale"
    return NewTensor(name, "F32", (), lambda: [torch.zeros(())])


def _codes(one: _Stored, grid: RowGrid) -> Iterator[Tensor]:
    for block in _floats(one, "F32", None):
        yield grid.pack(grid.quantise(block).codes)


def _scales(one: _Stored, grid: RowGrid) -> Iterator[Tensor]:
    for block in _floats(one, "F32", None):
        yield grid.quantise(block).scales


def _packed_config(
    folder: ModelFolder, backbone: Sequence[_Stored], grids: Mapping[str, Grid]
) -> dict[str, object]:
    """`quantization_config` of config.json: which modules of the backbone have how many bits."""
    prefix = _prefix(backbone)

    def module(one: _Stored) -> str:
        return re.sub(r"\.\d+\.", r".\\d+.", one.name.removeprefix(prefix).removesuffix(".weight"))

    in_8_bits = {module(one) for one in backbone if one.full in grids and grids[one.full].bits == 8}
    in_floats = {
        one.name.removeprefix(prefix).removesuffix(".weight")
        for one in backbone
        if one.full not in grids and len(one.shape) == 2 and one.is_number
    }
    return {
        "quant_method": "gemma",
        "num_bits": 4,
        "quantize_embeddings": True,
        "module_quant_configs": {f"{name}$": {"num_bits": 8} for name in sorted(in_8_bits)},
        "modules_to_not_convert": [*sorted(in_floats), "pooler"],
    }


# --- GGUF


def _described(folder: ModelFolder) -> Any:  # noqa: ANN401  # a GgufModel, whose module loads torch
    """What a GGUF file tells of the model."""
    from gemb.quantization.gguf_models import GgufDense, GgufModel

    backbone = [one for one in _tensors(folder) if one.part == _part(folder, folder.transformer.folder)]
    tokenizer = folder.tokenizer_folder / "tokenizer.json"
    text = dict(folder.text_config)
    dense = [
        GgufDense(
            _part(folder, module.folder),
            module.settings.in_features,
            module.settings.out_features,
            not module.settings.bias
            and not module.settings.residual
            and module.settings.activation == "Identity",
        )
        for module in folder.modules
        if isinstance(module.settings, DenseSettings)
    ]
    return GgufModel(
        name=folder.path.resolve().name,
        config={"model_type": folder.family, **text},
        tokenizer=read_json(tokenizer) if tokenizer.exists() else {},
        lower_cases=folder.do_lower_case,
        prefix=_prefix(backbone),
        part=_part(folder, folder.transformer.folder),
        pooling=folder.pooling.modes,
        pools_prompt=folder.pooling.include_prompt,
        dense=dense,
        others=[m.kind for m in folder.modules if m.kind == "layer_norm"],
        max_tokens=folder.max_tokens,
        prompts=folder.prompts,
        default_prompt=folder.default_prompt,
    )


def _prefix(backbone: Sequence[_Stored]) -> str:
    """What stands before the usual names of the backbone's tensors."""
    for one in backbone:
        match = re.fullmatch(r"(.*?)(embed_tokens|embeddings\.(word|tok)_embeddings)\.weight", one.name)
        if match is not None:
            return match[1]
    return ""


def _gguf_shape(form: GgufForm, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    from gemb.quantization.gguf_names import ROWS_CUT_KEY

    cut = form.metadata.get(ROWS_CUT_KEY, 0) if name == "position_embd.weight" else 0
    return (shape[0] - cut, *shape[1:]) if isinstance(cut, int) and cut else shape

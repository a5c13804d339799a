"""`gemb quantize`: a model in fewer bits, or as a file that runs elsewhere, compared with its source.

    report = run(QuantizeRecipe(model="runs/encoder", output=Path("encoder-int8"), format="int8"))

How weights are written is told in `gemb.jobs.quantize_exports`, how the export is measured in
`gemb.jobs.quantize_gate`; see docs/quantize.md. The output appears whole or not at all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import yaml
from pydantic import Field

from gemb.device import all_devices, pick
from gemb.engine.encoder import Encoder
from gemb.engine.opening import stdout_guarded
from gemb.errors import GembError
from gemb.evaluation import Task
from gemb.evaluation.reading import Choices, read_task
from gemb.files import (
    atomic_write,
    check_writable,
    file_digest,
    readable_bytes,
    write_json,
)
from gemb.jobs.quantize_exports import Export, Format, GgufType, gguf_export, packed_export, plain_export
from gemb.jobs.quantize_gate import Gate, Measured, measure
from gemb.jobs.quantize_onnx import OnnxWeights, check_onnx, with_graph
from gemb.jobs.quantize_source import History
from gemb.jobs.record import versions
from gemb.model.folder import ModelFolder, fingerprint, read_folder
from gemb.model.grid_weights import GGUF_FILE
from gemb.model.hub import find_model
from gemb.quantization.formats import WeightFormat
from gemb.recipe import ModelName, Recipe, RecipeInput, RecipePath, resolved
from gemb.report import Event, OnProgress, Plan, Report, Table, ignore

__all__ = ["QuantizeRecipe", "plan", "run"]

VERSION = 1
"""Of the gemb.json in an exported folder."""
_DEFAULT: Format = "int8"
_SOURCE = "the source"
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".gguf", ".onnx", ".onnx_data"})


class QuantizeRecipe(Recipe):
    """What `gemb quantize` is asked to do."""

    kind: ClassVar[str] = "quantize"

    model: ModelName | None = None
    """The model: a folder, or a name on the Hugging Face hub."""
    output: RecipePath | None = None
    """The folder of the new model; with `gguf` the file, which ends in .gguf."""
    format: Format | None = None
    """How weights are stored: int8 or int4 in blocks of 32; mixed with a scale a row, attention int8, the
    rest int4; unquantized as fp32 moved onto a grid; bf16 or f32. int8 by default."""
    grid: WeightFormat | None = None
    """The grid of `unquantized`; by default the one that the model was trained for, or int4."""
    gguf: GgufType | None = None
    """Write one GGUF file of this type for llama.cpp and what is built on it, instead of a folder."""
    onnx: OnnxWeights | None = None
    """Put an ONNX graph with weights of this kind into the folder, for onnxruntime, transformers.js, TEI and
    fastembed; the folder's own weights are the same numbers."""
    eval: tuple[RecipeInput, ...] = ()
    """Data sets as of `gemb eval` on which export and source are compared."""
    max_drop: float | None = Field(default=None, ge=0)
    """The largest loss that is allowed: of the mean main metric on the data of `eval`, or without them of the
    median cosine of probe texts; when more is lost, nothing is kept and the exit code is 8."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps; several with commas."""
    threads: int | None = Field(default=None, ge=1)
    """Processor threads; by default all that this process may use."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """What random choices in evaluation follow from."""
    offline: bool = False
    """Never open a connection; a model that is not on this machine is an error."""


@dataclass(frozen=True)
class _Setup:
    """A recipe with its model opened and its export planned."""

    recipe: QuantizeRecipe
    output: Path
    source: ModelFolder
    export: Export
    history: History
    tasks: Sequence[Task]

    @property
    def is_file(self) -> bool:
        """Whether the output is one GGUF file, not a folder."""
        return self.recipe.gguf is not None

    @property
    def trained_grid(self) -> WeightFormat | None:
        """The grid on which the source is compared: that it was trained for, unless the export has floats."""
        return None if self.export.grid is None else self.history.trained_for


def plan(recipe: QuantizeRecipe) -> Plan:
    """What `run` would write, for --dry-run; headers, configs and a few rows are read, nothing is written.

    Raises GembError as `run` does before it writes.
    """
    setup = _prepare(recipe, ignore)
    export = setup.export
    return Plan(
        title=f"would write {setup.recipe.model} as {export.label} to {setup.output}",
        rows=[*_size_rows(setup), *export.rows],
        data={
            "source": str(setup.source.path),
            "output": str(setup.output),
            "format": export.label,
            "bytes": export.size_bytes,
            "bits_per_weight": export.bits_per_weight,
            "recipe": resolved(recipe),
        },
        outputs=[setup.output],
    )


def run(recipe: QuantizeRecipe, on_progress: OnProgress = ignore) -> Report:
    """Write the export, read it back, and compare it with its source.

    Raises GembError for an output that exists, MismatchError for what the format cannot hold,
    UnavailableError for a model that cannot be had or is damaged, MachineError where the disk is full,
    GateError (8) where more than `max_drop` is lost; then there is no output.
    """
    began = time.monotonic()
    setup = _prepare(recipe, on_progress)
    made_from = fingerprint(setup.source)  # reads all of it once: damage and NaN are told before the work
    with _output(setup) as place:
        _write(setup, place, on_progress)
        gate = Gate(
            setup.tasks,
            _measured_source(setup, on_progress),
            _measured(setup, place, "the export", on_progress),
        )
        gate.check(setup.export.label, recipe.max_drop)
        identity = fingerprint(read_folder(place))
        report = _report(setup, gate, made_from, identity, place, time.monotonic() - began)
        write_json(place / "gemb.json", {"version": VERSION, **_trained(setup), **report.data})
        _write_card(place, setup, gate, report)
    return report


def _prepare(recipe: QuantizeRecipe, on_progress: OnProgress) -> _Setup:
    """Everything that can be known before the first tensor is read."""
    if recipe.model is None:
        raise GembError("no model given; name one, such as gemb quantize runs/encoder -o encoder-int8")
    if recipe.output is None:
        raise GembError("no output given; pass -o FOLDER, or with --gguf -o NAME.gguf")
    _check_choices(recipe, recipe.output)
    for device in all_devices(recipe.device):
        pick(device, "fp32", recipe.threads)

    def tell(line: str) -> None:
        on_progress(Event("opening", 0, note=line))

    source = read_folder(find_model(recipe.model, offline=recipe.offline, announce=tell))
    history = History.of(source)
    choices = Choices(None, None, None, seed=recipe.seed)
    tasks = [read_task(Path(name), choices) for name in recipe.eval]
    export = _export(recipe, source, history.trained_for)
    copies = 1 if recipe.onnx is None else 2  # the graph has the weights once more
    check_writable(recipe.output, copies * export.size_bytes)
    return _Setup(recipe, recipe.output, source, export, history, tasks)


def _check_choices(recipe: QuantizeRecipe, output: Path) -> None:
    """Raises GembError for choices that exclude each other, and for an output that is there."""
    if recipe.gguf is not None and recipe.format is not None:
        raise GembError(
            f"format {recipe.format} gives a folder and gguf {recipe.gguf} a file; give one of them"
        )
    if recipe.onnx is not None:
        if recipe.gguf is not None:
            raise GembError("onnx gives a folder and gguf a file; give one of them")
        check_onnx(recipe.onnx, recipe.format)
    if recipe.grid is not None and recipe.format != "unquantized":
        raise GembError(f"grid {recipe.grid} is that of --format unquantized, which is not given")
    if recipe.gguf is not None and output.suffix != ".gguf":
        raise GembError(f"{output} does not end in .gguf; --gguf writes one file, such as {output}.gguf")
    if recipe.gguf is None and output.suffix == ".gguf":
        raise GembError(f"{output} is the name of a file; pass --gguf q8_0 for one, or the name of a folder")
    is_empty_folder = output.is_dir() and not any(output.iterdir()) and recipe.gguf is None
    if output.is_symlink() or (output.exists() and not is_empty_folder):
        raise GembError(f"{output} exists; choose another path for the model, or move it away")


def _export(recipe: QuantizeRecipe, source: ModelFolder, trained_for: WeightFormat | None) -> Export:
    """The export that the recipe asks for."""
    if recipe.onnx is not None:
        without = recipe.model_copy(update={"onnx": None, "format": recipe.onnx})
        return with_graph(_export(without, source, trained_for), source, recipe.onnx)
    wanted = recipe.format or _DEFAULT
    if recipe.gguf is not None:
        return gguf_export(source, None, recipe.gguf)
    if wanted in ("int4", "int8"):
        return gguf_export(source, wanted, None)
    if wanted == "mixed":
        return packed_export(source)
    if wanted != "unquantized":
        return plain_export(source, wanted, None)
    return plain_export(source, wanted, recipe.grid or trained_for or "int4")


def _trained(setup: _Setup) -> dict[str, object]:
    grid = setup.history.trained_for
    return {} if grid is None else {"qat": {"format": grid}}


@contextmanager
def _output(setup: _Setup) -> Iterator[Path]:
    """A folder to write into, which becomes the output when the block ends well, and goes away otherwise.

    Of a GGUF file only that is kept, with the record of the folder beside it.
    """
    from gemb.model.trainable.saving import appearing, unfinished

    if not setup.is_file:
        with appearing(setup.output) as place:
            yield place
        return
    target = setup.output
    with unfinished(target) as place:
        yield place
        os.replace(place / "gemb.json", target.with_name(target.name + ".gemb.json"))
        os.replace(place / GGUF_FILE, target)


def _write(setup: _Setup, place: Path, on_progress: OnProgress) -> None:
    """A whole model folder at `place`: the small files of the source, the weights anew."""
    import torch

    from gemb.model.trainable.saving import copy_files

    source = setup.source
    done = 0

    def tell(_: str) -> None:
        nonlocal done
        done += 1
        on_progress(Event("writing", done, unit="tensors"))

    for each in {source.path, source.tokenizer_folder, *(module.folder for module in source.modules)}:
        copy_files(each, place / each.relative_to(source.path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the work waits for memory: a second thread only spins
    try:
        setup.export.write(place, tell)
    finally:
        torch.set_num_threads(threads)


def _measured_source(setup: _Setup, on_progress: OnProgress) -> Measured:
    """The source as it was trained: on its grid if there is one, since nobody scored its floats."""
    from gemb.model.trainable.saving import unfinished

    grid = setup.trained_grid
    if grid is None:
        return _measured(setup, setup.source.path, _SOURCE, on_progress)
    on_grid = replace(setup, export=plain_export(setup.source, "unquantized", grid))
    with unfinished(setup.output) as place:
        _write(on_grid, place, on_progress)
        return _measured(on_grid, place, _SOURCE, on_progress)


def _measured(setup: _Setup, folder: Path, name: str, on_progress: OnProgress) -> Measured:
    recipe = setup.recipe
    runs_graph = recipe.onnx is not None and name != _SOURCE
    with stdout_guarded():
        encoder = Encoder.load(
            folder,
            device="cpu" if runs_graph else recipe.device,
            threads=recipe.threads,
            precision="fp32",
            offline=True,
            engine="onnx" if runs_graph else "torch",
        )
    with closing(encoder):
        return measure(encoder, name, setup.tasks, on_progress)


# --- what is told


def _size_rows(setup: _Setup) -> list[tuple[str, str]]:
    export = setup.export
    before = sum(module.weights().size_bytes for module in setup.source.modules if module.has_weights)
    size = f"{readable_bytes(export.size_bytes)}, {export.bits_per_weight:.2f} bits a weight"
    return [
        ("source", f"{setup.recipe.model} ({readable_bytes(before)})"),
        ("size", f"{size} ({export.size_bytes / before:.2f} of the source), tokenizer aside"),
    ]


def _report(setup: _Setup, gate: Gate, made_from: str, identity: str, place: Path, seconds: float) -> Report:
    export = setup.export
    rows = [*_size_rows(setup), *export.rows]
    if setup.trained_grid is not None:
        rows.append(("compared", f"with the source on the grid of {setup.trained_grid}, as it was trained"))
    rows += gate.rows
    if gate.tasks:
        rows.append(("score", f"{gate.export.mean:.4f}, the source {gate.source.mean:.4f}"))
    data: dict[str, object] = {
        "output": str(setup.output),
        "fingerprint": identity,
        "format": export.label,
        "grid": export.grid,
        "bytes": export.size_bytes,
        "bits_per_weight": export.bits_per_weight,
        "source": {"model": str(setup.source.path), "fingerprint": made_from},
        "gate": gate.data,
        "files": [_checksum(file, setup, place) for file in _weight_files(place)],
        "seconds": round(seconds, 3),
        "recipe": resolved(setup.recipe),
        "versions": versions(),
    }
    lost = f"the median cosine to the source is {gate.cosine_median:.5f}, the minimum {gate.cosine_min:.5f}"
    warning = setup.history.warning(
        export.grid, gguf=setup.is_file, onnx=setup.recipe.onnx is not None, lost=lost
    )
    if warning is not None:
        rows.append(("warning", warning))
        data["warnings"] = [warning]
    rows.append(("model", f"{setup.output} ({identity[:12]})"))
    return Report(
        title=f"wrote {setup.recipe.model} as {export.label} to {setup.output} in {seconds:.1f} s",
        rows=rows,
        data=data,
        tables=gate.tables,
        outputs=[setup.output],
    )


def _weight_files(place: Path) -> list[Path]:
    return sorted(file for file in place.rglob("*") if file.suffix in _WEIGHT_SUFFIXES)


def _checksum(file: Path, setup: _Setup, place: Path) -> dict[str, object]:
    name = setup.output.name if setup.is_file else str(file.relative_to(place))
    return {"file": name, "bytes": file.stat().st_size, "sha256": file_digest(file)}


def _write_card(place: Path, setup: _Setup, gate: Gate, report: Report) -> None:
    """README.md: what was written from what, and what it lost."""
    name = setup.output.name
    head = yaml.safe_dump(
        {
            "library_name": "sentence-transformers",
            "pipeline_tag": "sentence-similarity",
            "tags": ["sentence-similarity", "feature-extraction", "gemb", "quantized"],
            "base_model": [setup.recipe.model],
            "base_model_relation": "quantized",
        },
        sort_keys=False,
    )
    lost = Table(
        ("against its source", ""),
        [
            ["cosine, median", f"{gate.cosine_median:.6f}"],
            ["cosine, minimum", f"{gate.cosine_min:.6f}"],
            ["top-10 overlap", f"{gate.overlap:.3f}"],
        ],
    )
    parts = [
        f"---\n{head}---",
        f"# {name}",
        f"{setup.recipe.model} as {setup.export.label}, written with gemb {versions()['gemb']}. "
        f"Use it as the model that it was made from: `gemb embed texts.jsonl -m {name} -o vectors.npy`.",
        "\n".join(f"- {label}: {value}" for label, value in report.rows),
        *("\n".join(_markdown(table)) for table in (lost, *gate.tables)),
        "The licence of the source applies to this model as well.",
    ]
    with atomic_write(place / "README.md") as file:
        file.write(("\n\n".join(parts) + "\n").encode())


def _markdown(table: Table) -> list[str]:
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    return [f"| {' | '.join(row)} |" for row in rows]

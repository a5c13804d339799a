"""What a model is, what an output of `gemb embed` holds, or what an index is: read, never changed.

A model is told from its JSON files and the headers of its weights; its tensors are read once, for the
fingerprint, and not again while they stay as they are.
"""

from pathlib import Path

from gemb.engine.onnx_engine import find_graph, is_installed
from gemb.engine.opening import graph_for_few_texts
from gemb.files import read_json, readable_bytes
from gemb.jobs.index_info import describe_index, is_index
from gemb.jobs.quantize_source import trained_for
from gemb.model.attention import describe, is_bidirectional, reach_of_layers
from gemb.model.folder import DenseSettings, ModelFolder, fingerprint, read_folder
from gemb.model.grid_weights import GGUF_FILE, GgufWeights
from gemb.model.hub import find_model
from gemb.model.weights import QUANTISED
from gemb.report import Event, OnProgress, Report, counted, ignore
from gemb.text.prompts import Prompts

SHOWN_DIGITS = 12
"""How much of a fingerprint people see."""

# Tables with a row a token: looked up, not multiplied with.
_TABLES = (
    "word_embeddings.weight", "embed_tokens.weight", "tok_embeddings.weight", "wte.weight", "shared.weight",
)  # fmt: skip
_INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


def run(
    what: str | None,
    on_progress: OnProgress = ignore,
    *,
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    offline: bool = False,
) -> Report:
    """The report on `what`: a model (folder, hub name, `minilm`; None is the default), vectors, or an index.

    `device`, `precision` and `threads` are what the run would be asked for, as in `gemb embed`.
    Raises GembError if it is nothing of this kind, or damaged.
    """
    path = Path(what).expanduser() if what is not None else None
    if path is not None and is_index(path):
        return describe_index(path)
    if path is not None and _holds_vectors(path):
        return _vectors(path)

    def announce(line: str) -> None:
        on_progress(Event("downloading", 0, note=line))

    folder = read_folder(find_model(what, offline=offline, announce=announce))
    return _model(folder, what, _would_run(folder, device, precision, threads))


def _holds_vectors(path: Path) -> bool:
    """Whether `path` is written by `gemb embed` or of a format that it writes; a model folder is not."""
    from gemb.vectors.layout import KIND_OF_SUFFIX, MANIFEST

    if path.is_dir():
        return (path / MANIFEST).is_file() and not (path / "config.json").exists()
    return path.is_file() and path.suffix in KIND_OF_SUFFIX and path.name != "model.safetensors"


# --- models


def _model(folder: ModelFolder, asked: str | None, would_run: dict[str, str]) -> Report:
    digest = fingerprint(folder)
    graph, grid = find_graph(folder), trained_for(folder)
    total, table, size_bytes = _parameters(folder)
    bits = size_bytes * 8 / total
    layers = reach_of_layers(folder.text_config)
    prompts = Prompts(folder.prompts, folder.default_prompt)
    examples = {template.name: template.example() for template in prompts.all_templates()}
    size = sum(file.stat().st_size for file in folder.path.rglob("*") if file.is_file())
    name = asked if asked is not None else "the default model, minilm"
    rows = [
        ("folder", str(folder.path)),
        ("fingerprint", digest[:SHOWN_DIGITS]),
        ("family", _family(folder)),
        (
            "parameters",
            f"{total:,} ({total - table:,} without the embedding table), {_stored(folder, bits)}",
        ),
        ("size on disk", readable_bytes(size)),
        ("dims", _dims(folder)),
        ("max length", f"{folder.max_tokens:,} tokens ({folder.max_tokens_reason})"),
        ("attention", "unknown for this family" if layers is None else describe(layers)),
        ("pooling", _pooling(folder)),
        *[("then", text) for text in _after_pooling(folder)],
        ("similarity", folder.similarity),
        *(
            []
            if grid is None
            else [("trained for", f"{grid}; gemb quantize --format {grid} keeps its scores")]
        ),
        ("prompts", "\n".join(f"{key}: {text}" for key, text in examples.items()) or "none"),
        ("would run", "\n".join(would_run.values())),
        *([] if graph is None else [("graph", str(graph))]),
        ("loads in", _loads_in(folder, graph)),
        *[("note", note) for note in folder.notes],
    ]
    data: dict[str, object] = {
        "kind": "model",
        "name": asked,
        "path": str(folder.path),
        "fingerprint": digest,
        "family": folder.family,
        "architectures": list(folder.config.get("architectures") or []),
        "parameters": total,
        "parameters_without_embedding_table": total - table,
        "weights_dtype": folder.weights().dtype,
        "bits_per_weight": bits,
        "size_bytes": size,
        "dims": folder.dims,
        "matryoshka_dims": list(folder.matryoshka_dims),
        "truncate_dims": folder.truncate_dims,
        "max_tokens": folder.max_tokens,
        "layers": None if layers is None else [{"left": one.left, "right": one.right} for one in layers],
        "bidirectional": None if layers is None else is_bidirectional(layers),
        "pooling": list(folder.pooling.modes),
        "pooling_tokens": folder.pooling.tokens,
        "pooling_heads": folder.pooling.heads,
        "pooling_probes": folder.pooling.probes,
        "pooling_includes_prompt": folder.pooling.include_prompt,
        "modules": [module.kind for module in folder.modules],
        "normalizes": folder.normalizes,
        "similarity": folder.similarity,
        "trained_for": grid,
        "prompts": dict(folder.prompts),
        "default_prompt": folder.default_prompt,
        "examples": examples,
        "would_run": would_run,
        "graph": None if graph is None else str(graph),
        "notes": list(folder.notes),
    }
    title = f"{name}: {folder.dims}-wide vectors of up to {folder.max_tokens:,} tokens"
    return Report(title=title, rows=rows, data=data)


def _family(folder: ModelFolder) -> str:
    text = folder.text_config
    names = {"num_hidden_layers": "layers", "hidden_size": "wide", "num_attention_heads": "heads",
             "num_key_value_heads": "key-value heads", "vocab_size": "tokens in the vocabulary"}  # fmt: skip
    shape = [f"{text[key]:,} {name}" for key, name in names.items() if isinstance(text.get(key), int)]
    return f"{folder.family} ({', '.join(shape)})" if shape else folder.family


def _stored(folder: ModelFolder, bits: float) -> str:
    """How the weights are stored; `bits` are those of a weight, scales included."""
    weights = folder.weights()
    if not weights.is_quantised:
        return weights.dtype
    kinds = {weights.spec(name).dtype for name in weights}
    grids = [text for kind, text in QUANTISED.items() if kind in kinds]
    return f"{' and '.join(grids)}, {bits:.2f} bits a weight"


def _parameters(folder: ModelFolder) -> tuple[int, int, int]:
    """How many numbers the model has, how many of them in the embedding table, and the bytes of all."""
    total = table = size_bytes = 0
    for module in folder.modules:
        if not module.has_weights:
            continue
        weights = module.weights()
        size_bytes += weights.size_bytes
        for name in weights:
            spec = weights.spec(name)
            if spec.dtype in _INTEGERS:
                continue  # position ids and the like, not parameters
            total += spec.elements
            if module.kind == "transformer" and name.endswith(_TABLES):
                table += spec.elements
    return total, table, size_bytes


def _dims(folder: ModelFolder) -> str:
    text = str(folder.dims)
    smaller = [str(size) for size in folder.matryoshka_dims if size < folder.dims]
    if smaller:
        text += f"; trained to be cut to {', '.join(smaller)} (Matryoshka)"
    if folder.truncate_dims is not None:
        text += f"; the folder asks for a cut to {folder.truncate_dims}"
    return text


def _pooling(folder: ModelFolder) -> str:
    pooling = folder.pooling
    text = pooling.described
    if len(pooling.modes) > 1:
        text += ", one after the other"
    return text if pooling.include_prompt else f"{text}, without the tokens of the prompt"


def _after_pooling(folder: ModelFolder) -> list[str]:
    """One line a module after pooling."""
    lines = []
    for module in folder.modules[2:]:
        match module.settings:
            case DenseSettings() as dense:
                extras = [dense.activation] if dense.activation != "Identity" else []
                extras += ["bias"] if dense.bias else []
                extras += ["residual"] if dense.residual else []
                text = f"dense {dense.in_features} → {dense.out_features}"
                lines.append(f"{text} ({', '.join(extras)})" if extras else text)
            case _:
                lines.append("unit length" if module.kind == "normalize" else "layer norm")
    return lines


def _would_run(folder: ModelFolder, device: str, precision: str, threads: int | None) -> dict[str, str]:
    """The device line, the code that would compute the backbone, and what a few texts would run in."""
    from gemb import device as devices
    from gemb.model.families import FAMILIES

    packed = folder.family in FAMILIES
    code = (
        "gemb's packed encoder"
        if packed
        else "transformers' own module: gemb has no packed one for this family"
    )
    told = {"device": devices.pick(device, precision, threads).line, "encoder": code}
    graph = graph_for_few_texts(folder, device, precision)
    if graph is not None:
        told["few_texts"] = f"a few texts: onnxruntime in fp32, with {graph.name}, and no torch"
    elif find_graph(folder) is not None and not is_installed():
        told["few_texts"] = "a few texts: the same; pip install 'gemb[onnx]' to run the graph, sooner"
    return told


def _loads_in(folder: ModelFolder, graph: Path | None) -> str:
    """The programs that load it; `graph` is that of its vectors."""
    programs = _programs(folder)
    if graph is not None and graph.is_relative_to(folder.path):
        programs += f", onnxruntime and transformers.js ({graph.relative_to(folder.path)})"
    return programs


def _programs(folder: ModelFolder) -> str:
    weights = folder.weights()
    if isinstance(weights, GgufWeights):
        return f"gemb, llama.cpp ({GGUF_FILE} alone)" if weights.runs_in_llama_cpp else "gemb"
    if weights.is_quantised:
        return "gemb, transformers (the backbone alone)"
    if not (folder.path / "modules.json").exists():
        return "gemb, transformers, sentence-transformers (which also assumes the pooling)"
    if folder.pooling.is_own:
        return "gemb (sentence-transformers has no such pooling), transformers (the backbone alone)"
    types = (folder.path / "modules.json").read_text("utf-8")
    newer = " 6" if ".base.modules." in types or ".sentence_transformer.modules." in types else ""
    return f"gemb, sentence-transformers{newer}, transformers (the backbone alone)"


# --- vectors


def _vectors(path: Path) -> Report:
    from gemb.jobs.record import record_path
    from gemb.vectors import open_vectors

    record = record_path(path)
    made = read_json(record) if record.exists() else {}
    with open_vectors(path, verify=False) as vectors:
        some = vectors.ids(0, min(3, vectors.rows))
        rows = [
            ("rows", f"{vectors.rows:,}"),
            ("dims", str(vectors.dims)),
            ("stored as", vectors.dtype),
            ("first ids", ", ".join(some)),
        ]
        data: dict[str, object] = {
            "kind": "vectors",
            "path": str(path),
            "rows": vectors.rows,
            "dims": vectors.dims,
            "dtype": vectors.dtype,
            "metadata": dict(vectors.metadata),
            "made": made,
        }
        title = f"{path}: {counted(vectors.rows, 'vector')}, {vectors.dims} wide"
    request = made.get("request") or {}
    if isinstance(request.get("model"), str):
        rows.append(("model", f"{request.get('model_name', '')} ({request['model'][:SHOWN_DIGITS]})".strip()))
    if isinstance(request.get("prompt"), dict):
        rows.append(("prompt", f"{request['prompt'].get('name')}: {request['prompt'].get('text')!r}"))
    if not made:
        rows.append(("model", f"unknown: there is no {record.name}"))
    return Report(title=title, rows=rows, data=data)

"""The models of a merge: opened, and proved to be one model but for the numbers in their tensors.

A part of a model is the folder of a module that has weights, relative to the model ("" or "2_Dense"). A
tensor's full name is its part and its name in the file: `2_Dense.linear.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from gemb.errors import GembError, MismatchError, UnavailableError
from gemb.model.folder import ModelFolder, read_folder
from gemb.model.hub import find_model
from gemb.model.weights import DTYPE_NAMES, TensorSpec, Weights, read_header
from gemb.report import counted

if TYPE_CHECKING:
    from torch import Tensor

_NO_MATTER = frozenset({
    "_name_or_path", "architectures", "dtype", "torch_dtype", "id2label", "label2id", "transformers_version",
    "use_cache",
})  # fmt: skip
"""Keys of config.json that no vector depends on, and that a model only saved again may have changed."""
_VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "sentencepiece.bpe.model",
                 "spiece.model")  # fmt: skip
_TOKENIZER_KEYS = ("add_bos_token", "add_eos_token", "do_lower_case", "add_prefix_space")
_CHECKPOINT = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Source:
    """One model, or one checkpoint of a run, whose tensors are read one by one."""

    name: str
    """As the user called it."""
    folder: ModelFolder
    """Of a checkpoint that of its run, which has all but the weights."""
    checkpoint: Weights | None = None

    @property
    def parts(self) -> Mapping[str, Weights]:
        """The tensors of the folder, by part."""
        return {
            _part(self.folder, module.folder): module.weights()
            for module in self.folder.modules
            if module.has_weights
        }


class Tensors:
    """The tensors of a source by full name; headers are read, numbers are mapped from the files on demand."""

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self._places: dict[str, tuple[Weights, str]] = {}
        for part, weights in source.parts.items():
            for name in weights:
                self._places[full_name(part, name)] = (weights, name)
        if source.checkpoint is not None:
            for name in source.checkpoint:
                if name not in self._places:
                    raise MismatchError(f"{source.name} has {name}, which {source.folder.path} has not")
                self._places[name] = (source.checkpoint, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def spec(self, name: str) -> TensorSpec:
        """What the header of its file says of a tensor."""
        weights, own = self._places[name]
        return weights.spec(own)

    def tensor(self, name: str) -> Tensor:
        """A tensor, mapped; it must not be written to."""
        weights, own = self._places[name]
        return weights.tensor(own)


def full_name(part: str, name: str) -> str:
    """The name of a tensor within the whole model."""
    return f"{part}.{name}" if part else name


def open_source(name: str, *, offline: bool, announce: Callable[[str], None]) -> Source:
    """The model that `name` means. Raises GembError as reading a model does."""
    folder = read_folder(find_model(name, offline=offline, announce=announce))
    folder.weights().plain("a merge needs floats")
    return Source(name, folder)


def checkpoints_of(name: str, last: int, *, offline: bool) -> list[Source]:
    """The last checkpoints of a finished run, the newest at the end.

    Raises GembError where there are fewer.
    """
    folder = read_folder(find_model(name, offline=offline))
    place = folder.path / "run" / "checkpoints"
    found = sorted(path for path in place.glob("step-*") if _CHECKPOINT.fullmatch(path.name))
    if len(found) < last:
        raise GembError(
            f"{place} has {len(found)} checkpoints, and last is {last}; "
            f"train with checkpoint.keep_after: true and checkpoint.keep: {last} or more"
        )
    return [Source(str(path), folder, _one_file(path / "weights.safetensors")) for path in found[-last:]]


def check_alike(sources: Sequence[Source]) -> None:
    """Raises MismatchError with all that keeps the models from being merged with the first of them."""
    first, problems = sources[0], []
    for other in sources[1:]:
        found = list(_differences(first, other))
        problems += [f"  {other.name}: {line}" for line in found]
    if problems:
        raise MismatchError("\n".join([f"cannot be merged with {first.name}:", *problems]))


def _differences(first: Source, other: Source) -> Iterator[str]:
    one, two = first.folder, other.folder
    kinds = [[module.kind for module in each.modules] for each in (one, two)]
    if one.family != two.family:
        yield f"a {two.family} model, not {one.family}"
        return
    if kinds[0] != kinds[1]:
        yield f"modules {', '.join(kinds[1])}, not {', '.join(kinds[0])}"
        return
    for mine, its in zip(one.modules, two.modules, strict=True):
        if _part(one, mine.folder) != _part(two, its.folder):
            yield f"module {_part(two, its.folder)!r}, not {_part(one, mine.folder)!r}"
        elif mine.settings is not None and its.settings is not None:
            # `pooling is cls, not mean`, and `pooling include_prompt is false, not true`.
            one_by_name, two_by_name = (
                {"" if name == "modes" else f" {name}": value for name, value in asdict(settings).items()}
                for settings in (mine.settings, its.settings)
            )
            yield from _unequal(mine.kind, one_by_name, two_by_name)
    yield from _unequal("config.json: ", _counting(one.config), _counting(two.config))
    yield from _unequal("prompt ", one.prompts, two.prompts)
    for what in ("default_prompt", "similarity", "truncate_dims", "max_tokens", "do_lower_case"):
        if getattr(one, what) != getattr(two, what):
            yield f"{what} is {getattr(two, what)!r}, not {getattr(one, what)!r}"
    if not _same_tokenizer(one.tokenizer_folder, two.tokenizer_folder):
        yield "another tokenizer; a merge needs one, since tokens are rows of the table"
    yield from _unequal_tensors(Tensors(first), Tensors(other))


def _unequal_tensors(mine: Tensors, its: Tensors) -> Iterator[str]:
    missing = [name for name in mine if name not in its]
    more = [name for name in its if name not in mine]
    for names, what in ((missing, "lacks"), (more, "has, beyond the other,")):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            yield f"{what} {counted(len(names), 'tensor')}: {shown}"
    for name in mine:
        if name not in its:
            continue
        one, two = mine.spec(name), its.spec(name)
        if one.shape != two.shape:
            yield f"{name} is {list(two.shape)}, not {list(one.shape)}"
        for spec in (one, two):
            if spec.dtype in ("I8", "U8") or spec.dtype.startswith("F8"):
                yield f"{name} is {spec.dtype}: quantised weights cannot be merged; use their source"
                break


def _unequal(what: str, mine: Mapping[str, Any], its: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(mine.keys() | its.keys()):
        one, two = mine.get(key), its.get(key)
        if one == two:
            continue
        if one is None:
            yield f"{what}{key} is {_shown(two)}, and the first has none"
        elif two is None:
            yield f"{what}{key} is not there, and {_shown(one)} in the first"
        else:
            yield f"{what}{key} is {_shown(two)}, not {_shown(one)}"


def _counting(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _counting(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _NO_MATTER and value is not None
    }


def _shown(value: object) -> str:
    """A value of a file as a file has it: names of a list without quotes, true and false."""
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, tuple) else repr(value)


def _same_tokenizer(mine: Path, its: Path) -> bool:
    files = [folder / name for folder in (mine, its) for name in ("tokenizer.json", "tokenizer_config.json")]
    if all(file.exists() for file in files):
        content = [file.read_bytes() for file in files]
        if content[:2] == content[2:]:
            return True  # a large one takes seconds to parse
    return bool(_tokenizer(mine) == _tokenizer(its))


def _tokenizer(folder: Path) -> object:
    """All of a tokenizer that tokens depend on; padding and truncation are settings of whoever saved it."""
    settings = _json(folder / "tokenizer_config.json")
    chosen = {key: settings[key] for key in _TOKENIZER_KEYS if settings.get(key) is not None}
    file = folder / "tokenizer.json"
    if file.exists():
        content = _json(file)
        return chosen, {key: content[key] for key in content if key not in ("padding", "truncation")}
    return chosen, [(folder / name).read_bytes() for name in _VOCABULARIES if (folder / name).exists()]


def _json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        value = orjson.loads(file.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UnavailableError(f"{file}:{error.lineno}: not JSON; download the model again") from error
    return value if isinstance(value, dict) else {}


def _part(folder: ModelFolder, place: Path) -> str:
    relative = place.relative_to(folder.path).as_posix()
    return "" if relative == "." else relative


def _one_file(path: Path) -> Weights:
    return Weights(path.parent, (path,), read_header(path))


def is_number(spec: TensorSpec) -> bool:
    """Whether a tensor holds floating-point numbers, which are merged; others must be the same."""
    return spec.dtype in DTYPE_NAMES

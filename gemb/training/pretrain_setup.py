"""What a pretraining run is about, looked up and checked before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import orjson

from gemb.device import Device
from gemb.errors import GembError, MismatchError
from gemb.files import read_json
from gemb.model.adapting.key_maps import is_encoder_decoder
from gemb.model.attention import is_bidirectional, reach_of_layers
from gemb.model.folder import read_folder
from gemb.model.hub import find_model
from gemb.model.identity import content_digest
from gemb.model.weights import Weights
from gemb.text.inputs import InputFile, resolve_inputs
from gemb.text.records import ReadOptions, Record, check_fields, read_records
from gemb.text.tokenisation import Tokeniser
from gemb.training.data_recipe import name_of_paths
from gemb.training.loop import Length
from gemb.training.material import Material
from gemb.training.pretrain_batches import PretrainBatches
from gemb.training.pretrain_documents import Documents
from gemb.training.pretrain_evaluation import HeldOutTexts
from gemb.training.pretrain_recipe import PretrainRecipe
from gemb.training.pretrain_rows import FOR_ENCODER_DECODERS, RowMaker, row_maker
from gemb.training.ranks import Ranks
from gemb.training.run_folder import RunFolder
from gemb.training.setup import PACKAGES, max_tokens_of, pick_device, recipe_values, saved_position

_WHOLE = 1 << 24  # tokens; no text is cut


@dataclass(frozen=True, slots=True)
class LanguageFolder:
    """A model folder as far as pretraining looks at it."""

    path: Path
    backbone: Path
    """Where config.json and the weights are."""
    tokenizer: Path
    config: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> LanguageFolder:
        """The folder of a transformers or sentence-transformers model.

        Raises UnavailableError or GembError for what is missing or damaged.
        """
        if (path / "modules.json").is_file():
            model = read_folder(path)
            return cls(path, model.transformer.folder, model.tokenizer_folder, model.config)
        return cls(path, path, path, read_json(path / "config.json"))

    @property
    def family(self) -> str:
        """`model_type` of config.json."""
        return str(self.config.get("model_type"))

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether it has both towers."""
        return is_encoder_decoder(self.config)

    @property
    def max_tokens(self) -> int:
        """Positions of the shorter tower; where config.json tells none, as many as anybody wants."""
        parts = [self.config, *(part for part in self.config.values() if isinstance(part, dict))]
        parts += [inner for part in parts[1:] for inner in part.values() if isinstance(inner, dict)]
        found = [value for part in parts if isinstance(value := part.get("max_position_embeddings"), int)]
        return min(found, default=_WHOLE)

    @property
    def sees_both_sides(self) -> bool:
        """Whether its only tower is bidirectional."""
        reach = reach_of_layers(self.config)
        return reach is not None and is_bidirectional(reach)

    def tokeniser(self) -> Tokeniser:
        """Its tokeniser, which cuts nothing."""
        made = Tokeniser.load(self.tokenizer, max_tokens=_WHOLE)
        for part in (self.config, self.config.get("text_config"), self.config.get("decoder")):
            if isinstance(part, Mapping) and isinstance(part.get("vocab_size"), int):
                made.check_vocabulary(part["vocab_size"])
                break
        return made

    def fingerprint(self) -> str:
        """64 hex digits for weights, tokenizer and config, by content."""
        tokenizer = [file for file in (self.tokenizer / "tokenizer.json",) if file.is_file()]
        return content_digest([Weights.read(self.backbone)], [*tokenizer, self.backbone / "config.json"], {})


@dataclass
class PretrainSetup:
    """A pretraining recipe with everything looked up that can be known before the model is loaded."""

    recipe: PretrainRecipe
    folder: RunFolder
    ranks: Ranks
    device: Device
    model: LanguageFolder
    model_name: str
    attention: Literal["folder", "causal", "bidirectional"]
    """What the tokens of the model see while it learns."""
    maker: RowMaker
    max_tokens: int
    documents: Documents
    batches: PretrainBatches
    length: Length
    evaluation: HeldOutTexts | None
    teacher: Path | None
    request: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)


@contextmanager
def prepare(
    recipe: PretrainRecipe,
    folder: RunFolder,
    ranks: Ranks,
    material: Material,
    notice: Callable[[str], None],
    *,
    overwrite: bool = False,
    dry: bool = False,
) -> Iterator[PretrainSetup]:
    """Everything that can be checked before the model is loaded, checked; cheap things first.

    The batches are open for the block, at their beginning or where the last checkpoint says. `dry` compares
    with no earlier run.

    Raises GembError for whatever does not fit.
    """
    if not recipe.data:
        raise GembError("no data given; pretraining needs texts, such as data: [texts.jsonl]")
    if recipe.checkpoint.result == "best" and not recipe.evaluation.texts:
        raise GembError("checkpoint.result is best, but nothing is evaluated; give evaluation.texts")
    device = pick_device(recipe)
    if overwrite and not dry and ranks.is_first:
        folder.forget_another(recipe_values(recipe))
    files, held_out = (
        _files(paths, recipe, folder, ranks, material) for paths in (recipe.data, recipe.evaluation.texts)
    )
    path, name = material.model(recipe, _texts_of(files, recipe.text_field), folder, ranks, notice)
    model = LanguageFolder.read(path)
    notes = _check_objective(recipe, model, name)
    max_tokens = max_tokens_of(recipe.max_tokens, model.max_tokens)
    maker = row_maker(recipe, model.tokeniser(), model.config, max_tokens)

    def opened(sources: Sequence[InputFile]) -> Documents:
        # A tokeniser of its own: it is not thread-safe, and batches are made in a thread.
        return Documents(
            sources, model.tokeniser(), maker.row_tokens, text_field=recipe.text_field, seed=recipe.seed
        )

    teacher = None if recipe.teacher is None else _teacher(recipe.teacher.model, recipe, model, notice)
    evaluation = None
    if held_out and ranks.is_first:
        evaluation = HeldOutTexts(
            name_of_paths(recipe.evaluation.texts), opened(held_out), maker, recipe.evaluation.limit
        )
    request = _request(recipe, model, name, files, teacher)
    position = None
    if not dry:
        if ranks.is_first:
            folder.begin(request, overwrite=overwrite)
        ranks.wait()
        position = saved_position(folder)
    documents = opened(files)
    length = _length(recipe, documents, folder, ranks)
    with ExitStack() as stack:
        batches = PretrainBatches(
            documents,
            maker,
            dataset=name_of_paths(recipe.data),
            tokens=recipe.batch.tokens,
            seed=recipe.seed,
            position=position,
        )
        stack.callback(batches.close)
        yield PretrainSetup(
            recipe=recipe,
            folder=folder,
            ranks=ranks,
            device=device,
            model=model,
            model_name=name,
            attention="bidirectional" if recipe.objective.name == "mntp" else "folder",
            maker=maker,
            max_tokens=max_tokens,
            documents=documents,
            batches=batches,
            length=length,
            evaluation=evaluation,
            teacher=teacher,
            request=request,
            notes=notes,
        )


def _files(
    paths: Sequence[str],
    recipe: PretrainRecipe,
    folder: RunFolder,
    ranks: Ranks,
    material: Material,
) -> list[InputFile]:
    """The files of some texts, those that are made on the spot made."""
    if not paths:
        return []

    made = material.files(paths, folder, ranks)
    paths = [str(made.get(path, path)) for path in paths]
    files = resolve_inputs(paths)
    for file in files:
        if file.is_stream:
            raise GembError(
                f"{file.name} can be read but once, and training reads its texts again; give a file"
            )
    check_fields(files, ReadOptions(text_field=recipe.text_field, use_titles=False))
    return files


def _texts_of(files: Sequence[InputFile], text_field: str | None) -> Iterator[str]:
    rows = read_records(files, ReadOptions(text_field=text_field, use_titles=False))
    return (row.text for row in rows if isinstance(row, Record))


def _check_objective(recipe: PretrainRecipe, model: LanguageFolder, name: str) -> list[str]:
    """Notes on how model and objective go together. Raises MismatchError if they do not."""
    objective = recipe.objective.name
    if objective in FOR_ENCODER_DECODERS and not model.is_encoder_decoder:
        raise MismatchError(
            f"objective {objective} is for encoder-decoders, but {name} ({model.family}) has one tower; make "
            "one with gemb adapt --to encoder-decoder, or choose causal or mntp"
        )
    if objective not in FOR_ENCODER_DECODERS and model.is_encoder_decoder:
        raise MismatchError(
            f"objective {objective} is for decoders, but {name} ({model.family}) is an encoder-decoder; "
            "choose ul2 or prefix_lm"
        )
    if objective == "causal" and model.sees_both_sides:
        raise MismatchError(
            f"objective causal is for decoders, but the tokens of {name} see what comes after them; "
            "choose mntp"
        )
    if objective == "mntp" and not model.sees_both_sides:
        return [
            f"{name} is causal; it learns with all tokens seen, but its folder stays that of a causal model: "
            "run gemb adapt on the result"
        ]
    return []


def _teacher(name: str, recipe: PretrainRecipe, model: LanguageFolder, notice: Callable[[str], None]) -> Path:
    """The folder of the teacher. Raises MismatchError if it is no decoder or has other tokens."""
    path = find_model(name, offline=recipe.offline, announce=notice)
    teacher = LanguageFolder.read(path)
    if teacher.is_encoder_decoder:
        raise MismatchError(f"teacher.model: {name} is an encoder-decoder; give a decoder")
    own_ids, its_ids = model.tokeniser().ids, teacher.tokeniser().ids
    for token in sorted(own_ids.keys() & its_ids.keys()):
        if own_ids[token] != its_ids[token]:
            raise MismatchError(
                f"teacher.model: {token!r} is token {its_ids[token]:,} of {name}, but {own_ids[token]:,} of "
                "the model; both need the same tokenizer"
            )
    return path


def _length(recipe: PretrainRecipe, documents: Documents, folder: RunFolder, ranks: Ranks) -> Length:
    """The length of the run; that of epochs is in tokens, which are counted first."""
    if recipe.steps is not None:
        return Length(steps=recipe.steps)
    if recipe.tokens is not None:
        return Length(tokens=recipe.tokens)
    file = folder.partial / "tokens.json"
    if ranks.is_first:
        documents.tokens(file)
    ranks.wait()
    return Length(tokens=max(1, round((recipe.epochs or 1.0) * documents.tokens(file))))


def _request(
    recipe: PretrainRecipe,
    model: LanguageFolder,
    name: str,
    files: Sequence[InputFile],
    teacher: Path | None,
) -> dict[str, Any]:
    """What the weights of a run depend on, for job.json and gemb.json."""
    taught = {} if teacher is None else {"teacher": LanguageFolder.read(teacher).fingerprint()[:12]}
    digests: dict[str, str] = {}
    for file in files:  # files of one name in several folders have one entry
        key = Path(file.name).name
        digests[key] = digests.get(key, "") + file.fingerprint()[:12]
    # Through JSON, so that it compares equal to what job.json gives back.
    values: dict[str, Any] = orjson.loads(
        orjson.dumps({
            "recipe": recipe_values(recipe),
            "model": {"name": name, "fingerprint": model.fingerprint()[:12], **taught},
            "data": digests,
            "versions": {package: metadata.version(package) for package in PACKAGES},
        })
    )  # fmt: skip
    return values

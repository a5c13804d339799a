"""`gemb adapt`: a decoder language model in, an encoder or an encoder-decoder out, proved before it is kept.

    report = run(AdaptRecipe(source="google/gemma-3-270m", output=Path("runs/encoder")))

The weights are those of the source to the byte. See docs/adapt.md for what is written and what is proved.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from gemb.errors import GembError, MismatchError
from gemb.files import check_writable, readable_bytes, write_json
from gemb.jobs import adapt_encoder_decoder
from gemb.jobs.adapt_table import tensor_counts, tensor_table
from gemb.jobs.record import versions
from gemb.model.adapting import REPORT, Adaptation, Adapted, Pooling, Wanted
from gemb.model.adapting import plan as plan_adaptation
from gemb.model.adapting import write as write_adaptation
from gemb.model.adapting.encoder_decoder import EncoderDecoderAdaptation
from gemb.model.adapting.encoder_decoder import plan as plan_encoder_decoder
from gemb.model.adapting.key_maps import is_encoder_decoder
from gemb.model.attention import describe, is_bidirectional, reach_of_layers
from gemb.model.folder import ModelFolder, read_folder
from gemb.model.hub import find_model
from gemb.model.pruned import check_layers, count_layers, vocabulary_for, write_pruned
from gemb.recipe import ModelName, Recipe, RecipeInput, RecipePath, resolved
from gemb.report import Event, OnProgress, Plan, Report, ignore

if TYPE_CHECKING:
    from gemb.model.adapting.proofs import Proofs

__all__ = ["AdaptRecipe", "plan", "run"]


_OF_CUTS = frozenset({"source", "output", "keep_layers", "keep_vocab", "vocabulary", "seed", "offline"})
_OF_ENCODER_DECODERS = frozenset(
    {"source", "to", "decoder", "output", "dropout", "max_memory", "seed", "offline"}
)
"""The keys that are read for what is not a new encoder."""


class AdaptRecipe(Recipe):
    """What `gemb adapt` is asked to do."""

    kind: ClassVar[str] = "adapt"

    source: ModelName | None = None
    """The decoder: a folder, or a name on the Hugging Face hub; an encoder-decoder, to take its encoder; an
    encoder, to cut it smaller."""
    to: Literal["encoder", "encoder-decoder"] = "encoder"
    """What it becomes; a T5Gemma of Gemma 2 and a T5Gemma 2 of Gemma 3 are encoder-decoders."""
    decoder: ModelName | None = None
    """Another model for the decoder of an encoder-decoder, such as a smaller one; by default the source."""
    output: RecipePath | None = None
    """The folder to write."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether a token sees the whole text, or, as before, only what stands before it."""
    pooling: Pooling = "mean"
    """How the states of the tokens become one vector. What sentence-transformers has no module for (first-k,
    last-k, attention-query, attention-kv) is run by gemb alone, and the folder says so."""
    pool_tokens: int | None = Field(default=None, ge=1)
    """How many tokens first-k and last-k take the mean of."""
    pool_heads: int = Field(default=4, ge=1)
    """Heads of attention pooling."""
    pool_probes: int = Field(default=128, ge=2)
    """Learnt keys and values of attention-kv. Their number is not published; 128 is ours."""
    projections: tuple[int, ...] = ()
    """Widths of linear layers behind the pooling, with random weights; such as 3072,768."""
    normalise: bool = True
    """Bring the vectors to unit length at the end."""
    prompts: dict[str, str] = Field(default_factory=dict)
    """Texts that the folder declares to be put before others, by name, such as query and document."""
    default_prompt: str | None = None
    """The name of the prompt that is taken where none is asked for."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest text in tokens; by default all positions of the model, and at most 2,048."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of attention weights and of hidden numbers that is left out at random in a later fine-tuning;
    written to config.json, where gemb train finds it; transformers heeds what the class has a rate for."""
    keep_layers: tuple[int, ...] = ()
    """Layers that stay, counted from 0, such as 0,2,4; by default all."""
    keep_vocab: tuple[RecipeInput, ...] = ()
    """Files of texts whose tokens stay in vocabulary, table and tokenizer, with all special ones; by default
    all tokens stay."""
    vocabulary: int | None = Field(default=None, ge=1)
    """Of the tokens of these texts so many stay, the most frequent ones; by default all of them."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """What the random weights of new layers follow from."""
    max_memory: float | None = Field(default=None, gt=0)
    """GiB that the proofs may take, all weights in fp32; a larger model is proved layer by layer. By default
    what is free."""
    offline: bool = False
    """Never open a connection; a model that is not on this machine is an error."""

    @field_validator("projections", "keep_layers", mode="before")
    @classmethod
    def _split_numbers(cls, value: object) -> object:
        """A list written as one word: `0,2,4`."""
        if isinstance(value, int) and not isinstance(value, bool):
            return (value,)
        if isinstance(value, str):
            words = [word.strip() for word in value.split(",")]
            if not all(word.isdecimal() for word in words):
                raise ValueError(f"{value!r} is not a list of whole numbers such as 0,2,4")
            return tuple(int(word) for word in words)
        return tuple(value) if isinstance(value, list) else value

    @field_validator("keep_vocab", mode="before")
    @classmethod
    def _one_file(cls, value: object) -> object:
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        kept = list(self.keep_layers)
        if kept != sorted(set(kept)):
            raise ValueError(f"keep_layers is {kept}; give each layer once, ascending from 0")
        if any(size < 1 for size in self.projections):
            raise ValueError(f"projections is {list(self.projections)}; a width is 1 or more")
        if self.vocabulary is not None and not self.keep_vocab:
            raise ValueError("vocabulary is counted over the texts of keep_vocab; give those, too")
        if self.attention == "causal" and self.pooling in ("cls", "first-k"):
            raise ValueError("the first token of a causal model has seen nothing; choose another pooling")
        self._check_pooling()
        if self.to == "encoder-decoder":
            others = _given(self, beside=_OF_ENCODER_DECODERS)
            if others:
                raise ValueError(
                    f"{', '.join(others)} given, which an encoder-decoder has no use for; "
                    "give them when its encoder is taken"
                )
        elif self.decoder is not None:
            raise ValueError("decoder is half of an encoder-decoder; pass --to encoder-decoder, too")
        return self

    def _check_pooling(self) -> None:
        """Raises ValueError for a size that the pooling lacks or does not have."""
        takes_some = self.pooling in ("first-k", "last-k")
        if takes_some and self.pool_tokens is None:
            raise ValueError(f"{self.pooling} needs pool_tokens, the number of tokens it takes")
        readers = {
            "pool_tokens": takes_some,
            "pool_heads": self.pooling.startswith("attention-"),
            "pool_probes": self.pooling == "attention-kv",
        }
        for key, is_read in readers.items():
            if key in self.model_fields_set and getattr(self, key) is not None and not is_read:
                raise ValueError(f"{key} has no meaning for the pooling {self.pooling}; leave it out")


def _given(recipe: AdaptRecipe, *, beside: Collection[str]) -> list[str]:
    """The keys that are not as by default, other than those `beside`."""
    plain = AdaptRecipe()
    return [
        name
        for name in AdaptRecipe.model_fields
        if name not in beside and getattr(recipe, name) != getattr(plain, name)
    ]


def plan(recipe: AdaptRecipe) -> Plan:
    """What `run` would write, for --dry-run; only headers and configs are read, and the files of keep_vocab.

    Raises GembError as `run` does before it writes.
    """
    source, output = _opened(recipe, ignore)
    _refuse_existing(output)
    if recipe.to == "encoder-decoder":
        return adapt_encoder_decoder.planned(_encoder_decoder(recipe, source, ignore), output)
    if _is_encoder(source):
        _only_cuts(recipe, source)
        needs = source.weights().size_bytes
        check_writable(output, needs)
        rows = [("source", str(source.path)), *_cuts(recipe, source), ("size at most", readable_bytes(needs))]
        return Plan(title=f"would cut {source.path} smaller into {output}", rows=rows, outputs=[output])
    adaptation = _adaptation(recipe, source)
    check_writable(output, adaptation.size_bytes)
    return Plan(
        title=f"would adapt {source.path} into {output}",
        rows=_rows(adaptation),
        tables=[tensor_table(adaptation.tensors)],
        outputs=[output],
        data={
            "source": str(source.path),
            "output": str(output),
            "model_type": adaptation.config["model_type"],
            "config": adaptation.config,
            "size_bytes": adaptation.size_bytes,
            "max_tokens": adaptation.max_tokens,
        },
    )


def run(recipe: AdaptRecipe, on_progress: OnProgress = ignore) -> Report:
    """Write the encoder or encoder-decoder and prove it.

    Raises GembError for a source that does not fit and an output that exists, GateError (8) for a proof that
    fails; then nothing is left at the output.
    """
    source, output = _opened(recipe, on_progress)
    _refuse_existing(output)
    about = {
        "recipe": resolved(recipe),
        "versions": {**versions(), "transformers": metadata.version("transformers")},
    }
    memory_bytes = None if recipe.max_memory is None else int(recipe.max_memory * 2**30)
    if recipe.to == "encoder-decoder":
        return adapt_encoder_decoder.written(
            _encoder_decoder(recipe, source, on_progress),
            output,
            about=about,
            memory_bytes=memory_bytes,
            on_progress=on_progress,
        )
    if _is_encoder(source):
        return _cut_encoder(recipe, source, output, about)
    adaptation = _adaptation(recipe, source)
    on_progress(
        Event("adapting", 0, note=f"writing {readable_bytes(adaptation.size_bytes)}, then the proofs")
    )
    adapted = write_adaptation(adaptation, output, about=about, memory_bytes=memory_bytes)
    return _report(adaptation, adapted, output)


def _opened(recipe: AdaptRecipe, on_progress: OnProgress) -> tuple[ModelFolder, Path]:
    if recipe.source is None:
        raise GembError(
            "no source given; name a decoder, such as gemb adapt google/gemma-3-270m -o runs/encoder"
        )
    if recipe.output is None:
        raise GembError("no output given; pass -o FOLDER")

    return _model(recipe.source, recipe, on_progress), recipe.output


def _model(name: str, recipe: AdaptRecipe, on_progress: OnProgress) -> ModelFolder:
    def announce(line: str) -> None:
        on_progress(Event("downloading", 0, note=line))

    folder = read_folder(find_model(name, offline=recipe.offline, announce=announce))
    folder.weights().plain("gemb adapt copies weights as they are")
    return folder


def _refuse_existing(output: Path) -> None:
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise GembError(f"{output} exists; choose another path for the model, or move it away")


def _is_encoder(source: ModelFolder) -> bool:
    if is_encoder_decoder(source.config):
        return False
    reaches = reach_of_layers(source.text_config)
    return bool(reaches) and is_bidirectional(reaches or ())


def _encoder_decoder(
    recipe: AdaptRecipe, source: ModelFolder, on_progress: OnProgress
) -> EncoderDecoderAdaptation:
    decoder = None if recipe.decoder is None else _model(recipe.decoder, recipe, on_progress)
    return plan_encoder_decoder(source, decoder, dropout=recipe.dropout, seed=recipe.seed)


def _adaptation(recipe: AdaptRecipe, source: ModelFolder) -> Adaptation:
    wanted = Wanted(
        causal=recipe.attention == "causal",
        pooling=recipe.pooling,
        pool_tokens=recipe.pool_tokens,
        pool_heads=recipe.pool_heads,
        pool_probes=recipe.pool_probes,
        projections=recipe.projections,
        normalise=recipe.normalise,
        prompts=recipe.prompts,
        default_prompt=recipe.default_prompt,
        max_tokens=recipe.max_tokens,
        dropout=recipe.dropout,
        keep_layers=recipe.keep_layers,
        seed=recipe.seed,
    )
    return plan_adaptation(source, wanted, texts=_texts(recipe), largest=recipe.vocabulary)


def _texts(recipe: AdaptRecipe) -> Iterable[str] | None:
    return _texts_of(recipe.keep_vocab) if recipe.keep_vocab else None


def _texts_of(files: Sequence[str]) -> Iterator[str]:
    """The titles and texts of rows of files, as `gemb embed` reads them; an empty text has no tokens.

    Raises GembError for a row that cannot be read, since its text would not tokenise as before.
    """
    from gemb.text.inputs import resolve_inputs
    from gemb.text.records import EMPTY_TEXT, ReadOptions, Record, read_records

    for row in read_records(resolve_inputs(files), ReadOptions()):
        if isinstance(row, Record):
            yield f"{row.title} {row.text}" if row.title else row.text
        elif row.reason != EMPTY_TEXT:
            raise GembError(f"{row}; mend the row, or take it out: keep_vocab keeps the tokens of every text")


# --- encoders, which are only cut


def _only_cuts(recipe: AdaptRecipe, source: ModelFolder) -> None:
    """Raises MismatchError unless layers or vocabulary are to be cut, and nothing else."""
    others = _given(recipe, beside=_OF_CUTS)
    if others or not (recipe.keep_layers or recipe.keep_vocab):
        asked = f" ({', '.join(others)} given)" if others else ""
        raise MismatchError(
            f"{source.path}: {source.family} is bidirectional already; of an encoder only --keep-layers and "
            f"--keep-vocab make another one{asked}"
        )


def _cuts(recipe: AdaptRecipe, source: ModelFolder) -> list[tuple[str, str]]:
    """Layers and rows of the table, before and after. Raises GembError where they cannot be cut."""
    layers, entries = count_layers(source, source.weights()), int(source.text_config["vocab_size"])
    kept, texts, left = recipe.keep_layers or tuple(range(layers)), _texts(recipe), entries
    check_layers(source, kept, layers)
    if texts is not None:
        left = len(vocabulary_for(source, texts, entries, recipe.vocabulary).kept)
    return [("layers", f"{layers} → {len(kept)}"), ("vocabulary", f"{entries:,} → {left:,}")]


def _cut_encoder(
    recipe: AdaptRecipe, source: ModelFolder, output: Path, about: Mapping[str, object]
) -> Report:
    _only_cuts(recipe, source)
    check_writable(output, source.weights().size_bytes)
    texts = _texts(recipe)
    pruned = write_pruned(
        source, output, keep_layers=recipe.keep_layers, texts=texts, largest=recipe.vocabulary
    )
    data: dict[str, object] = {
        "source": str(source.path),
        "output": str(output),
        "layers": pruned.layers,
        "vocabulary": pruned.vocabulary,
        "parameters": pruned.parameters,
    }
    write_json(output / REPORT, {**about, **data})
    names = {"layers": pruned.layers, "vocabulary": pruned.vocabulary, "parameters": pruned.parameters}
    return Report(
        title=f"cut {source.path} into {output}",
        rows=[(name, f"{before:,} → {after:,}") for name, (before, after) in names.items()],
        data=data,
        outputs=[output],
    )


# --- what is told


def _report(adaptation: Adaptation, adapted: Adapted, output: Path) -> Report:
    from gemb.model.adapting.adaptation import as_json

    proofs = adapted.proofs
    rows = _rows(adaptation)
    if adapted.padding_token is not None:
        rows.append(
            ("padding", f"the source names no token for it; {adapted.padding_token} is taken, masked")
        )
    rows += [
        ("tensors", f"{tensor_counts(adaptation.tensors, adapted.new)}; each in {REPORT}"),
        *_source_rows(adaptation, proofs),
        ("", f"each layer sees as far as config.json says: {', '.join(dict.fromkeys(proofs.reaches))}"),
        ("", f"transformers: {', '.join(f'{name} {way}' for name, way in proofs.implementations.items())}"),
        ("", f"padding moves a state by {proofs.padding_difference:.0e} of the largest at most"),
        ("", f"saved and loaded again, the states are the same (difference {proofs.saved_difference:g})"),
        ("", f"gemb's own encoder gives them, too (difference {proofs.gemb_difference:.0e})"),
        *([("", "each layer alone, since the model is larger than the memory")] if proofs.by_layer else []),
        ("took", f"{adapted.writing_seconds:.1f} s to write, {adapted.proving_seconds:.1f} s to prove"),
        ("next", f"gemb train RECIPE -m {output}; as it is, the vectors are of little use"),
    ]
    return Report(
        title=f"adapted {adaptation.source.path} into {output}",
        rows=rows,
        data={"output": str(output), **as_json(adaptation, adapted)},
        outputs=[output],
    )


def _source_rows(adaptation: Adaptation, proofs: Proofs) -> list[tuple[str, str]]:
    """What was seen beside the source."""
    if is_encoder_decoder(adaptation.source.config):
        tokens, beyond = proofs.source_tokens, proofs.difference_beyond
        up_to = "" if tokens is None else f" for texts of up to {tokens:,} tokens"
        said = f"its states are those of the source's encoder{up_to}"
        rows = [("proved", f"{said} (difference {proofs.source_difference:g})")]
        if beyond is not None:
            rows.append(("", f"a longer text differs by {beyond:.0e}: a window is one wider here"))
        return rows
    said = f"with the causal mask its states are the source's (difference {proofs.source_difference:g})"
    rows = [("proved", said)]
    if proofs.class_difference is not None:
        said = f"they are those of {adaptation.kind} without the mask, too"
        rows.append(("", f"{said} (difference {proofs.class_difference:g})"))
    return rows


def _rows(adaptation: Adaptation) -> list[tuple[str, str]]:
    wanted, config = adaptation.wanted, adaptation.config
    reaches = reach_of_layers(config)
    widths = [int(config["hidden_size"]), *wanted.projections]
    architecture = config["architectures"][0]
    kind = adaptation.kind
    if is_encoder_decoder(adaptation.source.config):
        kind = f"the encoder of {adaptation.source.family}"
    rows = [
        ("source", f"{adaptation.source.path} ({kind})"),
        ("becomes", f"{architecture} of transformers, no code in the folder"),
        ("attention", "causal" if reaches is None else describe(reaches)),
        ("pooling", f"{adaptation.pooling.described}{', then unit length' if wanted.normalise else ''}"),
        ("dims", " → ".join(map(str, widths))),
        ("max length", f"{adaptation.max_tokens:,} tokens"),
        ("weights", f"{readable_bytes(adaptation.size_bytes)}, copied as they are"),
    ]
    if adaptation.pooling.is_own:
        rows.append(("", "which gemb runs and sentence-transformers refuses; README.md says so"))
    if wanted.prompts:
        rows.append(("prompts", "\n".join(f"{name}: {text}" for name, text in wanted.prompts.items())))
    if wanted.dropout:
        rows.append(("dropout", f"{wanted.dropout:g} in a later training, in config.json"))
    if wanted.keep_layers:
        rows.append(("layers", ", ".join(map(str, wanted.keep_layers))))
    if adaptation.cut is not None:
        rows.append(("vocabulary", f"{len(adaptation.cut.kept):,} tokens"))
    return rows

"""A language model ready to be trained: packed token ids in, the loss of their targets with a graph out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gemb.errors import MismatchError, UnavailableError
from gemb.files import read_json
from gemb.model.attention import is_bidirectional, reach_of_layers
from gemb.model.families import NotPacked
from gemb.model.folder import read_folder
from gemb.model.layout import Layout, packed_places
from gemb.model.trainable import encoder_decoder, gated
from gemb.model.trainable.blocks import Computation, Recompute, Source
from gemb.model.trainable.encoder import Precision
from gemb.model.trainable.encoder_decoder import EncoderDecoder, PairedRows
from gemb.model.trainable.gated import GatedBackbone
from gemb.model.trainable.head import TeacherStates, head_loss
from gemb.model.trainable.parameters import ParameterTree, Tensors
from gemb.model.trainable.saving import SavedDtype, save_backbone, save_folder
from gemb.model.weights import Weights

__all__ = ["LanguageBatch", "LanguageLoss", "TeacherStates", "TrainableLanguageModel"]

NO_TARGET = -100
"""Where nothing is to be predicted, as in transformers."""
Attention = Literal["folder", "causal", "bidirectional"]
"""What a decoder's tokens see: as its config.json says, or as told."""


@dataclass(frozen=True, slots=True)
class LanguageBatch:
    """R rows of tokens, one after another and in any order; attention does not cross from row to row."""

    ids: NDArray[np.int32]
    """[T], what the decoder or the only tower reads."""
    lengths: NDArray[np.int32]
    """[R], each 1 at least."""
    targets: NDArray[np.int32]
    """[T], the token to predict from the state at this place; -100 where there is none."""
    source_ids: NDArray[np.int32]
    """[S], what the encoder reads; empty for one tower."""
    source_lengths: NDArray[np.int32]
    """[R], each 1 at least; row r of the decoder attends to row r of the encoder. Empty for one tower."""


@dataclass(frozen=True, slots=True)
class LanguageLoss:
    """Sums over the targets of a batch."""

    total: Tensor
    """Scalar with a graph: cross entropy in nats, or what `TeacherStates` says."""
    tokens: int
    """How many targets there are."""
    correct: int
    """How many of them have the highest score."""
    cross_entropy: float
    """In nats."""


class TrainableLanguageModel(nn.Module):
    """The differentiable packed forward of a decoder or an encoder-decoder, with its head.

    Parameters are fp32 and called as in the files of the folder; a head that is tied to the token table is no
    parameter of its own. Nothing is padded: the loss of a row and its gradient do not depend on other rows.
    """

    _head: Tensors

    def __init__(self, folder: Path, computation: Computation, attention: Attention) -> None:
        super().__init__()
        self.folder = folder
        self.computation = computation
        self._place = _backbone_folder(folder)
        config = read_json(self._place / "config.json")
        self._weights = Weights.read(self._place)
        tree = ParameterTree(self, self._weights)
        self._backbone = _backbone(config, tree, attention, self._place / "config.json")
        text = _decoder_config(config)
        softcap = text.get("final_logit_softcapping", _SOFTCAPS.get(str(config["model_type"])))
        self.softcap: float | None = None if softcap is None else float(softcap)
        # Not as a submodule: it is one already, by the name that the files have for it.
        self.__dict__["_head"] = self._find_head(config, tree)
        self._backbone.fuse()

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: str = "cpu",
        precision: Precision = "fp32",
        dropout: float = 0.0,
        recompute: Recompute = "nothing",
        attention: Attention = "folder",
        sparse_table: bool = True,
    ) -> Self:
        """The model of a transformers or sentence-transformers folder on `device`, in training.

        `attention` overrides what the tokens of a decoder see; `bidirectional` takes the window that
        `gemb adapt` declares. The table's gradient is sparse only where the head is not tied to it.
        See `Computation` for the rest.

        Raises UnavailableError for files that are missing or damaged, MismatchError for a family that has no
        packed training as a language model, quantised weights, and a model without a head.
        """
        dtype = torch.bfloat16 if precision == "bf16" else None
        return cls(folder, Computation(dtype, dropout, recompute, sparse_table), attention).to(device)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether batches need a source."""
        return isinstance(self._backbone, EncoderDecoder)

    @property
    def vocabulary(self) -> int:
        """V, the tokens that can be predicted."""
        return len(self._head.matrix)

    @property
    def table_name(self) -> str:
        """The name of the token table of the encoder, or of the only tower, among the parameters."""
        first = self._backbone.encoder if isinstance(self._backbone, EncoderDecoder) else self._backbone
        return self._name_of(first.table)

    @property
    def cross_attention_names(self) -> frozenset[str]:
        """The parameters of the cross-attention and its norms; empty where it shares those of the decoder."""
        return frozenset(name for name, _ in self.named_parameters() if "cross_attn" in name)

    def loss(self, batch: LanguageBatch, *, teacher: TeacherStates | None = None) -> LanguageLoss:
        """The sums of the loss over the targets of `batch`.

        Raises ValueError for lengths that are not those of the tokens, tokens outside of the vocabulary, and
        a teacher of other targets or another vocabulary.
        """
        self.computation.trains = self.training
        states, targets = self._states(batch)
        found = head_loss(
            states,
            self._head.matrix,
            targets,
            softcap=self.softcap,
            dtype=self.computation.of(states),
            teacher=teacher,
        )
        return LanguageLoss(found.total, len(targets), int(found.correct), float(found.cross_entropy))

    @torch.no_grad()
    def teacher_states(
        self, batch: LanguageBatch, *, temperature: float = 1.0, share: float = 1.0
    ) -> TeacherStates:
        """What this model, as a teacher, thinks of the targets of `batch`; see `TeacherStates`.

        The student's batch has the same targets in the same order, at places of its own.
        """
        self.computation.trains = False
        states, _ = self._states(batch)
        return TeacherStates(states, self._head.matrix.detach(), self.softcap, temperature, share)

    def save(self, target: Path, *, dtype: SavedDtype = "float32") -> None:
        """A whole folder at `target`: that of `folder` with the weights as they are now.

        `dtype` "source" keeps each tensor's dtype of the source folder, which rounds where it is narrower.
        `target` appears at once or not at all. Raises GembError if it exists or cannot be written.
        """
        values = {name: parameter.detach() for name, parameter in self.named_parameters()}
        # A file cannot hold two names of one memory.
        values |= {copy: values[name].clone() for copy, name in self._copies().items()}
        if (self.folder / "modules.json").exists():
            folder = read_folder(self.folder)
            as_they_are: dict[Path, Mapping[str, Tensor]] = {
                module.folder: {} for module in folder.modules if module.has_weights
            }
            save_folder(folder, {**as_they_are, self._place: values}, target, dtype)
        else:
            save_backbone(self.folder, values, target, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and conversions of torch, after which parameters lie together again."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._backbone.fuse()
        return self

    def _states(self, batch: LanguageBatch) -> tuple[Tensor, Tensor]:
        """(states[N, D] at the places that have a target, int64 targets[N]), in the order of the batch."""
        places = np.flatnonzero(batch.targets != NO_TARGET)
        targets = batch.targets[places]
        self._check(batch, targets)
        device = self._head.matrix.device
        if isinstance(self._backbone, EncoderDecoder):
            rows = PairedRows.of(batch.lengths, batch.source_lengths)
            ids, layout, tokens = _in_order(batch.ids, batch.lengths, rows.order, device)
            source_ids, source_layout, _ = _in_order(
                batch.source_ids, batch.source_lengths, rows.source_order, device
            )
            read = self._backbone.encoder.forward(source_ids, source_layout, self.computation)
            states = self._backbone.forward(ids, layout, Source(read, rows.pairs), self.computation)
        else:
            order = np.argsort(-batch.lengths, kind="stable")  # equal lengths side by side, longest first
            ids, layout, tokens = _in_order(batch.ids, batch.lengths, order, device)
            states = self._backbone.forward(ids, layout, self.computation)
        where = torch.from_numpy(np.argsort(tokens)[places]).to(device)
        return states.index_select(0, where), torch.from_numpy(targets).to(device).long()

    def _check(self, batch: LanguageBatch, targets: NDArray[np.int32]) -> None:
        """Raise ValueError for what cannot be a batch of this model."""
        _check_rows("ids", batch.ids, batch.lengths, self.vocabulary)
        if len(batch.targets) != len(batch.ids):
            raise ValueError(f"{len(batch.targets)} targets for {len(batch.ids)} ids")
        _check_tokens("targets", targets, self.vocabulary)
        if self.is_encoder_decoder:
            if len(batch.source_lengths) != len(batch.lengths):
                raise ValueError(f"{len(batch.source_lengths)} sources for {len(batch.lengths)} rows")
            _check_rows("source_ids", batch.source_ids, batch.source_lengths, self.vocabulary)
        elif len(batch.source_ids):
            raise ValueError("the batch has a source, but the model has no encoder to read it")

    def _find_head(self, config: Mapping[str, Any], tree: ParameterTree) -> Tensors:
        """The head: the token table where it is tied to it, else the layer that the file has for it."""
        table = self._backbone.table
        stored = [name for name in tree.weights if name.endswith(_HEADS)]
        ties = config.get("tie_word_embeddings", config["model_type"] in _TIES)
        if not stored:
            if ties:
                return table
            raise MismatchError(
                f"{self._place}: its weights have no lm_head, and config.json does not tie it to the token "
                "table (tie_word_embeddings); take the model that generates text, not its encoder alone"
            )
        # As transformers: a head that is declared tied and stored apart is tied only if it is equal.
        if ties and torch.equal(tree.weights.tensor(stored[0]).float(), table.matrix):
            return table
        return tree.layer(stored[0].removesuffix(".weight"))

    def _copies(self) -> dict[str, str]:
        """Tensors of the file that repeat a parameter, and its name: heads and tables that are tied."""
        names = {name for name, _ in self.named_parameters()}
        others = [name for name in self._weights if name not in names]
        table = self._name_of(self._backbone.table)
        copies = {name: table for name in others if name.endswith((*_HEADS, "embed_tokens.weight"))}
        if self._backbone.table.shift is not None:
            copies |= {
                name: f"{table.removesuffix('.weight')}.{_MARKER}"
                for name in others
                if name.endswith(_MARKER)
            }
        return copies

    def _name_of(self, table: Tensors) -> str:
        """The name of a table among the parameters."""
        return next(name for name, parameter in self.named_parameters() if parameter is table.matrix)


_HEADS = ("lm_head.weight", "lm_head.out_proj.weight")
_MARKER = "eoi_embedding"
# What transformers takes where config.json leaves it out.
_SOFTCAPS = {"gemma2": 30.0, "t5gemma": 30.0}
_TIES = frozenset({"gemma2", "gemma3", "gemma3_text", "t5gemma", "t5gemma2"})
_DECODERS: Mapping[str, Callable[[Mapping[str, Any], ParameterTree], GatedBackbone]] = {
    "gemma2": gated.gemma2,
    "gemma3": gated.gemma3,
    "gemma3_text": gated.gemma3,
    "llama": gated.llama,
    "mistral": gated.llama,
    "qwen2": gated.llama,
    "qwen3": gated.llama,
}
_ENCODER_DECODERS: Mapping[str, Callable[[Mapping[str, Any], ParameterTree], EncoderDecoder]] = {
    "t5gemma": encoder_decoder.t5gemma,
    "t5gemma2": encoder_decoder.t5gemma2,
}


def _in_order(
    ids: NDArray[np.int32], lengths: NDArray[np.int32], order: NDArray[np.int64], device: torch.device
) -> tuple[Tensor, Layout, NDArray[np.int64]]:
    """(int64 ids[T] of the rows in `order`, their layout, the places that they had)."""
    places = packed_places(lengths, order)
    layout = Layout.of(lengths[order], device=str(device))
    return torch.from_numpy(ids[places]).to(device).long(), layout, places


def _check_rows(name: str, ids: NDArray[np.int32], lengths: NDArray[np.int32], vocabulary: int) -> None:
    if len(lengths) == 0 or lengths.min() < 1 or lengths.sum() != len(ids):
        raise ValueError(f"lengths of {int(lengths.sum())} tokens for {len(ids)} {name}; each is 1 at least")
    _check_tokens(name, ids, vocabulary)


def _check_tokens(name: str, ids: NDArray[np.int32], vocabulary: int) -> None:
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ValueError(
            f"{name} from {ids.min()} to {ids.max()}, but the vocabulary has {vocabulary} tokens"
        )


def _backbone_folder(folder: Path) -> Path:
    """Where config.json and the weights are."""
    if (folder / "modules.json").exists():
        return read_folder(folder).transformer.folder
    if not (folder / "config.json").exists():
        raise UnavailableError(
            f"{folder} is not a model folder: no config.json; a model is a folder with config.json and "
            "model.safetensors"
        )
    return folder


def _decoder_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes what generates."""
    part: Mapping[str, Any] = config.get("decoder") or config.get("text_config") or config
    return part


def _backbone(
    config: Mapping[str, Any], tree: ParameterTree, attention: Attention, file: Path
) -> GatedBackbone | EncoderDecoder:
    if config.get("quantization_config"):
        raise MismatchError(
            f"{file}: the weights are quantised and cannot be trained; use the model that they were made from"
        )
    model_type = str(config.get("model_type"))
    reason = f"model type {model_type!r} cannot be trained as a language model"
    try:
        if model_type in _DECODERS:
            text = {"model_type": model_type, **_decoder_config(config)}
            return _DECODERS[model_type](_seeing(text, attention), tree)
        if model_type in _ENCODER_DECODERS and config.get("is_encoder_decoder", True):
            if attention != "folder":
                raise MismatchError(
                    f"{file}: attention is {attention!r}, but each tower of {model_type} sees one way only; "
                    "leave it at 'folder'"
                )
            return _ENCODER_DECODERS[model_type](config, tree)
    except NotPacked as error:
        reason = f"it cannot be trained packed: {error}"
    known = ", ".join(sorted([*_DECODERS, *_ENCODER_DECODERS]))
    raise MismatchError(f"{file}: {reason}; train a model of another type, one of {known}")


def _seeing(config: Mapping[str, Any], attention: Attention) -> Mapping[str, Any]:
    """The config of a decoder whose tokens see what `attention` says."""
    is_gemma3 = str(config["model_type"]).startswith("gemma3")
    if attention == "causal":
        return {**config, "is_causal": True, "use_bidirectional_attention": False}
    if attention == "bidirectional" and not is_bidirectional(reach_of_layers(config) or ()):
        return {**config, **({"use_bidirectional_attention": True} if is_gemma3 else {"is_causal": False})}
    return config

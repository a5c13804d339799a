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
from gemb.model.layout import Layout
from gemb.model.trainable import gated
from gemb.model.trainable.blocks import Computation, Recompute
from gemb.model.trainable.encoder import Precision
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
        self._aliases, self._head = self._find_head(config, tree)
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
        return False

    @property
    def vocabulary(self) -> int:
        """V, the tokens that can be predicted."""
        return len(self._head.matrix)

    @property
    def table_name(self) -> str:
        """The name of the token table that the (only or first) tower reads, among the parameters."""
        return next(
            name for name, parameter in self.named_parameters() if parameter is self._backbone.table.matrix
        )

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
        values |= {alias: values[name] for alias, name in self._aliases.items()}
        if (self.folder / "modules.json").exists():
            save_folder(read_folder(self.folder), {self._place: values}, target, dtype)
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
        _check(batch, targets, self.vocabulary)
        device = self._backbone.table.matrix.device
        order = np.argsort(-batch.lengths, kind="stable")  # equal lengths side by side, longest first
        tokens = packed_places(batch.lengths, order)
        ids = torch.from_numpy(batch.ids[tokens]).to(device).long()
        layout = Layout.of(batch.lengths[order], device=str(device))
        states = self._backbone.forward(ids, layout, self.computation)
        where = torch.from_numpy(np.argsort(tokens)[places]).to(device)
        return states.index_select(0, where), torch.from_numpy(targets).to(device).long()

    def _find_head(self, config: Mapping[str, Any], tree: ParameterTree) -> tuple[dict[str, str], Tensors]:
        """(names in the file that stand for a parameter of another name, the head)."""
        table = self._backbone.table
        stored = [name for name in tree.weights if name.endswith(_HEADS)]
        ties = config.get("tie_word_embeddings", config["model_type"] in _TIES)
        if not stored:
            if ties:
                return {}, table
            raise MismatchError(
                f"{self._place}: its weights have no lm_head, and config.json does not tie it to the token "
                "table (tie_word_embeddings); take the model that generates text, not its encoder alone"
            )
        # As transformers: a head that is declared tied and stored apart is tied only if it is equal.
        if ties and torch.equal(tree.weights.tensor(stored[0]), tree.weights.tensor(self.table_name)):
            return {stored[0]: self.table_name}, table
        return {}, tree.layer(stored[0].removesuffix(".weight"))


_HEADS = ("lm_head.weight", "lm_head.out_proj.weight")
# What transformers takes where config.json leaves it out.
_SOFTCAPS = {"gemma2": 30.0, "t5gemma": 30.0}
_TIES = frozenset({"gemma2", "gemma3", "gemma3_text", "t5gemma", "t5gemma2"})
_DECODERS: Mapping[str, Callable[[Mapping[str, Any], ParameterTree], gated.GatedBackbone]] = {
    "gemma2": gated.gemma2,
    "gemma3": gated.gemma3,
    "gemma3_text": gated.gemma3,
    "llama": gated.llama,
    "mistral": gated.llama,
    "qwen2": gated.llama,
    "qwen3": gated.llama,
}


def packed_places(lengths: NDArray[np.int32], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[T], the packed places of the tokens of the rows in `order`."""
    starts = (np.cumsum(lengths) - lengths)[order]
    sizes = lengths[order]
    shifts: NDArray[np.int64] = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    return np.arange(len(shifts)) + shifts


def _check(batch: LanguageBatch, targets: NDArray[np.int32], vocabulary: int) -> None:
    lengths = batch.lengths
    if len(lengths) == 0 or lengths.min() < 1 or not lengths.sum() == len(batch.ids) == len(batch.targets):
        raise ValueError(
            f"lengths of {int(lengths.sum())} tokens for {len(batch.ids)} ids and {len(batch.targets)} "
            "targets; each is 1 at least"
        )
    if len(targets) and not 0 <= targets.min() <= targets.max() < vocabulary:
        raise ValueError(
            f"targets from {targets.min()} to {targets.max()}, but the vocabulary has {vocabulary} tokens"
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
) -> gated.GatedBackbone:
    if config.get("quantization_config"):
        raise MismatchError(
            f"{file}: the weights are quantised and cannot be trained; use the model that they were made from"
        )
    model_type = str(config.get("model_type"))
    build = _DECODERS.get(model_type)
    reason = f"model type {model_type!r} cannot be trained as a language model"
    if build is not None:
        try:
            return build(_seeing({"model_type": model_type, **_decoder_config(config)}, attention), tree)
        except NotPacked as error:
            reason = f"it cannot be trained packed: {error}"
    raise MismatchError(f"{file}: {reason}; known are {', '.join(sorted(_DECODERS))}")


def _seeing(config: Mapping[str, Any], attention: Attention) -> Mapping[str, Any]:
    """The config of a decoder whose tokens see what `attention` says."""
    is_gemma3 = str(config["model_type"]).startswith("gemma3")
    if attention == "causal":
        return {**config, "is_causal": True, "use_bidirectional_attention": False}
    if attention == "bidirectional" and not is_bidirectional(reach_of_layers(config) or ()):
        return {**config, **({"use_bidirectional_attention": True} if is_gemma3 else {"is_causal": False})}
    return config

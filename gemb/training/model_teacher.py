"""A model folder as the teacher of a training: its vectors, kept by content, and its own quality.

R rows (texts) of a batch, T packed tokens, E width of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemb.device import Device
from gemb.engine import Engine
from gemb.engine.cache import ARITHMETIC
from gemb.engine.encoder import Encoder, load_tokeniser
from gemb.engine.opening import open_here, stdout_guarded
from gemb.errors import MismatchError
from gemb.evaluation.cached import CachedEngine
from gemb.model.folder import ModelFolder, fingerprint, read_folder
from gemb.model.hub import find_model
from gemb.text.batches import Batch
from gemb.text.prompts import NONE, Prompts
from gemb.text.tokenisation import Tokeniser
from gemb.training import stored_teacher
from gemb.training.batches import TrainingBatch
from gemb.training.data_recipe import DataSet, PromptText
from gemb.training.evaluated_sets import EvaluatedSets
from gemb.training.held_out import Evaluation, Evaluations, HeldOutPairs, Measured
from gemb.training.recipe import TrainRecipe
from gemb.training.run_folder import RunFolder
from gemb.training.teacher_recipe import VectorSource
from gemb.training.teaching import OpenTeacher, Teaching

_USUAL_MAX_TOKENS = 512


def opener(recipe: TrainRecipe, settings: VectorSource, key: str = "teacher") -> OpenTeacher:
    """What opens a teacher of a recipe when its run is set up; `key` is where the recipe has its `settings`.

    Opening raises UnavailableError for a model that cannot be had, MismatchError for a prompt that it does
    not declare and for longer texts than it takes.
    """
    if settings.vectors is not None:
        return stored_teacher.opener(settings)

    @contextmanager
    def opened(folder: RunFolder, device: Device, held_out: Sequence[DataSet]) -> Iterator[Teaching]:
        model = read_folder(find_model(settings.model, offline=recipe.offline))
        longest = settings.max_tokens or min(_USUAL_MAX_TOKENS, model.max_tokens)
        if longest > model.max_tokens:
            raise MismatchError(
                f"{key}.max_tokens is {longest:,}, but {settings.model} takes {model.max_tokens:,} "
                "at most; lower it"
            )
        with stdout_guarded():
            computing = open_here(model, device.name, recipe.precision, recipe.threads, recipe.batch_tokens)
        context = [fingerprint(model), device.kind, computing.precision, str(ARITHMETIC)]
        engine = CachedEngine(computing, settings.cache or folder.partial / "teacher", context)
        try:
            teacher = ModelTeacher(recipe, settings, model, load_tokeniser(model, longest), engine)
            yield Teaching(
                name=str(settings.model),
                fingerprint=context[0],
                dims=engine.dims,
                vectors=teacher.vectors,
                measure=lambda: teacher.measure(held_out, folder),
                sizes=model.matryoshka_dims,
                ahead=settings.ahead,
            )
        finally:
            engine.close()

    return opened


class ModelTeacher:
    """The vectors and the quality of a teacher that is a model folder."""

    def __init__(
        self,
        recipe: TrainRecipe,
        settings: VectorSource,
        model: ModelFolder,
        tokeniser: Tokeniser,
        engine: Engine,
    ) -> None:
        """Raises MismatchError for a prompt that the model does not declare."""
        self._recipe = recipe
        self._settings = settings
        self._model = model
        self._tokeniser = tokeniser
        self._engine = engine
        self._encoder = Encoder(model, tokeniser, engine)
        self._declared = Prompts(model.prompts, model.default_prompt)
        for prompt in (self._settings.prompts.query, self._settings.prompts.passage):
            if isinstance(prompt, str):
                self._declared.template(prompt)

    def vectors(self, batch: TrainingBatch) -> NDArray[np.float32]:
        """float32[R, E] of the texts of a batch: first the queries, then all passages."""
        if batch.texts is None:
            raise ValueError(f"a batch of {batch.dataset} has no texts for the teacher")
        prompts, pairs = self._settings.prompts, batch.pairs
        return np.concatenate([
            self._embedded(batch.texts[:pairs], prompts.query),
            self._embedded(batch.texts[pairs:], prompts.passage),
        ])  # fmt: skip

    def measure(self, held_out: Sequence[DataSet], folder: RunFolder) -> Measured:
        """The teacher's scores where the student is evaluated, at the teacher's full width."""
        settings = self._recipe.evaluation
        parts: list[Evaluation] = [
            HeldOutPairs.open(
                one.model_copy(update={"prompts": self._settings.prompts}),
                tokeniser=self._tokeniser,
                prompts=self._declared,
                cache=folder.data,
                limit=settings.limit,
                sizes=(self._engine.dims,),
            )
            for one in held_out
        ]
        if settings.sets:
            parts.append(
                EvaluatedSets(
                    settings.sets,
                    tokeniser=self._tokeniser,
                    prompts=self._declared,
                    leave_out_prompts=not self._model.pooling.include_prompt,
                    sizes=(self._engine.dims,),
                    seed=self._recipe.seed,
                )
            )
        return Evaluations(parts).measure(_Packed(self._engine), "cpu", self._engine.batch_tokens)

    def _embedded(self, texts: Sequence[str], prompt: str | PromptText) -> NDArray[np.float32]:
        if isinstance(prompt, PromptText):
            return self._encoder.embed(
                [prompt.text + text for text in texts], as_=NONE, dims=self._engine.dims
            )
        return self._encoder.embed(texts, as_=prompt, dims=self._engine.dims)


class _Packed:
    """An engine as evaluation during a training asks for it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(
        self, ids: Tensor, lengths: NDArray[np.int32], prompt_tokens: NDArray[np.int32] | None = None
    ) -> Tensor:
        """[R, E] of ids[T] and lengths[R]; all rows have the same prompt."""
        order = np.argsort(-lengths, kind="stable")
        texts = np.split(ids.cpu().numpy().astype(np.int32), np.cumsum(lengths)[:-1])
        batch = Batch(
            np.concatenate([texts[row] for row in order]),
            lengths[order],
            order.astype(np.int64),
            0 if prompt_tokens is None else int(prompt_tokens[0]),
        )
        vectors = np.empty((len(lengths), self._engine.dims), np.float32)
        vectors[order] = self._engine.forward(batch)
        return torch.from_numpy(vectors)

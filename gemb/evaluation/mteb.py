"""A gemb model for `mteb.evaluate`, so that every task of the MTEB library runs through gemb.

    import mteb
    from gemb import Encoder
    from gemb.evaluation.mteb import Model

    mteb.evaluate(Model(Encoder.load("minilm")), mteb.get_tasks(tasks=["STSBenchmark"]))

It follows mteb 2's EncoderProtocol, which is told by its methods. B texts, D dims.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gemb.engine.encoder import Encoder
from gemb.evaluation.extras import load


class TaskMetadata(Protocol):
    """What is read of mteb's own class of this name."""

    name: str
    """For example SciFact."""
    type: str
    """For example Retrieval."""


class PromptType(Protocol):
    """mteb's query or document."""

    value: str


class Model:
    """An encoder as mteb asks for it.

    mteb keeps results by model name and revision; the revision is the fingerprint of weights, tokenizer and
    prompts, and the size, so that no other model gets this one's results.
    """

    def __init__(self, encoder: Encoder, *, name: str | None = None, dims: int | None = None) -> None:
        """`name` is organisation/model in mteb's results; None is gemb/FOLDER. `dims` cuts the vectors.

        Raises UnavailableError with the pip line where mteb is not installed, ValueError for a name
        without organisation.
        """
        load("mteb", extra="mteb")
        self._encoder = encoder
        self._dims = dims
        self._name = name or f"gemb/{encoder.folder.path.name}"
        if "/" not in self._name:
            raise ValueError(f"name is {self._name!r}, but mteb wants organisation/model")

    def encode(
        self,
        inputs: Iterable[Mapping[str, Sequence[str]]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **settings: object,
    ) -> NDArray[np.float32]:
        """float32[B, D] of the `text` of all batches; an empty text, which has no meaning, is a zero row.

        `settings` such as batch_size are not used: batches are made by tokens. Raises GembError as
        `Encoder.embed` does.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        whole = [number for number, text in enumerate(texts) if text and not text.isspace()]
        found = self._encoder.embed(
            [texts[number] for number in whole],
            as_=self.prompt_for(task_metadata, prompt_type),
            dims=self._dims,
        )
        if len(whole) == len(texts):
            return found
        vectors = np.zeros((len(texts), found.shape[1]), np.float32)
        vectors[whole] = found
        return vectors

    def prompt_for(self, task: TaskMetadata, prompt_type: PromptType | None) -> str:
        """The name of the prompt for texts of a task, by mteb's order: the more special one first.

        TASK-ROLE, TASK, TYPE-ROLE, TYPE, ROLE, of which the first that the model declares is taken; else its
        default prompt, or none. A role is query or document.
        """
        role = prompt_type.value if prompt_type is not None else None
        names = [task.name, task.type]
        if role is not None:
            names = [f"{task.name}-{role}", task.name, f"{task.type}-{role}", task.type, role]
        return self._encoder.prompt_of(names)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:  # noqa: ANN401  # arrays or tensors
        """Cosines of all with all, as mteb computes them: a tensor [B1, B2]."""
        return load("mteb.similarity_functions", extra="mteb").cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:  # noqa: ANN401
        """Cosines row by row, as mteb computes them: a tensor [B]."""
        return load("mteb.similarity_functions", extra="mteb").pairwise_cos_sim(embeddings1, embeddings2)

    @cached_property
    def mteb_model_meta(self) -> Any:  # noqa: ANN401  # mteb's ModelMeta
        """The model as mteb describes models."""
        meta = load("mteb.models.model_meta", extra="mteb")
        width = self._dims or self._encoder.folder.truncate_dims or self._encoder.dims
        return meta.ModelMeta.create_empty(
            overwrites={
                "name": self._name,
                "revision": f"{self._encoder.fingerprint}-{width}",
                "embed_dim": width,
                "max_tokens": self._encoder.folder.max_tokens,
                "similarity_fn_name": meta.ScoringFunction.COSINE,
                "use_instructions": bool(self._encoder.folder.prompts),
                "modalities": ["text"],
            }
        )

"""`Encoder`: texts to vectors in Python, the same path that `gemb embed` takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemb.engine import BatchFailure, Engine, run_batches
from gemb.errors import GembError
from gemb.model.folder import ModelFolder, fingerprint, read_folder
from gemb.model.hub import find_model
from gemb.text.batches import token_batches
from gemb.text.prompts import Prompts
from gemb.text.tokenisation import Tokeniser
from gemb.vectors import cut

if TYPE_CHECKING:
    from gemb.engine.opening import EngineName


class Encoder:
    """An embedding model that is loaded and ready.

    >>> from gemb import Encoder
    >>> encoder = Encoder.load("minilm")
    >>> vectors = encoder.embed(["a cat sits on the mat", "a dog lies on the rug"])
    >>> vectors.shape
    (2, 384)
    """

    def __init__(self, folder: ModelFolder, tokeniser: Tokeniser, engine: Engine) -> None:
        self.folder = folder
        self._tokeniser = tokeniser
        self._engine = engine
        self._prompts = Prompts(folder.prompts, folder.default_prompt)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        device: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        max_tokens: int | None = None,
        batch_tokens: int | None = None,
        offline: bool = False,
        engine: EngineName = "auto",
        few_texts: bool = False,
    ) -> Encoder:
        """The encoder of a model folder, a hub name, or `minilm`.

        `device` is auto, cpu, cuda, cuda:N, mps, or several with commas between; `precision` auto, fp32 or
        bf16; `threads` worker threads on a CPU; `max_tokens` cuts longer texts and may not exceed the
        model's own maximum. `engine` torch runs everything; onnx needs no torch; auto is onnx if `few_texts`
        are to be expected and the model has a graph, in its folder or in the cache.

        Raises GembError: UnavailableError if the model cannot be had, MismatchError if a part is unknown.
        """
        from gemb.engine.opening import open_engine

        folder = read_folder(find_model(str(model), offline=offline))
        if max_tokens is not None and max_tokens > folder.max_tokens:
            raise GembError(f"max_tokens is {max_tokens:,}, but {model} takes {folder.max_tokens:,} at most")
        tokeniser = load_tokeniser(folder, max_tokens)
        opened = open_engine(
            folder,
            device=device,
            precision=precision,
            threads=threads,
            batch_tokens=batch_tokens,
            notice=lambda _: None,
            engine=engine,
            few_texts=few_texts,
        )
        return cls(folder, tokeniser, opened)

    @property
    def dims(self) -> int:
        """D, the width of a whole vector."""
        return self._engine.dims

    @property
    def device_line(self) -> str:
        """What runs where and why."""
        return self._engine.device_line

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the vectors depend on: weights, tokenizer, modules, prompts."""
        return fingerprint(self.folder)

    def prompt_of(self, names: Sequence[str]) -> str:
        """The prompt for texts of a kind, as `gemb.text.prompts.Prompts.first_of` finds it."""
        return self._prompts.first_of(names)

    def embed(
        self,
        texts: Sequence[str],
        *,
        as_: str | None = None,
        titles: Sequence[str | None] | None = None,
        dims: int | None = None,
        normalise: bool | None = None,
    ) -> NDArray[np.float32]:
        """fp32 vectors[N, K] of N texts, in their order.

        `as_` is document, query, a prompt name of the model, or none; None is document where the model has
        prompts. `titles` go where the model's document prompt wants them. `dims` K cuts to a Matryoshka
        size and brings the rows back to unit length; `normalise` forces or forbids that.
        Texts longer than the model's maximum are cut.

        Raises MismatchError for an unknown prompt name, GembError for an empty text without a title to stand
        for it, or a size K > D.
        """
        if isinstance(texts, str):
            raise TypeError("texts is one string; pass a list of strings")
        width = dims if dims is not None else self.folder.truncate_dims or self.dims
        if not 1 <= width <= self.dims:
            raise GembError(f"dims is {dims}, but the model gives {self.dims}")
        template = self._prompts.template(as_)
        if titles is not None and len(titles) != len(texts):
            raise GembError(f"there are {len(titles)} titles for {len(texts)} texts")
        rendered = []
        for number, text in enumerate(texts):
            title = titles[number] if titles is not None and template.uses_titles else None
            if not text.strip() and not (title and title.strip()):
                raise GembError(f"text {number} is empty; leave it out")
            rendered.append(template.render(text, title))
        include = self.folder.pooling.include_prompt
        skipped = 0 if include else self._tokeniser.prompt_tokens(template.prefix)
        encoded = self._tokeniser.encode(rendered, prompt_tokens=skipped)
        if not encoded.lengths.all():
            number = int(np.argmin(encoded.lengths))
            raise GembError(f"text {number} gives no vector: the tokenizer finds no token in it")
        vectors = np.empty((len(texts), self.dims), dtype=np.float32)
        for batch, result in run_batches(self._engine, token_batches(encoded, self._engine.batch_tokens)):
            if isinstance(result, BatchFailure):
                raise GembError(f"text {int(result.rows[0])} gives no vector: {result.reason}")
            vectors[batch.rows] = result
        return cut(vectors, width, normalise=width < self.dims if normalise is None else normalise)

    def close(self) -> None:
        """Let go of the model; it computes nothing afterwards."""
        self._engine.close()


def load_tokeniser(folder: ModelFolder, max_tokens: int | None = None) -> Tokeniser:
    """The tokeniser of a model folder, cutting at `max_tokens`, or at the model's own maximum.

    Raises MismatchError if its vocabulary is larger than the model's embedding table.
    """
    tokeniser = Tokeniser.load(
        folder.tokenizer_folder, max_tokens=max_tokens or folder.max_tokens, lower_case=folder.do_lower_case
    )
    rows = folder.text_config.get("vocab_size")
    if isinstance(rows, int):
        tokeniser.check_vocabulary(rows)
    return tokeniser

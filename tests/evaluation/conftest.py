"""A model that needs no weights: a text is the sum of fixed random vectors of its words."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

DIMS = 64


class WordEncoder:
    """Texts with common words are near each other."""

    def __init__(self, prompts: Sequence[str] = ()) -> None:
        self.prompts = prompts
        self.seen: list[tuple[str | None, list[str], list[str | None] | None]] = []

    @property
    def dims(self) -> int:
        return DIMS

    def prompt_of(self, names: Sequence[str]) -> str:
        return next((name for name in names if name in self.prompts or name in ("query", "document")), "none")

    def embed(
        self,
        texts: Sequence[str],
        *,
        as_: str | None = None,
        titles: Sequence[str | None] | None = None,
    ) -> NDArray[np.float32]:
        self.seen.append((as_, list(texts), None if titles is None else list(titles)))
        whole = [
            f"{title or ''} {text}" for text, title in zip(texts, titles or [""] * len(texts), strict=True)
        ]
        return np.stack([np.sum([_vector(word) for word in text.lower().split()], axis=0) for text in whole])


def _vector(word: str) -> NDArray[np.float32]:
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "little")
    return np.random.default_rng(seed).standard_normal(DIMS).astype(np.float32)


@pytest.fixture
def encoder() -> WordEncoder:
    return WordEncoder()

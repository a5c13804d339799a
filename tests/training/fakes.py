"""Stand-ins for the parts around the loop: a small encoder with dropout, and batches made by hand."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore
from torch.multiprocessing.spawn import spawn

from gemb.training.batches import TrainingBatch
from gemb.training.ranks import ranks_of_environment

VOCABULARY = 50


class TinyEncoder(nn.Module):
    """Mean of token states after two layers: [R, D] of packed tokens, D = 8."""

    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCABULARY, 8, generator=generator))
        self.inner = nn.Parameter(torch.randn(16, 8, generator=generator) / 3)
        self.outer = nn.Parameter(torch.randn(8, 16, generator=generator) / 4)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, ids: Tensor, lengths: NDArray[np.int32], prompt_tokens: NDArray[np.int32] | None = None
    ) -> Tensor:
        """One vector a row."""
        del prompt_tokens
        hidden = torch.tanh(self.table[ids.long()] @ self.inner.T)
        states = self.dropout(hidden) @ self.outer.T
        parts = states.split([int(length) for length in lengths])
        return torch.stack([part.mean(dim=0) for part in parts])


class SparseEncoder(TinyEncoder):
    """Its table has sparse gradients."""

    def forward(
        self, ids: Tensor, lengths: NDArray[np.int32], prompt_tokens: NDArray[np.int32] | None = None
    ) -> Tensor:
        """As that of TinyEncoder."""
        del prompt_tokens
        rows = nn.functional.embedding(ids.long(), self.table, sparse=True)
        states = self.dropout(torch.tanh(rows @ self.inner.T)) @ self.outer.T
        parts = states.split([int(length) for length in lengths])
        return torch.stack([part.mean(dim=0) for part in parts])


def on_ranks(count: int, action: Callable[..., object], *arguments: Any) -> None:  # noqa: ANN401
    """Call `action(ranks, *arguments)` in `count` processes over gloo; returns when all are done."""
    # Their meeting place is kept here, as by torchrun: the port is nobody else's from now on.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spawn(_on_one_rank, args=(count, store.port, action, arguments), nprocs=count)  # type: ignore[no-untyped-call]


def _on_one_rank(
    index: int, count: int, port: int, action: Callable[..., object], arguments: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(index),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with ranks_of_environment("cpu") as ranks:
        action(ranks, *arguments)


def tiny_batch(pairs: int = 4, negatives: int = 0, seed: int = 0, dataset: str = "tiny") -> TrainingBatch:
    """Texts of 1 to 12 tokens."""
    generator = np.random.default_rng(seed)
    rows = 2 * pairs + negatives
    lengths = generator.integers(1, 13, rows).astype(np.int32)
    ids = generator.integers(4, VOCABULARY, int(lengths.sum())).astype(np.int32)
    return TrainingBatch(
        dataset=dataset,
        kind="pairs",
        ids=ids,
        lengths=lengths,
        prompt_tokens=np.zeros(rows, np.int32),
        pairs=pairs,
        owner=np.sort(generator.integers(0, pairs, negatives)).astype(np.int64),
        hashes=hashes_of([f"{seed} {row}" for row in range(rows)]),
        scores=None,
        texts=None,
    )


def hashes_of(texts: Sequence[str]) -> NDArray[np.int64]:
    """Equal texts, equal hashes."""
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(digests), dtype=np.int64).copy()


class ListedBatches:
    """A stream of batches that are made by number, from `start` on; `position` counts those given."""

    def __init__(self, count: int, start: int = 0, pairs: int = 6, negatives: int = 2) -> None:
        self._count = count
        self._pairs = pairs
        self._negatives = negatives
        self.position = start

    def __iter__(self) -> Iterator[TrainingBatch]:
        """The batches that are left."""
        while self.position < self._count:
            batch = tiny_batch(self._pairs, self._negatives, seed=self.position)
            self.position += 1
            yield batch

"""The digests of models' tensors, taken while their blocks pass by on their way into another model.

SHA-256 takes longer than most merges, so it runs beside them; and no block is read twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING

from gemb.jobs.merge_sources import Source, full_name
from gemb.model.folder import fingerprint
from gemb.model.identity import TensorDigest
from gemb.model.weights import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class PassingDigests:
    """The digests of one model's tensors, whose blocks come one after the other, each tensor's in order.

    `pool` hashes them, one block at a time; without a pool the caller does.
    """

    def __init__(self, pool: Executor | None) -> None:
        self._pool = pool
        self._running: Future[None] | None = None
        self._tensor: tuple[str, TensorDigest] | None = None
        self._found: dict[str, str] = {}

    def begin(self, name: str, spec: TensorSpec) -> None:
        """The blocks that follow are those of the tensor of this full name; the tensor before is complete.

        Raises UnavailableError if that one holds a number that is not finite.
        """
        self._end()
        self._tensor = name, TensorDigest(spec)

    def take(self, block: Tensor) -> None:
        """Hash the next block, which must not change any more."""
        if self._tensor is None:
            raise ValueError("there is a block, but no tensor has begun")
        _, digest = self._tensor
        if self._pool is None:
            digest.update(bytes_of(block))
            return
        self._wait()
        self._running = self._pool.submit(digest.update, bytes_of(block))

    def finish(self) -> Mapping[str, str]:
        """The digests by full name. Raises UnavailableError as `begin` does."""
        self._end()
        return self._found

    def _end(self) -> None:
        self._wait()
        if self._tensor is not None:
            name, digest = self._tensor
            self._found[name] = digest.hexdigest()
        self._tensor = None

    def _wait(self) -> None:
        if self._running is not None:
            self._running.result()
        self._running = None


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's numbers; only of one that is not contiguous a copy."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def identity_of(source: Source, digests: Mapping[str, str]) -> str:
    """The fingerprint of a model; tensors that have one in `digests`, by full name, are not read."""
    known = {
        weights.spec(name): digests[full_name(part, name)]
        for part, weights in source.parts.items()
        for name in weights
        if full_name(part, name) in digests
    }
    return fingerprint(source.folder, known)

"""Merging tensor by tensor, block by block: what is in memory does not grow with the models.

Files are written as they are computed, so that no more than some blocks of rows are held; only methods that
need the length or the angle of a tensor hold whole ones. Sums are float32. Blocks have a multiple of 16 rows,
since torch draws random numbers in groups of 16: how large they are changes no result.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from io import RawIOBase
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Self

import orjson

from gemb.errors import GembError, MismatchError, UnavailableError
from gemb.files import os_errors_explained, readable_bytes, sync_to_disk
from gemb.jobs.merge_digests import PassingDigests, bytes_of
from gemb.jobs.merge_recipe import MergeRecipe, layers_of
from gemb.jobs.merge_sources import Tensors, full_name, is_number
from gemb.merging.catalogue import TensorSettings
from gemb.model.identity import not_finite
from gemb.model.weights import DTYPE_NAMES, ITEM_BYTES, TensorSpec, Weights
from gemb.recipe import origin

if TYPE_CHECKING:
    from torch import Tensor

    from gemb.merging.thinning import Bounds

BLOCK_ENTRIES = 1 << 18
BLOCK_BYTES, WHOLE_BYTES = 30, 60
"""What one entry of each model and of the base takes at work, in blocks and as a whole tensor: the most that
was measured of any method, of float32 and bfloat16 models."""
_ROWS_TOGETHER = 16
_SENT_TOGETHER = 1 << 27
"""Bytes after which a file that is being written is sent to the disk."""
_DTYPES: Mapping[str, str] = {name: short for short, name in DTYPE_NAMES.items()}
_TABLES = re.compile(r"(embed_tokens|word_embeddings|shared|lm_head|decoder|wte)\.weight$")
"""Names of tensors that some families store twice."""


class Merge:
    """One merge: the tensors of the models and of their base, and what the recipe says of each.

    `weights` go before those of the recipe.

    Raises GembError for parameters that cannot be used, MismatchError for a filter that fits no tensor and
    for integers that differ.
    """

    def __init__(
        self,
        recipe: MergeRecipe,
        models: Sequence[Tensors],
        base: Tensors | None,
        weights: Sequence[float] = (),
    ) -> None:
        self._recipe = recipe
        self._models = models
        self._base = base
        self._every = [*models, *([] if base is None else [base])]
        self._names = list(models[0])
        self._block_entries = self._allowed_entries()
        layers = layers_of(self._names)
        self._check_filters()
        self._settings = {name: recipe.settings(name, layers, weights) for name in self._names}
        self._check_memory()
        self._twins = self._tied()
        self._bounds: list[Bounds] | None = None
        self._zero_sign = 1.0

    def prepare(self, on_tensor: Callable[[str], None]) -> None:
        """Look through the whole model, for what TIES needs to know before the first tensor is merged."""
        if self._recipe.variant != "paper" or self._recipe.merge_method != "ties":
            return
        from gemb.merging.election import sign_balance
        from gemb.merging.merged import thinned
        from gemb.merging.thinning import largest

        names = [name for name in self._names if is_number(self._models[0].spec(name))]
        names = [name for name in names if name not in self._twins]
        entries = sum(self._models[0].spec(name).elements for name in names)
        self._bounds = []
        for model, tensors in enumerate(self._models):
            on_tensor(f"looking for the largest changes of {tensors.name}")
            density = self._one_density(model)
            deltas = lambda tensors=tensors: (  # noqa: E731
                delta for name in names for delta in self._deltas(tensors, name)
            )
            self._bounds.append(largest(deltas, entries, density))
        balance = 0
        on_tensor("electing signs")
        for name in names:
            settings = self._settings[name]
            for blocks in zip(*(self._deltas(tensors, name) for tensors in self._models), strict=True):
                kept = thinned(self._recipe.merge_method, blocks, settings, bounds=self._bounds)
                balance += sign_balance(kept, settings.weights)
        self._zero_sign = 1.0 if balance >= 0 else -1.0

    def write(
        self,
        part: str,
        weights: Weights,
        path: Path,
        on_tensor: Callable[[str], None],
        ingredients: Sequence[PassingDigests | None] = (),
        output: PassingDigests | None = None,
        pool: Executor | None = None,
    ) -> int:
        """Write the merged tensors of a part, in the order of its file; gives the bytes of the numbers.

        The blocks that are read pass by `ingredients`, of the models and then of the base, None where nobody
        asks for digests; those that are written pass by `output`. A `pool` writes a block while the next one
        is merged.

        Raises UnavailableError where a number of a model is not finite, GembError where the dtype cannot hold
        a result, MachineError where the disk is full.
        """
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in weights:
            spec = self._models[0].spec(full_name(part, name))
            dtype = self._dtype(spec.dtype)
            size = spec.elements * ITEM_BYTES[dtype]
            header[name] = {
                "dtype": dtype,
                "shape": list(spec.shape),
                "data_offsets": [position, position + size],
            }
            position += size
        text = orjson.dumps(header)
        text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8, as safetensors itself has it
        start = 8 + len(text)
        with os_errors_explained(path), path.open("wb", buffering=0) as file, _Behind(file, pool) as behind:
            behind.write(memoryview(struct.pack("<Q", len(text)) + text))
            for name in weights:
                full = full_name(part, name)
                on_tensor(full)
                spec = self._models[0].spec(full)
                dtype = self._dtype(spec.dtype)
                stop = start + spec.elements * ITEM_BYTES[dtype]
                if output is not None:
                    output.begin(full, TensorSpec(name, dtype, spec.shape, path, start, stop))
                for block in self._merged(full, ingredients):
                    behind.write(bytes_of(block))
                    if output is not None:
                        output.take(block)
                start = stop
            behind.finish()
        return position

    def _merged(self, name: str, ingredients: Sequence[PassingDigests | None]) -> Iterator[Tensor]:
        """The merged tensor in blocks, in its dtype on disk."""
        import torch

        from gemb.merging.merged import merged, seeded

        spec = self._models[0].spec(name)
        if not is_number(spec):
            yield self._same(name)
            return
        source = self._twins.get(name, name)
        settings = self._settings[source]
        out = getattr(torch, DTYPE_NAMES[self._dtype(spec.dtype)])
        bounds = self._bounds_of(source, settings)
        generators = [seeded(self._recipe.seed, source, model) for model in range(len(self._models))]
        whole = _is_whole(self._recipe, settings)
        passing = ingredients if source == name else ()  # the blocks of a twin are those of the other one
        for digests, tensors in zip(passing, self._every, strict=False):
            if digests is not None:
                digests.begin(name, tensors.spec(name))
        keeps = self._recipe.merge_method != "linear" or settings.normalise
        for raw in self._blocks(source, whole=whole):
            for digests, read in zip(passing, raw, strict=False):
                if digests is not None:
                    digests.take(read)
            if keeps and all(torch.equal(raw[0], other) for other in raw[1:]):
                block = raw[0].to(out)  # what no model changed stays as it is, to the bit
            else:
                blocks = [one.float() for one in raw]
                base = None if self._base is None else blocks.pop()
                block = merged(
                    self._recipe.merge_method,
                    base,
                    blocks,
                    settings,
                    generators=generators,
                    bounds=bounds,
                    zero_sign=self._zero_sign,
                ).to(out)
            if not_finite(bytes_of(block), self._dtype(spec.dtype)):
                raise self._not_finite(source, raw, str(out))
            yield block

    def _bounds_of(self, name: str, settings: TensorSettings) -> Sequence[Bounds]:
        """[N], which magnitudes stay of a tensor."""
        from gemb.merging.thinning import between, largest

        thinning = self._recipe.method.thinning
        if self._bounds is not None or thinning not in ("largest", "between"):
            return self._bounds or ()
        entries = self._models[0].spec(name).elements
        found = []
        for model, tensors in enumerate(self._models):
            deltas = lambda tensors=tensors: self._deltas(tensors, name)  # noqa: E731
            if thinning == "largest":
                found.append(largest(deltas, entries, settings.densities[model]))
            else:
                found.append(between(deltas, entries, settings.densities[model], settings.outliers[model]))
        return found

    def _deltas(self, tensors: Tensors, name: str) -> Iterator[Tensor]:
        if self._base is None:
            raise ValueError("deltas need a base")
        both = (self._split(each.tensor(name)) for each in (tensors, self._base))
        for one, base in zip(*both, strict=True):
            yield one.float() - base.float()

    def _blocks(self, name: str, *, whole: bool) -> Iterator[list[Tensor]]:
        """The tensor of every model, then of the base, in blocks of rows or as a whole."""
        tensors = [one.tensor(name) for one in self._every]
        if whole:
            yield tensors
            return
        for blocks in zip(*(self._split(tensor) for tensor in tensors), strict=True):
            yield list(blocks)

    def _split(self, tensor: Tensor) -> Iterator[Tensor]:
        """The tensor in blocks of whole rows; one of fewer than two dimensions as it is."""
        if tensor.ndim < 2:
            yield tensor
            return
        rows = self._block_entries // max(1, math.prod(tensor.shape[1:]))
        rows = max(_ROWS_TOGETHER, rows - rows % _ROWS_TOGETHER)
        edges = [*range(0, len(tensor), rows), len(tensor)]
        for start, stop in pairwise(edges):
            yield tensor[start:stop]

    def _allowed_entries(self) -> int:
        """The entries of a block, so that all blocks at work stay within the recipe's memory."""
        if self._recipe.max_memory is None:
            return BLOCK_ENTRIES
        return min(BLOCK_ENTRIES, int(self._recipe.max_memory * 2**30) // (BLOCK_BYTES * len(self._every)))

    def _check_memory(self) -> None:
        """Raises GembError if a tensor that is needed as a whole takes more than the recipe's memory."""
        if self._recipe.max_memory is None:
            return
        whole = [name for name in self._names if _is_whole(self._recipe, self._settings[name])]
        if not whole:
            return
        name = max(whole, key=lambda name: self._models[0].spec(name).elements)
        needed = self._models[0].spec(name).elements * WHOLE_BYTES * len(self._every)
        if needed > self._recipe.max_memory * 2**30:
            raise GembError(
                f"{self._recipe.merge_method} needs whole tensors, and {name} takes about "
                f"{readable_bytes(needed)} at work, but max_memory is {self._recipe.max_memory:g} GiB; "
                "raise it, or take a method that works in blocks, such as linear"
            )

    def _same(self, name: str) -> Tensor:
        """A tensor of integers. Raises MismatchError if the models have different ones."""
        import torch

        first = self._every[0].tensor(name)
        for other in self._every[1:]:
            if not torch.equal(first, other.tensor(name)):
                raise MismatchError(
                    f"{name} holds {self._every[0].spec(name).dtype} and differs in {other.name}; "
                    "integers have no mean"
                )
        return first

    def _dtype(self, own: str) -> str:
        wanted = self._recipe.out_dtype or self._recipe.dtype
        return own if wanted is None or own not in DTYPE_NAMES else _DTYPES[wanted]

    def _tied(self) -> dict[str, str]:
        """The tensors that are another one's copy in every model, with that one: both are merged as one."""
        import torch

        tables = [name for name in self._names if _TABLES.search(name)]
        twins: dict[str, str] = {}
        for first, *others in (tables[start:] for start in range(len(tables))):
            for other in others:
                if other not in twins and all(
                    one.spec(first).shape == one.spec(other).shape
                    and torch.equal(one.tensor(first), one.tensor(other))
                    for one in self._every
                ):
                    twins[other] = twins.get(first, first)
        return twins

    def _one_density(self, model: int) -> float:
        """The density of a model, the same for every tensor, since its trim goes over all of them."""
        found = {settings.densities[model] for settings in self._settings.values()}
        if len(found) > 1:
            raise GembError(
                f"density of {self._models[model].name} differs between tensors ({min(found):g} to "
                f"{max(found):g}), but TIES trims over the whole model; "
                "give one density, or variant: mergekit, which trims each tensor"
            )
        return found.pop()

    def _check_filters(self) -> None:
        for text in self._recipe.filters():
            if not any(text in name for name in self._names):
                words = {part for name in self._names for part in name.split(".") if not part.isdigit()}
                source = origin(self._recipe).source
                place = "" if source is None else f"{source}: "
                raise GembError(
                    f"{place}the filter {text!r} is in no tensor's name; "
                    f"names have {', '.join(sorted(words))}"
                )

    def _not_finite(self, name: str, blocks: Sequence[Tensor], dtype: str) -> GembError:
        import torch

        for tensors, block in zip(self._every, blocks, strict=True):
            if not bool(torch.isfinite(block).all()):
                return UnavailableError(
                    f"{tensors.spec(name).file} is damaged: {name} holds NaN or infinity; "
                    "download the model again, or train it anew"
                )
        return GembError(
            f"the merged {name} is too large for {dtype.removeprefix('torch.')}; "
            "take dtype: float32, or smaller weights"
        )


class _Behind:
    """Writes blocks to a file in their order, by a `pool` where there is one, one block behind the caller.

    What was written is sent to the disk on the way, so that `finish` has little to wait for.
    """

    def __init__(self, file: RawIOBase, pool: Executor | None) -> None:
        self._file = file
        self._pool = pool
        self._writing: Future[None] | None = None
        self._sending: Future[None] | None = None
        self._unsent = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nobody writes to the file any more."""
        wait([one for one in (self._writing, self._sending) if one is not None])

    def write(self, data: memoryview) -> None:
        """Write `data`, which must not change any more. Raises OSError of this block or the one before."""
        if self._pool is None:
            self._write(data)
            return
        if self._writing is not None:
            self._writing.result()
        self._writing = self._pool.submit(self._write, data)
        self._unsent += data.nbytes
        if self._unsent >= _SENT_TOGETHER and (self._sending is None or self._sending.done()):
            self._sending = self._pool.submit(sync_to_disk, self._file.fileno())
            self._unsent = 0

    def finish(self) -> None:
        """Returns once all blocks are on the disk. Raises OSError where one is not."""
        for one in (self._writing, self._sending):
            if one is not None:
                one.result()
        sync_to_disk(self._file.fileno())

    def _write(self, data: memoryview) -> None:
        while data.nbytes:
            data = data[self._file.write(data) or 0 :]


def _is_whole(recipe: MergeRecipe, settings: TensorSettings) -> bool:
    """Whether a tensor is merged as a whole: its length or its angle counts."""
    method = recipe.method
    if method.is_whole:
        return not (recipe.merge_method == "model_stock" and settings.by_row)
    return method.thinning in ("random", "rank") and settings.rescale == "norm"

"""Who a model is: one SHA-256 over what its vectors depend on, whatever its files are called.

The digest is over tensors (name, dtype, shape, bytes), so sharding a model or rewriting a header leaves it as
it was. While the bytes pass, each number is checked to be finite: a model that has a digest has no NaN.
Whoever has the bytes in hand can take the digest of a tensor from them (`TensorDigest`) and hand it over.
A digest is remembered in the user's cache under the size, times and inode of every file it was made from, so
that a big model is read once; a cache that cannot be read or written only costs the time.
"""

import gc
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import orjson

from gemb.device import available_threads
from gemb.errors import UnavailableError
from gemb.model.hub import cache_folder
from gemb.model.weights import TensorSpec, Weights

_BLOCK_BYTES = 1 << 20  # a multiple of every element size, small enough to stay in the processor's cache
_MOST_THREADS = 4  # more are no quicker than the disk
# The bits of a float as an integer with and without a sign, and infinity among them.
_FLOATS = {"F16": (np.int16, np.uint16, 0x7C00), "BF16": (np.int16, np.uint16, 0x7F80),
           "F32": (np.int32, np.uint32, 0x7F800000),
           "F64": (np.int64, np.uint64, 0x7FF0000000000000)}  # fmt: skip
_LAYOUT = "1"  # part of every digest and cache key; raise it when the way of hashing changes


def content_digest(
    weights: Iterable[Weights],
    others: Iterable[Path],
    settings: Mapping[str, object],
    digests: Mapping[TensorSpec, str] | None = None,
) -> str:
    """SHA-256, 64 hex digits, of all tensors, the content of the files in `others`, and `settings` as JSON.

    JSON files are hashed in a canonical spelling. Tensors of different `weights` are told by their place.
    Those that have one in `digests`, by a TensorDigest, are not read.
    Raises UnavailableError if a file cannot be read or a tensor holds NaN or infinity.
    """
    weights, others = list(weights), list(others)
    parts = hashlib.sha256(_LAYOUT.encode())
    parts.update(orjson.dumps(settings, option=orjson.OPT_SORT_KEYS))
    place = _memory(weights, others)  # of the files as they are before they are read
    known = _remembered(place)
    if known is None:
        known = _digest_of_files(weights, others, digests or {})
        _remember(place, known)
    parts.update(known.encode())
    return parts.hexdigest()


def is_remembered(weights: Iterable[Weights], others: Iterable[Path]) -> bool:
    """Whether `content_digest` of the same would read none of the files."""
    return _remembered(_memory(weights, others)) is not None


class TensorDigest:
    """SHA-256 of the bytes of one tensor, which come in blocks of whole numbers in the order of the file."""

    def __init__(self, spec: TensorSpec) -> None:
        self._spec = spec
        self._sha256 = hashlib.sha256()
        self._not_finite = 0

    def update(self, block: memoryview) -> None:
        """Take the next bytes of the tensor; other Python threads run meanwhile."""
        self._sha256.update(block)
        self._not_finite += not_finite(block, self._spec.dtype)

    def hexdigest(self) -> str:
        """64 hex digits of all blocks. Raises UnavailableError if a number in them was not finite."""
        if self._not_finite:
            raise UnavailableError(
                f"{self._spec.file} is damaged: {self._not_finite:,} of the {self._spec.elements:,} numbers "
                f"of {self._spec.name} are NaN or infinite; download the model again, or train it anew"
            )
        return self._sha256.hexdigest()


def not_finite(block: memoryview, dtype: str) -> int:
    """How many numbers of `block`, the bytes of a tensor or a part of it, are NaN or infinite.

    `dtype` is as safetensors has it; of one that is no float of 16 bits or more, the number is 0.
    """
    if dtype not in _FLOATS or not block.nbytes:
        return 0
    signed, unsigned, infinity = _FLOATS[dtype]
    bits = np.frombuffer(block, dtype=unsigned)
    sign = 1 << (8 * bits.itemsize - 1)
    # Infinity and NaN are the largest integers: of those above 0, and of all by their bits if they are below
    # 0. Two maxima are several times as quick as a count, which needs a copy of the block.
    if bits.view(signed).max() < infinity and bits.max() < sign + infinity:
        return 0
    return int(np.count_nonzero((bits & unsigned(infinity)) == unsigned(infinity)))


def _digest_of_files(weights: list[Weights], others: list[Path], digests: Mapping[TensorSpec, str]) -> str:
    total = hashlib.sha256()
    with ThreadPoolExecutor(min(_MOST_THREADS, available_threads())) as pool:
        for place, one in enumerate(weights):
            one.verify()
            tensors = sorted(one.stored.items())
            found = pool.map(
                lambda spec: digests.get(spec) or _hash_tensor(spec), [spec for _, spec in tensors]
            )
            for (name, spec), digest in zip(tensors, found, strict=True):
                total.update(f"{place} {name} {spec.dtype} {list(spec.shape)} {digest}\n".encode())
    for file in others:
        total.update(_canonical_digest(file))
    return total.hexdigest()


def _hash_tensor(spec: TensorSpec) -> str:
    """The digest of a tensor in its file. Raises UnavailableError if a number in it is not finite."""
    digest = TensorDigest(spec)
    left = spec.stop - spec.start
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, left)))
    try:
        with spec.file.open("rb") as file:
            file.seek(spec.start)
            while left:
                block = buffer[: min(left, len(buffer))]
                if file.readinto(block) < len(block):
                    raise UnavailableError(f"{spec.file} is damaged: {spec.name} is cut short")
                digest.update(block)
                left -= len(block)
    except OSError as error:
        raise UnavailableError(f"{spec.file} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _canonical_digest(file: Path) -> bytes:
    """SHA-256 of `_canonical`; a copy of a file that was read before, as merged models have, costs little."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UnavailableError(f"{file} cannot be read: {error.strerror}") from error
    key = (file.name, hashlib.sha256(content).digest())
    if key not in _canonical_digests:
        _canonical_digests[key] = hashlib.sha256(_canonical(file, content)).digest()
    return _canonical_digests[key]


_canonical_digests: dict[tuple[str, bytes], bytes] = {}
"""By name and SHA-256 of the content of a file."""


def _canonical(file: Path, content: bytes) -> bytes:
    """The `content` of `file`; of JSON the values only, of tokenizer.json all but padding and truncation.

    Padding and truncation are settings of whoever saved the file; gemb sets its own.
    """
    if file.suffix != ".json":
        return content
    try:
        with _without_collector():
            value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise UnavailableError(
            f"{file} is damaged: not JSON ({error.msg}); download the model again"
        ) from None
    if file.name == "tokenizer.json" and isinstance(value, dict):
        value = {key: inner for key, inner in value.items() if key not in {"padding", "truncation"}}
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Parsing makes a million objects; every few hundred start a search for cycles, and JSON has none."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _memory(weights: Iterable[Weights], others: Iterable[Path]) -> Path | None:
    """Where the digest of these files in their present state is kept; None if one of them is gone."""
    key = hashlib.sha256(_LAYOUT.encode())
    for file in [*(file for one in weights for file in one.files), *others]:
        try:
            path = file.resolve()
            state = path.stat()
        except OSError:
            return None
        key.update(os.fsencode(path))
        key.update(f"\0{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}\n".encode())
    return cache_folder() / "fingerprints" / f"{key.hexdigest()}.txt"


def _remembered(place: Path | None) -> str | None:
    try:
        known = place.read_text("ascii").strip() if place else ""
    except (OSError, UnicodeDecodeError):
        return None
    return known if len(known) == 64 and set(known) <= set("0123456789abcdef") else None


def _remember(place: Path | None, digest: str) -> None:
    if place is None:
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_suffix(f".{os.getpid()}")
        unfinished.write_text(digest, "ascii")
        unfinished.replace(place)
    except OSError:
        return  # the next run reads the model once more

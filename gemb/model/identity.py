"""Who a model is: one SHA-256 over what its vectors depend on, whatever its files are called.

The digest is over tensors (name, dtype, shape, bytes), so sharding a model or rewriting a header leaves it as
it was. While the bytes pass, each number is checked to be finite: a model that has a digest has no NaN.
A digest is remembered in the user's cache under the size, times and inode of every file it was made from, so
that a big model is read once; a cache that cannot be read or written only costs the time.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import orjson

from gemb.device import available_threads
from gemb.errors import UnavailableError
from gemb.model.hub import cache_folder
from gemb.model.weights import TensorSpec, Weights

_BLOCK_BYTES = 1 << 20  # a multiple of every element size, small enough to stay in the processor's cache
_MOST_THREADS = 4  # more are no quicker than the disk
# Bits of the exponent: all of them set means infinity or NaN.
_EXPONENTS = {"F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80), "F32": (np.uint32, 0x7F800000),
              "F64": (np.uint64, 0x7FF0000000000000)}  # fmt: skip
_LAYOUT = "1"  # part of every digest and cache key; raise it when the way of hashing changes


def content_digest(weights: Iterable[Weights], others: Iterable[Path], settings: Mapping[str, object]) -> str:
    """SHA-256, 64 hex digits, of all tensors, the content of the files in `others`, and `settings` as JSON.

    JSON files are hashed in a canonical spelling. Tensors of different `weights` are told by their place.
    Raises UnavailableError if a file cannot be read or a tensor holds NaN or infinity.
    """
    weights, others = list(weights), list(others)
    files = [file for one in weights for file in one.files] + others
    parts = hashlib.sha256(_LAYOUT.encode())
    parts.update(orjson.dumps(settings, option=orjson.OPT_SORT_KEYS))
    known = _remembered(files)
    if known is None:
        known = _digest_of_files(weights, others)
        _remember(files, known)
    parts.update(known.encode())
    return parts.hexdigest()


def _digest_of_files(weights: list[Weights], others: list[Path]) -> str:
    total = hashlib.sha256()
    with ThreadPoolExecutor(min(_MOST_THREADS, available_threads())) as pool:
        for place, one in enumerate(weights):
            one.verify()
            tensors = sorted(one.stored.items())
            for (name, spec), digest in zip(
                tensors, pool.map(_hash_tensor, [spec for _, spec in tensors]), strict=True
            ):
                total.update(f"{place} {name} {spec.dtype} {list(spec.shape)} {digest}\n".encode())
    for file in others:
        total.update(_canonical_digest(file))
    return total.hexdigest()


def _hash_tensor(spec: TensorSpec) -> str:
    """SHA-256 of the tensor's bytes. Raises UnavailableError if a number in it is not finite."""
    digest = hashlib.sha256()
    word, exponent = _EXPONENTS.get(spec.dtype, (np.uint8, 0))
    not_finite = 0
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
                if exponent:
                    bits = np.frombuffer(block, dtype=word)
                    not_finite += int(np.count_nonzero((bits & word(exponent)) == word(exponent)))
                left -= len(block)
    except OSError as error:
        raise UnavailableError(f"{spec.file} cannot be read: {error.strerror}") from error
    if not_finite:
        raise UnavailableError(
            f"{spec.file} is damaged: {not_finite:,} of the {spec.elements:,} numbers of {spec.name} "
            "are NaN or infinite; download the model again, or train it anew"
        )
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
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise UnavailableError(
            f"{file} is damaged: not JSON ({error.msg}); download the model again"
        ) from None
    if file.name == "tokenizer.json" and isinstance(value, dict):
        value = {key: inner for key, inner in value.items() if key not in {"padding", "truncation"}}
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _memory(files: list[Path]) -> Path | None:
    """Where the digest of these files in their present state is kept; None if one of them is gone."""
    key = hashlib.sha256(_LAYOUT.encode())
    for file in files:
        try:
            path = file.resolve()
            state = path.stat()
        except OSError:
            return None
        key.update(os.fsencode(path))
        key.update(f"\0{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}\n".encode())
    return cache_folder() / "fingerprints" / f"{key.hexdigest()}.txt"


def _remembered(files: list[Path]) -> str | None:
    place = _memory(files)
    try:
        known = place.read_text("ascii").strip() if place else ""
    except (OSError, UnicodeDecodeError):
        return None
    return known if len(known) == 64 and set(known) <= set("0123456789abcdef") else None


def _remember(files: list[Path], digest: str) -> None:
    place = _memory(files)
    if place is None:
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_suffix(f".{os.getpid()}")
        unfinished.write_text(digest, "ascii")
        unfinished.replace(place)
    except OSError:
        return  # the next run reads the model once more

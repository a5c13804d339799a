"""The files a user names, found and opened: globs, folders, BEIR folders, compressed files, stdin.

What stands inside the lines is left to `gemb.text.records`.
"""

import glob
import hashlib
import io
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

from gemb.errors import GembError, MachineError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Format = Literal["auto", "jsonl", "csv", "tsv", "parquet", "text", "document", "folder"]
"""How the rows of an input are laid out.

`text` is one text a line, `document` one text a file, `folder` one text a .txt or .md file below it.
`auto` is settled by the suffix, and on a stream by the first byte that is not blank.
"""

FORMATS = ("auto", "jsonl", "csv", "tsv", "parquet", "text", "document")
"""What `--input-format` takes."""

STDIN = "-"

_FORMAT_OF_SUFFIX: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "document",
}
_DOCUMENT_SUFFIXES = (".txt", ".md")
_CORPUS_NAMES = ("corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.zst")  # BEIR

Compression = Literal["none", "gzip", "zstd"]
_COMPRESSION_OF_SUFFIX: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_GZIP_MAGIC = b"\x1f\x8b"  # RFC 1952
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"  # RFC 8878

BOM = b"\xef\xbb\xbf"
UTF_16_BOMS = (b"\xff\xfe", b"\xfe\xff")

BLOCK_BYTES = 1 << 20
"""How much is read at a time."""

_PACKED_BYTES = 1 << 16  # unpacked at a time; it can become a thousand times as much


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input as it was found: a file, a folder of documents, or a stream that is read once."""

    name: str
    """The file as the user named it, for messages; `-` is stdin."""
    path: Path | None
    """None is stdin."""
    format: Format
    """`auto` only for a stream."""
    compression: Compression
    size_bytes: int
    """Bytes on disk; of a folder the sum over its documents; 0 for a stream."""
    mtime_ns: int
    """Time of the last change; of a folder the newest document's; 0 for a stream."""
    is_stream: bool
    """True for stdin and pipes: it can be read once only, and has no fingerprint."""

    def fingerprint(self) -> str:
        """BLAKE2b of the stored bytes, 32 hex digits; an edit anywhere in the file changes it.

        Reads the whole file, about 1 GB/s; a caller that trusts the clock compares `size_bytes` and
        `mtime_ns` first. A folder is told by the paths, sizes and times of its documents. "" for a stream.
        """
        if self.is_stream or self.path is None:
            return ""
        digest = hashlib.blake2b(digest_size=16)
        if self.format == "folder":
            for path in documents_below(self.path):
                status = path.stat()
                digest.update(os.fsencode(path.relative_to(self.path)))
                digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
            return digest.hexdigest()
        with self.path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()


def resolve_inputs(inputs: Sequence[str], *, input_format: Format = "auto") -> list[InputFile]:
    """The files behind what the user named, in the order named; a glob's and a folder's sorted by path.

    A glob that the shell left alone is expanded here. A folder that holds a BEIR corpus (corpus.jsonl)
    is that corpus; another folder is its .txt and .md files, one document a file, at any depth, without
    hidden ones. `input_format` other than "auto" overrides the suffix of every file.

    Raises GembError with all problems at once: no such file, unreadable, no match, unknown suffix,
    a folder without texts, a file given twice, UTF-16, compressed under a plain name, no zstandard.
    """
    if not inputs:
        raise GembError("no input given; name files, folders or globs, or - for stdin")
    found: list[InputFile] = []
    problems: list[str] = []
    for name in _expanded(inputs, problems):
        try:
            found.append(_resolve(name, input_format))
        except GembError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(_why_not(name, error))
    seen: set[Path | None] = set()
    for file in found:
        place = file.path.resolve() if file.path is not None else None
        if place in seen:
            problems.append(f"{file.name}: given twice")
        seen.add(place)
    if len(problems) == 1:
        raise GembError(problems[0])
    if problems:
        raise GembError("\n  ".join([f"inputs: {len(problems)} problems", *problems]))
    return found


def documents_below(folder: Path) -> Iterator[Path]:
    """The .txt and .md files below `folder`, sorted by relative path; links to folders are not followed.

    Lists one folder at a time, so that a tree of any size costs little memory.
    """
    with os.scandir(folder) as listing:
        # A folder sorts as "name/", which makes the walk the order of the whole relative paths.
        entries = sorted(
            (entry.name + "/" * entry.is_dir(follow_symlinks=False), entry)
            for entry in listing
            if not entry.name.startswith(".")
        )
    for name, entry in entries:
        if name.endswith("/"):
            yield from documents_below(Path(entry.path))
        elif name.lower().endswith(_DOCUMENT_SUFFIXES) and entry.is_file():
            yield Path(entry.path)


def sniff_rows(stream: io.BufferedReader) -> Format:
    """`jsonl` if the first byte that is not blank is `{`, else `text`; nothing is consumed."""
    return "jsonl" if stream.peek(1).removeprefix(BOM).lstrip().startswith(b"{") else "text"


@contextmanager
def open_bytes(file: InputFile) -> Iterator[io.BufferedReader]:
    """The bytes of `file`, decompressed, behind a read-ahead buffer; a BOM is left in. stdin stays open."""
    with ExitStack() as opened:
        if file.path is not None:
            raw = opened.enter_context(file.path.open("rb", buffering=0))
            stream: io.BufferedReader = opened.enter_context(io.BufferedReader(raw, BLOCK_BYTES))
        elif isinstance(sys.stdin.buffer, io.BufferedReader):
            stream = sys.stdin.buffer
        else:
            stream = io.BufferedReader(cast(io.RawIOBase, sys.stdin.buffer))
            opened.callback(stream.detach)  # else stdin would be closed with it
        compression = file.compression
        if file.is_stream and stream.peek(4).startswith(_GZIP_MAGIC):
            compression = "gzip"
        if file.is_stream and stream.peek(4).startswith(_ZSTD_MAGIC):
            compression = "zstd"
        if compression == "zstd" and find_spec("zstandard") is None:
            raise GembError(_no_zstandard(file.name))
        if compression != "none":
            frames = _gzip_frame if compression == "gzip" else _zstd_frames()
            stream = io.BufferedReader(opened.enter_context(_Unpacked(stream, frames)), BLOCK_BYTES)
        yield stream


def lines_of(file: InputFile, stream: io.BufferedReader) -> Iterator[bytes]:
    """The lines of `stream` with their line ends; a BOM is taken off the first.

    Raises GembError where the compressed data break off or are damaged and for UTF-16; MachineError
    where the disk fails.
    """
    line = 0
    try:
        for raw in stream:
            line += 1
            if line == 1:
                if raw.startswith(UTF_16_BOMS):
                    raise GembError(_utf_16(file.name))
                raw = raw.removeprefix(BOM)
            yield raw
    except (EOFError, _DamagedError) as error:
        raise GembError(_broken(file.name, line, error)) from error
    except OSError as error:
        reason = error.strerror or error
        raise MachineError(f"{file.name}: cannot be read after line {line}: {reason}") from error


def _expanded(inputs: Sequence[str], problems: list[str]) -> Iterator[str]:
    for name in inputs:
        if name == STDIN or not glob.has_magic(name) or os.path.lexists(name):
            yield name
        elif matches := sorted(glob.glob(name, recursive=True)):
            yield from matches
        else:
            problems.append(f"{name}: no file matches")


def _resolve(name: str, input_format: Format) -> InputFile:
    if name == STDIN:
        return InputFile(name, None, input_format, "none", 0, 0, is_stream=True)
    path = Path(name)
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        return _resolve_folder(name, path, input_format)
    if not stat.S_ISREG(status.st_mode):
        return InputFile(name, path, input_format, "none", 0, 0, is_stream=True)
    stem, suffix = os.path.splitext(name.lower())
    compression = _COMPRESSION_OF_SUFFIX.get(suffix, "none")
    if compression != "none":
        suffix = os.path.splitext(stem)[1]
    form = _FORMAT_OF_SUFFIX.get(suffix, "auto") if input_format == "auto" else input_format
    if form == "auto" or (form == "parquet" and compression != "none"):
        raise GembError(
            f"{name}: cannot tell its format by the name; the choices are {', '.join(_FORMAT_OF_SUFFIX)}, "
            f"all but .parquet also with .gz or .zst, or --input-format {'|'.join(FORMATS[1:])}"
        )
    if compression == "zstd" and find_spec("zstandard") is None:
        raise GembError(_no_zstandard(name))
    with path.open("rb", buffering=0) as file:
        head = file.read(4096)
    if form != "parquet" and compression == "none":
        _check_head(name, form, head)
    return InputFile(name, path, form, compression, status.st_size, status.st_mtime_ns, is_stream=False)


def _resolve_folder(name: str, folder: Path, input_format: Format) -> InputFile:
    for corpus in _CORPUS_NAMES:
        if (folder / corpus).is_file():
            return _resolve(os.path.join(name, corpus), "auto")
    size_bytes = mtime_ns = count = 0
    for path in documents_below(folder):
        status = path.stat()
        count += 1
        size_bytes += status.st_size
        mtime_ns = max(mtime_ns, status.st_mtime_ns)
    if count == 0:
        listing = os.listdir(folder)
        others = sorted({os.path.splitext(other)[1].lower() for other in listing} & set(_FORMAT_OF_SUFFIX))
        hint = f"; name its files instead, e.g. {os.path.join(name, '*' + others[0])}" if others else ""
        what = "no .txt or .md file and no corpus.jsonl" if listing else "nothing"
        raise GembError(f"{name}: the folder holds {what}{hint}")
    return InputFile(name, folder, "folder", "none", size_bytes, mtime_ns, is_stream=False)


def _check_head(name: str, form: Format, head: bytes) -> None:
    if head.startswith(_GZIP_MAGIC):
        raise GembError(f"{name}: is compressed with gzip; rename it to {name}.gz")
    if head.startswith(_ZSTD_MAGIC):
        raise GembError(f"{name}: is compressed with zstd; rename it to {name}.zst")
    # ASCII in UTF-16 without a byte order mark is every second byte zero, from the first character on.
    every_second = head[: len(head) // 2 * 2]
    if head.startswith(UTF_16_BOMS) or (
        every_second and (not any(every_second[::2]) or not any(every_second[1::2])) and any(every_second)
    ):
        raise GembError(_utf_16(name))
    if form == "jsonl" and head.removeprefix(BOM).lstrip().startswith(b"["):
        raise GembError(
            f"{name}: starts with '[', so it is one JSON array and not one object a line; "
            f"jq -c '.[]' {name} > rows.jsonl makes lines of it"
        )


def _why_not(name: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        # dtype=f16: what follows a recipe file on the command line.
        is_setting = name.partition("=")[0].replace(".", "_").isidentifier() and "=" in name
        hint = f"; if it is a key of the recipe and its value, pass --set {name}" if is_setting else ""
        return f"{name}: no such file or folder{hint}"
    if isinstance(error, PermissionError):
        return f"{name}: no permission to read it"
    return f"{name}: cannot be read: {error.strerror or error}"


def _utf_16(name: str) -> str:
    converted = f"utf8-{os.path.basename(name)}"
    return f"{name}: is UTF-16, not UTF-8; iconv -f UTF-16 -t UTF-8 {name} > {converted} converts it"


def _no_zstandard(name: str) -> str:
    return f"{name}: zstd data need the zstandard package; pip install 'gemb[zstd]'"


def _broken(name: str, line: int, error: Exception) -> str:
    detail = "it is cut off" if isinstance(error, EOFError) else f"it is damaged ({error})"
    return f"{name}: the compressed data break after line {line}: {detail}; fetch or make the file again"


class _DamagedError(Exception):
    """Compressed data that cannot be unpacked."""


class _Frame(Protocol):
    """The decompressor of one gzip member or zstd frame."""

    eof: bool
    unused_data: bytes

    def decompress(self, data: bytes, /) -> bytes: ...


def _gzip_frame() -> _Frame:
    return cast(_Frame, zlib.decompressobj(wbits=31))  # 31: with gzip's header and checksum


def _zstd_frames() -> Callable[[], _Frame]:
    import zstandard

    return cast(Callable[[], _Frame], zstandard.ZstdDecompressor().decompressobj)


class _Unpacked(io.RawIOBase):
    """The decompressed bytes of any number of frames, one after the other.

    Gives all that can be unpacked before it raises: EOFError where the data are cut off, for which
    zstandard's own reader sees a regular end, and _DamagedError where they are damaged.
    """

    def __init__(self, packed: io.BufferedReader, new_frame: Callable[[], _Frame]) -> None:
        self._packed = packed
        self._new_frame = new_frame
        self._frame = new_frame()
        self._inside_frame = False
        self._next_frame = b""
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Fills `buffer` as far as there are bytes; 0 at the end."""
        while not self._pending:
            block = self._next_frame or self._packed.read1(_PACKED_BYTES)
            self._next_frame = b""
            if not block and self._inside_frame:
                raise EOFError
            if not block:
                return 0
            self._pending = memoryview(self._unpack(block))
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._pending))
        target[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def _unpack(self, block: bytes) -> bytes:
        if not self._inside_frame:
            block = block.lstrip(b"\0")  # gzip files are padded with zeros on tapes and in tar archives
            if not block:
                return b""
        try:
            data = self._frame.decompress(block)
        except _frame_errors() as error:
            raise _DamagedError(str(error)) from error
        self._inside_frame = not self._frame.eof
        if self._frame.eof:
            self._next_frame = self._frame.unused_data
            self._frame = self._new_frame()
        return data


def _frame_errors() -> tuple[type[Exception], ...]:
    """zlib's, and zstandard's if that is in use."""
    library = sys.modules.get("zstandard")
    return (zlib.error,) if library is None else (zlib.error, library.ZstdError)

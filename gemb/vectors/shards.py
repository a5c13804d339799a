"""Jobs divided over processes: shard i of n takes every n-th block, and a join puts them in order.

Block b of the input (4,096 records) belongs to shard b mod n. A shard is an output of its own,
`docs.shard-00003-of-00016.npy` for `docs.npy`, with a table beside it that tells how many rows each
of its blocks became (records can be rejected, or cut into several passages). The joined output is
the same to the byte as that of a job that was not divided.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gemb.errors import GembError, MismatchError
from gemb.files import read_json, write_json
from gemb.vectors.layout import Layout, kind_of
from gemb.vectors.readers import VectorFile, open_vectors
from gemb.vectors.sinks import Sink

BLOCK_RECORDS = 4096
TABLE_ENDING = ".blocks.json"


@dataclass(frozen=True, slots=True)
class BlockTable:
    """What a shard did: its place, its job, and the output rows of each of its blocks, in order.

    `request` is a fingerprint of everything that decides the rows (model, recipe, input); it is equal
    in all shards of a job. `blocks` is the number of blocks of the whole input.
    """

    shard: int
    of: int
    request: str
    blocks: int
    rows: Sequence[int]

    def __post_init__(self) -> None:
        check_shard(self.shard, self.of)
        expected = len(range(self.shard, self.blocks, self.of))
        if len(self.rows) != expected:
            raise GembError(
                f"shard {self.shard}/{self.of} lists {len(self.rows)} blocks, but {expected} of "
                f"{self.blocks} are its own; run it again"
            )


@dataclass(frozen=True, slots=True)
class ShardPart:
    """A finished shard: its output and its table."""

    path: Path
    table: BlockTable


def check_shard(shard: int, of: int) -> None:
    """Raises GembError unless 0 <= shard < of."""
    if not 0 <= shard < of:
        raise GembError(
            f"--shard {shard}/{of}: the first number goes from 0 to {max(of - 1, 0)}, one for each shard"
        )


def parse_shard(text: str) -> tuple[int, int]:
    """Shard and count of `i/n`. Raises GembError for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise GembError(f"--shard {text}: write it as i/n, such as 0/16")
    shard, of = int(match[1]), int(match[2])
    check_shard(shard, of)
    return shard, of


def shard_path(output: Path | str, shard: int, of: int) -> Path:
    """Where a shard of `output` is written; the suffix, and with it the format, stays.

    Raises GembError for stdout, and for numbers out of range.
    """
    check_shard(shard, of)
    if kind_of(output) == "stream":
        raise GembError("--shard needs an output file or folder, not -")
    path = Path(output)
    suffix = "" if kind_of(output) == "shards" else path.suffix
    return path.with_name(f"{path.name.removesuffix(suffix)}.shard-{shard:05}-of-{of:05}{suffix}")


def is_mine(block: int, shard: int, of: int) -> bool:
    """Whether a block of the input belongs to a shard."""
    return block % of == shard


def table_path(shard_output: Path) -> Path:
    """Where the table of a shard lies."""
    return shard_output.with_name(shard_output.name + TABLE_ENDING)


def write_table(shard_output: Path, table: BlockTable) -> None:
    """Writes a shard's table, atomically; the last step of a shard, and the mark that it is complete."""
    write_json(table_path(shard_output), asdict(table))


def read_table(shard_output: Path) -> BlockTable:
    """A shard's table. Raises GembError where it is damaged."""
    path = table_path(shard_output)
    try:
        table = BlockTable(**read_json(path))
        numbers = [table.shard, table.of, *table.rows]
    except TypeError as error:
        raise GembError(f"{path} is no table of blocks; run the shard again") from error
    if not all(isinstance(number, int) for number in numbers):
        raise GembError(f"{path} is no table of blocks; run the shard again")
    return table


def find_parts(output: Path | str) -> list[ShardPart]:
    """The finished shards of `output`, in order: all of them, of one job.

    Raises GembError for missing shards (with their numbers), MismatchError for shards of different jobs.
    """
    before, after = (re.escape(part) for part in shard_path(output, 0, 1).name.rsplit("00000-of-00001", 1))
    pattern = re.compile(rf"{before}(\d{{5,}})-of-(\d{{5,}}){after}{re.escape(TABLE_ENDING)}")
    folder = Path(output).parent
    found = [
        match for path in sorted(folder.glob("*" + TABLE_ENDING)) if (match := pattern.fullmatch(path.name))
    ]
    if not found:
        raise GembError(f"{output}: no finished shard beside it; run --shard 0/n to n-1/n first")
    counts = sorted({int(match[2]) for match in found})
    if len(counts) > 1:
        divisions = " and ".join(str(count) for count in counts)
        raise MismatchError(
            f"{output}: shards of jobs in {divisions} parts lie beside each other; remove one kind"
        )
    (of,) = counts
    present = {int(match[1]) for match in found}
    missing = [shard for shard in range(of) if shard not in present]
    if missing:
        names = ", ".join(str(shard) for shard in missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise GembError(
            f"{output}: {len(missing)} of {of} shards are missing or unfinished: {names}; "
            f"run --shard {missing[0]}/{of}"
        )
    parts = [
        ShardPart(path, read_table(path)) for path in (shard_path(output, shard, of) for shard in range(of))
    ]
    first = parts[0].table
    for shard, part in enumerate(parts):
        if (part.table.shard, part.table.of) != (shard, of):
            raise GembError(
                f"{table_path(part.path)} is that of shard {part.table.shard}/{part.table.of}; run it again"
            )
        if (part.table.request, part.table.blocks) != (first.request, first.blocks):
            raise MismatchError(
                f"{part.path} belongs to another job than {parts[0].path} (model, recipe or input differ); "
                f"run --shard {shard}/{of} again"
            )
    return parts


def open_parts(parts: Sequence[ShardPart], *, verify: bool = True) -> list[VectorFile]:
    """The vectors of all parts, which agree in layout and with their tables; those without rows too.

    Raises GembError where a part has not the rows its table lists, MismatchError for different layouts.
    """
    files: list[VectorFile] = []
    for part in parts:
        found = open_vectors(part.path, verify=verify)
        rows = sum(part.table.rows)
        if found.rows != rows:
            raise GembError(
                f"{part.path} has {found.rows} rows, but its table lists {rows}; run the shard again"
            )
        if layout_key(found.layout) != layout_key(files[0].layout if files else found.layout):
            raise MismatchError(
                f"{part.path} differs in width, type or metadata from {parts[0].path}; run it again"
            )
        files.append(found)
    return files


def join(parts: Sequence[ShardPart], sink: Sink, on_rows: Callable[[int], None] | None = None) -> int:
    """Appends all rows of the parts to `sink`, in the order of the input. Returns their number.

    `on_rows` is told after each block how many rows there are so far. The caller finishes the sink.
    """
    files = open_parts([part for part in parts if sum(part.table.rows)])
    by_shard = {
        part.table.shard: file
        for part, file in zip([p for p in parts if sum(p.table.rows)], files, strict=True)
    }
    done = dict.fromkeys(by_shard, 0)
    total = 0
    of = len(parts)
    for block in range(parts[0].table.blocks):
        shard = block % of
        rows = parts[shard].table.rows[block // of]
        if not rows:
            continue
        file, start = by_shard[shard], done[shard]
        sink.append_stored(file.ids(start, start + rows), file.stored(start, start + rows))
        done[shard] += rows
        total += rows
        if on_rows is not None:
            on_rows(total)
    for file in files:
        file.close()
    return total


def layout_of(parts: Sequence[ShardPart]) -> Layout:
    """The layout of the joined output: that of the first part with rows.

    Raises GembError where no part has a row.
    """
    part = next((part for part in parts if sum(part.table.rows)), None)
    if part is None:
        raise GembError(
            f"{parts[0].path}: none of the {len(parts)} shards has a row; there is nothing to join"
        )
    with open_vectors(part.path, verify=False) as found:
        return found.layout


def layout_key(layout: Layout) -> tuple[object, ...]:
    """What must be equal for rows to be joined unchanged."""
    ranges = None if layout.ranges is None else layout.ranges.as_array().tobytes()
    return layout.dims, layout.dtype, layout.encoding, layout.part_rows, dict(layout.metadata), ranges

import errno
import io
import os
import random
import resource
import shutil
import subprocess
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import orjson
import pytest
from numpy.typing import NDArray

from gemb.errors import GembError, MachineError
from gemb.vectors import Layout, Position, Sink, calibrate, open_sink, open_vectors, output_files
from gemb.vectors import sinks as sinks_module
from gemb.vectors.layout import DType, Encoding
from gemb.vectors.parquet import Rows as Group
from gemb.vectors.parquet import write_table
from tests.vectors.conftest import Contents, Rows

DIMS = 16
ROWS = 157
OUTPUTS = ["docs.npy", "docs.safetensors", "docs.fbin", "docs.jsonl", "docs.parquet", "docs"]

DTYPES: list[DType] = ["f32", "f16", "bf16", "int8", "binary"]
STORABLE = [
    *(
        (output, dtype)
        for output in OUTPUTS
        for dtype in DTYPES
        if output != "docs.fbin" and (output, dtype) != ("docs.parquet", "bf16")
    ),
    ("docs.fbin", "f32"),
    ("docs.i8bin", "int8"),
    ("docs.u8bin", "binary"),
]


def layout_for(output: str, vectors: NDArray[np.float32], dtype: DType = "f32") -> Layout:
    """A layout whose parts end inside the rows, after 50 of them."""
    encoding: Encoding = "base64" if output == "docs.jsonl" else "list"
    ranges = calibrate(vectors) if dtype == "int8" else None
    return Layout(DIMS, dtype, encoding, {"model": "m"}, ranges, part_rows=50)


def ids_of(rows: int) -> list[str]:
    return [f"passage {row} ä" for row in range(rows)]


def append_from(sink: Sink, vectors: NDArray[np.float32], window: int, stop: int | None = None) -> None:
    """Appends the rows that the sink has not taken yet, `window` at a time."""
    ids = ids_of(len(vectors))
    stop = len(vectors) if stop is None else stop
    while sink.position.rows < stop:
        start = sink.position.rows
        end = min(start + window, stop)
        sink.append(ids[start:end], vectors[start:end])


def finished(
    folder: Path, output: str, layout: Layout, vectors: NDArray[np.float32], window: int = 30
) -> Path:
    """An output written without any interruption."""
    sink = open_sink(folder / output, folder / "work", layout)
    append_from(sink, vectors, window)
    sink.finish()
    shutil.rmtree(folder / "work")
    return folder / output


# One run


@pytest.mark.parametrize(("output", "dtype"), STORABLE)
def test_rows_come_back_as_they_were_stored(
    tmp_path: Path, unit_rows: Rows, output: str, dtype: DType
) -> None:
    vectors = unit_rows(ROWS, DIMS)
    layout = layout_for(output, vectors, dtype)
    path = finished(tmp_path, output, layout, vectors)
    with open_vectors(path) as found:
        assert found.ids() == ids_of(ROWS)
        assert np.array_equal(found.block(0, ROWS), layout.load(layout.store(vectors)[0]))
        assert (found.rows, found.dims, found.dtype) == (ROWS, DIMS, dtype)


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_division_into_appends_does_not_matter(
    tmp_path: Path, unit_rows: Rows, contents: Contents, output: str
) -> None:
    vectors = unit_rows(ROWS, DIMS)
    written = []
    for window in (1, 30, 50, ROWS):
        folder = tmp_path / str(window)
        folder.mkdir()
        finished(folder, output, layout_for(output, vectors), vectors, window)
        written.append(contents(folder))
    assert all(one == written[0] for one in written)


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_reported_files_are_all_there_with_their_checksums(
    tmp_path: Path, unit_rows: Rows, output: str
) -> None:
    vectors = unit_rows(ROWS, DIMS)
    layout = layout_for(output, vectors)
    sink = open_sink(tmp_path / output, tmp_path / "work", layout)
    append_from(sink, vectors, 30)
    files = sink.finish()
    for file in files:
        done = subprocess.run(["sha256sum", file.path], capture_output=True, text=True, check=True)
        assert (done.stdout.split()[0], file.path.stat().st_size) == (file.sha256, file.bytes)
    if output != "docs":
        assert [file.path for file in files] == output_files(tmp_path / output, layout)


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_existing_output_is_untouched_until_the_end(
    tmp_path: Path, unit_rows: Rows, contents: Contents, output: str
) -> None:
    old, new = unit_rows(ROWS, DIMS), unit_rows(ROWS, DIMS)[::-1].copy()
    layout = layout_for(output, old)
    finished(tmp_path, output, layout, old)
    before = contents(tmp_path)
    sink = open_sink(tmp_path / output, tmp_path / "work", layout)
    append_from(sink, new, 30)
    sink.sync()
    assert {name: data for name, data in contents(tmp_path).items() if not name.startswith("work")} == before
    sink.finish()
    with open_vectors(tmp_path / output) as found:
        assert np.array_equal(found.block(0, ROWS), new)


@pytest.mark.parametrize("output", OUTPUTS)
def test_one_row_and_no_row_are_outputs_too(tmp_path: Path, unit_rows: Rows, output: str) -> None:
    for rows in (1, 0):
        folder = tmp_path / str(rows)
        folder.mkdir()
        vectors = unit_rows(2, DIMS)
        path = finished(folder, output, layout_for(output, vectors), vectors[:rows])
        if rows or output != "docs.jsonl":  # JSON lines of no rows tell no width
            with open_vectors(path) as found:
                assert (found.rows, found.dims, found.ids()) == (rows, DIMS, ids_of(rows))
                assert np.array_equal(found.block(0, rows), vectors[:rows])


def test_a_folder_has_parts_of_equal_length_and_a_manifest(tmp_path: Path, unit_rows: Rows) -> None:
    vectors = unit_rows(ROWS, DIMS)
    folder = finished(tmp_path, "docs", layout_for("docs", vectors), vectors)
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        *(f"part-0000{part}.{ending}" for part in range(4) for ending in ("ids.txt", "npy")),
    ]
    manifest = orjson.loads((folder / "manifest.json").read_bytes())
    assert [part["rows"] for part in manifest["parts"]] == [50, 50, 50, 7]
    assert np.array_equal(np.load(folder / "part-00003.npy"), vectors[150:])
    assert (folder / "part-00003.ids.txt").read_text().splitlines() == ids_of(ROWS)[150:]


def test_an_int8_output_has_its_ranges_beside_it(tmp_path: Path, unit_rows: Rows) -> None:
    vectors = unit_rows(ROWS, DIMS)
    for output in ("docs.npy", "docs.jsonl", "docs"):
        layout = layout_for(output, vectors, "int8")
        path = finished(tmp_path, output, layout, vectors)
        beside = path / "ranges.npy" if output == "docs" else tmp_path / "docs.ranges.npy"
        assert layout.ranges is not None
        assert np.array_equal(np.load(beside), layout.ranges.as_array())


def test_clipped_values_are_counted_across_a_resume(tmp_path: Path, unit_rows: Rows) -> None:
    vectors = unit_rows(ROWS, DIMS)
    layout = Layout(DIMS, "int8", ranges=calibrate(vectors[:20]), part_rows=50)
    assert layout.ranges is not None
    outside = (vectors < layout.ranges.minimum) | (vectors > layout.ranges.maximum)
    for output in ("docs.npy", "docs"):
        sink = open_sink(tmp_path / output, tmp_path / "work" / output, layout)
        append_from(sink, vectors, 30, 90)
        position = sink.sync()
        sink.close()
        sink = open_sink(tmp_path / output, tmp_path / "work" / output, layout, position)
        append_from(sink, vectors, 40)
        sink.close()
        assert sink.position.clipped_values == np.count_nonzero(outside)


# Killed and run again


def torn(work: Path, synced: Path, chance: random.Random) -> None:
    """Leaves of every file what was synced and any number of the bytes that came later."""
    for path in sorted(path for path in work.rglob("*") if path.is_file()):
        before = synced / path.relative_to(work)
        size = path.stat().st_size
        if before.exists():
            os.truncate(path, chance.randint(min(before.stat().st_size, size), size))
        elif chance.random() < 0.5:
            path.unlink()
        else:
            os.truncate(path, chance.randint(0, size))


@pytest.mark.faults
@pytest.mark.parametrize("dtype", ["f32", "int8"])
@pytest.mark.parametrize("output", ["docs.npy", "docs.safetensors", "docs.jsonl", "docs.parquet", "docs"])
def test_a_run_killed_anywhere_and_resumed_is_the_same_to_the_byte(
    tmp_path: Path, unit_rows: Rows, contents: Contents, output: str, dtype: DType
) -> None:
    vectors = unit_rows(ROWS, DIMS)
    layout = layout_for(output, vectors, dtype)
    (tmp_path / "whole").mkdir()
    finished(tmp_path / "whole", output, layout, vectors)
    chance = random.Random(11)
    for trial in range(12):
        folder = tmp_path / str(trial)
        work = folder / "work"
        sink = open_sink(folder / output, work, layout)
        append_from(sink, vectors, chance.randint(1, 40), stop=chance.randint(0, ROWS))
        position = Position(**orjson.loads(orjson.dumps(sink.sync())))
        shutil.copytree(work, folder / "synced")
        append_from(sink, vectors, chance.randint(1, 70), stop=chance.randint(position.rows, ROWS))
        if chance.random() < 0.5:
            sink.sync()  # the kill came before the journal had this position
        sink.close()
        torn(work, folder / "synced", chance)
        sink = open_sink(folder / output, work, layout, position)
        assert sink.position == position
        append_from(sink, vectors, chance.randint(1, 40))
        sink.finish()
        shutil.rmtree(work)
        shutil.rmtree(folder / "synced")
        assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.faults
@pytest.mark.parametrize("output", [*OUTPUTS, "docs.i8bin"])
@pytest.mark.parametrize("stop", range(4))
def test_a_run_killed_between_the_moves_is_finished_by_the_next_one(
    tmp_path: Path,
    unit_rows: Rows,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    stop: int,
) -> None:
    vectors = unit_rows(ROWS, DIMS)
    layout = layout_for(output, vectors, "int8" if output == "docs.i8bin" else "f32")
    (tmp_path / "whole").mkdir()
    finished(tmp_path / "whole", output, layout, vectors)
    folder = tmp_path / "killed"
    sink = open_sink(folder / output, folder / "work", layout)
    append_from(sink, vectors, 30)
    position = sink.sync()
    replace = os.replace
    left = [stop]

    def killed(source: Path, target: Path) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    try:
        sink.finish()
    except KeyboardInterrupt:
        sink.close()
    monkeypatch.undo()
    sink = open_sink(folder / output, folder / "work", layout, position)
    files = sink.finish()
    assert all(file.path.stat().st_size == file.bytes for file in files)
    shutil.rmtree(folder / "work")
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.faults
@pytest.mark.parametrize("output", OUTPUTS)
def test_an_append_that_fails_leaves_the_sink_where_it_was(
    tmp_path: Path, unit_rows: Rows, contents: Contents, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    vectors = unit_rows(ROWS, DIMS)
    layout = layout_for(output, vectors)
    (tmp_path / "whole").mkdir()
    finished(tmp_path / "whole", output, layout, vectors)
    folder = tmp_path / "failed"
    sink = open_sink(folder / output, folder / "work", layout)
    append_from(sink, vectors, 30, 40)
    position = sink.position
    pwrite = os.pwrite
    left = [0]

    def full(descriptor: int, content: memoryview, offset: int) -> int:
        if left[0] == 0:
            pwrite(descriptor, content[: len(content) // 2], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        return pwrite(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", full)
    # Ids and rows are two writes; in a folder these rows cross two boundaries.
    for writes in range({"docs": 6, "docs.jsonl": 1}.get(output, 2)):
        left[0] = writes
        with pytest.raises(MachineError, match="no space left"):
            sink.append(ids_of(ROWS)[40:150], vectors[40:150])
        assert sink.position == position
    monkeypatch.undo()
    append_from(sink, vectors, 30)
    sink.finish()
    shutil.rmtree(folder / "work")
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.faults
def test_a_part_that_only_a_failed_append_began_is_not_in_the_folder(
    tmp_path: Path, unit_rows: Rows, contents: Contents
) -> None:
    vectors = unit_rows(45, DIMS)
    layout = layout_for("docs", vectors)
    (tmp_path / "whole").mkdir()
    finished(tmp_path / "whole", "docs", layout, vectors)
    folder = tmp_path / "failed"
    sink = open_sink(folder / "docs", folder / "work", layout)
    append_from(sink, vectors, 45)
    with pytest.raises(GembError, match="holds a line break"):
        sink.append([*ids_of(10), "broken\n"], unit_rows(11, DIMS))
    assert (folder / "work" / "parts" / "part-00001.npy").exists()
    sink.finish()
    shutil.rmtree(folder / "work")
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_new_start_forgets_what_lay_in_the_work_folder(
    tmp_path: Path, unit_rows: Rows, contents: Contents
) -> None:
    vectors = unit_rows(ROWS, DIMS)
    for output in OUTPUTS:
        layout = layout_for(output, vectors)
        (tmp_path / output / "whole").mkdir(parents=True)
        finished(tmp_path / output / "whole", output, layout, vectors)
        folder = tmp_path / output / "again"
        for part in (vectors[::-1].copy(), vectors):
            sink = open_sink(folder / output, folder / "work", layout)
            append_from(sink, part, 30)
            sink.sync()
        sink.finish()
        shutil.rmtree(folder / "work")
        assert contents(folder) == contents(tmp_path / output / "whole")


# A disk that is full, or forgets


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 200 KiB; only root can make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small tmpfs can be mounted by root only")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.faults
@pytest.mark.parametrize("output", ["docs.npy", "docs.safetensors", "docs.jsonl", "docs.parquet", "docs"])
def test_a_full_disk_is_one_message_and_the_run_goes_on_with_more_space(
    tmp_path: Path, tiny_disk: Path, unit_rows: Rows, contents: Contents, output: str
) -> None:
    vectors = unit_rows(5000, DIMS)
    layout = Layout(DIMS, part_rows=1000)
    (tmp_path / "whole").mkdir()
    finished(tmp_path / "whole", output, layout, vectors, window=100)
    sink = open_sink(tiny_disk / output, tiny_disk / "work", layout)
    position = sink.sync()
    with pytest.raises(MachineError) as caught:  # noqa: PT012  # anywhere on the way
        while sink.position.rows < 5000:
            append_from(sink, vectors, 100, stop=sink.position.rows + 100)
            position = sink.sync()
    sink.close()
    assert position.rows > 500
    assert str(caught.value).startswith(f"cannot write {tiny_disk / 'work'}/")
    assert str(caught.value).endswith("free); free some space, then run the same command again")
    assert not (tiny_disk / output).exists()
    subprocess.run(["mount", "-o", "remount,size=4m", tiny_disk], check=True)
    sink = open_sink(tiny_disk / output, tiny_disk / "work", layout, position)
    append_from(sink, vectors, 100)
    sink.finish()
    shutil.rmtree(tiny_disk / "work")
    assert contents(tiny_disk) == contents(tmp_path / "whole")


@pytest.mark.faults
def test_a_disk_that_fills_while_the_table_is_built_is_one_message(
    tmp_path: Path, unit_rows: Rows, contents: Contents
) -> None:
    vectors = unit_rows(5000, DIMS)
    layout = Layout(DIMS)
    (tmp_path / "whole").mkdir()
    finished(tmp_path / "whole", "docs.parquet", layout, vectors)
    folder = tmp_path / "full"
    sink = open_sink(folder / "docs.parquet", folder / "work", layout)
    append_from(sink, vectors, 1000)
    position = sink.sync()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (330_000, before[1])
    )  # the table has some bytes more than the rows
    try:
        with pytest.raises(MachineError, match=r"table\.parquet: the file grew past a size limit; raise it"):
            sink.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (folder / "docs.parquet").exists()
    open_sink(folder / "docs.parquet", folder / "work", layout, position).finish()
    shutil.rmtree(folder / "work")
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.faults
@pytest.mark.parametrize("output", ["docs.npy", "docs.jsonl", "docs.parquet", "docs"])
def test_a_bit_that_flipped_before_the_resume_is_found_then(
    tmp_path: Path, unit_rows: Rows, output: str
) -> None:
    vectors = unit_rows(40, DIMS)
    layout = layout_for(output, vectors)
    sink = open_sink(tmp_path / output, tmp_path / "work", layout)
    append_from(sink, vectors, 40)
    position = sink.sync()
    sink.close()
    work = tmp_path / "work"
    data = work / ("parts/part-00000.npy" if output == "docs" else "data")
    content = bytearray(data.read_bytes())
    content[-5] ^= 4
    data.write_bytes(content)
    with pytest.raises(MachineError) as caught:
        open_sink(tmp_path / output, tmp_path / "work", layout, position)
    assert str(caught.value) == (
        f"{data} does not hold what was written to it; check the disk, then remove {work} to start again"
    )


@pytest.mark.faults
@pytest.mark.parametrize("output", ["docs.npy", "docs.jsonl", "docs.parquet"])
def test_a_bit_that_flipped_before_the_end_is_never_published(
    tmp_path: Path, unit_rows: Rows, output: str
) -> None:
    vectors = unit_rows(40, DIMS)
    sink = open_sink(tmp_path / output, tmp_path / "work", layout_for(output, vectors))
    append_from(sink, vectors, 40)
    with (tmp_path / "work" / "data").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last ^ 4]))
    with pytest.raises(MachineError, match="work/data does not hold what was written to it"):
        sink.finish()
    assert not (tmp_path / output).exists()


@pytest.mark.faults
@pytest.mark.parametrize("what", ["ids", "rows"])
def test_a_table_that_is_not_what_it_was_made_from_is_never_published(
    tmp_path: Path, unit_rows: Rows, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    vectors = unit_rows(40, DIMS)
    sink = open_sink(tmp_path / "docs.parquet", tmp_path / "work", Layout(DIMS))
    append_from(sink, vectors, 40)

    def wrong(path: Path, layout: Layout, groups: Iterable[Group]) -> None:
        write_table(
            path, layout, [(ids[::-1], rows) if what == "ids" else (ids, -rows) for ids, rows in groups]
        )

    monkeypatch.setattr("gemb.vectors.parquet.write_table", wrong)
    with pytest.raises(MachineError) as caught:
        sink.finish()
    assert str(caught.value) == (
        f"{tmp_path / 'work' / 'table.parquet'} does not hold what was written to it; "
        "check the disk, then run again"
    )
    assert not (tmp_path / "docs.parquet").exists()


def test_a_work_file_that_lost_rows_is_told(tmp_path: Path, unit_rows: Rows) -> None:
    vectors = unit_rows(40, DIMS)
    layout = layout_for("docs.npy", vectors)
    sink = open_sink(tmp_path / "docs.npy", tmp_path / "work", layout)
    append_from(sink, vectors, 40)
    position = sink.sync()
    sink.close()
    os.truncate(tmp_path / "work" / "data", 1000)
    with pytest.raises(GembError) as caught:
        open_sink(tmp_path / "docs.npy", tmp_path / "work", layout, position)
    work = tmp_path / "work"
    assert str(caught.value) == f"{work}/data is shorter than it was; remove {work} to start again"


# What may not be written


@pytest.mark.parametrize("output", ["docs.npy", "docs.safetensors", "docs.fbin", "docs"])
@pytest.mark.parametrize("broken", ["a\nb", "a\r", "a\u2028b"])
def test_an_id_with_a_line_break_is_refused_where_ids_are_lines(
    tmp_path: Path, unit_rows: Rows, output: str, broken: str
) -> None:
    vectors = unit_rows(3, DIMS)
    sink = open_sink(tmp_path / output, tmp_path / "work", layout_for(output, vectors))
    with pytest.raises(GembError) as caught:
        sink.append(["fine", broken, "fine too"], vectors)
    assert str(caught.value) == (
        f"id {broken!r} holds a line break, but .ids.txt has one id a line; write .jsonl or .parquet"
    )
    assert sink.position == Position()


@pytest.mark.parametrize("output", ["docs.jsonl", "docs.parquet"])
def test_an_id_with_a_line_break_is_kept_where_ids_are_fields(
    tmp_path: Path, unit_rows: Rows, output: str
) -> None:
    vectors = unit_rows(4, DIMS)
    ids = ["a\nb", "", "\x00\u2028", '"quoted" \\ 😀']
    sink = open_sink(tmp_path / output, tmp_path / "work", layout_for(output, vectors))
    sink.append(ids, vectors)
    sink.finish()
    with open_vectors(tmp_path / output) as found:
        assert found.ids() == ids


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_id_that_is_no_unicode_is_refused(tmp_path: Path, unit_rows: Rows, output: str) -> None:
    vectors = unit_rows(2, DIMS)
    sink = open_sink(tmp_path / output, tmp_path / "work", layout_for(output, vectors))
    with pytest.raises(GembError) as caught:
        sink.append(["fine", "\udc80"], vectors)
    assert str(caught.value) == (
        r"id '\udc80' is not valid Unicode and cannot be written as UTF-8; change the id"
    )
    assert sink.position == Position()


@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_a_vector_that_is_none_is_never_written(tmp_path: Path, unit_rows: Rows, value: float) -> None:
    vectors = unit_rows(3, DIMS)
    vectors[1] = value
    for output in [*OUTPUTS, "-"]:
        sink = open_sink(output if output == "-" else tmp_path / output, tmp_path / "work", Layout(DIMS))
        with pytest.raises(ValueError, match="the vector of id 'b' is not finite or all zero"):
            sink.append(["a", "b", "c"], vectors)


def test_rows_of_another_shape_are_refused(tmp_path: Path, unit_rows: Rows) -> None:
    sink = open_sink(tmp_path / "docs.npy", tmp_path / "work", Layout(DIMS))
    with pytest.raises(ValueError, match=r"2 ids with vectors float32\[3, 16\], not float32\[2, 16\]"):
        sink.append(["a", "b"], unit_rows(3, DIMS))
    with pytest.raises(ValueError, match=r"stored rows are float16\[3, 16\], not f32\(3, 16\)"):
        sink.append_stored(["a", "b", "c"], unit_rows(3, DIMS).astype(np.float16))


# The stream


def test_a_stream_has_every_row_as_soon_as_it_is_appended(unit_rows: Rows) -> None:
    vectors = unit_rows(3, DIMS)
    raw = io.BytesIO()
    stream = io.BufferedWriter(raw)
    sink = open_sink("-", Path("unused"), Layout(DIMS), stream=stream)
    for row in range(3):
        sink.append([f"d{row}"], vectors[row : row + 1])
        lines = raw.getvalue().splitlines()
        assert len(lines) == row + 1
        value = orjson.loads(lines[-1])
        assert list(value) == ["id", "embedding"]
        assert (value["id"], np.array(value["embedding"], np.float32).tolist()) == (
            f"d{row}",
            vectors[row].tolist(),
        )
    assert sink.finish() == []
    assert sink.sync().rows == 3
    assert not Path("unused").exists()


def test_a_closed_pipe_ends_a_stream(unit_rows: Rows) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "wb", buffering=0)
    sink = open_sink("-", Path("unused"), Layout(DIMS), stream=stream)
    with pytest.raises(BrokenPipeError):
        sink.append(["a"], unit_rows(1, DIMS))
    stream.close()


def test_a_stream_that_takes_a_part_of_what_is_written_gets_the_rest_as_well(unit_rows: Rows) -> None:
    class Reluctant(io.RawIOBase):
        """As stdout with PYTHONUNBUFFERED and a reader that closes: a part now, the rest the next time."""

        held = b""

        def write(self, data: memoryview) -> int:  # type: ignore[override]
            self.held += bytes(data[:7])
            return min(7, len(data))

    stream = Reluctant()
    sink = open_sink("-", Path("unused"), Layout(DIMS), stream=stream)  # type: ignore[arg-type]
    sink.append(["a", "b"], unit_rows(2, DIMS))
    assert [orjson.loads(line)["id"] for line in stream.held.splitlines()] == ["a", "b"]


@pytest.mark.faults
def test_a_full_device_behind_a_stream_is_told(unit_rows: Rows) -> None:
    with open("/dev/full", "wb", buffering=0) as stream:
        sink = open_sink("-", Path("unused"), Layout(DIMS), stream=stream)
        with pytest.raises(MachineError, match="cannot write stdout: no space left"):
            sink.append(["a"], unit_rows(1, DIMS))


# Memory


def peak_bytes(folder: Path, output: str, rows: int, block: NDArray[np.float32], ids: Sequence[str]) -> int:
    """The most memory that Python and numpy held while a sink took and finished `rows` rows."""
    tracemalloc.start()
    sink = open_sink(folder / output, folder / "work", Layout(block.shape[1], part_rows=5000))
    for _ in range(rows // len(block)):
        sink.append(ids, block)
    sink.sync()
    sink.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    shutil.rmtree(folder / "work")
    return peak


@pytest.mark.parametrize("output", ["docs.npy", "docs.jsonl", "docs.parquet", "docs"])
def test_memory_does_not_grow_with_rows(
    tmp_path: Path, unit_rows: Rows, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.setattr("gemb.vectors.parquet.GROUP_BYTES", 1 << 16)
    monkeypatch.setattr("gemb.vectors.readers.CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr("gemb.vectors.appending.CHUNK_BYTES", 1 << 14)
    block = unit_rows(1000, 8)
    ids = [f"{row:020}" for row in range(1000)]
    peaks = [peak_bytes(tmp_path, output, rows, block, ids) for rows in (2000, 10_000, 40_000)]
    # Ids alone would be 3 MB more as Python strings.
    assert peaks[2] - peaks[1] < 300_000


def test_the_work_folder_is_emptied_of_nothing_else(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "job.json").write_text("{}")
    sinks_module.open_sink(tmp_path / "docs.npy", work, Layout(DIMS)).close()
    assert sorted(path.name for path in work.iterdir()) == ["data", "ids.txt", "job.json"]


# Order of what reaches the disk


@pytest.mark.parametrize("output", ["docs.npy", "docs.jsonl", "docs.parquet", "docs"])
def test_rows_are_on_the_disk_before_a_position_and_files_before_their_names(
    tmp_path: Path, unit_rows: Rows, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    steps: list[tuple[str, str]] = []
    replace = os.replace

    def fsync(descriptor: int) -> None:
        steps.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    def renamed(source: Path, target: Path) -> None:
        steps.append(("rename", Path(target).name))
        replace(source, target)

    vectors = unit_rows(40, DIMS)
    sink = open_sink(tmp_path / output, tmp_path / "work", layout_for(output, vectors))
    append_from(sink, vectors, 40)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    sink.sync()
    rows = {"docs": {"part-00000.npy", "part-00000.ids.txt"}, "docs.jsonl": {"data"}}
    assert {name for _, name in steps} >= rows.get(output, {"data", "ids.txt"})
    steps.clear()
    sink.finish()
    first = steps.index(("rename", output if output != "docs.npy" else "docs.ids.txt"))
    sealed = {"docs": "manifest.json", "docs.parquet": "table.parquet"}.get(output, "data")
    synced = [name for step, name in steps[:first] if step == "fsync"]
    assert any(sealed in name for name in synced)  # a temporary name holds the final one
    assert steps[-1] == ("fsync", tmp_path.name)

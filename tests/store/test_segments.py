from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.store.blocks import DamagedError, MissingFileError
from gemb.store.codes import unit
from gemb.store.graph import GraphShape
from gemb.store.segments import (
    CODES,
    GRAPH,
    ROWS,
    VECTORS,
    Checksums,
    Segment,
    SegmentRecord,
    SegmentWriter,
    spread,
)
from gemb.vectors import Int8Ranges, Layout, cut
from gemb.vectors.layout import DType

DIMS, COUNT = 24, 3000
VECTORS_GIVEN = cut(
    np.random.default_rng(8).standard_normal((COUNT, DIMS)).astype(np.float32), DIMS, normalise=True
)
KEYS = np.sort(np.random.default_rng(9).integers(1, COUNT, COUNT)).astype(np.uint64)  # some keys twice
ADVICE = "run gemb index verify wiki"


def layout_of(dtype: DType) -> Layout:
    ranges = Int8Ranges(np.full(DIMS, -1, np.float32), np.full(DIMS, 1, np.float32))
    return Layout(DIMS, dtype, ranges=ranges if dtype == "int8" else None)


def written(
    folder: Path, dtype: DType = "f16", code_dims: int = DIMS, shape: GraphShape | None = None, parts: int = 5
) -> tuple[SegmentRecord, Checksums]:
    layout = layout_of(dtype)
    writer = SegmentWriter(folder, layout)
    stored, _ = layout.store(VECTORS_GIVEN)
    for keys, rows in zip(np.array_split(KEYS, parts), np.array_split(stored, parts), strict=True):
        writer.append(keys, rows)
    return writer.finish(code_dims, shape)


def opened(folder: Path, made: tuple[SegmentRecord, Checksums], dtype: DType = "f16") -> Segment:
    record, checksums = made
    return Segment(folder / record.name, record, checksums, layout_of(dtype), advice=ADVICE, cache=None)


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "int8"])
def test_a_segment_reads_back_what_was_appended(tmp_path: Path, dtype: DType) -> None:
    segment = opened(tmp_path, written(tmp_path, dtype), dtype)
    layout = layout_of(dtype)
    stored, _ = layout.store(VECTORS_GIVEN)
    rows = np.array([0, 7, 2999, 7])
    np.testing.assert_array_equal(segment.keys, KEYS)
    np.testing.assert_array_equal(segment.stored(rows), stored[rows])
    np.testing.assert_array_equal(segment.stored_block(10, 90), stored[10:90])
    np.testing.assert_array_equal(segment.vectors(rows), unit(layout.load(stored))[rows])
    segment.close()


def test_files_do_not_depend_on_how_rows_were_appended(tmp_path: Path) -> None:
    one, many = written(tmp_path, parts=1), written(tmp_path, parts=11)
    assert content_of(tmp_path / one[0].name) == content_of(tmp_path / many[0].name)
    assert set(one[0].files) == {ROWS, VECTORS["f16"], CODES}


@pytest.mark.parametrize("code_dims", [8, DIMS])
def test_no_code_is_farther_from_its_row_than_the_record_says(tmp_path: Path, code_dims: int) -> None:
    made = written(tmp_path, code_dims=code_dims)
    segment = opened(tmp_path, made)
    exact = unit(np.ascontiguousarray(segment.vector_block(0, COUNT)[:, :code_dims]))
    distance = np.linalg.norm(segment.code_block(0, COUNT) * made[0].code_step - exact, axis=1)
    assert distance.max() == pytest.approx(made[0].code_residual, rel=1e-3)
    segment.close()


def test_the_codes_of_a_graph_are_those_of_a_segment_without_one(tmp_path: Path) -> None:
    plain, graph = (
        opened(tmp_path, written(tmp_path)),
        opened(tmp_path, written(tmp_path, shape=GraphShape())),
    )
    rows = np.arange(COUNT)
    assert graph.record.has_graph
    assert CODES not in graph.files
    np.testing.assert_array_equal(graph.codes(rows), plain.codes(rows))
    slots = graph.rows_of_slots(rows)
    np.testing.assert_array_equal(graph.code_block(0, COUNT), plain.codes(slots))
    plain.close()
    graph.close()


def test_spans_of_keys_are_their_rows(tmp_path: Path) -> None:
    segment = opened(tmp_path, written(tmp_path))
    asked = np.arange(0, COUNT + 5, dtype=np.uint64)
    first, stop = segment.spans_of(asked)
    rows = spread(first, stop)
    np.testing.assert_array_equal(rows, np.arange(COUNT))
    np.testing.assert_array_equal(np.repeat(asked, stop - first), KEYS)
    segment.close()


@pytest.mark.parametrize(
    ("first", "stop", "wanted"), [([], [], []), ([3, 9, 9], [5, 9, 11], [3, 4, 9, 10]), ([4], [4], [])]
)
def test_spread_counts_out_each_span(first: list[int], stop: list[int], wanted: list[int]) -> None:
    assert spread(np.array(first, np.int64), np.array(stop, np.int64)).tolist() == wanted


@pytest.mark.parametrize("name", [ROWS, VECTORS["f16"], CODES, GRAPH])
def test_damage_is_found_before_a_number_counts(tmp_path: Path, name: str) -> None:
    made = written(tmp_path, shape=GraphShape() if name == GRAPH else None)
    path = tmp_path / made[0].name / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    segment = opened(tmp_path, made)
    rows = np.arange(COUNT)
    readers: dict[str, Any] = {
        ROWS: lambda: segment.keys,
        VECTORS["f16"]: lambda: segment.stored(rows),
        CODES: lambda: segment.code_block(0, COUNT),
        GRAPH: segment.graph,
    }
    with pytest.raises(DamagedError) as caught:
        readers[name]()
    assert str(caught.value).startswith(f"{path} is damaged: the checksum of block ")
    assert str(caught.value).endswith(ADVICE)
    segment.close()


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    made = written(tmp_path)
    (tmp_path / made[0].name / CODES).unlink()
    with pytest.raises(MissingFileError):
        opened(tmp_path, made)


def test_keys_that_fall_are_refused(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, layout_of("f16"))
    rows: NDArray[np.float16] = np.ones((2, DIMS), np.float16)
    writer.append(np.array([5, 6], np.uint64), rows)
    with pytest.raises(ValueError, match="keys of a segment ascend"):
        writer.append(np.array([4, 7], np.uint64), rows)
    with pytest.raises(ValueError, match="keys of a segment ascend"):
        writer.append(np.array([9, 8], np.uint64), rows)
    writer.discard()
    assert list(tmp_path.iterdir()) == []

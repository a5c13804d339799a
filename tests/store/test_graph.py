from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.store import graph as graphs
from gemb.store.blocks import CheckedFile, DamagedError, block_checksums
from gemb.store.codes import encode, unit

COUNT, DIMS = 1500, 16
SHAPE = graphs.GraphShape()
CODES = encode(unit(np.random.default_rng(4).standard_normal((COUNT, DIMS)).astype(np.float32)), 0.006)


def built(path: Path, codes: NDArray[np.int8] = CODES, threads: int = 1) -> NDArray[np.uint32]:
    blocks = [(first, codes[first : first + 400]) for first in range(0, len(codes), 400)]
    graphs.build(path, blocks, len(codes), DIMS, SHAPE, threads, lambda rows: None)
    return block_checksums(path)


def opened(path: Path, checksums: NDArray[np.uint32]) -> CheckedFile:
    return CheckedFile(path, checksums, path.stat().st_size, "run the command again")


def test_a_graph_finds_the_rows_that_a_scan_finds(tmp_path: Path) -> None:
    path = tmp_path / "graph"
    checksums = built(path)
    file = opened(path, checksums)
    slots = graphs.slot_rows(path, COUNT, DIMS)
    assert slots is not None
    queries = CODES[::50]
    found = graphs.Graph(file, checksums, COUNT, DIMS, None).nearest(queries, 10, 128, 1)
    lengths = np.linalg.norm(CODES.astype(np.float64), axis=1)
    cosines = queries.astype(np.float64) @ CODES.T.astype(np.float64) / lengths
    wanted = np.argsort(-cosines, axis=1)[:, :10]
    shared = [len(np.intersect1d(one, other)) for one, other in zip(found, wanted, strict=True)]
    assert np.mean(shared) > 9.8
    file.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_slot_rows_name_the_row_of_each_code_in_the_file(tmp_path: Path, threads: int) -> None:
    path = tmp_path / "graph"
    built(path, threads=threads)
    slots = graphs.slot_rows(path, COUNT, DIMS)
    assert slots is not None
    assert sorted(slots.tolist()) == list(range(COUNT))
    laid = np.fromfile(path, np.int8)[graphs.CODES_OFFSET :][: COUNT * DIMS].reshape(COUNT, DIMS)
    np.testing.assert_array_equal(laid, CODES[slots])


def test_a_file_laid_out_otherwise_has_no_slots(tmp_path: Path) -> None:
    path = tmp_path / "graph"
    built(path)
    assert graphs.slot_rows(path, COUNT - 1, DIMS) is None


def test_the_size_is_foretold_within_a_tenth(tmp_path: Path) -> None:
    built(tmp_path / "graph")
    assert (tmp_path / "graph").stat().st_size == pytest.approx(
        graphs.expected_bytes(COUNT, DIMS, SHAPE), rel=0.1
    )


def test_fewer_rows_than_asked_for_are_filled_up(tmp_path: Path) -> None:
    path = tmp_path / "graph"
    checksums = built(path, CODES[:3])
    file = opened(path, checksums)
    graph = graphs.Graph(file, checksums, 3, DIMS, None)
    assert np.sort(graph.nearest(CODES[:2], 5, 16, 1), axis=1).tolist() == [[-1, -1, 0, 1, 2]] * 2
    assert np.sort(graph.nearest(CODES[:1], 5, 16, 1), axis=1).tolist() == [[-1, -1, 0, 1, 2]]
    file.close()


def test_a_damaged_file_is_never_mapped_as_a_graph(tmp_path: Path) -> None:
    path = tmp_path / "graph"
    checksums = built(path)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    file = opened(path, checksums)
    with pytest.raises(DamagedError, match="the checksum of block 0 does not match"):
        graphs.Graph(file, checksums, COUNT, DIMS, tmp_path / "cache")
    file.close()


def test_a_file_that_was_whole_is_not_read_again_until_it_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "graph"
    checksums = built(path)
    read = []
    monkeypatch.setattr(CheckedFile, "check_all", lambda file: read.append(file.path))
    for _ in range(2):
        file = opened(path, checksums)
        graphs.check_once(file, checksums, tmp_path / "cache")
        file.close()
    assert read == [path]
    path.write_bytes(path.read_bytes())
    file = opened(path, checksums)
    graphs.check_once(file, checksums, tmp_path / "cache")
    file.close()
    assert read == [path, path]


def test_a_code_that_cosine_cannot_negate_is_refused(tmp_path: Path) -> None:
    codes = CODES[:3].copy()
    codes[1, 1] = -128
    with pytest.raises(ValueError, match="a code is out of range"):
        built(tmp_path / "graph", codes)

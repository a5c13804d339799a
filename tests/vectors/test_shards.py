import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.errors import Exit, GembError, MismatchError
from gemb.vectors import Layout, calibrate, open_sink
from gemb.vectors.layout import DType
from gemb.vectors.shards import (
    BlockTable,
    find_parts,
    is_mine,
    join,
    layout_of,
    parse_shard,
    shard_path,
    write_table,
)
from tests.vectors.conftest import Contents, Rows

DIMS = 8
BLOCK_ROWS = [4, 0, 7, 3, 5, 1, 6, 0, 2, 4]  # a block's rows may be rejected, or become several


def rows_of_block(block: int) -> slice:
    start = sum(BLOCK_ROWS[:block])
    return slice(start, start + BLOCK_ROWS[block])


def run_shard(
    output: Path, shard: int, of: int, vectors: NDArray[np.float32], layout: Layout, request: str = "r"
) -> None:
    """What a job with --shard does, a block at a time."""
    path = shard_path(output, shard, of)
    sink = open_sink(path, path.with_name(f"work{shard}"), layout)
    mine = [block for block in range(len(BLOCK_ROWS)) if is_mine(block, shard, of)]
    for block in mine:
        span = rows_of_block(block)
        sink.append([f"p{row}" for row in range(span.start, span.stop)], vectors[span])
    sink.finish()
    shutil.rmtree(path.with_name(f"work{shard}"))
    write_table(path, BlockTable(shard, of, request, len(BLOCK_ROWS), [BLOCK_ROWS[block] for block in mine]))


def run_whole(output: Path, vectors: NDArray[np.float32], layout: Layout) -> None:
    sink = open_sink(output, output.with_name("work"), layout)
    sink.append([f"p{row}" for row in range(len(vectors))], vectors)
    sink.finish()
    shutil.rmtree(output.with_name("work"))


@pytest.mark.parametrize("of", [1, 3, 4, 16])
@pytest.mark.parametrize(
    ("output", "dtype"),
    [
        ("docs.npy", "f32"),
        ("docs.npy", "int8"),
        ("docs.safetensors", "bf16"),
        ("docs.fbin", "f32"),
        ("docs.jsonl", "f16"),
        ("docs.parquet", "int8"),
        ("docs", "f32"),
    ],
)
def test_joined_shards_are_the_undivided_job_to_the_byte(
    tmp_path: Path, unit_rows: Rows, contents: Contents, output: str, dtype: DType, of: int
) -> None:
    vectors = unit_rows(sum(BLOCK_ROWS), DIMS)
    layout = Layout(DIMS, dtype, "list", {}, calibrate(vectors) if dtype == "int8" else None, part_rows=10)
    for folder in ("whole", "divided", "joined"):
        (tmp_path / folder).mkdir()
    run_whole(tmp_path / "whole" / output, vectors, layout)
    for shard in reversed(range(of)):
        run_shard(tmp_path / "divided" / output, shard, of, vectors, layout)
    parts = find_parts(tmp_path / "divided" / output)
    told: list[int] = []
    sink = open_sink(tmp_path / "joined" / output, tmp_path / "joined" / "work", layout_of(parts))
    assert join(parts, sink, told.append) == len(vectors)
    sink.finish()
    shutil.rmtree(tmp_path / "joined" / "work")
    assert contents(tmp_path / "joined") == contents(tmp_path / "whole")
    assert told[-1] == len(vectors)


def test_shards_lie_beside_the_output_and_keep_its_format() -> None:
    assert shard_path("out/docs.v2.npy", 3, 16) == Path("out/docs.v2.shard-00003-of-00016.npy")
    assert shard_path("out/docs", 0, 2) == Path("out/docs.shard-00000-of-00002/")
    with pytest.raises(GembError) as caught:
        shard_path("-", 0, 2)
    assert str(caught.value) == "--shard needs an output file or folder, not -"


def test_every_block_belongs_to_one_shard() -> None:
    for block in range(50):
        assert sum(is_mine(block, shard, 7) for shard in range(7)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "--shard 3: write it as i/n, such as 0/16"),
        ("-1/4", "--shard -1/4: write it as i/n, such as 0/16"),
        ("4/4", "--shard 4/4: the first number goes from 0 to 3, one for each shard"),
        ("0/0", "--shard 0/0: the first number goes from 0 to 0, one for each shard"),
    ],
)
def test_a_shard_that_is_none_is_told(text: str, message: str) -> None:
    with pytest.raises(GembError) as caught:
        parse_shard(text)
    assert str(caught.value) == message
    assert parse_shard("0/4") == (0, 4)


# Shards that cannot be joined


@pytest.fixture
def divided(tmp_path: Path, unit_rows: Rows) -> Path:
    """An output `docs.npy` of which all three shards are there."""
    for shard in range(3):
        run_shard(tmp_path / "docs.npy", shard, 3, unit_rows(sum(BLOCK_ROWS), DIMS), Layout(DIMS))
    return tmp_path / "docs.npy"


def test_missing_shards_are_named(divided: Path) -> None:
    shard_path(divided, 1, 3).with_name("docs.shard-00001-of-00003.npy.blocks.json").unlink()
    with pytest.raises(GembError) as caught:
        find_parts(divided)
    assert str(caught.value) == f"{divided}: 1 of 3 shards are missing or unfinished: 1; run --shard 1/3"


def test_a_name_that_looks_like_a_shard_is_a_name(tmp_path: Path, unit_rows: Rows) -> None:
    output = tmp_path / "y-00000-of-00001.npy"
    for shard in range(2):
        run_shard(output, shard, 2, unit_rows(sum(BLOCK_ROWS), DIMS), Layout(DIMS))
    assert [part.path for part in find_parts(output)] == [shard_path(output, shard, 2) for shard in range(2)]


def test_a_table_with_words_for_numbers_is_damaged(divided: Path) -> None:
    table = shard_path(divided, 1, 3).with_name("docs.shard-00001-of-00003.npy.blocks.json")
    entry = json.loads(table.read_text("utf-8"))
    table.write_text(json.dumps({**entry, "rows": ["5", *entry["rows"][1:]]}), "utf-8")
    with pytest.raises(GembError, match=r"is no table of blocks; run the shard again$"):
        find_parts(divided)


def test_no_shards_at_all_are_told(tmp_path: Path) -> None:
    with pytest.raises(GembError) as caught:
        find_parts(tmp_path / "docs.npy")
    assert str(caught.value) == (
        f"{tmp_path}/docs.npy: no finished shard beside it; run --shard 0/n to n-1/n first"
    )


def test_shards_of_two_divisions_are_told(divided: Path, unit_rows: Rows) -> None:
    run_shard(divided, 0, 2, unit_rows(sum(BLOCK_ROWS), DIMS), Layout(DIMS))
    with pytest.raises(MismatchError) as caught:
        find_parts(divided)
    assert str(caught.value) == (
        f"{divided}: shards of jobs in 2 and 3 parts lie beside each other; remove one kind"
    )


def test_shards_of_another_request_are_told(divided: Path, unit_rows: Rows) -> None:
    run_shard(divided, 2, 3, unit_rows(sum(BLOCK_ROWS), DIMS), Layout(DIMS), request="another")
    with pytest.raises(MismatchError) as caught:
        find_parts(divided)
    assert str(caught.value) == (
        f"{shard_path(divided, 2, 3)} belongs to another job than {shard_path(divided, 0, 3)} "
        "(model, recipe or input differ); run --shard 2/3 again"
    )
    assert caught.value.exit_code == Exit.MISMATCH


def test_a_shard_that_lost_rows_is_told(divided: Path, unit_rows: Rows, tmp_path: Path) -> None:
    short = shard_path(divided, 1, 3)
    np.save(short, unit_rows(2, DIMS))
    short.with_suffix(".ids.txt").write_text("a\nb\n")
    sink = open_sink(divided, tmp_path / "work", Layout(DIMS))
    with pytest.raises(GembError) as caught:
        join(find_parts(divided), sink)
    assert str(caught.value) == f"{short} has 2 rows, but its table lists 5; run the shard again"


def test_a_shard_of_another_width_is_told(divided: Path, unit_rows: Rows, tmp_path: Path) -> None:
    run_shard(divided, 1, 3, unit_rows(sum(BLOCK_ROWS), 16), Layout(16))
    sink = open_sink(divided, tmp_path / "work", Layout(DIMS))
    with pytest.raises(MismatchError) as caught:
        join(find_parts(divided), sink)
    assert str(caught.value) == (
        f"{shard_path(divided, 1, 3)} differs in width, type or metadata from {shard_path(divided, 0, 3)}; "
        "run it again"
    )


def test_a_table_with_too_few_blocks_is_told() -> None:
    with pytest.raises(GembError) as caught:
        BlockTable(1, 3, "r", 10, [1, 2])
    assert str(caught.value) == "shard 1/3 lists 2 blocks, but 3 of 10 are its own; run it again"


def test_nothing_to_join_is_told(tmp_path: Path) -> None:
    output = tmp_path / "docs.npy"
    for shard in range(2):
        path = shard_path(output, shard, 2)
        open_sink(path, tmp_path / "work", Layout(DIMS)).finish()
        write_table(path, BlockTable(shard, 2, "r", 2, [0]))
    with pytest.raises(GembError) as caught:
        layout_of(find_parts(output))
    assert str(caught.value) == (
        f"{shard_path(output, 0, 2)}: none of the 2 shards has a row; there is nothing to join"
    )

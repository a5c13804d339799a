import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.errors import Exit
from gemb.store.blocks import (
    BLOCK_BYTES,
    BlockWriter,
    CheckedFile,
    DamagedError,
    MissingFileError,
    block_checksums,
)

NUMBERS = np.random.default_rng(5).integers(0, 1 << 32, BLOCK_BYTES * 5 // 8, dtype=np.uint32)  # 2.5 blocks
ADVICE = "run the command again"


def written(path: Path) -> NDArray[np.uint32]:
    writer = BlockWriter(path)
    for part in np.array_split(NUMBERS, 7):
        writer.append(part)
    return writer.finish()


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def opened(path: Path, checksums: NDArray[np.uint32]) -> CheckedFile:
    return CheckedFile(path, checksums, NUMBERS.nbytes, ADVICE)


def test_checksums_equal_crc_32_of_each_block(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    found = written(path)
    content = NUMBERS.tobytes()
    wanted = [zlib.crc32(content[at : at + BLOCK_BYTES]) for at in range(0, len(content), BLOCK_BYTES)]
    assert found.tolist() == wanted
    assert block_checksums(path).tolist() == wanted
    assert path.read_bytes() == content


def test_an_undamaged_file_reads_back_as_written(tmp_path: Path) -> None:
    file = opened(tmp_path / "rows", written(tmp_path / "rows"))
    file.check_all()
    np.testing.assert_array_equal(file.array("<u4"), NUMBERS)
    assert file.damaged_blocks().tolist() == []
    file.close()


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_flipped_bit_is_found_in_its_block_and_nowhere_else(tmp_path: Path, block: int) -> None:
    path = tmp_path / "rows"
    checksums = written(path)
    flip(path, block * BLOCK_BYTES + 77)
    file = opened(path, checksums)
    for other in {0, 1, 2} - {block}:
        file.check(other * BLOCK_BYTES, other * BLOCK_BYTES + 1)
    with pytest.raises(DamagedError) as caught:
        file.check_rows(np.array([block * BLOCK_BYTES // 16 + 3]), 16)
    assert str(caught.value) == (
        f"{path} is damaged: the checksum of block {block} does not match; run the command again"
    )
    assert caught.value.exit_code is Exit.FAILED
    assert file.damaged_blocks().tolist() == [block]
    file.close()


def test_a_row_that_reaches_into_a_damaged_block_is_found(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    checksums = written(path)
    flip(path, BLOCK_BYTES)
    file = opened(path, checksums)
    row_bytes = 24  # does not divide a block
    with pytest.raises(DamagedError):
        file.check_rows(np.array([BLOCK_BYTES // row_bytes]), row_bytes)
    file.close()


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError) as caught:
        opened(tmp_path / "rows", np.zeros(3, np.uint32))
    assert str(caught.value) == f"{tmp_path / 'rows'} is missing; run the command again"


def test_a_file_of_another_size_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    checksums = written(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DamagedError) as caught:
        opened(path, checksums)
    assert str(caught.value) == (
        f"{path} is damaged: 655,356 bytes, but the catalogue says 655,360; run the command again"
    )


def test_a_file_that_is_cut_off_while_mapped_is_told_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    file = opened(path, written(path))
    assert file.refresh()
    with path.open("r+b") as other:
        other.truncate(100)
    with pytest.raises(DamagedError, match="it was 655,360 bytes long and is now 100"):
        file.refresh()
    file.close()


def test_a_file_that_is_written_to_while_mapped_is_checked_again(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    file = opened(path, written(path))
    file.check_all()
    flip(path, 9)
    assert not file.refresh()
    with pytest.raises(DamagedError):
        file.check(0, 16)
    file.close()


def test_an_empty_file_is_whole(tmp_path: Path) -> None:
    writer = BlockWriter(tmp_path / "rows")
    writer.append(np.empty((0, 3), np.float32))
    checksums = writer.finish()
    file = CheckedFile(tmp_path / "rows", checksums, 0, ADVICE)
    file.check_all()
    assert file.array("<f4", 3).shape == (0, 3)
    file.close()

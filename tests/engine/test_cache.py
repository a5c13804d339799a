from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.engine.cache import VectorCache
from gemb.errors import GembError, MachineError


def ids(*numbers: int) -> NDArray[np.int32]:
    return np.array(numbers, dtype=np.int32)


def open_cache(folder: Path, *context: str, dims: int = 3) -> VectorCache:
    return VectorCache(folder, context=context or ("model", "cpu", "fp32"), dims=dims)


def test_what_was_added_is_found_by_whoever_opens_the_folder(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "new/folder")
    key, other = cache.key(ids(1, 2), 0), cache.key(ids(3), 0)
    cache.add([(key, np.array([1, 2, 3], dtype=np.float32))])
    cache.close()
    again = open_cache(tmp_path / "new/folder")
    found = again.find([other, key])
    assert list(found) == [key]
    np.testing.assert_array_equal(found[key], [1, 2, 3])
    again.close()


def test_a_key_depends_on_every_token_on_the_prompt_and_on_the_context(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    other = open_cache(tmp_path, "model", "cpu", "bf16")
    keys = [
        cache.key(ids(1, 2, 3, 4), 0),
        cache.key(ids(1, 2, 3, 5), 0),
        cache.key(ids(2, 1, 3, 4), 0),
        cache.key(ids(1, 2, 3), 0),
        cache.key(ids(1, 2, 3, 4), 1),
        other.key(ids(1, 2, 3, 4), 0),
    ]
    assert len(set(keys)) == len(keys)
    assert cache.key(ids(1, 2, 3, 4), 0) == keys[0]
    cache.close()
    other.close()


def test_more_keys_than_one_query_takes_are_found(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    keys = [cache.key(ids(number), 0) for number in range(2500)]
    cache.add((key, np.full(3, number, dtype=np.float32)) for number, key in enumerate(keys))
    found = cache.find(keys)
    assert [int(found[key][0]) for key in keys] == list(range(2500))
    cache.close()


def test_a_vector_of_another_length_is_not_taken(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    key = cache.key(ids(1), 0)
    cache.add([(key, np.zeros(2, dtype=np.float32))])
    assert cache.find([key]) == {}
    cache.close()


def test_writers_wait_for_each_other(tmp_path: Path) -> None:
    def write(first: int) -> None:
        cache = open_cache(tmp_path)
        for number in range(first, first + 200):
            cache.add([(cache.key(ids(number), 0), np.zeros(3, dtype=np.float32))])
        cache.close()

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache = open_cache(tmp_path)
    assert len(cache.find([cache.key(ids(number), 0) for number in range(400)])) == 400
    cache.close()


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    cache = VectorCache(tmp_path, context=["model"], dims=3)
    pages = cache._database.execute("PRAGMA page_count").fetchone()[0]
    cache._database.execute(f"PRAGMA max_page_count={pages}")  # SQLite's own way to a full disk
    rows = [(number.to_bytes(16, "little"), np.ones(3, np.float32)) for number in range(10_000)]
    with pytest.raises(MachineError) as caught:
        cache.add(rows)
    assert str(caught.value) == (
        f"{tmp_path / 'vectors.sqlite'}: database or disk is full; "
        "delete the cache, or run the command without --cache"
    )
    cache.close()


def test_a_cache_of_another_format_is_refused(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "vectors.sqlite")
    database.execute("PRAGMA user_version=7")
    database.close()
    with pytest.raises(GembError) as caught:
        open_cache(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'vectors.sqlite'} is a cache of format 7, this gemb writes 1; pass another --cache"
    )

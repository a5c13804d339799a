"""Rows to write, and what a folder holds."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

Rows = Callable[[int, int], NDArray[np.float32]]
Contents = Callable[[Path], dict[str, bytes]]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on the disk itself; that files are synced, and when, tests/test_files.py shows."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def unit_rows() -> Rows:
    """Unit rows float32[rows, dims], the same in every test."""

    def make(rows: int, dims: int) -> NDArray[np.float32]:
        vectors = np.random.default_rng(7).standard_normal((rows, dims), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    return make


@pytest.fixture
def contents() -> Contents:
    """Every file below a folder, by its path in it."""

    def read(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return read

"""The codes of one space of vectors in a flat file, mapped into memory for reading: row after row, one byte per dimension.

The file follows from the blocks. It is written before the transaction that makes its rows count, so a crash leaves at most rows
that do not. Every whole page of rows is synced, and its hash kept in SQLite; the rows behind the last whole page are written anew
from the blocks when the store is opened, so no append has to be synced.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from nexus.storage.durable import storage_error, write_all

PAGE_ROWS = 4096


class CodeFile:
    """Rows of `dimension` signed bytes. All methods raise LocalError where the disk stands in the way."""

    def __init__(self, path: Path, dimension: int) -> None:
        self.path = path
        self.dimension = dimension
        self._page_bytes = PAGE_ROWS * dimension
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.is_new = not path.exists()
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise storage_error(error, path) from error
        self._mapped: NDArray[np.int8] = np.zeros((0, dimension), np.int8)

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def resize(self, rows: int) -> None:
        """Room for so many rows, and no more than that: what lies behind them is cut off."""
        try:
            os.ftruncate(self._handle, -(-rows // PAGE_ROWS) * self._page_bytes)
        except OSError as error:
            raise storage_error(error, self.path) from error
        self._map()

    def write(self, row: int, codes: bytes) -> None:
        """Put whole rows from number `row` on. Durable after `sync`."""
        end = row * self.dimension + len(codes)
        try:
            if end > self._mapped.size:
                os.ftruncate(self._handle, -(-end // self._page_bytes) * self._page_bytes)
            write_all(self._handle, codes, row * self.dimension)
            if end > self._mapped.size:
                self._map()
        except OSError as error:
            raise storage_error(error, self.path) from error

    def sync(self) -> None:
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise storage_error(error, self.path) from error

    @property
    def codes(self) -> NDArray[np.int8]:
        """int8 [rows, dimension] with room behind the rows that count; sees later writes."""
        return self._mapped

    def page_hash(self, page: int, numbers: NDArray[np.int64]) -> bytes:
        """Over one page of codes and the blocks that they are of."""
        hasher = blake3(numbers.astype("<i8").tobytes())
        hasher.update(self._mapped[page * PAGE_ROWS : (page + 1) * PAGE_ROWS].tobytes())
        return hasher.digest()

    def _map(self) -> None:
        size = os.fstat(self._handle).st_size
        rows = size // self.dimension
        if rows:
            # The plain array over the map: taking rows out of a `memmap` itself is slower.
            self._mapped = np.asarray(np.memmap(self.path, np.int8, "r", shape=(rows, self.dimension)))
        else:
            self._mapped = np.zeros((0, self.dimension), np.int8)

"""What finds the nearest among many vectors: a usearch graph for each space.

The graph is disposable. It only proposes candidates, which are then ranked by their codes. It is saved now and then as a file, with
its checksum in SQLite: one that is missing, cut short or changed is made anew from the codes. What is not in it yet is compared
one by one, so a search never misses what was stored.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from usearch.index import Index, MetricKind, ScalarKind  # type: ignore[attr-defined]

from nexus.memory.ranking import Asked
from nexus.storage.database import row_hash
from nexus.storage.durable import storage_error, sync_directory
from nexus.storage.memory.spaces import Rows, Space

# Fewer vectors are compared one by one.
INDEX_FROM = 5000
_CONNECTIVITY, _EXPANSION_ADD, _EXPANSION_SEARCH = 16, 128, 72
_ADDED_AT_ONCE = 256
_BYTE_MAX, _ROOM = 127, 1.25
# A file is written again once the graph has grown by this part.
_SAVE_SHARE = 8


class _Saved(NamedTuple):
    """`data`: None where the file is not what was saved."""

    rows: int
    scale: int
    data: bytes | None


class SpaceIndex:
    """The graph of one space. `rows`: those below this number are in it. Any thread; one at a time, for a fraction of a millisecond
    in a search and some milliseconds while it grows."""

    def __init__(self, root: Path, space: Space) -> None:
        self.space = space
        self.path = root / f"{space.number}.usearch"
        self.rows = 0
        self.saved_rows = 0
        self._lock = threading.Lock()
        # Thousandths of what vectors of length 1 are multiplied by to make bytes of them, the same for all: inner products of these
        # are the fastest to compute. Set by the first rows.
        self._scale = 0
        self._graph = self._empty()
        self._next: SpaceIndex | None = None

    def _empty(self) -> Index:
        return Index(
            ndim=self.space.key.dimension,
            metric=MetricKind.IP,
            dtype=ScalarKind.I8,
            connectivity=_CONNECTIVITY,
            expansion_add=_EXPANSION_ADD,
            expansion_search=_EXPANSION_SEARCH,
        )

    def load(self, connection: sqlite3.Connection, notices: list[str]) -> None:
        """Take the saved file if it is the one that was saved; else start with none, and say so."""
        saved = self._saved(connection)
        if saved is None:
            return
        rows, scale, data = saved
        if data is None:
            notices.append(f"{self.path} was missing or damaged: the index is made anew")
            return
        graph = self._empty()
        try:
            graph.load(data)
        except (RuntimeError, ValueError):
            notices.append(f"{self.path} is of another version of usearch: the index is made anew")
            return
        self._graph, self._scale, self.rows, self.saved_rows = graph, scale, rows, rows

    def is_sound(self, connection: sqlite3.Connection) -> bool:
        """Whether what was saved is still there."""
        saved = self._saved(connection)
        return saved is None or saved.data is not None

    def _saved(self, connection: sqlite3.Connection) -> _Saved | None:
        found = connection.execute(
            "SELECT rows, scale, checksum, hash FROM indexed WHERE space = ?", (self.space.number,)
        ).fetchone()
        if found is None:
            return None
        rows, scale, checksum, kept = found
        try:
            data: bytes | None = self.path.read_bytes()
        except OSError:
            data = None
        fits = row_hash("indexed", self.space.number, rows, scale, checksum) == kept and rows <= self.space.count
        if not fits or (data is not None and blake3(data).digest() != checksum):
            data = None
        return _Saved(rows, scale, data)

    def grow(self, rows: Rows) -> bool:
        """Add some of the rows that are not in it; whether there are more."""
        if self._next is not None:
            if self._next.grow(rows):
                return True
            with self._lock:
                self._graph, self._scale, self.rows = self._next._graph, self._next._scale, self._next.rows
                self._next, self.saved_rows = None, 0
            return False
        count = len(rows.numbers)
        if count < INDEX_FROM or self.rows >= count:
            return False
        end = min(self.rows + _ADDED_AT_ONCE, count)
        there = np.flatnonzero(rows.inverses[self.rows : end] > 0) + self.rows
        units = rows.codes[there] * rows.inverses[there, None]
        if not self._scale and len(there):
            # With room for larger ones that come later; what is larger still is cut.
            self._scale = round(1000 * _BYTE_MAX / (_ROOM * float(np.abs(units).max())))
        codes = self._bytes(units)
        with self._lock:
            if len(there):
                self._graph.add(there, codes, threads=1)
            self.rows = end
        return end < count

    def renew(self) -> None:
        """Make another graph beside this one, without the rows that were erased; `grow` puts it in place when it is as large."""
        self._next = SpaceIndex(self.path.parent, self.space)

    @property
    def renewing(self) -> bool:
        return self._next is not None

    def nearest(self, asked: Asked, count: int) -> NDArray[np.int64]:
        """The rows that look nearest, in no order that matters."""
        with self._lock:
            codes = self._bytes(asked.whole * asked.inverse)
            return np.asarray(self._graph.search(codes, count, threads=1).keys, np.int64)

    def _bytes(self, units: NDArray[np.float64]) -> NDArray[np.int8]:
        scaled = units * (self._scale / 1000)
        return np.rint(np.minimum(np.maximum(scaled, -_BYTE_MAX), _BYTE_MAX)).astype(np.int8)

    def needs_saving(self) -> bool:
        return self._next is None and self.rows - self.saved_rows > self.saved_rows // _SAVE_SHARE

    def write(self) -> tuple[int, bytes]:
        """Write the file: how many rows are in it, and its checksum, for `keep`. Raises LocalError."""
        with self._lock:
            data = bytes(self._graph.save() or b"")
            rows = self.rows
        temporary = self.path.with_suffix(".tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise storage_error(error, self.path) from error
        return rows, blake3(data).digest()

    def keep(self, connection: sqlite3.Connection, rows: int, checksum: bytes) -> None:
        connection.execute(
            "INSERT OR REPLACE INTO indexed VALUES (?, ?, ?, ?, ?)",
            (self.space.number, rows, self._scale, checksum, row_hash("indexed", self.space.number, rows, self._scale, checksum)),
        )
        self.saved_rows = rows

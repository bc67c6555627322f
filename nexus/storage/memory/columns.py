"""What filters look at, for every block, in arrays by block number: a filter is a few comparisons, and no row is read."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus.memory.block import ID_BYTES
from nexus.storage.memory.schema import Row

GONE = -1  # the state of a number that no block has

_TYPES: dict[str, Any] = {
    "collection": np.int32,
    "author": np.int32,
    "kind": np.int8,
    "created_ms": np.int64,
    "expires_ms": np.int64,
    "lang": np.int32,
    "cell": np.int64,
    "received_ms": np.int64,
    "sender": np.int32,
    "size": np.int32,
    "state": np.int8,
    "pinned": np.int8,
}
_SELECT = f"SELECT number, id, {', '.join(_TYPES)} FROM block WHERE number > ? ORDER BY number LIMIT 4096"  # noqa: S608 - own names
_PLACES = [Row._fields.index(name) for name in _TYPES]


class Columns:
    """Written under the store's lock, after the commit. Readers take `array(name)`: what lies below `count` stays where it is."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.count = 1  # numbers start at 1
        self._arrays: dict[str, NDArray[Any]] = {name: np.zeros(1024, kind) for name, kind in _TYPES.items()}
        self._arrays["state"][:] = GONE
        self.ids: NDArray[np.uint8] = np.zeros((1024, ID_BYTES), np.uint8)
        while rows := connection.execute(_SELECT, (self.count - 1,)).fetchall():
            self._extend([row[0] for row in rows], [row[1] for row in rows], list(zip(*rows, strict=True))[2:])
        # Words and vectors of a block that was found damaged may be left, and its number must not be another's.
        for query in ("SELECT max(id) FROM words_docsize", "SELECT max(block) FROM code"):
            (last,) = connection.execute(query).fetchone()
            self._make_room(max(self.count, (last or 0) + 1))

    def array(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    def id_of(self, number: int) -> bytes:
        return bytes(self.ids[number])

    def ids_of(self, numbers: NDArray[np.int64]) -> list[bytes]:
        joined = self.ids[numbers].tobytes()
        return [joined[at : at + ID_BYTES] for at in range(0, len(joined), ID_BYTES)]

    def extend(self, rows: Sequence[Row]) -> None:
        if rows:
            columns = list(zip(*rows, strict=True))
            self._extend(columns[0], columns[1], [columns[place] for place in _PLACES])

    def change(self, name: str, number: int, value: int) -> None:
        self._arrays[name][number] = value

    def numbers(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.flatnonzero(mask).astype(np.int64)

    def _extend(self, numbers: Sequence[int], ids: Sequence[bytes], columns: Sequence[Sequence[int]]) -> None:
        end = numbers[-1] + 1
        self._make_room(end)
        places = np.array(numbers)
        # A damaged row may hold anything; whoever reads it in full finds out.
        joined = b"".join(each[:ID_BYTES].ljust(ID_BYTES, b"\0") for each in ids)
        self.ids[places] = np.frombuffer(joined, np.uint8).reshape(-1, ID_BYTES)
        for name, values in zip(_TYPES, columns, strict=True):
            self._arrays[name][places] = np.array(values, np.int64).astype(_TYPES[name])

    def _make_room(self, end: int) -> None:
        """Let numbers below `end` count."""
        if end > len(self.ids):
            room = max(end, 2 * len(self.ids))
            for name, array in self._arrays.items():
                wider = np.full(room, GONE if name == "state" else 0, array.dtype)
                wider[: self.count] = array[: self.count]
                self._arrays[name] = wider
            wider_ids = np.zeros((room, ID_BYTES), np.uint8)
            wider_ids[: self.count] = self.ids[: self.count]
            self.ids = wider_ids
        self.count = end

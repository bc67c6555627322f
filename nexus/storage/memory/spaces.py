"""Spaces of vectors: those of one model in one collection, each with its file of codes, kept in step with the blocks."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import LocalError
from nexus.core.hashing import tagged_hash
from nexus.memory.ranking import inverse_lengths
from nexus.storage.database import row_hash
from nexus.storage.memory.codes import PAGE_ROWS, CodeFile
from nexus.storage.memory.names import Names
from nexus.storage.memory.records import WITH_BODY
from nexus.storage.memory.rows import in_parts, read_bodies

# Models per collection: what others publish must not make files without end here. Vectors of further ones stay in their blocks.
SPACES_MAX = 64


class SpaceKey(NamedTuple):
    collection: bytes
    fingerprint: bytes
    dimension: int


class Rows(NamedTuple):
    """What a search sees. `numbers`: int64 [n], the blocks; `inverses`: float64 [n], 1 / length of the codes, 0 for erased ones."""

    codes: NDArray[np.int8]
    numbers: NDArray[np.int64]
    inverses: NDArray[np.float64]


@dataclass(slots=True)
class Space:
    number: int
    key: SpaceKey
    model: str
    file: CodeFile
    count: int = 0
    _numbers: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    _inverses: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0, np.float64))
    view: Rows = field(init=False)

    def __post_init__(self) -> None:
        self._show()

    def append(self, numbers: Sequence[int], codes: NDArray[np.int8]) -> None:
        """Let rows count that are in the file."""
        end = self.count + len(numbers)
        if end > len(self._numbers):
            room = max(1024, 2 * end)
            self._numbers = np.concatenate([self._numbers[: self.count], np.zeros(room - self.count, np.int64)])
            self._inverses = np.concatenate([self._inverses[: self.count], np.zeros(room - self.count, np.float64)])
        self._numbers[self.count : end] = numbers
        self._inverses[self.count : end] = inverse_lengths(codes)
        self.count = end
        self._show()

    def erase(self, rows: Sequence[int]) -> None:
        """Overwrite the codes of rows for good. Raises LocalError."""
        self._inverses[list(rows)] = 0
        for row in rows:
            self.file.write(row, bytes(self.key.dimension))
        self.file.sync()

    def _show(self) -> None:
        self.view = Rows(self.file.codes[: self.count], self._numbers[: self.count], self._inverses[: self.count])


class Placed(NamedTuple):
    """Vectors that a transaction has put behind the rows that count."""

    space: Space
    numbers: list[int]
    codes: NDArray[np.int8]


class Spaces:
    """All of them, by what they are of. `notices`: takes what the owner of the machine should know."""

    def __init__(self, root: Path, connection: sqlite3.Connection, names: Names, notices: list[str]) -> None:
        self._root = root
        self._names = names
        self.by_key: dict[SpaceKey, Space] = {}
        self._by_number: dict[int, Space] = {}
        self._fresh: list[Space] = []
        query = "SELECT number, collection, fingerprint, dimension, model, hash FROM space ORDER BY number"
        for number, collection, fingerprint, dimension, model, kept in connection.execute(query).fetchall():
            key = SpaceKey(names.value(collection), names.value(fingerprint), dimension)
            if row_hash("space", number, *key, model) != kept:
                raise LocalError(
                    f"the row of the vectors {root / str(number)} is damaged: its hash does not fit",
                    "The disk or the memory of this machine is failing: check both, and restore the memory from a backup",
                )
            space = self._open(number, key, model)
            _load(connection, space, notices)

    def close(self) -> None:
        for space in self._by_number.values():
            space.file.close()

    def matching(self, collections: Sequence[bytes], fingerprint: bytes, dimension: int) -> list[Space]:
        """Those of one model, in these collections or in all."""
        if collections:
            keys = (SpaceKey(collection, fingerprint, dimension) for collection in dict.fromkeys(collections))
            return [self.by_key[key] for key in keys if key in self.by_key]
        return [space for space in self.all() if space.key.fingerprint == fingerprint and space.key.dimension == dimension]

    def of_collection(self, collection: bytes) -> list[Space]:
        return [space for space in self.all() if space.key.collection == collection]

    def all(self) -> list[Space]:
        return list(self._by_number.values())

    def of_number(self, number: int) -> Space:
        return self._by_number[number]

    def claim(self, connection: sqlite3.Connection, key: SpaceKey, model: str) -> Space | None:
        """The space, made where there is none, or None where the collection has too many. Until `settle` it may go again."""
        known = self.by_key.get(key)
        if known is not None:
            return known
        if len(self.of_collection(key.collection)) >= SPACES_MAX:
            return None
        collection, fingerprint = (self._names.number(connection, name) for name in (key.collection, key.fingerprint))
        number = int(connection.execute("SELECT coalesce(max(number), 0) + 1 FROM space").fetchone()[0])
        connection.execute(
            "INSERT INTO space VALUES (?, ?, ?, ?, ?, ?)",
            (number, collection, fingerprint, key.dimension, model, row_hash("space", number, *key, model)),
        )
        # A file of that number may be left from a transaction that did not end.
        (self._root / f"{number}.codes").unlink(missing_ok=True)
        space = self._open(number, key, model)
        self._fresh.append(space)
        return space

    def settle(self, committed: bool) -> None:
        if not committed:
            for space in self._fresh:
                space.file.close()
                del self.by_key[space.key], self._by_number[space.number]
        self._fresh.clear()

    def _open(self, number: int, key: SpaceKey, model: str) -> Space:
        space = Space(number, key, model, CodeFile(self._root / f"{number}.codes", key.dimension))
        self.by_key[key] = self._by_number[number] = space
        return space


def place(connection: sqlite3.Connection, space: Space, numbers: Sequence[int], codes: Sequence[bytes]) -> Placed:
    """Write vectors of blocks behind the space's rows, in file and tables. They count once `append` is told after the commit."""
    joined = b"".join(codes)
    start, end = space.count, space.count + len(numbers)
    space.file.write(start, joined)
    connection.executemany(
        "INSERT INTO code (space, row, block) VALUES (?, ?, ?)",
        [(space.number, start + at, number) for at, number in enumerate(numbers)],
    )
    whole = range(start // PAGE_ROWS, end // PAGE_ROWS)
    if whole:
        space.file.sync()
        all_numbers = np.concatenate([space.view.numbers, np.array(numbers, np.int64)])
        for page in whole:
            keep_page(connection, space, page, all_numbers)
    return Placed(space, list(numbers), np.frombuffer(joined, np.int8).reshape(len(numbers), -1))


def doubt(connection: sqlite3.Connection, space: Space, rows: Sequence[int]) -> None:
    """Rows are about to be overwritten: their pages have no hash until `keep_pages`, and are made anew when the store is opened."""
    pages = {(space.number, row // PAGE_ROWS) for row in rows}
    connection.executemany("DELETE FROM page WHERE space = ? AND page = ?", sorted(pages))


def keep_pages(connection: sqlite3.Connection, space: Space) -> None:
    """Note the hashes of whole pages that have none."""
    kept = {page for (page,) in connection.execute("SELECT page FROM page WHERE space = ?", (space.number,))}
    for page in range(space.count // PAGE_ROWS):
        if page not in kept:
            keep_page(connection, space, page, space.view.numbers)


def vector_hash(space: SpaceKey, block: bytes, scale: int, codes: bytes) -> bytes:
    return tagged_hash("row/vector", *space[:2], block, scale.to_bytes(8, "big"), codes)


def derive(connection: sqlite3.Connection, space: Space, numbers: Iterable[int]) -> dict[int, bytes]:
    """The codes of these blocks in this space as the blocks have them; left out where they have none, or have no body any more."""
    wanted = list(numbers)
    ids: dict[int, bytes] = {}
    for marks, part in in_parts(wanted):
        query = f"SELECT number, id, state FROM block WHERE number IN ({marks})"  # noqa: S608 - question marks only
        ids.update((number, identifier) for number, identifier, state in connection.execute(query, part) if state in WITH_BODY)
    found: dict[int, bytes] = {}
    for number, body in read_bodies(connection, ids).items():
        if body is not None and body.content is not None:
            for vector in body.content.vectors:
                if vector.fingerprint == space.key.fingerprint and len(vector.codes) == space.key.dimension:
                    found[number] = vector.codes
    for marks, part in in_parts([number for number in ids if number not in found]):
        query = f"SELECT block, scale, codes, hash FROM vector WHERE space = ? AND block IN ({marks})"  # noqa: S608 - question marks only
        for number, scale, codes, kept in connection.execute(query, (space.number, *part)):
            if vector_hash(space.key, ids[number], scale, codes) == kept:
                found[number] = codes
    return found


def rewrite(connection: sqlite3.Connection, space: Space, first: int, numbers: NDArray[np.int64]) -> bool:
    """Make the rows from `first` on anew from the blocks `numbers`; whether they were different before."""
    derived = derive(connection, space, numbers.tolist())
    nothing = bytes(space.key.dimension)
    codes = b"".join(derived.get(number, nothing) for number in numbers.tolist())
    before = space.file.codes[first : first + len(numbers)].tobytes()
    if before == codes:
        return False
    space.file.write(first, codes)
    space.file.sync()
    return True


def _load(connection: sqlite3.Connection, space: Space, notices: list[str]) -> None:
    """Bring the file in step with the tables, page by page, and let its rows count."""
    query = "SELECT block FROM code WHERE space = ? ORDER BY row"
    numbers = np.array([number for (number,) in connection.execute(query, (space.number,))], np.int64)
    count = len(numbers)
    space.file.resize(count)
    kept = dict(connection.execute("SELECT page, hash FROM page WHERE space = ?", (space.number,)).fetchall())
    damaged = 0
    for page in range(-(-count // PAGE_ROWS)):
        start = page * PAGE_ROWS
        part = numbers[start : start + PAGE_ROWS]
        if len(part) < PAGE_ROWS:
            rewrite(connection, space, start, part)
        elif kept.get(page) != space.file.page_hash(page, part):
            damaged += page in kept
            rewrite(connection, space, start, part)
            keep_page(connection, space, page, numbers)
    if count and (damaged or space.file.is_new):
        notices.append(f"{space.file.path} was {'missing' if space.file.is_new else 'damaged'}: it was made anew from the blocks")
    space.append(numbers.tolist(), space.file.codes[:count])


def keep_page(connection: sqlite3.Connection, space: Space, page: int, numbers: NDArray[np.int64]) -> None:
    part = numbers[page * PAGE_ROWS : (page + 1) * PAGE_ROWS]
    connection.execute("INSERT OR REPLACE INTO page VALUES (?, ?, ?)", (space.number, page, space.file.page_hash(page, part)))

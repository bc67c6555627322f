"""One write of the memory store: everything of it in one transaction, and what memory has to learn once that is durable."""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nexus.core.errors import CapacityError, UsageError
from nexus.memory.batch import OpenedBlock
from nexus.memory.block import SEALED, Vector, split_ids
from nexus.memory.sky.place import CELL_BYTES
from nexus.memory.sky.stamp import MODEL_BYTES
from nexus.storage.memory import words
from nexus.storage.memory.columns import GONE, Columns
from nexus.storage.memory.families import decide
from nexus.storage.memory.names import Names
from nexus.storage.memory.records import WITH_BODY, Arrival, Content, QuotaError, Rules, State
from nexus.storage.memory.rows import (
    CheckedRow,
    content_hash,
    read_bodies,
    rows_by_id,
    searchable,
    update_rows,
    write_proof,
)
from nexus.storage.memory.schema import ROW_BYTES, Row, hash_of_row
from nexus.storage.memory.spaces import SPACES_MAX, Placed, Space, SpaceKey, Spaces, doubt, place, vector_hash

_CELL = struct.Struct("<HHH")


class Quotas(NamedTuple):
    """Bytes that blocks may take: all together, and those of one author in one collection."""

    total: int
    author: int


class _New(NamedTuple):
    opened: OpenedBlock
    content: Content | None
    arrival: Arrival
    batch: int


@dataclass(slots=True)
class Writing:
    """The tables are written at once, `columns` and the spaces by `apply` after the commit."""

    connection: sqlite3.Connection
    names: Names
    spaces: Spaces
    columns: Columns
    quotas: Quotas
    rows: list[Row] = field(default_factory=list)
    changed: list[Row] = field(default_factory=list)
    placed: dict[int, Placed] = field(default_factory=dict)
    erased: list[tuple[Space, list[int]]] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)

    def put(self, arrivals: Sequence[Arrival], rules: Rules) -> list[bytes]:
        """The ids that are new. Raises QuotaError, UsageError for an arrival that does not fit together."""
        new = self._new(arrivals)
        if not new:
            return []
        number = self.columns.count
        values: list[tuple[object, ...]] = []
        for entry in new:
            row, value = self._row(number, entry)
            self.rows.append(row)
            values.append(value)
            number += 1
        self._count_bytes([(row, row.size) for row in self.rows])
        self._check_quotas()
        marks = ", ".join("?" * (len(Row._fields) + 1))
        self.connection.executemany(f"INSERT INTO block VALUES ({marks})", values)  # noqa: S608 - question marks only
        self._write_bodies(new)
        contents = [(row.number, searchable(entry.opened.block, entry.content)) for row, entry in zip(self.rows, new, strict=True)]
        self.index([(row, content) for row, (_, content) in zip(self.rows, contents, strict=True) if content is not None])
        self._decide(new, rules)
        return [row.id for row in self.rows]

    def apply(self) -> None:
        """Let memory follow, after the commit. Raises LocalError where erased codes cannot be overwritten; that is done last."""
        self.columns.extend(self.rows)
        for row in self.changed:
            self.columns.change("state", row.number, row.state)
            self.columns.change("pinned", row.number, row.pinned)
            self.columns.change("size", row.number, row.size)
        for number in self.forgotten:
            self.columns.change("state", number, GONE)
        for part in self.placed.values():
            part.space.append(part.numbers, part.codes)
        for space, rows in self.erased:
            space.erase(rows)

    def index(self, contents: Sequence[tuple[Row, Content]]) -> None:
        """Make contents findable: their words, tags and vectors."""
        words.add(self.connection, [(row.number, content) for row, content in contents])
        self.connection.executemany(
            "INSERT OR IGNORE INTO tag VALUES (?, ?)", [(tag, row.number) for row, content in contents for tag in content.tags]
        )
        groups: dict[SpaceKey, list[tuple[int, Vector]]] = {}
        for row, content in contents:
            for vector in content.vectors:
                key = SpaceKey(self.names.value(row.collection), vector.fingerprint, len(vector.codes))
                groups.setdefault(key, []).append((row.number, vector))
        for key, group in groups.items():
            self.place(key, group[0][1].model, [(number, vector.codes) for number, vector in group])

    def place(self, key: SpaceKey, model: str, vectors: Sequence[tuple[int, bytes]]) -> Space | None:
        """Vectors of blocks, by number; of two of one block the first counts. None if there is no room for another space."""
        space = self.spaces.claim(self.connection, key, model)
        if space is not None:
            first: dict[int, bytes] = {}
            for number, codes in vectors:
                first.setdefault(number, codes)
            if space.number in self.placed:
                raise ValueError("one write places vectors in a space once")
            self.placed[space.number] = place(self.connection, space, list(first), list(first.values()))
        return space

    def change(self, changes: Sequence[tuple[CheckedRow, State]]) -> None:
        """Give blocks another state; of those that have no body in it everything but the row is erased."""
        pairs = []
        gone = []
        for row, state in changes:
            size = row.row.size if state in WITH_BODY else 0
            pairs.append((row, row.row._replace(state=int(state), size=size)))
            if row.row.state in WITH_BODY and state not in WITH_BODY:
                gone.append(row.row)
        self.erase(gone)
        update_rows(self.connection, pairs)
        self.changed.extend(new for _, new in pairs)

    def open_sealed(self, contents: Sequence[tuple[CheckedRow, Content]]) -> None:
        """Add what can be read now of sealed blocks that could not be read before."""
        self.connection.executemany(
            "UPDATE body SET content = ?, hash = ? WHERE number = ?",
            [(data := content.to_bytes(), content_hash(row.row.number, data), row.row.number) for row, content in contents],
        )
        self.index([(row.row, content) for row, content in contents])

    def add_vectors(self, key: SpaceKey, model: str, vectors: Sequence[tuple[CheckedRow, int, bytes]]) -> None:
        """(block, scale, codes) each, of blocks that have none in this space. Raises CapacityError for one space too many."""
        space = self.place(key, model, [(row.row.number, codes) for row, _, codes in vectors])
        if space is None:
            raise CapacityError(f"the collection has vectors of {SPACES_MAX} models, the limit", "Use one of those")
        self.connection.executemany(
            "INSERT INTO vector VALUES (?, ?, ?, ?, ?)",
            [
                (space.number, row.row.number, scale, codes, vector_hash(key, row.row.id, scale, codes))
                for row, scale, codes in vectors
            ],
        )

    def pin(self, row: CheckedRow, pinned: bool) -> None:
        new = row.row._replace(pinned=int(pinned))
        update_rows(self.connection, [(row, new)])
        self.changed.append(new)

    def erase(self, rows: Sequence[Row]) -> None:
        """Remove bodies and all that was made of them."""
        if not rows:
            return
        bodies = read_bodies(self.connection, {row.number: row.id for row in rows})
        contents = [(number, body.content) for number, body in bodies.items() if body is not None and body.content is not None]
        words.remove(self.connection, contents)
        self.connection.executemany(
            "DELETE FROM tag WHERE name = ? AND block = ?", [(tag, number) for number, content in contents for tag in content.tags]
        )
        numbers = [(row.number,) for row in rows]
        self.connection.executemany("DELETE FROM body WHERE number = ?", numbers)
        self.connection.executemany("DELETE FROM vector WHERE block = ?", numbers)
        by_space: dict[int, list[int]] = {}
        for (number,) in numbers:
            for space_number, place_ in self.connection.execute("SELECT space, row FROM code WHERE block = ?", (number,)):
                by_space.setdefault(space_number, []).append(place_)
        for number, found in by_space.items():
            space = self.spaces.of_number(number)
            doubt(self.connection, space, found)
            self.erased.append((space, found))
        self._count_bytes([(row, -row.size) for row in rows])
        self.connection.executemany("INSERT OR IGNORE INTO erasing VALUES (?)", [(0,), *((number,) for number in by_space)])

    def forget(self, row: Row) -> None:
        """Erase a block, its row too. Its number is not given again: words that cannot be taken out are left behind with it."""
        if row.state in WITH_BODY:
            self.erase([row])
        for query in (
            "DELETE FROM block WHERE number = ?",
            "DELETE FROM version WHERE block = ?",
            "DELETE FROM edge WHERE child = ?",
        ):
            self.connection.execute(query, (row.number,))
        self.forgotten.append(row.number)

    def _new(self, arrivals: Sequence[Arrival]) -> list[_New]:
        """The blocks that are not known, each once, with the proofs of their batches narrowed to them and written."""
        ids = [opened.id for arrival in arrivals for opened in arrival.opened]
        known = set(rows_by_id(self.connection, ids))
        batch = int(self.connection.execute("SELECT coalesce(max(number), 0) FROM batch").fetchone()[0])
        found: list[_New] = []
        for arrival in arrivals:
            if len(arrival.opened) != len(arrival.contents):
                raise UsageError("an arrival has one content per block, or None in its place")
            fresh = []
            for opened, content in zip(arrival.opened, arrival.contents, strict=True):
                if opened.id not in known:
                    known.add(opened.id)
                    fresh.append((opened, content))
            if fresh:
                batch += 1
                proof = arrival.proof
                if len(fresh) < len(arrival.opened):
                    places = {opened.place: opened.id for opened in arrival.opened}
                    proof = proof.narrow(places, [opened.place for opened, _ in fresh])
                write_proof(self.connection, batch, proof)
                found.extend(_New(opened, content, arrival, batch) for opened, content in fresh)
        return found

    def _row(self, number: int, entry: _New) -> tuple[Row, tuple[object, ...]]:
        block, arrival = entry.opened.block, entry.arrival
        lang = entry.content.lang if block.kind == SEALED and entry.content is not None else block.lang
        values = (block.collection, block.author, lang.encode(), arrival.sender)
        collection, author, lang_number, sender = (self.names.number(self.connection, value) for value in values)
        size = len(entry.opened.data) + ROW_BYTES
        row = Row(
            number,
            entry.opened.id,
            entry.batch,
            entry.opened.place,
            collection,
            author,
            block.kind,
            block.created_ms,
            block.expires_ms,
            lang_number,
            pack_cell(block.sky),
            arrival.received_ms,
            sender,
            size,
            int(State.LIVE),
            0,
        )
        return row, (*row, hash_of_row(row, *values))

    def _write_bodies(self, new: Sequence[_New]) -> None:
        bodies = []
        for row, entry in zip(self.rows, new, strict=True):
            sealed = entry.opened.block.kind == SEALED and entry.content is not None
            content = entry.content.to_bytes() if sealed and entry.content is not None else b""
            bodies.append((row.number, entry.opened.data, content, content_hash(row.number, content)))
        self.connection.executemany("INSERT INTO body VALUES (?, ?, ?, ?)", bodies)
        self.connection.executemany(
            "INSERT OR IGNORE INTO edge VALUES (?, ?)",
            [
                (row.number, parent)
                for row, entry in zip(self.rows, new, strict=True)
                if entry.opened.block.parents
                for parent in split_ids(entry.opened.block.parents)
            ],
        )

    def _decide(self, new: Sequence[_New], rules: Rules) -> None:
        """Versions: of what has parents, and of what others name as theirs."""
        touched = [row.number for row, entry in zip(self.rows, new, strict=True) if entry.opened.block.parents]
        named = "SELECT 1 FROM edge WHERE parent = ? LIMIT 1"
        if self.connection.execute("SELECT 1 FROM edge LIMIT 1").fetchone():
            touched.extend(row.number for row in self.rows if self.connection.execute(named, (row.id,)).fetchone())
        self.change(decide(self.connection, touched, rules))

    def _count_bytes(self, sizes: Sequence[tuple[Row, int]]) -> None:
        sums: dict[tuple[int, int], int] = {}
        for row, size in sizes:
            key = (row.collection, row.author)
            sums[key] = sums.get(key, 0) + size
        self.connection.executemany(
            "INSERT INTO usage VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET bytes = bytes + ?3",
            [(*key, size) for key, size in sums.items()],
        )

    def _check_quotas(self) -> None:
        (total,) = self.connection.execute("SELECT sum(bytes) FROM usage").fetchone()
        if total > self.quotas.total:
            raise QuotaError(
                f"the memory of this node is full: its blocks may take {self.quotas.total >> 20} MiB",
                "Make room with `nexus memory prune`, or raise memory.bytes_max",
                "total",
            )
        for collection, author in {(row.collection, row.author) for row in self.rows}:
            query = "SELECT bytes FROM usage WHERE collection = ? AND author = ?"
            (used,) = self.connection.execute(query, (collection, author)).fetchone()
            if used > self.quotas.author:
                whose, where = self.names.value(author), self.names.value(collection)
                raise QuotaError(
                    f"the author {whose.hex()[:16]} has more than {self.quotas.author >> 20} MiB in collection {where.hex()[:16]}",
                    "Raise memory.author_bytes_max if they should have more",
                    "author",
                    whose,
                    where,
                )


def pack_cell(sky: bytes) -> int:
    """The cell of a stamp of the sky (`nexus.memory.sky.place`) as one number: step, row and column. 0 for none."""
    cell = sky[MODEL_BYTES : MODEL_BYTES + CELL_BYTES]
    if len(cell) < CELL_BYTES:
        return 0
    step, row, column = _CELL.unpack(cell)
    return int(step << 32 | row << 16 | column)

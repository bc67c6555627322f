"""Evidence against other nodes, and what this node saw of their work: evidence.db in the data directory.

Of every offender the evidence with the least id is kept. Every row carries its own hash and is checked when it is read; whether an
evidence convicts is for the caller to verify, before it is put here and again when it is read at start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from nexus.core.errors import CapacityError
from nexus.core.hashing import HASH_BYTES
from nexus.storage.database import Cell, Database, row_hash
from nexus.swarm.standing import SLASHED_MAX, Suspension, Tally, room_of_strangers

DATABASE_BYTES_MAX = 2 * 1024**3
TALLIES_MAX = 16_384
SUSPENSIONS_MAX = 4096
KIND_BYTES_MAX = 16

_TALLY_FIELDS = tuple(field.name for field in fields(Tally))
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS evidence (
    offender BLOB PRIMARY KEY, id BLOB NOT NULL, kind TEXT NOT NULL, known_ms INTEGER NOT NULL, sender BLOB NOT NULL,
    size INTEGER NOT NULL, content BLOB NOT NULL, hash BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS evidence_id ON evidence (id);
CREATE TABLE IF NOT EXISTS tally (
    node BLOB PRIMARY KEY, {", ".join(f"{name} INTEGER NOT NULL" for name in _TALLY_FIELDS)}, seen_ms INTEGER NOT NULL,
    hash BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS suspension (
    node BLOB PRIMARY KEY, session BLOB NOT NULL, cause TEXT NOT NULL, since_ms INTEGER NOT NULL, until_ms INTEGER NOT NULL,
    hash BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS fuse (only_one INTEGER PRIMARY KEY CHECK (only_one = 1), resumed_ms INTEGER NOT NULL) STRICT;
"""


@dataclass(frozen=True, slots=True)
class StoredEvidence:
    """`known_ms`: Unix time at which this node first knew of evidence against the offender. `sender`: the public key of the node
    that it came from; empty where this node found it itself. `size`: of the content, in bytes."""

    offender: bytes
    id: bytes
    kind: str
    known_ms: int
    sender: bytes
    size: int


class EvidenceStore:
    """One file, opened once. Every method raises LocalError where the disk stands in the way."""

    def __init__(self, path: Path, bytes_max: int = DATABASE_BYTES_MAX) -> None:
        self._database = Database(path, _SCHEMA)
        self._bytes_max = bytes_max

    def close(self) -> None:
        self._database.close()

    def put(self, stored: StoredEvidence, content: bytes, *, of_stranger: bool = False) -> bool:
        """Keep verified evidence, durably, unless one with a lesser id is kept; whether it is kept now. Raises CapacityError.

        `of_stranger`: against a node that nobody here has met. It may have all but a part of the room, so that convictions of keys
        that were made for it keep nothing out that matters.
        """
        most, bytes_max = SLASHED_MAX, self._bytes_max
        if of_stranger:
            most, bytes_max = room_of_strangers(most), room_of_strangers(bytes_max)
        with self._database.transaction() as connection:
            known = connection.execute("SELECT id, known_ms FROM evidence WHERE offender = ?", (stored.offender,)).fetchone()
            if known is not None and known[0] <= stored.id:
                return False
            (count, size) = connection.execute("SELECT count(*), coalesce(sum(size), 0) FROM evidence").fetchone()
            if known is None and (count >= most or size + len(content) > bytes_max):
                raise CapacityError(
                    f"{count} pieces of evidence of {size} bytes together are all that this node keeps",
                    "Somebody may be convicting keys of their own by the thousand; please report it",
                )
            first_ms = stored.known_ms if known is None else known[1]
            cells = (stored.offender, stored.id, stored.kind, first_ms, stored.sender, len(content))
            connection.execute(
                "INSERT OR REPLACE INTO evidence VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*cells, content, row_hash("evidence", *cells, content)),
            )
        return True

    def listed(self) -> list[StoredEvidence]:
        """All of it without the contents, the latest first. Not checked against the rows' hashes: `content` is."""
        query = "SELECT offender, id, kind, known_ms, sender, size FROM evidence ORDER BY known_ms DESC, id"
        return [StoredEvidence(*row) for row in self._database.rows(query)]  # type: ignore[arg-type]

    def content(self, evidence_id: bytes) -> bytes | None:
        """The evidence as it was put, or None. Raises LocalError for a damaged row."""
        query = "SELECT offender, id, kind, known_ms, sender, size, content, hash FROM evidence WHERE id = ?"
        found = self._database.rows(query, evidence_id)
        if not found:
            return None
        *cells, content, kept = found[0]
        if row_hash("evidence", *cells, content) != kept:
            raise self._database.damaged(f"the evidence {evidence_id.hex()[:16]}")
        assert isinstance(content, bytes)
        return content

    def tallies(self) -> dict[bytes, Tally]:
        """What was seen of every node's work. A damaged row is as good as none."""
        columns = ", ".join(("node", *_TALLY_FIELDS, "seen_ms", "hash"))
        found: dict[bytes, Tally] = {}
        for *cells, kept in self._database.rows(f"SELECT {columns} FROM tally"):  # noqa: S608 - names of this module's own
            if row_hash("tally", *cells) == kept:
                node, *counts, _ = cells
                found[_key(node)] = Tally(*counts)  # type: ignore[arg-type]
        return found

    def put_tally(self, node: bytes, tally: Tally, now_ms: int) -> None:
        """Keep what was seen of one node; those that were not seen longest make room."""
        cells: tuple[Cell, ...] = (node, *astuple(tally), now_ms)
        marks = ", ".join("?" * (len(cells) + 1))
        with self._database.transaction() as connection:
            connection.execute(
                f"INSERT OR REPLACE INTO tally VALUES ({marks})",  # noqa: S608 - question marks only
                (*cells, row_hash("tally", *cells)),
            )
            connection.execute(
                "DELETE FROM tally WHERE node IN (SELECT node FROM tally ORDER BY seen_ms DESC, node LIMIT -1 OFFSET ?)",
                (TALLIES_MAX,),
            )

    def suspensions(self, now_ms: int) -> dict[bytes, Suspension]:
        """Those that still run."""
        query = "SELECT node, session, cause, since_ms, until_ms, hash FROM suspension WHERE until_ms > ?"
        found = self._database.rows(query, now_ms)
        return {_key(row[0]): Suspension(*row[:-1]) for row in found if row_hash("suspension", *row[:-1]) == row[-1]}  # type: ignore[arg-type]

    def put_suspension(self, suspension: Suspension, now_ms: int) -> None:
        """Keep a checked one. Of two of one node the one that ends later counts; ended ones go."""
        cells = (suspension.node, suspension.session, suspension.cause, suspension.since_ms, suspension.until_ms)
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM suspension WHERE until_ms <= ?", (now_ms,))
            connection.execute(
                "INSERT INTO suspension VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (node) DO UPDATE SET session = excluded.session, "
                "cause = excluded.cause, since_ms = excluded.since_ms, until_ms = excluded.until_ms, hash = excluded.hash "
                "WHERE excluded.until_ms > until_ms",
                (*cells, row_hash("suspension", *cells)),
            )
            connection.execute(
                "DELETE FROM suspension WHERE node IN (SELECT node FROM suspension ORDER BY until_ms DESC, node LIMIT -1 OFFSET ?)",
                (SUSPENSIONS_MAX,),
            )

    @property
    def resumed_ms(self) -> int:
        """When an operator last looked and let burning go on; 0 if never."""
        found = self._database.rows("SELECT resumed_ms FROM fuse")
        return int(found[0][0]) if found else 0

    def resume(self, now_ms: int) -> None:
        with self._database.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO fuse VALUES (1, ?)", (now_ms,))

    def __iter__(self) -> Iterator[StoredEvidence]:
        return iter(self.listed())


def _key(cell: Cell) -> bytes:
    assert isinstance(cell, bytes)
    assert len(cell) == HASH_BYTES
    return cell

"""The memory store: what this node holds of the shared memory, one directory.

    memory.db           blocks, proofs of their authors, versions, receipts, documents; the full-text index. The truth
    codes/<n>.codes     vectors of one model in one collection, made from the blocks
    index/<n>.usearch   what finds the nearest of many vectors, made from the codes

Any method may be called from any thread. Writes go one at a time. Whatever a method was given and returned for is durable.
`put` and everything that takes ids takes some milliseconds and more with their number; `prune`, `expire`, `verify` and `maintain`
may take long and hold off writes meanwhile, in steps. A search reads memory, and SQLite only for words, tags and blocks.
"""

from __future__ import annotations

import base64
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from nexus.core.errors import UsageError, VerificationError
from nexus.memory.batch import SignedBatch
from nexus.memory.block import ID_BYTES
from nexus.storage.database import Database
from nexus.storage.memory.columns import Columns
from nexus.storage.memory.damage import forget
from nexus.storage.memory.families import versions_of
from nexus.storage.memory.names import Names
from nexus.storage.memory.records import WITH_BODY, Arrival, Item, Rules, State, StoredBlock
from nexus.storage.memory.rows import CheckedRow, in_parts, read_bodies, read_proof, read_rows, rows_by_id
from nexus.storage.memory.schema import SCHEMA
from nexus.storage.memory.spaces import Spaces
from nexus.storage.memory.writing import Quotas, Writing

_ITEMS_AT_ONCE = 4096
PREFIX_MIN = 10
_CHARS = 58  # of an id after its "b"


class MemoryStore:
    """`notices`: sentences about what was found damaged and made anew; the caller takes them out and logs them."""

    def __init__(self, root: Path, *, bytes_max: int, author_bytes_max: int) -> None:
        """Open or make it, and bring everything that follows from memory.db in step with it: about 1 s per 100,000 blocks.

        Raises LocalError, also where another process has it open.
        """
        self.root = root
        self.notices: list[str] = []
        self._quotas = Quotas(bytes_max, author_bytes_max)
        self._lock = threading.RLock()
        self._database = Database(root / "memory.db", SCHEMA)
        try:
            with self._database.transaction() as connection:
                self._names = Names(connection)
                self._columns = Columns(connection)
                self._spaces = Spaces(root / "codes", connection, self._names, self.notices)
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        with self._lock:
            self._spaces.close()
            self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def put(self, arrivals: Sequence[Arrival], rules: Rules) -> list[bytes]:
        """Keep blocks, all of them or none, durably: the ids that are new. Known ones, in whatever state, are passed over.

        `rules`: for the id of a collection, who may replace whose blocks there (the rule of `nexus.memory.versions.resolve`).
        They are searched as soon as this returns. Raises QuotaError and LocalError (a full disk): then nothing has changed.
        """
        with self._writing() as writing:
            return writing.put(arrivals, rules)

    def get(self, identifier: bytes) -> StoredBlock | None:
        """A block, checked against its id. Raises LocalError for a damaged one, which is forgotten: not known any more, so that peers
        are asked for it again."""
        return self.get_many([identifier]).get(identifier)

    def get_many(self, ids: Sequence[bytes]) -> dict[bytes, StoredBlock]:
        """Those of the blocks that are known. Raises LocalError as `get` does."""
        with self._database.transaction() as connection:
            rows = rows_by_id(connection, ids)
            bodies = read_bodies(connection, {row.row.number: row.row.id for row in rows.values() if row.row.state in WITH_BODY})
            found, damaged = {}, []
            for identifier, row in rows.items():
                body = bodies.get(row.row.number)
                if not row.good or (body is None and row.row.state in WITH_BODY):
                    damaged.append(row)
                    continue
                versions = versions_of(connection, row.row.number)
                stored = _stored(row)
                if body is not None:
                    stored = StoredBlock(*_head(row), body.data, body.block, body.content, versions)
                found[identifier] = stored
        if damaged:
            self._set_aside(damaged)
            raise self._database.damaged(f"the block {damaged[0].row.id.hex()[:16]}")
        return found

    def known(self, ids: Sequence[bytes]) -> set[bytes]:
        """Those that were stored here once, whatever became of them, unless they were found damaged."""
        found: set[bytes] = set()
        with self._database.transaction() as connection:
            for marks, part in in_parts(ids):
                query = f"SELECT id FROM block WHERE id IN ({marks})"  # noqa: S608 - question marks only
                found.update(identifier for (identifier,) in connection.execute(query, part))
        return found

    def items(self, collection: bytes, after: int = 0) -> Iterator[Item]:
        """All blocks of a collection in order of arrival, from behind number `after` on, in whatever state. Which states belong into
        the sets that peers compare is for the caller: LIVE, SUPERSEDED and PRUNED ones; what was removed or has expired nobody
        sends any more, so whoever never had it would ask for it in vain."""
        name = self._names.known(collection)
        if name is None:
            return
        query = "SELECT number, created_ms, id, state FROM block WHERE number > ? AND collection = ? ORDER BY number LIMIT ?"
        while rows := self._database.rows(query, after, name, _ITEMS_AT_ONCE):
            for number, created_ms, identifier, state in rows:
                yield Item(number, created_ms, identifier, State(state))  # type: ignore[arg-type]
            after = int(rows[-1][0])

    def batches(self, ids: Sequence[bytes], bytes_max: int) -> list[SignedBatch]:
        """These blocks with what proves their authors, as they are sent: as many, in the order of `ids`, as fit in `bytes_max`
        bytes. What is not here any more, or is damaged, is left out."""
        chosen: dict[int, list[tuple[CheckedRow, bytes]]] = {}
        room = bytes_max
        result = []
        with self._database.transaction() as connection:
            rows = rows_by_id(connection, ids)
            for identifier in dict.fromkeys(ids):
                row = rows.get(identifier)
                if row is None or not row.good or row.row.state not in WITH_BODY:
                    continue
                body = read_bodies(connection, {row.row.number: identifier}).get(row.row.number)
                if body is None:
                    continue
                room -= len(body.data) + 16
                if row.row.batch not in chosen:
                    room -= 128
                if room < 0:
                    break
                chosen.setdefault(row.row.batch, []).append((row, body.data))
            for number, members in chosen.items():
                batch = _batch(connection, number, members)
                if batch is not None:
                    result.append(batch)
        return result

    def find(self, prefix: str, limit: int = 20) -> list[bytes]:
        """The ids of known blocks whose text begins so (see `id_text`), in order. Raises UsageError for what no id begins with."""
        low, high = _bounds(prefix)
        rows = self._database.rows("SELECT id FROM block WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?", low, high, limit)
        return [identifier for (identifier,) in rows if isinstance(identifier, bytes)]

    @contextmanager
    def _writing(self) -> Iterator[Writing]:
        """One write: all or nothing, on disk and in memory."""
        with self._lock:
            done = False
            try:
                with self._database.transaction() as connection:
                    writing = Writing(connection, self._names, self._spaces, self._columns, self._quotas)
                    yield writing
                done = True
            finally:
                self._names.settle(done)
                self._spaces.settle(done)
            writing.apply()

    def _set_aside(self, rows: Sequence[CheckedRow]) -> None:
        with self._writing() as writing:
            forget(writing, rows)


def _head(row: CheckedRow) -> tuple[bytes, State, bytes, bytes, int, int, int, int, bytes, bool]:
    cells = row.row
    return (
        cells.id,
        State(cells.state),
        row.collection,
        row.author,
        cells.kind,
        cells.created_ms,
        cells.expires_ms,
        cells.received_ms,
        row.sender,
        bool(cells.pinned),
    )


def _stored(row: CheckedRow) -> StoredBlock:
    return StoredBlock(*_head(row))


def _batch(connection: sqlite3.Connection, number: int, members: Sequence[tuple[CheckedRow, bytes]]) -> SignedBatch | None:
    """Some blocks of one batch with their proof, or None where what is stored does not prove them."""
    proof = read_proof(connection, number)
    if proof is None:
        return None
    ids = {row.row.place: row.row.id for row in read_rows(connection, "block.batch = ?", (number,))}
    wanted = sorted((row.row.place, data) for row, data in members)
    try:
        narrow = proof if len(wanted) == len(proof.positions()) else proof.narrow(ids, [place for place, _ in wanted])
    except VerificationError:
        return None
    return SignedBatch(narrow, tuple(data for _, data in wanted))


def _bounds(prefix: str) -> tuple[bytes, bytes]:
    """The least and the greatest id whose text begins with `prefix`."""
    text = prefix.strip()
    allowed = set("abcdefghijklmnopqrstuvwxyz234567")
    if not PREFIX_MIN <= len(text) <= _CHARS + 1 or not text.startswith("bafkrei") or not set(text) <= allowed:
        raise UsageError(
            f"{prefix[:80]!r} is not the beginning of a block's id", f"Give at least {PREFIX_MIN} characters, from bafkrei on"
        )
    low, high = (base64.b32decode(text[1:].upper().ljust(_CHARS, fill) + "======")[-ID_BYTES:] for fill in "A7")
    return low, high

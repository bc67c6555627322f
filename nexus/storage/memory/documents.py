"""Small things beside the blocks: receipts of witnesses for blocks, and documents by kind and key. Each row carries its hash."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence

from nexus.core.errors import CapacityError
from nexus.storage.database import row_hash

RECEIPTS_PER_BLOCK_MAX = 8
RECEIPT_BYTES_MAX = 4096
DOCUMENT_BYTES_MAX = 1 << 20
DOCUMENTS_MAX = 65_536


def put_receipts(connection: sqlite3.Connection, receipts: Sequence[tuple[bytes, bytes, bytes]]) -> int:
    """(block id, witness, bytes) each; how many are new. The first of a witness for a block counts, of so many witnesses."""
    new = 0
    for block, witness, data in receipts:
        if len(data) > RECEIPT_BYTES_MAX:
            raise CapacityError(f"a receipt of {len(data)} bytes", f"At most {RECEIPT_BYTES_MAX} are kept")
        (count,) = connection.execute("SELECT count(*) FROM receipt WHERE block = ?", (block,)).fetchone()
        if count < RECEIPTS_PER_BLOCK_MAX:
            cells = (block, witness, data, row_hash("receipt", block, witness, data))
            new += connection.execute("INSERT OR IGNORE INTO receipt VALUES (?, ?, ?, ?)", cells).rowcount
    return new


def receipts(connection: sqlite3.Connection, block: bytes) -> dict[bytes, bytes]:
    """By witness. A damaged row is as good as none, and makes room for a new one."""
    found: dict[bytes, bytes] = {}
    query = "SELECT witness, data, hash FROM receipt WHERE block = ? ORDER BY witness"
    for witness, data, kept in connection.execute(query, (block,)).fetchall():
        if row_hash("receipt", block, witness, data) == kept:
            found[witness] = data
        else:
            connection.execute("DELETE FROM receipt WHERE block = ? AND witness = ?", (block, witness))
    return found


def put_document(connection: sqlite3.Connection, kind: str, key: bytes, data: bytes) -> None:
    """In place of an earlier one. Raises CapacityError."""
    query = "SELECT count(*) FROM document WHERE NOT (kind = ? AND key = ?)"
    (count,) = connection.execute(query, (kind, key)).fetchone()
    if len(data) > DOCUMENT_BYTES_MAX or count >= DOCUMENTS_MAX:
        raise CapacityError(
            f"a document of {len(data)} bytes beside {count} others",
            f"There is room for {DOCUMENTS_MAX} of {DOCUMENT_BYTES_MAX} bytes",
        )
    cells = (kind, key, data, row_hash("document", kind, key, data))
    connection.execute("INSERT OR REPLACE INTO document VALUES (?, ?, ?, ?)", cells)


def read_documents(connection: sqlite3.Connection, kind: str, key: bytes | None = None) -> Iterator[tuple[bytes, bytes | None]]:
    """(key, bytes), by key; None for the bytes of a damaged row."""
    query = "SELECT key, data, hash FROM document WHERE kind = ? AND (?2 IS NULL OR key = ?2) ORDER BY key"
    for found, data, kept in connection.execute(query, (kind, key)):
        yield found, data if row_hash("document", kind, found, data) == kept else None

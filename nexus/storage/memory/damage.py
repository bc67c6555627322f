"""Blocks whose bytes do not fit their hash any more: forgotten here, so that they count as unknown and peers are asked for them."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from nexus.core.errors import VerificationError
from nexus.storage.memory.rows import CheckedRow, read_proof, read_rows, write_proof
from nexus.storage.memory.writing import Writing


def forget(writing: Writing, rows: Sequence[CheckedRow]) -> None:
    """Take the rows out, and narrow the proofs of their batches to what is left.

    A row that does not fit its own hash cannot be taken out of a proof, as its id may be wrong: the other blocks of its batch stay
    here, and are not sent to others any more.
    """
    for row in rows:
        number = row.row.number
        left = [other for other in read_rows(writing.connection, "block.batch = ?", (row.row.batch,)) if other.row.number != number]
        _narrow(writing.connection, row, left)
        writing.forget(row.row)


def _narrow(connection: sqlite3.Connection, row: CheckedRow, left: Sequence[CheckedRow]) -> None:
    batch = row.row.batch
    if not left:
        connection.execute("DELETE FROM batch WHERE number = ?", (batch,))
        return
    proof = read_proof(connection, batch)
    if proof is None or not row.good or not all(other.good for other in left):
        return
    ids = {other.row.place: other.row.id for other in (row, *left)}
    try:
        write_proof(connection, batch, proof.narrow(ids, [other.row.place for other in left]))
    except VerificationError:
        return

"""Blocks as they are handed out: checked, and in signed batches as they travel."""

from __future__ import annotations

import base64
import sqlite3
from collections.abc import Sequence
from typing import NamedTuple

from nexus.core.errors import UsageError, VerificationError
from nexus.memory.batch import SignedBatch
from nexus.memory.block import ID_BYTES
from nexus.storage.memory.families import versions_of
from nexus.storage.memory.records import WITH_BODY, State, StoredBlock
from nexus.storage.memory.rows import CheckedRow, read_bodies, read_proof, read_rows, rows_by_id

PREFIX_MIN = 10
_CHARS = 58  # of an id after its "b"
# What a block and a batch take in a message beside their bytes.
_BLOCK_BYTES, _BATCH_BYTES = 16, 128


class Blocks(NamedTuple):
    found: dict[bytes, StoredBlock]
    damaged: list[CheckedRow]


def read_blocks(connection: sqlite3.Connection, ids: Sequence[bytes]) -> Blocks:
    """Those that are known."""
    rows = rows_by_id(connection, ids)
    bodies = read_bodies(connection, {row.row.number: row.row.id for row in rows.values() if row.row.state in WITH_BODY})
    blocks = Blocks({}, [])
    for identifier, row in rows.items():
        body = bodies.get(row.row.number)
        if not row.good or (body is None and row.row.state in WITH_BODY):
            blocks.damaged.append(row)
        elif body is None:
            blocks.found[identifier] = StoredBlock(*_head(row))
        else:
            versions = versions_of(connection, row.row.number)
            blocks.found[identifier] = StoredBlock(*_head(row), body.data, body.block, body.content, versions)
    return blocks


def read_batches(connection: sqlite3.Connection, ids: Sequence[bytes], bytes_max: int) -> list[SignedBatch]:
    """As `MemoryStore.batches`."""
    chosen: dict[int, list[tuple[CheckedRow, bytes]]] = {}
    room = bytes_max
    rows = rows_by_id(connection, ids)
    for identifier in dict.fromkeys(ids):
        row = rows.get(identifier)
        if row is None or not row.good or row.row.state not in WITH_BODY:
            continue
        body = read_bodies(connection, {row.row.number: identifier}).get(row.row.number)
        if body is None:
            continue
        room -= len(body.data) + _BLOCK_BYTES + (_BATCH_BYTES if row.row.batch not in chosen else 0)
        if room < 0:
            break
        chosen.setdefault(row.row.batch, []).append((row, body.data))
    batches = [_batch(connection, number, members) for number, members in chosen.items()]
    return [batch for batch in batches if batch is not None]


def prefix_bounds(prefix: str) -> tuple[bytes, bytes]:
    """The least and the greatest id whose text begins with `prefix`."""
    text = prefix.strip()
    allowed = set("abcdefghijklmnopqrstuvwxyz234567")
    if not PREFIX_MIN <= len(text) <= _CHARS + 1 or not text.startswith("bafkrei") or not set(text) <= allowed:
        raise UsageError(
            f"{prefix[:80]!r} is not the beginning of a block's id", f"Give at least {PREFIX_MIN} characters, from bafkrei on"
        )
    low, high = (base64.b32decode(text[1:].upper().ljust(_CHARS, fill) + "======")[-ID_BYTES:] for fill in "A7")
    return low, high


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

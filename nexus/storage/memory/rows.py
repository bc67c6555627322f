"""Reading the rows of blocks, each checked against its hash, and changing their states."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import NamedTuple, TypeVar

from nexus.core.errors import MalformedError
from nexus.core.hashing import tagged_hash
from nexus.memory.batch import BatchProof
from nexus.memory.block import CONTENT, SEALED, Block, decode_block
from nexus.storage.database import row_hash
from nexus.storage.memory.records import Content
from nexus.storage.memory.schema import ROW_SELECT, ROW_WIDTH, Row, hash_of_row

_AT_ONCE = 500
_T = TypeVar("_T", bytes, int)


class CheckedRow(NamedTuple):
    """`good`: whether the row fits its hash. `collection`, `author`, `lang`, `sender`: the values behind its numbers."""

    row: Row
    collection: bytes
    author: bytes
    lang: bytes
    sender: bytes
    good: bool


class Body(NamedTuple):
    data: bytes
    block: Block
    content: Content | None


def searchable(block: Block, content: Content | None) -> Content | None:
    """What of a block is found by search: nothing of tombstones, maps, and sealed blocks that could not be read."""
    if block.kind == CONTENT:
        return Content.of(block)
    return content if block.kind == SEALED else None


def in_parts(values: Sequence[_T], size: int = _AT_ONCE) -> Iterator[tuple[str, tuple[_T, ...]]]:
    """Question marks and values for an IN (...), so many at a time."""
    for at in range(0, len(values), size):
        part = tuple(values[at : at + size])
        yield ", ".join("?" * len(part)), part


def read_rows(connection: sqlite3.Connection, where: str, values: Sequence[bytes | int] = ()) -> list[CheckedRow]:
    """`where`: a condition of this package's own, with question marks."""
    return [_checked(found) for found in connection.execute(f"{ROW_SELECT} WHERE {where}", values)]


def rows_by_id(connection: sqlite3.Connection, ids: Sequence[bytes]) -> dict[bytes, CheckedRow]:
    """Of those ids that are known."""
    found: dict[bytes, CheckedRow] = {}
    for marks, part in in_parts(ids):
        found.update((row.row.id, row) for row in read_rows(connection, f"block.id IN ({marks})", part))
    return found


def rows_by_number(connection: sqlite3.Connection, numbers: Sequence[int]) -> dict[int, CheckedRow]:
    found: dict[int, CheckedRow] = {}
    for marks, part in in_parts(numbers):
        found.update((row.row.number, row) for row in read_rows(connection, f"block.number IN ({marks})", part))
    return found


def _checked(found: tuple[object, ...]) -> CheckedRow:
    row = Row(*found[:ROW_WIDTH])  # type: ignore[arg-type]
    *values, kept = found[ROW_WIDTH:]
    names = [value if isinstance(value, bytes) else b"" for value in values]
    good = None not in values and hash_of_row(row, *names) == kept
    return CheckedRow(row, names[0], names[1], names[2], names[3], good)


def update_rows(connection: sqlite3.Connection, rows: Iterable[tuple[CheckedRow, Row]]) -> None:
    """Write what changed of `state`, `pinned` and `size`: pairs of the row as it was and as it shall be."""
    connection.executemany(
        "UPDATE block SET state = ?, pinned = ?, size = ?, hash = ? WHERE number = ?",
        [
            (new.state, new.pinned, new.size, hash_of_row(new, old.collection, old.author, old.lang, old.sender), new.number)
            for old, new in rows
        ],
    )


def content_hash(number: int, content: bytes) -> bytes:
    return tagged_hash("row/body", number.to_bytes(8, "big"), content)


def read_bodies(connection: sqlite3.Connection, ids: dict[int, bytes]) -> dict[int, Body | None]:
    """Of blocks by number, whose ids are given: the body, or None where its bytes do not fit. Left out where there is none."""
    bodies: dict[int, Body | None] = {}
    for marks, part in in_parts(list(ids)):
        query = f"SELECT number, data, content, hash FROM body WHERE number IN ({marks})"  # noqa: S608 - question marks only
        for number, data, content, kept in connection.execute(query, part):
            bodies[number] = _body(ids[number], number, data, content, kept)
    return bodies


def _body(identifier: bytes, number: int, data: bytes, content: bytes, kept: bytes) -> Body | None:
    if sha256(data).digest() != identifier or content_hash(number, content) != kept:
        return None
    try:
        block = decode_block(data)
        return Body(data, block, searchable(block, Content.from_bytes(content) if content else None))
    except MalformedError:
        return None


def batch_hash(number: int, proof: BatchProof) -> bytes:
    return row_hash("batch", number, proof.size, proof.indices, proof.hashes, proof.signature)


def read_proof(connection: sqlite3.Connection, number: int) -> BatchProof | None:
    """None where the row is damaged or gone."""
    found = connection.execute("SELECT size, indices, hashes, signature, hash FROM batch WHERE number = ?", (number,)).fetchone()
    if found is None:
        return None
    proof = BatchProof(*found[:-1])
    return proof if batch_hash(number, proof) == found[-1] else None


def write_proof(connection: sqlite3.Connection, number: int, proof: BatchProof) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO batch VALUES (?, ?, ?, ?, ?, ?)",
        (number, proof.size, proof.indices, proof.hashes, proof.signature, batch_hash(number, proof)),
    )

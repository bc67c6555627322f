"""The tables of memory.db, and the hash that every row of a block carries.

`erasing` lists what still holds traces of erased blocks: spaces whose index does, 0 for the full-text index.
What is true: `name`, `batch`, `block`, `body`, `edge`, `vector`, `receipt`, `document`. The others follow from these.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from nexus.core.hashing import tagged_hash

# A block's row, its places in the other tables, and their indexes, in bytes: what a block costs beside its own.
ROW_BYTES = 512

# Changes with the form of the tables below.
SCHEMA_VERSION = 1

SCHEMA = """
PRAGMA secure_delete=ON;
CREATE TABLE IF NOT EXISTS name (number INTEGER PRIMARY KEY, value BLOB NOT NULL UNIQUE) STRICT;
CREATE TABLE IF NOT EXISTS batch (
    number INTEGER PRIMARY KEY, size INTEGER NOT NULL, indices BLOB NOT NULL, hashes BLOB NOT NULL, signature BLOB NOT NULL,
    hash BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS block (
    number INTEGER PRIMARY KEY, id BLOB NOT NULL UNIQUE, batch INTEGER NOT NULL, place INTEGER NOT NULL,
    collection INTEGER NOT NULL, author INTEGER NOT NULL, kind INTEGER NOT NULL, created_ms INTEGER NOT NULL,
    expires_ms INTEGER NOT NULL, lang INTEGER NOT NULL, cell INTEGER NOT NULL, received_ms INTEGER NOT NULL,
    sender INTEGER NOT NULL, size INTEGER NOT NULL, state INTEGER NOT NULL, pinned INTEGER NOT NULL, hash BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS block_batch ON block (batch);
CREATE TABLE IF NOT EXISTS body (number INTEGER PRIMARY KEY, data BLOB NOT NULL, content BLOB NOT NULL, hash BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS edge (child INTEGER NOT NULL, parent BLOB NOT NULL, PRIMARY KEY (child, parent)) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS edge_parent ON edge (parent);
CREATE TABLE IF NOT EXISTS version (block INTEGER PRIMARY KEY, family INTEGER NOT NULL, rank INTEGER NOT NULL) STRICT;
CREATE INDEX IF NOT EXISTS version_family ON version (family);
CREATE TABLE IF NOT EXISTS tag (name TEXT NOT NULL, block INTEGER NOT NULL, PRIMARY KEY (name, block)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS space (
    number INTEGER PRIMARY KEY, collection INTEGER NOT NULL, fingerprint INTEGER NOT NULL, dimension INTEGER NOT NULL,
    model TEXT NOT NULL, hash BLOB NOT NULL, UNIQUE (collection, fingerprint, dimension)
) STRICT;
CREATE TABLE IF NOT EXISTS code (
    space INTEGER NOT NULL, row INTEGER NOT NULL, block INTEGER NOT NULL, PRIMARY KEY (space, row)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS code_block ON code (block);
CREATE TABLE IF NOT EXISTS page (
    space INTEGER NOT NULL, page INTEGER NOT NULL, hash BLOB NOT NULL, PRIMARY KEY (space, page)
) STRICT;
CREATE TABLE IF NOT EXISTS vector (
    space INTEGER NOT NULL, block INTEGER NOT NULL, scale INTEGER NOT NULL, codes BLOB NOT NULL, hash BLOB NOT NULL,
    PRIMARY KEY (space, block)
) STRICT;
CREATE TABLE IF NOT EXISTS indexed (
    space INTEGER PRIMARY KEY, rows INTEGER NOT NULL, scale INTEGER NOT NULL, checksum BLOB NOT NULL, hash BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS usage (
    collection INTEGER NOT NULL, author INTEGER NOT NULL, bytes INTEGER NOT NULL, PRIMARY KEY (collection, author)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS receipt (
    block BLOB NOT NULL, witness BLOB NOT NULL, data BLOB NOT NULL, hash BLOB NOT NULL, PRIMARY KEY (block, witness)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS document (
    kind TEXT NOT NULL, key BLOB NOT NULL, data BLOB NOT NULL, hash BLOB NOT NULL, PRIMARY KEY (kind, key)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS erasing (space INTEGER PRIMARY KEY) STRICT;
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(title, body, tags, content='', tokenize='unicode61 remove_diacritics 2');
"""

_CELLS = struct.Struct(">QHQQQQQBBIQ")


class Row(NamedTuple):
    """A row of `block` without its hash. Collection, author, language and sender are numbers of `name`; `cell` is of its sky."""

    number: int
    id: bytes
    batch: int
    place: int
    collection: int
    author: int
    kind: int
    created_ms: int
    expires_ms: int
    lang: int
    cell: int
    received_ms: int
    sender: int
    size: int
    state: int
    pinned: int


ROW_COLUMNS = ", ".join(Row._fields)
# Reads as a Row, then the values behind its four names, then the row's hash.
ROW_SELECT = (
    "SELECT "  # noqa: S608 - own names
    + ", ".join(f"block.{name}" for name in Row._fields)
    + ", c.value, a.value, l.value, s.value, block.hash FROM block"
    " LEFT JOIN name c ON c.number = block.collection LEFT JOIN name a ON a.number = block.author"
    " LEFT JOIN name l ON l.number = block.lang LEFT JOIN name s ON s.number = block.sender"
)
ROW_WIDTH = len(Row._fields)


def hash_of_row(row: Row, collection: bytes, author: bytes, lang: bytes, sender: bytes) -> bytes:
    """With the values of the names: a name that changed is noticed in every row that uses it."""
    cells = _CELLS.pack(
        row.batch,
        row.place,
        row.created_ms,
        row.expires_ms,
        row.cell,
        row.received_ms,
        row.number,
        row.state,
        row.pinned,
        row.size,
        row.kind,
    )
    return tagged_hash("row/block", row.id, cells, collection, author, lang, sender)

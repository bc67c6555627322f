"""Going through all that is stored: whether it is what it was, and everything that follows from the blocks agrees with them."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nexus.memory.block import CONTENT, SEALED
from nexus.storage.memory import words
from nexus.storage.memory.codes import PAGE_ROWS
from nexus.storage.memory.columns import Columns
from nexus.storage.memory.records import WITH_BODY
from nexus.storage.memory.rows import CheckedRow, in_parts, read_bodies, read_rows
from nexus.storage.memory.spaces import Space, keep_page, rewrite


class Checked(NamedTuple):
    """`last`: the number to go on behind. `rows`: how many these were."""

    last: int
    rows: int
    damaged: list[CheckedRow]


def check_after(connection: sqlite3.Connection, after: int, count: int) -> Checked:
    """Check the next rows and bodies in order of their numbers."""
    return _check(connection, read_rows(connection, "block.number > ? ORDER BY block.number LIMIT ?", (after, count)), after)


def check_ids(connection: sqlite3.Connection, ids: Sequence[bytes]) -> Checked:
    rows = [row for marks, part in in_parts(list(ids)) for row in read_rows(connection, f"block.id IN ({marks})", part)]
    return _check(connection, rows, 0)


def _check(connection: sqlite3.Connection, rows: Sequence[CheckedRow], after: int) -> Checked:
    ids = {row.row.number: row.row.id for row in rows if row.row.state in WITH_BODY}
    bodies = read_bodies(connection, ids)
    damaged = [row for row in rows if not row.good or (row.row.number in ids and bodies.get(row.row.number) is None)]
    return Checked(rows[-1].row.number if rows else after, len(rows), damaged)


def repair_codes(connection: sqlite3.Connection, space: Space, page: int) -> bool:
    """Compare one page of codes with the blocks; whether it had to be written anew."""
    start = page * PAGE_ROWS
    numbers = space.view.numbers[start : start + PAGE_ROWS]
    if not rewrite(connection, space, start, numbers):
        return False
    if len(numbers) == PAGE_ROWS:
        keep_page(connection, space, page, space.view.numbers)
    return True


def repair_words(connection: sqlite3.Connection, columns: Columns) -> bool:
    """Compare the full-text index with the blocks; whether it had to be made anew. That takes some seconds per 100,000 blocks."""
    state = columns.array("state")[: columns.count]
    with_body = np.flatnonzero(np.isin(state, WITH_BODY)).astype(np.int64)
    expected = _with_words(connection, columns, with_body)
    if words.is_sound(connection) and words.numbers(connection) == expected:
        return False
    words.clear(connection)
    numbers = sorted(expected)
    for at in range(0, len(numbers), 500):
        bodies = read_bodies(connection, {number: columns.id_of(number) for number in numbers[at : at + 500]})
        contents = [(number, body.content) for number, body in bodies.items() if body is not None and body.content is not None]
        words.add(connection, contents)
    return True


def _with_words(connection: sqlite3.Connection, columns: Columns, numbers: NDArray[np.int64]) -> set[int]:
    kinds = columns.array("kind")[numbers]
    read = connection.execute(
        "SELECT body.number FROM body JOIN block ON block.number = body.number WHERE block.kind = ? AND body.content <> x''",
        (SEALED,),
    )
    known = set(numbers[kinds == SEALED].tolist())
    return set(numbers[kinds == CONTENT].tolist()) | {number for (number,) in read if number in known}

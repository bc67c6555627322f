"""Which of the stored versions counts: the family that a change touches is read and decided anew (`nexus.memory.versions`)."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import NamedTuple

from nexus.memory.block import TOMBSTONE
from nexus.memory.versions import Rule, Version, families, resolve, same_author
from nexus.storage.memory.records import Rules, State, Versions
from nexus.storage.memory.rows import CheckedRow, read_rows, rows_by_id


class Change(NamedTuple):
    row: CheckedRow
    state: State


class _Known(NamedTuple):
    row: CheckedRow
    version: Version


def decide(connection: sqlite3.Connection, numbers: Iterable[int], rules: Rules) -> list[Change]:
    """What the arrival of these blocks changes. `version` is written; the changes of state are for the caller to carry out."""
    changes: dict[int, Change] = {}
    seen: set[bytes] = set()
    for number in numbers:
        for start in read_rows(connection, "block.number = ?", (number,)):
            if start.row.id not in seen:
                family = _reach(connection, start, rules(start.collection))
                seen.update(family)
                for change in _decide(connection, family, rules(start.collection)):
                    changes[change.row.row.number] = change
    return list(changes.values())


def versions_of(connection: sqlite3.Connection, number: int) -> Versions | None:
    """What is known of the family of a block, as it was decided last."""
    query = (
        "SELECT block.id, version.rank FROM version JOIN block ON block.number = version.block"
        " WHERE version.family = (SELECT family FROM version WHERE block = ?) ORDER BY version.rank, block.id"
    )
    found = connection.execute(query, (number,)).fetchall()
    if not found:
        return None
    heads = tuple(identifier for identifier, rank in found if rank >= 0)
    return Versions(heads[0] if heads else None, heads)


def family_of(connection: sqlite3.Connection, start: CheckedRow, rule: Rule) -> list[Version]:
    """The block and all that it replaces or that replaces it, as far as they are known here."""
    return [entry.version for entry in _reach(connection, start, rule).values()]


def _reach(connection: sqlite3.Connection, start: CheckedRow, rule: Rule) -> dict[bytes, _Known]:
    """The block and all that links which count lead to, up and down."""
    found = {start.row.id: _with_parents(connection, start)}
    pending = [start.row.id]
    while pending:
        here = found[pending.pop()]
        for row in _neighbours(connection, here):
            if row.row.id not in found and row.row.collection == start.row.collection:
                other = _with_parents(connection, row)
                if _counts(here.version, other.version, rule) or _counts(other.version, here.version, rule):
                    found[row.row.id] = other
                    pending.append(row.row.id)
    return found


def _neighbours(connection: sqlite3.Connection, here: _Known) -> list[CheckedRow]:
    above = read_rows(connection, "block.number IN (SELECT child FROM edge WHERE parent = ?)", (here.version.id,))
    return [*rows_by_id(connection, here.version.parents).values(), *above]


def _counts(child: Version, parent: Version, rule: Rule) -> bool:
    return parent.id in child.parents and (same_author if child.is_tombstone else rule)(child, parent)


def _with_parents(connection: sqlite3.Connection, row: CheckedRow) -> _Known:
    found = connection.execute("SELECT parent FROM edge WHERE child = ? ORDER BY parent", (row.row.number,))
    parents = tuple(parent for (parent,) in found)
    return _Known(row, Version(row.row.id, parents, row.author, row.row.created_ms, row.row.kind == TOMBSTONE))


def _decide(connection: sqlite3.Connection, known: dict[bytes, _Known], rule: Rule) -> list[Change]:
    changes = []
    numbers = [(known[identifier].row.row.number,) for identifier in sorted(known)]
    connection.executemany("DELETE FROM version WHERE block = ?", numbers)
    for family in families([entry.version for entry in known.values()], rule):
        if len(family) == 1:
            continue
        decision = resolve(family, rule)
        ranks = {identifier: rank for rank, identifier in enumerate(decision.heads)}
        least = min(known[version.id].row.row.number for version in family)
        connection.executemany(
            "INSERT INTO version VALUES (?, ?, ?)",
            [(known[version.id].row.row.number, least, ranks.get(version.id, -1)) for version in family],
        )
        # Of versions in conflict one is shown, the same on every node; the others are kept, and listed as heads.
        behind = decision.superseded.union(decision.heads[1:])
        for version in family:
            row = known[version.id].row
            state = _state(version.id, State(row.row.state), decision.removed, behind)
            if state is not row.row.state and state != row.row.state:
                changes.append(Change(row, state))
    return changes


def _state(identifier: bytes, now: State, removed: frozenset[bytes], behind: frozenset[bytes]) -> State:
    # What was erased stays erased; a block that was dropped for room or time can still be taken away.
    if identifier in removed or now is State.REMOVED:
        return State.REMOVED
    if now in (State.PRUNED, State.EXPIRED):
        return now
    return State.SUPERSEDED if identifier in behind else State.LIVE

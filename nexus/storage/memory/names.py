"""Keys and languages by small numbers, as rows refer to them."""

from __future__ import annotations

import sqlite3


class Names:
    """The table `name`, all of it in memory: collections, authors, senders, models and languages are few beside blocks."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._number_of: dict[bytes, int] = {}
        self._value_of: dict[int, bytes] = {}
        self._fresh: list[bytes] = []
        for number, value in connection.execute("SELECT number, value FROM name"):
            self._number_of[value], self._value_of[number] = number, value

    def known(self, value: bytes) -> int | None:
        return self._number_of.get(value)

    def value(self, number: int) -> bytes:
        """Empty for a number that nothing has: a damaged row."""
        return self._value_of.get(number, b"")

    def number(self, connection: sqlite3.Connection, value: bytes) -> int:
        """The number of `value`, a new one if need be: until `settle` it counts for the transaction alone."""
        known = self._number_of.get(value)
        if known is not None:
            return known
        number = int(connection.execute("INSERT INTO name (value) VALUES (?) RETURNING number", (value,)).fetchone()[0])
        self._number_of[value], self._value_of[number] = number, value
        self._fresh.append(value)
        return number

    def settle(self, committed: bool) -> None:
        """At the end of a transaction: forget what was rolled back with it."""
        if not committed:
            for value in self._fresh:
                self._value_of.pop(self._number_of.pop(value))
        self._fresh.clear()

"""The texts of blocks in SQLite's full-text index. It holds no text, only what is needed to find and to rank it.

What a user asks for never reaches the index's query language: words are taken out of it, and each is quoted.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable

from nexus.storage.memory.records import Content

WORDS_MAX = 32
WORD_CHARS_MAX = 64
# A word in so many texts says little and takes long: it counts only where there is no other.
COMMON_MIN = 2000
_COMMON_SHARE = 20
_WORD = re.compile(r"\w+")
_WEIGHTS = "4.0, 1.0, 2.0"  # of a title, a text, tags


def add(connection: sqlite3.Connection, contents: Iterable[tuple[int, Content]]) -> None:
    connection.executemany(
        "INSERT INTO words (rowid, title, body, tags) VALUES (?, ?, ?, ?)",
        [_cells(number, content) for number, content in contents],
    )


def remove(connection: sqlite3.Connection, contents: Iterable[tuple[int, Content]]) -> None:
    """The same contents that were added. What is left of them in the file goes with `erase`."""
    connection.executemany(
        "INSERT INTO words (words, rowid, title, body, tags) VALUES ('delete', ?, ?, ?, ?)",
        [_cells(number, content) for number, content in contents],
    )


def erase(connection: sqlite3.Connection) -> None:
    """Write the index anew without what was removed from it. Takes about a second per 100,000 texts."""
    connection.execute("INSERT INTO words (words) VALUES ('optimize')")


def clear(connection: sqlite3.Connection) -> None:
    connection.execute("INSERT INTO words (words) VALUES ('delete-all')")


def is_sound(connection: sqlite3.Connection) -> bool:
    """Whether the index agrees with itself."""
    try:
        connection.execute("INSERT INTO words (words) VALUES ('integrity-check')")
    except sqlite3.DatabaseError:
        return False
    return True


def numbers(connection: sqlite3.Connection) -> set[int]:
    """The blocks that are in it."""
    return {number for (number,) in connection.execute("SELECT id FROM words_docsize")}


def words_of(text: str) -> list[str]:
    """What is looked for: each word once, in order, at most WORDS_MAX."""
    clean = text.encode("utf-8", "ignore").decode("utf-8")
    return list(dict.fromkeys(word[:WORD_CHARS_MAX].lower() for word in _WORD.findall(clean)))[:WORDS_MAX]


def match(connection: sqlite3.Connection, text: str) -> list[tuple[int, float]]:
    """All blocks with any of the words that tell something, and how well each fits: less is better (bm25). In no order."""
    words = words_of(text)
    if not words:
        return []
    (total,) = connection.execute("SELECT count(*) FROM words_docsize").fetchone()
    most = max(COMMON_MIN, total // _COMMON_SHARE)
    counted = [(_count(connection, word, most + 1), word) for word in words]
    rare = [word for count, word in counted if 0 < count <= most]
    # Where all are common, the two that are least so, or the first of those that are beyond counting.
    chosen = rare or [word for count, word in sorted(counted, key=lambda pair: pair[0]) if count][:2]
    if not chosen:
        return []
    expression = " OR ".join(f'"{word}"' for word in chosen)
    query = f"SELECT rowid, bm25(words, {_WEIGHTS}) FROM words WHERE words MATCH ?"  # noqa: S608 - constants of this module
    return connection.execute(query, (expression,)).fetchall()


def _count(connection: sqlite3.Connection, word: str, most: int) -> int:
    query = "SELECT count(*) FROM (SELECT 1 FROM words WHERE words MATCH ? LIMIT ?)"
    return int(connection.execute(query, (f'"{word}"', most)).fetchone()[0])


def _cells(number: int, content: Content) -> tuple[int, str, str, str]:
    return number, content.title, content.text, " ".join(content.tags)

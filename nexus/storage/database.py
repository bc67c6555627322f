"""SQLite as Nexus uses it: one connection per file, held alone, and what is committed survives a power failure.

`synchronous=EXTRA` before WAL: with WAL and NORMAL a power failure loses commits that were acknowledged. Rows carry a hash of their
own, which is checked when they are read: SQLite's own check finds few flipped bits.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from nexus.core.errors import LocalError
from nexus.core.hashing import tagged_hash

# What a cell of a row may be: SQLite's own types that are used here.
Cell = int | bytes | str

BUSY_TIMEOUT_S = 2.0
PRAGMAS = ("locking_mode=EXCLUSIVE", "synchronous=EXTRA", "journal_mode=WAL", "trusted_schema=OFF")
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


def connect(path: Path) -> sqlite3.Connection:
    """The one place where a file is opened: simulations put a disk of their own here, see `nexus.simulation.disk`."""
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


def row_hash(table: str, *cells: Cell) -> bytes:
    """What a row says of itself, in its last column."""
    return tagged_hash(f"row/{table}", *(str(cell).encode() if not isinstance(cell, bytes) else cell for cell in cells))


class Database:
    """A file of tables. Calls may come from any thread, one at a time: the lock is held for a whole transaction."""

    def __init__(self, path: Path, schema: str, version: int = 0) -> None:
        """Open or make it. `schema`: CREATE TABLE IF NOT EXISTS statements. `version`: of the form of the tables; a file of another
        one is refused as it is. Raises LocalError."""
        self.path = path
        self._lock = threading.Lock()
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)
            self._connection = connect(path)
            for pragma in PRAGMAS:
                self._connection.execute(f"PRAGMA {pragma}")
            self._check_version(version)
            self._connection.executescript(schema)
            self._connection.execute(f"PRAGMA user_version={version}")

    def _check_version(self, version: int) -> None:
        (found,) = self._connection.execute("PRAGMA user_version").fetchone()
        (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and found != version:
            self._connection.close()
            raise LocalError(
                f"{self.path} has tables of form {found}, this version of Nexus reads form {version}",
                "Use the version that wrote it, or move the file away to begin anew",
            )

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing, durable when the block is left. Raises LocalError, also where the disk is full."""
        with self._lock, self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # A failed COMMIT may have ended the transaction already.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, *cells: Cell) -> list[tuple[Cell, ...]]:
        """Raises LocalError."""
        with self._lock, self._errors():
            return self._connection.execute(query, cells).fetchall()

    def damaged(self, what: str) -> LocalError:
        """The error for a row whose hash does not fit."""
        return LocalError(
            f"{what} in {self.path} is damaged: its hash does not fit",
            "The disk or the memory of this machine is failing: check both, and restore the file from a backup",
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LocalError(f"{self.path} cannot be used: {error.strerror}", "Check that your user may write there") from error
        except sqlite3.Error as error:
            # The low byte is the kind, the rest says more.
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _FULL:
                raise LocalError(
                    f"{self.path} cannot be written: the disk is full or failing ({error})",
                    "Free some space there and try again; what was stored is kept",
                ) from error
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                raise LocalError(f"{self.path} is in use by another process", "Stop the other one first") from error
            raise LocalError(
                f"{self.path} cannot be used: {error}", "It may be damaged: restore it from a backup, or move it away"
            ) from error

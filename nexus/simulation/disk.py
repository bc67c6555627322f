"""Disks that lose what was not synced, and that fill up.

SQLite runs as ever, on databases in memory. What of one survives a power failure is what was committed while `PRAGMA synchronous`
was FULL or EXTRA (https://sqlite.org/pragma.html#pragma_synchronous; with a write-ahead log NORMAL does not sync at a commit); what
was committed under less survives once the system has written it back, as Linux does after 30 s (`dirty_expire_centisecs`). Small
files lie in a real directory, on RAM where there is some: what of a file was not passed to `os.fsync` is lost.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from nexus.storage import database

WRITEBACK_S = 30.0
RAM = Path("/dev/shm")  # noqa: S108 - a directory is made in it
_LEVELS = {"OFF": 0, "NORMAL": 1, "FULL": 2, "EXTRA": 3}
_SYNCED = 2


class Disk:
    """What lies under one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.full = False
        self.on = True
        self._connections: dict[Path, SimulatedConnection] = {}
        self._images: dict[Path, bytes] = {}
        self._synced: dict[int, tuple[int, int]] = {}  # by inode: what of a file is safe
        self._started: dict[int, tuple[int, int]] = {}

    def start(self) -> None:
        """The machine is on; everything that is there now is safe."""
        self.on = True
        self._started = {inode: state for _, inode, state in self._files()}
        self._synced = {}

    def connect(self, path: Path) -> SimulatedConnection:
        connection = sqlite3.connect(
            ":memory:", isolation_level=None, check_same_thread=False, factory=SimulatedConnection, cached_statements=64
        )
        image = self._images.get(path)
        if image:
            connection.deserialize(image)
        connection.attach(self, image or b"")
        self._connections[path] = connection
        return connection

    def sync(self, handle: int) -> None:
        found = os.fstat(handle)
        self._synced[found.st_ino] = (found.st_mtime_ns, found.st_size)

    def power_off(self) -> None:
        """What was not synced is gone. Whatever the dying process still writes goes nowhere."""
        for path, connection in self._connections.items():
            self._images[path] = connection.durable()
        self._connections.clear()
        for path, inode, state in self._files():
            if state not in (self._started.get(inode), self._synced.get(inode)):
                path.write_bytes(b"")
        self.on = False

    def shut_down(self) -> None:
        """In order: everything is written."""
        for path, connection in self._connections.items():
            self._images[path] = connection.image()
        self._connections.clear()
        self.on = False

    def database(self, path: Path) -> sqlite3.Connection:
        """A copy of what a file has now, for a checker to read: as the process sees it, or as it is on a disk that is off."""
        live = self._connections.get(path)
        copy = sqlite3.connect(":memory:", check_same_thread=False)
        image = live.image() if live is not None else self._images.get(path, b"")
        if image:
            copy.deserialize(image)
        return copy

    def _files(self) -> Iterator[tuple[Path, int, tuple[int, int]]]:
        """Small files that processes write whole; fragments of models are not among them."""
        for path in sorted(self.root.iterdir()) if self.root.exists() else ():
            if path.is_file() and path.suffix != ".db":
                found = path.stat()
                yield path, found.st_ino, (found.st_mtime_ns, found.st_size)


class SimulatedConnection(sqlite3.Connection):
    """A database whose durable image is known. `attach` comes first."""

    _disk: Disk
    _safe: bytes
    _before: bytes
    _level = _SYNCED
    _dirty_s: float | None = None  # since when something is committed and not synced
    _closed: bytes | None = None
    _changes = 0

    def attach(self, disk: Disk, image: bytes) -> None:
        self._disk, self._safe, self._before = disk, image, image

    def image(self) -> bytes:
        """What is committed."""
        if self._closed is not None:
            return self._closed
        if self.in_transaction:
            super().execute("ROLLBACK")
        return self.serialize()

    def durable(self) -> bytes:
        """What survives a power failure now."""
        return self.image() if self._is_clean() else self._safe

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        word = sql[:6].upper()
        if word == "PRAGMA" and "SYNCHRONOUS=" in sql.upper():
            self._level = _LEVELS[sql.upper().rpartition("=")[2].strip()]
        if word == "PRAGMA" and "JOURNAL_MODE=" in sql.upper():
            sql = "PRAGMA journal_mode"  # a log on a file is what memory has none of; what it is for is modelled here
        if word == "BEGIN ":
            self._changes = self.total_changes
            if self._level < _SYNCED and self._is_clean():
                self._before = self.serialize()
        wrote = word == "COMMIT" and self.total_changes != self._changes
        if wrote and self._disk.full:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_FULL, "SQLITE_FULL"
            raise error
        done = super().execute(sql, parameters)
        if wrote and self._level >= _SYNCED:
            self._dirty_s = None
        elif wrote and self._is_clean():
            self._safe, self._dirty_s = self._before, trio.current_time()
        return done

    def _is_clean(self) -> bool:
        """Whether all that is committed is safe."""
        return self._dirty_s is None or trio.current_time() - self._dirty_s >= WRITEBACK_S

    def close(self) -> None:
        if self._closed is None:
            self._closed = self.image()
            super().close()


@contextmanager
def simulated_disks(disks: dict[Path, Disk]) -> Iterator[None]:
    """Every database and every small file under these directories lies on its simulated disk. `disks`: by directory, relative to
    the one that is current."""
    here = Path.cwd()
    real_connect, real_sync = database.connect, os.fsync

    def connect(path: Path) -> sqlite3.Connection:
        for parent in path.parents:
            if parent in disks:
                return disks[parent].connect(path)
        return real_connect(path)

    def sync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.is_relative_to(here):
            for parent in path.relative_to(here).parents:
                if parent in disks and disks[parent].on:
                    disks[parent].sync(handle)

    database.connect, os.fsync = connect, sync  # type: ignore[assignment]
    try:
        yield
    finally:
        database.connect, os.fsync = real_connect, real_sync

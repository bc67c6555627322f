"""What the owner of this node undertook to serve, and the versions of names that count here: fragments.db in the data directory.

Both are promises to others, so both are durable before anybody hears of them: a publication that was signed and forgotten would be
signed again with another content under the same number.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nexus.core.errors import CapacityError, LocalError, MalformedError
from nexus.storage.database import Database, row_hash
from nexus.swarm.fragments import PROMISES_MAX, VERSIONS_KEPT, Promise, Publication, SignedPublication, check_promise

# Publishers and names whose versions are remembered: own ones, and those that a promise follows.
HISTORIES_MAX = 256

_SCHEMA = """
CREATE TABLE IF NOT EXISTS promise (name TEXT PRIMARY KEY, content BLOB NOT NULL, hash BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS version (
    publisher BLOB NOT NULL, name TEXT NOT NULL, number INTEGER NOT NULL, content BLOB NOT NULL, hash BLOB NOT NULL,
    PRIMARY KEY (publisher, name, number)
) STRICT;
"""


class FragmentStore:
    """One file, opened once. Every method raises LocalError where the disk is in the way or a row is damaged."""

    def __init__(self, path: Path) -> None:
        self._database = Database(path, _SCHEMA)

    def close(self) -> None:
        self._database.close()

    def promises(self) -> list[Promise]:
        """Sorted by name."""
        found = []
        for name, content, kept in self._database.rows("SELECT name, content, hash FROM promise ORDER BY name"):
            if row_hash("promise", name, content) != kept or not isinstance(content, bytes):
                raise self._database.damaged(f"the promise to serve {name!r}")
            try:
                found.append(check_promise(Promise.from_bytes(content)))
            except MalformedError as error:
                raise self._database.damaged(f"the promise to serve {name!r}") from error
        return found

    def put(self, promise: Promise) -> None:
        """Keep a promise, in place of the one for the same name. Raises CapacityError where there are PROMISES_MAX others."""
        content = promise.to_bytes()
        with self._database.transaction() as connection:
            (others,) = connection.execute("SELECT count(*) FROM promise WHERE name != ?", (promise.name,)).fetchone()
            if others >= PROMISES_MAX:
                raise CapacityError(
                    f"this node serves {PROMISES_MAX} models, the most there can be", "End one with `nexus model unserve NAME`"
                )
            connection.execute(
                "INSERT OR REPLACE INTO promise VALUES (?, ?, ?)",
                (promise.name, content, row_hash("promise", promise.name, content)),
            )

    def end(self, name: str) -> None:
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM promise WHERE name = ?", (name,))

    def versions(self, publisher: bytes, name: str) -> list[SignedPublication]:
        """What is kept of a name's versions, the oldest first."""
        query = "SELECT content, hash FROM version WHERE publisher = ? AND name = ? ORDER BY number"
        return [self._version(content, kept) for content, kept in self._database.rows(query, publisher, name)]

    def all_versions(self) -> list[SignedPublication]:
        """Every version that is kept, by publisher, name and number."""
        query = "SELECT content, hash FROM version ORDER BY publisher, name, number"
        return [self._version(content, kept) for content, kept in self._database.rows(query)]

    def add_versions(self, signed: Iterable[SignedPublication]) -> None:
        """Keep versions whose signatures were checked. One that is kept stays: of two with one number the first counts. The oldest
        of a name go beyond VERSIONS_KEPT. Raises CapacityError for a name more than HISTORIES_MAX."""
        with self._database.transaction() as connection:
            for one in signed:
                publication = one.publication
                place = (publication.publisher, publication.name)
                (histories,) = connection.execute(
                    "SELECT count(*) FROM (SELECT DISTINCT publisher, name FROM version WHERE NOT (publisher = ? AND name = ?))",
                    place,
                ).fetchone()
                if histories >= HISTORIES_MAX:
                    raise CapacityError(
                        f"this node remembers the versions of {HISTORIES_MAX} names, the most there can be",
                        "Publish under a name that it knows",
                    )
                content = one.to_bytes()
                connection.execute(
                    "INSERT OR IGNORE INTO version VALUES (?, ?, ?, ?, ?)",
                    (*place, publication.version, content, row_hash("version", content)),
                )
                connection.execute(
                    "DELETE FROM version WHERE publisher = ? AND name = ? AND number NOT IN "
                    "(SELECT number FROM version WHERE publisher = ? AND name = ? ORDER BY number DESC LIMIT ?)",
                    (*place, *place, VERSIONS_KEPT),
                )

    def forget_versions(self, publisher: bytes, name: str) -> None:
        """Those of a publisher that is not followed any longer."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM version WHERE publisher = ? AND name = ?", (publisher, name))

    def _version(self, content: object, kept: object) -> SignedPublication:
        if not isinstance(content, bytes) or row_hash("version", content) != kept:
            raise self._database.damaged("a version of a model's name")
        try:
            return SignedPublication.from_bytes(content)
        except MalformedError as error:
            raise self._database.damaged("a version of a model's name") from error


def open_fragment_store(path: Path) -> FragmentStore:
    """The store in that file, every row read and checked. Raises LocalError."""
    store = FragmentStore(path)
    try:
        store.promises()
        store.all_versions()
    except LocalError:
        store.close()
        raise
    return store


def history_of(store: FragmentStore, publisher: bytes, name: str) -> list[Publication]:
    return [one.publication for one in store.versions(publisher, name)]

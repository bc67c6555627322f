"""The ledger of this node: ledger.db in the data directory. Its own account, durable before an entry leaves the process, and what
it has seen others sign.

The chain of this node is the one thing here that must never be put back to an older state: a node that signs a number a second
time has forked its account. So a damaged or foreign file is refused, and never replaced by an empty one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from nexus.core.errors import LocalError, MalformedError
from nexus.proof.accounts import EARN, PAY, Fork, SignedEntry, is_fork
from nexus.storage.database import Database, row_hash

SEEN_MAX = 65_536
OFFERS_MAX = 4096

_SCHEMA = """
CREATE TABLE IF NOT EXISTS owner (only_one INTEGER PRIMARY KEY CHECK (only_one = 1), account BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS chain (
    seq INTEGER PRIMARY KEY, payment_id BLOB UNIQUE, content BLOB NOT NULL, payment BLOB NOT NULL, hash BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS seen (
    number INTEGER PRIMARY KEY AUTOINCREMENT, account BLOB NOT NULL, seq INTEGER NOT NULL, content BLOB NOT NULL,
    hash BLOB NOT NULL, UNIQUE (account, seq)
) STRICT;
CREATE TABLE IF NOT EXISTS offer (seq INTEGER NOT NULL, payee BLOB NOT NULL, PRIMARY KEY (seq, payee)) STRICT;
CREATE TABLE IF NOT EXISTS tab (coordinator BLOB PRIMARY KEY, owed INTEGER NOT NULL) STRICT;
"""

ChainItem = tuple[SignedEntry, SignedEntry | None]


class LedgerStore:
    """One file, opened once, for the account with key `account`. Every method raises LocalError where the disk is in the way."""

    def __init__(self, path: Path, account: bytes) -> None:
        self._database = Database(path, _SCHEMA)
        with self._database.transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO owner VALUES (1, ?)", (account,))
            (owner,) = connection.execute("SELECT account FROM owner").fetchone()
        if owner != account:
            self._database.close()
            raise LocalError(
                f"{path} is the ledger of another node",
                "Each identity has a ledger of its own: move this one away if the node was given a new key",
            )

    def close(self) -> None:
        self._database.close()

    # --- this node's own account ---

    def append(self, signed: SignedEntry, payment: SignedEntry | None = None) -> None:
        """Keep the next entry of this account, with the payment that it takes from, durably. Nothing may leave the process before.

        Of a PAY entry every share is put down to be offered. Raises LocalError, with nothing kept, for a number that is taken.
        """
        entry = signed.entry
        content, paid = signed.to_bytes(), payment.to_bytes() if payment is not None else b""
        with self._database.transaction() as connection:
            (entries,) = connection.execute("SELECT coalesce(max(seq) + 1, 0) FROM chain").fetchone()
            if entry.seq != entries:
                raise LocalError(f"entry {entry.seq} of this node's ledger is not the next one: {entries} is", "Please report it")
            named = entry.payment if entry.kind == EARN else None
            connection.execute(
                "INSERT INTO chain VALUES (?, ?, ?, ?, ?)",
                (entry.seq, named, content, paid, row_hash("chain", entry.seq, content, paid)),
            )
            if entry.kind == PAY:
                connection.executemany("INSERT INTO offer VALUES (?, ?)", [(entry.seq, share.account) for share in entry.shares])
                connection.execute(
                    "DELETE FROM offer WHERE rowid IN (SELECT rowid FROM offer ORDER BY seq DESC LIMIT -1 OFFSET ?)", (OFFERS_MAX,)
                )

    def entries(self) -> int:
        return int(self._database.rows("SELECT coalesce(max(seq) + 1, 0) FROM chain")[0][0])

    def chain(self, start: int, limit: int) -> list[ChainItem]:
        """Up to `limit` entries from number `start` on, each with the payment that it takes from. Raises LocalError for a damaged
        one or one that is missing."""
        query = "SELECT seq, content, payment, hash FROM chain WHERE seq >= ? ORDER BY seq LIMIT ?"
        items: list[ChainItem] = []
        for number, (seq, content, paid, kept) in enumerate(self._database.rows(query, start, limit), start):
            if seq != number or row_hash("chain", seq, content, paid) != kept:
                raise self._database.damaged(f"entry {number} of this node's ledger")
            items.append((self._entry(content), self._entry(paid) if paid else None))
        return items

    def last(self, limit: int) -> list[ChainItem]:
        """The newest entries, the oldest of them first."""
        return self.chain(max(0, self.entries() - limit), limit)

    def earning_of(self, payment_id: bytes) -> SignedEntry | None:
        """The entry by which this account took a payment."""
        found = self._database.rows("SELECT seq FROM chain WHERE payment_id = ?", payment_id)
        return self.chain(int(found[0][0]), 1)[0][0] if found else None

    def offers(self, limit: int) -> list[tuple[SignedEntry, bytes]]:
        """Payments that their payees have not taken yet, the oldest first: (PAY entry, payee)."""
        found = self._database.rows("SELECT seq, payee FROM offer ORDER BY seq, payee LIMIT ?", limit)
        return [(self.chain(int(seq), 1)[0][0], bytes(payee)) for seq, payee in found if not isinstance(payee, (int, str))]

    def delivered(self, seq: int, payee: bytes) -> None:
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM offer WHERE seq = ? AND payee = ?", (seq, payee))

    # --- what others signed ---

    def note_seen(self, entries: Iterable[SignedEntry]) -> Fork | None:
        """Remember entries whose signatures hold. The first one that contradicts an entry known before, with that one: then its
        owner has forked its account. The oldest are forgotten beyond SEEN_MAX."""
        fork: Fork | None = None
        with self._database.transaction() as connection:
            for signed in entries:
                entry = signed.entry
                found = connection.execute(
                    "SELECT content, hash FROM seen WHERE account = ? AND seq = ?", (entry.account, entry.seq)
                ).fetchone()
                if found is not None and row_hash("seen", found[0]) == found[1]:
                    known = self._entry(found[0])
                    if fork is None and is_fork(known, signed):
                        fork = Fork.of(known, signed)
                    continue
                content = signed.to_bytes()
                connection.execute(
                    "INSERT OR REPLACE INTO seen (account, seq, content, hash) VALUES (?, ?, ?, ?)",
                    (entry.account, entry.seq, content, row_hash("seen", content)),
                )
            connection.execute("DELETE FROM seen WHERE number <= (SELECT max(number) FROM seen) - ?", (SEEN_MAX,))
        return fork

    def newest_seen(self, account: bytes) -> SignedEntry | None:
        """The entry with the highest number that is known of an account."""
        query = "SELECT content, hash FROM seen WHERE account = ? ORDER BY seq DESC LIMIT 1"
        found = self._database.rows(query, account)
        if not found or row_hash("seen", found[0][0]) != found[0][1]:
            return None
        return self._entry(found[0][0])

    # --- tabs ---

    def tabs(self) -> dict[bytes, int]:
        """What coordinators owe this node, in micro-credits."""
        return {
            bytes(key): int(owed) for key, owed in self._database.rows("SELECT coordinator, owed FROM tab") if type(key) is bytes
        }

    def put_tabs(self, tabs: Sequence[tuple[bytes, int]]) -> None:
        """All of them: what is not among them is paid."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM tab")
            connection.executemany("INSERT INTO tab VALUES (?, ?)", tabs)

    def _entry(self, content: object) -> SignedEntry:
        try:
            return SignedEntry.from_bytes(content if isinstance(content, bytes) else b"")
        except MalformedError as error:
            raise self._database.damaged("an entry") from error

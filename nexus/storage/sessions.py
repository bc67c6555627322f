"""Sessions that this node took part in: sessions.db in the data directory, opened once.

As a stage: every receipt is durable here before it is signed, so that no crash can make this node sign two answers to one question;
with it the inputs of its steps, so that the node can show its work when it is audited. As the asker: the proof bundle of every
session with the hashes behind its receipts, and what audits of it found.

Both sides have a bound of bytes and of age. Of the oldest sessions served first the inputs go, then the receipts; a session whose
receipts are gone is remembered by its id, and nothing is ever signed for it again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nexus.core.errors import CapacityError, LocalError, MalformedError, NotFoundError, UsageError
from nexus.core.hashing import HASH_BYTES, tagged_hash
from nexus.core.plan import Plan
from nexus.core.record import Record, digest, many, nested, optional_digest, raw, text, uint
from nexus.proof.audit import AuditReport
from nexus.proof.bundle import Bundle
from nexus.proof.receipts import STEPS_MAX, WINDOW_MAX, Receipt, SignedRequest, Terms
from nexus.proof.trace import WindowTrace
from nexus.storage.database import Cell, Database, row_hash

AUDITS_PER_SESSION_MAX = 1024
# Ids of sessions whose receipts are gone: 40 MiB.
FORGOTTEN_MAX = 1 << 20
# Making room is paid for by whoever signs next: so much of it at a time.
DROPPED_AT_ONCE = 32
SIGNED_PER_DROP = 8
PREFIX_MIN = 4
# An input came in one frame.
PAYLOAD_BYTES_MAX = 64 * 1024 * 1024
# What a row takes beside its content: hashes and numbers.
ROW_BYTES = 128
LISTED_MAX = 1000
# A session that signed so lately may be under way: its receipts stay, whatever they take.
UNDER_WAY_MS = 3_600_000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS served (
    session BLOB NOT NULL, stage INTEGER NOT NULL, content BLOB NOT NULL, hash BLOB NOT NULL,
    used_ms INTEGER NOT NULL, size INTEGER NOT NULL, shows INTEGER NOT NULL, PRIMARY KEY (session, stage)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS served_used ON served (used_ms);
CREATE TABLE IF NOT EXISTS receipt (
    session BLOB NOT NULL, stage INTEGER NOT NULL, step0 INTEGER NOT NULL, question BLOB NOT NULL,
    content BLOB NOT NULL, hash BLOB NOT NULL, PRIMARY KEY (session, stage, step0, question)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS input (
    number INTEGER PRIMARY KEY, session BLOB NOT NULL, stage INTEGER NOT NULL, step0 INTEGER NOT NULL,
    content BLOB NOT NULL, hash BLOB NOT NULL, UNIQUE (session, stage, step0)
) STRICT;
CREATE TABLE IF NOT EXISTS forgotten (
    number INTEGER PRIMARY KEY, session BLOB NOT NULL, stage INTEGER NOT NULL, UNIQUE (session, stage)
) STRICT;
CREATE TABLE IF NOT EXISTS kept (
    number INTEGER PRIMARY KEY, session BLOB NOT NULL UNIQUE, name TEXT NOT NULL, ended_ms INTEGER NOT NULL, size INTEGER NOT NULL,
    content BLOB NOT NULL, hash BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS kept_ended ON kept (ended_ms);
CREATE TABLE IF NOT EXISTS trace (
    number INTEGER PRIMARY KEY, session BLOB NOT NULL, stage INTEGER NOT NULL, place INTEGER NOT NULL,
    content BLOB NOT NULL, hash BLOB NOT NULL, UNIQUE (session, stage, place)
) STRICT;
CREATE TABLE IF NOT EXISTS audit (
    number INTEGER PRIMARY KEY, session BLOB NOT NULL, content BLOB NOT NULL, hash BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS audit_session ON audit (session);
CREATE TABLE IF NOT EXISTS total (name TEXT PRIMARY KEY, size INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT OR IGNORE INTO total VALUES ('served', 0), ('kept', 0);
CREATE TRIGGER IF NOT EXISTS served_added AFTER INSERT ON served
    BEGIN UPDATE total SET size = size + new.size WHERE name = 'served'; END;
CREATE TRIGGER IF NOT EXISTS served_grown AFTER UPDATE OF size ON served
    BEGIN UPDATE total SET size = size + new.size - old.size WHERE name = 'served'; END;
CREATE TRIGGER IF NOT EXISTS served_gone AFTER DELETE ON served BEGIN
    DELETE FROM receipt WHERE session = old.session AND stage = old.stage;
    DELETE FROM input WHERE session = old.session AND stage = old.stage;
    UPDATE total SET size = size - old.size WHERE name = 'served';
END;
CREATE TRIGGER IF NOT EXISTS kept_added AFTER INSERT ON kept
    BEGIN UPDATE total SET size = size + new.size WHERE name = 'kept'; END;
CREATE TRIGGER IF NOT EXISTS kept_gone AFTER DELETE ON kept BEGIN
    DELETE FROM trace WHERE session = old.session;
    DELETE FROM audit WHERE session = old.session;
    UPDATE total SET size = size - old.size WHERE name = 'kept';
END;
"""

_R = TypeVar("_R", bound=Record)


@dataclass(frozen=True, slots=True)
class ServedSession(Record):
    """What a stage was asked for, as it came with Open. `terms.session` and `stage` name it."""

    stage: int = uint(4095)
    model_name: str = text(64)
    plan: Plan = nested(Plan)
    terms: Terms = nested(Terms)
    request: SignedRequest = nested(SignedRequest)


@dataclass(frozen=True, slots=True)
class Window:
    """What a stage is about to sign, and the inputs of its steps, one payload each."""

    served: ServedSession
    receipt: Receipt
    inputs: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class ServedWork:
    """What there is to show of a session served. `receipts` in step order; `inputs` of all their steps."""

    served: ServedSession
    receipts: tuple[Receipt, ...]
    inputs: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class KeptSession:
    """A session that this node asked for. `traces`: of every stage, the hashes behind each of its receipts; none in the float
    profile. `ended_ms`: Unix time. `audits`: oldest first."""

    bundle: Bundle
    traces: tuple[tuple[WindowTrace, ...], ...]
    ended_ms: int
    audits: tuple[AuditReport, ...]


@dataclass(frozen=True, slots=True)
class KeptSummary:
    """A row of the list of them. `size`: bytes on the disk."""

    session: bytes
    model_name: str
    ended_ms: int
    size: int
    audits: int


@dataclass(frozen=True, slots=True)
class _Inputs(Record):
    payloads: tuple[bytes, ...] = many(raw(most=PAYLOAD_BYTES_MAX), WINDOW_MAX)


@dataclass(frozen=True, slots=True)
class _Question(Record):
    """Everything of a receipt that was asked for, and nothing that was answered."""

    session: bytes = digest()
    node: bytes = raw(32)
    stage: int = uint(4095)
    step0: int = uint(STEPS_MAX)
    n: int = uint(STEPS_MAX)
    request: bytes = digest()
    parent: bytes = optional_digest()
    prev: bytes = optional_digest()
    in_root: bytes = digest()

    @classmethod
    def id_of(cls, receipt: Receipt) -> bytes:
        question = cls(
            receipt.session,
            receipt.node,
            receipt.stage,
            receipt.step0,
            receipt.n,
            receipt.request,
            receipt.parent,
            receipt.prev,
            receipt.in_root,
        )
        return tagged_hash("question", question.to_bytes())


class SessionStore:
    """Calls may come from any thread; they wait for the disk, so keep them off the trio thread. All raise LocalError where the disk
    stands in the way; what was asked for has then not happened, and the next call may find that there is space again."""

    def __init__(self, path: Path, *, keep_max_bytes: int, keep_s: float, now_ms: Callable[[], int]) -> None:
        """`keep_max_bytes`: of the sessions served, and as much of those asked for. `keep_s`: since they were last used."""
        self._database = Database(path, _SCHEMA)
        self._keep_max_bytes = keep_max_bytes
        self._keep_ms = int(keep_s * 1000)
        self._now_ms = now_ms
        self._signed = 0  # since room was made
        self.tidy()

    def close(self) -> None:
        self._database.close()

    # As a stage.

    def sign_once(self, window: Window) -> None:
        """Make a receipt durable, so that it may be signed. Raises LocalError where another answer to its question was."""
        (error,) = self.sign_all([window])
        if error:
            raise error

    def sign_all(self, windows: Sequence[Window]) -> list[LocalError | None]:
        """`sign_once` of receipts of different sessions, in one commit. Of each what `sign_once` would have raised."""
        try:
            with self._database.transaction() as connection:
                now_ms = self._now_ms()
                answers = [self._note(connection, window, now_ms) for window in windows]
                self._signed += len(windows)
                if self._signed >= SIGNED_PER_DROP:
                    self._drop_served(connection, now_ms)
                    self._signed = 0
        except LocalError as error:
            return [error] * len(windows)
        return answers

    def served(self, session: bytes, stage: int) -> ServedWork:
        """What was served, with all its inputs. Raises NotFoundError when it is not kept, or not all of it."""
        with self._database.transaction() as connection:
            found = connection.execute(
                "SELECT content, hash, shows FROM served WHERE session = ? AND stage = ?", (session, stage)
            ).fetchone()
            if found is None or not found[2]:
                raise NotFoundError("that session is not kept here any more", "Audits must come sooner, see audit.keep_s there")
            served = self._read(ServedSession, "served", (session, stage), found[0], found[1])
            receipts = tuple(
                self._read(Receipt, "receipt", (session, stage, step0, question), content, hash_)
                for step0, question, content, hash_ in connection.execute(
                    "SELECT step0, question, content, hash FROM receipt WHERE session = ? AND stage = ? ORDER BY step0",
                    (session, stage),
                )
            )
            windows = [
                self._read(_Inputs, "input", (session, stage, step0), content, hash_).payloads
                for step0, content, hash_ in connection.execute(
                    "SELECT step0, content, hash FROM input WHERE session = ? AND stage = ? ORDER BY step0", (session, stage)
                )
            ]
        inputs = tuple(payload for payloads in windows for payload in payloads)
        if len(inputs) != sum(receipt.n for receipt in receipts):
            raise NotFoundError("the inputs of that session are not kept here", "It was asked for more than once, or broke off")
        return ServedWork(served, receipts, inputs)

    def _note(self, connection: sqlite3.Connection, window: Window, now_ms: int) -> LocalError | None:
        receipt, content = window.receipt, window.receipt.to_bytes()
        session, stage, question = receipt.session, receipt.stage, _Question.id_of(receipt)
        earlier = connection.execute(
            "SELECT content, hash FROM receipt WHERE session = ? AND stage = ? AND step0 = ? AND question = ?",
            (session, stage, receipt.step0, question),
        ).fetchone()
        if earlier is not None:
            try:
                same = self._checked("receipt", (session, stage, receipt.step0, question), *earlier) == content
            except LocalError as error:
                return error
            return None if same else _contradiction(receipt)
        known = connection.execute("SELECT shows FROM served WHERE session = ? AND stage = ?", (session, stage)).fetchone()
        size = len(content) + ROW_BYTES
        if known is None:
            if connection.execute("SELECT 1 FROM forgotten WHERE session = ? AND stage = ?", (session, stage)).fetchone():
                return LocalError("this node served that session before and has forgotten its answers", "Ask in a new session")
            asked = window.served.to_bytes()
            size += len(asked)
            connection.execute(
                "INSERT INTO served VALUES (?, ?, ?, ?, ?, 0, 1)",
                (session, stage, asked, row_hash("served", session, stage, asked), now_ms),
            )
        connection.execute(
            "INSERT INTO receipt VALUES (?, ?, ?, ?, ?, ?)",
            (
                session,
                stage,
                receipt.step0,
                question,
                content,
                row_hash("receipt", session, stage, receipt.step0, question, content),
            ),
        )
        if known is None or known[0]:
            inputs = _Inputs(window.inputs).to_bytes()
            size += len(inputs) + ROW_BYTES
            # Of a session that is asked for twice the first inputs count; where they differ, its roots say so.
            connection.execute(
                "INSERT OR IGNORE INTO input (session, stage, step0, content, hash) VALUES (?, ?, ?, ?, ?)",
                (session, stage, receipt.step0, inputs, row_hash("input", session, stage, receipt.step0, inputs)),
            )
        connection.execute(
            "UPDATE served SET used_ms = ?, size = size + ? WHERE session = ? AND stage = ?", (now_ms, size, session, stage)
        )
        return None

    def _drop_served(self, connection: sqlite3.Connection, now_ms: int, at_once: int = DROPPED_AT_ONCE) -> None:
        """Make room: the oldest sessions first lose their inputs, and those that are too old everything but their id."""
        over_ms = now_ms - UNDER_WAY_MS
        old_ms = min(over_ms, now_ms - self._keep_ms)
        old = connection.execute(
            "SELECT session, stage FROM served WHERE used_ms < ? ORDER BY used_ms LIMIT ?", (old_ms, at_once)
        ).fetchall()
        for session, stage in old:
            _forget(connection, session, stage)
        for _ in range(at_once):
            if _total(connection, "served") <= self._keep_max_bytes:
                break
            oldest = connection.execute("SELECT session, stage FROM served WHERE shows ORDER BY used_ms LIMIT 1").fetchone()
            if oldest is not None:
                _drop_inputs(connection, *oldest)
                continue
            oldest = connection.execute(
                "SELECT session, stage FROM served WHERE used_ms < ? ORDER BY used_ms LIMIT 1", (over_ms,)
            ).fetchone()
            if oldest is None:
                break
            _forget(connection, *oldest)
        connection.execute("DELETE FROM forgotten WHERE number <= (SELECT max(number) FROM forgotten) - ?", (FORGOTTEN_MAX,))

    # As the asker.

    def keep_session(self, bundle: Bundle, traces: Sequence[Sequence[WindowTrace]]) -> None:
        """Keep a session that ended, and let the oldest go. Raises CapacityError where it alone is more than is kept."""
        session, content = bundle.terms.session, bundle.to_bytes()
        shown = [(stage, place, trace.to_bytes()) for stage, of_stage in enumerate(traces) for place, trace in enumerate(of_stage)]
        size = len(content) + sum(len(trace) for _, _, trace in shown)
        if size > self._keep_max_bytes:
            raise CapacityError(
                f"the session takes {size >> 20} MiB, and {self._keep_max_bytes >> 20} MiB are kept", "Raise audit.keep_max_bytes"
            )
        with self._database.transaction() as connection:
            now_ms = self._now_ms()
            _drop_kept(connection, session)
            connection.execute(
                "INSERT INTO kept (session, name, ended_ms, size, content, hash) VALUES (?, ?, ?, ?, ?, ?)",
                (session, bundle.model_name, now_ms, size, content, row_hash("kept", session, now_ms, content)),
            )
            connection.executemany(
                "INSERT INTO trace (session, stage, place, content, hash) VALUES (?, ?, ?, ?, ?)",
                [(session, stage, place, trace, row_hash("trace", session, stage, place, trace)) for stage, place, trace in shown],
            )
            self._drop_asked(connection, now_ms)

    def session(self, prefix: str) -> KeptSession:
        """The one whose hex id begins so. Raises NotFoundError, UsageError where it fits several."""
        text_ = prefix.strip().lower()
        if not PREFIX_MIN <= len(text_) <= 2 * HASH_BYTES or not set(text_) <= set("0123456789abcdef"):
            raise UsageError(f"{prefix!r} is not the id of a session", f"It is hex digits, {PREFIX_MIN} at least")
        least, most = (bytes.fromhex(text_.ljust(2 * HASH_BYTES, fill)) for fill in "0f")
        with self._database.transaction() as connection:
            found = connection.execute(
                "SELECT session, ended_ms, content, hash FROM kept WHERE session BETWEEN ? AND ? LIMIT 2", (least, most)
            ).fetchall()
            if len(found) > 1:
                raise UsageError(f"{prefix!r} is the beginning of several sessions", "Say more of the id")
            if not found:
                raise NotFoundError(f"no session {prefix!r} is kept here", "`nexus audit list` shows those that are")
            session, ended_ms, content, hash_ = found[0]
            bundle = self._read(Bundle, "kept", (session, ended_ms), content, hash_)
            shown = [
                (stage, self._read(WindowTrace, "trace", (session, stage, place), content, hash_))
                for stage, place, content, hash_ in connection.execute(
                    "SELECT stage, place, content, hash FROM trace WHERE session = ? ORDER BY stage, place", (session,)
                )
            ]
            audits = tuple(
                self._read(AuditReport, "audit", (session,), content, hash_)
                for content, hash_ in connection.execute(
                    "SELECT content, hash FROM audit WHERE session = ? ORDER BY number", (session,)
                )
            )
        stages = range(len(bundle.plan.stages)) if shown else ()
        traces = tuple(tuple(trace for stage, trace in shown if stage == number) for number in stages)
        return KeptSession(bundle, traces, ended_ms, audits)

    def sessions(self, limit: int = LISTED_MAX) -> list[KeptSummary]:
        """The newest first."""
        rows = self._database.rows(
            "SELECT session, name, ended_ms, size, (SELECT count(*) FROM audit WHERE audit.session = kept.session)"
            " FROM kept ORDER BY ended_ms DESC, number DESC LIMIT ?",
            limit,
        )
        return [KeptSummary(*row) for row in rows]  # type: ignore[arg-type]

    def note_audit(self, report: AuditReport) -> None:
        """Keep what an audit of a kept session found. Raises NotFoundError, CapacityError."""
        content = report.to_bytes()
        with self._database.transaction() as connection:
            if not connection.execute("SELECT 1 FROM kept WHERE session = ?", (report.session,)).fetchone():
                raise NotFoundError("the audited session is not kept here any more", "See audit.keep_max_bytes and audit.keep_s")
            (count,) = connection.execute("SELECT count(*) FROM audit WHERE session = ?", (report.session,)).fetchone()
            if count >= AUDITS_PER_SESSION_MAX:
                raise CapacityError(f"the session was audited {count} times, the limit", "Audit another")
            connection.execute(
                "INSERT INTO audit (session, content, hash) VALUES (?, ?, ?)",
                (report.session, content, row_hash("audit", report.session, content)),
            )

    def tidy(self) -> None:
        """Let go of everything that is too old or too much, as every write does bit by bit."""
        with self._database.transaction() as connection:
            now_ms = self._now_ms()
            self._drop_served(connection, now_ms, at_once=LISTED_MAX)
            self._drop_asked(connection, now_ms)

    def _drop_asked(self, connection: sqlite3.Connection, now_ms: int) -> None:
        old = connection.execute("SELECT session FROM kept WHERE ended_ms < ?", (now_ms - self._keep_ms,)).fetchall()
        for (session,) in old:
            _drop_kept(connection, session)
        while _total(connection, "kept") > self._keep_max_bytes:
            (session,) = connection.execute("SELECT session FROM kept ORDER BY ended_ms, number LIMIT 1").fetchone()
            _drop_kept(connection, session)

    def _read(self, record: type[_R], table: str, cells: tuple[Cell, ...], content: bytes, hash_: bytes) -> _R:
        checked = self._checked(table, cells, content, hash_)
        try:
            return record.from_bytes(checked)
        except MalformedError as error:
            raise LocalError(
                f"a row of {table!r} in {self._database.path} is of another version of Nexus", "Use that version to read it"
            ) from error

    def _checked(self, table: str, cells: tuple[Cell, ...], content: bytes, hash_: bytes) -> bytes:
        if row_hash(table, *cells, content) != hash_:
            raise self._database.damaged(f"a row of {table!r}")
        return content


def _total(connection: sqlite3.Connection, name: str) -> int:
    (size,) = connection.execute("SELECT size FROM total WHERE name = ?", (name,)).fetchone()
    return int(size)


def _drop_inputs(connection: sqlite3.Connection, session: bytes, stage: int) -> None:
    connection.execute("DELETE FROM input WHERE session = ? AND stage = ?", (session, stage))
    (count, size) = connection.execute(
        "SELECT count(*), coalesce(sum(length(content)), 0) FROM receipt WHERE session = ? AND stage = ?", (session, stage)
    ).fetchone()
    connection.execute(
        "UPDATE served SET shows = 0, size = length(content) + ? WHERE session = ? AND stage = ?",
        (size + count * ROW_BYTES, session, stage),
    )


def _forget(connection: sqlite3.Connection, session: bytes, stage: int) -> None:
    connection.execute("DELETE FROM served WHERE session = ? AND stage = ?", (session, stage))
    connection.execute("INSERT OR IGNORE INTO forgotten (session, stage) VALUES (?, ?)", (session, stage))


def _drop_kept(connection: sqlite3.Connection, session: bytes) -> None:
    connection.execute("DELETE FROM kept WHERE session = ?", (session,))


def _contradiction(receipt: Receipt) -> LocalError:
    return LocalError(
        f"this machine gave another answer to steps {receipt.step0} to {receipt.step0 + receipt.n - 1} of this session before",
        "Nothing was signed. One of the two was computed wrongly: check this machine's memory, and `nexus engine check`",
    )

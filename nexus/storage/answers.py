"""Answers under way, so that one goes on where it was when the node that asks for it is started again.

Of each answer the request and, window by window, what every stage has signed for. It is written about once a second: what is lost
in a crash is computed again. Rows that the disk damaged are as good as none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nexus.core.errors import MalformedError, NotFoundError, UsageError
from nexus.core.manifest import CAUSAL
from nexus.core.record import Record, digest, many, raw, text, uint
from nexus.proof.bundle import PARTS_MAX, Bundle
from nexus.proof.receipts import STEPS_MAX
from nexus.proof.trace import WindowTrace
from nexus.storage.database import Database, row_hash
from nexus.swarm.session import SignedWindow

# The oldest go first; a client that wants its answer back comes soon.
ANSWERS_MAX = 64
KEEP_MS = 60 * 60 * 1000

SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    id BLOB PRIMARY KEY, at_ms INTEGER NOT NULL, content BLOB NOT NULL, hash BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS parts (
    answer BLOB NOT NULL, number INTEGER NOT NULL, content BLOB NOT NULL, hash BLOB NOT NULL, PRIMARY KEY (answer, number)) STRICT;
CREATE TABLE IF NOT EXISTS windows (
    answer BLOB NOT NULL, part INTEGER NOT NULL, number INTEGER NOT NULL, content BLOB NOT NULL, hash BLOB NOT NULL,
    PRIMARY KEY (answer, part, number)) STRICT;
"""


@dataclass(frozen=True, slots=True)
class AnswerRequest(Record):
    """What was asked for. `stages` 0: as the node decides. `verify`: empty for what the settings say. The rest as in `Terms`."""

    model_name: str = text(64)
    model_root: bytes = digest()
    prompt: bytes = raw(most=1 << 26)
    steps_max: int = uint(STEPS_MAX)
    stages: int = uint(4096)
    temperature: int = uint()
    top_k: int = uint()
    top_p: int = uint()
    min_p: int = uint()
    repetition_penalty: int = uint()
    seed: int = uint()
    end_tokens: tuple[int, ...] = many(uint(2**32 - 1), 64)
    receipts: int = uint(1)
    verify: str = text(16)
    stop: tuple[str, ...] = many(text(4096), 64)


@dataclass(frozen=True, slots=True)
class KeptPart:
    """A session of the answer, as far as it was written; nothing is verified yet."""

    bundle: Bundle
    traces: tuple[tuple[WindowTrace, ...], ...]


class AnswerStore:
    """One writer per answer. Raises LocalError where the disk stands in the way."""

    def __init__(self, path: Path, now_ms: Callable[[], int]) -> None:
        self._database = Database(path, SCHEMA, 1)
        self._now_ms = now_ms

    def close(self) -> None:
        self._database.close()

    def begin(self, answer: bytes, request: AnswerRequest) -> None:
        """A new answer; what is old makes room."""
        now_ms = self._now_ms()
        content = request.to_bytes()
        with self._database.transaction() as connection:
            gone = connection.execute(
                "SELECT id FROM answers WHERE at_ms < ? OR id NOT IN (SELECT id FROM answers ORDER BY at_ms DESC, id LIMIT ?)",
                (now_ms - KEEP_MS, ANSWERS_MAX - 1),
            ).fetchall()
            for (old,) in gone:
                _remove(connection.execute, old)
            connection.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)",
                (answer, now_ms, content, row_hash("answers", answer, now_ms, content)),
            )

    def add(self, answer: bytes, part: int, header: Bundle, first: int, windows: Sequence[SignedWindow]) -> None:
        """Further windows of a part, from number `first` on; of a new part, instead of whatever parts there were from it on."""
        content = header.to_bytes()
        with self._database.transaction() as connection:
            if not first:
                for table in ("parts", "windows"):
                    column = "number" if table == "parts" else "part"
                    connection.execute(f"DELETE FROM {table} WHERE answer = ? AND {column} >= ?", (answer, part))  # noqa: S608
                connection.execute(
                    "INSERT INTO parts VALUES (?, ?, ?, ?)", (answer, part, content, row_hash("parts", answer, part, content))
                )
            for number, window in enumerate(windows, first):
                entry = window.to_bytes()
                connection.execute(
                    "INSERT INTO windows VALUES (?, ?, ?, ?, ?)",
                    (answer, part, number, entry, row_hash("windows", answer, part, number, entry)),
                )

    def end(self, answer: bytes) -> None:
        """Nobody will ask for it any more."""
        with self._database.transaction() as connection:
            _remove(connection.execute, answer)

    def find(self, prefix: str) -> tuple[bytes, AnswerRequest]:
        """Raises NotFoundError, UsageError where several begin so."""
        rows = self._database.rows("SELECT id, at_ms, content, hash FROM answers ORDER BY id")
        found = [row for row in rows if isinstance(row[0], bytes) and len(prefix) >= 8 and row[0].hex().startswith(prefix.lower())]
        if not found:
            raise NotFoundError(f"no answer {prefix[:16]!r} is kept here", "One that broke off is kept for an hour; ask again")
        if len(found) > 1:
            raise UsageError(f"{len(found)} answers begin with {prefix!r}", "Give more of the id")
        answer, at_ms, content, said = found[0]
        assert isinstance(answer, bytes)
        if not isinstance(content, bytes) or row_hash("answers", answer, at_ms, content) != said:
            raise self._database.damaged("an answer under way")
        return answer, AnswerRequest.from_bytes(content)

    def parts(self, answer: bytes) -> list[KeptPart]:
        """The parts in order, up to the first row that is missing or damaged."""
        kept: list[KeptPart] = []
        rows = self._database.rows("SELECT number, content, hash FROM parts WHERE answer = ? ORDER BY number", answer)
        for number, content, said in rows[:PARTS_MAX]:
            if number != len(kept) or not isinstance(content, bytes) or row_hash("parts", answer, number, content) != said:
                break
            windows = self._windows(answer, len(kept))
            try:
                header = Bundle.from_bytes(content)
            except MalformedError:
                break
            if not windows:
                break
            outputs = tuple(output for window in windows for output in window.outputs)
            receipts = tuple(receipt for window in windows for receipt in window.receipts)
            inputs = header.inputs if header.manifest.kind == CAUSAL else header.inputs[: len(outputs)]
            traces = tuple(zip(*(window.traces for window in windows), strict=False))
            kept.append(KeptPart(replace(header, inputs=inputs, outputs=outputs, receipts=receipts), traces))
        return kept

    def _windows(self, answer: bytes, part: int) -> list[SignedWindow]:
        found: list[SignedWindow] = []
        rows = self._database.rows(
            "SELECT number, content, hash FROM windows WHERE answer = ? AND part = ? ORDER BY number", answer, part
        )
        for number, content, said in rows:
            if number != len(found) or not isinstance(content, bytes):
                break
            if row_hash("windows", answer, part, number, content) != said:
                break
            found.append(SignedWindow.from_bytes(content))
        return found


def _remove(execute: Callable[[str, tuple[bytes]], object], answer: bytes) -> None:
    execute("DELETE FROM answers WHERE id = ?", (answer,))
    execute("DELETE FROM parts WHERE answer = ?", (answer,))
    execute("DELETE FROM windows WHERE answer = ?", (answer,))

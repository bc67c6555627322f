"""The session store: what is signed is on the disk first, whatever happens to the process, the disk or the space on it."""

from __future__ import annotations

import os
import random
import resource
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from nexus.core.errors import CapacityError, LocalError, NotFoundError, UsageError
from nexus.core.hashing import tagged_hash
from nexus.proof.audit import AuditReport
from nexus.proof.bundle import Bundle
from nexus.proof.receipts import Receipt, payload_root
from nexus.proof.trace import WindowTrace
from nexus.storage.sessions import UNDER_WAY_MS, ServedSession, SessionStore, Window
from tests.swarm.ring import causal_ring

KEEP_S = 1e6
PAYLOAD = 1000


class Clock:
    now_ms = 1_700_000_000_000

    def __call__(self) -> int:
        return self.now_ms


def opened(path: Path, clock: Clock | None = None, keep_max_bytes: int = 1 << 30, keep_s: float = KEEP_S) -> SessionStore:
    return SessionStore(path / "sessions.db", keep_max_bytes=keep_max_bytes, keep_s=keep_s, now_ms=clock or Clock())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SessionStore]:
    made = opened(tmp_path)
    yield made
    made.close()


def _asked() -> tuple[Bundle, tuple[tuple[WindowTrace, ...], ...]]:
    ring = causal_ring(2, 20, profile="exact")
    bundle = ring.run()
    assert bundle is not None
    return bundle, ring.traces


BUNDLE, TRACES = _asked()
SERVED = ServedSession(0, "toy", BUNDLE.plan, BUNDLE.terms, BUNDLE.requests[0])


def window(number: int, place: int = 0, out: bytes = b"right") -> Window:
    """Window `place` of session `number`: 16 steps with inputs of PAYLOAD bytes."""
    inputs = tuple(tagged_hash("input", b"%d %d %d" % (number, place, step)) * (PAYLOAD // 32) for step in range(16))
    receipt = replace(
        BUNDLE.receipts[0].receipt,
        session=tagged_hash("session", b"%d" % number),
        step0=16 * place,
        n=16,
        in_root=payload_root(inputs),
        out_root=tagged_hash("out", out),
    )
    return Window(SERVED, receipt, inputs)


def test_one_question_has_one_answer(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.sign_once(window(1))
    store.sign_once(window(1))
    with pytest.raises(LocalError, match="another answer to steps 0 to 15"):
        store.sign_once(window(1, out=b"wrong"))
    store.close()
    store = opened(tmp_path)
    with pytest.raises(LocalError, match="another answer"):
        store.sign_once(window(1, out=b"wrong"))
    store.sign_once(window(1))
    assert store.served(window(1).receipt.session, 0).receipts == (window(1).receipt,)
    store.close()


@pytest.mark.parametrize("field", ["kv_len", "out_root", "kv_root", "trace_root"])
def test_every_part_of_an_answer_counts(field: str, store: SessionStore) -> None:
    first = window(1)
    value = first.receipt.kv_len + 1 if field == "kv_len" else bytes(32)
    store.sign_once(first)
    with pytest.raises(LocalError, match="another answer"):
        store.sign_once(replace(first, receipt=replace(first.receipt, **{field: value})))  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["session", "request", "parent", "prev", "in_root", "n"])
def test_another_question_may_have_another_answer(field: str, store: SessionStore) -> None:
    """An honest retry builds on other receipts, or ends earlier: that is no contradiction."""
    first = window(1)
    other = replace(first.receipt, **{field: 15 if field == "n" else bytes(32)}, out_root=bytes(32))  # type: ignore[arg-type]
    store.sign_once(first)
    store.sign_once(replace(first, receipt=other))


def test_of_a_batch_only_the_contradiction_is_refused(store: SessionStore) -> None:
    store.sign_once(window(2))
    errors = store.sign_all([window(1), window(2, out=b"wrong"), window(3)])
    assert [error is None for error in errors] == [True, False, True]
    store.sign_once(window(3))


def test_two_answers_in_one_batch_are_one_too_many(store: SessionStore) -> None:
    first, second = store.sign_all([window(1), window(1, out=b"wrong")])
    assert first is None
    assert second is not None


def test_what_was_served_can_be_shown(store: SessionStore) -> None:
    windows = [window(1, place) for place in range(3)]
    for one in windows:
        store.sign_once(one)
    work = store.served(windows[0].receipt.session, 0)
    assert work.served == SERVED
    assert work.receipts == tuple(one.receipt for one in windows)
    assert work.inputs == tuple(payload for one in windows for payload in one.inputs)
    with pytest.raises(NotFoundError):
        store.served(windows[0].receipt.session, 1)
    with pytest.raises(NotFoundError):
        store.served(bytes(32), 0)


def test_inputs_go_first_and_the_oldest_before_others(tmp_path: Path) -> None:
    clock = Clock()
    store = opened(tmp_path, clock, keep_max_bytes=100_000)
    for number in range(20):
        clock.now_ms += 1000
        store.sign_once(window(number))
    kept = []
    for number in range(20):
        with_inputs = True
        try:
            store.served(window(number).receipt.session, 0)
        except NotFoundError:
            with_inputs = False
        kept.append(with_inputs)
        with pytest.raises(LocalError, match="another answer"):  # under way for all that this node knows: never forgotten
            store.sign_once(window(number, out=b"wrong"))
    assert kept == sorted(kept)
    assert 2 < sum(kept) < 6
    store.close()


def test_a_session_that_is_forgotten_is_never_signed_for_again(tmp_path: Path) -> None:
    clock = Clock()
    store = opened(tmp_path, clock, keep_s=UNDER_WAY_MS / 1000)
    store.sign_once(window(1))
    clock.now_ms += UNDER_WAY_MS + 1
    store.tidy()
    for out in (b"right", b"wrong"):
        with pytest.raises(LocalError, match="has forgotten"):
            store.sign_once(window(1, out=out))
    store.close()
    store = opened(tmp_path, clock, keep_s=UNDER_WAY_MS / 1000)
    with pytest.raises(LocalError, match="has forgotten"):
        store.sign_once(window(1, place=1))
    store.close()


def test_nothing_kept_still_signs_once(tmp_path: Path) -> None:
    store = opened(tmp_path, keep_max_bytes=0, keep_s=0)
    for place in range(3):
        for number in range(4):
            store.sign_once(window(number, place))
    with pytest.raises(LocalError, match="another answer"):
        store.sign_once(window(2, 0, out=b"wrong"))
    with pytest.raises(NotFoundError):
        store.served(window(2).receipt.session, 0)
    store.close()


def test_receipts_alone_have_a_bound_as_well(tmp_path: Path) -> None:
    clock = Clock()
    store = opened(tmp_path, clock, keep_max_bytes=20_000)
    for number in range(60):
        clock.now_ms += UNDER_WAY_MS // 10
        store.sign_once(window(number))
    (rows,) = store._database.rows("SELECT count(*) FROM served")[0]
    (total,) = store._database.rows("SELECT size FROM total WHERE name = 'served'")[0]
    assert isinstance(rows, int)
    assert rows <= 25
    assert (total,) == store._database.rows("SELECT sum(size) FROM served")[0]
    with pytest.raises(LocalError, match="has forgotten"):
        store.sign_once(window(0, out=b"wrong"))
    store.close()


def damage(path: Path, table: str) -> None:
    """One bit of one row, as a failing disk would."""
    connection = sqlite3.connect(path / "sessions.db")
    (content,) = connection.execute(f"SELECT content FROM {table} LIMIT 1").fetchone()
    flipped = content[:20] + bytes([content[20] ^ 4]) + content[21:]
    assert connection.execute(f"UPDATE {table} SET content = ? WHERE content = ?", (flipped, content)).rowcount == 1
    connection.commit()
    connection.close()


@pytest.mark.parametrize("table", ["receipt", "served", "input"])
def test_a_damaged_row_is_found_and_nothing_is_signed_on_it(table: str, tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.sign_once(window(1))
    store.close()
    damage(tmp_path, table)
    store = opened(tmp_path)
    with pytest.raises(LocalError, match="damaged"):
        store.served(window(1).receipt.session, 0)
    if table == "receipt":
        with pytest.raises(LocalError, match="damaged"):
            store.sign_once(window(1))
    store.close()


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sessions.db").write_bytes(b"not a database " * 1000)
    with pytest.raises(LocalError, match=r"sessions\.db"):
        opened(tmp_path)


def test_two_processes_do_not_share_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexus.storage.database.BUSY_TIMEOUT_S", 0.01)
    store = opened(tmp_path)
    with pytest.raises(LocalError, match="in use"):
        opened(tmp_path)
    store.close()


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond it: for SQLite the same as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_refuses_and_recovers(tmp_path: Path) -> None:
    """At every point at which it may be full: while the log grows, while it is written back, and in between."""
    store = opened(tmp_path)
    signed: list[Receipt] = []
    refused = 0

    def sign(count: int) -> None:
        nonlocal refused
        for _ in range(count):
            one = window(1000 + len(signed) + refused)
            (error,) = store.sign_all([one])
            if error is None:
                signed.append(one.receipt)
                continue
            assert "full or failing" in error.cause
            assert error.fix
            refused += 1

    sign(3)
    for step in range(24):
        with file_size_limit((tmp_path / "sessions.db-wal").stat().st_size // 2 + 70_000 * step):
            sign(12)
        before = len(signed)
        sign(4)
        assert len(signed) == before + 4
    assert 24 < refused < 24 * 12
    store.close()
    store = opened(tmp_path)
    for receipt in signed:
        assert store.served(receipt.session, 0).receipts == (receipt,)
    assert store._database.rows("PRAGMA integrity_check") == [("ok",)]
    store.close()


def test_what_left_before_a_kill_is_there_afterwards(tmp_path: Path) -> None:
    """SIGKILL at any point of a commit: every receipt that was let out is on the disk, and contradicting it is refused."""
    rng = random.Random(4)
    let_out: list[int] = []
    for kill in range(150):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            # Nothing of the test may run on in here, whatever happens.
            try:
                store = opened(tmp_path)
                number = 0
                while True:
                    store.sign_all([window(10_000 * kill + number + at) for at in range(3)])
                    os.write(writing, b"".join((10_000 * kill + number + at).to_bytes(4, "big") for at in range(3)))
                    number += 3
            finally:
                os._exit(1)
        os.close(writing)
        for _ in range(rng.randrange(8)):
            let_out.append(int.from_bytes(os.read(reading, 4), "big"))
        time.sleep(rng.random() * 0.004)  # anywhere in the commit that follows
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reading, "rb") as rest:
            left = rest.read()
        let_out += [int.from_bytes(left[at : at + 4], "big") for at in range(0, len(left) // 4 * 4, 4)]
    assert len(let_out) > 600
    store = opened(tmp_path)
    for number in let_out:
        assert store._database.rows("SELECT count(*) FROM receipt WHERE session = ?", window(number).receipt.session) == [(1,)]
    for number in let_out[::10]:
        with pytest.raises(LocalError, match="another answer"):
            store.sign_once(window(number, out=b"wrong"))
    assert store._database.rows("PRAGMA integrity_check") == [("ok",)]
    store.close()


def other(number: int) -> Bundle:
    return replace(BUNDLE, terms=replace(BUNDLE.terms, nonce=number.to_bytes(16, "big")), model_name=f"toy{number}")


def report(bundle: Bundle, at_ms: int) -> AuditReport:
    return AuditReport(spec=1, session=bundle.terms.session, at_ms=at_ms, index=0, stages=())


def test_a_session_is_kept_with_its_traces_and_audits(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.keep_session(BUNDLE, TRACES)
    for at_ms in (3, 1, 2):
        store.note_audit(report(BUNDLE, at_ms))
    store.close()
    store = opened(tmp_path)
    kept = store.session(BUNDLE.terms.session.hex()[:12])
    assert (kept.bundle, kept.traces, kept.ended_ms) == (BUNDLE, TRACES, Clock.now_ms)
    assert [audit.at_ms for audit in kept.audits] == [3, 1, 2]
    (summary,) = store.sessions()
    assert (summary.session, summary.model_name, summary.audits) == (BUNDLE.terms.session, "toy", 3)
    assert summary.size > len(BUNDLE.to_bytes())
    store.close()


def test_a_session_is_found_by_the_beginning_of_its_id(store: SessionStore) -> None:
    for number in range(300):
        store.keep_session(other(number), ())
    session = other(7).terms.session.hex()
    assert store.session(session).bundle.model_name == "toy7"
    assert store.session(session[:9].upper()).bundle.model_name == "toy7"
    assert store.session(session).traces == ()
    first = session[:4]
    fits = [number for number in range(300) if other(number).terms.session.hex().startswith(first)]
    if len(fits) == 1:
        assert store.session(first).bundle.model_name == "toy7"
    for bad in ("", "abc", "xyz12", session + "00", "%" * 8):
        with pytest.raises(UsageError):
            store.session(bad)
    with pytest.raises(NotFoundError):
        store.session("00" * 32)


def test_ids_that_begin_alike_are_told_apart(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexus.storage.sessions.PREFIX_MIN", 0)
    store.keep_session(other(1), ())
    store.keep_session(other(2), ())
    with pytest.raises(UsageError, match="several"):
        store.session("")


def test_the_oldest_sessions_go(tmp_path: Path) -> None:
    clock = Clock()
    size = len(BUNDLE.to_bytes())
    store = opened(tmp_path, clock, keep_max_bytes=3 * size + 200, keep_s=100)
    for number in range(6):
        clock.now_ms += 1000
        store.keep_session(other(number), ())
    store.note_audit(report(other(5), 1))
    assert [summary.model_name for summary in store.sessions()] == ["toy5", "toy4", "toy3"]
    with pytest.raises(NotFoundError):
        store.note_audit(report(other(0), 1))
    with pytest.raises(CapacityError, match="keep_max_bytes"):
        store.keep_session(replace(BUNDLE, inputs=(bytes(4 * size),)), ())
    clock.now_ms += 99_500
    store.keep_session(other(6), ())
    assert [summary.model_name for summary in store.sessions()] == ["toy6", "toy5"]
    store.close()


def test_keeping_a_session_again_replaces_it(store: SessionStore) -> None:
    store.keep_session(BUNDLE, TRACES)
    store.keep_session(BUNDLE, ())
    assert len(store.sessions()) == 1
    assert store.session(BUNDLE.terms.session.hex()).traces == ()


def test_audits_of_one_session_are_bounded(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexus.storage.sessions.AUDITS_PER_SESSION_MAX", 3)
    store.keep_session(BUNDLE, ())
    for at_ms in range(3):
        store.note_audit(report(BUNDLE, at_ms))
    with pytest.raises(CapacityError):
        store.note_audit(report(BUNDLE, 4))


@pytest.mark.parametrize("table", ["kept", "trace", "audit"])
def test_a_damaged_session_is_not_shown_as_whole(table: str, tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.keep_session(BUNDLE, TRACES)
    store.note_audit(report(BUNDLE, 1))
    store.close()
    damage(tmp_path, table)
    store = opened(tmp_path)
    with pytest.raises(LocalError, match="damaged"):
        store.session(BUNDLE.terms.session.hex())
    store.close()

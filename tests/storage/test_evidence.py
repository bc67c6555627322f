"""Evidence and what was seen of others survive; a damaged row is noticed; nothing grows without bound."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexus.core.errors import CapacityError, LocalError
from nexus.storage import evidence as evidence_module
from nexus.storage.evidence import EvidenceStore, StoredEvidence
from nexus.swarm.standing import SILENT, Suspension, Tally

A, B = b"a" * 32, b"b" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "evidence.db"


@pytest.fixture
def store(path: Path) -> Iterator[EvidenceStore]:
    store = EvidenceStore(path, bytes_max=1000)
    yield store
    store.close()


def stored(offender: bytes, evidence_id: bytes, known_ms: int = 5) -> StoredEvidence:
    return StoredEvidence(offender, evidence_id * 32, "OP", known_ms, b"", 7)


def again(store: EvidenceStore, path: Path) -> EvidenceStore:
    store.close()
    return EvidenceStore(path, bytes_max=1000)


def test_the_evidence_with_the_least_id_is_kept_and_survives(store: EvidenceStore, path: Path) -> None:
    assert store.put(stored(A, b"5"), b"content")
    assert not store.put(stored(A, b"7", 1), b"greater")
    assert store.put(stored(A, b"3", 9), b"lesser!")
    assert store.put(stored(B, b"4", 8), b"another")
    store = again(store, path)
    assert list(store) == [stored(B, b"4", 8), stored(A, b"3", 5)]
    assert store.content(b"3" * 32) == b"lesser!"
    assert store.content(b"5" * 32) is None
    assert path.stat().st_mode & 0o777 == 0o600
    store.close()


def test_it_is_bounded(store: EvidenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(stored(A, b"5"), b"x" * 900)
    with pytest.raises(CapacityError):
        store.put(stored(B, b"5"), b"x" * 101)
    monkeypatch.setattr(evidence_module, "SLASHED_MAX", 1)
    with pytest.raises(CapacityError):
        store.put(stored(B, b"5"), b"x")
    assert store.put(stored(A, b"4"), b"x")


def test_convicted_strangers_leave_room_for_those_that_matter(store: EvidenceStore) -> None:
    store.put(stored(A, b"5"), b"x" * 800, of_stranger=True)
    with pytest.raises(CapacityError):
        store.put(stored(B, b"5"), b"x" * 100, of_stranger=True)
    assert store.put(stored(B, b"5"), b"x" * 100)


def test_a_damaged_row_is_noticed(store: EvidenceStore, path: Path) -> None:
    store.put(stored(A, b"5"), b"content")
    store.put_tally(A, Tally(audits_ok=3), 5)
    store.close()
    connection = sqlite3.connect(path)
    connection.execute("UPDATE evidence SET content = ?", (b"c0ntent",))
    connection.execute("UPDATE tally SET audits_ok = 4")
    connection.commit()
    connection.close()
    store = EvidenceStore(path)
    with pytest.raises(LocalError, match="its hash does not fit"):
        store.content(b"5" * 32)
    assert store.tallies() == {}
    store.close()


def test_what_is_no_database_is_an_error_and_not_replaced(path: Path) -> None:
    path.write_bytes(b"something else" * 100)
    with pytest.raises(LocalError, match="cannot be used"):
        EvidenceStore(path)
    assert path.read_bytes().startswith(b"something else")


def test_two_processes_do_not_share_it(store: EvidenceStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexus.storage.database.BUSY_TIMEOUT_S", 0.0)
    with pytest.raises(LocalError, match="in use by another process"):
        EvidenceStore(path)


def test_tallies_and_suspensions_survive(store: EvidenceStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Tally(audits_ok=3, audits_bad=1, runs=5, slow=2)
    store.put_tally(A, Tally(), 1)
    store.put_tally(A, tally, 2)
    longer, shorter = (Suspension(A, B, SILENT, 100, until) for until in (900, 800))
    store.put_suspension(longer, 200)
    store.put_suspension(shorter, 200)
    assert store.resumed_ms == 0
    store.resume(77)
    store = again(store, path)
    assert store.tallies() == {A: tally}
    assert store.suspensions(200) == {A: longer}
    assert store.suspensions(900) == {}
    assert store.resumed_ms == 77
    monkeypatch.setattr(evidence_module, "TALLIES_MAX", 1)
    store.put_tally(B, tally, 3)
    assert store.tallies() == {B: tally}
    store.close()

"""What is damaged is noticed: blocks are forgotten and asked for again, everything else is made anew."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nexus.core.errors import LocalError
from nexus.memory.batch import open_batch
from nexus.storage.memory import index as index_module
from nexus.storage.memory import spaces as spaces_module
from nexus.storage.memory.records import Query, VectorRow
from nexus.storage.memory.store import MemoryStore
from tests.storage.memory.making import (
    COLLECTION,
    FINGERPRINT,
    T0,
    arrival,
    codes_of,
    open_store,
    plain,
    put,
    rules,
    signed,
    tombstone,
)

COUNT = 300


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A closed store with an index, small pages and an erased block."""
    for module in (spaces_module, index_module):
        monkeypatch.setattr(f"{module.__name__}.{'PAGE_ROWS' if module is spaces_module else 'INDEX_FROM'}", 64)
    monkeypatch.setattr("nexus.storage.memory.codes.PAGE_ROWS", 64)
    monkeypatch.setattr("nexus.storage.memory.upkeep.PAGE_ROWS", 64)
    monkeypatch.setattr("nexus.storage.memory.store.PAGE_ROWS", 64)
    with open_store(tmp_path) as store:
        ids = put(store, *[plain(number) for number in range(COUNT)])
        put(store, tombstone(COUNT, ids[7]))
        while store.maintain():
            pass
    return tmp_path


def nearest(store: MemoryStore, number: int) -> list[bytes]:
    vector = np.frombuffer(codes_of(number), np.int8).astype(np.float32)
    return [hit.id for hit in store.search(Query(10, vector, FINGERPRINT), T0).hits]


def edit(root: Path, query: str, *cells: object) -> None:
    connection = sqlite3.connect(root / "memory.db")
    with connection:
        connection.execute(query, cells)
    connection.close()


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 0xFF
    path.write_bytes(data)


def zero_tail(path: Path, share: float) -> None:
    data = path.read_bytes()
    kept = int(len(data) * share)
    path.write_bytes(data[:kept] + bytes(len(data) - kept))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("kind", ["codes", "index"])
@pytest.mark.parametrize(
    "harm",
    [lambda path: flip(path, 1000), lambda path: zero_tail(path, 0.3), cut, lambda path: path.write_bytes(b""), Path.unlink],
    ids=["flipped", "zero tail", "cut", "empty", "missing"],
)
def test_a_derived_file_is_made_anew_and_that_is_said(filled: Path, kind: str, harm: Callable[[Path], None]) -> None:
    with open_store(filled) as store:
        assert store.notices == []
        before = [nearest(store, number) for number in range(20)]
        assert store.stats().spaces[0].indexed == COUNT
    (path,) = (filled / kind).iterdir()
    harm(path)
    with open_store(filled) as store:
        assert [path.name in notice for notice in store.notices] == [True]
        assert [nearest(store, number) for number in range(20)] == before
        while store.maintain():
            pass
        assert store.stats().spaces[0].indexed == COUNT
        assert store.verify().repaired == ()
    with open_store(filled) as store:
        assert store.notices == []


def test_harm_behind_the_last_whole_page_of_codes_goes_unsaid_and_undone(filled: Path) -> None:
    (path,) = (filled / "codes").iterdir()
    flip(path, (COUNT - 1) * 16)
    with open_store(filled) as store:
        assert nearest(store, COUNT - 1)[0] == store.heads(COLLECTION, 2)[1]


@pytest.mark.parametrize("harm", ["UPDATE body SET data = ? WHERE number = 5", "UPDATE body SET content = ? WHERE number = 5"])
def test_a_damaged_body_is_forgotten_and_can_be_had_again(filled: Path, harm: str) -> None:
    edit(filled, harm, b"nonsense")
    blocks = [plain(number) for number in range(COUNT)]
    again = arrival(signed(blocks))
    identifier = again.opened[4].id
    with open_store(filled) as store:
        with pytest.raises(LocalError, match="damaged"):
            store.get(identifier)
        assert store.known([identifier]) == set()
        assert store.get(identifier) is None
        others = [opened.id for opened in again.opened if opened.id != identifier]
        served = [opened.id for batch in store.batches(others, 1 << 20) for opened in open_batch(batch)]
        assert len(served) == COUNT - 2
        assert identifier not in nearest(store, 4)
        assert store.put([again], rules) == [identifier]
        assert nearest(store, 4)[0] == identifier
        assert [hit.id for hit in store.search(Query(text="number4"), T0).hits] == [identifier]
    with open_store(filled) as store:
        assert store.get(identifier) is not None
        assert len(store.verify().repaired) == 1  # the words of the damaged one were left behind
        assert store.verify().repaired == ()


@pytest.mark.parametrize(
    "harm",
    [
        "UPDATE block SET created_ms = created_ms + 1 WHERE number = 5",
        "UPDATE block SET state = 1 WHERE number = 5",
        "UPDATE block SET id = x'00' WHERE number = 5",
        "UPDATE block SET author = 999 WHERE number = 5",
        "DELETE FROM body WHERE number = 5",
    ],
)
def test_a_sweep_finds_what_does_not_fit_its_hash(filled: Path, harm: str) -> None:
    edit(filled, harm)
    steps = []
    with open_store(filled) as store:
        report = store.verify(progress=lambda done, total: steps.append((done, total)))
        assert report.checked == COUNT + 1
        assert len(report.damaged) == 1
        assert store.notices
        assert store.verify().damaged == ()
    assert steps[-1] == (COUNT + 1, COUNT + 1)


def test_a_damaged_proof_is_not_served(filled: Path) -> None:
    edit(filled, "UPDATE batch SET signature = zeroblob(64) WHERE number = 1")
    with open_store(filled) as store:
        ids = [item.id for item in store.items(COLLECTION)]
        assert len([opened for batch in store.batches(ids, 1 << 20) for opened in open_batch(batch)]) == 1


def test_words_and_codes_that_do_not_agree_are_made_anew(filled: Path) -> None:
    edit(filled, "INSERT INTO words (words) VALUES ('delete-all')")
    edit(filled, "UPDATE code SET block = 11 WHERE row = 200")
    with open_store(filled) as store:
        assert store.search(Query(text="number9"), T0).hits == ()
        assert store.notices  # the page's hash covers which blocks it is of
        assert "the full-text index" in store.verify().repaired
        assert len(store.search(Query(text="number9"), T0).hits) == 1
        assert store.verify().repaired == ()


def test_damaged_receipts_and_documents(filled: Path) -> None:
    with open_store(filled) as store:
        store.put_receipts([(b"b" * 32, b"w" * 32, b"receipt")])
        store.put_document("key", b"k", b"document")
    edit(filled, "UPDATE receipt SET data = x'00'")
    edit(filled, "UPDATE document SET data = x'00'")
    with open_store(filled) as store:
        assert store.receipts(b"b" * 32) == {}
        assert store.put_receipts([(b"b" * 32, b"w" * 32, b"receipt")]) == 1
        for read in (lambda: store.document("key", b"k"), lambda: store.documents("key")):
            with pytest.raises(LocalError, match="damaged"):
                read()


def test_a_damaged_vector_of_another_model_is_wanted_again(filled: Path) -> None:
    other = b"2" * 32
    with open_store(filled) as store:
        wanted = store.missing_vectors(COLLECTION, other, 5)
        assert store.add_vectors(COLLECTION, other, "second", [VectorRow(each, 9, codes_of(1, 8)) for each in wanted]) == 5
    edit(filled, "UPDATE vector SET codes = zeroblob(8) WHERE block = (SELECT min(block) FROM vector)")
    with open_store(filled) as store:
        ones = np.frombuffer(codes_of(1, 8), np.int8).astype(np.float32)
        assert [hit.id for hit in store.search(Query(9, ones, other), T0).hits] == sorted(wanted[1:])

"""A promise and a version are there after a crash, and what the disk changed is not believed."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexus.core.errors import CapacityError, LocalError
from nexus.core.keys import Identity
from nexus.storage import fragments as fragments_module
from nexus.storage.fragments import FragmentStore, history_of, open_fragment_store
from nexus.swarm.fragments import VERSIONS_KEPT, Promise, Publication, SignedPublication, Taken

ONE, OTHER = Identity(b"1" * 32), Identity(b"2" * 32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fragments.db"


@pytest.fixture
def store(path: Path) -> Iterator[FragmentStore]:
    store = FragmentStore(path)
    yield store
    store.close()


def promise(name: str = "nano", **changed: int) -> Promise:
    values = {"auto": 1, "start": 0, "end": 0, "memory_max": 5, "disk_max": 6, "upload_max": 7, "preload": 1} | changed
    return Promise(name, ONE.public_key, b"r" * 32, **values, taken=(Taken(b"r" * 32, 2, 4),))


def version(number: int, name: str = "nano", publisher: Identity = ONE) -> SignedPublication:
    return SignedPublication.sign(Publication(publisher.public_key, name, number, bytes([number % 256]) * 32), publisher)


def test_a_promise_survives_and_is_replaced_by_name(store: FragmentStore, path: Path) -> None:
    store.put(promise())
    store.put(promise("other"))
    store.put(promise(memory_max=9))
    store.close()
    store = open_fragment_store(path)
    assert store.promises() == [promise(memory_max=9), promise("other")]
    store.end("nano")
    store.end("nano")
    assert store.promises() == [promise("other")]
    store.close()


def test_what_was_acknowledged_is_there_when_the_process_is_killed(path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from nexus.storage.fragments import FragmentStore
from tests.storage.test_fragments import promise, version
store = FragmentStore(Path({str(path)!r}))
store.put(promise())
store.add_versions([version(1), version(2)])
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -9
    store = open_fragment_store(path)
    assert store.promises() == [promise()]
    assert store.all_versions() == [version(1), version(2)]
    store.close()


def test_promises_have_a_bound(store: FragmentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragments_module, "PROMISES_MAX", 2)
    store.put(promise("a"))
    store.put(promise("b"))
    store.put(promise("b", memory_max=1))
    with pytest.raises(CapacityError):
        store.put(promise("c"))


def test_versions_are_kept_in_order_by_publisher_and_name_and_the_oldest_go(store: FragmentStore) -> None:
    store.add_versions([version(3), version(1), version(1, publisher=OTHER), version(2, "other")])
    assert [one.version for one in history_of(store, ONE.public_key, "nano")] == [1, 3]
    assert history_of(store, OTHER.public_key, "nano") == [version(1, publisher=OTHER).publication]
    store.add_versions(version(number) for number in range(4, VERSIONS_KEPT + 10))
    kept = [one.version for one in history_of(store, ONE.public_key, "nano")]
    assert kept == list(range(10, VERSIONS_KEPT + 10))
    assert len(history_of(store, ONE.public_key, "other")) == 1
    store.forget_versions(ONE.public_key, "nano")
    assert history_of(store, ONE.public_key, "nano") == []


def test_of_two_versions_with_one_number_the_first_counts(store: FragmentStore) -> None:
    second = SignedPublication.sign(Publication(ONE.public_key, "nano", 1, b"x" * 32), ONE)
    store.add_versions([version(1)])
    store.add_versions([second])
    assert store.versions(ONE.public_key, "nano") == [version(1)]


def test_histories_have_a_bound(store: FragmentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragments_module, "HISTORIES_MAX", 1)
    store.add_versions([version(1), version(2)])
    with pytest.raises(CapacityError):
        store.add_versions([version(1, "other")])
    assert len(store.all_versions()) == 2


@pytest.mark.parametrize("table", ["promise", "version"])
def test_a_damaged_row_is_not_believed(store: FragmentStore, path: Path, table: str) -> None:
    store.put(promise())
    store.add_versions([version(1)])
    store.close()
    with sqlite3.connect(path) as connection:
        (content,) = connection.execute(f"SELECT content FROM {table}").fetchone()
        connection.execute(f"UPDATE {table} SET content = ?", (content[:-1] + bytes([content[-1] ^ 1]),))
    connection.close()
    with pytest.raises(LocalError, match="damaged"):
        open_fragment_store(path)

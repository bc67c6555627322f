"""Nothing that was acknowledged is lost, whenever the process is killed, the power fails or the disk is full.

SQLite's own part in this is its settings (`nexus.storage.database`); what is tried here is that the files beside it, and the order
of writes, never make less of them. NEXUS_CRASH_ROUNDS=200 (or more) makes a long test of a short one.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from nexus.core.errors import LocalError
from nexus.memory.block import CONTENT, Block, block_id, encode_block
from nexus.storage.memory.records import Arrival, Filters, Query, State, VectorRow
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

ROUNDS = int(os.environ.get("NEXUS_CRASH_ROUNDS", "15"))
PAGE = 32
SECOND = b"2" * 32


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages and indexes so small that some hundred blocks meet all of them."""
    for module in ("codes", "spaces", "upkeep", "store"):
        monkeypatch.setattr(f"nexus.storage.memory.{module}.PAGE_ROWS", PAGE)
    monkeypatch.setattr("nexus.storage.memory.index.INDEX_FROM", 50)
    monkeypatch.setattr("nexus.storage.memory.index._ADDED_AT_ONCE", 16)


class Life:
    """What a node does with its store, at random. `begun`, `done`: told (number, kind, ids) before and after each step."""

    def __init__(self, store: MemoryStore, seed: int, told: Callable[[str], None]) -> None:
        self._store = store
        self._random = random.Random(seed)
        self._told = told
        self._next = 1 + max((item.number for item in store.items(COLLECTION)), default=0) * 1000
        self._live = [stored.id for stored in store.listing(Filters(kinds=(CONTENT,)), 10_000, T0)]

    def step(self) -> None:
        dice = self._random.random()
        if dice < 0.6 or not self._live:
            blocks = [self._block() for _ in range(self._random.randint(1, 24))]
            self._put(blocks)
            self._live += [_id(block) for block in blocks]
        elif dice < 0.75:
            gone = self._live.pop(self._random.randrange(len(self._live)))
            self._next += 1
            self._put([tombstone(self._next, gone)], f"removed {gone.hex()}")
        elif dice < 0.85:
            wanted = self._store.missing_vectors(COLLECTION, SECOND, 20)
            self._store.add_vectors(COLLECTION, SECOND, "second", [VectorRow(each, 1, codes_of(each[0], 8)) for each in wanted])
        else:
            self._store.maintain()

    def _put(self, blocks: list[Block], also: str = "") -> None:
        ids = " ".join(_id(block).hex() for block in blocks)
        self._told(f"begun {ids}")
        put(self._store, *blocks)
        self._told(f"done {ids}")
        if also:
            self._told(also)

    def _block(self) -> Block:
        self._next += 1
        parents = self._random.choice(self._live) if self._live and self._random.random() < 0.1 else b""
        return plain(self._next, parents=parents, tags=("t",) if self._random.random() < 0.3 else ())


class Told:
    """What is known of the store from outside."""

    def __init__(self) -> None:
        self.done: set[bytes] = set()
        self.removed: set[bytes] = set()
        self.open: list[set[bytes]] = []

    def take(self, line: str) -> None:
        kind, *words = line.split()
        ids = {bytes.fromhex(word) for word in words}
        if kind == "begun":
            self.open.append(ids)
        elif kind == "done":
            self.done |= ids
            self.open.remove(ids)
        else:
            self.removed |= ids

    def check(self, store: MemoryStore) -> None:
        """Everything done is there, everything begun is there or is not, and all that is made of it agrees."""
        assert store.notices == []
        listed = [item.id for item in store.items(COLLECTION)]
        assert len(listed) == len(set(listed))
        assert set(listed) >= self.done
        for ids in self.open:
            assert len(ids & set(listed)) in (0, len(ids))
            self.done |= ids & set(listed)
        self.open.clear()
        assert set(listed) == self.done
        states = {item.id: item.state for item in store.items(COLLECTION)}
        assert all(states[identifier] == State.REMOVED for identifier in self.removed)
        report = store.verify()
        assert (report.damaged, report.repaired) == ((), ())
        self._search(store, [identifier for identifier in listed if states[identifier] == State.LIVE])

    def _search(self, store: MemoryStore, live: list[bytes]) -> None:
        for identifier in live[-3:]:
            stored = store.get(identifier)
            if stored is not None and stored.content is not None and stored.content.vectors:
                asked = np.frombuffer(stored.content.vectors[0].codes, np.int8).astype(np.float32)
                assert store.search(Query(1, asked, FINGERPRINT), T0).hits[0].id == identifier
                assert identifier in {hit.id for hit in store.search(Query(5, text=stored.content.text), T0).hits}


def _id(block: Block) -> bytes:
    return block_id(encode_block(block))


def _live_until_killed(root: Path, seed: int, pipe: int) -> None:
    with open_store(root) as store:
        life = Life(store, seed, lambda line: os.write(pipe, f"{line}\n".encode()) and None)
        while True:
            life.step()


def test_killed_at_any_time(tmp_path: Path) -> None:
    told = Told()
    dice = random.Random(ROUNDS)
    steps = 0
    for seed in range(ROUNDS):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(reading)
                _live_until_killed(tmp_path, seed, writing)
            finally:
                os._exit(1)  # only where something went wrong; the parent expects a kill
        os.close(writing)
        with os.fdopen(reading, "rb") as lines:
            for _ in range(dice.randint(1, 30)):
                told.take(lines.readline().decode())
                steps += 1
            time.sleep(dice.random() * 0.01)  # any moment will do
            os.kill(child, signal.SIGKILL)
            for line in lines:
                if line.endswith(b"\n"):
                    told.take(line.decode())
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        with open_store(tmp_path) as store:
            told.check(store)
    assert steps >= ROUNDS
    assert told.done


def _live(life: Life) -> None:
    for _ in range(1000):
        life.step()


def _maintain(store: MemoryStore) -> None:
    while store.maintain():
        pass


class PowerLossError(Exception):
    pass


class Disk:
    """Between the files of an open store, database apart, and the disk: what is not synced may be lost or torn with the power."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.left = -1
        self.full_after = -1
        self.calls = 0
        self._durable = {path: path.read_bytes() for path in root.glob("*/*")}
        self._pending: dict[Path, list[tuple[int, bytes]]] = {}
        self._renamed: dict[Path, bytes | None] = {}
        for name in ("pwrite", "fsync", "ftruncate", "replace"):
            monkeypatch.setattr(os, name, self._watched(getattr(os, name), getattr(self, f"_{name}")))

    def _watched(self, real: Callable[..., object], note: Callable[..., None]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            self.calls += 1
            if self.left == 0:
                raise PowerLossError
            self.left -= 1
            if self.full_after == 0 and real.__name__ in ("pwrite", "ftruncate"):
                raise OSError(errno.ENOSPC, "No space left on device")
            self.full_after -= 1
            note(*arguments)
            result = real(*arguments, **options)
            if real.__name__ == "fsync":
                self._synced(*arguments)  # type: ignore[arg-type]
            return result

        return call

    def _path(self, handle: int) -> Path:
        return Path(f"/proc/self/fd/{handle}").readlink()

    def _pwrite(self, handle: int, data: bytes, offset: int) -> None:
        self._pending.setdefault(self._path(handle), []).append((offset, bytes(data)))

    def _ftruncate(self, handle: int, size: int) -> None:
        self._pending.setdefault(self._path(handle), [])

    def _fsync(self, handle: int) -> None: ...

    def _replace(self, source: Path, target: Path) -> None:
        target = Path(target)
        self._renamed[target] = target.read_bytes() if target.exists() else None
        self._durable[target] = Path(source).read_bytes()

    def _synced(self, handle: int) -> None:
        path = self._path(handle)
        if path.is_dir():
            self._renamed = {target: before for target, before in self._renamed.items() if target.parent != path}
        else:
            self._durable[path] = path.read_bytes()
            self._pending.pop(path, None)

    def fail(self, copy: Path) -> None:
        """The directory as it is found after the power is back."""
        shutil.copytree(self.root, copy)
        for path, writes in self._pending.items():
            data = bytearray(self._durable.get(path, b""))
            size = path.stat().st_size if path.exists() and self.random.random() < 0.5 else len(data)
            data = data[:size].ljust(size, b"\0")
            for offset, written in writes:
                part = written[: self.random.randint(0, len(written))]
                if self.random.random() < 0.5 and offset + len(part) <= size:
                    data[offset : offset + len(part)] = part
            if path.exists():
                (copy / path.relative_to(self.root)).write_bytes(data)
        for target, before in self._renamed.items():
            if self.random.random() < 0.5:
                there = copy / target.relative_to(self.root)
                there.unlink(missing_ok=True)
                if before is not None:
                    there.write_bytes(before)


@pytest.mark.parametrize("seed", range(1 + ROUNDS // 5))
def test_power_fails_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    told = Told()
    root = tmp_path / "0"
    for number in range(3):
        with monkeypatch.context() as patch:
            store = open_store(root)
            disk = Disk(patch, root, seed * 100 + number)
            disk.left = disk.random.randint(5, 120)
            with pytest.raises(PowerLossError):
                _live(Life(store, seed * 100 + number, told.take))
            copy = tmp_path / str(number + 1)
            disk.left = -1
            disk.fail(copy)
            store._database.close()
        root = copy
        with open_store(root) as store:
            told.check(_without_notices_of_indexes(store))


def _without_notices_of_indexes(store: MemoryStore) -> MemoryStore:
    """An index file that is not the one that was last noted is made anew and said; nothing else may be said."""
    assert all(".usearch" in notice for notice in store.notices)
    store.notices.clear()
    _maintain(store)
    return store


@pytest.fixture
def half_full(tmp_path: Path) -> Iterator[MemoryStore]:
    with open_store(tmp_path / "store") as store:
        for at in range(0, 60, 20):
            put(store, *[plain(number, text="z" * 300) for number in range(at, at + 20)])
        yield store


def _takes(store: MemoryStore, more: Arrival) -> bool:
    """All of it or nothing, and that the disk is full is all there is to say."""
    try:
        return len(store.put([more], rules)) == len(more.opened)
    except LocalError as error:
        if "full" not in error.cause:
            raise
        return False


def _is_whole(store: MemoryStore, count: int) -> None:
    assert store.stats().blocks[State.LIVE] == count
    assert len(list(store.items(COLLECTION))) == count
    report = store.verify()
    assert (report.checked, report.damaged, report.repaired) == (count, (), ())
    asked = np.frombuffer(codes_of(7), np.int8).astype(np.float32)
    assert store.search(Query(1, asked, FINGERPRINT), T0).hits[0].score > 0.999999


def test_full_at_every_page_of_the_database(half_full: MemoryStore) -> None:
    more = arrival(signed([plain(number, text="w" * 900) for number in range(100, 120)]))
    pages = int(half_full._database.rows("PRAGMA page_count")[0][0])
    refused = 0
    for room in range(0, 200):
        half_full._database.rows(f"PRAGMA max_page_count = {pages + room}")
        if _takes(half_full, more):
            break
        refused += 1
        if room % 5 == 0:
            _is_whole(half_full, 60)
    assert refused > 5
    half_full._database.rows("PRAGMA max_page_count = 1000000")
    _is_whole(half_full, 80)


def test_full_at_every_write_of_a_file(half_full: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, half_full.root, 0)
    gone = [item.id for item in half_full.items(COLLECTION)][3]
    more = arrival(signed([*[plain(number) for number in range(100, 140)], tombstone(200, gone)]))
    refused = 0
    for room in range(50):
        disk.full_after = room
        if _takes(half_full, more):
            break
        refused += 1
        disk.full_after = -1
        _is_whole(half_full, 60)
    assert refused >= 2
    disk.full_after = -1
    report = half_full.verify()
    assert (report.checked, report.damaged, report.repaired) == (101, (), ())


def test_a_full_disk_costs_an_index_and_nothing_else(half_full: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("nexus.storage.memory.index.os.fsync", full)
        with pytest.raises(LocalError, match="full"):
            _maintain(half_full)
    _is_whole(half_full, 60)
    assert not list((half_full.root / "index").glob("*.tmp"))
    _maintain(half_full)
    assert half_full.stats().spaces[0].indexed == 60

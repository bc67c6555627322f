"""An entry that was acknowledged is there after a crash, and no number is ever given out twice."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nexus.core.errors import LocalError
from nexus.core.keys import Identity
from nexus.proof.accounts import Fork, Share, SignedEntry
from nexus.storage import ledger as ledger_module
from nexus.storage.ledger import LedgerStore
from nexus.swarm.ledger import Account, Cost, check_chain, earn_entry, pay_entry

OWNER, OTHER = Identity(b"o" * 32), Identity(b"p" * 32)
SESSION = b"s" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def store(path: Path) -> Iterator[LedgerStore]:
    store = LedgerStore(path, OWNER.public_key)
    yield store
    store.close()


def pay(account: Account, owner: Identity, to: Identity, amount: int = 100) -> SignedEntry:
    entry = pay_entry(account, SESSION, Cost(amount, (Share(to.public_key, amount * 90 // 100),)))
    account.apply(entry)
    return SignedEntry.sign(entry, owner)


def filled(store: LedgerStore) -> tuple[Account, list[tuple[SignedEntry, SignedEntry | None]]]:
    """A PAY entry and an EARN entry."""
    own, other = Account(OWNER.public_key), Account(OTHER.public_key)
    paid, received = pay(own, OWNER, OTHER), pay(other, OTHER, OWNER)
    store.append(paid)
    earned = SignedEntry.sign(earn_entry(own, received.entry), OWNER)
    own.apply(earned.entry, received.entry)
    store.append(earned, received)
    return own, [(paid, None), (earned, received)]


def test_the_chain_survives_and_checks(store: LedgerStore, path: Path) -> None:
    own, items = filled(store)
    store.close()
    store = LedgerStore(path, OWNER.public_key)
    assert store.chain(0, 10) == items
    assert store.chain(1, 10) == store.last(1) == items[1:]
    assert store.entries() == 2
    again = Account(OWNER.public_key)
    check_chain(again, store.chain(0, 10))
    assert again == own
    assert store.earning_of(items[1][0].entry.payment) == items[1][0]
    assert store.earning_of(b"x" * 32) is None
    store.close()


def test_a_number_is_given_out_once(store: LedgerStore) -> None:
    _, items = filled(store)
    second = pay(Account(OWNER.public_key), OWNER, OTHER, 200)
    with pytest.raises(LocalError, match="not the next one"):
        store.append(second)
    assert store.chain(0, 10) == items
    assert [signed for signed, _ in store.offers(10)] == [items[0][0]]


def test_payments_are_offered_until_they_are_taken(store: LedgerStore, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ((paid, _), _) = filled(store)
    assert store.offers(10) == [(paid, OTHER.public_key)]
    store.delivered(0, OTHER.public_key)
    assert store.offers(10) == []


def test_another_nodes_ledger_is_refused(store: LedgerStore, path: Path) -> None:
    filled(store)
    store.close()
    with pytest.raises(LocalError, match="another node"):
        LedgerStore(path, OTHER.public_key)
    LedgerStore(path, OWNER.public_key).close()


@pytest.mark.parametrize("damage", ["UPDATE chain SET content = payment WHERE seq = 1", "DELETE FROM chain WHERE seq = 0"])
def test_damage_is_noticed(store: LedgerStore, path: Path, damage: str) -> None:
    filled(store)
    store.close()
    connection = sqlite3.connect(path)
    connection.execute(damage)
    connection.commit()
    connection.close()
    store = LedgerStore(path, OWNER.public_key)
    with pytest.raises(LocalError, match="damaged"):
        store.chain(0, 10)
    store.close()


def test_what_contradicts_an_entry_seen_before_is_found(store: LedgerStore, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (pay(Account(OTHER.public_key), OTHER, OWNER, amount) for amount in (100, 200))
    assert store.note_seen([one]) is None
    assert store.note_seen([one, replace(one, signature=bytes(64))]) is None
    fork = store.note_seen([other])
    assert fork == Fork.of(one, other)
    assert fork.check() == OTHER.public_key
    assert store.newest_seen(OTHER.public_key) == one
    assert store.newest_seen(OWNER.public_key) is None
    monkeypatch.setattr(ledger_module, "SEEN_MAX", 1)
    store.note_seen([pay(Account(OWNER.public_key), OWNER, OTHER)])
    assert store.newest_seen(OTHER.public_key) is None


def test_tabs_survive(store: LedgerStore) -> None:
    store.put_tabs([(OWNER.public_key, 5), (OTHER.public_key, 7)])
    store.put_tabs([(OTHER.public_key, 6)])
    assert store.tabs() == {OTHER.public_key: 6}


_WRITER = """
import sys
from pathlib import Path
from tests.storage.test_ledger import OTHER, OWNER, pay
from nexus.storage.ledger import LedgerStore
from nexus.swarm.ledger import Account
store, own = LedgerStore(Path(sys.argv[1]), OWNER.public_key), Account(OWNER.public_key)
while True:
    store.append(pay(own, OWNER, OTHER))
    print(own.entries, flush=True)
"""


def test_what_was_acknowledged_is_there_after_a_kill(path: Path) -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert process.stdout is not None
    acknowledged = 0
    for line in process.stdout:
        acknowledged = int(line)
        if acknowledged >= 20:
            process.kill()
            break
    acknowledged = max([acknowledged, *(int(line) for line in process.stdout if line.endswith(b"\n"))])
    process.wait()
    process.stdout.close()
    store = LedgerStore(path, OWNER.public_key)
    assert acknowledged <= store.entries() <= acknowledged + 1
    check_chain(Account(OWNER.public_key), store.chain(0, 10**6))
    store.close()


def test_a_full_disk_keeps_what_was_there_and_goes_on_when_there_is_room(store: LedgerStore) -> None:
    connection, own = store._database._connection, Account(OWNER.public_key)
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    signed = pay(own, OWNER, OTHER)

    def fill_the_disk() -> None:
        nonlocal signed
        while True:
            store.append(signed)
            signed = pay(own, OWNER, OTHER)

    with pytest.raises(LocalError, match="disk is full"):
        fill_the_disk()
    assert store.entries() == signed.entry.seq
    connection.execute("PRAGMA max_page_count = 100000")
    store.append(signed)
    check_chain(Account(OWNER.public_key), store.chain(0, 1000))
    assert store.entries() == own.entries

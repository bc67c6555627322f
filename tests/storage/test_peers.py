"""The address book survives restarts, bounds itself, and never takes the daemon down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import LocalError, MalformedError
from nexus.core.keys import peer_id_of
from nexus.storage.peers import AddressBook, KnownPeer


def peer(number: int) -> str:
    return peer_id_of(number.to_bytes(32, "big"))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 65535), st.integers(0, 2**53 - 1)), max_size=20))
def test_what_is_saved_is_there_again(tmp_path_factory: pytest.TempPathFactory, notes: list[tuple[int, int, int]]) -> None:
    path = tmp_path_factory.mktemp("home") / "peers.json"
    book = AddressBook.open(path)
    for number, port, now_ms in notes:
        book.remember(peer(number), (f"/ip4/192.0.2.7/tcp/{port}",), now_ms)
    book.save()
    again = AddressBook.open(path)
    assert again.peers() == book.peers()
    assert not again.warning


def test_the_last_seen_come_first_and_the_oldest_go(tmp_path: Path) -> None:
    book = AddressBook.open(tmp_path / "peers.json", peers_max=3)
    for number in range(6):
        book.remember(peer(number), ("/ip4/192.0.2.7/tcp/1",), 1000 - number if number == 5 else number)
    assert [entry.peer_id for entry in book.peers()] == [peer(5), peer(4), peer(3)]
    book.forget(peer(4))
    assert book.get(peer(4)) is None


def test_addresses_out_of_form_are_left_out_and_known_ones_kept(tmp_path: Path) -> None:
    book = AddressBook.open(tmp_path / "peers.json")
    book.remember(peer(1), ("/ip4/192.0.2.7/tcp/1", "no address", "/bad\n", "/" + "x" * 300), 5)
    book.remember(peer(1), (), 3)
    assert book.get(peer(1)) == KnownPeer(peer(1), ("/ip4/192.0.2.7/tcp/1",), 5)
    with pytest.raises(MalformedError):
        book.remember("not a peer", (), 5)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"spec": 2, "peers": []}',
        b'{"spec": 1, "peers": [1]}',
        b"[" * 100_000,
        json.dumps({"spec": 1, "peers": [{"peer_id": "x", "addresses": [], "seen_ms": 1}]}).encode(),
        json.dumps({"spec": 1, "peers": [{"peer_id": peer(1), "addresses": ["x"], "seen_ms": 1}]}).encode(),
        json.dumps({"spec": 1, "peers": [{"peer_id": peer(1), "addresses": [], "seen_ms": -1}]}).encode(),
        json.dumps({"spec": 1, "peers": [{"peer_id": peer(1), "addresses": [], "seen_ms": True}]}).encode(),
        json.dumps({"spec": 1, "peers": [{"peer_id": peer(1), "addresses": []}]}).encode(),
    ],
)
def test_a_damaged_file_is_moved_aside_with_a_warning(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "peers.json"
    path.write_bytes(content)
    book = AddressBook.open(path)
    assert book.peers() == []
    assert "peers.json.damaged" in book.warning
    assert (tmp_path / "peers.json.damaged").read_bytes() == content
    book.remember(peer(1), (), 1)
    book.save()
    assert [entry.peer_id for entry in AddressBook.open(path).peers()] == [peer(1)]


def test_nothing_is_written_when_nothing_changed(tmp_path: Path) -> None:
    book = AddressBook.open(tmp_path / "peers.json")
    book.save()
    assert not (tmp_path / "peers.json").exists()


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "peers.json").mkdir()
    with pytest.raises(LocalError, match=r"peers\.json"):
        AddressBook.open(tmp_path / "peers.json")

"""Addresses from users and from strangers, and the book they are kept in."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import MalformedError, UsageError
from nexus.core.keys import Identity
from nexus.network.addresses import (
    ADDRESSES_PER_PEER_MAX,
    CIRCUITS_PER_PEER_MAX,
    FAILURES_MAX,
    AddressBook,
    Circuit,
    Endpoint,
    is_circuit,
    parse_address,
    parse_endpoint,
    parse_peer_address,
    valid_addresses,
)
from nexus.network.transport import PeerAddress

PEER = Identity(bytes(32)).peer_id


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("/ip4/127.0.0.1/tcp/4001", Endpoint("ip4", "127.0.0.1", 4001)),
        ("/ip6/::1/tcp/1", Endpoint("ip6", "::1", 1)),
        ("/ip6/2001:DB8::0:1/tcp/1", Endpoint("ip6", "2001:db8::1", 1)),
        ("/dns4/node.example.org/tcp/65535", Endpoint("dns4", "node.example.org", 65535)),
        ("/dns/localhost/tcp/0", Endpoint("dns", "localhost", 0)),
    ],
)
def test_good_endpoints(text: str, endpoint: Endpoint) -> None:
    assert parse_endpoint(text) == endpoint
    assert parse_endpoint(str(endpoint)) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "ip4/127.0.0.1/tcp/1",
        "/ip4/127.0.0.1",
        "/ip4/127.0.0.1/udp/1",
        "/ip4/127.0.0.1/tcp/65536",
        "/ip4/127.0.0.1/tcp/-1",
        "/ip4/127.0.0.1/tcp/٣",
        "/ip4/127.0.0.1/tcp/1/",
        "/ip4/127.0.0.1/tcp/1/ws",
        "/ip4/256.0.0.1/tcp/1",
        "/ip4/::1/tcp/1",
        "/ip6/127.0.0.1/tcp/1",
        "/dns4//tcp/1",
        "/dns4/a..b/tcp/1",
        "/dns4/-a/tcp/1",
        "/dns4/a b/tcp/1",
        "/unix/x/tcp/1",
        "/dns4/" + "a" * 300 + "/tcp/1",
    ],
)
def test_bad_endpoints(text: str) -> None:
    with pytest.raises(MalformedError):
        parse_endpoint(text)
    with pytest.raises(UsageError):
        parse_peer_address(f"{text}/p2p/{PEER}")
    assert valid_addresses([text]) == ()


@given(st.text(max_size=80))
def test_no_text_breaks_the_parser(text: str) -> None:
    assert len(valid_addresses([text, "/ip4/" + text, "/dns/" + text + "/tcp/1"])) <= 3
    with pytest.raises(UsageError):
        parse_peer_address(text)


def test_an_address_with_a_peer_id() -> None:
    assert parse_peer_address(f" /ip4/1.2.3.4/tcp/5/p2p/{PEER}\n") == (PEER, Endpoint("ip4", "1.2.3.4", 5))
    for bad in ("/ip4/1.2.3.4/tcp/5", "/ip4/1.2.3.4/tcp/5/p2p/Qm123", f"/ip4/1.2.3.4/tcp/0/p2p/{PEER}"):
        with pytest.raises(UsageError):
            parse_peer_address(bad)


def test_what_strangers_claim_is_filtered_and_cut() -> None:
    claims = ["/ip4/0.0.0.0/tcp/1", "/ip6/::/tcp/1", "/ip4/1.1.1.1/tcp/0", f"/ip4/1.1.1.1/tcp/1/p2p/{PEER}", "/ip4/1.1.1.1/tcp/1"]
    assert valid_addresses(claims) == ("/ip4/1.1.1.1/tcp/1",)
    assert len(valid_addresses([f"/ip4/1.1.1.1/tcp/{port}" for port in range(1, 100)])) == ADDRESSES_PER_PEER_MAX


RELAY = Identity(b"\1" * 32).peer_id
VIA = f"/ip4/1.2.3.4/tcp/5/p2p/{RELAY}/p2p-circuit"


def test_an_address_through_a_relay() -> None:
    circuit = Circuit(Endpoint("ip4", "1.2.3.4", 5), RELAY)
    assert parse_address(VIA) == circuit
    assert str(circuit) == VIA
    assert parse_peer_address(f"{VIA}/p2p/{PEER}") == (PEER, circuit)
    assert is_circuit(VIA)
    assert is_circuit(f"{VIA}/p2p/{PEER}")
    assert not is_circuit("/ip4/1.2.3.4/tcp/5")
    assert valid_addresses([f"{VIA}/p2p/{PEER}", VIA, "/ip4/1.2.3.4/tcp/5"]) == (VIA, "/ip4/1.2.3.4/tcp/5")


@pytest.mark.parametrize(
    "text",
    [
        "/p2p-circuit",
        "/ip4/1.2.3.4/tcp/5/p2p-circuit",
        "/ip4/1.2.3.4/tcp/5/p2p/Qm123/p2p-circuit",
        f"/p2p/{RELAY}/p2p-circuit",
        f"/ip4/1.2.3.4/tcp/0/p2p/{RELAY}/p2p-circuit",
        f"{VIA}/p2p/{RELAY}/p2p-circuit",
        VIA.replace("tcp", "udp"),
        VIA * 3,
    ],
)
def test_bad_addresses_through_a_relay(text: str) -> None:
    with pytest.raises(UsageError):
        parse_peer_address(f"{text}/p2p/{PEER}")
    # Two relays in a row are cut to the first; nothing else of this is an address.
    assert valid_addresses([text]) in ((), (VIA,))


def test_nobody_is_their_own_relay() -> None:
    with pytest.raises(UsageError):
        parse_peer_address(f"{VIA}/p2p/{RELAY}")


def test_a_peer_cannot_name_any_number_of_relays() -> None:
    relays = [VIA.replace("tcp/5", f"tcp/{port}") for port in range(1, 9)]
    direct = "/ip4/1.2.3.4/tcp/5"
    assert valid_addresses([*relays, direct]) == (*relays[:CIRCUITS_PER_PEER_MAX], direct)


def addresses(*ports: int) -> tuple[str, ...]:
    return tuple(f"/ip4/1.1.1.1/tcp/{port}" for port in ports)


def test_the_newest_addresses_come_first_and_failures_last() -> None:
    book = AddressBook()
    book.learn(PeerAddress("p", addresses(1, 2)))
    book.learn(PeerAddress("p", addresses(3)))
    assert book.addresses("p") == addresses(3, 1, 2)
    book.failed("p", addresses(3)[0])
    assert book.addresses("p") == addresses(1, 2, 3)
    book.succeeded("p", addresses(3)[0])
    assert book.addresses("p") == addresses(3, 1, 2)
    for _ in range(FAILURES_MAX):
        book.failed("p", addresses(1)[0])
    assert book.addresses("p") == addresses(3, 2)
    book.failed("unknown", "x")


@given(st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(1, 60), max_size=12)), max_size=40))
def test_the_book_is_bounded(lessons: list[tuple[int, list[int]]]) -> None:
    book = AddressBook(peers_max=5)
    for peer, ports in lessons:
        book.learn(PeerAddress(str(peer), addresses(*ports)))
        assert len(book) <= 5
        if ports:
            assert book.addresses(str(peer))[0] == addresses(*ports)[0]
        assert len(book.addresses(str(peer))) <= ADDRESSES_PER_PEER_MAX


def test_peer_ids_of_other_key_types_are_refused() -> None:
    with pytest.raises(UsageError):
        parse_peer_address("/ip4/1.1.1.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")
    assert Identity(os.urandom(32)).peer_id.startswith("12D3Koo")

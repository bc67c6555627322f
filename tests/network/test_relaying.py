"""What a relay grants: places, circuits, bytes, requests; pure."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nexus.network.relaying import Client, RelayLedger, RelayLimits

LIMITS = RelayLimits(reservations=4, reservations_per_ip=2, circuits=5, circuits_per_peer=2, circuits_per_ip=3, requests_burst=3)


def client(number: int, ip: int = 0) -> Client:
    return Client(f"peer{number}", f"10.0.0.{ip}")


def test_places_are_counted_per_address_and_in_all() -> None:
    ledger = RelayLedger(LIMITS)
    assert ledger.reserve(client(1, 1), 0.0) == ""
    assert ledger.reserve(client(2, 1), 0.0) == ""
    assert "IP address" in ledger.reserve(client(3, 1), 0.0)
    assert ledger.reserve(client(2, 1), 1.0) == ""  # renewed, not counted again
    assert [ledger.reserve(client(number, number), 0.0) for number in (4, 5)] == ["", ""]
    assert ledger.reserve(client(6, 6), 0.0) != ""
    assert ledger.reservations == 4


def test_places_end() -> None:
    ledger = RelayLedger(LIMITS)
    ledger.reserve(client(1), 0.0)
    assert ledger.has_place("peer1", LIMITS.reservation_s - 1)
    assert not ledger.has_place("peer1", LIMITS.reservation_s + 1)
    assert not ledger.has_place("peer2", 0.0)
    ledger.reserve(client(2), LIMITS.reservation_s + 1)
    assert ledger.reservations == 1
    ledger.release("peer2")
    ledger.release("peer2")
    assert ledger.reservations == 0


def test_two_behind_one_address_count_once_for_it() -> None:
    ledger = RelayLedger(RelayLimits(circuits_per_ip=1))
    assert ledger.open(client(1, 1), client(2, 1)) == ""
    assert ledger.open(client(3, 1), client(4, 2)) != ""
    ledger.close(client(1, 1), client(2, 1))
    assert ledger.open(client(3, 1), client(4, 2)) == ""


def test_requests_are_paced() -> None:
    ledger = RelayLedger(LIMITS)
    assert [ledger.may_ask(client(1, 1), 0.0) for _ in range(4)] == [True, True, True, False]
    assert not ledger.may_ask(client(2, 1), 0.0)  # another identity of the same address
    assert ledger.may_ask(client(3, 2), 0.0)
    assert ledger.may_ask(client(1, 1), 2.0 / LIMITS.requests_per_peer_s)


def test_bytes_slow_down_all_that_share_a_peer_or_an_address() -> None:
    ledger = RelayLedger(RelayLimits(bytes_per_peer_s=1000))
    assert ledger.delay_s(client(1, 1), client(2, 2), 1000, 0.0) == 0.0
    assert ledger.delay_s(client(1, 1), client(3, 3), 500, 0.0) == 0.5
    assert ledger.delay_s(client(9, 2), client(8, 8), 500, 0.0) == 0.5
    assert ledger.delay_s(client(7, 7), client(6, 6), 500, 0.0) == 0.0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 5)), max_size=60))
def test_no_order_of_opening_and_closing_goes_over_a_bound(steps: list[tuple[bool, int, int]]) -> None:
    ledger = RelayLedger(LIMITS)
    running: list[tuple[Client, Client]] = []
    for opens, one, other in steps:
        pair = (client(one, one % 3), client(other, other % 3))
        if opens and not ledger.open(*pair):
            running.append(pair)
        elif running:
            ledger.close(*running.pop())
        assert ledger.circuits == len(running) <= LIMITS.circuits
        for number in range(6):
            mine = [pair for pair in running if any(end.peer_id == f"peer{number}" for end in pair)]
            assert len(mine) <= LIMITS.circuits_per_peer
        for ip in range(3):
            assert sum(any(end.ip == f"10.0.0.{ip}" for end in pair) for pair in running) <= LIMITS.circuits_per_ip
    for pair in running:
        ledger.close(*pair)
    assert ledger._circuits == {}

"""Bounds per peer, in pure arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.network.limits import PEERS_REMEMBERED, STRIKES_FORGOTTEN_S, STRIKES_MAX, PeerLimits, TokenBucket, TokenTable
from nexus.network.transport import ProtocolSpec

SPEC = ProtocolSpec("/t/1", frame_max=1, streams_per_peer_max=2, bytes_per_peer_s=100)


@given(
    rate=st.floats(1, 1e6),
    burst=st.floats(1, 1e6),
    takes=st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 100)), min_size=1, max_size=50),
)
def test_whoever_waits_as_told_never_exceeds_rate_and_burst(rate: float, burst: float, takes: list[tuple[float, float]]) -> None:
    bucket = TokenBucket(rate, burst, 0.0)
    now_s = total = 0.0
    for amount, pause_s in takes:
        now_s += bucket.take(amount, now_s) + pause_s
        total += amount
        assert total <= burst + rate * now_s + 1e-3 * max(1.0, total)


def test_streams_are_counted_per_peer_and_protocol() -> None:
    limits = PeerLimits()
    other = ProtocolSpec("/t/2", frame_max=1, streams_per_peer_max=1)
    assert [limits.admit("a", SPEC) for _ in range(3)] == [True, True, False]
    assert limits.admit("b", SPEC)
    assert limits.admit("a", other)
    limits.release("a", SPEC)
    assert limits.admit("a", SPEC)
    assert not limits.admit("a", SPEC)


def test_peers_that_are_gone_are_forgotten_and_those_with_streams_are_not() -> None:
    limits = PeerLimits()
    assert limits.admit("kept", SPEC)
    assert limits.admit("kept", SPEC)
    for number in range(3 * PEERS_REMEMBERED):
        assert limits.admit(str(number), SPEC)
        limits.release(str(number), SPEC)
    assert not limits.admit("kept", SPEC)
    assert len(limits._uses) <= PEERS_REMEMBERED + 1


def test_reopening_a_stream_does_not_refill_the_budget() -> None:
    limits = PeerLimits()
    assert limits.delay_s("a", SPEC, 100, 0.0) == 0
    limits.admit("a", SPEC)
    limits.release("a", SPEC)
    assert limits.delay_s("a", SPEC, 100, 0.0) == pytest.approx(1.0)


def test_strikes_add_up_and_fade() -> None:
    limits = PeerLimits()
    assert [limits.strike("a", 0.0) for _ in range(STRIKES_MAX + 1)] == [False] * STRIKES_MAX + [True]
    slow = PeerLimits()
    assert not any(slow.strike("b", number * STRIKES_FORGOTTEN_S / 4) for number in range(100))
    for number in range(3 * PEERS_REMEMBERED):
        slow.strike(str(number), 0.0)
    assert len(slow._strikes) <= PEERS_REMEMBERED


def test_frames_are_paced_as_well_as_bytes() -> None:
    limits, spec = PeerLimits(), ProtocolSpec("/t/1", frame_max=10, bytes_per_peer_s=1000, frames_per_peer_s=5)
    assert [limits.delay_s("p", spec, 1, 0.0) for _ in range(10)] == [0.0] * 10
    assert limits.delay_s("p", spec, 1, 0.0) == 0.2
    assert limits.delay_s("q", spec, 2000, 0.0) == 1.0


def test_a_table_of_buckets_is_bounded_and_counts_for_all_keys_or_none() -> None:
    table = TokenTable(1.0, 2.0, keys_max=3)
    assert [table.may(("a", "b"), 0.0) for _ in range(3)] == [True, True, False]
    assert not table.may(("b", "c"), 0.0)
    assert table.may(("c",), 0.0)
    for number in range(10):
        table.may((str(number),), 0.0)
    assert len(table) == 3

"""What follows from what peers saw and tried: never more than that."""

from __future__ import annotations

import pytest

from nexus.network.addresses import Endpoint
from nexus.network.reachability import (
    LOCAL_ONLY,
    LOOPBACK,
    MAPPING_DEPENDENT,
    MAPPING_INDEPENDENT,
    MAPPING_NONE,
    MAPPING_UNKNOWN,
    PRIVATE,
    PUBLIC,
    REACHABLE,
    UNKNOWN,
    UNREACHABLE,
    DialBack,
    Observation,
    advise,
    judge,
    mapping_of,
    scope_of,
)


def tried(peer: int, result: str, scope: str = PUBLIC) -> tuple[str, DialBack]:
    return scope, DialBack(f"peer{peer}", "/ip4/198.51.100.7/tcp/4510", result)


@pytest.mark.parametrize(
    ("host", "scope"),
    [
        ("127.0.0.1", LOOPBACK),
        ("::1", LOOPBACK),
        ("192.168.1.4", PRIVATE),
        ("10.1.1.1", PRIVATE),
        ("100.64.0.9", PRIVATE),  # carrier-grade NAT
        ("169.254.1.1", PRIVATE),
        ("fd00::1", PRIVATE),
        ("8.8.8.8", PUBLIC),
        ("2606:4700::1111", PUBLIC),
        ("node.example.org", PUBLIC),
    ],
)
def test_scopes(host: str, scope: str) -> None:
    assert scope_of(host) == scope


@pytest.mark.parametrize(
    ("evidence", "verdict"),
    [
        ([], (UNKNOWN, "")),
        (
            [
                tried(1, "refused"),
                tried(2, "refused"),
            ],
            (UNKNOWN, ""),
        ),
        (
            [tried(1, "ok")],
            (REACHABLE, PUBLIC),
        ),
        (
            [tried(1, "failed")],
            (UNREACHABLE, PUBLIC),
        ),
        # Neighbours reach it; that says nothing about the Internet, and the one outside says no.
        (
            [
                tried(1, "ok", PRIVATE),
                tried(2, "ok", LOOPBACK),
            ],
            (LOCAL_ONLY, PRIVATE),
        ),
        (
            [
                tried(1, "ok", PRIVATE),
                tried(2, "failed"),
            ],
            (UNREACHABLE, PUBLIC),
        ),
        (
            [tried(1, "ok", LOOPBACK)],
            (LOCAL_ONLY, LOOPBACK),
        ),
        # Behind the NAT of a larger private network.
        (
            [
                tried(1, "failed", PRIVATE),
                tried(2, "ok", LOOPBACK),
            ],
            (UNREACHABLE, PRIVATE),
        ),
        # One that lies, or has a bad line, turns nothing round.
        (
            [
                tried(1, "ok"),
                tried(2, "ok"),
                tried(3, "failed"),
            ],
            (REACHABLE, PUBLIC),
        ),
        (
            [
                tried(1, "ok"),
                tried(2, "failed"),
                tried(3, "failed"),
            ],
            (UNREACHABLE, PUBLIC),
        ),
        # Two addresses, one of which is right.
        (
            [
                tried(1, "failed"),
                tried(1, "ok"),
            ],
            (REACHABLE, PUBLIC),
        ),
    ],
)
def test_verdicts(evidence: list[tuple[str, DialBack]], verdict: tuple[str, str]) -> None:
    assert judge(evidence) == verdict
    assert judge(evidence[::-1]) == verdict


def seen(peer_ip: str, local: int, host: str, port: int, *, reused: bool = True) -> Observation:
    return Observation("peer", peer_ip, Endpoint("ip4", "192.168.1.4", local), Endpoint("ip4", host, port), reused)


OWN = ["192.168.1.4", "127.0.0.1"]


@pytest.mark.parametrize(
    ("observations", "found"),
    [
        ([], ("unknown", MAPPING_UNKNOWN)),
        ([seen("8.8.8.8", 1, "192.168.1.4", 1)], ("none", MAPPING_NONE)),
        # One peer shows that there is a NAT, and not how it maps.
        ([seen("8.8.8.8", 1, "9.9.9.9", 1)], ("behind", MAPPING_UNKNOWN)),
        # Connections that left different ports say nothing, however their mapped ports look.
        (
            [seen("8.8.8.8", 1, "9.9.9.9", 1, reused=False), seen("8.8.4.4", 2, "9.9.9.9", 2, reused=False)],
            ("behind", MAPPING_UNKNOWN),
        ),
        ([seen("8.8.8.8", 1, "9.9.9.9", 7), seen("8.8.4.4", 1, "9.9.9.9", 7)], ("behind", MAPPING_INDEPENDENT)),
        ([seen("8.8.8.8", 1, "9.9.9.9", 7), seen("8.8.4.4", 1, "9.9.9.9", 8)], ("behind", MAPPING_DEPENDENT)),
        ([seen("8.8.8.8", 1, "9.9.9.9", 7), seen("8.8.8.8", 1, "9.9.9.9", 7)], ("behind", MAPPING_UNKNOWN)),
        # A neighbour sees no NAT; the one outside does.
        ([seen("192.168.1.9", 1, "192.168.1.4", 1), seen("8.8.8.8", 1, "9.9.9.9", 1)], ("behind", MAPPING_UNKNOWN)),
        ([seen("127.0.0.1", 1, "127.0.0.1", 1)], ("none", MAPPING_NONE)),
    ],
)
def test_mapping(observations: list[Observation], found: tuple[str, str]) -> None:
    assert mapping_of(observations, OWN) == found
    assert mapping_of(observations[::-1], OWN) == found


def test_a_neighbours_view_is_no_word_on_the_way_out() -> None:
    """Peers of the same private network see no NAT between; whether there is one to the Internet they cannot know, and `scope` of
    the verdict says so."""
    assert mapping_of([seen("192.168.1.9", 1, "192.168.1.4", 1)], OWN) == ("none", MAPPING_NONE)
    assert judge([tried(1, "ok", PRIVATE)]) == (LOCAL_ONLY, PRIVATE)


LISTEN = [Endpoint("ip4", "192.168.1.4", 4510)]


def advice(verdict: str, scope: str = PUBLIC, mapping: str = MAPPING_UNKNOWN, **given: int) -> str:
    counts = {"peers": 1, "relays": 0, "relay_candidates": 0} | given
    return " ".join(advise(verdict, scope, mapping, listen=LISTEN, **counts))


def test_advice_says_what_to_do() -> None:
    assert "Nothing to do" in advice(REACHABLE)
    assert "nexus peers add" in advice(UNKNOWN, "", peers=0)
    assert "cannot be told" in advice(LOCAL_ONLY, PRIVATE)
    assert "on this machine" in advice(LOCAL_ONLY, LOOPBACK)
    assert "forward TCP port 4510" in advice(UNREACHABLE)
    assert "network.relay = on" in advice(UNREACHABLE)
    assert "network.relay" not in advice(UNREACHABLE, relays=2)
    assert "2 relays" in advice(UNREACHABLE, relays=2)
    assert "hole punching will not work" in advice(UNREACHABLE, mapping=MAPPING_DEPENDENT)
    here_only = advise(
        LOCAL_ONLY, LOOPBACK, MAPPING_NONE, peers=1, listen=[Endpoint("ip4", "127.0.0.1", 1)], relays=0, relay_candidates=0
    )
    assert "network.listen" in here_only[0]

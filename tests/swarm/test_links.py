"""Coordinates find each other, liars move nobody far, and what was measured counts."""

from __future__ import annotations

import random
from math import hypot

from hypothesis import given
from hypothesis import strategies as st

from nexus.core.hashing import tagged_hash
from nexus.swarm.links import (
    COORDINATE_MAX_US,
    ERROR_MAX,
    ERROR_ONE,
    NOWHERE,
    RTT_DEFAULT_US,
    RTT_MAX_US,
    RTT_MIN_US,
    Coordinate,
    Links,
    distance_us,
    moved,
)

OWN, ONE, TWO = (bytes([number]) * 32 for number in (1, 2, 3))
FAR = Coordinate(COORDINATE_MAX_US, -COORDINATE_MAX_US, COORDINATE_MAX_US, COORDINATE_MAX_US, 0)
sides = st.integers(-COORDINATE_MAX_US, COORDINATE_MAX_US)
coordinates = st.builds(Coordinate, sides, sides, sides, st.integers(0, COORDINATE_MAX_US), st.integers(0, ERROR_MAX))


@given(coordinates, coordinates, st.integers(-1, 2**64), st.binary(min_size=32, max_size=32))
def test_whatever_is_said_or_measured_a_coordinate_is_sound_and_moves_a_bounded_step(
    own: Coordinate, other: Coordinate, rtt_us: int, way: bytes
) -> None:
    after = moved(own, other, rtt_us, way)
    assert Coordinate.from_bytes(after.to_bytes()) == after
    assert hypot(after.x - own.x, after.y - own.y, after.z - own.z) <= 100_002
    assert RTT_MIN_US <= distance_us(own, other) == distance_us(other, own) <= RTT_MAX_US


def settled(places: dict[bytes, tuple[float, float]], liars: frozenset[bytes] = frozenset()) -> dict[bytes, Links]:
    """Nodes on a plane (in microseconds) that measure each other over and over, with 10 % of noise."""
    rng = random.Random(4)
    links = {node: Links(node) for node in places}
    for _ in range(150):
        for node, own in links.items():
            for other in rng.sample(sorted(places.keys() - {node}), 4):
                rtt = hypot(*(a - b for a, b in zip(places[node], places[other], strict=True))) + 2000
                own.measured(other, round(rtt * rng.uniform(0.95, 1.05)), FAR if other in liars else links[other].coordinate)
    for own in links.values():
        for other, there in links.items():
            own.learn(other, FAR if other in liars else there.coordinate)
    return links


def errors(places: dict[bytes, tuple[float, float]], links: dict[bytes, Links], nodes: list[bytes]) -> list[float]:
    """Of predictions, by nodes that did not measure the link, as a share of the true round trip."""
    found = []
    for one in nodes:
        for other in nodes:
            if one < other:
                true = hypot(*(a - b for a, b in zip(places[one], places[other], strict=True))) + 2000
                watcher = next(node for node in nodes if node not in (one, other))
                found.append(abs(links[watcher].rtt_us(one, other) - true) / true)
    return sorted(found)


def plane(count: int) -> dict[bytes, tuple[float, float]]:
    rng = random.Random(9)
    return {tagged_hash("node", bytes([n])): (rng.uniform(0, 100_000), rng.uniform(0, 100_000)) for n in range(count)}


def test_links_nobody_measured_are_predicted() -> None:
    places = plane(24)
    found = errors(places, settled(places), sorted(places))
    assert found[len(found) // 2] < 0.1
    assert found[len(found) * 9 // 10] < 0.35


def test_nodes_at_infinity_that_are_sure_of_it_spoil_only_their_own_links() -> None:
    """One in eight. They claim no error; what is measured to them contradicts what they say at every turn."""
    places = plane(24)
    liars = frozenset(sorted(places)[:3])
    honest = [node for node in sorted(places) if node not in liars]
    found = errors(places, settled(places, liars), honest)
    assert found[len(found) // 2] < 0.5


def test_measured_wins_over_predicted_and_both_over_the_default() -> None:
    links = Links(OWN)
    assert links.rtt_us(OWN, ONE) == links.rtt_us(ONE, TWO) == RTT_DEFAULT_US
    assert links.rtt_us(OWN, OWN) == links.rtt_us(ONE, ONE) == 0
    links.learn(ONE, FAR)
    links.learn(TWO, Coordinate(0, 0, 0, 10, 1))
    assert links.rtt_us(ONE, TWO) == links.rtt_us(TWO, ONE) == RTT_MAX_US
    links.measured(ONE, 3_000, FAR)
    assert links.rtt_us(OWN, ONE) == links.rtt_us(ONE, OWN) == 3_000
    assert links.measured_us(ONE) == 3_000
    links.forget(ONE)
    assert links.measured_us(ONE) is None
    assert links.rtt_us(ONE, TWO) == RTT_DEFAULT_US


def test_one_slow_answer_hardly_moves_a_measured_link() -> None:
    links = Links(OWN)
    for _ in range(20):
        links.measured(ONE, 1_000)
    links.measured(ONE, 9_000)
    assert links.rtt_us(OWN, ONE) == 2_000


def test_a_node_that_measured_nothing_predicts_nothing() -> None:
    links = Links(OWN)
    for node in (ONE, TWO):
        links.learn(node, NOWHERE)
    assert NOWHERE.error == ERROR_ONE
    assert links.rtt_us(ONE, TWO) == RTT_DEFAULT_US


def test_strangers_do_not_fill_the_memory() -> None:
    links = Links(OWN, links_max=8)
    for number in range(100):
        links.measured(number.to_bytes(32, "big"), 1000, NOWHERE)
    assert len(links._measured) == len(links._coordinates) == 8
    assert links.measured_us((99).to_bytes(32, "big")) == 1000

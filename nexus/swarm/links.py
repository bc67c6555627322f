"""Round trips between any two nodes: measured where they were, predicted from coordinates where not. Pure.

A node cannot measure the links between others, and a plan needs them. Each node keeps a Vivaldi coordinate (Dabek, Cox, Kaashoek
and Morris, SIGCOMM 2004: three dimensions and a height, adaptive timestep, cc = ce = 0.25) and says it in its record; the distance
between two coordinates predicts their round trip. Whoever lies about its own spoils the prediction of its own links only, and the
round trip to it from here is measured anyway: what a stranger says moves this node's coordinate by a bounded step, and counts for
little where it contradicts what was measured.

Times are in microseconds, whole numbers.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import hypot

from nexus.core.hashing import tagged_hash
from nexus.core.record import Record, uint

RTT_MAX_US = 10_000_000
RTT_DEFAULT_US = 20_000
RTT_MIN_US = 50
COORDINATE_MAX_US = 10_000_000
# Relative errors are in millionths; a node that has measured nothing is as wrong as can be.
ERROR_ONE = 1_000_000
ERROR_MAX = 2 * ERROR_ONE
# Nobody's word counts for more than that of a node that is wrong by a twentieth, whatever it claims.
_ERROR_FLOOR = 0.05
_TIMESTEP = _ERROR_STEP = 0.25
_STEP_MAX_US = 100_000.0
_HEIGHT_MIN_US = 10
LINKS_MAX = 4096
# RFC 6298: how much one measurement counts against those before it.
_SMOOTHING = 0.125


@dataclass(frozen=True, slots=True)
class Coordinate(Record):
    """Where a node is, in microseconds. `height`: of its access link, on top of every distance. `error`: how wrong its predictions
    were lately, as a share of the round trip, in millionths."""

    x: int = uint(COORDINATE_MAX_US, least=-COORDINATE_MAX_US)
    y: int = uint(COORDINATE_MAX_US, least=-COORDINATE_MAX_US)
    z: int = uint(COORDINATE_MAX_US, least=-COORDINATE_MAX_US)
    height: int = uint(COORDINATE_MAX_US)
    error: int = uint(ERROR_MAX)


# Of a node that has measured nothing.
NOWHERE = Coordinate(0, 0, 0, _HEIGHT_MIN_US, ERROR_ONE)


def distance_us(one: Coordinate, other: Coordinate) -> int:
    """The round trip that two coordinates predict."""
    apart = hypot(one.x - other.x, one.y - other.y, one.z - other.z)
    return min(max(RTT_MIN_US, round(apart) + one.height + other.height), RTT_MAX_US)


def moved(own: Coordinate, other: Coordinate, rtt_us: int, way: bytes) -> Coordinate:
    """This node's coordinate after one more measured round trip to another: pulled towards it or pushed away, by at most 0.1 s.

    `way`: 32 bytes that say in which direction two nodes at the same place part; another one for every pair of nodes.
    """
    rtt = float(min(max(rtt_us, RTT_MIN_US), RTT_MAX_US))
    apart = (own.x - other.x, own.y - other.y, own.z - other.z)
    flat, heights = hypot(*apart), float(own.height + other.height)
    distance = max(flat + heights, 1.0)
    sample_error = abs(distance - rtt) / rtt
    own_error, other_error = (max(one.error / ERROR_ONE, _ERROR_FLOOR) for one in (own, other))
    # What this node's own error does not explain is the other's, whatever it claims: not in the paper, where a liar counts in full.
    weight = own_error / (own_error + max(other_error, sample_error - own_error))
    sample_error = min(sample_error, ERROR_MAX / ERROR_ONE)
    error = sample_error * _ERROR_STEP * weight + own_error * (1 - _ERROR_STEP * weight)
    force = _TIMESTEP * weight * (rtt - distance)
    force = min(max(force, -_STEP_MAX_US), _STEP_MAX_US)
    if flat < 1:
        apart = tuple(int.from_bytes(way[at : at + 4], "little") - 2**31 for at in (0, 4, 8))  # type: ignore[assignment]
        flat = max(hypot(*apart), 1.0)
        along, up = force, 0.0
    else:
        along, up = force * (distance - heights) / distance, force * heights / distance
    x, y, z = (
        _clipped(at + along * part / flat, -COORDINATE_MAX_US) for at, part in zip((own.x, own.y, own.z), apart, strict=True)
    )
    return Coordinate(x, y, z, _clipped(own.height + up, _HEIGHT_MIN_US), min(max(round(error * ERROR_ONE), 1), ERROR_MAX))


def _clipped(value: float, least: int) -> int:
    return min(max(round(value), least), COORDINATE_MAX_US)


class Links:
    """What this node knows of the round trips between nodes. Bounded: the link heard of longest ago makes room."""

    def __init__(self, own: bytes, links_max: int = LINKS_MAX) -> None:
        """`own`: this node's public key."""
        self._own = own
        self._links_max = links_max
        self._measured: OrderedDict[bytes, float] = OrderedDict()
        self._coordinates: OrderedDict[bytes, Coordinate] = OrderedDict()
        self.coordinate = NOWHERE

    def measured(self, node: bytes, rtt_us: int, coordinate: Coordinate | None = None) -> None:
        """A round trip from here to `node` took so long. `coordinate`: what that node says of itself, if it said anything."""
        rtt = float(min(max(rtt_us, 0), RTT_MAX_US))
        before = self._measured.get(node)
        self._measured[node] = rtt if before is None else before + _SMOOTHING * (rtt - before)
        _trim(self._measured, node, self._links_max)
        if coordinate is not None:
            self.learn(node, coordinate)
            way = tagged_hash("apart", self._own, node)
            self.coordinate = moved(self.coordinate, coordinate, round(self._measured[node]), way)

    def learn(self, node: bytes, coordinate: Coordinate) -> None:
        """A node's own word on where it is."""
        self._coordinates[node] = coordinate
        _trim(self._coordinates, node, self._links_max)

    def forget(self, node: bytes) -> None:
        self._measured.pop(node, None)
        self._coordinates.pop(node, None)

    def measured_us(self, node: bytes) -> int | None:
        """The smoothed round trip from here, if it was ever measured."""
        rtt = self._measured.get(node)
        return None if rtt is None else round(rtt)

    def rtt_us(self, one: bytes, other: bytes) -> int:
        """The round trip between two nodes, by public key: as measured, else as predicted, else RTT_DEFAULT_US."""
        if one == other:
            return 0
        if self._own in (one, other):
            measured = self.measured_us(other if one == self._own else one)
            if measured is not None:
                return measured
        places = self._place(one), self._place(other)
        if any(place is None or place.error >= ERROR_ONE for place in places):
            return RTT_DEFAULT_US
        return distance_us(*places)  # type: ignore[arg-type]

    def _place(self, node: bytes) -> Coordinate | None:
        return self.coordinate if node == self._own else self._coordinates.get(node)


def _trim(entries: OrderedDict[bytes, float] | OrderedDict[bytes, Coordinate], newest: bytes, most: int) -> None:
    entries.move_to_end(newest)
    while len(entries) > most:
        entries.popitem(last=False)

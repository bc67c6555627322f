"""What a node lends to others as a relay, and what of it they took: reservations, circuits, bytes, time. Pure: time is passed in.

Circuit relay v2 (libp2p specs, relay/circuit-v2.md): a node that nobody can dial reserves a place at a relay; whoever wants to
reach it asks the relay to connect the two. What the two say is encrypted end to end; a relay can only count, slow down and cut.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from nexus.network.limits import TokenTable


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """`reservations`: peers that may be reached through this node, `reservations_per_ip` of one IP address, each for
    `reservation_s` seconds. `circuits`: connections that run through it, `circuits_per_peer` of one peer (at either end),
    `circuits_per_ip` of one IP address. `circuit_bytes`: each way, `circuit_s`: seconds, then a circuit is cut and may be opened
    again. `bytes_per_peer_s`: what the circuits of one peer, and of one IP address, may carry together; above it they slow down.
    `requests_per_peer_s`: reservations and connections that one peer, and one IP address, may ask for."""

    reservations: int = 128
    reservations_per_ip: int = 16
    reservation_s: float = 3600.0
    circuits: int = 64
    circuits_per_peer: int = 16
    circuits_per_ip: int = 32
    circuit_bytes: int = 1 << 30
    circuit_s: float = 3600.0
    bytes_per_peer_s: int = 16 << 20
    requests_per_peer_s: float = 0.5
    requests_burst: int = 16


def relay_limits(reservations: int, circuits: int, circuit_bytes: int, circuit_s: float, bytes_per_peer_s: int) -> RelayLimits:
    """Of all that a relay lends, one peer may have a quarter of the circuits, one IP address half of them and an eighth of the
    reservations."""
    return RelayLimits(
        reservations=reservations,
        reservations_per_ip=max(1, reservations // 8),
        circuits=circuits,
        circuits_per_peer=max(1, circuits // 4),
        circuits_per_ip=max(1, circuits // 2),
        circuit_bytes=circuit_bytes,
        circuit_s=circuit_s,
        bytes_per_peer_s=bytes_per_peer_s,
    )


@dataclass(frozen=True, slots=True)
class Client:
    """A peer and the IP address that it comes from."""

    peer_id: str
    ip: str


@dataclass(slots=True)
class _Place:
    ip: str
    until_s: float


@dataclass(slots=True)
class RelayLedger:
    """Who has reserved, and how many circuits run for whom. Refusals are sentences for the log and for the peer."""

    limits: RelayLimits
    _places: dict[str, _Place] = field(default_factory=dict)
    _circuits: Counter[str] = field(default_factory=Counter)
    _running: int = 0
    _rates: TokenTable = field(init=False)
    _requests: TokenTable = field(init=False)

    def __post_init__(self) -> None:
        limits = self.limits
        self._rates = TokenTable(limits.bytes_per_peer_s, limits.bytes_per_peer_s)
        self._requests = TokenTable(limits.requests_per_peer_s, limits.requests_burst)

    def may_ask(self, client: Client, now_s: float) -> bool:
        """Count one request. False: the peer, or its IP address, asks too often."""
        return self._requests.may((client.peer_id, client.ip), now_s)

    def reserve(self, client: Client, now_s: float) -> str:
        """Keep or renew a place for `client`. What stands in the way, or nothing."""
        self._expire(now_s)
        others = [place for peer_id, place in self._places.items() if peer_id != client.peer_id]
        if len(others) >= self.limits.reservations:
            return "this relay has no place left"
        if sum(place.ip == client.ip for place in others) >= self.limits.reservations_per_ip:
            return "this relay has no place left for this IP address"
        self._places[client.peer_id] = _Place(client.ip, now_s + self.limits.reservation_s)
        return ""

    def has_place(self, peer_id: str, now_s: float) -> bool:
        place = self._places.get(peer_id)
        return place is not None and place.until_s > now_s

    def release(self, peer_id: str) -> None:
        """The peer is gone, and its place with it."""
        self._places.pop(peer_id, None)

    def open(self, source: Client, target: Client) -> str:
        """Count a circuit between the two, unless something stands in the way, which is said. Every "" wants a `close`."""
        if self._running >= self.limits.circuits:
            return "this relay carries all the circuits that it may"
        for client in (source, target):
            if self._circuits[client.peer_id] >= self.limits.circuits_per_peer:
                return "this relay carries all the circuits that one peer may have"
            if self._circuits[client.ip] >= self.limits.circuits_per_ip:
                return "this relay carries all the circuits that one IP address may have"
        self._running += 1
        for key in _keys(source, target):
            self._circuits[key] += 1
        return ""

    def close(self, source: Client, target: Client) -> None:
        self._running -= 1
        for key in _keys(source, target):
            self._circuits[key] -= 1
            if self._circuits[key] <= 0:
                del self._circuits[key]

    def delay_s(self, source: Client, target: Client, size: int, now_s: float) -> float:
        """Seconds to wait after `size` bytes that a circuit of the two carried."""
        return self._rates.delay_s(_keys(source, target), size, now_s)

    @property
    def reservations(self) -> int:
        return len(self._places)

    @property
    def circuits(self) -> int:
        return self._running

    def _expire(self, now_s: float) -> None:
        for peer_id in [peer_id for peer_id, place in self._places.items() if place.until_s <= now_s]:
            del self._places[peer_id]


def _keys(source: Client, target: Client) -> tuple[str, ...]:
    """Each once: two peers behind one IP address count once for it."""
    return tuple(dict.fromkeys((source.peer_id, source.ip, target.peer_id, target.ip)))

"""Multiaddrs as text, and the bounded book of where peers were last seen.

Only TCP over IP or DNS names is dialled, directly or through a relay (circuit relay v2), so this small parser is all that services
and adapters need; libp2p's own is not.
"""

from __future__ import annotations

import ipaddress
import re
from collections import OrderedDict
from dataclasses import dataclass

from nexus.core.errors import MalformedError, UnreachableError, UsageError
from nexus.core.keys import public_key_of
from nexus.network.transport import PeerAddress

PEERS_MAX = 4096
ADDRESSES_PER_PEER_MAX = 8
FAILURES_MAX = 8
CIRCUIT = "/p2p-circuit"
# Of the addresses kept of a peer: a node renews two or three relays, and one that names eight would have us try them all.
CIRCUITS_PER_PEER_MAX = 3
_ADDRESS_CHARS_MAX = 256
_DNS_NAME = re.compile(r"(?=.{1,253}$)([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.?)+")
_FIX = "An address looks like /ip4/192.0.2.7/tcp/4001/p2p/12D3KooW..."


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A host and port. `kind`: "ip4", "ip6", "dns", "dns4" or "dns6"."""

    kind: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"/{self.kind}/{self.host}/tcp/{self.port}"


@dataclass(frozen=True, slots=True)
class Circuit:
    """A peer behind a relay: `relay_id` answers at `endpoint` and passes on what is said to the peer."""

    endpoint: Endpoint
    relay_id: str

    def __str__(self) -> str:
        return f"{self.endpoint}/p2p/{self.relay_id}{CIRCUIT}"


def is_circuit(text: str) -> bool:
    return text.endswith(CIRCUIT) or f"{CIRCUIT}/p2p/" in text


def parse_address(text: str) -> Endpoint | Circuit:
    """An address without the /p2p part of the peer meant, direct or through a relay. Raises MalformedError."""
    if not text.endswith(CIRCUIT):
        return parse_endpoint(text)
    endpoint, mark, relay_id = text.removesuffix(CIRCUIT).partition("/p2p/")
    if len(text) > _ADDRESS_CHARS_MAX or not mark:
        raise MalformedError(f"{text[:_ADDRESS_CHARS_MAX]!r} names no relay", _FIX)
    public_key_of(relay_id)
    return Circuit(parse_endpoint(endpoint), relay_id)


def parse_endpoint(text: str) -> Endpoint:
    """A multiaddr of the form /<ip4|ip6|dns...>/<host>/tcp/<port>. Raises MalformedError."""
    parts = text.split("/")
    if len(text) > _ADDRESS_CHARS_MAX or len(parts) != 5 or parts[0] or parts[3] != "tcp":
        raise MalformedError(f"{text[:_ADDRESS_CHARS_MAX]!r} is not a TCP address", _FIX)
    _, kind, host, _, port_text = parts
    try:
        if kind == "ip4":
            host = str(ipaddress.IPv4Address(host))
        elif kind == "ip6":
            host = str(ipaddress.IPv6Address(host))
        elif kind not in ("dns", "dns4", "dns6") or not _DNS_NAME.fullmatch(host):
            raise ValueError
        port = int(port_text) if port_text.isascii() and port_text.isdigit() and len(port_text) <= 5 else -1
        if not 0 <= port < 65536:
            raise ValueError
    except ValueError as error:
        raise MalformedError(f"{text!r} is not a TCP address", _FIX) from error
    return Endpoint(kind, host, port)


def parse_peer_address(text: str) -> tuple[str, Endpoint | Circuit]:
    """The peer id and the rest of an address that a user gave. Raises UsageError."""
    endpoint, mark, peer_id = text.strip().rpartition("/p2p/")
    try:
        if not mark:
            raise MalformedError(f"{text[:_ADDRESS_CHARS_MAX]!r} does not end in /p2p/ and a peer id", _FIX)
        public_key_of(peer_id)
        parsed = parse_address(endpoint)
    except MalformedError as error:
        raise UsageError(error.cause, error.fix or _FIX) from error
    if isinstance(parsed, Circuit) and parsed.relay_id == peer_id:
        raise UsageError(f"{text.strip()!r} names one peer as its own relay", _FIX)
    if (parsed.endpoint if isinstance(parsed, Circuit) else parsed).port == 0:
        raise UsageError(f"{text!r} names port 0", _FIX)
    return peer_id, parsed


def valid_addresses(addresses: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Those of a peer's claimed addresses that can be dialled, at most ADDRESSES_PER_PEER_MAX, in order, without duplicates."""
    good: dict[str, None] = {}
    circuits = 0
    for text in addresses[: 4 * ADDRESSES_PER_PEER_MAX]:
        try:
            parsed = parse_address(_without_peer(text))
        except MalformedError:
            continue
        endpoint = parsed.endpoint if isinstance(parsed, Circuit) else parsed
        if endpoint.port == 0 or (endpoint.kind in ("ip4", "ip6") and ipaddress.ip_address(endpoint.host).is_unspecified):
            continue
        if isinstance(parsed, Circuit):
            circuits += 1
            if circuits > CIRCUITS_PER_PEER_MAX:
                continue
        good[str(parsed)] = None
    return tuple(good)[:ADDRESSES_PER_PEER_MAX]


def _without_peer(text: str) -> str:
    """Without the peer meant, whose id a relay's address carries after the relay's own."""
    if not is_circuit(text):
        return text.partition("/p2p/")[0]
    return text.partition(CIRCUIT)[0] + CIRCUIT


class AddressBook:
    """Where peers may be dialled, the likeliest address first. Bounded: the peers heard of longest ago are forgotten."""

    def __init__(self, peers_max: int = PEERS_MAX) -> None:
        self._peers_max = peers_max
        self._failures: OrderedDict[str, dict[str, int]] = OrderedDict()

    def learn(self, peer: PeerAddress) -> None:
        """Put the peer's addresses first; invalid ones are dropped. A known address keeps its count of failures."""
        known = self._failures.pop(peer.peer_id, {})
        merged = {address: known.get(address, 0) for address in valid_addresses(peer.addresses)}
        for address, failures in known.items():
            merged.setdefault(address, failures)
        if merged:
            self._failures[peer.peer_id] = dict(list(merged.items())[:ADDRESSES_PER_PEER_MAX])
        while len(self._failures) > self._peers_max:
            self._failures.popitem(last=False)

    def addresses(self, peer_id: str) -> tuple[str, ...]:
        """Fewest failures first, then newest."""
        known = self._failures.get(peer_id, {})
        return tuple(sorted(known, key=known.__getitem__))

    def succeeded(self, peer_id: str, address: str) -> None:
        self.learn(PeerAddress(peer_id, (address,)))
        if address in self._failures.get(peer_id, {}):
            self._failures[peer_id][address] = 0

    def failed(self, peer_id: str, address: str) -> None:
        known = self._failures.get(peer_id, {})
        if address in known:
            known[address] += 1
            if known[address] >= FAILURES_MAX:
                del known[address]
        if not known:
            self._failures.pop(peer_id, None)

    def __len__(self) -> int:
        return len(self._failures)


def no_address(peer_id: str) -> UnreachableError:
    return UnreachableError(f"no address of peer {peer_id} is known", "Add it with `nexus peers add MULTIADDR`", peer=peer_id)

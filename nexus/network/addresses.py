"""Multiaddrs as text, and the bounded book of where peers were last seen.

Only TCP over IP or DNS names is dialled, so this small parser is all that services and adapters need; libp2p's own is not.
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


def parse_peer_address(text: str) -> tuple[str, Endpoint]:
    """The peer id and endpoint of an address that a user gave. Raises UsageError."""
    endpoint, mark, peer_id = text.strip().rpartition("/p2p/")
    try:
        if not mark:
            raise MalformedError(f"{text[:_ADDRESS_CHARS_MAX]!r} does not end in /p2p/ and a peer id", _FIX)
        public_key_of(peer_id)
        parsed = parse_endpoint(endpoint)
    except MalformedError as error:
        raise UsageError(error.cause, error.fix or _FIX) from error
    if parsed.port == 0:
        raise UsageError(f"{text!r} names port 0", _FIX)
    return peer_id, parsed


def valid_addresses(addresses: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Those of a peer's claimed addresses that can be dialled, at most ADDRESSES_PER_PEER_MAX, in order, without duplicates."""
    good: dict[str, None] = {}
    for text in addresses[: 4 * ADDRESSES_PER_PEER_MAX]:
        try:
            endpoint = parse_endpoint(text.partition("/p2p/")[0])
        except MalformedError:
            continue
        unusable = endpoint.port == 0 or (endpoint.kind in ("ip4", "ip6") and ipaddress.ip_address(endpoint.host).is_unspecified)
        if not unusable:
            good[str(endpoint)] = None
    return tuple(good)[:ADDRESSES_PER_PEER_MAX]


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

"""Can others reach this node? What they saw and tried, and what follows from it. Pure.

The evidence: where peers see this node's connections come from (identify), whether they can dial it there (AutoNAT), and what a NAT
makes of connections that leave one port for two peers (the mapping behaviour of RFC 4787, section 4.1). The rule of all of it is to
say no more than was seen: what peers of the local network can reach says nothing about the Internet.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from nexus.network.addresses import Endpoint

# From the narrowest to the widest.
LOOPBACK, PRIVATE, PUBLIC = "loopback", "private", "public"
_WIDTH = {LOOPBACK: 0, PRIVATE: 1, PUBLIC: 2}

REACHABLE, UNREACHABLE, LOCAL_ONLY, UNKNOWN = "reachable", "unreachable", "local_only", "unknown"
MAPPING_NONE, MAPPING_INDEPENDENT, MAPPING_DEPENDENT, MAPPING_UNKNOWN = (
    "none",
    "endpoint_independent",
    "address_dependent",
    "unknown",
)


@dataclass(frozen=True, slots=True)
class DialBack:
    """A peer was asked to dial this node at `address`. `result`: "ok" (its handshake was seen here), "failed", or "refused" (it
    does not dial that). `detail`: what it said."""

    peer_id: str
    address: str
    result: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Observation:
    """A peer at `peer_ip` sees a connection that leaves `local` here come from `seen`. `reused`: the connection left on a port that
    others of the same test left on as well."""

    peer_id: str
    peer_ip: str
    local: Endpoint
    seen: Endpoint
    reused: bool = False


@dataclass(frozen=True, slots=True)
class Reservation:
    """A relay that keeps a place for this node. `address`: how others reach this node through it, without this node's id."""

    relay: str
    address: str
    expires_in_s: float


@dataclass(frozen=True, slots=True)
class AddressCheck:
    """One of this node's addresses and who tried it. `origin`: "listen", "announced" (by the settings), "observed" (where peers see
    this node, with the port that it listens on) or "relay". `scope`: who could reach such an address at all."""

    address: str
    origin: str
    scope: str
    tried: tuple[DialBack, ...]

    @property
    def reached(self) -> bool:
        return any(one.result == "ok" for one in self.tried)


@dataclass(frozen=True, slots=True)
class Netcheck:
    """What `nexus netcheck` says. `verdict`: "reachable", "unreachable", "local_only" (peers of the local network reach it;
    whether the Internet does cannot be told) or "unknown" (nobody could try). `nat`: "none", "behind", "unknown". `mapping`: see
    the module. `peers`: connected now; `asked`: those that agreed to look. `relay_service`: it is a relay for others."""

    verdict: str
    scope: str
    nat: str
    mapping: str
    peers: int
    asked: int
    addresses: tuple[AddressCheck, ...]
    observations: tuple[Observation, ...]
    relays: tuple[Reservation, ...]
    relay_service: bool
    relay_candidates: int
    advice: tuple[str, ...]


def scope_of(host: str) -> str:
    """Names are taken for public."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return PUBLIC
    if address.is_loopback:
        return LOOPBACK
    return PUBLIC if address.is_global else PRIVATE


def widest(scopes: Sequence[str]) -> str:
    return max(scopes, key=_WIDTH.__getitem__, default="")


def judge(dial_backs: Sequence[tuple[str, DialBack]]) -> tuple[str, str]:
    """The verdict, and the widest scope that it holds for ("" where nobody could try). `dial_backs`: with the scope of the peer's
    view of this node.

    Of the peers that see this node from the widest distance the majority counts, so that one that lies or has a bad line does not
    turn it round; a success was seen here, and outweighs a failure that is only claimed.
    """
    tried = [(scope, one) for scope, one in dial_backs if one.result in ("ok", "failed")]
    scope = widest([scope for scope, _ in tried])
    if not scope:
        return UNKNOWN, ""
    succeeded = {one.peer_id for at, one in tried if at == scope and one.result == "ok"}
    failed = {one.peer_id for at, one in tried if at == scope and one.result == "failed"} - succeeded
    if len(succeeded) >= len(failed):
        return (REACHABLE if scope == PUBLIC else LOCAL_ONLY), scope
    return UNREACHABLE, scope


def mapping_of(observations: Sequence[Observation], own_hosts: Sequence[str]) -> tuple[str, str]:
    """Whether there is a NAT ("none", "behind", "unknown"), and its mapping behaviour.

    Only peers at the widest distance are heard: in the same network there is no NAT between. The mapping shows only where one port
    of this machine reached two IP addresses.
    """
    scope = widest([scope_of(one.peer_ip) for one in observations])
    seen = [one for one in observations if scope_of(one.peer_ip) == scope]
    if not seen:
        return "unknown", MAPPING_UNKNOWN
    own = {_plain(host) for host in own_hosts}
    if all(_plain(one.seen.host) in own and one.seen.port == one.local.port for one in seen):
        return "none", MAPPING_NONE
    if all(_plain(one.seen.host) in own for one in seen):
        return "unknown", MAPPING_UNKNOWN
    by_port: dict[int, list[Observation]] = {}
    for one in seen:
        if one.reused:
            by_port.setdefault(one.local.port, []).append(one)
    verdicts = set()
    for group in by_port.values():
        if len({one.peer_ip for one in group}) >= 2:
            verdicts.add(len({(one.seen.host, one.seen.port) for one in group}) == 1)
    if verdicts == {True}:
        return "behind", MAPPING_INDEPENDENT
    if verdicts == {False}:
        return "behind", MAPPING_DEPENDENT
    return "behind", MAPPING_UNKNOWN


def advise(
    verdict: str, scope: str, mapping: str, *, peers: int, listen: Sequence[Endpoint], relays: int, relay_candidates: int
) -> tuple[str, ...]:
    """What the owner of this node can do about it, most helpful first."""
    ports = ", ".join(str(port) for port in dict.fromkeys(endpoint.port for endpoint in listen))
    if listen and all(scope_of(endpoint.host) == LOOPBACK for endpoint in listen):
        return (
            "This node listens on this machine only, so no other machine can reach it. To let others: set network.listen to "
            "/ip4/0.0.0.0/tcp/4510.",
        )
    if verdict == REACHABLE:
        return ("Nothing to do: others reach this node directly.",)
    if verdict == UNKNOWN:
        if not peers:
            return ("No peer is connected, so nobody could try. Add one with: nexus peers add MULTIADDR",)
        return ("No connected peer could try this node's addresses. Ask again in a minute, or add another peer.",)
    if verdict == LOCAL_ONLY:
        where = "on this machine" if scope == LOOPBACK else "in the local network"
        return (
            f"Peers {where} reach this node. No peer outside of it could try, so whether the Internet reaches it cannot be told: "
            "add a peer outside with nexus peers add MULTIADDR, then ask again.",
        )
    advice = [
        f"Others cannot dial this node. If you run the router: forward TCP port {ports} to this machine (port forwarding), and let "
        "it through this machine's firewall."
    ]
    if relays:
        advice.append(f"Others reach it through {relays} relay{'s' * (relays > 1)} meanwhile, more slowly.")
    elif relay_candidates:
        advice.append("A relay is known, but keeps no place for this node yet. Ask again in a minute.")
    else:
        advice.append(
            "No relay is known, so nodes that are behind a NAT themselves cannot work with this one. Connect to a node that is a "
            "relay (one with network.relay = on)."
        )
    if mapping == MAPPING_DEPENDENT:
        advice.append(
            "Its NAT gives every peer another port, so hole punching will not work: the relay or a forwarded port must do."
        )
    return tuple(advice)


def _plain(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host

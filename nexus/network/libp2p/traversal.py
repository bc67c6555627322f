"""Reaching others from behind a NAT, and being reached there: what this node sees of its surroundings and does about it.

It asks peers where they see it and whether they can dial it there. Where they cannot, it keeps places at relays, and announces them
among its addresses; a node that is a relay by choice announces that on the DHT.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

import trio
from libp2p.identity.identify_push.identify_push import push_identify_to_peer
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.peer.id import ID

from nexus.core.errors import MalformedError, NexusError
from nexus.core.hashing import tagged_hash
from nexus.network.addresses import Circuit, Endpoint, parse_address, parse_endpoint
from nexus.network.libp2p.autonat import AUTONAT, AutoNatService, Mirror, same_host
from nexus.network.libp2p.circuit import HOP, RESERVATIONS_WANTED, Negotiate, RelayClient, RelayService
from nexus.network.libp2p.hardening import HardenedHost, HardenedSwarm
from nexus.network.libp2p.yamux import YamuxConnection
from nexus.network.reachability import (
    LOOPBACK,
    UNKNOWN,
    UNREACHABLE,
    AddressCheck,
    DialBack,
    Netcheck,
    Observation,
    advise,
    judge,
    mapping_of,
    scope_of,
)
from nexus.network.relaying import RelayLimits
from nexus.network.transport import PeerAddress

log = logging.getLogger(__name__)

# Under this key of the DHT relays announce themselves.
RELAY_KEY = tagged_hash("relay")
LOOK_EVERY_S = 2.0
# A peer's word about us holds this long, and is asked for again after half of it.
SIGHT_LASTS_S = 600.0
SIGHTS_MAX = 64
SERVERS_PER_ROUND = 4
SERVERS_PER_NETCHECK = 8
MAPPING_PEERS = 3
LOOKUP_EVERY_S = 30.0
EXTERNAL_MAX = 2
NETCHECK_TIMEOUT_S = 40.0
PUSH_TIMEOUT_S = 5.0
PUSHES_MAX = 64


class _Sight:
    """What one peer saw."""

    def __init__(self, at_s: float, observation: Observation, dial_backs: list[DialBack]) -> None:
        self.at_s = at_s
        self.observation = observation
        self.dial_backs = dial_backs

    @property
    def scope(self) -> str:
        """How far away the peer is, as it sees us: an address of ours that it can use."""
        return scope_of(self.observation.seen.host)


class Traversal:
    """`listen`: where this node listens, wildcards expanded. `announce`: more addresses of this node that the settings name.
    `find_relays`: peers that announce themselves as relays. `connect`: be connected to a peer. `serve_relay`: None: be no relay."""

    def __init__(
        self,
        host: HardenedHost,
        swarm: HardenedSwarm,
        nursery: trio.Nursery,
        negotiate: Negotiate,
        *,
        listen: Callable[[], Sequence[Endpoint]],
        announce: Sequence[Endpoint],
        find_relays: Callable[[], Awaitable[Sequence[PeerAddress]]],
        connect: Callable[[str], Awaitable[object]],
        serve_relay: RelayLimits | None,
    ) -> None:
        self._swarm = swarm
        self._listen = listen
        self._announce = tuple(announce)
        self._find_relays = find_relays
        self._connect = connect
        self._sights: OrderedDict[str, _Sight] = OrderedDict()
        self._asked_s: OrderedDict[str, float] = OrderedDict()
        self._looked_up_s = -LOOKUP_EVERY_S
        self._looking = trio.Lock()
        self.relays = RelayClient(host, swarm, nursery, negotiate)
        self.mirror = Mirror(swarm, negotiate)
        self._autonat = AutoNatService(host, swarm)
        self.service = (
            RelayService(host, swarm, serve_relay, negotiate, self._direct_addresses) if serve_relay is not None else None
        )
        swarm.dial_circuit = self.relays.dial
        self._host = host
        nursery.start_soon(self._look_forever)
        nursery.start_soon(self._tell_forever)
        nursery.start_soon(self.relays.hold_forever, self._relay_candidates)

    def addresses(self) -> list[str]:
        """Where others can dial this node, the most useful first: what was proven from outside, relays, then where it listens."""
        listening = [str(endpoint) for endpoint in self._listen()]
        return list(dict.fromkeys([*map(str, self._announce), *self._external(), *self.relays.addresses(), *listening]))

    def disconnected(self, peer_id: str) -> None:
        if self.service is not None:
            self.service.disconnected(peer_id)

    def _direct_addresses(self) -> list[Endpoint]:
        return [endpoint for text in self.addresses() if isinstance(endpoint := parse_address(text), Endpoint)]

    def _external(self) -> list[str]:
        """Addresses that are no interface's, at which a peer reached this node: a router forwards the port."""
        own = {endpoint.host for endpoint in self._listen()}
        found: dict[str, None] = {}
        for sight in self._sights.values():
            for one in sight.dial_backs:
                if one.result == "ok" and parse_endpoint(one.address).host not in own:
                    found[one.address] = None
        return list(found)[:EXTERNAL_MAX]

    async def _tell_forever(self) -> None:
        """Tell connected peers where this node can be dialled when that has changed, so that they can tell others."""
        told: list[str] = []
        while True:
            now = self.relays.addresses()
            if now == told:
                await self.relays.changed.wait()
                continue
            told = now
            with trio.move_on_after(PUSH_TIMEOUT_S):
                async with trio.open_nursery() as nursery:
                    for peer_id in list(self._swarm.connections)[:PUSHES_MAX]:
                        nursery.start_soon(self._push, peer_id)

    async def _push(self, peer_id: ID) -> None:
        try:
            await push_identify_to_peer(self._host, peer_id)
        except Exception as error:  # noqa: BLE001 - the boundary: whatever a peer does with it
            log.debug("peer %s takes no news of our addresses: %r", peer_id, error)

    # Looking around.

    async def _look_forever(self) -> None:
        while True:
            await trio.sleep(LOOK_EVERY_S)
            await self._look(SERVERS_PER_ROUND, SIGHT_LASTS_S / 2)

    async def _look(self, servers_max: int, older_than_s: float) -> int:
        """Ask peers that were not asked for a while what they see. How many answered."""
        async with self._looking:
            now_s = trio.current_time()
            for peer_id in [peer_id for peer_id, sight in self._sights.items() if now_s - sight.at_s > SIGHT_LASTS_S]:
                del self._sights[peer_id]
            servers = [
                conn for conn in self._servers() if now_s - self._asked_s.get(str(conn.peer_id), -SIGHT_LASTS_S) >= older_than_s
            ]
            before = sum(sight.at_s >= now_s for sight in self._sights.values())
            async with trio.open_nursery() as nursery:
                for conn in servers[:servers_max]:
                    self._asked_s[str(conn.peer_id)] = now_s
                    self._asked_s.move_to_end(str(conn.peer_id))
                    nursery.start_soon(self._ask, conn)
            while len(self._asked_s) > SIGHTS_MAX:
                self._asked_s.popitem(last=False)
            self.relays.wanted = self._wants_relays()
            return sum(sight.at_s >= now_s for sight in self._sights.values()) - before

    def _wants_relays(self) -> bool:
        """Where others cannot dial this node; not where its owner has it listen on this machine only. While nobody says anything,
        what holds goes on."""
        listens_here_only = all(scope_of(endpoint.host) == LOOPBACK for endpoint in self._listen())
        verdict, _ = self._judged()
        return (self.relays.wanted if verdict == UNKNOWN else verdict == UNREACHABLE) and not listens_here_only

    async def _ask(self, conn: YamuxConnection) -> None:
        peer_id, remote = str(conn.peer_id), conn.get_remote_address()
        if remote is None:
            return
        seen = await self.mirror.seen_by(conn)
        if seen is None or scope_of(seen.host) == LOOPBACK != scope_of(remote[0]):
            return  # it says nothing, or what cannot be
        local = conn.channel.get_local_endpoint()
        wanted = [Endpoint(seen.kind, seen.host, port) for port in self._ports(seen.kind)]
        wanted += [one for one in self._announce if same_host(one.host, seen.host) and one not in wanted]
        dial_backs = [await self.mirror.dial_back(conn, endpoint) for endpoint in wanted[:3]]
        if peer_id in self._sights and all(one.result == "refused" for one in dial_backs):
            return  # asked too often, say: what it said before still holds, until it is too old
        self._sights[peer_id] = _Sight(trio.current_time(), Observation(peer_id, remote[0], local, seen), dial_backs)
        self._sights.move_to_end(peer_id)
        while len(self._sights) > SIGHTS_MAX:
            self._sights.popitem(last=False)

    def _ports(self, kind: str) -> list[int]:
        return list(dict.fromkeys(endpoint.port for endpoint in self._listen() if endpoint.kind == kind))

    def _servers(self) -> list[YamuxConnection]:
        """One direct connection to each peer that dials back; those at other IP addresses first, each IP address in turn."""
        found: dict[str, YamuxConnection] = {}
        for conn in self._direct():
            if self._speaks(conn.peer_id, AUTONAT):
                found.setdefault(str(conn.peer_id), conn)
        hosts: dict[str, int] = {}
        ranked = []
        for conn in found.values():
            address = conn.get_remote_address()
            host = address[0] if address else ""
            hosts[host] = hosts.get(host, 0) + 1
            ranked.append((scope_of(host) == LOOPBACK, hosts[host], conn.opened_s, conn))
        return [conn for *_, conn in sorted(ranked, key=lambda entry: entry[:3])]

    def _direct(self) -> list[YamuxConnection]:
        live = [
            conn.muxed_conn
            for conn in self._swarm.get_connections()
            if isinstance(conn, SwarmConn) and not conn.is_closed and isinstance(conn.muxed_conn, YamuxConnection)
        ]
        return sorted((conn for conn in live if not conn.is_closed and not conn.channel.circuit), key=lambda conn: conn.opened_s)

    def _speaks(self, peer_id: ID, protocol: str) -> bool:
        try:
            return protocol in self._swarm.peerstore.get_protocols(peer_id)
        except Exception as error:  # noqa: BLE001 - the boundary: the library has a peer's claims in there
            log.debug("what peer %s speaks is not known: %r", peer_id, error)
            return False

    def _judged(self) -> tuple[str, str]:
        return judge([(sight.scope, one) for sight in self._sights.values() for one in sight.dial_backs])

    # Relays.

    async def _relay_candidates(self) -> list[str]:
        """Connected relays, and where those are too few, what the DHT knows, connected by now."""
        found = self._connected_relays()
        now_s = trio.current_time()
        if len(found) < RESERVATIONS_WANTED and now_s - self._looked_up_s >= LOOKUP_EVERY_S:
            self._looked_up_s = now_s
            for peer in await self._find_relays():
                try:
                    await self._connect(peer.peer_id)
                except NexusError as error:
                    log.debug("a relay that the DHT names: %s", error)
        return found

    def _connected_relays(self) -> list[str]:
        """Those that we dialled first: others can dial them too."""
        relays = [conn for conn in self._direct() if self._speaks(conn.peer_id, HOP)]
        return list(dict.fromkeys(str(conn.peer_id) for conn in sorted(relays, key=lambda conn: not conn.is_initiator)))

    # nexus netcheck.

    async def netcheck(self) -> Netcheck:
        """Ask again, now, and say what came of it."""
        mapped: list[Observation] = []
        with trio.move_on_after(NETCHECK_TIMEOUT_S):
            await self._look(SERVERS_PER_NETCHECK, LOOK_EVERY_S)
            mapped = await self.mirror.mapping(self._mapping_targets())
        verdict, scope = self._judged()
        listen = list(self._listen())
        observations = [sight.observation for sight in self._sights.values()] + mapped
        nat, mapping = mapping_of(observations, [endpoint.host for endpoint in listen])
        candidates = len(self._connected_relays())
        reservations = self.relays.reservations()
        peers = {str(conn.peer_id) for conns in self._swarm.connections.values() for conn in (c.muxed_conn for c in conns)}
        return Netcheck(
            verdict=verdict,
            scope=scope,
            nat=nat,
            mapping=mapping,
            peers=len(peers),
            asked=len(self._sights),
            addresses=tuple(self._checked(listen)),
            observations=tuple(observations),
            relays=reservations,
            relay_service=self.service is not None,
            relay_candidates=candidates,
            advice=advise(
                verdict,
                scope,
                mapping,
                peers=len(peers),
                listen=listen,
                relays=len(reservations),
                relay_candidates=candidates,
            ),
        )

    def _mapping_targets(self) -> list[tuple[str, Endpoint]]:
        """Peers at different IP addresses that we dialled ourselves: there they listen."""
        targets: dict[str, tuple[str, Endpoint]] = {}
        for conn in self._servers():
            address = conn.get_remote_address()
            if conn.is_initiator and address is not None and scope_of(address[0]) != LOOPBACK:
                kind = "ip6" if ":" in address[0] else "ip4"
                targets.setdefault(address[0], (str(conn.peer_id), Endpoint(kind, *address)))
        return list(targets.values())[:MAPPING_PEERS]

    def _checked(self, listen: Sequence[Endpoint]) -> list[AddressCheck]:
        """Every address of this node, and who tried it."""
        origins: dict[str, str] = {str(endpoint): "listen" for endpoint in listen}
        origins.update((str(endpoint), "announced") for endpoint in self._announce)
        tried: dict[str, list[DialBack]] = {}
        for sight in self._sights.values():
            for one in sight.dial_backs:
                origins.setdefault(one.address, "observed")
                tried.setdefault(one.address, []).append(one)
        checks = [
            AddressCheck(address, origin, scope_of(parse_endpoint(address).host), tuple(tried.get(address, ())))
            for address, origin in origins.items()
        ]
        for reservation in self.relays.reservations():
            try:
                circuit = parse_address(reservation.address)
            except MalformedError:  # cannot be: we made it
                continue
            assert isinstance(circuit, Circuit)
            checks.append(AddressCheck(reservation.address, "relay", scope_of(circuit.endpoint.host), ()))
        return checks

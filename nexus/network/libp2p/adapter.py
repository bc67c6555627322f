"""The network port on libp2p. `open_libp2p` puts the hardened parts together and runs them while its context is open."""

from __future__ import annotations

import errno
import logging
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.host.ping import ID as PING_PROTOCOL
from libp2p.host.ping import PING_LENGTH
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.rcmgr import Direction
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError
from libp2p.tools.anyio_service.context import background_trio_service
from libp2p.utils.address_validation import get_available_interfaces
from libp2p.utils.varint import encode_varint_prefixed
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from nexus.core.errors import CapacityError, LocalError, MalformedError, PeerError, TimedOutError, UnreachableError, UsageError
from nexus.core.keys import Identity, parse_peer_id, public_key_of
from nexus.network.addresses import AddressBook, Endpoint, no_address, parse_endpoint, parse_peer_address, valid_addresses
from nexus.network.gossip import Subscribers, check_message
from nexus.network.libp2p.framing import FrameStream
from nexus.network.libp2p.hardening import (
    KAD_PROTOCOL,
    HardenedDht,
    HardenedGossip,
    HardenedHost,
    HardenedPubsub,
    HardenedSwarm,
    check_version,
    key_pair_of,
    set_constants,
)
from nexus.network.libp2p.mdns import discovering
from nexus.network.libp2p.traversal import RELAY_KEY, Traversal
from nexus.network.libp2p.yamux import Budget, YamuxConnection, YamuxStream
from nexus.network.limits import TokenBucket
from nexus.network.reachability import Netcheck
from nexus.network.relaying import RelayLimits
from nexus.network.serving import Serving, background_nursery, not_served
from nexus.network.transport import (
    Connection,
    Handler,
    Message,
    PeerAddress,
    ProtocolSpec,
    Stream,
    Subscription,
    check_key,
)

log = logging.getLogger(__name__)

NEGOTIATE_TIMEOUT_S = 10.0
PING_TIMEOUT_S = 10.0
FIND_TIMEOUT_S = 5.0
PROVIDE_TIMEOUT_S = 10.0
ASK_AROUND_TIMEOUT_S = 3.0
# A peer takes 10 announcements in 10 s from one sender, and drops the rest without a word: stay below.
PROVIDES_PER_S = 0.5
PROVIDES_BURST = 4
PROVIDED_MAX = 512
# When to announce again, by how many peers confirmed the last time: a node that starts alone has nobody to tell yet.
RENEW_AFTER_S = {0: 5.0, 1: 60.0, 2: 60.0}
RENEW_AFTER_MANY_S = 20 * 60.0
RENEW_CHECK_S = 2.0
BOOTSTRAP_RETRY_S = (1.0, 60.0)
REFRESH_PAUSE_S = 2.0
SHUN_S = 300.0
DISCOVERED_DIALS_AT_ONCE = 4
_MULTISTREAM = "/multistream/1.0.0"
_NEGOTIATION_LINE_MAX = 1024


@dataclass(frozen=True, slots=True)
class Caps:
    """`connections`: of this node. `connections_per_ip`: inbound, from one IP address. `streams_per_connection`: each way.
    `buffered_bytes`: received and not yet read by anyone, over all connections; `buffered_bytes_per_peer`: of one peer."""

    connections: int = 256
    connections_per_ip: int = 64
    streams_per_connection: int = 128
    buffered_bytes: int = 256 << 20
    buffered_bytes_per_peer: int = 56 << 20


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """`listen`: multiaddrs, port 0 for a free one. `bootstrap`: multiaddrs ending in /p2p/ and a peer id, dialled until they
    answer, and again when they are lost. `dht`: "server" answers the queries of others, "client" only asks. `relay`: what this node
    lends to others as a relay, None: it is none. `announce`: multiaddrs at which others reach it besides, where a router forwards a
    port of another number."""

    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    bootstrap: tuple[str, ...] = ()
    mdns: bool = True
    dht: str = "server"
    caps: Caps = Caps()
    relay: RelayLimits | None = None
    announce: tuple[str, ...] = ()


@asynccontextmanager
async def open_libp2p(identity: Identity, options: NetworkOptions | None = None) -> AsyncIterator[Libp2pTransport]:
    """This node on the network while the context is open. Raises LocalError, with the fix, when it cannot listen."""
    options = options or NetworkOptions()
    if options.dht not in ("server", "client"):
        raise UsageError(f"the DHT mode is {options.dht!r}", 'It is "server" or "client"')
    listen = [_listen_endpoint(text) for text in options.listen]
    bootstrap = [parse_peer_address(text) for text in options.bootstrap]
    check_version()
    set_constants()
    _quieten()
    async with background_nursery() as nursery:
        transport = Libp2pTransport(identity, options, nursery)
        async with transport.running(listen):
            for peer_id, endpoint in bootstrap:
                if peer_id != identity.peer_id:
                    nursery.start_soon(transport.stay_connected, PeerAddress(peer_id, (str(endpoint),)))
            nursery.start_soon(transport.renew_forever)
            nursery.start_soon(transport.refresh_forever)
            if options.relay is not None:
                nursery.start_soon(transport.provide, RELAY_KEY)
            if options.mdns:
                async with discovering(identity.peer_id, transport.announced(), nursery, transport.discovered):
                    yield transport
            else:
                yield transport


class Libp2pTransport:
    """A `nexus.network.transport.Transport`. Made by `open_libp2p`."""

    def __init__(self, identity: Identity, options: NetworkOptions, nursery: trio.Nursery) -> None:
        self._peer_id = identity.peer_id
        self._nursery = nursery
        self._book = AddressBook()
        self._serving = Serving(identity.peer_id, nursery, self._drop)
        self._subscribers = Subscribers()
        self._topics: dict[str, int] = {}
        caps = options.caps
        self._budget = Budget(caps.buffered_bytes, caps.streams_per_connection, caps.buffered_bytes_per_peer)
        self._swarm = HardenedSwarm(
            key_pair_of(identity),
            self._budget,
            connections_max=caps.connections,
            connections_per_ip_max=caps.connections_per_ip,
            addresses=self._addresses_of,
        )
        # The library asks for addresses before there are any.
        self._bound: list[Multiaddr] = []
        self._own: Callable[[], list[str]] = list
        self._host = HardenedHost(self._swarm, self._own_addresses)
        self._host.on_identified = self._identified
        self._dht = HardenedDht(self._host, server=options.dht == "server")
        self._gossip = HardenedGossip()
        self._pubsub = HardenedPubsub(self._host, self._gossip)
        self._dials: dict[str, trio.Event] = {}
        self._provided: dict[bytes, float] = {}
        self._provide_pace = TokenBucket(PROVIDES_PER_S, PROVIDES_BURST, trio.current_time())
        self._refresh_wanted = trio.Event()
        self._discovered_dials = trio.CapacityLimiter(DISCOVERED_DIALS_AT_ONCE)
        self._traversal = Traversal(
            self._host,
            self._swarm,
            nursery,
            self._speak,
            listen=self._listening,
            announce=[_listen_endpoint(text) for text in options.announce],
            find_relays=self._find_relays,
            connect=self._connection,
            serve_relay=options.relay,
        )
        self._own = self._traversal.addresses
        self._swarm.on_disconnected = self._traversal.disconnected

    @asynccontextmanager
    async def running(self, listen: list[Endpoint]) -> AsyncIterator[None]:
        # Gossip runs before anything can connect: its notifee would block the first connection.
        async with (
            background_trio_service(self._swarm),
            background_trio_service(self._pubsub),
            background_trio_service(self._gossip),
        ):
            await self._pubsub.wait_until_ready()
            async with background_trio_service(self._dht):
                for endpoint in listen:
                    self._swarm.tcp.bound[str(endpoint)] = await _bind(endpoint)
                    await self._swarm.listen(Multiaddr(str(endpoint)))
                self._bound = self._host.get_transport_addrs()
                try:
                    yield
                finally:
                    with trio.CancelScope(shield=True), trio.move_on_after(5):
                        await self._goodbye()

    async def _goodbye(self) -> None:
        """Stop listening, which the library forgets when it is cancelled, and end all connections side by side."""
        for listener in list(self._swarm.listeners.values()):
            await listener.close()
        async with trio.open_nursery() as nursery:
            for conn in self._swarm.get_connections():
                nursery.start_soon(conn.close)

    # Who and where.

    @property
    def peer_id(self) -> str:
        return self._peer_id

    @property
    def serving(self) -> Serving:
        """What is answered here, and what each peer uses of it: also counted for streams that come another way."""
        return self._serving

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(f"{address}/p2p/{self._peer_id}" for address in self.announced())

    def announced(self) -> list[str]:
        """Where others can dial, without the peer id."""
        return self._traversal.addresses()

    def _listening(self) -> list[Endpoint]:
        """Expanded anew each time: interfaces come and go."""
        return [parse_endpoint(str(address)) for address in _expanded(self._bound)]

    def _own_addresses(self, listening: list[Multiaddr]) -> list[Multiaddr]:
        return [Multiaddr(address) for address in self._own()]

    async def netcheck(self) -> Netcheck:
        return await self._traversal.netcheck()

    async def _find_relays(self) -> list[PeerAddress]:
        return await self.find_providers(RELAY_KEY)

    def connections(self) -> list[Connection]:
        found = []
        for conn in self._live():
            muxed = conn.muxed_conn
            assert isinstance(muxed, YamuxConnection)
            direction = "in" if conn.direction == Direction.INBOUND else "out"
            address = str(muxed.get_transport_addresses()[0])
            found.append(Connection(str(muxed.peer_id), address, direction, muxed.opened_s))
        return sorted(found, key=lambda entry: (entry.peer_id, entry.opened_s))

    def learn(self, peer: PeerAddress) -> None:
        if peer.peer_id != self._peer_id:
            self._book.learn(peer)

    def _addresses_of(self, peer_id: ID) -> list[str]:
        """Our own book first, then what the library's lookups have heard."""
        known = dict.fromkeys(self._book.addresses(str(peer_id)))
        try:
            heard = [str(address) for address in self._swarm.peerstore.addrs(peer_id)]
        except Exception as error:  # noqa: BLE001 - the boundary: the library has a peer's claims in there
            log.debug("no addresses of peer %s in the peer store: %r", peer_id, error)
            heard = []
        known.update(dict.fromkeys(valid_addresses(heard)))
        return list(known)[:8]

    def _live(self, peer_id: ID | None = None) -> list[SwarmConn]:
        return [
            conn
            for conn in self._swarm.get_connections(peer_id)
            if isinstance(conn, SwarmConn) and not conn.is_closed and not conn.muxed_conn.is_closed
        ]

    # Connecting.

    async def connect(self, address: str) -> str:
        peer_id, endpoint = parse_peer_address(address)
        if peer_id == self._peer_id:
            raise UsageError(f"{address} is this node itself")
        if not self._live(_id(peer_id)):
            await self._dial(peer_id, [str(endpoint)])
        self._book.succeeded(peer_id, str(endpoint))
        return peer_id

    async def disconnect(self, peer_id: str) -> None:
        for conn in self._live(_id(parse_peer_id(peer_id))):
            await conn.close()

    def _drop(self, peer_id: str) -> None:
        """A peer broke the rules too often."""
        self._swarm.shun(_id(peer_id), SHUN_S)
        self._nursery.start_soon(self.disconnect, peer_id)

    async def _connection(self, peer_id: str) -> YamuxConnection:
        """A live connection, dialling where there is none: a direct one before one through a relay, and the oldest, so that both
        sides tend to the same."""
        for _ in range(2):
            live = self._live(_id(peer_id))
            if live:
                muxed = min((conn.muxed_conn for conn in live), key=_preference)
                assert isinstance(muxed, YamuxConnection)
                return muxed
            addresses = self._addresses_of(_id(peer_id))
            try:
                if not addresses:
                    raise no_address(peer_id)
                await self._dial(peer_id, addresses)
            except UnreachableError:
                # Others may know better by now: a node that took another relay, or another address.
                news = [address for address in await self._ask_around(peer_id) if address not in addresses]
                if not news:
                    raise
                await self._dial(peer_id, news)
        raise UnreachableError(f"the connection to peer {peer_id} broke off at once", peer=peer_id)

    async def _ask_around(self, peer_id: str) -> tuple[str, ...]:
        """Where others last heard that a peer can be dialled. What a stranger claims of it is tried, and proves itself or not."""
        with trio.move_on_after(ASK_AROUND_TIMEOUT_S):
            return valid_addresses(await self._dht.addresses_of(_id(peer_id)))
        return ()

    async def _dial(self, peer_id: str, addresses: list[str]) -> None:
        """Try addresses until one answers. Only one task at a time dials a peer."""
        while (running := self._dials.get(peer_id)) is not None:
            await running.wait()
            if self._live(_id(peer_id)):
                return
        done = self._dials[peer_id] = trio.Event()
        try:
            try:
                _, address = await self._swarm.dial_any(
                    _id(peer_id), addresses, lambda address: self._book.failed(peer_id, address)
                )
            except SwarmException as error:
                raise UnreachableError(f"cannot reach peer {peer_id} at {error}", peer=peer_id) from error
            self._book.succeeded(peer_id, address)
        finally:
            del self._dials[peer_id]
            done.set()

    async def stay_connected(self, peer: PeerAddress) -> None:
        """Keep a connection to a bootstrap peer, with longer and longer pauses while it does not answer."""
        shortest_s, longest_s = BOOTSTRAP_RETRY_S
        pause_s = shortest_s
        while True:
            # Again each time: the book drops addresses that fail, and the user named this one.
            self.learn(peer)
            try:
                conn = await self._connection(peer.peer_id)
                pause_s = shortest_s
                await conn.event_closed.wait()
            except UnreachableError as error:
                log.info("bootstrap peer: %s; next try in %.0f s", error, pause_s)
            await trio.sleep(pause_s * (0.75 + 0.5 * random.random()))  # noqa: S311 - spreads load, keeps no secret
            pause_s = min(longest_s, 2 * pause_s)

    def discovered(self, peer: PeerAddress) -> None:
        """mDNS heard of a peer."""
        try:
            public_key_of(peer.peer_id)
        except MalformedError:
            return
        if peer.peer_id == self._peer_id or not peer.addresses:
            return
        self.learn(peer)
        if not self._live(_id(peer.peer_id)) and self._discovered_dials.available_tokens > 0:
            self._nursery.start_soon(self._dial_discovered, peer.peer_id)

    async def _dial_discovered(self, peer_id: str) -> None:
        async with self._discovered_dials:
            try:
                await self._connection(peer_id)
            except UnreachableError as error:
                log.debug("a peer that mDNS found: %s", error)

    async def _identified(self, peer_id: ID) -> None:
        """A new peer said what it is: keep its addresses, and fill the routing table, which the library leaves empty."""
        self.learn(PeerAddress(str(peer_id), valid_addresses([str(address) for address in self._swarm.peerstore.addrs(peer_id)])))
        if str(KAD_PROTOCOL) in self._swarm.peerstore.get_protocols(peer_id):
            new = not self._dht.routing_table.peer_in_table(peer_id)
            if await self._dht.add_peer(peer_id) and new:
                self._refresh_wanted.set()

    async def refresh_forever(self) -> None:
        """Look around in the DHT after new peers came, not for each of them."""
        while True:
            await self._refresh_wanted.wait()
            self._refresh_wanted = trio.Event()
            with trio.move_on_after(FIND_TIMEOUT_S):
                await self._dht.peer_routing.find_closest_peers_network(_id(self._peer_id).to_bytes())
            await trio.sleep(REFRESH_PAUSE_S)

    # Streams.

    def serve(self, protocol: ProtocolSpec, handler: Handler) -> None:
        self._serving.serve(protocol, handler)

        async def answer(stream: INetStream) -> None:
            muxed = stream.muxed_stream  # type: ignore[attr-defined]
            assert isinstance(muxed, YamuxStream)
            framed = FrameStream(muxed, str(muxed.conn.peer_id), protocol, self._serving.limits)
            try:
                await self._serving.run(framed, protocol, handler)
            finally:
                framed.abandon()

        self._host.serve_directly(TProtocol(protocol.id), answer)

    async def open_stream(self, peer_id: str, protocol: ProtocolSpec) -> Stream:
        if peer_id == self._peer_id:
            await trio.lowlevel.checkpoint()
            return self._serving.open_to_self(protocol)
        conn = await self._connection(parse_peer_id(peer_id))
        return FrameStream(await self._negotiated(conn, protocol), peer_id, protocol, self._serving.limits)

    async def _speak(self, conn: YamuxConnection, protocol: str) -> YamuxStream:
        return await self._negotiated(conn, ProtocolSpec(protocol, frame_max=0))

    async def _negotiated(self, conn: YamuxConnection, protocol: ProtocolSpec) -> YamuxStream:
        """A new stream on which the peer has agreed to speak `protocol`. Both questions of multistream-select go out at once."""
        peer_id = str(conn.peer_id)
        try:
            muxed = conn.open_stream_now()
        except MuxedConnUnavailable as error:
            raise UnreachableError(f"the connection to peer {peer_id} broke off: {error}", peer=peer_id) from error
        agreed = False
        try:
            with trio.fail_after(NEGOTIATE_TIMEOUT_S):
                await muxed.write(_line(_MULTISTREAM) + _line(protocol.id))
                greeting, answer = await _read_line(muxed), await _read_line(muxed)
            if greeting == _MULTISTREAM and answer == "na":
                raise not_served(peer_id, protocol)
            if (greeting, answer) != (_MULTISTREAM, protocol.id):
                raise PeerError(f"peer {peer_id} does not negotiate protocols as libp2p does", peer=peer_id)
            agreed = True
            return muxed
        except trio.TooSlowError as error:
            raise TimedOutError(f"peer {peer_id} did not answer about {protocol.id} in {NEGOTIATE_TIMEOUT_S:g} s") from error
        except MuxedStreamError as error:
            raise UnreachableError(f"peer {peer_id} broke off while agreeing on {protocol.id}", peer=peer_id) from error
        finally:
            if not agreed:
                muxed.reset_now()

    async def ping(self, peer_id: str) -> float:
        if peer_id == self._peer_id:
            await trio.lowlevel.checkpoint()
            return 0.0
        conn = await self._connection(parse_peer_id(peer_id))
        muxed = await self._negotiated(conn, ProtocolSpec(str(PING_PROTOCOL), frame_max=PING_LENGTH))
        payload = os.urandom(PING_LENGTH)
        try:
            with trio.fail_after(PING_TIMEOUT_S):
                begin_s = trio.current_time()
                await muxed.write(payload)
                answer = b""
                while len(answer) < PING_LENGTH:
                    answer += await muxed.read(PING_LENGTH - len(answer))
                rtt_s = trio.current_time() - begin_s
        except trio.TooSlowError as error:
            raise TimedOutError(f"peer {peer_id} did not answer a ping in {PING_TIMEOUT_S:g} s") from error
        except MuxedStreamError as error:
            raise UnreachableError(f"peer {peer_id} broke off during a ping", peer=peer_id) from error
        finally:
            muxed.reset_now()
        if answer != payload:
            raise PeerError(f"peer {peer_id} answers pings with other bytes", peer=peer_id)
        return rtt_s

    # The DHT.

    async def provide(self, key: bytes) -> None:
        check_key(key)
        if key not in self._provided and len(self._provided) >= PROVIDED_MAX:
            raise CapacityError(f"this node announces {PROVIDED_MAX} keys already", "Announce collections, not their parts")
        self._provided[key] = trio.current_time() + RENEW_AFTER_S[0]
        await trio.sleep(self._provide_pace.take(1, trio.current_time()))
        confirmed = 0
        with trio.move_on_after(PROVIDE_TIMEOUT_S):
            confirmed = await self._dht.announce(key)
        log.debug("%d peers keep the announcement of %s", confirmed, key.hex()[:16])
        if key in self._provided:  # not withdrawn meanwhile
            self._provided[key] = trio.current_time() + RENEW_AFTER_S.get(confirmed, RENEW_AFTER_MANY_S)

    def withdraw(self, key: bytes) -> None:
        self._provided.pop(key, None)

    async def renew_forever(self) -> None:
        """Announce again what was announced: before it expires, and for peers that came later."""
        while True:
            await trio.sleep(RENEW_CHECK_S)
            for key, due_s in list(self._provided.items()):
                if trio.current_time() >= due_s:
                    await self.provide(key)

    async def find_providers(self, key: bytes, limit: int = 20) -> list[PeerAddress]:
        check_key(key)
        found: dict[str, list[str]] = {}
        with trio.move_on_after(FIND_TIMEOUT_S):
            await self._dht.lookup(key, limit, found)
        peers = []
        for peer_id, addresses in found.items():
            try:
                public_key_of(peer_id)
            except MalformedError:
                continue
            if peer_id != self._peer_id and (usable := valid_addresses(addresses)):
                peers.append(PeerAddress(peer_id, usable))
                # Hearsay: what we know already comes first.
                self._book.learn(PeerAddress(peer_id, (*self._book.addresses(peer_id), *usable)))
        return peers[:limit]

    # Gossip.

    async def publish(self, topic: str, data: bytes) -> None:
        check_message(data)
        await self._pubsub.publish(topic, data)

    @asynccontextmanager
    async def _subscribed(self, topic: str) -> AsyncIterator[trio.MemoryReceiveChannel[Message]]:
        async with self._subscribers.subscribe(topic) as channel:
            self._topics[topic] = self._topics.get(topic, 0) + 1
            try:
                if self._topics[topic] == 1:
                    self._nursery.start_soon(self._pump_topic, topic, await self._pubsub.subscribe(topic))
                yield channel
            finally:
                self._topics[topic] -= 1
                if not self._topics[topic]:
                    del self._topics[topic]
                    with trio.CancelScope(shield=True), trio.move_on_after(2):
                        await self._pubsub.unsubscribe(topic)

    def subscribe(self, topic: str) -> Subscription:
        return self._subscribed(topic)

    async def _pump_topic(self, topic: str, source: object) -> None:
        async for message in source:  # type: ignore[attr-defined]
            assert isinstance(message, rpc_pb2.Message)
            publisher = str(ID(message.from_id))
            try:
                public_key_of(publisher)
            except MalformedError:
                continue
            if publisher != self._peer_id:
                self._subscribers.deliver(topic, Message(publisher, message.data))


def _id(peer_id: str) -> ID:
    return ID.from_base58(peer_id)


def _preference(conn: object) -> tuple[bool, float]:
    assert isinstance(conn, YamuxConnection)
    return bool(conn.channel.circuit), conn.opened_s


def _line(text: str) -> bytes:
    return encode_varint_prefixed(text.encode() + b"\n")


async def _read_line(muxed: YamuxStream) -> str:
    """One message of multistream-select. Raises PeerError."""
    peer_id = str(muxed.conn.peer_id)
    size = shift = 0
    while True:
        byte = (await muxed.read(1))[0]
        size |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
        if shift > 14:
            raise PeerError(f"peer {peer_id} does not negotiate protocols as libp2p does", peer=peer_id)
    if size > _NEGOTIATION_LINE_MAX:
        raise PeerError(f"peer {peer_id} does not negotiate protocols as libp2p does", peer=peer_id)
    body = b""
    while len(body) < size:
        body += await muxed.read(size - len(body))
    return body.removesuffix(b"\n").decode("utf-8", "replace")


def _listen_endpoint(text: str) -> Endpoint:
    try:
        endpoint = parse_endpoint(text)
    except MalformedError as error:
        raise UsageError(f"cannot listen on {text!r}: it is not a TCP address", "Use one like /ip4/0.0.0.0/tcp/4001") from error
    if endpoint.kind not in ("ip4", "ip6"):
        raise UsageError(f"cannot listen on {text!r}: it is a name", "Use an IP address, as in /ip4/0.0.0.0/tcp/4001")
    return endpoint


async def _bind(endpoint: Endpoint) -> list[trio.SocketListener]:
    """Raises LocalError with the fix."""
    try:
        return list(await trio.open_tcp_listeners(endpoint.port, host=endpoint.host))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise LocalError(
                f"port {endpoint.port} is in use on {endpoint.host}",
                "Stop what uses it, or choose another port (0 takes a free one) in `network.listen`",
            ) from error
        reason = error.strerror or str(error)
        raise LocalError(f"cannot listen on {endpoint}: {reason}", "Choose another address in `network.listen`") from error


def _expanded(addresses: list[Multiaddr]) -> list[Multiaddr]:
    """An address of all interfaces stands for each of them."""
    out: dict[str, None] = {}
    for address in addresses:
        endpoint = parse_endpoint(str(address))
        if endpoint.host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
            for interface in get_available_interfaces(endpoint.port):
                text = str(interface)
                if text.startswith(f"/{endpoint.kind}/") and not text.startswith("/ip6/fe80"):
                    out[text] = None
        else:
            out[str(endpoint)] = None
    return [Multiaddr(text) for text in out]


def _quieten() -> None:
    """The library reports what any stranger does at warning and error level, in many lines each."""
    if "LIBP2P_DEBUG" not in os.environ:
        logging.getLogger("libp2p").setLevel(logging.CRITICAL)

"""py-libp2p, made fit to face strangers. Everything that works around the library is here, in `noise` and in `yamux`.

Where the library lets us, its classes are extended and plugged in, so that other hosts in the process stay as they are; only two
constants, which it does not let anyone choose, are set in its modules. Each piece names the defect that it is for; it goes when
upstream mends that. All of it is written against one version, and refuses to run on another.
"""

from __future__ import annotations

import logging
import random
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version

import libp2p.kad_dht.common as kad_common
import libp2p.kad_dht.kad_dht as kad_module
import libp2p.kad_dht.peer_routing as kad_peer_routing
import libp2p.kad_dht.provider_store as kad_provider_store
import libp2p.kad_dht.value_store as kad_value_store
import trio
from libp2p.abc import IHost, IMuxedConn, INetConn, INetStream, IRawConnection, ISecureConn
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import StreamHandlerFn, THandler, TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.trio import TrioTCPStream
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Message as KadMessage
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.kad_dht.utils import sort_peer_ids_by_distance
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.peer.peerstore import PeerStore, env_to_send_in_RPC
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.score import ScoreParams, TopicScoreParams
from libp2p.records.validator import NamespacedValidator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL_ID
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP, TCPListener
from libp2p.transport.upgrader import TransportUpgrader
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from nexus.core.errors import LocalError
from nexus.core.keys import Identity
from nexus.network.addresses import Circuit, is_circuit, parse_address
from nexus.network.libp2p.noise import NoiseTransport
from nexus.network.libp2p.yamux import PROTOCOL_ID as YAMUX_PROTOCOL_ID
from nexus.network.libp2p.yamux import Budget, YamuxConnection, YamuxStream
from nexus.network.limits import TokenTable
from nexus.network.reachability import LOOPBACK, scope_of
from nexus.network.transport import GOSSIP_BYTES_MAX

log = logging.getLogger(__name__)

LIBP2P_VERSION = "0.8.1"
KAD_PROTOCOL = TProtocol("/nexus/kad/1.0.0")
GOSSIP_PROTOCOLS = (TProtocol("/meshsub/1.2.0"), TProtocol("/meshsub/1.1.0"))
DIAL_TIMEOUT_S = 10.0
HEAD_START_S = 0.25
UPGRADE_TIMEOUT_S = 10.0
DHT_QUERY_TIMEOUT_S = 2.0
DHT_STREAM_S = 30.0
DHT_STREAMS_AT_ONCE = 64
DHT_MESSAGE_BYTES_MAX = 256 * 1024
PROVIDERS_PER_PEER_MAX = 64
ASKED_FOR_ADDRESSES = 6
PROVIDED_KEYS_MAX = 16_384
PROVIDER_RECORD_S = 2 * 3600
GOSSIP_RPC_BYTES_MAX = 128 * 1024
# Open inbound streams per peer of the library's own protocols.
LIBRARY_STREAMS_PER_PEER = {
    KAD_PROTOCOL: 6,
    "/ipfs/ping/1.0.0": 4,
    # One for each circuit, which the service and the client count themselves; a few more are told why not.
    "/libp2p/circuit/relay/0.2.0/hop": 24,
    "/libp2p/circuit/relay/0.2.0/stop": 72,
}
LIBRARY_STREAMS_PER_PEER_DEFAULT = 3
# Reads per second and peer by the library's handlers, over all its streams of a protocol: a message takes two or three.
READS_PER_S = {KAD_PROTOCOL: 100.0, GOSSIP_PROTOCOLS[0]: 600.0, GOSSIP_PROTOCOLS[1]: 600.0}
READS_PER_S_DEFAULT = 50.0
READS_BURST = 10.0  # seconds of it
CONNECTIONS_PER_PEER_MAX = 6
PROVIDED_PER_PEER_MAX = 1024
PROVIDERS_PER_IP_MAX = 8
GOSSIP_TOPIC_CHARS_MAX = 256
# Messages per second that one forwarder hands on, and that one publisher is behind, over all topics.
GOSSIP_FORWARDED_PER_S = 400.0
GOSSIP_PUBLISHED_PER_S = 20.0
GOSSIP_BURST = 10.0  # seconds of it
PEERS_TRACKED_MAX = 4096


AddressSource = Callable[[ID], Sequence[str]]


def check_version() -> None:
    """Refuse to run on a libp2p that this was not written for. Raises LocalError."""
    found = version("libp2p")
    if found != LIBP2P_VERSION:
        raise LocalError(
            f"libp2p {found} is installed, and Nexus is written against {LIBP2P_VERSION}",
            f"Install the pinned version: pip install libp2p=={LIBP2P_VERSION}",
        )


def set_constants() -> None:
    """What the library reads from its modules and offers no way to choose.

    `PROTOCOL_ID`: `protocol_prefix` is ignored, so that every py-libp2p DHT is one with the public IPFS network.
    `QUERY_TIMEOUT`: 10 s per peer, so that a lookup past two frozen peers takes 20 s.
    """
    for module in (kad_common, kad_module, kad_peer_routing, kad_provider_store, kad_value_store):
        for name, value in (("PROTOCOL_ID", KAD_PROTOCOL), ("QUERY_TIMEOUT", DHT_QUERY_TIMEOUT_S)):
            if hasattr(module, name):
                setattr(module, name, value)
    kad_provider_store.PROVIDER_RECORD_EXPIRATION_INTERVAL = PROVIDER_RECORD_S


class HardenedMuxers(MuxerMultistream):
    """The library constructs its own yamux, whatever class it is given: here it is ours."""

    def __init__(self, budget: Budget) -> None:
        super().__init__({TProtocol(YAMUX_PROTOCOL_ID): YamuxConnection}, negotiate_timeout=int(UPGRADE_TIMEOUT_S))
        self._budget = budget

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        return self._annotate_connection(YamuxConnection(conn, peer_id, self._budget), conn, protocol)


class BoundListener(TCPListener):
    """Serves a socket that is bound already. The library binds with SO_REUSEPORT, so that two daemons share a port unawares."""

    def __init__(self, handler_function: THandler, bound: dict[str, list[trio.SocketListener]]) -> None:
        super().__init__(handler_function)
        self._bound = bound

    async def listen(self, maddr: Multiaddr) -> None:
        async def serve(stream: trio.SocketStream) -> None:
            try:
                await self.handler(TrioTCPStream(stream))
            except Exception as error:  # noqa: BLE001 - the boundary: a stranger's handshake may fail in any way
                log.debug("an inbound connection failed: %r", error)

        listeners = self._bound.pop(str(maddr), None)
        if listeners is None:
            raise OpenConnectionError(f"{maddr} is not bound")
        await self._spawn_background_task()
        assert self._nursery is not None
        self._nursery.start_soon(trio.serve_listeners, serve, listeners)
        self.listeners.extend(listeners)


class BoundTcp(TCP):
    """TCP that listens on sockets which the caller has bound, by multiaddr."""

    def __init__(self) -> None:
        super().__init__()
        self.bound: dict[str, list[trio.SocketListener]] = {}

    def create_listener(self, handler_function: THandler) -> BoundListener:
        return BoundListener(handler_function, self.bound)


class NoAutoConnector(AutoConnector):
    """The library's dials whatever addresses it has heard of until half of all connections are in use, watermarks or not."""

    async def run_background_task(self, nursery: trio.Nursery) -> None:
        return

    async def maybe_connect(self) -> None:
        return


class HardenedSwarm(Swarm):
    """Inbound slots that come free again, a cap per IP address, and dials that try every address and hold no grudge."""

    def __init__(
        self, key_pair: KeyPair, budget: Budget, *, connections_max: int, connections_per_ip_max: int, addresses: AddressSource
    ) -> None:
        peer_id = ID.from_pubkey(key_pair.public_key)
        peerstore = PeerStore()
        peerstore.add_key_pair(peer_id, key_pair)
        noise = NoiseTransport(key_pair, create_noise_key_pair().private_key)
        upgrader = TransportUpgrader({NOISE_PROTOCOL_ID: noise}, {}, negotiate_timeout=int(UPGRADE_TIMEOUT_S))
        upgrader.muxer_multistream = HardenedMuxers(budget)
        config = ConnectionConfig(
            max_connections=connections_max,
            min_connections=0,
            low_watermark=0,
            high_watermark=connections_max,
            inbound_upgrade_timeout=UPGRADE_TIMEOUT_S,
            outbound_upgrade_timeout=UPGRADE_TIMEOUT_S,
        )
        self.tcp = BoundTcp()
        super().__init__(peer_id, peerstore, upgrader, [self.tcp], RetryConfig(max_retries=0), config)
        self.auto_connector = NoAutoConnector(self)
        self._connections_per_ip_max = connections_per_ip_max
        self._per_ip: Counter[str] = Counter()
        self._addresses = addresses
        self._shunned: OrderedDict[ID, float] = OrderedDict()
        self.noise = noise
        self.on_disconnected: Callable[[str], None] | None = None
        self.dial_circuit: Callable[[ID, Circuit], Awaitable[INetConn]] | None = None

    def shun(self, peer_id: ID, seconds: float) -> None:
        """Take no connection from a peer for a while, and let no lookup of the DHT dial it."""
        self._shunned[peer_id] = trio.current_time() + seconds
        self._shunned.move_to_end(peer_id)
        while len(self._shunned) > PEERS_TRACKED_MAX:
            self._shunned.popitem(last=False)

    def shuns(self, peer_id: ID) -> bool:
        return self._shunned.get(peer_id, 0.0) > trio.current_time()

    async def add_conn(self, muxed_conn: IMuxedConn, direction: str = "unknown") -> SwarmConn:
        held = [conn for conn in self.get_connections(muxed_conn.peer_id) if not conn.is_closed]
        if direction == "inbound" and len(held) >= CONNECTIONS_PER_PEER_MAX:
            await muxed_conn.close()
            raise SwarmException(f"peer {muxed_conn.peer_id} has {len(held)} connections already")
        if direction == "inbound" and self.shuns(muxed_conn.peer_id):
            await muxed_conn.close()
            raise SwarmException(f"peer {muxed_conn.peer_id} was dropped a while ago")
        return await super().add_conn(muxed_conn, direction)

    async def _handle_inbound_connection(self, read_write_closer: ReadWriteCloser, maddr: Multiaddr) -> None:
        """Identities are free: without this, 256 of them from one address fill every slot."""
        try:
            host = str(read_write_closer.stream.socket.getpeername()[0])  # type: ignore[attr-defined]
        except OSError:
            await read_write_closer.close()
            return
        if self._per_ip[host] >= self._connections_per_ip_max:
            log.info("%s has %d connections open: one more is refused", host, self._per_ip[host])
            await read_write_closer.close()
            return
        self._per_ip[host] += 1
        try:
            await super()._handle_inbound_connection(read_write_closer, maddr)
        finally:
            self._per_ip[host] -= 1
            if not self._per_ip[host]:
                del self._per_ip[host]

    def remove_conn(self, swarm_conn: SwarmConn) -> None:
        super().remove_conn(swarm_conn)
        if self.on_disconnected is not None:
            self.on_disconnected(str(swarm_conn.muxed_conn.peer_id))

    async def take_circuit(self, stream: ReadWriteCloser, maddr: Multiaddr) -> None:
        """An inbound connection that comes through a relay, until it ends. Circuits are capped per relay, not per IP address."""
        await super()._handle_inbound_connection(stream, maddr)

    async def upgrade_inbound_raw_conn(self, raw_conn: IRawConnection, maddr: Multiaddr) -> IMuxedConn:
        """The library holds the slot of an inbound connection until the host stops, so that 250 in a lifetime are all it takes."""
        muxed_conn = await super().upgrade_inbound_raw_conn(raw_conn, maddr)
        if isinstance(muxed_conn, YamuxConnection):
            await muxed_conn.event_closed.wait()
        # What its caller takes for a failure makes it free the slot.
        raise SwarmException("the inbound connection has ended")

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        """The library dials one address, and after a failure refuses the peer for a minute. Here: one by one, no grudge."""
        live = [conn for conn in self.get_connections(peer_id) if not conn.is_closed]
        if live:
            return live
        if self.shuns(peer_id):
            raise SwarmException(f"peer {peer_id} was dropped a while ago")
        conn, _ = await self.dial_any(peer_id, self._addresses(peer_id), lambda address: None)
        return [conn]

    async def dial_any(self, peer_id: ID, addresses: Sequence[str], failed: Callable[[str], None]) -> tuple[INetConn, str]:
        """The first of the addresses that answers, and the connection. Raises SwarmException with all reasons.

        Each has a head start over the next (RFC 8305), so that an address that swallows everything, as private ones of another
        network do, holds up the others for no longer. Relays come last. `failed`: called with each that failed.
        """
        reasons: dict[str, str] = {}
        won: list[tuple[INetConn, str]] = []
        ranked = sorted(addresses, key=is_circuit)

        async def attempt(address: str, over: trio.Event) -> None:
            try:
                conn = await self.dial_endpoint(peer_id, address)
            except SwarmException as error:
                failed(address)
                reasons[address] = str(error)
                over.set()
            else:
                won.append((conn, address))
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for address in ranked:
                over = trio.Event()
                nursery.start_soon(attempt, address, over)
                with trio.move_on_after(HEAD_START_S):
                    await over.wait()
        if won:
            return won[0]
        raise SwarmException(
            "; at ".join(f"{address}: {reasons[address]}" for address in ranked if address in reasons)
            or f"no known address of peer {peer_id}"
        )

    async def dial_endpoint(self, peer_id: ID, address: str) -> INetConn:
        """One attempt at one address, bounded in time. Raises SwarmException with the reason."""
        try:
            with trio.fail_after(DIAL_TIMEOUT_S):
                parsed = parse_address(address)
                if isinstance(parsed, Circuit):
                    if self.dial_circuit is None:
                        raise SwarmException("this node uses no relays")
                    return await self.dial_circuit(peer_id, parsed)
                return await self._dial_addr_single_attempt(Multiaddr(address), peer_id)
        except trio.TooSlowError as error:
            raise SwarmException(f"no answer in {DIAL_TIMEOUT_S:g} s") from error
        except Exception as error:  # the boundary: a handshake with a stranger may fail in any way
            raise SwarmException(dial_failure(error)) from error


def dial_failure(error: BaseException) -> str:
    """The reason at the root of a failed dial, in words."""
    root: BaseException = error
    for _ in range(16):
        if isinstance(root, BaseExceptionGroup) and root.exceptions:
            root = root.exceptions[0]
        elif (cause := root.__cause__ or (None if root.__suppress_context__ else root.__context__)) is not None:
            root = cause
        else:
            break
    kind = type(root).__name__
    if kind in ("PeerIDMismatchesPubkey", "SecurityUpgradeFailure") and "mismatch" in f"{kind}{root}".lower():
        return "another peer answers there"
    if isinstance(root, ConnectionRefusedError) or "refused" in str(root).lower():
        return "connection refused"
    return str(root) or kind


class HardenedHost(BasicHost):
    """A handler's exception ends its stream and not the process; each protocol has a cap of streams per peer."""

    def __init__(self, swarm: HardenedSwarm, addrs_factory: Callable[[list[Multiaddr]], list[Multiaddr]]) -> None:
        self._per_peer: Counter[tuple[ID, str]] = Counter()
        self.on_identified: Callable[[ID], Awaitable[None]] | None = None
        self._own_addresses = addrs_factory
        super().__init__(swarm, addrs_factory=addrs_factory, disable_identify_address_discovery=True)
        for protocol, handler in list(self.multiselect.handlers.items()):
            if protocol is not None and handler is not None:
                self.set_stream_handler(protocol, handler)

    def set_stream_handler(self, protocol_id: TProtocol, stream_handler: StreamHandlerFn) -> None:
        """For the library's own protocols. An idle DHT stream holds one of 12 places for ever there: here it has a deadline."""
        cap = LIBRARY_STREAMS_PER_PEER.get(protocol_id, LIBRARY_STREAMS_PER_PEER_DEFAULT)
        rate = READS_PER_S.get(protocol_id, READS_PER_S_DEFAULT)
        reads = TokenTable(rate, READS_BURST * rate)
        deadline_s = DHT_STREAM_S if protocol_id == KAD_PROTOCOL else float("inf")

        async def bounded(stream: INetStream) -> None:
            key = (stream.muxed_conn.peer_id, str(protocol_id))
            if self._per_peer[key] >= cap:
                await stream.reset()
                return
            self._per_peer[key] += 1
            muxed = stream.muxed_stream  # type: ignore[attr-defined]
            if isinstance(muxed, YamuxStream):
                peer = (str(key[0]),)
                muxed.pace = lambda: reads.delay_s(peer, 1, trio.current_time())
            try:
                with trio.move_on_after(deadline_s) as scope:
                    await stream_handler(stream)
                if scope.cancelled_caught:
                    await stream.reset()
            finally:
                # The library's handlers leave their side open when they return.
                if isinstance(muxed, YamuxStream):
                    muxed.abandon()
                self._per_peer[key] -= 1
                if not self._per_peer[key]:
                    del self._per_peer[key]

        super().set_stream_handler(protocol_id, bounded)

    def serve_directly(self, protocol_id: TProtocol, stream_handler: StreamHandlerFn) -> None:
        """For our own protocols, which bound themselves."""
        super().set_stream_handler(protocol_id, stream_handler)

    def get_addrs(self) -> list[Multiaddr]:
        """The library cuts an address off at its first peer id, which is the relay's in an address through one."""
        suffix = f"/p2p/{self.get_id()}"
        return [Multiaddr(f"{address}{suffix}") for address in self._own_addresses(self.get_transport_addrs())]

    async def new_stream(self, peer_id: ID, protocol_ids: Sequence[TProtocol]) -> INetStream:
        """Only DHT queries may dial. Identify and gossip would call back every peer that has just been disconnected."""
        if KAD_PROTOCOL not in protocol_ids and all(conn.is_closed for conn in self._network.get_connections(peer_id)):
            raise SwarmException(f"peer {peer_id} is not connected")
        return await super().new_stream(peer_id, protocol_ids)

    async def _swarm_stream_handler(self, net_stream: INetStream) -> None:
        try:
            await super()._swarm_stream_handler(net_stream)
        except Exception as error:  # noqa: BLE001 - the boundary: the library lets any exception here end the process
            log.debug("a stream of peer %s failed: %r", net_stream.muxed_conn.peer_id, error)
            await net_stream.reset()

    async def _identify_task_entry(self, peer_id: ID, reason: str) -> None:
        """Tell when a peer's protocols are known. It runs as a system task, where an exception ends the process."""
        try:
            await super()._identify_task_entry(peer_id, reason)
            if self.on_identified is not None:
                await self.on_identified(peer_id)
        except Exception as error:  # noqa: BLE001 - the boundary, as above
            log.debug("identifying peer %s failed: %r", peer_id, error)


class HardenedProviders(ProviderStore):
    """A bounded store of what others announced. The library keeps any number of keys, and republishes its own in one burst."""

    def __init__(self, host: IHost) -> None:
        super().__init__(host)
        self.providers = OrderedDict()
        self._keys_of: OrderedDict[str, OrderedDict[bytes, None]] = OrderedDict()

    def add_provider(self, key: bytes, provider: PeerInfo) -> None:
        """The library bounds providers per key (20). Here: keys in all, keys of one peer, and the peers of one IP address behind a
        key, or one machine would fill it with identities of its own. What expired makes room first."""
        self.get_providers(key)  # drops what has expired
        peer_id = str(provider.peer_id)
        host = self._host_of(provider.peer_id)
        if host:
            others = [one for one in self.providers.get(key, {}) if one != peer_id]
            if sum(self._host_of(ID.from_base58(one)) == host for one in others) >= PROVIDERS_PER_IP_MAX:
                return
        keys = self._keys_of.setdefault(peer_id, OrderedDict())
        keys[key] = None
        keys.move_to_end(key)
        self._keys_of.move_to_end(peer_id)
        if len(keys) > PROVIDED_PER_PEER_MAX:
            oldest, _ = keys.popitem(last=False)
            self._forget(oldest, peer_id)
        while len(self._keys_of) > PEERS_TRACKED_MAX:
            gone, its_keys = self._keys_of.popitem(last=False)
            for its_key in its_keys:
                self._forget(its_key, gone)
        super().add_provider(key, PeerInfo(provider.peer_id, list(provider.addrs)[:8]))
        assert isinstance(self.providers, OrderedDict)
        self.providers.move_to_end(key)
        while len(self.providers) > PROVIDED_KEYS_MAX:
            self.providers.popitem(last=False)

    def _forget(self, key: bytes, peer_id: str) -> None:
        records = self.providers.get(key)
        if records is not None:
            records.pop(peer_id, None)
            if not records:
                del self.providers[key]

    def _host_of(self, peer_id: ID) -> str:
        """The IP address that a peer is connected from; "" where it is not, or is on this machine."""
        for conn in self.host.get_network().get_connections(peer_id):
            muxed = conn.muxed_conn
            address = muxed.get_remote_address() if isinstance(muxed, YamuxConnection) else None
            if address is not None and scope_of(address[0]) != LOOPBACK:
                return address[0]
        return ""

    async def _republish_provider_records(self) -> None:
        return  # the adapter renews, paced


class HardenedDht(KadDHT):
    """Kademlia with provider records only: values would let any peer store 50,000 records of a megabyte."""

    def __init__(self, host: HardenedHost, *, server: bool) -> None:
        nothing = NamespacedValidator({}, strict_validation=True)
        super().__init__(
            host, DHTMode.SERVER if server else DHTMode.CLIENT, validator=nothing, validator_changed=True, strict_validation=True
        )
        self.provider_store = HardenedProviders(host)
        self._inbound_limiter = trio.CapacityLimiter(DHT_STREAMS_AT_ONCE)

    async def announce(self, key: bytes) -> int:
        """Put a provider record at the peers closest to `key`. How many of them confirmed: the library's `provide` never looks."""
        addrs = list(self.host.get_addrs())
        self.provider_store.add_provider(key, PeerInfo(self.local_peer_id, addrs))
        closest = await self.peer_routing.find_closest_peers_network(key)
        message = KadMessage(type=KadMessage.ADD_PROVIDER, key=key)
        message.senderRecord = env_to_send_in_RPC(self.host)[0]
        provider = message.providerPeers.add()
        provider.id = self.local_peer_id.to_bytes()
        provider.addrs.extend(addr.to_bytes() for addr in addrs)
        confirmed = 0

        async def one(peer_id: ID) -> None:
            nonlocal confirmed
            reply = await self._ask(peer_id, message)
            confirmed += reply is not None and reply.type == KadMessage.ADD_PROVIDER

        async with trio.open_nursery() as nursery:
            for peer_id in closest:
                if peer_id != self.local_peer_id:
                    nursery.start_soon(one, peer_id)
        return confirmed

    async def lookup(self, key: bytes, limit: int, found: dict[str, list[str]]) -> None:
        """Ask the peers closest to `key` who provides it, into `found` (peer id -> multiaddrs as text).

        The library answers from its own store alone where it has anything, and stores what it heard: dead entries live on.
        """
        for provider in self.provider_store.get_providers(key):
            found[str(provider.peer_id)] = [str(addr) for addr in provider.addrs]
        asked = {self.local_peer_id}
        candidates = list(await self.peer_routing.find_closest_peers_network(key))
        while candidates and len(found) < limit:
            batch = candidates[: kad_common.ALPHA]
            closer: list[ID] = []

            async def one(peer_id: ID, closer: list[ID] = closer) -> None:
                reply = await self._ask(peer_id, KadMessage(type=KadMessage.GET_PROVIDERS, key=key))
                if reply is None or reply.type != KadMessage.GET_PROVIDERS:
                    return
                for peer in reply.providerPeers[:PROVIDERS_PER_PEER_MAX]:
                    found.setdefault(str(ID(peer.id)), []).extend(_addresses(peer))
                closer.extend(ID(peer.id) for peer in reply.closerPeers[: kad_common.BUCKET_SIZE])

            async with trio.open_nursery() as nursery:
                for peer_id in batch:
                    if peer_id not in asked:
                        asked.add(peer_id)
                        nursery.start_soon(one, peer_id)
            known = set(candidates)
            fresh = [peer_id for peer_id in dict.fromkeys(closer) if peer_id not in asked and peer_id not in known]
            remaining = candidates[len(batch) :] + fresh
            candidates = sort_peer_ids_by_distance(key, remaining)[: kad_common.BUCKET_SIZE]

    async def addresses_of(self, target: ID) -> list[str]:
        """Where connected peers say that `target` can be dialled."""
        found: list[str] = []
        connected = sorted({conn.muxed_conn.peer_id for conn in self.host.get_network().get_connections()}, key=ID.to_bytes)
        closest = sort_peer_ids_by_distance(target.to_bytes(), [peer_id for peer_id in connected if peer_id != target])

        async def one(peer_id: ID) -> None:
            reply = await self._ask(peer_id, KadMessage(type=KadMessage.FIND_NODE, key=target.to_bytes()))
            if reply is not None and reply.type == KadMessage.FIND_NODE:
                for peer in reply.closerPeers[: kad_common.BUCKET_SIZE + 1]:
                    if peer.id == target.to_bytes():
                        found.extend(_addresses(peer))

        async with trio.open_nursery() as nursery:
            for peer_id in closest[:ASKED_FOR_ADDRESSES]:
                nursery.start_soon(one, peer_id)
        return found

    async def _ask(self, peer_id: ID, message: KadMessage) -> KadMessage | None:
        """One request to one peer; None when it fails in any way or takes too long."""
        with trio.move_on_after(DHT_QUERY_TIMEOUT_S):
            stream = None
            try:
                stream = await self.host.new_stream(peer_id, [KAD_PROTOCOL])
                body = message.SerializeToString()
                await stream.write(encode_varint_prefixed(body))
                reply = KadMessage()
                reply.ParseFromString(await read_varint_prefixed_bytes_limited(stream, DHT_MESSAGE_BYTES_MAX))
                return reply
            except Exception as error:  # noqa: BLE001 - the boundary: whatever a peer does to a query, the lookup goes on
                log.debug("DHT query to peer %s failed: %r", peer_id, error)
            finally:
                if stream is not None:
                    with trio.CancelScope(shield=True):
                        await stream.reset()
        return None


def _addresses(peer: KadMessage.Peer) -> list[str]:
    good = []
    for raw in peer.addrs[:16]:
        try:
            good.append(str(Multiaddr(raw)))
        except Exception as error:  # noqa: BLE001 - the boundary: multiaddr raises whatever its codecs raise
            log.debug("not a multiaddr: %r", error)
    return good


class HardenedGossip(GossipSub):
    """Gossipsub with a heartbeat of 1 s (the default is 120) and score thresholds (the default is minus infinity)."""

    def __init__(self) -> None:
        super().__init__(
            GOSSIP_PROTOCOLS,
            degree=6,
            degree_low=4,
            degree_high=12,
            heartbeat_initial_delay=0.1 + 0.4 * random.random(),  # noqa: S311 - spreads load, keeps no secret
            heartbeat_interval=1,
            gossip_window=3,
            gossip_history=5,
            # A forwarder hands on what many others say: its limit is theirs together.
            max_messages_per_topic_per_second=200.0,
            score_params=ScoreParams(
                p4_invalid_messages=TopicScoreParams(weight=-10.0, cap=100.0, decay=0.97),
                p5_behavior_penalty_weight=-1.0,
                p5_behavior_penalty_decay=0.97,
                p5_behavior_penalty_threshold=6.0,
                publish_threshold=-50.0,
                gossip_threshold=-10.0,
                graylist_threshold=-80.0,
                accept_px_threshold=0.0,
            ),
        )

    async def heartbeat(self) -> None:
        """An exception in one heartbeat ends the router, and with it the process."""
        while True:
            try:
                await super().heartbeat()
            except Exception:  # the boundary: state that a peer has shaped is handled in there
                log.exception("the gossip heartbeat failed")
                await trio.sleep(1)


class HardenedPubsub(Pubsub):
    """A frame of garbage from one peer raises in a task of its own, which ends the process: every such task is guarded."""

    def __init__(self, host: HardenedHost, router: HardenedGossip) -> None:
        super().__init__(
            host,
            router,
            strict_signing=True,
            max_inbound_rpc_size=GOSSIP_RPC_BYTES_MAX,
            max_subscriptions_per_peer=64,
            max_subscriptions_per_rpc=64,
        )

        self._forwarded = TokenTable(GOSSIP_FORWARDED_PER_S, GOSSIP_BURST * GOSSIP_FORWARDED_PER_S)
        self._published = TokenTable(GOSSIP_PUBLISHED_PER_S, GOSSIP_BURST * GOSSIP_PUBLISHED_PER_S)

    def handle_subscription(self, origin_id: ID, sub_message: rpc_pb2.RPC.SubOpts) -> None:
        """The library bounds how many topics a peer subscribes to, and not how long their names are."""
        if len(sub_message.topicid) <= GOSSIP_TOPIC_CHARS_MAX:
            super().handle_subscription(origin_id, sub_message)

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        if len(msg.data) > GOSSIP_BYTES_MAX or len(msg.topicIDs) != 1 or len(msg.seqno) != 8:
            self.router.scorer.on_invalid_message(msg_forwarder, "")  # type: ignore[attr-defined]
            return
        now_s = trio.current_time()
        if msg_forwarder != self.my_id:
            if msg.topicIDs[0] not in self.topic_ids:
                return  # nothing that this node listens to: it is kept and passed on by those who do
            if not self._forwarded.may((str(msg_forwarder),), now_s):
                self.router.scorer.penalize_behavior(msg_forwarder, 1.0)  # type: ignore[attr-defined]
                return
            # Of a publisher that floods others are to blame as little as this node would be.
            if not self._published.may((msg.from_id.hex(),), now_s):
                return
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception as error:  # noqa: BLE001 - the boundary: see the class
            log.debug("a message from peer %s failed: %r", msg_forwarder, error)
            self.router.scorer.on_invalid_message(msg_forwarder, "")  # type: ignore[attr-defined]

    async def continuously_read_stream(self, stream: INetStream) -> None:
        try:
            await super().continuously_read_stream(stream)
        except Exception as error:  # noqa: BLE001 - the boundary: see the class
            log.debug("the gossip stream of peer %s failed: %r", stream.muxed_conn.peer_id, error)
            await stream.reset()
            self._handle_dead_peer(stream.muxed_conn.peer_id)

    def _handle_dead_peer(self, peer_id: ID) -> None:
        try:
            super()._handle_dead_peer(peer_id)
        except Exception as error:  # noqa: BLE001 - the boundary: it runs in a daemon task, whose exception ends the service
            log.debug("forgetting gossip peer %s failed: %r", peer_id, error)


def key_pair_of(identity: Identity) -> KeyPair:
    private_key = Ed25519PrivateKey.from_bytes(identity.seed)
    return KeyPair(private_key, private_key.get_public_key())

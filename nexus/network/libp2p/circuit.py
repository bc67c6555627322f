"""Circuit relay v2 (libp2p specs, relay/circuit-v2.md): reaching peers through others, and being a relay for others.

The messages are the library's; its service, its client and its transport are not used: they answer without bounds, and their
connections are not the kind that our secure channel runs on. A circuit is a stream through the relay, pumped into a socket pair;
on its near end the handshake and the muxer run as they do over TCP, so that everything above sees one more connection.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio
from google.protobuf.message import DecodeError, Message
from libp2p.abc import INetConn, INetStream
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Limit, PeerId, Status, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import Reservation as ReservationMessage
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamError
from libp2p.utils.varint import encode_varint_prefixed
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from nexus.core.errors import MalformedError, NexusError
from nexus.core.keys import public_key_of
from nexus.network.addresses import CIRCUIT, Circuit, Endpoint, parse_endpoint, valid_addresses
from nexus.network.libp2p.hardening import HardenedHost, HardenedSwarm
from nexus.network.libp2p.yamux import YamuxConnection, YamuxStream
from nexus.network.reachability import Reservation
from nexus.network.relaying import Client, RelayLedger, RelayLimits

log = logging.getLogger(__name__)

HOP = TProtocol("/libp2p/circuit/relay/0.2.0/hop")
STOP = TProtocol("/libp2p/circuit/relay/0.2.0/stop")
MESSAGE_BYTES_MAX = 4096  # by the specification
MESSAGE_TIMEOUT_S = 10.0
# What one relay may have running to us; each is a connection, and those are counted as well.
CIRCUITS_PER_RELAY_MAX = 64
RESERVATIONS_WANTED = 2
RESERVATION_S = (60.0, 24 * 3600.0)  # what a relay may promise
RENEW_AT = 0.5  # of a reservation's time
UPKEEP_S = 5.0
RELAY_RETRY_S = 60.0
RELAYS_KNOWN_MAX = 64
CHUNK_BYTES = 64 * 1024
HALF_OPEN_S = 10.0

Negotiate = Callable[[YamuxConnection, str], Awaitable[YamuxStream]]


class CircuitStream(TrioTCPStream):
    """The near end of a circuit, in place of a TCP connection. `circuit`: its address."""

    def __init__(self, stream: trio.SocketStream, circuit: str) -> None:
        super().__init__(stream)
        self.circuit = circuit

    def get_remote_address(self) -> tuple[str, int] | None:
        return None  # a relay's address says nothing about the peer


async def read_message(
    stream: YamuxStream, message: Message, bytes_max: int = MESSAGE_BYTES_MAX, timeout_s: float = MESSAGE_TIMEOUT_S
) -> None:
    """One message with a varint length. Raises MalformedError, MuxedStreamError, TooSlowError."""
    with trio.fail_after(timeout_s):
        size = shift = 0
        while True:
            byte = (await stream.read(1))[0]
            size |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
            if shift > 21:
                raise MalformedError("a length without end")
        if size > bytes_max:
            raise MalformedError(f"a message of {size} bytes, where {bytes_max} are allowed")
        body = b""
        while len(body) < size:
            body += await stream.read(size - len(body))
    try:
        message.ParseFromString(body)
    except (DecodeError, ValueError) as error:
        raise MalformedError("a message that is none of its protocol") from error


async def write_message(stream: YamuxStream, message: Message) -> None:
    with trio.fail_after(MESSAGE_TIMEOUT_S):
        await stream.write(encode_varint_prefixed(message.SerializeToString()))


def muxed_of(stream: INetStream) -> YamuxStream:
    muxed = stream.muxed_stream  # type: ignore[attr-defined]
    assert isinstance(muxed, YamuxStream)
    return muxed


def peer_id_of(message: PeerId) -> str:
    """Raises MalformedError unless it is an Ed25519 peer."""
    peer_id = str(ID(message.id[:64]))
    public_key_of(peer_id)
    return peer_id


async def _pump(near: trio.SocketStream, far: YamuxStream) -> None:
    """Carry bytes both ways until both ends have ended, or one breaks."""
    ended = 0
    far.pace = None  # that was for messages; a circuit's bytes are bounded otherwise

    async def up() -> None:
        while data := await near.receive_some(CHUNK_BYTES):
            await far.write(data)
        await far.close()

    async def down() -> None:
        with contextlib.suppress(MuxedStreamEOF):
            while True:
                await near.send_all(await far.read(CHUNK_BYTES))
        await near.send_eof()

    async def run(direction: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        nonlocal ended
        try:
            await direction()
        except (MuxedStreamError, IOException, trio.BrokenResourceError, trio.ClosedResourceError):
            scope.cancel()
            return
        ended += 1
        # One way is over: the other may still say goodbye, and no more.
        scope.deadline = trio.current_time() + HALF_OPEN_S if ended == 1 else -1.0

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, up, nursery.cancel_scope)
            nursery.start_soon(run, down, nursery.cancel_scope)
    finally:
        far.reset_now()
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(near)


@dataclass(slots=True)
class _Held:
    """A reservation of ours."""

    conn: YamuxConnection
    address: str
    until_s: float
    renew_s: float


class RelayClient:
    """Dials through relays, takes circuits that come through relays with which it holds reservations, and holds those."""

    def __init__(self, host: HardenedHost, swarm: HardenedSwarm, nursery: trio.Nursery, negotiate: Negotiate) -> None:
        self._host = host
        self._swarm = swarm
        self._nursery = nursery
        self._negotiate = negotiate
        self._held: dict[str, _Held] = {}
        self._running: dict[str, int] = {}
        self._not_before_s: dict[str, float] = {}
        self.wanted = False
        self.changed = trio.Event()
        host.set_stream_handler(STOP, self._answer_stop)

    def reservations(self) -> tuple[Reservation, ...]:
        now_s = trio.current_time()
        return tuple(
            Reservation(relay, held.address, round(held.until_s - now_s, 1))
            for relay, held in sorted(self._held.items())
            if held.until_s > now_s and not held.conn.is_closed
        )

    def addresses(self) -> list[str]:
        """Where others reach this node through its relays."""
        return [reservation.address for reservation in self.reservations()]

    # Dialling.

    async def dial(self, peer_id: ID, circuit: Circuit) -> INetConn:
        """A connection to `peer_id` through a relay. Raises SwarmException with the reason."""
        if circuit.relay_id == str(self._swarm.get_peer_id()):
            raise SwarmException("this node is the relay named there, and the peer is not connected to it")
        if len(self._swarm.get_connections()) >= self._swarm.connection_config.max_connections:
            raise SwarmException("this node has all the connections that it may have")
        relay = await self._relay(circuit)
        stream = await self._negotiate(relay, HOP)
        agreed = False
        try:
            request = HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=peer_id.to_bytes()))
            await write_message(stream, request)
            answer = HopMessage()
            await read_message(stream, answer)
            if answer.type != HopMessage.STATUS or answer.status != Status.OK:
                raise SwarmException(f"the relay {circuit.relay_id} answers {_status_name(answer.status)}")
            agreed = True
        except (MuxedStreamError, MalformedError, trio.TooSlowError) as error:
            raise SwarmException(f"the relay {circuit.relay_id} does not answer as a relay") from error
        finally:
            if not agreed:
                stream.reset_now()
        near = self._bridge(stream)
        raw = RawConnection(CircuitStream(near, str(circuit)), True)
        try:
            return await self._swarm.upgrade_outbound_raw_conn(raw, peer_id)
        except BaseException:
            with trio.CancelScope(shield=True):
                await raw.close()
            raise

    async def _relay(self, circuit: Circuit) -> YamuxConnection:
        relay_id = ID.from_base58(circuit.relay_id)
        found = _direct(self._swarm, relay_id)
        if found is None:
            await self._swarm.dial_endpoint(relay_id, str(circuit.endpoint))
            found = _direct(self._swarm, relay_id)
        if found is None:
            raise SwarmException(f"the connection to the relay {circuit.relay_id} broke off")
        return found

    def _bridge(self, stream: YamuxStream) -> trio.SocketStream:
        """A socket whose other end is the stream."""
        near, far = socket.socketpair()
        streams = [trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in _unblocking(near, far)]
        self._nursery.start_soon(_pump, streams[1], stream)
        return streams[0]

    # Being dialled.

    async def _answer_stop(self, net_stream: INetStream) -> None:
        """A relay has somebody who wants to talk to us. Only relays that we asked for it may."""
        stream = muxed_of(net_stream)
        relay = str(stream.conn.peer_id)
        message = StopMessage()
        await read_message(stream, message)
        held = self._held.get(relay)
        status = Status.OK
        if message.type != StopMessage.CONNECT:
            status = Status.UNEXPECTED_MESSAGE
        elif held is None or held.until_s < trio.current_time() or stream.conn.channel.circuit:
            status = Status.PERMISSION_DENIED
        elif self._running.get(relay, 0) >= CIRCUITS_PER_RELAY_MAX:
            status = Status.RESOURCE_LIMIT_EXCEEDED
        await write_message(stream, StopMessage(type=StopMessage.STATUS, status=status))
        if status != Status.OK or held is None:
            stream.close_write_now()
            return
        self._running[relay] = self._running.get(relay, 0) + 1
        near, far = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in _unblocking(*socket.socketpair()))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_pump, far, stream)
                # Its own caller's handler ends with the connection, see HardenedSwarm.
                await self._swarm.take_circuit(CircuitStream(near, held.address), Multiaddr(held.address))
                nursery.cancel_scope.deadline = trio.current_time() + HALF_OPEN_S
        finally:
            self._running[relay] -= 1
            if not self._running[relay]:
                del self._running[relay]

    # Holding reservations.

    async def hold_forever(self, candidates: Callable[[], Awaitable[Sequence[str]]]) -> None:
        """Keep reservations while they are wanted. `candidates`: peers that may be relays, the likeliest first; called only where
        there are too few."""
        while True:
            await self._hold(candidates)
            await trio.sleep(UPKEEP_S)

    async def _hold(self, candidates: Callable[[], Awaitable[Sequence[str]]]) -> None:
        now_s = trio.current_time()
        gone = [relay for relay, held in self._held.items() if held.conn.is_closed or held.until_s <= now_s or not self.wanted]
        for relay in gone:
            del self._held[relay]
        if not self.wanted:
            if gone:
                self._tell()
            return
        for relay, held in list(self._held.items()):
            if held.renew_s <= now_s and not await self._reserve(relay):
                held.renew_s = now_s + RELAY_RETRY_S
        if len(self._held) < RESERVATIONS_WANTED:
            for relay in await candidates():
                if len(self._held) >= RESERVATIONS_WANTED:
                    break
                if relay not in self._held and self._not_before_s.get(relay, 0.0) <= trio.current_time():
                    await self._reserve(relay)
        if gone:
            self._tell()

    async def _reserve(self, relay: str) -> bool:
        conn = _direct(self._swarm, ID.from_base58(relay))
        if conn is None:
            return False
        try:
            stream = await self._negotiate(conn, HOP)
            try:
                await write_message(stream, HopMessage(type=HopMessage.RESERVE))
                answer = HopMessage()
                await read_message(stream, answer)
            finally:
                stream.reset_now()
            if answer.type != HopMessage.STATUS or answer.status != Status.OK:
                raise MalformedError(f"it answers {_status_name(answer.status)}")
            held = _promised(relay, conn, answer.reservation)
        except (NexusError, MuxedStreamError, IOException, trio.TooSlowError) as error:
            log.info("peer %s keeps no place for this node as its relay: %s", relay, error)
            self._not_before_s[relay] = trio.current_time() + RELAY_RETRY_S
            while len(self._not_before_s) > RELAYS_KNOWN_MAX:
                del self._not_before_s[next(iter(self._not_before_s))]
            return False
        new = relay not in self._held or self._held[relay].address != held.address
        self._held[relay] = held
        if new:
            log.info("others reach this node through the relay %s", relay)
            self._tell()
        return True

    def _tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


def _promised(relay: str, conn: YamuxConnection, promise: ReservationMessage) -> _Held:
    """What a relay's answer is worth to us. Raises MalformedError."""
    now_s = trio.current_time()
    shortest_s, longest_s = RESERVATION_S
    # In Unix seconds by the relay's clock, which may be off: no promise is believed to be shorter or longer than sense allows.
    lasts_s = min(max(promise.expire - time.time(), shortest_s), longest_s)
    named = []
    for raw in promise.addrs[:16]:
        with contextlib.suppress(Exception):  # the boundary: multiaddr raises whatever its codecs raise
            named.append(str(Multiaddr(raw)))
    dialled = [] if not conn.is_initiator else [str(address) for address in conn.get_transport_addresses()]
    # Where we reached it ourselves is best: what it names may be what nobody else can dial.
    direct = [address for address in valid_addresses([*dialled, *named]) if not address.endswith(CIRCUIT)]
    if not direct:
        raise MalformedError("it names no address of its own")
    address = str(Circuit(parse_endpoint(direct[0]), relay))
    return _Held(conn, address, now_s + lasts_s, now_s + RENEW_AT * lasts_s)


class RelayService:
    """Passes on what two peers have to say to each other, within limits."""

    def __init__(
        self,
        host: HardenedHost,
        swarm: HardenedSwarm,
        limits: RelayLimits,
        negotiate: Negotiate,
        addresses: Callable[[], Sequence[Endpoint]],
    ) -> None:
        self._swarm = swarm
        self._limits = limits
        self._negotiate = negotiate
        self._addresses = addresses
        self.ledger = RelayLedger(limits)
        host.set_stream_handler(HOP, self._answer_hop)

    async def _answer_hop(self, net_stream: INetStream) -> None:
        stream = muxed_of(net_stream)
        request = HopMessage()
        try:
            await read_message(stream, request)
        except MalformedError:
            await self._say(stream, Status.MALFORMED_MESSAGE)
            return
        address = stream.conn.get_remote_address()
        if address is None:
            # Through another relay: chains of relays are what the specification rules out.
            await self._say(stream, Status.PERMISSION_DENIED)
            return
        client = Client(str(stream.conn.peer_id), address[0])
        if not self.ledger.may_ask(client, trio.current_time()):
            await self._say(stream, Status.RESOURCE_LIMIT_EXCEEDED)
        elif request.type == HopMessage.RESERVE:
            await self._reserve(stream, client)
        elif request.type == HopMessage.CONNECT:
            await self._connect(stream, client, request)
        else:
            await self._say(stream, Status.UNEXPECTED_MESSAGE)

    async def _reserve(self, stream: YamuxStream, client: Client) -> None:
        refusal = self.ledger.reserve(client, trio.current_time())
        if refusal:
            log.info("no reservation for peer %s: %s", client.peer_id, refusal)
            await self._say(stream, Status.RESERVATION_REFUSED)
            return
        relay_id = str(self._swarm.get_peer_id())
        answer = HopMessage(type=HopMessage.STATUS, status=Status.OK, limit=self._limit())
        answer.reservation.expire = int(time.time() + self._limits.reservation_s)
        answer.reservation.addrs.extend(Multiaddr(f"{endpoint}/p2p/{relay_id}").to_bytes() for endpoint in self._addresses()[:8])
        await write_message(stream, answer)
        stream.close_write_now()

    async def _connect(self, stream: YamuxStream, source: Client, request: HopMessage) -> None:
        now_s = trio.current_time()
        try:
            target_id = peer_id_of(request.peer)
        except MalformedError:
            await self._say(stream, Status.MALFORMED_MESSAGE)
            return
        conn = _direct(self._swarm, ID.from_base58(target_id))
        if target_id == source.peer_id or not self.ledger.has_place(target_id, now_s) or conn is None:
            await self._say(stream, Status.NO_RESERVATION)
            return
        address = conn.get_remote_address()
        assert address is not None
        target = Client(target_id, address[0])
        refusal = self.ledger.open(source, target)
        if refusal:
            log.info("no circuit from peer %s to peer %s: %s", source.peer_id, target_id, refusal)
            await self._say(stream, Status.RESOURCE_LIMIT_EXCEEDED)
            return
        far: YamuxStream | None = None
        try:
            far = await self._ask(conn, source)
            if far is None:
                await self._say(stream, Status.CONNECTION_FAILED)
                return
            await write_message(stream, HopMessage(type=HopMessage.STATUS, status=Status.OK, limit=self._limit()))
            await self._carry(stream, far, source, target)
        finally:
            if far is not None:
                far.reset_now()
            self.ledger.close(source, target)

    async def _ask(self, conn: YamuxConnection, source: Client) -> YamuxStream | None:
        """A stream to the peer that is wanted, which agreed to it; None where it did not."""
        far = None
        agreed = False
        try:
            far = await self._negotiate(conn, STOP)
            peer = PeerId(id=ID.from_base58(source.peer_id).to_bytes())
            await write_message(far, StopMessage(type=StopMessage.CONNECT, peer=peer, limit=self._limit()))
            answer = StopMessage()
            await read_message(far, answer)
            agreed = answer.type == StopMessage.STATUS and answer.status == Status.OK
            return far if agreed else None
        except (NexusError, MuxedStreamError, MuxedConnUnavailable, IOException, trio.TooSlowError) as error:
            log.info("peer %s does not take the circuit of peer %s: %r", conn.peer_id, source.peer_id, error)
            return None
        finally:
            if far is not None and not agreed:
                far.reset_now()

    async def _carry(self, near: YamuxStream, far: YamuxStream, source: Client, target: Client) -> None:
        """Both ways, until one breaks, the time is up or one way has carried all it may."""
        ended = 0
        near.pace = None  # that was for messages; the ledger paces what is carried

        async def carry(one: YamuxStream, other: YamuxStream, scope: trio.CancelScope) -> None:
            nonlocal ended
            left = self._limits.circuit_bytes
            try:
                while left > 0:
                    data = await one.read(min(CHUNK_BYTES, left))
                    left -= len(data)
                    await other.write(data)
                    pause_s = self.ledger.delay_s(source, target, len(data), trio.current_time())
                    if pause_s:
                        await trio.sleep(pause_s)
                log.info("the circuit of peers %s and %s has carried all it may", source.peer_id, target.peer_id)
                scope.cancel()
            except MuxedStreamEOF:
                other.close_write_now()
                ended += 1
                if ended == 2:
                    scope.cancel()
                else:
                    scope.deadline = min(scope.deadline, trio.current_time() + HALF_OPEN_S)
            except (MuxedStreamError, IOException):
                scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + self._limits.circuit_s
            nursery.start_soon(carry, near, far, nursery.cancel_scope)
            nursery.start_soon(carry, far, near, nursery.cancel_scope)
        near.reset_now()

    def disconnected(self, peer_id: str) -> None:
        """By the specification a reservation ends with the connection."""
        if _direct(self._swarm, ID.from_base58(peer_id)) is None:
            self.ledger.release(peer_id)

    def _limit(self) -> Limit:
        return Limit(duration=int(self._limits.circuit_s), data=min(self._limits.circuit_bytes, 2**63 - 1))

    async def _say(self, stream: YamuxStream, status: Status.ValueType) -> None:
        await write_message(stream, HopMessage(type=HopMessage.STATUS, status=status))
        stream.close_write_now()


def _direct(swarm: HardenedSwarm, peer_id: ID) -> YamuxConnection | None:
    """The oldest live connection to a peer that runs through no relay."""
    live = [
        conn.muxed_conn
        for conn in swarm.get_connections(peer_id)
        if not conn.is_closed and isinstance(conn.muxed_conn, YamuxConnection) and not conn.muxed_conn.is_closed
    ]
    direct = [conn for conn in live if not conn.channel.circuit]
    return min(direct, key=lambda conn: conn.opened_s, default=None)


def _status_name(status: int) -> str:
    try:
        return Status.Name(status)  # type: ignore[arg-type]
    except ValueError:
        return str(status)


def _unblocking(*ends: socket.socket) -> tuple[socket.socket, ...]:
    for end in ends:
        end.setblocking(False)
    return ends

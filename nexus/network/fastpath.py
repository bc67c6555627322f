"""Bulk streams as TLS 1.3 over plain TCP, a connection each, beside another transport that carries everything else.

    opener                                     server
      | -- stream /nexus/fastpath/1: Seek -------> |    over the transport below, where both have proven their keys
      | <- Offer: port, certificate hash, ticket - |
      | -- TCP, TLS 1.3 -------------------------> |    the certificate must have that hash: whoever holds its key is the server
      | -- Hello: ticket, both public keys ------> |    the ticket was told to the opener alone, is good once and for seconds
      | <- Welcome ------------------------------- |
      | <- frames, as on any stream -------------> |

So either side knows the other by its Ed25519 key: the certificate's hash and the ticket travelled where Noise had authenticated
both. The Hello names both, so a server that hands on the offer of another gets nobody to speak to that other in its own name.

The port is dialled at the IP address that the connection below has: no peer can have this node dial a third one. Where anything
fails on the way, the stream is opened over the transport below, and the fast path to this peer is not tried again for a while.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import logging
import math
import os
import socket
import ssl
import struct
import tempfile
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from nexus.core.errors import CapacityError, LocalError, MalformedError, NexusError, PeerError, TimedOutError, UnreachableError
from nexus.core.keys import Identity, public_key_of
from nexus.core.record import MessageSet, Record, digest, raw, text, uint
from nexus.network.addresses import parse_endpoint
from nexus.network.limits import PeerLimits
from nexus.network.reachability import Netcheck
from nexus.network.serving import Serving, background_nursery
from nexus.network.transport import Connection, Handler, PeerAddress, ProtocolSpec, Stream, Subscription, Transport

log = logging.getLogger(__name__)

FASTPATH = ProtocolSpec("/nexus/fastpath/1", frame_max=1024, read_timeout_s=10.0, streams_per_peer_max=8)
# Seek to Welcome. Beyond it the stream below is the faster one.
OPEN_TIMEOUT_S = 5.0
# From accepting a TCP connection to the whole Hello: who is slower has its connection closed.
HELLO_TIMEOUT_S = 5.0
TICKET_LIFETIME_S = 10.0
TICKETS_MAX = 1024
TICKETS_PER_PEER_MAX = 16
STRANGERS_MAX = 64
STRANGERS_PER_IP_MAX = 16
CONNECTIONS_MAX = 256
# Below what a peer takes of one node.
DIALS_AT_ONCE = 6
# How long a peer is not tried again after its fast path failed, or after it said that it has none.
AVOID_S = 300.0
AVOIDED_MAX = 4096
HELLO_BYTES_MAX = 512
# As on the transport below (nexus.network.libp2p.framing).
SLOWEST_BYTES_PER_S = 64 * 1024
# Other tasks run at least this often while a frame comes or goes: reading or sealing so much takes about 0.2 ms.
YIELD_BYTES = 256 * 1024
CLOSE_TIMEOUT_S = 2.0
DRAIN_READS_MAX = 64
LINGER_ROUNDS_MAX = 30
# In the place of a frame's length: its sender has no more to say. A connection that ends without it was broken off.
_END = 0xFFFFFFFF
_length = struct.Struct(">I")
_ALPN = "nexus-fastpath-1"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Seek(Record):
    """Asks for an offer."""

    spec: int = uint(1, least=1)


@dataclass(frozen=True, slots=True)
class Offer(Record):
    """`port`: TCP, at the address of this connection. `certificate`: SHA-256 of its DER form. `ticket`: for one stream, soon."""

    port: int = uint(65535, least=1)
    certificate: bytes = digest()
    ticket: bytes = digest()


@dataclass(frozen=True, slots=True)
class Declined(Record):
    """No offer now: too many are out already."""

    cause: str = text(128)


@dataclass(frozen=True, slots=True)
class Hello(Record):
    """The first frame of the opener: who it is, whom it means, and which protocol the stream is for."""

    ticket: bytes = digest()
    opener: bytes = raw(32)
    server: bytes = raw(32)
    protocol: str = text(128)


@dataclass(frozen=True, slots=True)
class Welcome(Record):
    """The first frame of the server. It answers nothing to a Hello that it does not take."""

    spec: int = uint(1, least=1)


CONTROL = MessageSet(Seek, Offer, Declined)
GREETING = MessageSet(Hello, Welcome)


class Below(Transport, Protocol):
    """The transport that this one stands on; both count a peer's streams and breaches together."""

    @property
    def serving(self) -> Serving: ...


@dataclass(frozen=True, slots=True)
class FastPathOptions:
    """`hosts`: IP addresses to listen on. `port`: 0 for any free one. `dial`: also open streams that way, not only accept them."""

    hosts: tuple[str, ...]
    port: int = 0
    dial: bool = True


@asynccontextmanager
async def open_fastpath(below: Below, identity: Identity, options: FastPathOptions) -> AsyncIterator[FastPathTransport]:
    """`below` with a fast path for its bulk protocols while the context is open. Raises LocalError where the port is taken."""
    listeners = await _listen(options)
    try:
        contexts = _Contexts.fresh()
        async with background_nursery() as nursery:
            transport = FastPathTransport(below, identity, options, contexts, listeners, nursery)
            for listener in listeners:
                nursery.start_soon(transport.accept_forever, listener)
            yield transport
    finally:
        for listener in listeners:
            listener.close()


async def _listen(options: FastPathOptions) -> list[trio.socket.SocketType]:
    """One socket per host, all on the same port."""
    listeners: list[trio.socket.SocketType] = []
    port = options.port
    try:
        for host in dict.fromkeys(options.hosts):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = trio.socket.socket(family, socket.SOCK_STREAM)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            await listener.bind((host, port))
            listener.listen(64)
            port = listener.getsockname()[1]
    except OSError as error:
        for listener in listeners:
            listener.close()
        reason = error.strerror or str(error)
        raise LocalError(
            f"cannot listen on TCP port {port} of {', '.join(options.hosts)} for the fast path: {reason}",
            "Set network.fast_path_port to another port (0 takes a free one), or network.fast_path = false",
        ) from error
    return listeners


@dataclass(frozen=True, slots=True)
class _Contexts:
    """TLS of this process: a key and a certificate that live as long as it does, and name nobody."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    certificate: bytes

    @classmethod
    def fresh(cls) -> _Contexts:
        key = Ed25519PrivateKey.generate()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nexus")])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            # Nobody looks at the dates: the hash is what counts, and clocks differ.
            .not_valid_before(datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
            .not_valid_after(datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC))
            .sign(key, None)
        )
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(Encoding.PEM)
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # The ssl module takes keys from files alone. The directory is this user's only, and gone at once.
        with tempfile.TemporaryDirectory(prefix="nexus-fastpath-") as directory:
            file = Path(directory) / "key.pem"
            file.write_bytes(pem)
            server.load_cert_chain(file)
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # No authority vouches for peers: their certificate's hash was told by the peer itself, and is compared after the handshake.
        client.check_hostname = False
        client.verify_mode = ssl.CERT_NONE
        for context in (server, client):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
            context.set_alpn_protocols([_ALPN])
        # No session is ever resumed.
        server.num_tickets = 0
        return cls(server, client, hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest())


class Tickets:
    """Tickets told and not yet shown. Pure: the time and the random bytes are handed in."""

    def __init__(self) -> None:
        self._told: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._held: Counter[str] = Counter()

    def tell(self, ticket: bytes, peer_id: str, now_s: float) -> bool:
        """Note a ticket for a peer. False: too many are out."""
        while self._told:
            oldest, (holder, until_s) = next(iter(self._told.items()))
            if until_s > now_s:
                break
            self._forget(oldest, holder)
        if len(self._told) >= TICKETS_MAX or self._held[peer_id] >= TICKETS_PER_PEER_MAX:
            return False
        self._told[ticket] = (peer_id, now_s + TICKET_LIFETIME_S)
        self._held[peer_id] += 1
        return True

    def show(self, ticket: bytes, now_s: float) -> str | None:
        """Whose ticket this is; it is good no more. None: nobody's, or too late."""
        told = self._told.get(ticket)
        if told is None:
            return None
        peer_id, until_s = told
        self._forget(ticket, peer_id)
        return peer_id if until_s > now_s else None

    def _forget(self, ticket: bytes, peer_id: str) -> None:
        del self._told[ticket]
        self._held[peer_id] -= 1
        if not self._held[peer_id]:
            del self._held[peer_id]


class _Tls:
    """A TLS connection on a socket that does not block. One task may read and another write. Raises OSError, also for TLS alerts
    (ssl.SSLError is one), and EOFError where the peer is gone without a word."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server: bool) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = context.wrap_socket(sock, server_side=server, do_handshake_on_connect=False, suppress_ragged_eofs=False)
        self._handle = self._sock.fileno()
        self.broken = False
        self.on_cut: Callable[[], object] | None = None

    async def handshake(self) -> None:
        await self._drive(self._sock.do_handshake)

    def certificate_hash(self) -> bytes:
        return hashlib.sha256(self._sock.getpeercert(binary_form=True) or b"").digest()

    async def receive_into(self, view: memoryview) -> int:
        """Some bytes, at least one."""
        got = await self._drive(lambda: self._sock.recv_into(view))
        if not got:
            raise EOFError("it ended without a word")
        return got

    async def send_some(self, view: memoryview) -> int:
        return await self._drive(lambda: self._sock.send(view))

    async def _drive(self, step: Callable[[], T]) -> T:
        while True:
            if self.broken:
                raise OSError("it was closed")
            try:
                return step()
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self._handle)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self._handle)

    async def drain(self) -> None:
        """Nothing more will be said nor read: let what was said arrive. A socket closed with bytes unread takes it back."""
        waste = bytearray(YIELD_BYTES)
        with trio.move_on_after(CLOSE_TIMEOUT_S), contextlib.suppress(OSError, trio.ClosedResourceError):
            socket.socket.shutdown(self._sock, socket.SHUT_WR)
            for _ in range(DRAIN_READS_MAX):
                await trio.lowlevel.wait_readable(self._handle)
                # Past TLS: what it says matters no more.
                if not socket.socket.recv_into(self._sock, waste):
                    break
        self.cut()

    def cut(self) -> None:
        if not self.broken:
            self.broken = True
            trio.lowlevel.notify_closing(self._handle)
            self._sock.close()
            if self.on_cut is not None:
                self.on_cut()


class FastStream:
    """A `nexus.network.transport.Stream` on a TLS connection of its own."""

    def __init__(
        self,
        tls: _Tls,
        peer_id: str,
        protocol: ProtocolSpec,
        limits: PeerLimits,
        first_frame_max: int | None,
        broke: Callable[[], None],
    ) -> None:
        self._tls = tls
        self._peer_id = peer_id
        self._protocol = protocol
        self._limits = limits
        self._frame_max = first_frame_max or protocol.frame_max
        self._broke = broke
        self._sending = trio.Lock()
        self._closed = self._ended = self._reading = False
        self._received = 0
        self.on_closed: Callable[[FastStream], None] | None = None

    @property
    def peer_id(self) -> str:
        return self._peer_id

    @property
    def protocol(self) -> ProtocolSpec:
        return self._protocol

    async def send(self, frame: bytes) -> None:
        size = len(frame)
        if size > self._protocol.frame_max:
            raise CapacityError(f"a frame of {size} bytes is over the {self._protocol.frame_max} of {self._protocol.id}")
        await trio.lowlevel.checkpoint_if_cancelled()
        await self._lock()
        try:
            if self._closed:
                raise self._gone("this side closed it")
            # The length goes with the first bytes of the frame, so that a small frame is one record.
            await self._write(_length.pack(size) + frame[:YIELD_BYTES])
            if size > YIELD_BYTES:
                await self._write(memoryview(frame)[YIELD_BYTES:])
        finally:
            self._sending.release()

    async def _lock(self) -> None:
        """Without yielding where nobody else sends."""
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()

    async def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        since = 0
        try:
            while view:
                sent = await self._tls.send_some(view)
                view = view[sent:]
                since += sent
                if since >= YIELD_BYTES:
                    since = 0
                    await trio.lowlevel.checkpoint()
        except (OSError, trio.ClosedResourceError) as error:
            raise self._gone(_reason(error)) from error
        finally:
            if view:  # half a frame has left: what followed would be taken for the rest of it
                self._tls.cut()

    async def receive(self) -> bytes:
        if self._ended:
            raise trio.EndOfChannel
        timeout_s = self._protocol.read_timeout_s
        frame: bytes | None = None
        self._reading = True
        try:
            with trio.move_on_after(math.inf if timeout_s is None else timeout_s) as scope:
                frame = await self._next(scope)
        finally:
            self._reading = False
            if frame is None and not self._ended:
                # Also on cancellation: half a frame may be read.
                self._tls.cut()
        if frame is None:
            if not self._received:
                self._broke()
            raise TimedOutError(f"peer {self._peer_id} sent nothing on {self._protocol.id} for {timeout_s:g} s")
        self._received += 1
        self._frame_max = self._protocol.frame_max
        if pause_s := self._limits.delay_s(self._peer_id, self._protocol, len(frame), trio.current_time()):
            await trio.sleep(pause_s)
        return frame

    async def _next(self, scope: trio.CancelScope) -> bytes:
        """Raises trio.EndOfChannel, UnreachableError, PeerError."""
        # So that a peer which sends frame upon frame leaves the others their turn.
        await trio.lowlevel.checkpoint()
        head = bytearray(_length.size)
        await self._fill(memoryview(head))
        length: int = _length.unpack(head)[0]
        if length == _END:
            self._ended = True
            if self._closed:
                self._tls.cut()
            raise trio.EndOfChannel
        if length > self._frame_max:
            raise PeerError(
                f"a frame of {length} bytes on {self._protocol.id}, where {self._frame_max} are allowed", peer=self._peer_id
            )
        scope.deadline += length / SLOWEST_BYTES_PER_S
        frame = bytearray(length)
        await self._fill(memoryview(frame))
        return bytes(frame)

    async def _fill(self, view: memoryview) -> None:
        since = 0
        try:
            while view:
                got = await self._tls.receive_into(view)
                view = view[got:]
                since += got
                if since >= YIELD_BYTES:
                    since = 0
                    await trio.lowlevel.checkpoint()
        except (OSError, EOFError, trio.ClosedResourceError) as error:
            if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
                # What came is not what a TLS peer sends: something is in the way.
                self._broke()
            raise self._gone(_reason(error)) from error

    async def close(self) -> None:
        if self._closed or self._tls.broken:
            self._closed = True
            await trio.lowlevel.checkpoint()
            return
        with trio.move_on_after(CLOSE_TIMEOUT_S), contextlib.suppress(UnreachableError):
            await self._lock()
            try:
                if not self._closed:
                    self._closed = True
                    await self._write(_length.pack(_END))
            finally:
                self._sending.release()
        if self._ended:
            self._tls.cut()
        elif self.on_closed is not None:
            self.on_closed(self)

    async def reset(self) -> None:
        self._tls.cut()

    def abandon(self) -> None:
        """Break off, from wherever."""
        self._tls.cut()

    def when_cut(self, then: Callable[[], object]) -> None:
        self._tls.on_cut = then

    async def linger(self) -> None:
        """After `close`, of the opener: the answers to what was sent may still be read; when nobody does, the connection ends."""
        for _ in range(LINGER_ROUNDS_MAX):
            await trio.sleep(CLOSE_TIMEOUT_S)
            if not self._reading:
                break
        self._tls.cut()

    async def finish(self) -> None:
        """After the handler, of the server: end the connection so that what was sent still arrives."""
        if not self._tls.broken:
            await self._tls.drain()

    def _gone(self, reason: str) -> UnreachableError:
        return UnreachableError(f"the stream {self._protocol.id} to peer {self._peer_id} is gone: {reason}", peer=self._peer_id)


def _reason(error: BaseException) -> str:
    if isinstance(error, trio.ClosedResourceError):
        return "this side closed it"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


class FastPathTransport:
    """A `nexus.network.transport.Transport`. Made by `open_fastpath`."""

    def __init__(
        self,
        below: Below,
        identity: Identity,
        options: FastPathOptions,
        contexts: _Contexts,
        listeners: Sequence[trio.socket.SocketType],
        nursery: trio.Nursery,
    ) -> None:
        self._below = below
        self._public_key = identity.public_key
        self._dial_allowed = options.dial
        self._contexts = contexts
        self.port: int = listeners[0].getsockname()[1] if listeners else 0
        self._tickets = Tickets()
        self._strangers: Counter[str] = Counter()
        self._open = 0
        self._avoided: OrderedDict[str, float] = OrderedDict()
        self._nursery = nursery
        self._streams: dict[FastStream, None] = {}
        self._dials = trio.CapacityLimiter(DIALS_AT_ONCE)
        # What became of streams of bulk protocols, for who watches over it.
        self.opened_fast = self.opened_below = 0
        below.serving.on_drop.append(self._cut)
        if listeners:
            below.serve(FASTPATH, self._answer)

    # The server's end.

    async def _answer(self, stream: Stream) -> None:
        """Offers, to a peer whose key the transport below has checked."""
        while True:
            CONTROL.unpack(await stream.receive())
            ticket = os.urandom(32)
            if self._open < CONNECTIONS_MAX and self._tickets.tell(ticket, stream.peer_id, trio.current_time()):
                await stream.send(CONTROL.pack(Offer(self.port, self._contexts.certificate, ticket)))
            else:
                await stream.send(CONTROL.pack(Declined("too many fast streams are open or promised")))

    async def accept_forever(self, listener: trio.socket.SocketType) -> None:
        while True:
            try:
                sock, address = await listener.accept()
            except OSError as error:
                # Out of file descriptors, most likely: those at work need some time to end.
                log.warning("the fast path cannot accept: %s", error.strerror or error)
                await trio.sleep(0.5)
                continue
            ip = str(address[0])
            if (
                self._strangers.total() >= STRANGERS_MAX
                or self._strangers[ip] >= STRANGERS_PER_IP_MAX
                or self._open >= CONNECTIONS_MAX
            ):
                sock.close()
                continue
            self._strangers[ip] += 1
            self._nursery.start_soon(self._welcome, sock, ip)

    async def _welcome(self, sock: trio.socket.SocketType, ip: str) -> None:
        """One connection, from its first byte to its last. Nothing that comes in this way ends more than the connection."""
        tls: _Tls | None = None
        try:
            stream: FastStream | None = None
            try:
                with trio.move_on_after(HELLO_TIMEOUT_S):
                    tls = _Tls(_plain(sock), self._contexts.server, server=True)
                    await tls.handshake()
                    stream = await self._greeted(tls)
            finally:
                self._strangers[ip] -= 1
                if not self._strangers[ip]:
                    del self._strangers[ip]
            if stream is not None:
                await self._run(stream)
        except (OSError, EOFError, NexusError, trio.ClosedResourceError, trio.EndOfChannel) as error:
            log.debug("a connection to the fast path from %s ends: %s", ip, error)
        except Exception:  # the boundary: no stranger and no bug here may end the node
            log.exception("a connection to the fast path failed")
        finally:
            if tls is not None:
                tls.cut()
            else:
                sock.close()

    async def _greeted(self, tls: _Tls) -> FastStream | None:
        """The stream that a connection is, once its opener has shown whose it is. None: it has not."""
        greeter = FastStream(tls, "?", _GREETING, PeerLimits(), None, _nothing)
        hello = GREETING.unpack(await greeter.receive())
        if not isinstance(hello, Hello):
            return None
        peer_id = self._tickets.show(hello.ticket, trio.current_time())
        if peer_id is None or hello.server != self._public_key or hello.opener != public_key_of(peer_id):
            return None
        found = self._below.serving.find(hello.protocol)
        if found is None or not found[0].bulk:
            return None
        await greeter.send(GREETING.pack(Welcome(1)))
        return FastStream(tls, peer_id, found[0], self._below.serving.limits, found[0].first_frame_max, _nothing)

    async def _run(self, stream: FastStream) -> None:
        found = self._below.serving.find(stream.protocol.id)
        assert found is not None
        self._open += 1
        self._keep(stream)
        try:
            await self._below.serving.run(stream, *found)
            await stream.finish()
        finally:
            self._open -= 1

    def _keep(self, stream: FastStream) -> None:
        """Know of the stream as long as its connection lives."""
        self._streams[stream] = None
        stream.when_cut(lambda: self._streams.pop(stream, None))

    def _cut(self, peer_id: str) -> None:
        """What the peer has open here ends with its connections."""
        for stream in [stream for stream in self._streams if stream.peer_id == peer_id]:
            stream.abandon()

    # The opener's end.

    async def open_stream(self, peer_id: str, protocol: ProtocolSpec) -> Stream:
        if not protocol.bulk:
            return await self._below.open_stream(peer_id, protocol)
        if self._dial_allowed and peer_id != self.peer_id and not self._avoids(peer_id):
            stream = await self._open_fast(peer_id, protocol)
            if stream is not None:
                self.opened_fast += 1
                return stream
        self.opened_below += 1
        return await self._below.open_stream(peer_id, protocol)

    async def _open_fast(self, peer_id: str, protocol: ProtocolSpec) -> FastStream | None:
        """None: it is not to be had, and will not be tried for a while."""
        reason = f"it took more than {OPEN_TIMEOUT_S:g} s"
        with trio.move_on_after(OPEN_TIMEOUT_S):
            try:
                async with self._dials:
                    return await self._dial(peer_id, protocol)
            except CapacityError as error:
                # It has a fast path, and no place on it now.
                log.info("no fast path to peer %s now: %s", peer_id, error.cause)
                return None
            except UnreachableError as error:
                if all(connection.peer_id != peer_id for connection in self._below.connections()):
                    raise  # the peer itself is not to be reached, and no other way would do
                reason = error.cause
            except (NexusError, OSError, EOFError, trio.EndOfChannel, trio.ClosedResourceError) as error:
                reason = error.cause if isinstance(error, NexusError) else _reason(error)
        log.info("no fast path to peer %s, so plain streams for %.0f s: %s", peer_id, AVOID_S, reason)
        self._avoid(peer_id)
        return None

    async def _dial(self, peer_id: str, protocol: ProtocolSpec) -> FastStream:
        control = await self._below.open_stream(peer_id, FASTPATH)
        try:
            await control.send(CONTROL.pack(Seek(1)))
            offer = CONTROL.unpack(await control.receive())
            await control.close()
        except BaseException:
            with trio.CancelScope(shield=True):
                await control.reset()
            raise
        if isinstance(offer, Declined):
            raise CapacityError(offer.cause)
        if not isinstance(offer, Offer):
            raise MalformedError("it answers a request for an offer with another message")
        reasons = []
        for ip in self._ips_of(peer_id):
            try:
                return await self._greet(await _connected(ip, offer.port), peer_id, protocol, offer)
            except OSError as error:
                reasons.append(f"{ip} port {offer.port}: {_reason(error)}")
        raise UnreachableError("; ".join(reasons) or "it is reached through a relay only", peer=peer_id)

    async def _greet(self, sock: socket.socket, peer_id: str, protocol: ProtocolSpec, offer: Offer) -> FastStream:
        tls = _Tls(sock, self._contexts.client, server=False)
        good = False
        try:
            await tls.handshake()
            if tls.certificate_hash() != offer.certificate:
                raise PeerError(f"what answers on port {offer.port} is not peer {peer_id}", peer=peer_id)
            greeter = FastStream(tls, peer_id, _GREETING, PeerLimits(), None, _nothing)
            await greeter.send(GREETING.pack(Hello(offer.ticket, self._public_key, public_key_of(peer_id), protocol.id)))
            if not isinstance(GREETING.unpack(await greeter.receive()), Welcome):
                raise MalformedError("it does not welcome")
            good = True
        finally:
            if not good:
                tls.cut()
        stream = FastStream(tls, peer_id, protocol, self._below.serving.limits, None, lambda: self._avoid(peer_id))
        stream.on_closed = self._linger
        self._keep(stream)
        return stream

    def _linger(self, stream: FastStream) -> None:
        self._nursery.start_soon(stream.linger)

    def _ips_of(self, peer_id: str) -> list[str]:
        """Where the connections below lead, so where the peer certainly is. Those through a relay lead to none."""
        ips: dict[str, None] = {}
        for connection in self._below.connections():
            if connection.peer_id == peer_id:
                with contextlib.suppress(MalformedError):
                    endpoint = parse_endpoint(connection.address)
                    if endpoint.kind in ("ip4", "ip6"):
                        ips[endpoint.host] = None
        return list(ips)

    def _avoids(self, peer_id: str) -> bool:
        until_s = self._avoided.get(peer_id)
        if until_s is not None and until_s <= trio.current_time():
            del self._avoided[peer_id]
        return peer_id in self._avoided

    def _avoid(self, peer_id: str) -> None:
        self._avoided[peer_id] = trio.current_time() + AVOID_S
        self._avoided.move_to_end(peer_id)
        if len(self._avoided) > AVOIDED_MAX:
            self._avoided.popitem(last=False)

    # Everything else is that of the transport below.

    @property
    def peer_id(self) -> str:
        return self._below.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._below.addresses

    @property
    def serving(self) -> Serving:
        return self._below.serving

    def serve(self, protocol: ProtocolSpec, handler: Handler) -> None:
        self._below.serve(protocol, handler)

    async def connect(self, address: str) -> str:
        return await self._below.connect(address)

    def learn(self, peer: PeerAddress) -> None:
        self._below.learn(peer)

    def connections(self) -> list[Connection]:
        return self._below.connections()

    async def disconnect(self, peer_id: str) -> None:
        self._cut(peer_id)
        await self._below.disconnect(peer_id)

    async def ping(self, peer_id: str) -> float:
        return await self._below.ping(peer_id)

    async def netcheck(self) -> Netcheck:
        return await self._below.netcheck()

    async def provide(self, key: bytes) -> None:
        await self._below.provide(key)

    def withdraw(self, key: bytes) -> None:
        self._below.withdraw(key)

    async def find_providers(self, key: bytes, limit: int = 20) -> list[PeerAddress]:
        return await self._below.find_providers(key, limit)

    async def publish(self, topic: str, data: bytes) -> None:
        await self._below.publish(topic, data)

    def subscribe(self, topic: str) -> Subscription:
        return self._below.subscribe(topic)


_GREETING = ProtocolSpec("nexus fast path greeting", frame_max=HELLO_BYTES_MAX, read_timeout_s=HELLO_TIMEOUT_S)


def _nothing() -> None:
    """A stream that is not yet one has nobody to tell."""


async def _connected(ip: str, port: int) -> socket.socket:
    sock = trio.socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM)
    try:
        await sock.connect((ip, port))
    except BaseException:
        sock.close()
        raise
    return _plain(sock)


def _plain(sock: trio.socket.SocketType) -> socket.socket:
    """The socket that trio's stands for; trio's is good no more."""
    return socket.socket(sock.family, sock.type, sock.proto, fileno=sock.detach())

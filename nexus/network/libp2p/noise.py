"""The secure channel: libp2p's Noise handshake, and after it our own transport phase straight on the socket.

The library's transport phase costs six awaits, four locks and three copies for every frame, and two system calls for each byte
count. What crosses the wire is the same (Noise_XX_25519_ChaChaPoly_SHA256, libp2p's 2-byte lengths); only the handling differs:
sealing and sending are one step that cannot be interrupted, so that a cancelled writer never leaves half a message behind.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
from collections import OrderedDict, deque
from collections.abc import Callable

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.crypto.keys import KeyPair, PrivateKey
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.base_session import BaseSession
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.noise.transport import Transport
from libp2p.security.secure_session import SecureSession
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from nexus.core.errors import MalformedError
from nexus.core.keys import public_key_of
from nexus.network.addresses import Endpoint

TAG_BYTES = 16
PLAIN_MAX = 65535 - TAG_BYTES
PACKET_MAX = 2 + 65535
RECEIVE_BYTES = 192 * 1024
# Sealed bytes that wait in this process for the socket. Small, so that a small frame never queues behind megabytes of bulk.
PENDING_HIGH_BYTES = 128 * 1024
PENDING_MAX_BYTES = 4 << 20
WRITE_STALL_S = 30.0
UNACKNOWLEDGED_MS = 45_000
GREETED_MAX = 4096
_nonce = struct.Struct("<4xQ").pack
_length = struct.Struct(">H")


class SecureChannel(BaseSession):
    """An authenticated, encrypted byte stream that owns its socket. Raises ConnectionClosedError once it is gone."""

    def __init__(
        self,
        *,
        sock: socket.socket,
        local_peer: ID,
        local_private_key: PrivateKey,
        remote_peer: ID,
        is_initiator: bool,
        send_key: bytes,
        receive_key: bytes,
        scratch: bytearray,
        circuit: str = "",
    ) -> None:
        super().__init__(
            local_peer=local_peer,
            local_private_key=local_private_key,
            remote_peer=remote_peer,
            remote_permanent_pubkey=remote_peer.extract_public_key(),  # type: ignore[arg-type]
            is_initiator=is_initiator,
        )
        self._sock = sock
        self._fd = sock.fileno()
        # Through a relay: its address. Then the socket is one of a pair, and knows no peer.
        self.circuit = circuit
        self._remote = sock.getpeername()
        self._local = sock.getsockname()
        self._seal = ChaCha20Poly1305(send_key).encrypt
        self._sealed = 0
        self._open = ChaCha20Poly1305(receive_key).decrypt
        self._opened = 0
        # Shared by all channels of a node: what is received is taken apart before anything else runs.
        self._scratch = scratch
        self._partial = b""
        self._plain = bytearray()
        self._pending: deque[memoryview] = deque()
        self.pending_bytes = 0
        self._flush_wanted = trio.Event()
        self._drained = trio.lowlevel.ParkingLot()
        self._emptied = trio.lowlevel.ParkingLot()
        self.closed = False

    # Sending.

    def push(self, plain: bytes) -> None:
        """Seal and send at most PLAIN_MAX bytes. Never waits: what the socket does not take now is kept and sent in order."""
        if self.closed:
            raise ConnectionClosedError("the connection is closed", transport="tcp")
        sealed = self._seal(_nonce(self._sealed), plain, None)
        self._sealed += 1
        packet = _length.pack(len(sealed)) + sealed
        sent = 0
        if not self._pending:
            try:
                sent = self._sock.send(packet)
            except BlockingIOError:
                pass
            except OSError as error:
                self.abort()
                raise ConnectionClosedError(f"the connection broke: {error}", transport="tcp") from error
            if sent == len(packet):
                return
        self._pending.append(memoryview(packet)[sent:])
        self.pending_bytes += len(packet) - sent
        self._flush_wanted.set()
        if self.pending_bytes > PENDING_MAX_BYTES:
            # Only answers that nobody awaits (pongs, window updates, resets) get this far: the peer floods and does not read.
            self.abort()
            raise ConnectionClosedError("the peer makes us answer and does not read", transport="tcp")

    async def drained(self) -> None:
        """Wait until few enough bytes are pending."""
        while self.pending_bytes > PENDING_HIGH_BYTES and not self.closed:
            await self._drained.park()

    async def flush_forever(self) -> None:
        """Send what is pending, until the channel closes. Raises TooSlowError when the peer takes nothing for WRITE_STALL_S."""
        while not self.closed:
            if not self._pending:
                self._flush_wanted = trio.Event()
                await self._flush_wanted.wait()
                continue
            with trio.fail_after(WRITE_STALL_S):
                await trio.lowlevel.wait_writable(self._fd)
            self._flush_now()

    def _flush_now(self) -> None:
        try:
            while self._pending:
                head = self._pending[0]
                sent = self._sock.send(head)
                self.pending_bytes -= sent
                if sent < len(head):
                    self._pending[0] = head[sent:]
                    break
                self._pending.popleft()
        except BlockingIOError:
            pass
        except OSError as error:
            self.abort()
            raise ConnectionClosedError(f"the connection broke: {error}", transport="tcp") from error
        if self.pending_bytes <= PENDING_HIGH_BYTES:
            self._drained.unpark_all()
        if not self._pending:
            self._emptied.unpark_all()

    # Receiving.

    async def receive_into(self, deliver: Callable[[bytes], None]) -> bool:
        """Wait for bytes, and hand every message that is complete to `deliver`, which must not keep us. False at the end.

        Raises ConnectionClosedError when the connection breaks or a message does not authenticate.
        """
        if self._plain:
            plain, self._plain = bytes(self._plain), bytearray()
            deliver(plain)
            return True
        scratch = self._scratch
        try:
            await trio.lowlevel.wait_readable(self._fd)
            held = len(self._partial)
            # The scratch buffer is shared, and filled only here, after the last wait.
            scratch[:held] = self._partial
            with memoryview(scratch) as view:
                try:
                    received = self._sock.recv_into(view[held:])
                except BlockingIOError:
                    return True
                if not received:
                    return False
                end = held + received
                at = 0
                while end - at >= 2:
                    (size,) = _length.unpack_from(scratch, at)
                    if end - at < 2 + size:
                        break
                    plain = self._open(_nonce(self._opened), view[at + 2 : at + 2 + size], None)
                    self._opened += 1
                    at += 2 + size
                    deliver(plain)
                self._partial = bytes(view[at:end])
        except (OSError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(f"the connection broke: {error}", transport="tcp") from error
        except InvalidTag as error:
            raise ConnectionClosedError("a message does not authenticate", transport="tcp") from error
        return True

    # The byte-stream face that the library negotiates the muxer through.

    async def read(self, n: int | None = None) -> bytes:
        while not self._plain:
            if not await self.receive_into(self._plain.extend):
                raise ConnectionClosedError("the peer closed the connection", transport="tcp")
        taken = bytes(self._plain if n is None else self._plain[:n])
        del self._plain[: len(taken)]
        return taken

    async def write(self, data: bytes) -> None:
        for at in range(0, len(data), PLAIN_MAX):
            self.push(data[at : at + PLAIN_MAX])
        while self._pending:
            with trio.fail_after(WRITE_STALL_S):
                await trio.lowlevel.wait_writable(self._fd)
            self._flush_now()
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        self.abort()
        await trio.lowlevel.checkpoint()

    async def finish_sending(self, patience_s: float) -> None:
        """Let what is pending leave, for a while, and tell the peer's TCP that no more comes."""
        with trio.move_on_after(patience_s):
            while self._pending and not self.closed:
                self._flush_wanted.set()
                await self._emptied.park()
        if not self.closed:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)

    def abort(self) -> None:
        """Close at once. Whoever waits for this channel notices."""
        if not self.closed:
            self.closed = True
            self._pending.clear()
            self.pending_bytes = 0
            self._drained.unpark_all()
            self._emptied.unpark_all()
            self._flush_wanted.set()
            trio.lowlevel.notify_closing(self._fd)
            self._sock.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None if self.circuit else (str(self._remote[0]), int(self._remote[1]))

    def get_local_endpoint(self) -> Endpoint:
        """The end of the connection on this machine. Raises ValueError for one through a relay."""
        if self.circuit:
            raise ValueError("a connection through a relay leaves no address")
        host, port = self._local[:2]
        return Endpoint("ip6" if ":" in host else "ip4", str(host).partition("%")[0], int(port))

    def get_transport_addresses(self) -> list[Multiaddr]:
        if self.circuit:
            return [Multiaddr(self.circuit)]
        host, port = self._remote[:2]
        return [Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host.partition('%')[0]}/tcp/{port}")]

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.RELAYED if self.circuit else ConnectionType.DIRECT


class NoiseTransport(Transport):
    """libp2p's Noise security transport, for Ed25519 identities only, whose sessions are `SecureChannel`s."""

    def __init__(self, key_pair: KeyPair, noise_privkey: PrivateKey) -> None:
        super().__init__(key_pair, noise_privkey=noise_privkey)
        self._scratch = bytearray(RECEIVE_BYTES)
        self._greetings = trio.lowlevel.ParkingLot()
        self._greeted: OrderedDict[str, float] = OrderedDict()

    def greeted_s(self, peer_id: str) -> float:
        """When a peer last dialled this node directly and proved who it is; minus infinity where it never did."""
        return self._greeted.get(peer_id, -math.inf)

    async def greeted_since(self, peer_id: str, since_s: float, patience_s: float) -> bool:
        """Whether the peer has dialled this node since then; waits a little for what may be under way."""
        with trio.move_on_after(patience_s):
            while self.greeted_s(peer_id) < since_s:
                await self._greetings.park()
        return self.greeted_s(peer_id) >= since_s

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        channel = self._take_over(conn, await super().secure_inbound(conn), is_initiator=False)
        if not channel.circuit:
            peer_id = str(channel.get_remote_peer())
            self._greeted[peer_id] = trio.current_time()
            self._greeted.move_to_end(peer_id)
            self._greetings.unpark_all()
            while len(self._greeted) > GREETED_MAX:
                self._greeted.popitem(last=False)
        return channel

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        return self._take_over(conn, await super().secure_outbound(conn, peer_id), is_initiator=True)

    def _take_over(self, conn: IRawConnection, session: ISecureConn, *, is_initiator: bool) -> SecureChannel:
        """Move the socket and the keys of a finished handshake into a channel of our own."""
        remote = session.get_remote_peer()
        try:
            public_key_of(str(remote))
        except MalformedError as error:
            raise HandshakeFailure(f"peer {remote} has no Ed25519 key") from error
        if not (isinstance(session, SecureSession) and isinstance(session.conn, NoiseTransportReadWriter)):
            raise HandshakeFailure("libp2p's Noise session has changed its form")
        if not (isinstance(conn, RawConnection) and isinstance(conn.stream, TrioTCPStream)):
            raise HandshakeFailure("only TCP connections are supported")
        noise = session.conn.noise_state.noise_protocol
        circuit = getattr(conn.stream, "circuit", "")
        borrowed = conn.stream.stream.socket
        sock = socket.socket(borrowed.family, borrowed.type, borrowed.proto, fileno=borrowed.detach())
        try:
            sock.setblocking(False)
            if not circuit:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if hasattr(socket, "TCP_USER_TIMEOUT"):
                    # A way that has become one-way: what we send arrives nowhere, though the peer's bytes still come.
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
            return SecureChannel(
                sock=sock,
                local_peer=self.local_peer,
                local_private_key=self.libp2p_privkey,
                remote_peer=remote,
                is_initiator=is_initiator,
                send_key=noise.cipher_state_encrypt.k,
                receive_key=noise.cipher_state_decrypt.k,
                scratch=self._scratch,
                circuit=circuit,
            )
        except OSError as error:
            sock.close()
            raise HandshakeFailure(f"the connection broke: {error}") from error

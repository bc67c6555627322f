"""Yamux (hashicorp's specification, as libp2p uses it) with hard bounds, and fast for small frames on long-lived streams.

It takes the place of the library's muxer, which only logs window violations, lets one peer open any number of streams, polls for
credit and gives up after 5 s, destroys the connection when a writer is cancelled, and spends most of an echo's time on locks.

One task per connection reads the socket and hands payloads to streams without waiting for anyone. A peer that sends more than
its credit, opens more streams than allowed, or floods with control frames loses the connection.
"""

from __future__ import annotations

import logging
import math
import struct
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType

import trio
from libp2p.abc import IMuxedConn, IMuxedStream, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.io.exceptions import IOException
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamReset,
)
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from nexus.core.errors import CapacityError
from nexus.network.libp2p.noise import PENDING_HIGH_BYTES, PLAIN_MAX, SecureChannel
from nexus.network.limits import TokenBucket
from nexus.network.serving import background_nursery

log = logging.getLogger(__name__)

PROTOCOL_ID = "/yamux/1.0.0"
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
_header = struct.Struct("!BBHII")
HEADER_BYTES = _header.size
PAYLOAD_MAX = PLAIN_MAX - HEADER_BYTES  # a frame is one Noise message
STREAM_ID_MAX = 2**32 - 1

WINDOW_BYTES = 256 * 1024  # by the specification, what both sides may send at first
WINDOW_GROWN_BYTES = 512 * 1024  # for a stream that carries bulk
GROW_AFTER_BYTES = 1 << 20
SMALL_CHUNK_BYTES = 256
JOINED_CHUNK_BYTES = 16 * 1024
# A writer that never has to wait still lets others run, this often.
YIELD_EVERY_BYTES = 128 * 1024

CONTROL_FRAMES_PER_S = 5_000
CONTROL_FRAMES_BURST = 20_000
ORPHAN_BYTES_PER_S = 4 << 20  # for streams that we reset a moment ago
ORPHAN_BYTES_BURST = 16 << 20
REFUSED_STREAMS_PER_S = 20
REFUSED_STREAMS_BURST = 500
PING_AFTER_S = 15.0
DEAD_AFTER_S = 45.0
LINGER_S = 10.0
GOODBYE_S = 1.0
KEEPER_ROUND_S = 5.0
GO_AWAY_NORMAL, GO_AWAY_PROTOCOL_ERROR = 0, 1


class ProtocolError(Exception):
    """The peer broke yamux's rules."""


@dataclass(slots=True)
class Budget:
    """Bytes that all connections of a node together, and those of one peer, may buffer, and the streams that one connection may
    have. `peer_bytes_max` leaves room for the longest frame (FRAME_MAX) and little more."""

    bytes_max: int
    streams_max: int
    peer_bytes_max: int = 56 << 20
    used: int = 0
    peers: Counter[ID] = field(default_factory=Counter)
    connections: dict[YamuxConnection, None] = field(default_factory=dict)

    def account(self, peer_id: ID, size: int) -> None:
        """`size` more bytes of a peer are buffered; negative: fewer."""
        self.used += size
        self.peers[peer_id] += size
        if not self.peers[peer_id]:
            del self.peers[peer_id]

    def enforce_peer(self, peer_id: ID) -> None:
        """Over what one peer may have, all its connections go."""
        if self.peers.get(peer_id, 0) > self.peer_bytes_max:
            for conn in [conn for conn in self.connections if conn.peer_id == peer_id]:
                conn.drop("it makes this node buffer more than one peer may")

    def enforce(self) -> None:
        """Over the bound, the connection that holds most of it goes, not the one that happened to fill it."""
        while self.used > self.bytes_max and self.connections:
            most = max(self.connections, key=YamuxConnection.buffered)
            most.drop("it makes this node buffer more than it has room for")


class YamuxStream(IMuxedStream):
    """One stream. Reading gives credit back; writing waits for it."""

    def __init__(self, conn: YamuxConnection, stream_id: int, *, outbound: bool) -> None:
        self.muxed_conn: IMuxedConn = conn
        self.conn = conn
        self.stream_id = stream_id
        self.outbound = outbound
        self.send_credit = WINDOW_BYTES
        self.receive_credit = WINDOW_BYTES
        self.window = WINDOW_BYTES
        self.received = 0
        self.buffered = 0
        self.held = 0
        self.send_closed = False
        self.receive_closed = False
        self.ended = False  # in order, by the peer
        self.broken = False
        self.torn = False  # a write was cancelled half-way
        self.abandoned_s: float | None = None
        self._chunks: deque[bytes | bytearray] = deque()
        self._reader: trio.lowlevel.Task | None = None
        self.deadline_s = math.inf
        # Seconds to wait before each read: how the library's handlers, which read message by message, are slowed down.
        self.pace: Callable[[], float] | None = None
        self._late = False
        self._credit = trio.lowlevel.ParkingLot()
        self._writing = trio.Lock()
        self._sent_since_yield = 0

    # Called by the connection, which never waits.

    def feed(self, chunk: bytes) -> None:
        size = len(chunk)
        self.receive_credit -= size
        if self.receive_credit < 0:
            raise ProtocolError("it sent more than its window")
        self.received += size
        if self.abandoned_s is not None:
            return  # nobody reads: drop it, and let the credit run out
        if size >= SMALL_CHUNK_BYTES:
            self._chunks.append(chunk)
        elif self._chunks and type(tail := self._chunks[-1]) is bytearray and len(tail) < JOINED_CHUNK_BYTES:
            tail += chunk
        else:
            # A million frames of one byte shall not become a million objects.
            self._chunks.append(bytearray(chunk))
        self.buffered += size
        self.conn.budget.account(self.conn.peer_id, size)
        self._wake_reader()

    def grant(self, credit: int) -> None:
        self.send_credit += credit
        if self.send_credit > 2**32:
            raise ProtocolError("it granted an absurd window")
        self._credit.unpark_all()

    def finish_receiving(self) -> None:
        self.ended = self.receive_closed = True
        self._wake_reader()

    def break_off(self, *, keep_buffer: bool = False) -> None:
        """A reset takes back what was not read yet; the end of a connection does not."""
        if not self.broken:
            self.broken = True
            self.hold(0)
            self.send_closed = self.receive_closed = True
            if not keep_buffer:
                self.ended = False
                self._drop_buffer()
            self._wake_reader()
            self._credit.unpark_all()

    def _drop_buffer(self) -> None:
        self.conn.budget.account(self.conn.peer_id, -self.buffered)
        self.buffered = 0
        self._chunks.clear()

    def _wake_reader(self) -> None:
        if self._reader is not None:
            trio.lowlevel.reschedule(self._reader)
            self._reader = None

    # Reading.

    def take(self) -> bytes:
        """All that has arrived, or nothing. Raises MuxedStreamReset."""
        chunks = self._chunks
        if not chunks:
            if self.broken and not self.ended:
                raise MuxedStreamReset
            return b""
        taken = bytes(chunks.popleft()) if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self._consumed(len(taken))
        return taken

    def hold(self, size: int) -> None:
        """The reader keeps `size` bytes that it took, of a frame that is not whole yet: they count as buffered."""
        self.conn.budget.account(self.conn.peer_id, size - self.held)
        self.held = size
        self.conn.budget.enforce_peer(self.conn.peer_id)
        self.conn.budget.enforce()

    def _consumed(self, size: int) -> None:
        self.buffered -= size
        self.conn.budget.account(self.conn.peer_id, -size)
        if self.receive_closed:
            return
        if self.received > GROW_AFTER_BYTES and self.window < WINDOW_GROWN_BYTES:
            self.window = WINDOW_GROWN_BYTES
        owed = self.window - self.receive_credit - self.buffered
        if owed >= self.window // 2:
            self.receive_credit += owed
            self.conn.send_control(WINDOW_UPDATE, 0, self.stream_id, owed)

    async def wait_readable(self, deadline_s: float = math.inf) -> None:
        """Wait for bytes, the end, or a reset. One reader at a time. Raises TooSlowError at the deadline.

        The connection's keeper watches the deadline: a cancel scope for each frame would cost a tenth of an echo.
        """
        if self._chunks or self.receive_closed:
            await trio.lowlevel.checkpoint()
            return
        if self._reader is not None:
            raise trio.BusyResourceError("another task reads this stream")
        self._reader = trio.lowlevel.current_task()
        self.deadline_s = deadline_s
        self.conn.watch(deadline_s)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._reader = None
            self.deadline_s = math.inf
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        self.deadline_s = math.inf
        if self._late:
            self._late = False
            if not (self._chunks or self.receive_closed):
                raise trio.TooSlowError

    def be_late(self) -> None:
        """The reader's deadline has passed."""
        if self._reader is not None:
            self._late = True
            self._wake_reader()

    async def read(self, n: int | None = None) -> bytes:
        """At least one byte and at most n. Raises MuxedStreamEOF or MuxedStreamReset."""
        if self.pace is not None and (pause_s := self.pace()):
            await trio.sleep(pause_s)
        while not self._chunks:
            if self.broken and not self.ended:
                raise MuxedStreamReset
            if self.receive_closed:
                raise MuxedStreamEOF
            await self.wait_readable()
        chunk = bytes(self._chunks.popleft())
        if n is not None and n < len(chunk):
            self._chunks.appendleft(chunk[n:])
            chunk = chunk[:n]
        self._consumed(len(chunk))
        return chunk

    # Writing.

    async def write(self, data: bytes) -> None:
        """Send all of it, in frames, waiting for credit and for the socket. What a cancelled write has sent stays sent."""
        if len(data) <= self.send_credit and len(data) <= PAYLOAD_MAX and not self._writing.locked():
            # The way of a small frame: one seal, one system call, no wait.
            await trio.lowlevel.checkpoint_if_cancelled()
            self._check_writable()
            self._push(data)
        else:
            await self._write_slowly(data)
        if self.conn.channel.pending_bytes > PENDING_HIGH_BYTES:
            await self.conn.channel.drained()
        elif self._sent_since_yield > YIELD_EVERY_BYTES:
            self._sent_since_yield = 0
            await trio.lowlevel.checkpoint()

    async def _write_slowly(self, data: bytes) -> None:
        at = 0
        async with self._writing:
            with memoryview(data) as view:
                try:
                    while at < len(view):
                        self._check_writable()
                        size = min(self.send_credit, PAYLOAD_MAX, len(view) - at)
                        if size <= 0:
                            await self._credit.park()
                            continue
                        self._push(view[at : at + size])
                        at += size
                        if at == len(view):
                            break
                        if self.conn.channel.pending_bytes > PENDING_HIGH_BYTES:
                            await self.conn.channel.drained()
                        elif self._sent_since_yield > YIELD_EVERY_BYTES:
                            self._sent_since_yield = 0
                            await trio.lowlevel.checkpoint()
                except trio.Cancelled:
                    self.torn = at > 0
                    raise

    def _check_writable(self) -> None:
        if self.broken:
            raise MuxedStreamReset
        if self.send_closed:
            raise MuxedStreamClosed

    def _push(self, payload: bytes | memoryview) -> None:
        size = len(payload)
        self.send_credit -= size
        self._sent_since_yield += size
        try:
            self.conn.channel.push(b"".join((_header.pack(0, DATA, 0, self.stream_id, size), payload)))
        except IOException as error:
            self.break_off()
            raise MuxedStreamReset from error

    # Ending.

    async def close(self) -> None:
        """Send the end. The other direction stays open."""
        self.close_write_now()
        await trio.lowlevel.checkpoint()

    close_write = close

    def close_write_now(self) -> None:
        if not self.send_closed:
            self.send_closed = True
            self._credit.unpark_all()
            self.conn.send_control(DATA, FIN, self.stream_id, 0)
            self.conn.forget_if_over(self)

    async def reset(self) -> None:
        self.reset_now()
        await trio.lowlevel.checkpoint()

    def reset_now(self) -> None:
        if not self.broken:
            over = self.send_closed and self.receive_closed
            self.break_off()
            if not over:
                self.conn.send_control(WINDOW_UPDATE, RST, self.stream_id, 0)
            self.conn.forget_if_over(self)

    def abandon(self) -> None:
        """Nobody will read on. The end is sent; the stream lingers for the peer's end, then is reset."""
        self.close_write_now()
        if not self.receive_closed:
            self.abandoned_s = trio.current_time()
            self._drop_buffer()

    def __del__(self) -> None:
        # A stream that is dropped unread gives its bytes back.
        if self.buffered:
            self.conn.budget.account(self.conn.peer_id, -self.buffered)

    def set_deadline(self, ttl: int) -> None:
        raise NotImplementedError("deadlines are cancel scopes")

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.conn.channel.get_remote_address()

    async def __aenter__(self) -> YamuxStream:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        await self.close()


class YamuxConnection(IMuxedConn):
    """All streams of one connection. `on_close` is set by the swarm."""

    def __init__(self, conn: ISecureConn, peer_id: ID, budget: Budget | None = None) -> None:
        if not isinstance(conn, SecureChannel):
            raise TypeError("this muxer runs on Nexus' own secure channel")
        self.channel = conn
        self.secured_conn = conn
        self.peer_id = peer_id
        self.budget = budget or Budget(bytes_max=64 << 20, streams_max=256)
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self.on_close: Callable[[], Awaitable[None]] | None = None
        self.opened_s = trio.current_time()
        self.close_reason = "the connection was closed"
        self.streams: dict[int, YamuxStream] = {}
        self._inbound = 0
        self._outbound = 0
        self._next_id = 1 if conn.is_initiator else 2
        self._accepted: deque[YamuxStream] = deque()
        self._accepting = trio.lowlevel.ParkingLot()
        self._head = b""
        self._body: YamuxStream | None = None
        self._body_left = 0
        self._body_flags = 0
        now_s = self.opened_s
        self._control = TokenBucket(CONTROL_FRAMES_PER_S, CONTROL_FRAMES_BURST, now_s)
        self._refused = TokenBucket(REFUSED_STREAMS_PER_S, REFUSED_STREAMS_BURST, now_s)
        self._orphans = TokenBucket(ORPHAN_BYTES_PER_S, ORPHAN_BYTES_BURST, now_s)
        self._heard_s = now_s
        self._now_s = now_s
        self._closing = self._receiving = False
        self._received = trio.Event()
        self._pinged_s = now_s
        self._alarm = trio.Event()
        self._alarm_s = now_s

    @property
    def is_initiator(self) -> bool:
        return self.channel.is_initiator

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set()

    @property
    def is_closed(self) -> bool:
        return self.event_closed.is_set()

    async def start(self) -> None:
        """Run the connection until it ends. Never raises on account of the peer."""
        try:
            async with background_nursery() as nursery:
                nursery.start_soon(self._flush, nursery.cancel_scope)
                nursery.start_soon(self._keep, nursery.cancel_scope)
                self.budget.connections[self] = None
                self.event_started.set()
                await self._receive()
        except Exception:  # the boundary: no peer may end the node
            log.exception("the connection to peer %s failed", self.peer_id)
        finally:
            self._end()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
                if self.on_close is not None:
                    await self.on_close()

    async def _receive(self) -> None:
        self._receiving = True
        try:
            while not self.channel.closed:
                if not await self.channel.receive_into(self._deliver):
                    self.close_reason = "the peer closed the connection"
                    return
        except IOException as error:
            self.close_reason = str(error)
        except ProtocolError as error:
            self.drop(f"the peer broke the rules: {error}")
        finally:
            self._receiving = False
            self._received.set()

    def buffered(self) -> int:
        return sum(stream.buffered + stream.held for stream in self.streams.values())

    def drop(self, reason: str) -> None:
        """End the connection at once, by the peer's fault, and keep nothing of it."""
        log.warning("dropping the connection to peer %s: %s", self.peer_id, reason)
        self.close_reason = reason
        self.send_control(GO_AWAY, 0, 0, GO_AWAY_PROTOCOL_ERROR)
        self._end(keep_buffers=False)

    async def _flush(self, scope: trio.CancelScope) -> None:
        try:
            await self.channel.flush_forever()
        except (IOException, trio.TooSlowError, trio.ClosedResourceError, OSError):
            self.close_reason = "the peer does not take what is sent to it"
        scope.cancel()

    def watch(self, deadline_s: float) -> None:
        """Have the keeper wake up by then. Costs nothing for a deadline further away than its next round."""
        if deadline_s < self._alarm_s:
            self._alarm_s = deadline_s
            self._alarm.set()

    async def _keep(self, scope: trio.CancelScope) -> None:
        """Notice a peer that is gone without a word, end streams that linger, wake readers whose time is up."""
        while True:
            now_s = trio.current_time()
            self._alarm = trio.Event()
            self._alarm_s = now_s + KEEPER_ROUND_S
            for stream in list(self.streams.values()):
                if stream.deadline_s <= now_s:
                    stream.be_late()
                elif stream.abandoned_s is not None and now_s - stream.abandoned_s > LINGER_S:
                    stream.reset_now()
                else:
                    self._alarm_s = min(self._alarm_s, stream.deadline_s)
            if now_s - self._heard_s > DEAD_AFTER_S:
                self.close_reason = f"the peer has been silent for {DEAD_AFTER_S:g} s"
                scope.cancel()
                return
            if now_s - max(self._heard_s, self._pinged_s) > PING_AFTER_S:
                self._pinged_s = now_s
                self.send_control(PING, SYN, 0, 0)
            with trio.move_on_at(self._alarm_s):
                await self._alarm.wait()

    # Taking frames apart. A payload goes to its stream as it comes, whole or in pieces.

    def _deliver(self, plain: bytes) -> None:
        if self.channel.closed:
            return  # what came along with the reason for the end
        self._now_s = self._heard_s = trio.current_time()
        at = 0
        end = len(plain)
        if self._body_left:
            at = min(self._body_left, end)
            self._feed(plain[:at], at)
        if self._head:
            plain = self._head + plain[at:]
            self._head = b""
            at, end = 0, len(plain)
        while end - at >= HEADER_BYTES:
            version, kind, flags, stream_id, length = _header.unpack_from(plain, at)
            at += HEADER_BYTES
            if version != 0:
                raise ProtocolError(f"version {version}")
            if kind == DATA:
                self._body = self._stream_of(stream_id, flags)
                self._body_left = length
                self._body_flags = flags
                if length:
                    available = min(length, end - at)
                    self._feed(plain[at : at + available], available)
                    at += available
                else:
                    self._count_control()
                    self._apply_ends(self._body, flags)
            else:
                self._count_control()
                self._handle_control(kind, flags, stream_id, length)
        if at < end:
            self._head = plain[at:]

    def _feed(self, piece: bytes, size: int) -> None:
        self._body_left -= size
        stream = self._body
        if stream is None or stream.receive_closed:
            if self._orphans.take(size, self._now_s):
                raise ProtocolError("it sends to streams that are over")
        elif size:
            stream.feed(piece)
            self.budget.enforce_peer(self.peer_id)
            if self.budget.used > self.budget.bytes_max:
                self.budget.enforce()
        if not self._body_left:
            self._apply_ends(stream, self._body_flags)

    def _count_control(self) -> None:
        if self._control.take(1, self._now_s):
            raise ProtocolError("it floods with control frames")

    def _stream_of(self, stream_id: int, flags: int) -> YamuxStream | None:
        stream = self.streams.get(stream_id)
        if not flags & SYN:
            return stream
        if stream is not None or stream_id == 0 or stream_id % 2 == self._next_id % 2:
            raise ProtocolError(f"it opened stream {stream_id}, which is not its to open")
        if self._inbound >= self.budget.streams_max:
            if self._refused.take(1, self._now_s):
                raise ProtocolError("it opens more streams than it may, again and again")
            self.send_control(WINDOW_UPDATE, RST, stream_id, 0)
            return None
        self._inbound += 1
        stream = self.streams[stream_id] = YamuxStream(self, stream_id, outbound=False)
        self.send_control(WINDOW_UPDATE, ACK, stream_id, 0)
        self._accepted.append(stream)
        self._accepting.unpark()
        return stream

    def _handle_control(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        if kind == WINDOW_UPDATE:
            stream = self._stream_of(stream_id, flags)
            if stream is not None:
                if length:
                    stream.grant(length)
                self._apply_ends(stream, flags)
        elif kind == PING:
            if flags & SYN:
                self.send_control(PING, ACK, 0, length)
        elif kind == GO_AWAY:
            self.close_reason = "the peer said goodbye"
            self.channel.abort()
        else:
            raise ProtocolError(f"frame type {kind}")

    def _apply_ends(self, stream: YamuxStream | None, flags: int) -> None:
        if stream is not None and flags & (FIN | RST):
            if flags & RST:
                stream.break_off()
            else:
                stream.finish_receiving()
            self.forget_if_over(stream)

    def forget_if_over(self, stream: YamuxStream) -> None:
        if stream.send_closed and stream.receive_closed and self.streams.pop(stream.stream_id, None) is not None:
            if stream.outbound:
                self._outbound -= 1
            else:
                self._inbound -= 1

    def send_control(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """Send a frame without payload. A connection that is gone is noticed by whoever reads it."""
        if not self.channel.closed:
            try:
                self.channel.push(_header.pack(0, kind, flags, stream_id, length))
            except IOException as error:
                self.close_reason = str(error)

    # Opening and accepting.

    async def open_stream(self) -> YamuxStream:
        """Raises CapacityError at the cap, MuxedConnUnavailable when the connection is gone."""
        await trio.lowlevel.checkpoint()
        return self.open_stream_now()

    def open_stream_now(self) -> YamuxStream:
        if self.is_closed or self._closing or self.channel.closed:
            raise MuxedConnUnavailable(self.close_reason)
        if self._outbound >= self.budget.streams_max:
            raise CapacityError(
                f"{self._outbound} streams to peer {self.peer_id} are open already", "Close streams, or reuse those that are open"
            )
        if self._next_id > STREAM_ID_MAX:
            raise MuxedConnUnavailable("this connection has used up its stream numbers")
        stream = YamuxStream(self, self._next_id, outbound=True)
        self._next_id += 2
        self._outbound += 1
        self.streams[stream.stream_id] = stream
        self.send_control(WINDOW_UPDATE, SYN, stream.stream_id, 0)
        return stream

    async def accept_stream(self) -> YamuxStream:
        await trio.lowlevel.checkpoint()
        while not self._accepted:
            if self.is_closed:
                raise MuxedConnUnavailable(self.close_reason)
            await self._accepting.park()
        return self._accepted.popleft()

    async def close(self) -> None:
        """Say goodbye, let what is pending leave and be read, and end everything."""
        if self.is_closed or self._closing:
            return
        self._closing = True
        self.send_control(GO_AWAY, 0, 0, GO_AWAY_NORMAL)
        with trio.CancelScope(shield=True):
            await self.channel.finish_sending(GOODBYE_S)
            # Closing a socket that holds unread bytes resets it, and takes from the peer what it has not read yet.
            with trio.move_on_after(GOODBYE_S if self._receiving else 0):
                await self._received.wait()
        self._end()

    def _end(self, *, keep_buffers: bool = True) -> None:
        self.channel.abort()
        self.budget.connections.pop(self, None)
        self.event_closed.set()
        for stream in list(self.streams.values()):
            stream.break_off(keep_buffer=keep_buffers)
        self.streams.clear()
        self._accepted.clear()
        self._accepting.unpark_all()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self.channel.get_transport_addresses()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.channel.get_remote_address()

    def get_connection_type(self) -> ConnectionType:
        return self.channel.get_connection_type()

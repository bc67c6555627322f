"""Frames over a muxed stream: a 4-byte big-endian length and that many bytes."""

from __future__ import annotations

import math
import struct

import trio
from libp2p.stream_muxer.exceptions import MuxedStreamError, MuxedStreamReset

from nexus.core.errors import CapacityError, PeerError, TimedOutError, UnreachableError
from nexus.network.libp2p.yamux import YamuxStream
from nexus.network.limits import PeerLimits
from nexus.network.transport import ProtocolSpec

_length = struct.Struct(">I")
LENGTH_BYTES = _length.size
# A frame that has begun may take this much longer, so that large frames pass slow links and a drip of bytes does not.
SLOWEST_BYTES_PER_S = 64 * 1024


class FrameStream:
    """A `nexus.network.transport.Stream` over yamux."""

    def __init__(self, muxed: YamuxStream, peer_id: str, protocol: ProtocolSpec, limits: PeerLimits) -> None:
        self._muxed = muxed
        self._peer_id = peer_id
        self._protocol = protocol
        self._limits = limits
        self._partial = bytearray()

    @property
    def peer_id(self) -> str:
        return self._peer_id

    async def send(self, frame: bytes) -> None:
        size = len(frame)
        if size > self._protocol.frame_max:
            raise CapacityError(f"a frame of {size} bytes is over the {self._protocol.frame_max} of {self._protocol.id}")
        try:
            # One write, so one message on the wire for a small frame, and no other writer's bytes between length and frame.
            await self._muxed.write(_length.pack(size) + frame)
        except trio.Cancelled:
            if self._muxed.torn:
                # Part of the frame has left: what follows would be read as the rest of it.
                self._muxed.reset_now()
            raise
        except MuxedStreamError as error:
            raise self._gone() from error

    async def receive(self) -> bytes:
        if not self._partial:
            # The way of a small frame: it came whole, and alone.
            try:
                data = self._muxed.take()
            except MuxedStreamReset:
                raise self._gone() from None
            if self._is_one_frame(data):
                await trio.lowlevel.checkpoint_if_cancelled()
                frame = data[LENGTH_BYTES:]
                return frame if self._protocol.bytes_per_peer_s is None else await self._paced(frame)
            self._partial += data
        else:
            await trio.lowlevel.checkpoint()
        timeout_s = self._protocol.read_timeout_s
        with trio.move_on_after(math.inf if timeout_s is None else timeout_s) as scope:
            frame = await self._assemble(scope)
        if scope.cancelled_caught:
            self._muxed.reset_now()
            raise TimedOutError(f"peer {self._peer_id} sent nothing on {self._protocol.id} for {timeout_s:g} s")
        return frame if self._protocol.bytes_per_peer_s is None else await self._paced(frame)

    async def _assemble(self, scope: trio.CancelScope) -> bytes:
        partial = self._partial
        muxed = self._muxed
        length = -1
        while True:
            if length < 0 and len(partial) >= LENGTH_BYTES:
                (length,) = _length.unpack_from(partial)
                if length > self._protocol.frame_max:
                    muxed.reset_now()
                    raise PeerError(
                        f"a frame of {length} bytes on {self._protocol.id}, where {self._protocol.frame_max} are allowed",
                        peer=self._peer_id,
                    )
                scope.deadline += length / SLOWEST_BYTES_PER_S
            if length >= 0 and len(partial) >= LENGTH_BYTES + length:
                frame = bytes(memoryview(partial)[LENGTH_BYTES : LENGTH_BYTES + length])
                del partial[: LENGTH_BYTES + length]
                return frame
            try:
                data = muxed.take()
            except MuxedStreamReset:
                raise self._gone() from None
            if data:
                if not partial and self._is_one_frame(data):
                    return data[LENGTH_BYTES:]
                partial += data
            elif not muxed.receive_closed:
                await muxed.wait_readable()
            elif partial:
                raise UnreachableError(
                    f"peer {self._peer_id} closed {self._protocol.id} in the middle of a frame", peer=self._peer_id
                )
            else:
                raise trio.EndOfChannel

    def _is_one_frame(self, data: bytes) -> bool:
        size = len(data) - LENGTH_BYTES
        return 0 <= size <= self._protocol.frame_max and _length.unpack_from(data)[0] == size

    async def _paced(self, frame: bytes) -> bytes:
        if pause_s := self._limits.delay_s(self._peer_id, self._protocol, len(frame), trio.current_time()):
            await trio.sleep(pause_s)
        return frame

    async def close(self) -> None:
        await self._muxed.close()

    async def reset(self) -> None:
        self._muxed.reset_now()

    def abandon(self) -> None:
        """Close, and read no more."""
        self._muxed.abandon()

    def _gone(self) -> UnreachableError:
        conn = self._muxed.conn
        reason = conn.close_reason if conn.is_closed else "it was closed or reset"
        return UnreachableError(f"the stream {self._protocol.id} to peer {self._peer_id} is gone: {reason}", peer=self._peer_id)

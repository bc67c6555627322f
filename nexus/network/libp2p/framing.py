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
        self._paced = protocol.bytes_per_peer_s is not None or protocol.frames_per_peer_s is not None
        self._frame_max = protocol.frame_max if muxed.outbound else protocol.first_frame_max or protocol.frame_max

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
        frame = await self._next()
        self._frame_max = self._protocol.frame_max
        if self._paced and (pause_s := self._limits.delay_s(self._peer_id, self._protocol, len(frame), trio.current_time())):
            await trio.sleep(pause_s)
        return frame

    async def _next(self) -> bytes:
        """The next frame. Whatever has arrived is taken at once and cut here, so a small frame costs one wake-up and one copy."""
        muxed, partial = self._muxed, self._partial
        timeout_s = self._protocol.read_timeout_s
        length = -1
        deadline_s = extended_s = 0.0
        while True:
            if partial:
                if length < 0 and len(partial) >= LENGTH_BYTES:
                    length = self._checked_length(partial)
                    extended_s = length / SLOWEST_BYTES_PER_S
                if 0 <= length <= len(partial) - LENGTH_BYTES:
                    frame = bytes(memoryview(partial)[LENGTH_BYTES : LENGTH_BYTES + length])
                    del partial[: LENGTH_BYTES + length]
                    muxed.hold(len(partial))
                    await trio.lowlevel.checkpoint_if_cancelled()
                    return frame
            try:
                data = muxed.take()
            except MuxedStreamReset:
                raise self._gone() from None
            if data:
                if not partial and self._is_one_frame(data):
                    await trio.lowlevel.checkpoint_if_cancelled()
                    return data[LENGTH_BYTES:]
                partial += data
                muxed.hold(len(partial))
            elif not muxed.receive_closed:
                if timeout_s is None:
                    await muxed.wait_readable(math.inf)
                    continue
                if not deadline_s:
                    deadline_s = trio.current_time() + timeout_s
                try:
                    await muxed.wait_readable(deadline_s + extended_s)
                except trio.TooSlowError:
                    muxed.reset_now()
                    raise TimedOutError(f"peer {self._peer_id} sent nothing on {self._protocol.id} for {timeout_s:g} s") from None
            elif partial:
                muxed.hold(0)
                raise UnreachableError(
                    f"peer {self._peer_id} closed {self._protocol.id} in the middle of a frame", peer=self._peer_id
                )
            else:
                raise trio.EndOfChannel

    def _checked_length(self, partial: bytearray) -> int:
        """Before a byte of the frame is kept."""
        length: int = _length.unpack_from(partial)[0]
        if length > self._frame_max:
            self._muxed.reset_now()
            raise PeerError(
                f"a frame of {length} bytes on {self._protocol.id}, where {self._frame_max} are allowed",
                peer=self._peer_id,
            )
        return length

    def _is_one_frame(self, data: bytes) -> bool:
        size = len(data) - LENGTH_BYTES
        return 0 <= size <= self._frame_max and _length.unpack_from(data)[0] == size

    async def close(self) -> None:
        await self._muxed.close()

    async def reset(self) -> None:
        self._muxed.reset_now()
        self._muxed.hold(0)

    def abandon(self) -> None:
        """Close, and read no more."""
        self._muxed.abandon()
        self._muxed.hold(0)

    def _gone(self) -> UnreachableError:
        conn = self._muxed.conn
        reason = conn.close_reason if conn.is_closed else "it was closed or reset"
        return UnreachableError(f"the stream {self._protocol.id} to peer {self._peer_id} is gone: {reason}", peer=self._peer_id)

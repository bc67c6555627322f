"""A framed stream in memory: how a node talks to itself in every adapter, and all streams of the simulated network."""

from __future__ import annotations

import math
from collections import deque
from typing import Protocol

import trio

from nexus.core.errors import CapacityError, PeerError, TimedOutError, UnreachableError
from nexus.network.limits import PeerLimits
from nexus.network.transport import ProtocolSpec

# What a direction holds before the sender has to wait: about a TCP connection's worth.
BUFFER_BYTES = 1 << 20


class Link(Protocol):
    """What lies between the two ends."""

    def arrival_s(self, size: int) -> float:
        """When a frame of `size` bytes that is sent now arrives; never earlier than one sent before. Infinite: the link breaks."""
        ...

    async def passable(self) -> None:
        """Wait while nothing gets through."""


class Direct:
    """No distance at all."""

    def arrival_s(self, size: int) -> float:
        return -math.inf

    async def passable(self) -> None:
        return


class _Way:
    """One direction of a pipe."""

    __slots__ = ("broken", "buffered", "changed", "closed_s", "frames", "link")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.frames: deque[tuple[float, bytes]] = deque()
        self.buffered = 0
        self.closed_s: float | None = None
        self.broken: str | None = None
        self.changed = trio.lowlevel.ParkingLot()

    def wreck(self, reason: str) -> None:
        if self.broken is None:
            self.broken = reason
            self.frames.clear()
            self.buffered = 0
            self.changed.unpark_all()


class PipeStream:
    """One end of a pipe; a `nexus.network.transport.Stream`."""

    def __init__(
        self, peer_id: str, protocol: ProtocolSpec, limits: PeerLimits, inward: _Way, outward: _Way, first_frame_max: int | None
    ) -> None:
        self._peer_id = peer_id
        self._protocol = protocol
        self._frame_max = first_frame_max or protocol.frame_max
        self._limits = limits
        self._in = inward
        self._out = outward
        self._sending = trio.Lock()
        self.misbehaved = False

    @property
    def peer_id(self) -> str:
        return self._peer_id

    async def send(self, frame: bytes) -> None:
        if len(frame) > self._protocol.frame_max:
            raise CapacityError(f"a frame of {len(frame)} bytes is over the {self._protocol.frame_max} of {self._protocol.id}")
        await trio.lowlevel.checkpoint()
        way = self._out
        async with self._sending:
            while way.broken is None and way.closed_s is None and way.buffered >= BUFFER_BYTES:
                await way.changed.park()
            if way.broken is not None:
                raise self._gone(way.broken)
            if way.closed_s is not None:
                raise self._gone("this side closed the stream")
            arrival_s = way.link.arrival_s(len(frame))
            if arrival_s == math.inf:
                self._wreck("the link broke")
                raise self._gone("the link broke")
            way.frames.append((arrival_s, bytes(frame)))
            way.buffered += len(frame)
            way.changed.unpark_all()

    async def receive(self) -> bytes:
        timeout_s = self._protocol.read_timeout_s
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(math.inf if timeout_s is None else timeout_s) as scope:
            frame = await self._next()
        if scope.cancelled_caught:
            await self.reset()
            raise TimedOutError(f"peer {self._peer_id} sent nothing on {self._protocol.id} for {timeout_s:g} s")
        if len(frame) > self._frame_max:
            self.misbehaved = True
            await self.reset()
            raise PeerError(
                f"a frame of {len(frame)} bytes on {self._protocol.id}, where {self._frame_max} are allowed",
                peer=self._peer_id,
            )
        self._frame_max = self._protocol.frame_max
        if pause_s := self._limits.delay_s(self._peer_id, self._protocol, len(frame), trio.current_time()):
            await trio.sleep(pause_s)
        return frame

    async def _next(self) -> bytes:
        way = self._in
        while True:
            if way.broken is not None:
                raise self._gone(way.broken)
            due_s = way.frames[0][0] if way.frames else way.closed_s
            if due_s is None:
                await way.changed.park()
            elif due_s > trio.current_time():
                with trio.move_on_at(due_s):
                    await way.changed.park()
            else:
                await way.link.passable()
                if way.broken is not None:
                    continue
                if not way.frames:
                    raise trio.EndOfChannel
                _, frame = way.frames.popleft()
                way.buffered -= len(frame)
                way.changed.unpark_all()
                return frame

    async def close(self) -> None:
        if self._out.closed_s is None and self._out.broken is None:
            arrival_s = self._out.link.arrival_s(0)
            if arrival_s == math.inf:
                self._wreck("the link broke")
            else:
                self._out.closed_s = arrival_s
                self._out.changed.unpark_all()
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        self._wreck("the stream was reset")

    @property
    def finished(self) -> bool:
        """Whether both directions are over."""
        return all(way.broken is not None or way.closed_s is not None for way in (self._in, self._out))

    def wreck(self, reason: str) -> None:
        """The link between the ends is gone: both notice."""
        self._wreck(reason)

    def _wreck(self, reason: str) -> None:
        self._in.wreck(reason)
        self._out.wreck(reason)

    def _gone(self, reason: str) -> UnreachableError:
        return UnreachableError(f"the stream {self._protocol.id} to peer {self._peer_id} is gone: {reason}", peer=self._peer_id)


def pipe(
    near: tuple[str, ProtocolSpec, PeerLimits, Link], far: tuple[str, ProtocolSpec, PeerLimits, Link]
) -> tuple[PipeStream, PipeStream]:
    """Two ends, `near` being the one that opens. Each is given as its own peer id, its own view of the protocol, its limits, and
    the link of what it sends."""
    near_id, near_protocol, near_limits, near_link = near
    far_id, far_protocol, far_limits, far_link = far
    forth, back = _Way(near_link), _Way(far_link)
    return (
        PipeStream(far_id, near_protocol, near_limits, back, forth, None),
        PipeStream(near_id, far_protocol, far_limits, forth, back, far_protocol.first_frame_max),
    )

"""The network port. Services see peers, framed streams, gossip and provider records; they never see libp2p.

Adapters: `nexus.network.libp2p` (the real network) and `nexus.network.simulated` (in memory, seeded delay, loss, partitions).
Both raise the errors of `nexus.core.errors`: UnreachableError when a peer cannot be dialled or a stream ends unexpectedly,
TimedOutError at a deadline, PeerError when a peer breaks the framing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import trio

if TYPE_CHECKING:
    from nexus.network.reachability import Netcheck


FRAME_MAX = 48 * 1024 * 1024
GOSSIP_BYTES_MAX = 1024
PROVIDER_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class ProtocolSpec:
    """A wire protocol and its bounds. Frames are a 4-byte big-endian length and that many bytes.

    `frame_max`: longest frame, in bytes; a longer one closes the stream and counts against the peer.
    `first_frame_max`: the same for the first frame of whoever opens the stream, which says what it is about (None: `frame_max`).
    `read_timeout_s`: a stream on which the reader waits longer than this is reset (None: the service sets its own deadlines).
    `streams_per_peer_max`: open inbound streams of this protocol per peer; one more is reset.
    `bytes_per_peer_s`, `frames_per_peer_s`: sustained inbound bytes and frames per second and peer; above it reading slows down
    (None: no limit).
    `bulk`: its streams carry much, so they may go another way than the rest (`nexus.network.fastpath`).
    """

    id: str
    frame_max: int
    read_timeout_s: float | None = 30.0
    streams_per_peer_max: int = 16
    first_frame_max: int | None = None
    bytes_per_peer_s: int | None = None
    frames_per_peer_s: int | None = None
    bulk: bool = False


class Stream(Protocol):
    """A two-way stream of frames to one authenticated peer."""

    @property
    def peer_id(self) -> str: ...

    async def send(self, frame: bytes) -> None:
        """Send one frame. Waits while the peer does not read. Raises UnreachableError once the stream is gone, CapacityError
        for a frame over the cap. Cancelled half-way, it breaks this stream, and no other of the connection.

        A frame that can leave at once does so without yielding to other tasks: between two sends of a loop nothing else may run.
        """
        ...

    async def receive(self) -> bytes:
        """The next frame. Raises trio.EndOfChannel when the peer closed its side in order, UnreachableError when it broke off,
        PeerError for a frame over the cap, TimedOutError when the protocol's read timeout passes."""
        ...

    async def close(self) -> None:
        """Close in order: what was sent still arrives."""

    async def reset(self) -> None:
        """Break off at once. Never raises."""


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """A peer and where it was last seen, as multiaddrs without the /p2p part."""

    peer_id: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Connection:
    """A live connection. `direction`: "in" or "out". `opened_s`: trio time."""

    peer_id: str
    address: str
    direction: str
    opened_s: float


@dataclass(frozen=True, slots=True)
class Message:
    """A gossip message as it came in. `peer_id`: who published it, by its signature."""

    peer_id: str
    data: bytes


Handler = Callable[[Stream], Awaitable[None]]
Subscription: TypeAlias = "AbstractAsyncContextManager[trio.MemoryReceiveChannel[Message]]"


class Transport(Protocol):
    """One node's view of the network. Obtained from an adapter's `open_...` context manager, which runs it."""

    @property
    def peer_id(self) -> str: ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs that others can dial, each ending in /p2p/<peer id>."""
        ...

    def serve(self, protocol: ProtocolSpec, handler: Handler) -> None:
        """Answer inbound streams of `protocol`. Each runs in a task of its own; an exception ends that stream and no more.

        A stream is closed when its handler returns, and reset when it raises. Raises ValueError for a protocol served already.
        """

    async def connect(self, address: str) -> str:
        """Dial a multiaddr that ends in /p2p/<peer id>; the peer id. Raises UsageError for a malformed address, and
        UnreachableError with the address and the reason when nobody answers there, or another peer than the one named."""
        ...

    def learn(self, peer: PeerAddress) -> None:
        """Remember where a peer may be dialled. Bounded; the newest addresses win."""

    async def open_stream(self, peer_id: str, protocol: ProtocolSpec) -> Stream:
        """Open a stream, dialling known addresses first if need be. To this node itself it is a pipe in memory.

        Raises UnreachableError, PeerError when the peer does not speak the protocol, and CapacityError at a bound of this node.
        """
        ...

    def connections(self) -> list[Connection]:
        """Live connections, sorted by peer id."""
        ...

    async def disconnect(self, peer_id: str) -> None: ...

    async def ping(self, peer_id: str) -> float:
        """Round-trip time in seconds."""
        ...

    async def netcheck(self) -> Netcheck:
        """Whether and how others reach this node, asked of peers now. Takes up to a minute; never raises on account of a peer."""
        ...

    async def provide(self, key: bytes) -> None:
        """Announce on the DHT that this node can be asked about `key` (32 bytes)."""

    def withdraw(self, key: bytes) -> None:
        """Announce `key` no more. What others keep of it goes with time."""

    async def find_providers(self, key: bytes, limit: int = 20) -> list[PeerAddress]:
        """Peers that announced `key`, without duplicates and without this node; they may be gone."""
        ...

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip a message of at most GOSSIP_BYTES_MAX; delivery is likely, not certain. Keep below 5 per second and node."""

    def subscribe(self, topic: str) -> Subscription:
        """What other peers publish on a topic while the context is open. Bounded: the oldest are dropped when nobody reads."""
        ...


def check_key(key: bytes) -> None:
    if len(key) != PROVIDER_KEY_BYTES:
        raise ValueError(f"a provider key has {PROVIDER_KEY_BYTES} bytes, not {len(key)}")

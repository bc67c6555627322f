"""Real nodes on loopback, and an attacker that has a node's identity and connection but follows no rules."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio

from nexus.core.keys import Identity
from nexus.network.libp2p import Caps, NetworkOptions, open_libp2p
from nexus.network.libp2p.adapter import Libp2pTransport
from nexus.network.libp2p.yamux import YamuxConnection, YamuxStream
from nexus.network.relaying import RelayLimits
from nexus.network.transport import ProtocolSpec, Stream

DEADLINE_S = 20.0
ECHO = ProtocolSpec("/test/echo/1", frame_max=16 << 20)
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
OpenNode = Callable[..., AbstractAsyncContextManager[Libp2pTransport]]


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


def frame(kind: int, flags: int, stream_id: int, length: int, version: int = 0) -> bytes:
    """A yamux header."""
    return struct.pack("!BBHII", version, kind, flags, stream_id, length)


@dataclass
class Attacker:
    """An authenticated peer of `victim`."""

    node: Libp2pTransport
    victim: Libp2pTransport
    conn: YamuxConnection = field(init=False)

    async def dial(self) -> None:
        await self.node.connect(self.victim.addresses[0])
        self.conn = await self.node._connection(self.victim.peer_id)

    def push(self, raw: bytes) -> None:
        self.conn.channel.push(raw)

    async def stream(self, protocol: str) -> YamuxStream:
        return await self.node._negotiated(self.conn, ProtocolSpec(protocol, frame_max=1))

    async def dropped(self) -> None:
        """Until the victim has closed the connection."""
        with trio.fail_after(DEADLINE_S):
            await self.conn.event_closed.wait()


@asynccontextmanager
async def _open(
    caps: Caps | None = None, bootstrap: tuple[str, ...] = (), dht: str = "server", relay: RelayLimits | None = None
) -> AsyncIterator[Libp2pTransport]:
    options = NetworkOptions(listen=LOOPBACK, bootstrap=bootstrap, mdns=False, dht=dht, caps=caps or Caps(), relay=relay)
    async with open_libp2p(Identity(os.urandom(32)), options) as node:
        node.serve(ECHO, echo)
        yield node


@pytest.fixture
def open_node() -> OpenNode:
    return _open


@pytest.fixture
def attack() -> Callable[..., AbstractAsyncContextManager[Attacker]]:
    """A victim and an attacker that is connected to it. Afterwards the victim must still serve an honest stranger."""

    @asynccontextmanager
    async def attacking(caps: Caps | None = None, relay: RelayLimits | None = None) -> AsyncIterator[Attacker]:
        async with _open(caps, relay=relay) as victim, _open() as node:
            attacker = Attacker(node, victim)
            await attacker.dial()
            yield attacker
            await serves(victim)

    return attacking


async def serves(victim: Libp2pTransport) -> None:
    async with _open() as honest:
        with trio.fail_after(DEADLINE_S):
            await honest.connect(victim.addresses[0])
            stream = await honest.open_stream(victim.peer_id, ECHO)
            await stream.send(b"still there?")
            assert await stream.receive() == b"still there?"
            assert await honest.ping(victim.peer_id) > 0


@pytest.fixture(name="serves")
def _serves() -> object:
    return serves


@pytest.fixture(name="frame")
def _frame() -> object:
    return frame

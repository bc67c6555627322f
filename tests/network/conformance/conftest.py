"""The three networks that every scenario runs on. Both by the wall clock, so that one scenario file serves both."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Protocol

import pytest

from nexus.core.keys import Identity
from nexus.network import fastpath
from nexus.network.fastpath import FastPathOptions, FastPathTransport, FastStream
from nexus.network.simulated import SimulatedNetwork
from nexus.network.transport import Handler, ProtocolSpec, Stream, Transport


class World(Protocol):
    def open(self, identity: Identity | None = None) -> AbstractAsyncContextManager[Transport]: ...


class Simulated:
    def __init__(self) -> None:
        self.network = SimulatedNetwork(7)

    def open(self, identity: Identity | None = None) -> AbstractAsyncContextManager[Transport]:
        return self.network.open(identity or Identity(os.urandom(32)))


class Libp2p:
    def open(self, identity: Identity | None = None) -> AbstractAsyncContextManager[Transport]:
        from nexus.network.libp2p import NetworkOptions, open_libp2p

        return open_libp2p(identity or Identity(os.urandom(32)), NetworkOptions(listen=("/ip4/127.0.0.1/tcp/0",), mdns=False))


class AllBulk(FastPathTransport):
    """Every protocol goes the fast path, and must: there is no falling back unnoticed."""

    def serve(self, protocol: ProtocolSpec, handler: Handler) -> None:
        super().serve(replace(protocol, bulk=True), handler)

    async def open_stream(self, peer_id: str, protocol: ProtocolSpec) -> Stream:
        stream = await super().open_stream(peer_id, replace(protocol, bulk=True))
        assert peer_id == self.peer_id or isinstance(stream, FastStream)
        return stream


class Fast:
    """TLS over TCP, beside libp2p."""

    @asynccontextmanager
    async def open(self, identity: Identity | None = None) -> AsyncIterator[Transport]:
        identity = identity or Identity(os.urandom(32))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fastpath, "FastPathTransport", AllBulk)
            async with (
                Libp2p().open(identity) as below,
                fastpath.open_fastpath(below, identity, FastPathOptions(("127.0.0.1",))) as transport,  # type: ignore[arg-type]
            ):
                yield transport


@pytest.fixture(params=[Simulated, Libp2p, Fast], ids=["simulated", "libp2p", "fast"])
def world(request: pytest.FixtureRequest) -> World:
    return request.param()

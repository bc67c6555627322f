"""The two networks that every scenario runs on. Both by the wall clock, so that one scenario file serves both."""

from __future__ import annotations

import os
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import pytest

from nexus.core.keys import Identity
from nexus.network.simulated import SimulatedNetwork
from nexus.network.transport import Transport


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


@pytest.fixture(params=[Simulated, Libp2p], ids=["simulated", "libp2p"])
def world(request: pytest.FixtureRequest) -> World:
    return request.param()

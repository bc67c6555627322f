"""Finding peers on the local network by mDNS, in threads: the library's own start blocks the event loop for 1.6 s, and its
listener writes to the peer store from a thread of zeroconf's."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
from libp2p.discovery.mdns.broadcaster import PeerBroadcaster
from libp2p.discovery.mdns.listener import PeerListener
from libp2p.peer.peerstore import PeerStore
from zeroconf import ServiceInfo, Zeroconf

from nexus.network.addresses import valid_addresses
from nexus.network.transport import PeerAddress

log = logging.getLogger(__name__)

# Our own service type, so that the IPFS nodes of the house are left alone.
SERVICE_TYPE = "_p2p-nexus._udp.local."
LOOKUP_MS = 3000


class _Listener(PeerListener):
    """Hands what it finds to the event loop, and stores nothing."""

    def __init__(self, zeroconf: Zeroconf, name: str, found: Callable[[PeerAddress], None]) -> None:
        self._found = found
        super().__init__(PeerStore(), zeroconf, SERVICE_TYPE, name, retry_attempts=1)

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        if name == self.service_name or type_ != SERVICE_TYPE:
            return
        info: ServiceInfo | None = zc.get_service_info(type_, name, timeout=LOOKUP_MS)
        peer = self._extract_peer_info(info) if info else None
        if peer is not None:
            self._found(PeerAddress(str(peer.peer_id), valid_addresses([str(addr) for addr in peer.addrs[:16]])))

    update_service = add_service

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        return


class _Discovery:
    """Blocking; lives in worker threads."""

    def __init__(self, peer_id: str, addresses: list[str], found: Callable[[PeerAddress], None]) -> None:
        self._zeroconf = Zeroconf()
        name = f"{secrets.token_hex(16)}.{SERVICE_TYPE}"
        port = int(addresses[0].split("/")[4])
        self._broadcaster = PeerBroadcaster(self._zeroconf, SERVICE_TYPE, name, peer_id, port, addresses)
        self._broadcaster.register()
        self._listener = _Listener(self._zeroconf, name, found)

    def close(self) -> None:
        self._broadcaster.unregister()
        self._listener.stop()
        self._zeroconf.close()


@asynccontextmanager
async def discovering(
    peer_id: str, addresses: list[str], nursery: trio.Nursery, found: Callable[[PeerAddress], None]
) -> AsyncIterator[None]:
    """Announce `addresses` (multiaddrs without /p2p) and call `found`, in the event loop, for every peer that is heard."""
    if not addresses:
        yield
        return
    token = trio.lowlevel.current_trio_token()
    started: list[_Discovery] = []

    def hear(peer: PeerAddress) -> None:
        try:
            token.run_sync_soon(found, peer)
        except trio.RunFinishedError:
            return

    async def start() -> None:
        try:
            started.append(await trio.to_thread.run_sync(_Discovery, peer_id, addresses, hear))
        except OSError as error:
            log.warning("mDNS is off, peers of the local network will not be found by themselves: %s", error)

    nursery.start_soon(start)
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            for discovery in started:
                await trio.to_thread.run_sync(discovery.close)

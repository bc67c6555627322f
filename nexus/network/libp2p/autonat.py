"""AutoNAT (libp2p specs, autonat/autonat-v1.md) and what identify says of where we come from: what peers see of us.

A peer that asks is dialled back at the IP address that its connection comes from and at no other, so that nobody is made to knock
at strangers' doors. What a peer answers about us is believed where we saw it ourselves: its handshake, on a
connection that it opened.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.host.autonat.pb.autonat_pb2 import Message
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.io.exceptions import IOException
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamError
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from nexus.core.errors import MalformedError, NexusError
from nexus.network.addresses import Endpoint, parse_endpoint, valid_addresses
from nexus.network.libp2p.circuit import Negotiate, muxed_of, read_message, write_message
from nexus.network.libp2p.hardening import HardenedHost, HardenedSwarm, dial_failure
from nexus.network.libp2p.yamux import YamuxConnection
from nexus.network.limits import TokenTable
from nexus.network.reachability import DialBack, Observation

log = logging.getLogger(__name__)

AUTONAT = TProtocol("/libp2p/autonat/1.0.0")
IDENTIFY = "/ipfs/id/1.0.0"
IDENTIFY_BYTES_MAX = 64 * 1024
ADDRESSES_PER_REQUEST_MAX = 4
KNOCK_TIMEOUT_S = 5.0
KNOCKS_AT_ONCE = 8
# One answer is an attempt to connect: what peers, and IP addresses, may have of us.
REQUESTS_PER_S = 0.2
REQUESTS_BURST = 16
ASK_TIMEOUT_S = 12.0
DETAIL_CHARS_MAX = 120
PROBE_TIMEOUT_S = 8.0
GREETING_PATIENCE_S = 1.0


class AutoNatService:
    """Dials back those who ask."""

    def __init__(self, host: HardenedHost, swarm: HardenedSwarm) -> None:
        self._swarm = swarm
        self._rates = TokenTable(REQUESTS_PER_S, REQUESTS_BURST)
        self._limiter = trio.CapacityLimiter(KNOCKS_AT_ONCE)
        host.set_stream_handler(AUTONAT, self._answer)

    async def _answer(self, net_stream: INetStream) -> None:
        stream = muxed_of(net_stream)
        request = Message()
        await read_message(stream, request)
        answer = Message(type=Message.DIAL_RESPONSE)
        peer_id, address = stream.conn.peer_id, stream.conn.get_remote_address()
        keys = (str(peer_id), address[0] if address else "")
        if address is None:
            _refuse(answer, "asked through a relay")
        elif request.type != Message.DIAL or request.dial.peer.id not in (b"", peer_id.to_bytes()):
            answer.dialResponse.status = Message.E_BAD_REQUEST
        elif not self._rates.may(keys, trio.current_time()) or self._limiter.available_tokens < 1:
            _refuse(answer, "asked too often")
        elif not (wanted := _own_addresses(request, address[0])):
            _refuse(answer, f"you come from {address[0]}: no other address is dialled")
        else:
            async with self._limiter:
                await self._knock_at(peer_id, wanted, answer)
        await write_message(stream, answer)
        stream.close_write_now()

    async def _knock_at(self, peer_id: ID, wanted: Sequence[Endpoint], answer: Message) -> None:
        reasons = []
        for endpoint in wanted:
            reason = await self._knock(peer_id, endpoint)
            if not reason:
                answer.dialResponse.status = Message.OK
                answer.dialResponse.addr = Multiaddr(str(endpoint)).to_bytes()
                return
            reasons.append(reason)
        answer.dialResponse.status = Message.E_DIAL_ERROR
        answer.dialResponse.statusText = "; ".join(reasons)[:DETAIL_CHARS_MAX]

    async def _knock(self, peer_id: ID, endpoint: Endpoint) -> str:
        """Connect, let the peer prove that it is the one, and hang up. What went wrong, or nothing."""
        try:
            with trio.fail_after(KNOCK_TIMEOUT_S):
                raw = RawConnection(TrioTCPStream(await trio.open_tcp_stream(endpoint.host, endpoint.port)), True)
                try:
                    await (await self._swarm.upgrader.upgrade_security(raw, True, peer_id)).close()
                except BaseException:
                    with trio.CancelScope(shield=True):
                        await raw.close()
                    raise
        except trio.TooSlowError:
            return f"no answer in {KNOCK_TIMEOUT_S:g} s"
        except Exception as error:  # noqa: BLE001 - the boundary: a handshake with a stranger may fail in any way
            return dial_failure(error)
        return ""


def _own_addresses(request: Message, ip: str) -> list[Endpoint]:
    """Those of the addresses asked for that the peer itself comes from."""
    texts = []
    for raw in request.dial.peer.addrs[: 4 * ADDRESSES_PER_REQUEST_MAX]:
        with contextlib.suppress(Exception):  # the boundary: multiaddr raises whatever its codecs raise
            texts.append(str(Multiaddr(raw)))
    endpoints = []
    for text in valid_addresses(texts):
        with contextlib.suppress(MalformedError):  # an address through a relay
            endpoints.append(parse_endpoint(text))
    return [one for one in endpoints if one.kind in ("ip4", "ip6") and same_host(one.host, ip)][:ADDRESSES_PER_REQUEST_MAX]


def same_host(one: str, other: str) -> bool:
    return _host(one) == _host(other)


def _host(text: str) -> object:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return text
    return getattr(address, "ipv4_mapped", None) or address


def _refuse(answer: Message, why: str) -> None:
    answer.dialResponse.status = Message.E_DIAL_REFUSED
    answer.dialResponse.statusText = why


class Mirror:
    """Asks peers what they see of this node."""

    def __init__(self, swarm: HardenedSwarm, negotiate: Negotiate) -> None:
        self._swarm = swarm
        self._negotiate = negotiate

    async def seen_by(self, conn: YamuxConnection) -> Endpoint | None:
        """Where the peer sees this connection come from; None where it does not say."""
        try:
            with trio.fail_after(ASK_TIMEOUT_S):
                stream = await self._negotiate(conn, IDENTIFY)
                try:
                    message = Identify()
                    await read_message(stream, message, IDENTIFY_BYTES_MAX)
                finally:
                    stream.reset_now()
            return parse_endpoint(str(Multiaddr(message.observed_addr)).partition("/p2p/")[0]) if message.observed_addr else None
        except (NexusError, MuxedStreamError, IOException, trio.TooSlowError, DecodeError) as error:
            log.debug("peer %s does not say where it sees this node: %r", conn.peer_id, error)
        except Exception as error:  # noqa: BLE001 - the boundary: multiaddr raises whatever its codecs raise
            log.debug("peer %s sees this node at no address: %r", conn.peer_id, error)
        return None

    async def dial_back(self, conn: YamuxConnection, endpoint: Endpoint) -> DialBack:
        """Ask the peer to dial this node at `endpoint`."""
        peer_id, address = str(conn.peer_id), str(endpoint)
        request = Message(type=Message.DIAL)
        request.dial.peer.id = self._swarm.get_peer_id().to_bytes()
        request.dial.peer.addrs.append(Multiaddr(address).to_bytes())
        began_s = trio.current_time()
        try:
            with trio.fail_after(ASK_TIMEOUT_S):
                stream = await self._negotiate(conn, AUTONAT)
                try:
                    await write_message(stream, request)
                    answer = Message()
                    await read_message(stream, answer, timeout_s=ASK_TIMEOUT_S)
                finally:
                    stream.reset_now()
        except (NexusError, MuxedStreamError, IOException, trio.TooSlowError) as error:
            log.debug("peer %s does not dial back: %r", peer_id, error)
            return DialBack(peer_id, address, "refused", "it did not answer")
        said = answer.dialResponse
        detail = "".join(one for one in said.statusText[:DETAIL_CHARS_MAX] if one.isprintable())
        if said.status == Message.OK:
            # Its last message of the handshake may come after its answer: they take different connections.
            if not await self._swarm.noise.greeted_since(peer_id, began_s, GREETING_PATIENCE_S):
                # It claims what did not happen here.
                return DialBack(peer_id, address, "refused", "it says that it connected, but nothing arrived here")
            return DialBack(peer_id, address, "ok")
        if said.status == Message.E_DIAL_ERROR:
            return DialBack(peer_id, address, "failed", detail)
        return DialBack(peer_id, address, "refused", detail)

    async def mapping(self, targets: Sequence[tuple[str, Endpoint]]) -> list[Observation]:
        """Leave one port for each of the peers, at the endpoints where they listen, and ask each where it sees that come from."""
        found: list[Observation] = []
        async with trio.open_nursery() as nursery:
            port = 0
            for peer_id, endpoint in targets:
                try:
                    conn, local = await nursery.start(self._hold_from, peer_id, endpoint, port)
                except (SwarmException, OSError) as error:
                    log.debug("no second connection to peer %s: %r", peer_id, error)
                    continue
                port = local.port
                seen = await self.seen_by(conn)
                if seen is not None:
                    found.append(Observation(peer_id, endpoint.host, local, seen, reused=True))
            nursery.cancel_scope.cancel()
        return found

    async def _hold_from(self, peer_id: str, endpoint: Endpoint, port: int, *, task_status: Any) -> None:
        async with self.connected_from(peer_id, endpoint, port) as (conn, local):
            task_status.started((conn, local))
            await trio.sleep_forever()

    @asynccontextmanager
    async def connected_from(self, peer_id: str, endpoint: Endpoint, port: int) -> AsyncIterator[tuple[YamuxConnection, Endpoint]]:
        """A connection of its own that leaves the local `port` (0: any), and where it leaves. Raises SwarmException, OSError."""
        with trio.move_on_after(PROBE_TIMEOUT_S) as scope:
            sock = await open_from(endpoint, port)
        if scope.cancelled_caught:
            raise SwarmException(f"no answer in {PROBE_TIMEOUT_S:g} s")
        host, local_port = sock.getsockname()[:2]
        local = Endpoint("ip6" if ":" in host else "ip4", host, local_port)
        conn = await self.upgraded(sock, peer_id)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(conn.start)
            try:
                await conn.event_started.wait()
                yield conn, local
            finally:
                with trio.CancelScope(shield=True), trio.move_on_after(2):
                    await conn.close()
                nursery.cancel_scope.cancel()

    async def upgraded(self, sock: trio.socket.SocketType, peer_id: str) -> YamuxConnection:
        """Secured and muxed, known to nobody else yet. Raises SwarmException."""
        raw = RawConnection(TrioTCPStream(trio.SocketStream(sock)), True)
        expected = ID.from_base58(peer_id)
        done = False
        try:
            with trio.fail_after(PROBE_TIMEOUT_S):
                secured = await self._swarm.upgrader.upgrade_security(raw, True, expected)
                muxed = await self._swarm.upgrader.upgrade_connection(secured, expected)
            assert isinstance(muxed, YamuxConnection)
            done = True
            return muxed
        except trio.TooSlowError as error:
            raise SwarmException(f"no handshake in {PROBE_TIMEOUT_S:g} s") from error
        except Exception as error:  # the boundary: a handshake with a stranger may fail in any way
            raise SwarmException(dial_failure(error)) from error
        finally:
            if not done:
                with trio.CancelScope(shield=True):
                    await raw.close()


async def open_from(endpoint: Endpoint, port: int) -> trio.socket.SocketType:
    """A TCP connection that leaves the local `port`, which others of ours may have left on as well. Raises OSError."""
    family = socket.AF_INET6 if endpoint.kind == "ip6" else socket.AF_INET
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await sock.bind(("", port))
        await sock.connect((endpoint.host, endpoint.port))
    except BaseException:
        sock.close()
        raise
    return sock

"""A node's own conduct: what it refuses to start on, where it says it listens, how it finds and keeps peers, whom it talks to."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest
import trio
from libp2p import create_yamux_muxer_option, new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as noise_key_pair
from libp2p.host.basic_host import BasicHost
from libp2p.io.utils import read_exactly
from libp2p.network.config import ConnectionConfig
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID, Transport
from multiaddr import Multiaddr

from nexus.core.errors import CapacityError, LocalError, UnreachableError, UsageError
from nexus.core.keys import Identity
from nexus.network.libp2p import Caps, NetworkOptions, mdns, open_libp2p
from nexus.network.libp2p.adapter import PROVIDES_BURST, PROVIDES_PER_S
from nexus.network.libp2p.hardening import HardenedPubsub
from nexus.network.transport import PeerAddress, ProtocolSpec, Stream

if TYPE_CHECKING:
    from tests.network.libp2p.conftest import OpenNode

DEADLINE_S = 20.0
ECHO = ProtocolSpec("/test/echo/1", frame_max=16 << 20)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def identity() -> Identity:
    return Identity(os.urandom(32))


def library_host() -> BasicHost:
    """py-libp2p as it ships."""
    key_pair = create_new_key_pair(os.urandom(32))
    noise = {PROTOCOL_ID: Transport(key_pair, noise_privkey=noise_key_pair().private_key)}
    config = ConnectionConfig(min_connections=0, low_watermark=0)
    host = new_host(key_pair=key_pair, muxer_opt=create_yamux_muxer_option(), sec_opt=noise, connection_config=config)
    assert isinstance(host, BasicHost)
    return host


async def test_an_identity_keeps_its_peer_id() -> None:
    me = identity()
    async with open_libp2p(me, NetworkOptions(listen=("/ip4/127.0.0.1/tcp/0",), mdns=False)) as node:
        assert node.peer_id == me.peer_id == str(node._swarm.get_peer_id())


async def test_addresses_name_the_real_port_and_interfaces() -> None:
    async with open_libp2p(identity(), NetworkOptions(listen=("/ip4/0.0.0.0/tcp/0",), mdns=False)) as node:
        assert node.addresses
        for address in node.addresses:
            parts = address.split("/")
            assert parts[2] != "0.0.0.0"
            assert int(parts[4]) > 0
            assert parts[5:] == ["p2p", node.peer_id]
        assert any("/ip4/127.0.0.1/" in address for address in node.addresses)
        assert [str(address) for address in node._host.get_addrs()] == list(node.addresses)


async def test_a_port_in_use_is_a_local_error_with_the_fix() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(LocalError, match=str(port)) as error:
            async with open_libp2p(identity(), NetworkOptions(listen=(f"/ip4/127.0.0.1/tcp/{port}",), mdns=False)):
                pass
    assert "another port" in error.value.fix


async def test_two_nodes_do_not_share_a_port(open_node: OpenNode) -> None:
    """The library listens with SO_REUSEPORT: two daemons would take turns with each other's connections."""
    async with open_node() as first:
        port = first.addresses[0].split("/")[4]
        with pytest.raises(LocalError, match=port):
            async with open_libp2p(identity(), NetworkOptions(listen=(f"/ip4/127.0.0.1/tcp/{port}",), mdns=False)):
                pass


@pytest.mark.parametrize(
    "options",
    [
        NetworkOptions(listen=("/ip4/127.0.0.1/udp/1/quic-v1",), mdns=False),
        NetworkOptions(listen=("/dns4/example/tcp/1",), mdns=False),
        NetworkOptions(listen=("nonsense",), mdns=False),
        NetworkOptions(bootstrap=("/ip4/127.0.0.1/tcp/1",), mdns=False),
        NetworkOptions(dht="both", mdns=False),
    ],
)
async def test_options_that_make_no_sense(options: NetworkOptions) -> None:
    with pytest.raises(UsageError):
        async with open_libp2p(identity(), options):
            pass


async def test_another_version_of_libp2p_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexus.network.libp2p.hardening.version", lambda name: "0.9.0")
    with pytest.raises(LocalError, match=r"0\.9\.0"):
        async with open_libp2p(identity(), NetworkOptions(mdns=False)):
            pass
    assert metadata.version("libp2p") == "0.8.1"


async def test_what_the_body_raises_comes_out_as_it_is() -> None:
    with pytest.raises(CapacityError):
        async with open_libp2p(identity(), NetworkOptions(listen=("/ip4/127.0.0.1/tcp/0",), mdns=False)):
            raise CapacityError("full")


async def test_the_stack_as_shipped_interoperates(open_node: OpenNode) -> None:
    """Our Noise transport phase and yamux against the library's own, in both directions, small and large."""
    host = library_host()

    async def echo_raw(stream: NetStream) -> None:
        with suppress(Exception):
            while True:
                head = await read_exactly(stream, 4)
                await stream.write(head + await read_exactly(stream, int.from_bytes(head, "big")))

    host.set_stream_handler("/test/echo/1", echo_raw)  # type: ignore[arg-type]
    async with open_node() as node, host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        with trio.fail_after(60):
            await node.connect(str(host.get_addrs()[0]))
            ours = await node.open_stream(str(host.get_id()), ECHO)
            for size in (1, 1000, 65_536, 1_000_000):
                frame = os.urandom(size)
                await ours.send(frame)
                assert await ours.receive() == frame
            assert await node.ping(str(host.get_id())) > 0
            await node.disconnect(str(host.get_id()))

            await host.connect(info_from_p2p_addr(Multiaddr(node.addresses[0])))
            theirs = await host.new_stream(node._swarm.get_peer_id(), ["/test/echo/1"])  # type: ignore[list-item]
            for size in (1, 1000, 65_536, 1_000_000):
                frame = len(payload := os.urandom(size)).to_bytes(4, "big") + payload
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(theirs.write, frame)
                    assert await read_exactly(theirs, len(frame), retry_count=10_000) == frame
            await theirs.close()


async def test_dials_hold_no_grudge(open_node: OpenNode) -> None:
    """Trap 7: after one failed dial the library refused the peer for 60 s."""
    me, port = identity(), free_port()
    address = f"/ip4/127.0.0.1/tcp/{port}"
    async with open_node() as node:
        with pytest.raises(UnreachableError, match=str(port)):
            await node.connect(f"{address}/p2p/{me.peer_id}")
        async with open_libp2p(me, NetworkOptions(listen=(address,), mdns=False)):
            assert await node.connect(f"{address}/p2p/{me.peer_id}") == me.peer_id


async def test_no_dial_waits_for_a_head_start(open_node: OpenNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library waits a fixed 250 ms before every dial that it makes itself."""
    monkeypatch.setattr("libp2p.network.swarm._HAPPY_EYEBALLS_DELAY", 3600.0)
    async with open_node() as one, open_node() as other:
        one.learn(PeerAddress(other.peer_id, (other.addresses[0].partition("/p2p/")[0],)))
        with trio.fail_after(DEADLINE_S):
            await one._swarm.dial_peer(other._swarm.get_peer_id())


async def test_dials_to_one_peer_do_not_run_side_by_side(open_node: OpenNode) -> None:
    async with open_node() as one, open_node() as other:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one.connect, other.addresses[0])
        assert len(one.connections()) == 1


async def test_a_dial_without_answer_ends(open_node: OpenNode, mock_clock: trio.testing.MockClock) -> None:
    mock_clock.rate = 30
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        port = frozen.getsockname()[1]
        async with open_node() as node:
            with pytest.raises(UnreachableError, match="no answer in 10 s"):
                await node.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{identity().peer_id}")


async def test_bootstrap_peers_are_dialled_until_they_answer_and_again_when_lost(open_node: OpenNode) -> None:
    me, port = identity(), free_port()
    address = f"/ip4/127.0.0.1/tcp/{port}"
    options = NetworkOptions(listen=(address,), mdns=False)
    async with open_node(bootstrap=(f"{address}/p2p/{me.peer_id}",)) as node:
        for _ in range(2):
            async with open_libp2p(me, options) as peer:
                with trio.fail_after(DEADLINE_S):
                    while not node.connections() or not peer.connections():  # noqa: ASYNC110
                        await trio.sleep(0.02)
            with trio.fail_after(DEADLINE_S):
                while node.connections():  # noqa: ASYNC110
                    await trio.sleep(0.02)


async def test_the_routing_table_fills_on_connecting(open_node: OpenNode) -> None:
    """Trap 11: the library left it empty, and joined the public DHT."""
    async with open_node() as hub, open_node() as one, open_node() as other:
        await one.connect(hub.addresses[0])
        await other.connect(hub.addresses[0])
        with trio.fail_after(DEADLINE_S):
            while not all(node._dht.routing_table.size() for node in (hub, one, other)):  # noqa: ASYNC110
                await trio.sleep(0.02)
        protocols = {str(protocol) for protocol in hub._host.multiselect.handlers}
        assert "/nexus/kad/1.0.0" in protocols
        assert not any(protocol.startswith("/ipfs/kad") for protocol in protocols)


async def test_a_dht_client_asks_and_does_not_answer(open_node: OpenNode) -> None:
    key = os.urandom(32)
    async with open_node() as server, open_node(dht="client") as client:
        await client.connect(server.addresses[0])
        with trio.fail_after(DEADLINE_S):
            await server.provide(key)
            assert [peer.peer_id for peer in await client.find_providers(key)] == [server.peer_id]
        assert "/nexus/kad/1.0.0" not in {str(protocol) for protocol in client._host.multiselect.handlers}


async def test_frozen_peers_do_not_hold_up_a_lookup(open_node: OpenNode, mock_clock: trio.testing.MockClock) -> None:
    """The library asks each for 10 s, so two of them cost 20."""
    key = os.urandom(32)
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        address = Multiaddr(f"/ip4/127.0.0.1/tcp/{frozen.getsockname()[1]}")
        async with open_node() as one, open_node() as other:
            await one.connect(other.addresses[0])
            await other.provide(key)
            for _ in range(5):
                stranger = info_from_p2p_addr(Multiaddr(f"{address}/p2p/{identity().peer_id}"))
                one._swarm.peerstore.add_addrs(stranger.peer_id, [address], 3600)
            mock_clock.rate = 4
            begin_s = trio.current_time()
            found = await one.find_providers(key)
            assert trio.current_time() - begin_s < 15
            assert [peer.peer_id for peer in found] == [other.peer_id]


async def test_what_a_lookup_heard_is_not_kept_as_truth(open_node: OpenNode) -> None:
    """Trap 9: the library answered from its cache ever after, with peers that were gone, some of them twice."""
    key = os.urandom(32)
    async with open_node() as hub, open_node(dht="client") as asker:
        await asker.connect(hub.addresses[0])
        async with open_node() as provider:
            await provider.connect(hub.addresses[0])
            with trio.fail_after(DEADLINE_S):
                await provider.provide(key)
                for _ in range(2):
                    assert [peer.peer_id for peer in await asker.find_providers(key)] == [provider.peer_id]
        assert asker._dht.provider_store.get_providers(key) == []


async def test_announcements_are_confirmed_and_paced(open_node: OpenNode) -> None:
    """Trap 8: a peer takes 10 in 10 s and drops the rest, and `provide()` said True all the same."""
    keys = [os.urandom(32) for _ in range(PROVIDES_BURST + 1)]
    async with open_node() as one, open_node() as other:
        await one.connect(other.addresses[0])
        begin_s = trio.current_time()
        with trio.fail_after(DEADLINE_S):
            for key in keys:
                await one.provide(key)
                assert other._dht.provider_store.get_providers(key)
        assert trio.current_time() - begin_s >= 0.5 / PROVIDES_PER_S  # the last one had to wait
    assert PROVIDES_BURST + 10 * PROVIDES_PER_S < 10  # in any 10 s


async def test_a_node_that_announced_alone_tells_peers_that_come_later(
    open_node: OpenNode, mock_clock: trio.testing.MockClock
) -> None:
    key = os.urandom(32)
    async with open_node() as hub, open_node() as provider:
        await provider.provide(key)
        await provider.connect(hub.addresses[0])
        assert hub._dht.provider_store.get_providers(key) == []
        mock_clock.rate = 4
        with trio.fail_after(60):
            while not hub._dht.provider_store.get_providers(key):  # noqa: ASYNC110
                await trio.sleep(0.05)


async def test_gossip_is_set_up_to_converge_in_seconds(open_node: OpenNode) -> None:
    """Trap 12: a heartbeat of 120 s and score thresholds of minus infinity."""
    async with open_node() as node:
        assert node._gossip.heartbeat_interval == 1
        assert node._gossip.scorer is not None
        assert -1000 < node._gossip.scorer.params.graylist_threshold < 0
        assert isinstance(node._pubsub, HardenedPubsub)
        assert node._pubsub.strict_signing


async def test_gossip_crosses_a_line_of_nodes(open_node: OpenNode) -> None:
    async with (
        open_node() as a,
        open_node() as b,
        open_node() as c,
        open_node() as d,
        a.subscribe("t"),
        b.subscribe("t"),
        c.subscribe("t"),
        d.subscribe("t") as at_d,
    ):
        for one, other in ((a, b), (b, c), (c, d)):
            await one.connect(other.addresses[0])
        with trio.fail_after(DEADLINE_S):
            while True:
                await a.publish("t", b"along the line")
                with trio.move_on_after(0.3):
                    message = await at_d.receive()
                    break
        assert (message.peer_id, message.data) == (a.peer_id, b"along the line")


async def test_known_peers_are_not_dialled_for_company(open_node: OpenNode, mock_clock: trio.testing.MockClock) -> None:
    """Trap 14: below a watermark the library dials whatever it has heard of."""
    async with open_node() as one, open_node() as other:
        one._swarm.peerstore.add_addrs(other._swarm.get_peer_id(), [Multiaddr(other.addresses[0].partition("/p2p/")[0])], 3600)
        mock_clock.rate = 300
        await trio.sleep(120)
        assert one.connections() == []


async def test_streams_of_one_connection_are_capped_with_a_clear_error(open_node: OpenNode) -> None:
    async with open_node(caps=Caps(streams_per_connection=12)) as one, open_node() as other:
        other.serve(spec := ProtocolSpec("/test/hold/1", frame_max=1, streams_per_peer_max=100, read_timeout_s=None), hold)
        await one.connect(other.addresses[0])

        async def open_many() -> None:
            for _ in range(20):
                await one.open_stream(other.peer_id, spec)

        with trio.fail_after(DEADLINE_S), pytest.raises(CapacityError, match="Close streams"):
            await open_many()


async def hold(stream: Stream) -> None:
    await stream.receive()


async def test_mdns_finds_peers_and_does_not_block_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's start blocks the event loop for 1.6 s."""
    threads: list[int] = []
    start = mdns._Discovery.__init__

    def recording(self: mdns._Discovery, *arguments: Any) -> None:
        threads.append(threading.get_ident())
        start(self, *arguments)

    monkeypatch.setattr(mdns._Discovery, "__init__", recording)
    options = NetworkOptions(listen=("/ip4/0.0.0.0/tcp/0",))
    async with open_libp2p(identity(), options) as one, open_libp2p(identity(), options) as other:
        with trio.move_on_after(10) as scope:
            while not (one.connections() and other.connections()):  # noqa: ASYNC110
                await trio.sleep(0.05)
        assert threads
        assert threading.get_ident() not in threads
    if scope.cancelled_caught:
        pytest.skip("this machine carries no multicast")

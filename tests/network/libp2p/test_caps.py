"""Caps that the library lacks: what one peer costs and how often it may ask, what DHT and gossip keep, ways that became one-way."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from libp2p.io.exceptions import IOException
from libp2p.kad_dht.pb.kademlia_pb2 import Message as KadMessage
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.pubsub.pb import rpc_pb2
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.utils.varint import encode_varint_prefixed
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from nexus.core.errors import NexusError
from nexus.core.keys import Identity
from nexus.network.libp2p import Caps, hardening
from nexus.network.libp2p.hardening import KAD_PROTOCOL, HardenedProviders
from nexus.network.libp2p.yamux import DATA, DEAD_AFTER_S, REFUSED_STREAMS_BURST, SYN, WINDOW_UPDATE
from nexus.network.transport import ProtocolSpec, Stream

if TYPE_CHECKING:
    from tests.network.libp2p.conftest import Attacker, OpenNode

Attack = Callable[..., AbstractAsyncContextManager["Attacker"]]
Frame = Callable[..., bytes]
DEADLINE_S = 20.0
MEGABYTE = 1 << 20

VICTIM = """
import os, trio
from nexus.core.keys import Identity
from nexus.network.libp2p import NetworkOptions, open_libp2p
from nexus.network.transport import ProtocolSpec

async def never_read(stream):
    await trio.sleep_forever()

async def read(stream):
    while True:
        await stream.receive()

async def main():
    options = NetworkOptions(listen=("/ip4/127.0.0.1/tcp/0",), mdns=False)
    async with open_libp2p(Identity(os.urandom(32)), options) as node:
        node.serve(ProtocolSpec("/test/silent/1", frame_max=48 << 20, streams_per_peer_max=1000), never_read)
        node.serve(ProtocolSpec("/test/large/1", frame_max=48 << 20, streams_per_peer_max=1000, read_timeout_s=None), read)
        print(node.addresses[0], flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


def peak_bytes(pid: int) -> int:
    """The most memory that a process has held (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc (Linux)")
@pytest.mark.parametrize("way", ["thousands of streams", "streams that nobody reads", "frames that are never whole"])
async def test_one_hostile_peer_costs_at_most_64_mb(open_node: OpenNode, frame: Frame, way: str) -> None:
    with subprocess.Popen([sys.executable, "-c", VICTIM], stdout=subprocess.PIPE, text=True) as victim:  # noqa: ASYNC220
        try:
            assert victim.stdout is not None
            address = await trio.to_thread.run_sync(victim.stdout.readline)
            peer_id = address.strip().rpartition("/p2p/")[2]
            async with open_node() as attacker:
                await attacker.connect(address)
                await attacker.ping(peer_id)
                before = peak_bytes(victim.pid)
                conn = await attacker._connection(peer_id)
                await _attack(attacker, conn, frame, way)
                cost = peak_bytes(victim.pid) - before
                assert cost <= 64 * MEGABYTE, f"{cost / MEGABYTE:.0f} MiB"
                if way != "streams that nobody reads":  # those stay within their windows: no rule is broken
                    with trio.fail_after(DEADLINE_S):
                        await conn.event_closed.wait()
        finally:
            victim.kill()


async def _attack(attacker: object, conn: object, frame: Frame, way: str) -> None:
    if way == "thousands of streams":
        with suppress(IOException):
            for number in range(20_000):
                conn.channel.push(
                    frame(WINDOW_UPDATE, SYN, 100_001 + 2 * number, 0) + frame(DATA, 0, 100_001 + 2 * number, 64) + bytes(64)
                )  # type: ignore[attr-defined]
                if number % 100 == 0:
                    await conn.channel.drained()  # type: ignore[attr-defined]
                    await trio.lowlevel.checkpoint()
        return
    whole = way.startswith("streams")
    protocol = ProtocolSpec("/test/silent/1" if whole else "/test/large/1", frame_max=48 << 20)

    async def fill() -> None:
        with suppress(NexusError, MuxedStreamError, IOException):
            muxed = await attacker._negotiated(conn, protocol)  # type: ignore[attr-defined]
            await muxed.write((48 << 20).to_bytes(4, "big"))
            for _ in range(1 if whole else 47):
                await muxed.write(os.urandom(MEGABYTE))

    with trio.move_on_after(8):
        async with trio.open_nursery() as nursery:
            for _ in range(100 if whole else 4):
                nursery.start_soon(fill)


async def test_what_one_peer_makes_this_node_buffer_is_bounded_over_its_connections(attack: Attack) -> None:
    silent = ProtocolSpec("/test/silent/1", frame_max=64 << 20)

    async def never_read(stream: Stream) -> None:
        await trio.sleep_forever()

    async def fill(stream: object) -> None:
        with suppress(MuxedStreamError):
            await stream.write(bytes(200_000))  # type: ignore[attr-defined]

    async with attack(Caps(buffered_bytes_per_peer=MEGABYTE)) as attacker:
        attacker.victim.serve(silent, never_read)
        second = await attacker.node._swarm.dial_endpoint(
            ID.from_base58(attacker.victim.peer_id), str(attacker.victim._listening()[0])
        )
        conns = [attacker.conn, second.muxed_conn]
        streams = [await attacker.node._negotiated(conn, silent) for conn in conns for _ in range(4)]  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            for stream in streams:  # on neither connection more than one may
                nursery.start_soon(fill, stream)
            with trio.fail_after(DEADLINE_S):
                for conn in conns:
                    await conn.event_closed.wait()  # type: ignore[union-attr]
        assert attacker.victim._budget.peers == {}
        assert attacker.victim._budget.used == 0


async def test_a_peer_that_goes_on_opening_streams_over_the_cap_is_dropped(attack: Attack, frame: Frame) -> None:
    async with attack(Caps(streams_per_connection=20)) as attacker:
        with suppress(IOException):
            for number in range(REFUSED_STREAMS_BURST + 400):
                attacker.push(frame(WINDOW_UPDATE, SYN, 1001 + 2 * number, 0))
                await trio.lowlevel.checkpoint()
        await attacker.dropped()


async def test_a_peer_has_a_handful_of_connections(attack: Attack) -> None:
    async with attack() as attacker:
        victim = ID.from_base58(attacker.victim.peer_id)
        for _ in range(12):
            with suppress(Exception):  # whatever a refused dial raises
                await attacker.node._swarm.dial_endpoint(victim, str(attacker.victim._listening()[0]))
        own = ID.from_base58(attacker.node.peer_id)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(attacker.victim._live(own)) <= hardening.CONNECTIONS_PER_PEER_MAX


async def test_requests_to_the_dht_are_slowed_down(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stream carries any number of messages; a rate of streams would not do."""
    monkeypatch.setitem(hardening.READS_PER_S, KAD_PROTOCOL, 20.0)
    monkeypatch.setattr(hardening, "READS_BURST", 1.0)
    request = encode_varint_prefixed(KadMessage(type=KadMessage.GET_PROVIDERS, key=os.urandom(32)).SerializeToString())
    async with attack() as attacker:
        answered = 0
        stream = await attacker.stream(KAD_PROTOCOL)
        with suppress(MuxedStreamError, IOException), trio.move_on_after(2):
            await stream.write(request * 1000)
            while await stream.read(65536):
                answered += 1
        assert 0 < answered <= 40


class Host:
    """What a provider store asks of its host."""

    def get_network(self) -> Host:
        return self

    def get_id(self) -> ID:
        return provider(0).peer_id

    def get_connections(self, peer_id: ID) -> list[object]:
        return []


def provider(number: int) -> PeerInfo:
    return PeerInfo(ID.from_base58(Identity(number.to_bytes(32, "big")).peer_id), [Multiaddr("/ip4/1.2.3.4/tcp/1")])


def test_provider_records_are_bounded_per_key_per_peer_and_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening, "PROVIDED_PER_PEER_MAX", 5)
    monkeypatch.setattr(hardening, "PROVIDED_KEYS_MAX", 12)
    store = HardenedProviders(Host())  # type: ignore[arg-type]
    for number in range(30):
        store.add_provider(b"one key", provider(number))
    assert len(store.get_providers(b"one key")) == 20
    for number in range(9):
        store.add_provider(b"key %d" % number, provider(1))
    assert sum(str(provider(1).peer_id) in records for records in store.providers.values()) == 5
    assert [bool(store.get_providers(b"key %d" % number)) for number in range(9)] == [False] * 4 + [True] * 5
    for number in range(100, 120):
        store.add_provider(b"many %d" % number, provider(number))
    assert len(store.providers) == 12


def test_one_machine_does_not_fill_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HardenedProviders(Host())  # type: ignore[arg-type]
    places = {str(provider(number).peer_id): "198.51.100.7" if number < 20 else f"198.51.100.{number}" for number in range(40)}
    monkeypatch.setattr(store, "_host_of", lambda peer_id: places[str(peer_id)])
    for number in range(25):
        store.add_provider(b"k", provider(number))
    kept = {str(info.peer_id) for info in store.get_providers(b"k")}
    assert len([one for one in kept if places[one] == "198.51.100.7"]) == hardening.PROVIDERS_PER_IP_MAX
    assert {str(provider(number).peer_id) for number in range(20, 25)} <= kept


def test_provider_records_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    store = HardenedProviders(Host())  # type: ignore[arg-type]
    store.add_provider(b"k", provider(1))
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + hardening.PROVIDER_RECORD_S + 1)
    hardening.set_constants()
    assert store.get_providers(b"k") == []
    store.add_provider(b"k", provider(2))
    assert len(store.providers[b"k"]) == 1


async def test_a_publisher_that_floods_is_not_passed_on(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening, "GOSSIP_PUBLISHED_PER_S", 5.0)
    monkeypatch.setattr(hardening, "GOSSIP_BURST", 2.0)
    async with attack() as attacker, attacker.victim.subscribe("t") as channel, attacker.node.subscribe("t"):
        with trio.fail_after(DEADLINE_S):
            while attacker.victim._pubsub.peer_topics.get("t") is None:  # noqa: ASYNC110
                await trio.sleep(0.02)
        for number in range(100):
            await attacker.node.publish("t", b"%d" % number)
        heard = 0
        with trio.move_on_after(2):
            while True:
                await channel.receive()
                heard += 1
        assert 0 < heard <= 25


async def test_topics_have_names_of_some_length_only(attack: Attack) -> None:
    async with attack() as attacker:
        rpc = rpc_pb2.RPC()
        rpc.subscriptions.append(rpc_pb2.RPC.SubOpts(subscribe=True, topicid="x" * 50_000))
        rpc.subscriptions.append(rpc_pb2.RPC.SubOpts(subscribe=True, topicid="fine"))
        stream = await attacker.stream("/meshsub/1.1.0")
        await stream.write(encode_varint_prefixed(rpc.SerializeToString()))
        with trio.fail_after(DEADLINE_S):
            while "fine" not in attacker.victim._pubsub.peer_topics:  # noqa: ASYNC110
                await trio.sleep(0.02)
        assert all(len(topic) < 300 for topic in attacker.victim._pubsub.peer_topics)


async def test_a_way_that_became_one_way_is_noticed_at_both_ends(
    open_node: OpenNode, mock_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """What the dialler sends arrives; nothing comes back."""
    mock_clock.rate = 1
    swallow = False

    async def pump(source: trio.SocketStream, sink: trio.SocketStream, back: bool) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await source.receive_some(65536):
                if not (back and swallow):
                    await sink.send_all(data)

    async def relay(client: trio.SocketStream) -> None:
        server = await trio.open_tcp_stream("127.0.0.1", port)
        async with trio.open_nursery() as pumps:
            pumps.start_soon(pump, client, server, False)
            pumps.start_soon(pump, server, client, True)

    async with open_node() as there, open_node() as here:
        port = there._listening()[0].port
        listeners = await nursery.start(trio.serve_tcp, relay, 0)
        between = listeners[0].socket.getsockname()[1]
        await here.connect(f"/ip4/127.0.0.1/tcp/{between}/p2p/{there.peer_id}")
        await here.ping(there.peer_id)
        (conn,) = [one.muxed_conn for one in here._live(ID.from_base58(there.peer_id))]
        swallow = True
        began_s = trio.current_time()
        mock_clock.rate = 30
        with trio.fail_after(3 * DEAD_AFTER_S):
            await conn.event_closed.wait()
            assert trio.current_time() - began_s <= DEAD_AFTER_S + 20
            while there._live(ID.from_base58(here.peer_id)):  # noqa: ASYNC110
                await trio.sleep(1)
        mock_clock.rate = 1
        nursery.cancel_scope.cancel()

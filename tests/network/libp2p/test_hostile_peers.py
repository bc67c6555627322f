"""One authenticated stranger does its worst; the node stays up and serves others. Every trap found in py-libp2p is here."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio
from libp2p.io.exceptions import IOException
from libp2p.pubsub.pb import rpc_pb2
from libp2p.stream_muxer.exceptions import MuxedStreamError

from nexus.core.errors import NexusError, UnreachableError
from nexus.network.libp2p import Caps
from nexus.network.libp2p.yamux import DATA, FIN, PING, RST, SYN, WINDOW_BYTES, WINDOW_UPDATE
from nexus.network.transport import ProtocolSpec, Stream

if TYPE_CHECKING:
    from tests.network.libp2p.conftest import Attacker, OpenNode

Attack = Callable[..., AbstractAsyncContextManager["Attacker"]]
Frame = Callable[..., bytes]
DEADLINE_S = 20.0


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def framed(body: bytes) -> bytes:
    return varint(len(body)) + body


def gossip(**fields: Any) -> bytes:
    rpc = rpc_pb2.RPC()
    rpc.publish.append(rpc_pb2.Message(**fields))
    return framed(rpc.SerializeToString())


def control(**fields: Any) -> bytes:
    rpc = rpc_pb2.RPC()
    for name, value in fields.items():
        getattr(rpc.control, name).append(value)
    return framed(rpc.SerializeToString())


def subscription_flood(count: int) -> bytes:
    rpc = rpc_pb2.RPC()
    for number in range(count):
        rpc.subscriptions.append(rpc_pb2.RPC.SubOpts(subscribe=True, topicid=f"t{number}"))
    return framed(rpc.SerializeToString())


GARBAGE = [
    framed(os.urandom(40)),
    os.urandom(500),
    b"\xff" * 9 + b"\x7f",
    varint(2**31) + b"x",
    varint(100) + b"abc",
    varint(0),
    framed(b"\x0a\xff\xff\xff\xff\x0f"),
    b"\xff\xff\xff\xff",
]
SIGNED = {"data": b"d", "seqno": b"1" * 8, "topicIDs": ["t"]}
GOSSIP_GARBAGE = [
    gossip(from_id=b"\x00\x01abc", signature=b"x", key=b"\xff\xff\xff", **SIGNED),
    gossip(from_id=b"", signature=b"x", key=b"", **SIGNED),
    gossip(from_id=os.urandom(38), signature=os.urandom(64), key=b"\x08\x01\x12\x20" + os.urandom(32), **SIGNED),
    gossip(from_id=os.urandom(38), signature=os.urandom(64), key=b"\x08\x01\x12\x02ab", **SIGNED),
    gossip(from_id=os.urandom(38), signature=os.urandom(64), key=b"\x08\x63\x12\x02ab", **SIGNED),
    gossip(from_id=os.urandom(38), data=bytes(60_000), seqno=b"12345678", topicIDs=["t"]),
    gossip(from_id=os.urandom(38), data=b"", seqno=b"", topicIDs=["t"] * 50),
    control(graft=rpc_pb2.ControlGraft(topicID="nope")),
    control(prune=rpc_pb2.ControlPrune(topicID="t", backoff=2**62)),
    control(ihave=rpc_pb2.ControlIHave(topicID="t", messageIDs=[b"zz"] * 1000)),
    control(iwant=rpc_pb2.ControlIWant(messageIDs=[b"\x00bad"])),
    subscription_flood(5000),
    framed(bytes(200_000)),
]


@pytest.mark.parametrize(
    "protocol",
    [
        "/nexus/kad/1.0.0",
        "/meshsub/1.1.0",
        "/meshsub/1.2.0",
        "/ipfs/id/1.0.0",
        "/p2p/id/push/1.0.0",
        "/ipfs/id/push/1.0.0",
        "/ipfs/ping/1.0.0",
        "/test/echo/1",
    ],
)
async def test_garbage_on_every_protocol(attack: Attack, protocol: str) -> None:
    """Trap 1: an exception in a handler, or from a gossip frame, ended the process."""
    async with attack() as attacker, attacker.victim.subscribe("t"):
        for data in GARBAGE + (GOSSIP_GARBAGE if "meshsub" in protocol else []):
            with suppress(NexusError, MuxedStreamError, IOException), trio.move_on_after(2):
                stream = await attacker.stream(protocol)
                await stream.write(data)
                await stream.close()
                while await stream.read(65536):
                    pass


async def test_a_gossip_message_that_nobody_signed_is_not_delivered(attack: Attack) -> None:
    async with attack() as attacker, attacker.victim.subscribe("t") as channel:
        stream = await attacker.stream("/meshsub/1.1.0")
        for data in GOSSIP_GARBAGE[:7]:
            await stream.write(data)
        async with attacker.node.subscribe("t"):
            with trio.fail_after(DEADLINE_S):
                while True:
                    await attacker.node.publish("t", b"a real one")
                    with trio.move_on_after(0.3):
                        message = await channel.receive()
                        break
        assert (message.peer_id, message.data) == (attacker.node.peer_id, b"a real one")


async def test_a_peer_that_ignores_the_window_is_dropped(attack: Attack, frame: Frame) -> None:
    """Trap 3: only logged, 300 MB were buffered through one stream."""
    silent = ProtocolSpec("/test/silent/1", frame_max=64 << 20)

    async def never_read(stream: Stream) -> None:
        await trio.sleep_forever()

    async with attack() as attacker:
        attacker.victim.serve(silent, never_read)
        stream = await attacker.stream(silent.id)
        piece = bytes(60_000)
        with suppress(IOException):
            for _ in range(3 * WINDOW_BYTES // len(piece)):
                attacker.push(frame(DATA, 0, stream.stream_id, len(piece)) + piece)
                await trio.lowlevel.checkpoint()
        await attacker.dropped()
        assert attacker.victim._budget.used == 0


async def test_what_all_peers_together_may_buffer_is_bounded(attack: Attack) -> None:
    silent = ProtocolSpec("/test/silent/1", frame_max=64 << 20)

    async def never_read(stream: Stream) -> None:
        await trio.sleep_forever()

    async with attack(Caps(buffered_bytes=1 << 20)) as attacker:
        attacker.victim.serve(silent, never_read)
        async with trio.open_nursery() as nursery:
            for stream in [await attacker.stream(silent.id) for _ in range(6)]:
                nursery.start_soon(_write_until_broken, stream, bytes(WINDOW_BYTES))
            await attacker.dropped()
        assert attacker.victim._budget.used == 0


async def test_frames_that_are_never_whole_count_as_buffered(attack: Attack) -> None:
    """A reader takes the bytes out of the stream to put the frame together: one peer could leave 64 MiB on each of its streams."""
    large = ProtocolSpec("/test/large/1", frame_max=64 << 20, read_timeout_s=None)

    async def read(stream: Stream) -> None:
        await stream.receive()

    async with attack(Caps(buffered_bytes=4 << 20)) as attacker:
        attacker.victim.serve(large, read)
        async with trio.open_nursery() as nursery:
            for stream in [await attacker.stream(large.id) for _ in range(6)]:
                nursery.start_soon(_write_until_broken, stream, struct.pack("!I", 64 << 20) + bytes(1 << 20))
            await attacker.dropped()
        assert attacker.victim._budget.used == 0


async def test_frames_that_are_whole_or_given_up_count_no_more(attack: Attack) -> None:
    large = ProtocolSpec("/test/large/1", frame_max=8 << 20, read_timeout_s=None)
    left = trio.Event()

    async def read(stream: Stream) -> None:
        try:
            while True:
                await stream.send(len(await stream.receive()).to_bytes(4, "big"))
        finally:
            left.set()

    async with attack() as attacker:
        attacker.victim.serve(large, read)
        stream = await attacker.node.open_stream(attacker.victim.peer_id, large)
        with trio.fail_after(DEADLINE_S):
            for size in (3_000_000, 1, 5_000_000):
                await stream.send(bytes(size))
                assert int.from_bytes(await stream.receive(), "big") == size
                assert attacker.victim._budget.used < 100_000  # the library talks as well
            await stream._muxed.write(struct.pack("!I", 8 << 20) + bytes(1 << 20))  # type: ignore[attr-defined]
            await stream.close()
            await left.wait()
            await trio.testing.wait_all_tasks_blocked()
        assert attacker.victim._budget.used < 100_000


async def _write_until_broken(stream: Any, data: bytes) -> None:
    with suppress(MuxedStreamError):
        await stream.write(data)


async def test_a_flood_of_streams_stops_at_the_cap(attack: Attack, frame: Frame) -> None:
    """Trap 3: one peer opened 20,000 streams."""
    async with attack(Caps(streams_per_connection=50)) as attacker:
        with suppress(IOException):
            for number in range(5000):
                attacker.push(frame(WINDOW_UPDATE, SYN, 1001 + 2 * number, 0))
                if number % 100 == 0:
                    await trio.lowlevel.checkpoint()
        with suppress(NexusError), trio.move_on_after(5):
            await attacker.node.ping(attacker.victim.peer_id)  # by now the victim has seen them all
        (seen,) = [conn.muxed_conn for conn in attacker.victim._live()] or [None]
        assert seen is None or len(seen.streams) <= 60


@pytest.mark.parametrize("kind", ["pings", "empty data", "window updates"])
async def test_a_flood_of_control_frames_ends_the_connection(attack: Attack, frame: Frame, kind: str) -> None:
    flood = {
        "pings": frame(PING, SYN, 0, 7),
        "empty data": frame(DATA, 0, 1, 0),
        "window updates": frame(WINDOW_UPDATE, 0, 1, 1),
    }[kind]
    async with attack() as attacker:
        with suppress(IOException):
            for _ in range(60):
                attacker.push(flood * 1000)
                await attacker.conn.channel.drained()
                await trio.lowlevel.checkpoint()
        await attacker.dropped()


@pytest.mark.parametrize("flood", ["one stream that is over", "streams that never were"])
async def test_bytes_for_no_stream_are_bounded(attack: Attack, frame: Frame, flood: str) -> None:
    async with attack() as attacker:
        piece = bytes(60_000)
        with suppress(IOException):
            for number in range(600):
                stream_id = 1 if flood.startswith("one") else 9001 + 2 * number
                attacker.push(frame(DATA, 0, stream_id, len(piece)) + piece)
                await attacker.conn.channel.drained()
                await trio.lowlevel.checkpoint()
        await attacker.dropped()


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(lambda f: f(DATA, 0, 1, 0, version=7), id="version"),
        pytest.param(lambda f: f(9, 0, 1, 0), id="type"),
        pytest.param(lambda f: f(WINDOW_UPDATE, SYN, 2, 0), id="a stream of the victim's numbers"),
        pytest.param(lambda f: f(WINDOW_UPDATE, SYN, 0, 0), id="stream 0"),
        pytest.param(lambda f: f(WINDOW_UPDATE, SYN, 901, 0) * 2, id="the same stream twice"),
        pytest.param(lambda f: f(WINDOW_UPDATE, SYN, 901, 0) + f(WINDOW_UPDATE, 0, 901, 2**32 - 1) * 3, id="absurd window"),
        pytest.param(lambda f: f(DATA, SYN, 901, 2**32 - 1) + bytes(WINDOW_BYTES - 100) * 1, id="4 GB frame"),
        pytest.param(lambda f: os.urandom(60_000), id="random"),
    ],
)
async def test_broken_yamux_ends_the_connection(attack: Attack, frame: Frame, raw: Callable[[Frame], bytes]) -> None:
    async with attack() as attacker:
        data = raw(frame)
        with suppress(IOException):
            for _ in range(40):
                for at in range(0, len(data), 60_000):
                    attacker.push(data[at : at + 60_000])
                await trio.lowlevel.checkpoint()
        await attacker.dropped()


async def test_streams_that_are_reset_at_once_leave_nothing_behind(attack: Attack, frame: Frame) -> None:
    async with attack() as attacker:
        for number in range(2000):
            attacker.push(frame(WINDOW_UPDATE, SYN, 1001 + 2 * number, 0) + frame(WINDOW_UPDATE, RST, 1001 + 2 * number, 0))
        for number in range(2000, 2200):
            attacker.push(frame(DATA, SYN | FIN, 1001 + 2 * number, 3) + b"abc")
            await trio.lowlevel.checkpoint()
        with trio.fail_after(DEADLINE_S):
            while any(len(conn.muxed_conn.streams) > 20 for conn in attacker.victim._live()):  # noqa: ASYNC110
                await trio.sleep(0.05)


async def test_idle_dht_streams_do_not_disable_the_dht(attack: Attack, open_node: OpenNode) -> None:
    """Trap 4: 12 of them did, for as long as they stayed open."""
    key = os.urandom(32)
    async with attack() as attacker, open_node() as honest:
        for _ in range(30):
            with suppress(NexusError):
                await attacker.stream("/nexus/kad/1.0.0")
        await honest.connect(attacker.victim.addresses[0])
        with trio.fail_after(DEADLINE_S):
            await honest.provide(key)
            await attacker.victim.connect(honest.addresses[0])
            assert [peer.peer_id for peer in await attacker.victim.find_providers(key)] == [honest.peer_id]


async def test_a_dht_stream_that_says_nothing_is_ended(attack: Attack, mock_clock: trio.testing.MockClock) -> None:
    async with attack() as attacker:
        stream = await attacker.stream("/nexus/kad/1.0.0")
        mock_clock.rate = 40
        with trio.fail_after(120), pytest.raises(MuxedStreamError):
            await stream.read(1)
        mock_clock.rate = 1


async def test_values_are_not_stored_for_strangers(attack: Attack) -> None:
    """Any peer could store 50,000 records of a megabyte."""
    from libp2p.kad_dht.pb.kademlia_pb2 import Message

    async with attack() as attacker:
        for key in (b"plain", b"/pk/x", b"/v/x"):
            message = Message(type=Message.PUT_VALUE, key=key)
            message.record.key, message.record.value = key, bytes(100_000)
            stream = await attacker.stream("/nexus/kad/1.0.0")
            with suppress(MuxedStreamError), trio.move_on_after(5):
                await stream.write(framed(message.SerializeToString()))
                await stream.read(1)
        assert attacker.victim._dht.get_value_store_size() == 0


async def test_provider_records_are_bounded_and_only_for_the_sender(attack: Attack) -> None:
    from libp2p.kad_dht.pb.kademlia_pb2 import Message

    async with attack() as attacker:
        message = Message(type=Message.ADD_PROVIDER, key=bytes(32))
        provider = message.providerPeers.add()
        provider.id = os.urandom(38)
        provider.addrs.append(b"\x04\x7f\x00\x00\x01\x06\x00\x50")
        stream = await attacker.stream("/nexus/kad/1.0.0")
        with suppress(MuxedStreamError), trio.move_on_after(5):
            await stream.write(framed(message.SerializeToString()))
            await stream.read(1)
        assert await attacker.victim.find_providers(bytes(32)) == []


async def test_raw_sockets_with_garbage_and_half_handshakes(open_node: OpenNode, serves: Any) -> None:
    async with open_node() as victim:
        host, port = "127.0.0.1", int(victim.addresses[0].split("/")[4])
        held = []
        for data in [os.urandom(2000), b"\xff\xff\xff\xff\x0f" + b"x" * 100, b"\x13/multistream/1.0.0\n", b"", b"\x00"] * 5:
            with suppress(OSError):
                stream = await trio.open_tcp_stream(host, port)
                await stream.send_all(data)
                held.append(stream)
        await serves(victim)
        for stream in held:
            await stream.aclose()


async def test_handshakes_that_stall_are_given_up(open_node: OpenNode, mock_clock: trio.testing.MockClock) -> None:
    async with open_node() as victim:
        port = int(victim.addresses[0].split("/")[4])
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(b"\x13/multi")
        mock_clock.rate = 30
        with trio.fail_after(40), suppress(trio.BrokenResourceError):
            while await stream.receive_some(100):
                pass


async def test_a_connection_cap_per_address(open_node: OpenNode) -> None:
    """Trap 13: 256 identities from one IP filled every slot."""
    async with open_node(caps=Caps(connections_per_ip=3)) as victim:
        port = int(victim.addresses[0].split("/")[4])
        held = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(3)]
        for stream in held:
            assert await stream.receive_some(1)  # the victim's multistream greeting
        over = await trio.open_tcp_stream("127.0.0.1", port)
        with trio.fail_after(DEADLINE_S), suppress(trio.BrokenResourceError):
            assert await over.receive_some(1) == b""
        for stream in (*held, over):
            await stream.aclose()


async def test_inbound_slots_come_free_again(open_node: OpenNode, serves: Any) -> None:
    """Trap 2: after 250 inbound connections in its life the host took no more."""
    async with open_node(caps=Caps(connections=4)) as victim, open_node() as client:
        for _ in range(12):
            with trio.fail_after(DEADLINE_S):
                while True:
                    with suppress(UnreachableError):
                        await client.connect(victim.addresses[0])
                        break
                    await trio.sleep(0.05)
                await client.disconnect(victim.peer_id)
        await serves(victim)


async def test_only_ed25519_identities_may_connect(open_node: OpenNode, serves: Any) -> None:
    from libp2p import create_yamux_muxer_option, new_host
    from libp2p.crypto.rsa import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as noise_key_pair
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from libp2p.security.noise.transport import PROTOCOL_ID, Transport
    from multiaddr import Multiaddr

    key_pair = create_new_key_pair(2048)
    noise = {PROTOCOL_ID: Transport(key_pair, noise_privkey=noise_key_pair().private_key)}
    host = new_host(key_pair=key_pair, muxer_opt=create_yamux_muxer_option(), sec_opt=noise)
    async with open_node() as victim, host.run([]):
        with trio.move_on_after(5), suppress(Exception):
            await host.connect(info_from_p2p_addr(Multiaddr(victim.addresses[0])))
        assert victim.connections() == []
        await serves(victim)


async def test_plaintext_and_other_security_are_refused(open_node: OpenNode) -> None:
    async with open_node() as victim:
        for protocol in (b"/plaintext/2.0.0", b"/secio/1.0.0", b"/tls/1.0.0"):
            with socket.create_connection(("127.0.0.1", int(victim.addresses[0].split("/")[4]))) as raw:
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(raw))
                await stream.send_all(b"\x13/multistream/1.0.0\n" + bytes([len(protocol) + 1]) + protocol + b"\n")
                answer = b""
                with trio.fail_after(DEADLINE_S):
                    while b"na\n" not in answer:
                        answer += await stream.receive_some(1000)
                raw.detach()


async def test_a_peer_that_keeps_breaking_the_rules_is_shunned(attack: Attack) -> None:
    small = ProtocolSpec("/test/small/1", frame_max=10)

    async def read(stream: Stream) -> None:
        await stream.receive()

    async with attack() as attacker:
        attacker.victim.serve(small, read)

        async def misbehave() -> None:
            while True:
                stream = await attacker.node.open_stream(attacker.victim.peer_id, ProtocolSpec(small.id, frame_max=100))
                with suppress(UnreachableError):
                    await stream.send(bytes(50))
                    await stream.receive()

        with trio.fail_after(DEADLINE_S), pytest.raises(NexusError):
            await misbehave()
        assert attacker.victim._swarm.shuns(attacker.node._swarm.get_peer_id())

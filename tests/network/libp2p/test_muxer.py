"""Our yamux and Noise transport phase on real sockets: any cut of the bytes gives the same frames, and nothing forged gets in."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamReset

from nexus.core.errors import CapacityError, PeerError, TimedOutError, UnreachableError
from nexus.network.libp2p.framing import FrameStream
from nexus.network.libp2p.noise import PLAIN_MAX, RECEIVE_BYTES, SecureChannel
from nexus.network.libp2p.yamux import DATA, WINDOW_BYTES, Budget, YamuxConnection, YamuxStream
from nexus.network.limits import PeerLimits
from nexus.network.transport import ProtocolSpec

SPEC = ProtocolSpec("/t/1", frame_max=1 << 20)


def socket_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    for sock in (near, far):
        sock.setblocking(False)
    return near, far


def channels() -> tuple[SecureChannel, SecureChannel]:
    near, far = socket_pair()
    keys = os.urandom(32), os.urandom(32)
    made = []
    for number, sock in enumerate((near, far)):
        pair = create_new_key_pair(os.urandom(32))
        made.append(
            SecureChannel(
                sock=sock,
                local_peer=ID.from_pubkey(pair.public_key),
                local_private_key=pair.private_key,
                remote_peer=ID.from_pubkey(pair.public_key),
                is_initiator=number == 0,
                send_key=keys[number],
                receive_key=keys[1 - number],
                scratch=bytearray(RECEIVE_BYTES),
            )
        )
    return made[0], made[1]


@asynccontextmanager
async def connected(streams_max: int = 8) -> AsyncIterator[tuple[YamuxConnection, YamuxConnection]]:
    pair = [YamuxConnection(channel, channel.remote_peer, Budget(1 << 26, streams_max)) for channel in channels()]
    async with trio.open_nursery() as nursery:
        for conn in pair:
            nursery.start_soon(conn.start)
        yield pair[0], pair[1]
        for conn in pair:
            await conn.close()


def framed(stream: YamuxStream, spec: ProtocolSpec = SPEC) -> FrameStream:
    return FrameStream(stream, "peer", spec, PeerLimits())


@settings(max_examples=40, deadline=None)
@given(frames=st.lists(st.binary(max_size=300), max_size=12), cuts=st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_any_cut_of_the_bytes_gives_the_same_frames(frames: list[bytes], cuts: list[int]) -> None:
    """Other implementations send header and payload apart, frames that span messages, and many frames in one message."""

    async def main() -> None:
        async with connected() as (near, far):
            stream = await near.open_stream()
            arriving = framed(await far.accept_stream())
            payload = b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)
            raw = b""
            for number, at in enumerate(range(0, len(payload), 97)):
                piece = payload[at : at + 97]
                raw += struct.pack("!BBHII", 0, DATA, 0, stream.stream_id, len(piece)) + piece
                if number % 3 == 0:
                    raw += struct.pack("!BBHII", 0, DATA, 0, stream.stream_id, 0)
            at = turn = 0
            while at < len(raw):
                size = cuts[turn % len(cuts)]
                near.channel.push(raw[at : at + size])
                at += size
                turn += 1
            stream.close_write_now()
            with trio.fail_after(10):
                assert [await arriving.receive() for _ in frames] == frames
                with pytest.raises(trio.EndOfChannel):
                    await arriving.receive()

    trio.run(main)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.sampled_from([0, 1, 100, PLAIN_MAX - 16, PLAIN_MAX, 70_000, WINDOW_BYTES + 1, 1 << 20]), max_size=6))
def test_frames_of_any_size_arrive_whole_and_in_order(sizes: list[int]) -> None:
    async def main() -> None:
        async with connected() as (near, far):
            sending, arriving = framed(await near.open_stream()), framed(await far.accept_stream())
            frames = [os.urandom(size) for size in sizes]

            async def send() -> None:
                for frame in frames:
                    await sending.send(frame)

            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(send)
                    for frame in frames:
                        assert await arriving.receive() == frame

    trio.run(main)


async def test_small_frames_renew_credit_rarely() -> None:
    async with connected() as (near, far):
        sending, arriving = framed(await near.open_stream()), framed(await far.accept_stream())
        sent = 0
        original = far.channel.push

        def counting(plain: bytes) -> None:
            nonlocal sent
            sent += 1
            original(plain)

        far.channel.push = counting  # type: ignore[method-assign]
        for _ in range(1000):
            await sending.send(bytes(1000))
            await arriving.receive()
        assert sent <= 10  # a million bytes against a window of a quarter


async def test_frames_of_one_byte_do_not_become_an_object_each() -> None:
    async with connected() as (near, far):
        stream = await near.open_stream()
        arriving = await far.accept_stream()
        one = struct.pack("!BBHII", 0, DATA, 0, stream.stream_id, 1) + b"x"
        for _ in range(100):
            near.channel.push(one * 1000)
        with trio.fail_after(10):
            while arriving.buffered < 100_000:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert len(arriving._chunks) < 10
        assert arriving.take() == b"x" * 100_000


async def test_a_small_frame_is_one_message_on_the_wire() -> None:
    async with connected() as (near, far):
        sending, arriving = framed(await near.open_stream()), framed(await far.accept_stream())
        sealed = near.channel._sealed
        await sending.send(bytes(1000))
        assert near.channel._sealed == sealed + 1
        assert len(await arriving.receive()) == 1000


async def test_a_writer_outlasts_a_reader_that_pauses(mock_clock: trio.testing.MockClock) -> None:
    """Trap 5: after 5 s without credit the library gave up."""
    mock_clock.rate = 20
    async with connected() as (near, far):
        sending, arriving = framed(await near.open_stream()), framed(await far.accept_stream())
        frame = os.urandom(1 << 20)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sending.send, frame)
            await trio.sleep(30)
            assert await arriving.receive() == frame


async def test_a_cancelled_write_breaks_its_stream_only_where_it_is_torn() -> None:
    async with connected() as (near, far):
        torn, fine = framed(await near.open_stream()), framed(await near.open_stream())
        await far.accept_stream()
        arriving = framed(await far.accept_stream())
        with trio.move_on_after(0.05) as scope:
            await torn.send(bytes(1 << 20))
        assert scope.cancelled_caught
        with pytest.raises(UnreachableError):
            await torn.send(b"x")
        with trio.CancelScope() as scope:
            scope.cancel()
            await fine.send(b"never sent")
        await fine.send(b"ok")
        with trio.fail_after(5):
            assert await arriving.receive() == b"ok"


async def test_an_open_stream_more_than_the_cap_is_a_clear_error() -> None:
    """Trap 6: the library's stream 257 waited for ever."""
    async with connected(streams_max=3) as (near, _):
        held = [await near.open_stream() for _ in range(3)]
        with pytest.raises(CapacityError, match="3 streams"):
            await near.open_stream()
        await held[0].reset()
        await near.open_stream()


async def test_a_frame_that_drips_is_given_up(mock_clock: trio.testing.MockClock) -> None:
    mock_clock.rate = 20
    spec = ProtocolSpec("/t/1", frame_max=1 << 20, read_timeout_s=5)
    async with connected() as (near, far):
        stream = await near.open_stream()
        arriving = framed(await far.accept_stream(), spec)

        async def drip() -> None:
            await stream.write(struct.pack(">I", 1000))
            with suppress(MuxedStreamReset):
                while True:
                    await stream.write(b"x")
                    await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            begin_s = trio.current_time()
            with pytest.raises(TimedOutError):
                await arriving.receive()
            assert trio.current_time() - begin_s < 100


async def test_a_length_over_the_cap_is_refused_before_the_frame_comes() -> None:
    async with connected() as (near, far):
        stream = await near.open_stream()
        arriving = framed(await far.accept_stream(), ProtocolSpec("/t/1", frame_max=10))
        await stream.write(b"\xff\xff\xff\xff")
        with trio.fail_after(5), pytest.raises(PeerError, match="4294967295"):
            await arriving.receive()


async def test_a_stream_cut_off_in_a_frame_is_not_an_orderly_end() -> None:
    async with connected() as (near, far):
        stream = await near.open_stream()
        arriving = framed(await far.accept_stream())
        await stream.write(struct.pack(">I", 100) + b"half")
        await stream.close()
        with trio.fail_after(5), pytest.raises(UnreachableError, match="in the middle"):
            await arriving.receive()


async def test_what_was_sent_before_a_goodbye_is_still_read() -> None:
    async with connected() as (near, far):
        sending, arriving = framed(await near.open_stream()), framed(await far.accept_stream())
        await sending.send(b"last words")
        await sending.close()
        await near.close()
        await far.event_closed.wait()
        assert await arriving.receive() == b"last words"
        with pytest.raises(trio.EndOfChannel):
            await arriving.receive()
        with pytest.raises(MuxedConnUnavailable):
            await far.open_stream()


async def test_a_silent_peer_is_noticed(mock_clock: trio.testing.MockClock) -> None:
    """Half-open: the machine at the other end is gone, and no packet says so."""
    mock_clock.rate = 200
    near, far = channels()
    conn = YamuxConnection(near, near.remote_peer)
    with trio.fail_after(120):
        await conn.start()
    assert "silent" in conn.close_reason
    far.abort()


async def test_pings_keep_an_idle_connection(mock_clock: trio.testing.MockClock) -> None:
    mock_clock.rate = 50
    async with connected() as (near, far):
        await trio.sleep(100)
        assert not near.is_closed
        assert not far.is_closed


async def test_forged_bytes_end_the_channel() -> None:
    near, far = channels()
    near.push(b"genuine")
    near._sock.send(struct.pack(">H", 30) + bytes(30))
    got: list[bytes] = []

    async def receive() -> None:
        while True:
            await far.receive_into(got.append)

    with trio.fail_after(5), pytest.raises(ConnectionClosedError, match="authenticate"):
        await receive()
    assert got == [b"genuine"]
    near.abort()
    far.abort()


async def test_replayed_and_reordered_messages_do_not_authenticate() -> None:
    near, far = channels()
    near.push(b"first")
    raw = far._sock.recv(1000)
    near._sock.send(raw)
    await far.receive_into(lambda _: None)
    near._sock.send(raw)
    with trio.fail_after(5), pytest.raises(ConnectionClosedError):
        await far.receive_into(lambda _: None)
    near.abort()
    far.abort()


async def test_a_peer_that_never_reads_is_given_up(mock_clock: trio.testing.MockClock) -> None:
    near, far = channels()
    with suppress(ConnectionClosedError):
        while near.pending_bytes < 1 << 20:
            near.push(bytes(PLAIN_MAX))
    mock_clock.rate = 100
    with pytest.raises(trio.TooSlowError):
        await near.flush_forever()
    near.abort()
    far.abort()


async def test_answers_that_nobody_reads_are_bounded() -> None:
    near, far = channels()

    def flood() -> None:
        for _ in range(1000):
            near.push(bytes(PLAIN_MAX))

    with pytest.raises(ConnectionClosedError, match="does not read"):
        flood()
    assert near.closed
    far.abort()

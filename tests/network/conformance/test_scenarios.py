"""What every adapter promises, by the port's contract. Each scenario runs on the simulated network and on real libp2p."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio

from nexus.core.errors import CapacityError, PeerError, TimedOutError, UnreachableError, UsageError
from nexus.core.keys import Identity
from nexus.network.transport import Message, PeerAddress, ProtocolSpec, Stream, Transport

if TYPE_CHECKING:
    from tests.network.conformance.conftest import World

ECHO = ProtocolSpec("/test/echo/1", frame_max=8 << 20)
DEADLINE_S = 20.0


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


async def until(condition: object, timeout_s: float = DEADLINE_S) -> None:
    """Poll, for what the port has no event for."""
    with trio.fail_after(timeout_s):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110
            await trio.sleep(0.01)


async def join(one: Transport, other: Transport) -> None:
    assert await one.connect(other.addresses[0]) == other.peer_id


async def test_streams_carry_frames_both_ways(world: World) -> None:
    async with world.open() as a, world.open() as b:
        a.serve(ECHO, echo)
        b.serve(ECHO, echo)
        await join(a, b)
        with trio.fail_after(DEADLINE_S):
            for near, far in ((a, b), (b, a)):
                await until(lambda near=near: near.connections())
                stream = await near.open_stream(far.peer_id, ECHO)
                assert stream.peer_id == far.peer_id
                for frame in (b"", b"x", os.urandom(1000), b"last"):
                    await stream.send(frame)
                    assert await stream.receive() == frame
                await stream.close()
                with pytest.raises(trio.EndOfChannel):
                    await stream.receive()


async def test_large_frames_and_many_at_once(world: World) -> None:
    async with world.open() as a, world.open() as b:
        b.serve(ECHO, echo)
        await join(a, b)
        stream = await a.open_stream(b.peer_id, ECHO)
        frames = [os.urandom(size) for size in (ECHO.frame_max, 1, 300_000, 65_519, 65_536)]

        async def send() -> None:
            for frame in frames:
                await stream.send(frame)

        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                for frame in frames:
                    assert await stream.receive() == frame


async def test_many_streams_share_a_connection(world: World) -> None:
    spec = ProtocolSpec("/test/many/1", frame_max=100, streams_per_peer_max=40)
    async with world.open() as a, world.open() as b:
        b.serve(spec, echo)
        await join(a, b)

        async def one(number: int) -> None:
            stream = await a.open_stream(b.peer_id, spec)
            for turn in range(5):
                await stream.send(b"%d %d" % (number, turn))
                assert await stream.receive() == b"%d %d" % (number, turn)
            await stream.close()

        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                for number in range(40):
                    nursery.start_soon(one, number)
        assert len(a.connections()) == 1


async def test_a_frame_over_the_cap_is_refused_where_it_is_sent(world: World) -> None:
    async with world.open() as a, world.open() as b:
        b.serve(ECHO, echo)
        await join(a, b)
        stream = await a.open_stream(b.peer_id, ECHO)
        with pytest.raises(CapacityError):
            await stream.send(bytes(ECHO.frame_max + 1))
        await stream.send(b"still usable")
        assert await stream.receive() == b"still usable"


async def test_a_frame_over_the_cap_ends_the_stream_where_it_arrives(world: World) -> None:
    small = ProtocolSpec(ECHO.id, frame_max=1000)
    seen: list[BaseException] = []

    async def watch(stream: Stream) -> None:
        try:
            await stream.receive()
        except PeerError as error:
            seen.append(error)
            raise

    async with world.open() as a, world.open() as b:
        b.serve(small, watch)
        await join(a, b)
        stream = await a.open_stream(b.peer_id, ECHO)
        await stream.send(bytes(1001))
        with trio.fail_after(DEADLINE_S), pytest.raises(UnreachableError):
            await stream.receive()
        assert type(seen[0]) is PeerError
        assert seen[0].peer == a.peer_id
        assert a.connections()


async def test_who_opens_a_stream_says_in_few_bytes_what_for(world: World) -> None:
    wary = ProtocolSpec(ECHO.id, frame_max=100_000, first_frame_max=1000)

    async with world.open() as a, world.open() as b:
        b.serve(wary, echo)
        await join(a, b)
        with trio.fail_after(DEADLINE_S):
            stream = await a.open_stream(b.peer_id, wary)
            for frame in (bytes(1000), bytes(100_000)):
                await stream.send(frame)
                assert await stream.receive() == frame
            stream = await a.open_stream(b.peer_id, wary)
            await stream.send(bytes(1001))
            with pytest.raises(UnreachableError):
                await stream.receive()


async def test_close_lets_what_was_sent_arrive_and_reset_does_not_end_in_order(world: World) -> None:
    frames: list[bytes] = []
    ends: list[type[BaseException]] = []

    async def collect(stream: Stream) -> None:
        try:
            while True:
                frames.append(await stream.receive())
        except (trio.EndOfChannel, UnreachableError) as error:
            ends.append(type(error))

    async with world.open() as a, world.open() as b:
        b.serve(ECHO, collect)
        await join(a, b)
        with trio.fail_after(DEADLINE_S):
            stream = await a.open_stream(b.peer_id, ECHO)
            await stream.send(b"one")
            await stream.send(b"two")
            await stream.close()
            await until(lambda: len(ends) == 1)
            assert frames == [b"one", b"two"]
            stream = await a.open_stream(b.peer_id, ECHO)
            await stream.reset()
            await stream.reset()
            with pytest.raises(UnreachableError):
                await stream.send(b"three")
            with pytest.raises(UnreachableError):
                await stream.receive()
            await until(lambda: len(ends) == 2)
            assert ends == [trio.EndOfChannel, UnreachableError]


async def test_after_close_the_other_side_may_go_on_sending(world: World) -> None:
    async def answer_at_the_end(stream: Stream) -> None:
        with pytest.raises(trio.EndOfChannel):
            await stream.receive()
        for number in range(3):
            await stream.send(b"%d" % number)

    async with world.open() as a, world.open() as b:
        b.serve(ECHO, answer_at_the_end)
        await join(a, b)
        stream = await a.open_stream(b.peer_id, ECHO)
        await stream.close()
        with trio.fail_after(DEADLINE_S):
            assert [await stream.receive() for _ in range(3)] == [b"0", b"1", b"2"]
            with pytest.raises(trio.EndOfChannel):
                await stream.receive()


async def test_the_read_deadline_resets_the_stream(world: World) -> None:
    spec = ProtocolSpec("/test/slow/1", frame_max=100, read_timeout_s=0.1)
    errors: list[BaseException] = []

    async def wait(stream: Stream) -> None:
        try:
            await stream.receive()
        except TimedOutError as error:
            errors.append(error)
            raise

    async with world.open() as a, world.open() as b:
        b.serve(spec, wait)
        await join(a, b)
        stream = await a.open_stream(b.peer_id, ProtocolSpec(spec.id, frame_max=100))
        with trio.fail_after(DEADLINE_S), pytest.raises(UnreachableError):
            await stream.receive()
        assert len(errors) == 1


async def test_one_stream_over_the_cap_of_a_peer_is_reset(world: World) -> None:
    spec = ProtocolSpec("/test/capped/1", frame_max=100, streams_per_peer_max=2)
    async with world.open() as a, world.open() as b, world.open() as c:
        b.serve(spec, echo)
        await join(a, b)
        await join(c, b)
        with trio.fail_after(DEADLINE_S):
            held = [await a.open_stream(b.peer_id, spec) for _ in range(2)]
            for stream in held:
                await stream.send(b"hello")
                assert await stream.receive() == b"hello"

            async def one_more() -> None:
                over = await a.open_stream(b.peer_id, spec)
                await over.receive()

            with pytest.raises(UnreachableError):
                await one_more()
            other = await c.open_stream(b.peer_id, spec)
            await other.send(b"another peer is served")
            assert await other.receive() == b"another peer is served"
            await held[0].close()
            with pytest.raises(trio.EndOfChannel):
                await held[0].receive()
            again = await a.open_stream(b.peer_id, spec)
            await again.send(b"room again")
            assert await again.receive() == b"room again"


async def test_the_byte_rate_of_a_peer_slows_reading_down(world: World) -> None:
    spec = ProtocolSpec("/test/rated/1", frame_max=10_000, bytes_per_peer_s=20_000)
    async with world.open() as a, world.open() as b:
        b.serve(spec, echo)
        await join(a, b)
        stream = await a.open_stream(b.peer_id, ProtocolSpec(spec.id, frame_max=10_000))
        begin_s = trio.current_time()
        with trio.fail_after(DEADLINE_S):
            for _ in range(3):
                await stream.send(bytes(10_000))
                assert len(await stream.receive()) == 10_000
        assert trio.current_time() - begin_s >= 0.45  # 30 kB, of which 20 at once


async def test_a_handlers_exception_ends_its_stream_and_no_more(world: World) -> None:
    broken = ProtocolSpec("/test/broken/1", frame_max=100)

    async def fail(stream: Stream) -> None:
        await stream.receive()
        raise RuntimeError("a bug")

    async def fail_in_a_nursery(stream: Stream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, stream)

    async with world.open() as a, world.open() as b:
        b.serve(broken, fail)
        b.serve(ProtocolSpec("/test/broken/2", frame_max=100), fail_in_a_nursery)
        b.serve(ECHO, echo)
        await join(a, b)
        with trio.fail_after(DEADLINE_S):
            for protocol in ("/test/broken/1", "/test/broken/2"):
                stream = await a.open_stream(b.peer_id, ProtocolSpec(protocol, frame_max=100))
                await stream.send(b"go")
                with pytest.raises(UnreachableError):
                    await stream.receive()
            stream = await a.open_stream(b.peer_id, ECHO)
            await stream.send(b"alive")
            assert await stream.receive() == b"alive"


async def test_a_stream_to_itself(world: World) -> None:
    async with world.open() as a:
        with pytest.raises(PeerError):
            await a.open_stream(a.peer_id, ECHO)
        a.serve(ECHO, echo)
        stream = await a.open_stream(a.peer_id, ECHO)
        assert stream.peer_id == a.peer_id
        with trio.fail_after(DEADLINE_S):
            for frame in (b"", os.urandom(100_000)):
                await stream.send(frame)
                assert await stream.receive() == frame
            await stream.close()
            with pytest.raises(trio.EndOfChannel):
                await stream.receive()
        assert a.connections() == []


async def test_providers_are_found_without_the_asker(world: World) -> None:
    key = bytes(range(32))
    async with world.open() as a, world.open() as b, world.open() as c:
        await join(a, b)
        await join(c, b)
        with trio.fail_after(DEADLINE_S):
            assert await c.find_providers(key) == []
            await a.provide(key)
            await c.provide(key)
            assert [peer.peer_id for peer in await c.find_providers(key)] == [a.peer_id]
            found = await b.find_providers(key)
            assert sorted(peer.peer_id for peer in found) == sorted([a.peer_id, c.peer_id])
            assert len(await b.find_providers(key, limit=1)) == 1
            assert await a.find_providers(bytes(32)) == []
        peer = next(peer for peer in found if peer.peer_id == a.peer_id)
        assert [f"{address}/p2p/{a.peer_id}" for address in peer.addresses] == list(a.addresses)
        with pytest.raises(ValueError, match="32 bytes"):
            await a.provide(b"short")


async def test_what_find_providers_returns_can_be_dialled(world: World) -> None:
    key = os.urandom(32)
    async with world.open() as a, world.open() as b, world.open() as c:
        a.serve(ECHO, echo)
        await join(a, b)
        await join(c, b)
        with trio.fail_after(DEADLINE_S):
            await a.provide(key)
            (found,) = await c.find_providers(key)
            stream = await c.open_stream(found.peer_id, ECHO)
            await stream.send(b"hi")
            assert await stream.receive() == b"hi"


async def test_gossip_reaches_the_others(world: World) -> None:
    async with world.open() as a, world.open() as b, world.open() as c:
        async with a.subscribe("t") as at_a, b.subscribe("t") as at_b, c.subscribe("t") as at_c, c.subscribe("t") as twice:
            await join(a, b)
            await join(c, b)
            got: list[Message] = []

            async def collect(channel: trio.MemoryReceiveChannel[Message]) -> None:
                async for message in channel:
                    got.append(message)

            with trio.fail_after(DEADLINE_S):
                async with trio.open_nursery() as nursery:
                    for channel in (at_b, at_c, twice):
                        nursery.start_soon(collect, channel)
                    turn = 0
                    # Gossip is likely, not certain, and a mesh takes a moment to form: say it again until all have heard.
                    while len(got) < 3:
                        turn += 1
                        await a.publish("t", b"hello %d" % turn)
                        with trio.move_on_after(0.3):
                            while len(got) < 3:  # noqa: ASYNC110
                                await trio.sleep(0.01)
                    nursery.cancel_scope.cancel()
            assert {message.peer_id for message in got} == {a.peer_id}
            assert all(message.data.startswith(b"hello ") for message in got)
            with pytest.raises(trio.WouldBlock):
                at_a.receive_nowait()  # not to itself
        with pytest.raises(CapacityError):
            await a.publish("t", bytes(1025))


async def test_ping_and_connections(world: World) -> None:
    async with world.open() as a, world.open() as b:
        await join(a, b)
        with trio.fail_after(DEADLINE_S):
            assert 0 < await a.ping(b.peer_id) < 5
            await until(lambda: b.connections())
        (seen_by_a,) = a.connections()
        (seen_by_b,) = b.connections()
        assert (seen_by_a.peer_id, seen_by_a.direction) == (b.peer_id, "out")
        assert (seen_by_b.peer_id, seen_by_b.direction) == (a.peer_id, "in")
        assert f"{seen_by_a.address}/p2p/{b.peer_id}" in b.addresses
        assert seen_by_a.opened_s <= trio.current_time()
        await a.disconnect(b.peer_id)
        # The DHT may have called back already: it is these connections that are gone.
        await until(lambda: seen_by_a not in a.connections() and seen_by_b not in b.connections())


async def test_disconnecting_breaks_streams_and_the_next_one_dials_again(world: World) -> None:
    async with world.open() as a, world.open() as b:
        b.serve(ECHO, echo)
        await join(a, b)
        stream = await a.open_stream(b.peer_id, ECHO)
        await a.disconnect(b.peer_id)
        with trio.fail_after(DEADLINE_S):
            with pytest.raises(UnreachableError):
                await stream.receive()
            again = await a.open_stream(b.peer_id, ECHO)
            await again.send(b"back")
            assert await again.receive() == b"back"


async def test_who_cannot_be_reached(world: World) -> None:
    stranger = Identity(os.urandom(32)).peer_id
    async with world.open() as a, world.open() as b:
        with trio.fail_after(DEADLINE_S):
            with pytest.raises(UnreachableError) as no_address:
                await a.open_stream(stranger, ECHO)
            assert stranger in no_address.value.cause
            for malformed in ("", "/ip4/127.0.0.1/tcp/1", "/ip4/x/tcp/1/p2p/" + stranger, b.addresses[0].replace("tcp", "udp")):
                with pytest.raises(UsageError):
                    await a.connect(malformed)
            with pytest.raises(UnreachableError) as refused:
                await a.connect(f"/ip4/127.0.0.1/tcp/1/p2p/{stranger}")
            assert "/ip4/127.0.0.1/tcp/1" in refused.value.cause
            with pytest.raises(UnreachableError) as wrong:
                await a.connect(b.addresses[0].rpartition("/")[0] + "/" + stranger)
            assert stranger in wrong.value.cause
            await join(a, b)
            with pytest.raises(PeerError) as unknown:
                await a.open_stream(b.peer_id, ProtocolSpec("/test/nobody/1", frame_max=1))
            assert "/test/nobody/1" in unknown.value.cause
            assert type(unknown.value) is PeerError


async def test_later_addresses_are_tried_when_the_first_fails(world: World) -> None:
    async with world.open() as a, world.open() as b:
        b.serve(ECHO, echo)
        good = b.addresses[0].partition("/p2p/")[0]
        a.learn(PeerAddress(b.peer_id, ("/ip4/127.0.0.1/tcp/1", good)))
        with trio.fail_after(DEADLINE_S):
            stream = await a.open_stream(b.peer_id, ECHO)
            await stream.send(b"found")
            assert await stream.receive() == b"found"


async def test_a_peer_that_leaves_breaks_its_streams(world: World) -> None:
    async with world.open() as a:
        async with world.open() as b:
            b.serve(ECHO, echo)
            await join(a, b)
            stream = await a.open_stream(b.peer_id, ECHO)
            await stream.send(b"x")
            assert await stream.receive() == b"x"
        with trio.fail_after(DEADLINE_S):
            with pytest.raises(UnreachableError):
                await stream.receive()
            await until(lambda: not a.connections())  # nobody is there to be called back


async def test_a_cancelled_write_keeps_the_connection_usable(world: World) -> None:
    async def stall(stream: Stream) -> None:
        await trio.sleep_forever()

    stalled = ProtocolSpec("/test/stalled/1", frame_max=8 << 20, read_timeout_s=None)
    async with world.open() as a, world.open() as b:
        b.serve(stalled, stall)
        b.serve(ECHO, echo)
        await join(a, b)
        with trio.fail_after(DEADLINE_S):
            stuck = await a.open_stream(b.peer_id, stalled)
            with trio.move_on_after(0.2) as scope:
                while True:
                    await stuck.send(bytes(4 << 20))
            assert scope.cancelled_caught
            stream = await a.open_stream(b.peer_id, ECHO)
            await stream.send(b"fine")
            assert await stream.receive() == b"fine"
            await stuck.reset()
            assert len(a.connections()) == 1

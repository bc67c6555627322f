"""The fast path: who gets in, what becomes of everybody else, and that bulk streams open all the same where it does not work."""

from __future__ import annotations

import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import LocalError, MalformedError, UnreachableError
from nexus.core.keys import Identity
from nexus.network import fastpath
from nexus.network.fastpath import (
    CONTROL,
    FASTPATH,
    GREETING,
    TICKETS_MAX,
    TICKETS_PER_PEER_MAX,
    Declined,
    FastPathOptions,
    FastPathTransport,
    FastStream,
    Hello,
    Offer,
    Seek,
    Tickets,
    Welcome,
    open_fastpath,
)
from nexus.network.libp2p import NetworkOptions, open_libp2p
from nexus.network.transport import ProtocolSpec, Stream, Transport

ECHO = ProtocolSpec("/test/bulk/1", frame_max=1 << 20, bulk=True)
TALK = ProtocolSpec("/test/talk/1", frame_max=1 << 20)
LOCAL = "127.0.0.1"
OPTIONS = NetworkOptions(listen=(f"/ip4/{LOCAL}/tcp/0",), mdns=False)
DEADLINE_S = 20.0


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


@asynccontextmanager
async def fast(identity: Identity | None = None, *, port: int = 0) -> AsyncIterator[FastPathTransport]:
    identity = identity or Identity(os.urandom(32))
    async with (
        open_libp2p(identity, OPTIONS) as below,
        open_fastpath(below, identity, FastPathOptions((LOCAL,), port)) as transport,
    ):
        for spec in (ECHO, TALK):
            transport.serve(spec, echo)
        yield transport


async def join(one: Transport, other: Transport) -> None:
    await one.connect(other.addresses[0])


async def check_echo(stream: Stream, size: int = 1 << 20) -> None:
    frame = os.urandom(size)
    with trio.fail_after(DEADLINE_S):
        await stream.send(frame)
        assert await stream.receive() == frame


async def offer_of(transport: Transport, peer_id: str) -> Offer:
    stream = await transport.open_stream(peer_id, FASTPATH)
    await stream.send(CONTROL.pack(Seek(1)))
    offer = CONTROL.unpack(await stream.receive())
    await stream.close()
    assert isinstance(offer, Offer)
    return offer


def client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def dial_tls(port: int, context: ssl.SSLContext | None = None) -> trio.SSLStream[trio.SocketStream]:
    stream = trio.SSLStream(await trio.open_tcp_stream(LOCAL, port), context or client_context(), https_compatible=True)
    await stream.do_handshake()
    return stream


def framed(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


async def until_closed(stream: trio.abc.Stream) -> bytes:
    """What comes until the other side has closed."""
    got = b""
    with trio.fail_after(DEADLINE_S):
        while True:
            try:
                data = await stream.receive_some(65536)
            except trio.BrokenResourceError:
                return got
            if not data:
                return got
            got += data


class TestTheWayIn:
    async def test_bulk_goes_fast_and_the_rest_does_not(self) -> None:
        async with fast() as a, fast() as b:
            await join(a, b)
            for near, far in ((a, b), (b, a)):
                bulk = await near.open_stream(far.peer_id, ECHO)
                assert isinstance(bulk, FastStream)
                assert bulk.peer_id == far.peer_id
                await check_echo(bulk)
                assert not isinstance(await near.open_stream(far.peer_id, TALK), FastStream)
                assert not isinstance(await near.open_stream(near.peer_id, ECHO), FastStream)

    async def test_the_server_knows_the_opener_by_its_key(self) -> None:
        seen: list[str] = []
        spec = replace(ECHO, id="/test/who/1")

        async def who(stream: Stream) -> None:
            seen.append(stream.peer_id)
            await stream.send(b"seen")

        async with fast() as a, fast() as b:
            b.serve(spec, who)
            await join(a, b)
            stream = await a.open_stream(b.peer_id, spec)
            assert isinstance(stream, FastStream)
            assert await stream.receive() == b"seen"
            assert seen == [a.peer_id]

    async def test_streams_of_both_ways_count_against_one_cap(self) -> None:
        spec = replace(ECHO, id="/test/capped/1", streams_per_peer_max=2)
        async with fast() as a, fast() as b:
            b.serve(spec, echo)
            await join(a, b)
            below = await a._below.open_stream(b.peer_id, spec)
            quick = await a.open_stream(b.peer_id, spec)
            for stream in (below, quick):
                await check_echo(stream, 10)
            third = await a.open_stream(b.peer_id, spec)
            with pytest.raises((UnreachableError, trio.EndOfChannel)), trio.fail_after(DEADLINE_S):
                await third.receive()
            await check_echo(quick, 10)

    async def test_a_port_that_is_taken_is_an_error_with_the_fix(self) -> None:
        with socket.create_server((LOCAL, 0)) as taken:
            with pytest.raises(LocalError, match="fast path") as caught:
                async with fast(port=taken.getsockname()[1]):
                    pass
            assert "network.fast_path_port" in caught.value.fix

    async def test_no_key_is_left_on_the_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fastpath.tempfile, "tempdir", str(tmp_path))
        async with fast():
            assert os.listdir(tmp_path) == []  # noqa: PTH208 - at once


Server = Callable[[trio.SocketStream], Awaitable[None]]


async def says_garbage(stream: trio.SocketStream) -> None:
    await stream.send_all(os.urandom(4096))
    await stream.aclose()


async def says_nothing(stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


async def hangs_up(stream: trio.SocketStream) -> None:
    await stream.aclose()


async def speaks_http(stream: trio.SocketStream) -> None:
    await stream.receive_some(1024)
    await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    await stream.aclose()


def stranger(after: Server) -> Server:
    """TLS, with the certificate of somebody else."""

    async def answer(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, fastpath._Contexts.fresh().server, server_side=True)
        await tls.do_handshake()
        await after(stream)

    return answer


class TestFallingBack:
    @pytest.mark.parametrize(
        "server", [says_garbage, says_nothing, hangs_up, speaks_http, stranger(says_nothing)], ids=lambda one: one.__name__
    )
    async def test_a_port_that_answers_wrong(self, server: Server, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery) -> None:
        monkeypatch.setattr(fastpath, "OPEN_TIMEOUT_S", 1.0)
        dialled: list[None] = []

        async def count(stream: trio.SocketStream) -> None:
            dialled.append(None)
            try:
                await server(stream)
            except (trio.BrokenResourceError, OSError):
                await stream.aclose()

        listeners = await nursery.start(trio.serve_tcp, count, 0)
        port = listeners[0].socket.getsockname()[1]
        async with fast() as a, fast() as b:
            b.port = port
            await join(a, b)
            for _ in range(2):
                stream = await a.open_stream(b.peer_id, ECHO)
                assert not isinstance(stream, FastStream)
                await check_echo(stream)
        # Once is enough to know.
        assert len(dialled) == 1

    async def test_a_port_that_is_blocked_and_tried_again_later(self) -> None:
        with socket.create_server((LOCAL, 0)) as nobody:
            port = nobody.getsockname()[1]
        async with fast() as a, fast() as b:
            await join(a, b)
            open_port, b.port = b.port, port
            await check_echo(await a.open_stream(b.peer_id, ECHO))
            b.port = open_port
            assert not isinstance(await a.open_stream(b.peer_id, ECHO), FastStream)
            a._avoided[b.peer_id] -= fastpath.AVOID_S
            assert isinstance(await a.open_stream(b.peer_id, ECHO), FastStream)

    async def test_a_peer_without_a_fast_path(self) -> None:
        identity = Identity(os.urandom(32))
        async with fast() as a, open_libp2p(identity, OPTIONS) as plain:
            plain.serve(ECHO, echo)
            await join(a, plain)
            await check_echo(await a.open_stream(plain.peer_id, ECHO))

    async def test_a_node_that_only_listens(self) -> None:
        identity = Identity(os.urandom(32))
        async with (
            open_libp2p(identity, OPTIONS) as below,
            open_fastpath(below, identity, FastPathOptions((LOCAL,), dial=False)) as a,
            fast() as b,
        ):
            a.serve(ECHO, echo)
            await join(a, b)
            assert not isinstance(await a.open_stream(b.peer_id, ECHO), FastStream)
            assert isinstance(await b.open_stream(a.peer_id, ECHO), FastStream)

    async def test_a_peer_behind_a_relay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its connection leads to no address of its own."""
        async with fast() as a, fast() as b:
            await join(a, b)
            direct = a.connections()
            circuit = [replace(one, address=f"{one.address}/p2p/{b.peer_id}/p2p-circuit") for one in direct]
            monkeypatch.setattr(a._below, "connections", lambda: circuit)
            stream = await a.open_stream(b.peer_id, ECHO)
            assert not isinstance(stream, FastStream)
            await check_echo(stream)

    async def test_a_peer_that_is_gone_is_unreachable_and_not_avoided(self) -> None:
        async with fast() as a:
            with pytest.raises(UnreachableError):
                await a.open_stream(Identity(os.urandom(32)).peer_id, ECHO)
            assert not a._avoided

    async def test_the_offer_of_another_leads_to_nobody(self) -> None:
        """A peer that hands on somebody else's offer would have us take that other for it, and that other us for it."""
        reached: list[str] = []
        spec = replace(ECHO, id="/test/relayed/1")

        async def note(stream: Stream) -> None:
            reached.append(stream.peer_id)

        async with fast() as a, fast() as honest, open_libp2p(Identity(os.urandom(32)), OPTIONS) as liar:
            honest.serve(spec, note)
            liar.serve(spec, echo)

            async def hand_on(stream: Stream) -> None:
                await stream.receive()
                await stream.send(CONTROL.pack(await offer_of(liar, honest.peer_id)))

            liar.serve(FASTPATH, hand_on)
            await liar.connect(honest.addresses[0])
            await join(a, liar)
            stream = await a.open_stream(liar.peer_id, spec)
            assert not isinstance(stream, FastStream)
            await check_echo(stream)
            assert reached == []


class TestHostile:
    async def test_every_hello_but_the_right_one_is_refused(self) -> None:
        async with fast() as a, fast() as b, fast() as c:
            await join(a, b)
            await join(c, b)
            mine, theirs = Identity(os.urandom(32)).public_key, b._public_key

            async def refused(hello: bytes, count: int = 1) -> None:
                stream = await dial_tls(b.port)
                await stream.send_all(framed(hello) * count)
                assert await until_closed(stream) == b""

            async def fresh(**change: object) -> bytes:
                offer = await offer_of(a, b.peer_id)
                return GREETING.pack(replace(Hello(offer.ticket, a._public_key, theirs, ECHO.id), **change))  # type: ignore[arg-type]

            await refused(await fresh(ticket=bytes(32)))
            await refused(await fresh(opener=mine))
            await refused(await fresh(opener=c._public_key))
            await refused(await fresh(server=mine))
            await refused(await fresh(protocol=TALK.id))
            await refused(await fresh(protocol="/nobody/speaks/this"))
            await refused(GREETING.pack(Welcome(1)))
            await refused(b"\xff" * 100)
            await refused(b"")
            await refused(bytes(fastpath.HELLO_BYTES_MAX + 1))
            # The right one works once.
            right = await fresh()
            stream = await dial_tls(b.port)
            await stream.send_all(framed(right))
            assert await stream.receive_some(1)
            await refused(right)

    async def test_a_ticket_is_good_for_seconds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fastpath, "TICKET_LIFETIME_S", 0.2)
        async with fast() as a, fast() as b:
            await join(a, b)
            offer = await offer_of(a, b.peer_id)
            await trio.sleep(0.3)
            stream = await dial_tls(b.port)
            await stream.send_all(framed(GREETING.pack(Hello(offer.ticket, a._public_key, b._public_key, ECHO.id))))
            assert await until_closed(stream) == b""

    @pytest.mark.parametrize("stage", ["tcp", "half a handshake", "garbage", "tls", "half a hello", "a drip of hello"])
    async def test_who_is_slow_on_the_way_in_is_closed(self, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fastpath, "HELLO_TIMEOUT_S", 0.5)
        async with fast() as b:
            if stage in ("tcp", "half a handshake", "garbage"):
                stream: trio.abc.Stream = await trio.open_tcp_stream(LOCAL, b.port)
                if stage == "half a handshake":
                    await stream.send_all(b"\x16\x03\x01\x02\x00\x01")
                elif stage == "garbage":
                    await stream.send_all(os.urandom(2000))
            else:
                stream = await dial_tls(b.port)
                if stage != "tls":
                    await stream.send_all(struct.pack(">I", 200))
            began = trio.current_time()
            async with trio.open_nursery() as nursery:
                if stage == "a drip of hello":

                    async def drip() -> None:
                        try:
                            while True:
                                await stream.send_all(b"x")
                                await trio.sleep(0.05)
                        except trio.BrokenResourceError:
                            return

                    nursery.start_soon(drip)
                await until_closed(stream)
                nursery.cancel_scope.cancel()
            assert trio.current_time() - began < 3.0
            with trio.fail_after(DEADLINE_S):
                while b._strangers:  # noqa: ASYNC110
                    await trio.sleep(0.01)

    async def test_old_tls_is_not_spoken(self) -> None:
        context = client_context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        async with fast() as b:
            with pytest.raises(trio.BrokenResourceError):
                await dial_tls(b.port, context)

    async def test_a_flood_of_connections_is_bounded_and_bulk_streams_open_all_the_same(self) -> None:
        async with fast() as a, fast() as b:
            await join(a, b)
            flood = [socket.create_connection((LOCAL, b.port)) for _ in range(fastpath.STRANGERS_PER_IP_MAX)]
            for _ in range(2000):
                try:
                    with socket.create_connection((LOCAL, b.port), timeout=1):
                        pass
                except OSError:
                    continue
                await trio.lowlevel.checkpoint()
                assert b._strangers.total() <= fastpath.STRANGERS_PER_IP_MAX
            stream = await a.open_stream(b.peer_id, ECHO)
            assert not isinstance(stream, FastStream)
            await check_echo(stream)
            for sock in flood:
                sock.close()

    async def test_an_oversized_frame_ends_the_stream_and_counts_against_the_peer(self) -> None:
        async with fast() as a, fast() as b:
            await join(a, b)
            for _ in range(11):
                stream = await a.open_stream(b.peer_id, ECHO)
                stream._protocol = replace(ECHO, frame_max=1 << 30)  # type: ignore[attr-defined]
                with trio.fail_after(DEADLINE_S), pytest.raises((UnreachableError, trio.EndOfChannel)):
                    await check_echo(stream, ECHO.frame_max + 1)
                if not b.connections():
                    break
            with trio.fail_after(DEADLINE_S):
                while b.connections():  # noqa: ASYNC110
                    await trio.sleep(0.01)

    async def test_a_dropped_peer_loses_its_fast_streams_too(self) -> None:
        async with fast() as a, fast() as b:
            await join(a, b)
            stream = await a.open_stream(b.peer_id, ECHO)
            await check_echo(stream, 10)
            for _ in range(12):
                b.serving.note_misbehaviour(a.peer_id)
            with pytest.raises(UnreachableError), trio.fail_after(DEADLINE_S):
                await stream.receive()

    async def test_a_stream_cut_in_the_middle_does_not_end_in_order(self) -> None:
        spec = replace(ECHO, id="/test/cut/1")

        async def cut(stream: Stream) -> None:
            await stream.receive()
            assert isinstance(stream, FastStream)
            await stream._write(struct.pack(">I", 1000) + bytes(10))
            socket.socket.shutdown(stream._tls._sock, socket.SHUT_WR)
            await trio.sleep_forever()

        async with fast() as a, fast() as b:
            b.serve(spec, cut)
            await join(a, b)
            stream = await a.open_stream(b.peer_id, spec)
            await stream.send(b"go")
            with pytest.raises(UnreachableError), trio.fail_after(DEADLINE_S):
                await stream.receive()

    async def test_a_frame_that_drips_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = replace(ECHO, id="/test/drip/1", read_timeout_s=0.3)
        ended = trio.Event()

        async def reads(stream: Stream) -> None:
            try:
                await stream.receive()
            finally:
                ended.set()

        async with fast() as a, fast() as b:
            b.serve(spec, reads)
            await join(a, b)
            stream = await a.open_stream(b.peer_id, spec)
            assert isinstance(stream, FastStream)
            await stream._write(struct.pack(">I", 20_000))

            async def drip() -> None:
                while True:
                    await stream._write(b"x")
                    await trio.sleep(0.02)

            with trio.fail_after(DEADLINE_S), pytest.raises(UnreachableError):
                await drip()
            assert ended.is_set()


class TestTickets:
    def test_bounds(self) -> None:
        tickets = Tickets()
        for number in range(TICKETS_PER_PEER_MAX):
            assert tickets.tell(number.to_bytes(32, "big"), "one", 0.0)
        assert not tickets.tell(b"x" * 32, "one", 1.0)
        told = TICKETS_PER_PEER_MAX
        while tickets.tell(told.to_bytes(32, "big"), f"peer {told}", 1.0):
            told += 1
        assert told == TICKETS_MAX
        assert tickets.tell(b"x" * 32, "one", fastpath.TICKET_LIFETIME_S + 0.5)

    @given(st.lists(st.tuples(st.sampled_from(["tell", "show"]), st.integers(0, 5), st.integers(0, 2), st.floats(0, 6))))
    def test_each_is_good_once_for_its_peer_and_in_time(self, steps: list[tuple[str, int, int, float]]) -> None:
        tickets, now_s = Tickets(), 0.0
        told: dict[bytes, tuple[str, float]] = {}
        serial = 0
        for kind, pick, peer, pause_s in steps:
            now_s += pause_s
            if kind == "tell":
                serial += 1
                ticket = serial.to_bytes(32, "big")
                assert tickets.tell(ticket, str(peer), now_s)
                told[ticket] = (str(peer), now_s + fastpath.TICKET_LIFETIME_S)
            elif told:
                ticket = list(told)[pick % len(told)]
                owner, until_s = told.pop(ticket)
                assert tickets.show(ticket, now_s) == (owner if until_s > now_s else None)
                assert tickets.show(ticket, now_s) is None

    @given(raw=st.binary(max_size=80))
    def test_any_bytes_are_a_message_or_malformed(self, raw: bytes) -> None:
        for messages in (CONTROL, GREETING):
            try:
                assert messages.pack(messages.unpack(raw)) == raw
            except MalformedError:
                continue


async def test_too_many_offers_are_declined() -> None:
    async with fast() as a, fast() as b:
        await join(a, b)
        stream = await a.open_stream(b.peer_id, FASTPATH)
        answers = []
        for _ in range(TICKETS_PER_PEER_MAX + 1):
            await stream.send(CONTROL.pack(Seek(1)))
            answers.append(CONTROL.unpack(await stream.receive()))
        assert isinstance(answers[-1], Declined)
        assert all(isinstance(answer, Offer) for answer in answers[:-1])
        await check_echo(await a.open_stream(b.peer_id, ECHO))


async def test_a_peer_that_is_reached_through_a_relay_only_gets_plain_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for one that cannot be reached at all: no address of its connections is an IP address."""
    relay = Identity(os.urandom(32)).peer_id
    async with fast() as a, fast() as b:
        await join(a, b)
        direct = a._below.connections
        circuit = f"/ip4/192.0.2.1/tcp/4510/p2p/{relay}/p2p-circuit"
        monkeypatch.setattr(a._below, "connections", lambda: [replace(one, address=circuit) for one in direct()])
        await check_echo(await a.open_stream(b.peer_id, ECHO))
        assert (a.opened_fast, a.opened_below) == (0, 1)

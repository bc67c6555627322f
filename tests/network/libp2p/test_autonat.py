"""Seeing oneself through peers' eyes: dialling back and being dialled back, and what liars make of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import pytest
import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.host.autonat.pb.autonat_pb2 import Message
from libp2p.peer.id import ID
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from nexus.network.addresses import Endpoint
from nexus.network.libp2p.autonat import AUTONAT, REQUESTS_BURST
from nexus.network.libp2p.circuit import muxed_of, read_message, write_message
from nexus.network.reachability import LOCAL_ONLY, LOOPBACK, MAPPING_NONE, UNKNOWN, DialBack

if TYPE_CHECKING:
    from tests.network.libp2p.conftest import Attacker, OpenNode

Attack = Callable[..., AbstractAsyncContextManager["Attacker"]]
DEADLINE_S = 20.0


async def ask(attacker: Attacker, *addresses: str, peer: bytes = b"") -> Message.DialResponse:
    request = Message(type=Message.DIAL)
    request.dial.peer.id = peer or ID.from_base58(attacker.node.peer_id).to_bytes()
    request.dial.peer.addrs.extend(Multiaddr(address).to_bytes() for address in addresses)
    stream = await attacker.stream(AUTONAT)
    await write_message(stream, request)
    answer = Message()
    await read_message(stream, answer, timeout_s=DEADLINE_S)
    return answer.dialResponse


async def test_only_the_askers_own_address_is_dialled(attack: Attack) -> None:
    """Else anybody could have this node knock at strangers' doors."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.2")
    async with attack() as attacker, listener:
        port = listener.socket.getsockname()[1]
        answer = await ask(attacker, f"/ip4/127.0.0.2/tcp/{port}", "/dns4/localhost/tcp/1", "/ip6/::1/tcp/1")
        assert answer.status == Message.E_DIAL_REFUSED
        with trio.move_on_after(0.2) as nobody:
            await listener.accept()
        assert nobody.cancelled_caught


async def test_dialled_back_where_it_listens_and_nowhere_else(attack: Attack) -> None:
    async with attack() as attacker:
        (own,) = attacker.node._listening()
        assert (await ask(attacker, str(own))).status == Message.OK
        with trio.socket.socket() as closed:
            await closed.bind(("127.0.0.1", 0))
            shut = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}"
            answer = await ask(attacker, shut)
            assert (answer.status, answer.statusText) == (Message.E_DIAL_ERROR, "connection refused")
        # Another peer listens there: not this one.
        answer = await ask(attacker, str(attacker.victim._listening()[0]))
        assert answer.status == Message.E_DIAL_ERROR


async def test_a_request_in_anothers_name_is_refused(attack: Attack) -> None:
    async with attack() as attacker:
        own = str(attacker.node._listening()[0])
        assert (await ask(attacker, own, peer=os.urandom(38))).status == Message.E_BAD_REQUEST


async def test_requests_are_counted(attack: Attack) -> None:
    async with attack() as attacker:
        own = str(attacker.node._listening()[0])
        answers = [(await ask(attacker, own)).status for _ in range(REQUESTS_BURST + 2)]
        assert Message.E_DIAL_REFUSED in answers


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        (Message.DialResponse(status=Message.OK, addr=Multiaddr("/ip4/127.0.0.1/tcp/1").to_bytes()), "refused"),
        (Message.DialResponse(status=Message.E_DIAL_ERROR, statusText="no \x1b[31m\n" + "x" * 500), "failed"),
        (Message.DialResponse(status=Message.E_DIAL_REFUSED), "refused"),
        (Message.DialResponse(), "ok or refused"),
    ],
)
async def test_what_a_peer_claims_is_not_what_is_believed(open_node: OpenNode, answer: Message.DialResponse, result: str) -> None:
    async def lie(stream: INetStream) -> None:
        muxed = muxed_of(stream)
        await read_message(muxed, Message())
        await write_message(muxed, Message(type=Message.DIAL_RESPONSE, dialResponse=answer))
        muxed.close_write_now()

    async with open_node() as liar, open_node() as node:
        liar._host.set_stream_handler(TProtocol(AUTONAT), lie)
        await node.connect(liar.addresses[0])
        conn = await node._connection(liar.peer_id)
        with trio.fail_after(DEADLINE_S):
            heard = await node._traversal.mirror.dial_back(conn, Endpoint("ip4", "127.0.0.1", 1))
        assert heard.result in result
        assert heard.result != "ok"
        assert heard.detail.isprintable() or not heard.detail
        assert len(heard.detail) <= 120


async def test_a_check_without_peers_knows_nothing(open_node: OpenNode) -> None:
    async with open_node() as node:
        report = await node.netcheck()
    assert (report.verdict, report.nat, report.peers, report.asked) == (UNKNOWN, "unknown", 0, 0)
    assert [check.tried for check in report.addresses] == [()]
    assert "network.listen" in report.advice[0]  # it listens on this machine only


async def test_a_check_on_one_machine(open_node: OpenNode) -> None:
    async with open_node() as node, open_node() as peer:
        await node.connect(peer.addresses[0])
        with trio.fail_after(DEADLINE_S):
            while (report := await node.netcheck()).asked == 0:  # noqa: ASYNC110
                await trio.sleep(0.05)  # until identify has told what the peer speaks
    (own,) = report.addresses
    assert (report.verdict, report.scope) == (LOCAL_ONLY, LOOPBACK)
    assert (report.nat, report.mapping) == ("none", MAPPING_NONE)
    assert own.reached
    assert own.tried == (DialBack(peer.peer_id, own.address, "ok"),)
    assert report.relays == ()
    assert not report.relay_service


async def test_a_peer_that_says_nothing_holds_up_no_check(open_node: OpenNode, mock_clock: trio.testing.MockClock) -> None:
    async def silence(stream: INetStream) -> None:
        await trio.sleep_forever()

    async with open_node() as mute, open_node() as node:
        mute._host.set_stream_handler(TProtocol(AUTONAT), silence)
        mock_clock.rate = 1
        await node.connect(mute.addresses[0])
        with trio.fail_after(5):
            while not node._traversal._servers():  # noqa: ASYNC110
                await trio.sleep(0.01)
        mock_clock.rate = 20
        with trio.fail_after(60):
            report = await node.netcheck()
        mock_clock.rate = 1
    assert report.verdict == UNKNOWN


async def test_a_peer_that_has_been_asked_enough_takes_nothing_back(open_node: OpenNode) -> None:
    """Checks in a row used up its patience: the node then knew nothing, and gave up its relays."""
    async with open_node() as node, open_node() as peer:
        await node.connect(peer.addresses[0])
        with trio.fail_after(DEADLINE_S):
            while (await node.netcheck()).verdict == UNKNOWN:  # noqa: ASYNC110
                await trio.sleep(0.05)
        conn = await node._connection(peer.peer_id)
        own = node._listening()[0]
        for _ in range(REQUESTS_BURST + 1):
            last = await node._traversal.mirror.dial_back(conn, own)
        assert (last.result, last.detail) == ("refused", "asked too often")
        await node._traversal._ask(conn)
        assert (await node.netcheck()).verdict == LOCAL_ONLY


async def test_while_nobody_says_anything_relays_are_kept(open_node: OpenNode) -> None:
    async with open_node() as node:
        traversal = node._traversal
        traversal._listen = lambda: [Endpoint("ip4", "192.168.1.4", 4510)]
        traversal.relays.wanted = True
        assert traversal._wants_relays()
        traversal.relays.wanted = False
        assert not traversal._wants_relays()

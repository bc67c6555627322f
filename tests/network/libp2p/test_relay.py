"""Circuit relay v2 between real nodes on loopback: reaching a peer through another one, and the relay's bounds."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest
import trio
from libp2p.io.exceptions import IOException
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, Status, StopMessage
from libp2p.stream_muxer.exceptions import MuxedStreamError

from nexus.core.errors import NexusError, UnreachableError
from nexus.core.keys import Identity
from nexus.network.libp2p.adapter import Libp2pTransport
from nexus.network.libp2p.circuit import HOP, STOP, RelayService, read_message, write_message
from nexus.network.relaying import RelayLimits
from nexus.network.transport import PeerAddress, ProtocolSpec
from tests.network.libp2p.conftest import ECHO

if TYPE_CHECKING:
    from tests.network.libp2p.conftest import Attacker, OpenNode

Attack = Callable[..., AbstractAsyncContextManager["Attacker"]]
DEADLINE_S = 20.0
LARGE = ProtocolSpec("/test/large/1", frame_max=8 << 20)


@asynccontextmanager
async def relayed(
    open_node: OpenNode, limits: RelayLimits
) -> AsyncIterator[tuple[Libp2pTransport, Libp2pTransport, Libp2pTransport]]:
    """A relay, a node that keeps a place there as one behind a NAT would, and a stranger that knows the way through the relay."""
    async with open_node(relay=limits) as relay, open_node() as hidden, open_node() as stranger:
        for node in (hidden, stranger):
            hide(node)
        await hidden.connect(relay.addresses[0])
        hidden._traversal._wants_relays = lambda: True  # type: ignore[method-assign]  # on loopback it sees that it is reached
        await until(lambda: bool(hidden._traversal.relays.reservations()))
        yield relay, hidden, stranger


def hide(node: Libp2pTransport) -> None:
    """Tell nobody where the node listens."""
    node._own = node._traversal.addresses = node._traversal.relays.addresses  # type: ignore[method-assign]


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(DEADLINE_S):
        while not holds():  # noqa: ASYNC110 - what is waited for is far away, in tasks of other nodes
            await trio.sleep(0.01)


def service_of(relay: Libp2pTransport) -> RelayService:
    assert relay._traversal.service is not None
    return relay._traversal.service


def through(hidden: Libp2pTransport) -> str:
    (reservation,) = hidden._traversal.relays.reservations()
    return f"{reservation.address}/p2p/{hidden.peer_id}"


async def test_a_peer_is_reached_through_a_relay(open_node: OpenNode) -> None:
    async with relayed(open_node, RelayLimits()) as (relay, hidden, stranger):
        address = through(hidden)
        assert address in hidden.addresses
        with trio.fail_after(DEADLINE_S):
            assert await stranger.connect(address) == hidden.peer_id
            stream = await stranger.open_stream(hidden.peer_id, ECHO)
            await stream.send(b"through")
            assert await stream.receive() == b"through"
            assert await stranger.ping(hidden.peer_id) > 0
            # The other way on the same connection.
            back = await hidden.open_stream(stranger.peer_id, ECHO)
            await back.send(b"and back")
            assert await back.receive() == b"and back"
        (seen,) = [one for one in stranger.connections() if one.peer_id == hidden.peer_id]
        assert seen.address == address.rpartition("/p2p/")[0]
        assert service_of(relay).ledger.circuits == 1


async def test_others_tell_the_way_to_a_peer_that_took_a_relay(open_node: OpenNode) -> None:
    """The stranger heard of the hidden node before it had a place at the relay, and knows only what does not work."""
    async with relayed(open_node, RelayLimits()) as (relay, hidden, stranger):
        await stranger.connect(relay.addresses[0])
        stranger.learn(PeerAddress(hidden.peer_id, ("/ip4/127.0.0.1/tcp/1",)))
        known = relay._swarm.peerstore
        await until(lambda: any("p2p-circuit" in str(one) for one in known.addrs(ID.from_base58(hidden.peer_id))))
        with trio.fail_after(DEADLINE_S):
            stream = await stranger.open_stream(hidden.peer_id, ECHO)
            await stream.send(b"found")
            assert await stream.receive() == b"found"


async def test_megabytes_through_a_relay(open_node: OpenNode) -> None:
    async def give_back(stream: object) -> None:
        await stream.send(await stream.receive())  # type: ignore[attr-defined]

    async with relayed(open_node, RelayLimits()) as (_, hidden, stranger):
        hidden.serve(LARGE, give_back)
        await stranger.connect(through(hidden))
        data = os.urandom(6 << 20)
        with trio.fail_after(DEADLINE_S):
            stream = await stranger.open_stream(hidden.peer_id, LARGE)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send, data)
                assert await stream.receive() == data


async def test_thousands_of_small_messages_through_a_relay(open_node: OpenNode) -> None:
    """What paces the messages of the library's protocols must not pace what a circuit carries."""
    async with relayed(open_node, RelayLimits()) as (_, hidden, stranger):
        await stranger.connect(through(hidden))
        stream = await stranger.open_stream(hidden.peer_id, ECHO)
        with trio.fail_after(2 * DEADLINE_S):
            for number in range(3000):
                await stream.send(b"%d" % number)
                assert await stream.receive() == b"%d" % number


async def test_a_direct_connection_is_used_before_one_through_a_relay(open_node: OpenNode) -> None:
    async with relayed(open_node, RelayLimits()) as (relay, hidden, stranger):
        await stranger.connect(through(hidden))
        await stranger._swarm.dial_endpoint(ID.from_base58(hidden.peer_id), str(hidden._listening()[0]))
        assert len([one for one in stranger.connections() if one.peer_id == hidden.peer_id]) == 2
        await relay.disconnect(stranger.peer_id)
        with trio.fail_after(DEADLINE_S):
            stream = await stranger.open_stream(hidden.peer_id, ECHO)
            await stream.send(b"direct")
            assert await stream.receive() == b"direct"


async def test_who_has_no_place_is_not_reached(open_node: OpenNode) -> None:
    async with relayed(open_node, RelayLimits()) as (relay, hidden, stranger), open_node() as other:
        await other.connect(relay.addresses[0])
        prefix = through(hidden).rpartition("/p2p/")[0]
        with pytest.raises(UnreachableError, match="NO_RESERVATION"):
            await stranger.connect(f"{prefix}/p2p/{other.peer_id}")
        with pytest.raises(UnreachableError, match="relay"):
            await stranger.connect(f"{other.addresses[0]}/p2p-circuit/p2p/{hidden.peer_id}")


async def test_another_peer_cannot_answer_in_its_place(open_node: OpenNode) -> None:
    """The relay connects, but the handshake runs end to end."""
    async with relayed(open_node, RelayLimits()) as (relay, hidden, stranger):
        claimed = Identity(os.urandom(32)).peer_id
        target = relay._swarm.get_connections(ID.from_base58(hidden.peer_id))

        class Lying:
            def get_connections(self, peer_id: ID) -> object:
                return target

        service = service_of(relay)
        service.ledger._places[claimed] = service.ledger._places[hidden.peer_id]
        service._swarm = Lying()  # type: ignore[assignment]
        with pytest.raises(UnreachableError, match="another peer answers there"):
            await stranger.connect(f"{through(hidden).rpartition('/p2p/')[0]}/p2p/{claimed}")


async def test_a_circuit_is_cut_when_it_has_carried_what_it_may(open_node: OpenNode) -> None:
    async with relayed(open_node, RelayLimits(circuit_bytes=300_000)) as (relay, hidden, stranger):
        await stranger.connect(through(hidden))
        stream = await stranger.open_stream(hidden.peer_id, ECHO)

        async def talk() -> None:
            while True:
                await stream.send(bytes(1000))
                await stream.receive()

        with trio.fail_after(DEADLINE_S), pytest.raises(UnreachableError):
            await talk()
        await until(lambda: not service_of(relay).ledger.circuits and not stranger._live(ID.from_base58(hidden.peer_id)))
        # And may be opened anew.
        with trio.fail_after(DEADLINE_S):
            stream = await stranger.open_stream(hidden.peer_id, ECHO)
            await stream.send(b"again")
            assert await stream.receive() == b"again"


async def test_a_circuit_is_cut_when_its_time_is_up(open_node: OpenNode) -> None:
    async with relayed(open_node, RelayLimits(circuit_s=0.5)) as (relay, hidden, stranger):
        await stranger.connect(through(hidden))
        await until(lambda: not service_of(relay).ledger.circuits and not stranger._live(ID.from_base58(hidden.peer_id)))


async def test_a_relay_refuses_more_circuits_than_it_grants(open_node: OpenNode) -> None:
    async with (
        relayed(open_node, RelayLimits(circuits_per_peer=1)) as (_, hidden, stranger),
        open_node() as second,
    ):
        await stranger.connect(through(hidden))
        with pytest.raises(UnreachableError, match="RESOURCE_LIMIT_EXCEEDED"):
            await second.connect(through(hidden))


async def test_a_place_goes_with_the_connection_and_is_taken_again(open_node: OpenNode) -> None:
    async with relayed(open_node, RelayLimits()) as (relay, hidden, _):
        service = service_of(relay)
        assert service.ledger.reservations == 1
        await hidden.disconnect(relay.peer_id)
        await until(lambda: service.ledger.reservations == 0)
        assert hidden._traversal.relays.addresses() == []
        await hidden.connect(relay.addresses[0])
        await until(lambda: service.ledger.reservations == 1)


async def ask_hop(attacker: Attacker, message: HopMessage) -> HopMessage:
    stream = await attacker.stream(HOP)
    await write_message(stream, message)
    answer = HopMessage()
    await read_message(stream, answer)
    return answer


async def test_garbage_and_nonsense_at_a_relay(attack: Attack) -> None:
    hops = [
        (HopMessage(type=HopMessage.CONNECT), Status.MALFORMED_MESSAGE),
        (HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=b"\xff" * 4000)), Status.MALFORMED_MESSAGE),
        (HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=b"")), Status.MALFORMED_MESSAGE),
        (HopMessage(type=HopMessage.STATUS), Status.UNEXPECTED_MESSAGE),
    ]
    async with attack(relay=RelayLimits()) as attacker:
        for message, status in hops:
            with trio.fail_after(DEADLINE_S):
                assert (await ask_hop(attacker, message)).status == status
        own = PeerId(id=ID.from_base58(attacker.node.peer_id).to_bytes())
        assert (await ask_hop(attacker, HopMessage(type=HopMessage.RESERVE))).status == Status.OK
        # To itself through the relay: a loop that costs only the relay.
        assert (await ask_hop(attacker, HopMessage(type=HopMessage.CONNECT, peer=own))).status == Status.NO_RESERVATION
        for data in (os.urandom(200), b"\xff" * 20, b"\x00", b""):
            for protocol in (HOP, STOP, "/libp2p/autonat/1.0.0", "/libp2p/dcutr"):
                with suppress(NexusError, MuxedStreamError, IOException), trio.move_on_after(3):
                    stream = await attacker.stream(protocol)
                    await stream.write(data)
                    await stream.close()
                    while await stream.read(4096):
                        pass


async def test_requests_to_a_relay_are_counted(attack: Attack) -> None:
    async with attack(relay=RelayLimits(requests_burst=5)) as attacker:
        answers = [(await ask_hop(attacker, HopMessage(type=HopMessage.RESERVE))).status for _ in range(8)]
        assert answers == [Status.OK] * 5 + [Status.RESOURCE_LIMIT_EXCEEDED] * 3


async def test_only_a_relay_that_was_asked_brings_circuits(attack: Attack) -> None:
    async with attack() as attacker:
        stream = await attacker.stream(STOP)
        peer = PeerId(id=ID.from_base58(attacker.node.peer_id).to_bytes())
        await write_message(stream, StopMessage(type=StopMessage.CONNECT, peer=peer))
        answer = StopMessage()
        await read_message(stream, answer)
        assert answer.status == Status.PERMISSION_DENIED

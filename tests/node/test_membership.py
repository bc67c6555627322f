"""Records travel first-hand, strangers are introduced, models are announced, and hostile peers change nothing."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import trio
import trio.testing

from nexus.core.errors import LocalError, MalformedError, NexusError, PeerError, TimedOutError, UnreachableError, VerificationError
from nexus.core.keys import Identity
from nexus.network.simulated import SimulatedNetwork, SimulatedTransport
from nexus.network.transport import Message, Stream
from nexus.node import membership as membership_module
from nexus.node.membership import GOSSIP, INTRODUCTIONS_MAX, NODE, TOPIC, Introduction, Introductions, Membership, News, Told
from nexus.swarm.membership import Holding, NodeRecord, SignedNodeRecord, provider_key
from tests.swarm.node_records import holding, node_record

EPOCH_MS = 1_700_000_000_000
MODEL = b"m" * 32
Clock = trio.testing.MockClock


def identity_of(number: int) -> Identity:
    return Identity(number.to_bytes(32, "big"))


class Node:
    """A running membership on the simulated network, with a wall clock that may be wrong."""

    def __init__(self, transport: SimulatedTransport, identity: Identity, name: str, skew_ms: int = 0) -> None:
        self.transport = transport
        self.identity = identity
        self.name = name
        self.models: tuple[Holding, ...] = ()
        self.leaving = 0
        self.described = 0
        self.skew_ms = skew_ms
        self.slashed: set[bytes] = set()
        self.membership = Membership(transport, identity, self._describe, self.now_ms, lambda key: key in self.slashed)
        self.scope = trio.CancelScope()

    @property
    def peer_id(self) -> str:
        return self.transport.peer_id

    @property
    def address(self) -> str:
        return self.transport.addresses[0]

    def now_ms(self) -> int:
        return EPOCH_MS + self.skew_ms + int(trio.current_time() * 1000)

    def _describe(self) -> NodeRecord:
        self.described += 1
        addresses = tuple(address.rpartition("/p2p/")[0] for address in self.transport.addresses)
        return node_record(bytes(32), name=self.name, addresses=addresses, models=self.models, leaving=self.leaving)

    def knows(self) -> dict[str, str]:
        return {record.peer_id: record.name for record in self.membership.records()}


class Swarm:
    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.network = SimulatedNetwork(5)
        self._count = 0

    async def transport(self) -> tuple[SimulatedTransport, Identity]:
        self._count += 1
        identity = identity_of(self._count)
        return await self._nursery.start(self._hold, identity), identity

    async def node(self, skew_ms: int = 0) -> Node:
        transport, identity = await self.transport()
        node = Node(transport, identity, f"node{self._count}", skew_ms)
        await self._nursery.start(self._run, node)
        return node

    async def hostile(self, handler: Callable[[Stream], Awaitable[None]]) -> SimulatedTransport:
        transport, _ = await self.transport()
        transport.serve(NODE, handler)
        return transport

    async def _hold(self, identity: Identity, *, task_status: trio.TaskStatus[SimulatedTransport]) -> None:
        async with self.network.open(identity) as transport:
            task_status.started(transport)
            await trio.sleep_forever()

    async def _run(self, node: Node, *, task_status: trio.TaskStatus[None]) -> None:
        with node.scope:
            await node.membership.run(task_status=task_status)


@pytest.fixture
def swarm(nursery: trio.Nursery) -> Swarm:
    return Swarm(nursery)


async def until(condition: Callable[[], bool], within_s: float) -> None:
    """In virtual time, so looking again and again costs nothing."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await trio.sleep(0.05)


class TestExchange:
    async def test_both_sides_know_each_other_after_contact(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.node(), await swarm.node()
        await one.transport.connect(two.address)
        await until(lambda: one.knows() == {two.peer_id: "node2"} and two.knows() == {one.peer_id: "node1"}, 5)

    async def test_refresh_returns_what_the_peer_says_now(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.node(), await swarm.node()
        await one.transport.connect(two.address)
        assert (await one.membership.refresh(two.peer_id)).name == "node2"
        two.name = "renamed"
        two.membership.announce_soon()
        assert (await one.membership.refresh(two.peer_id)).name == "renamed"
        assert (await one.membership.refresh(one.peer_id)).name == "node1"

    async def test_everyone_meets_everyone_by_introduction(self, swarm: Swarm, autojump_clock: Clock) -> None:
        """A chain of five, each of which dials only the one before."""
        nodes = [await swarm.node() for _ in range(5)]
        for one, other in zip(nodes[1:], nodes, strict=False):
            await one.transport.connect(other.address)
        everyone = {node.peer_id for node in nodes}
        await until(lambda: all(node.knows().keys() | {node.peer_id} == everyone for node in nodes), 300)

    async def test_convicted_nodes_are_neither_listed_nor_introduced(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two, three = [await swarm.node() for _ in range(3)]
        await one.transport.connect(two.address)
        await until(lambda: len(one.knows()) == 1, 5)
        one.slashed.add(two.identity.public_key)
        assert one.knows() == {}
        assert one.membership.names() == {two.peer_id: "node2"}
        await three.transport.connect(one.address)
        await until(lambda: one.peer_id in three.knows(), 5)
        introduced = {introduction.node for introduction in one.membership._introductions(three.peer_id).nodes}
        assert two.identity.public_key not in introduced
        # Nor does it help to be introduced by somebody else.
        three.slashed.add(two.identity.public_key)
        await three.transport.connect(two.address)
        await trio.sleep(30)
        assert three.knows() == {one.peer_id: "node1"}

    async def test_news_travels_by_gossip_well_before_the_next_round(self, swarm: Swarm, autojump_clock: Clock) -> None:
        nodes = [await swarm.node() for _ in range(4)]
        for node in nodes[1:]:
            await node.transport.connect(nodes[0].address)
        await until(lambda: all(len(node.knows()) == 3 for node in nodes), 300)
        await trio.sleep(20)
        nodes[3].models = (holding("nano", MODEL, (0, 4)),)
        nodes[3].membership.announce_soon()

        def told(node: Node) -> bool:
            return any(record.models for record in node.membership.records())

        await until(lambda: all(told(node) for node in nodes[:3]), 5)

    async def test_a_node_that_is_gone_is_no_member_for_long(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.node(), await swarm.node()
        await one.transport.connect(two.address)
        await until(lambda: len(one.knows()) == 1, 5)
        swarm.network.crash(two.peer_id)
        await until(lambda: not one.knows(), 30)

    async def test_a_node_that_stays_is_never_lost(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.node(), await swarm.node()
        await one.transport.connect(two.address)
        await until(lambda: len(one.knows()) == 1, 5)
        for _ in range(120):
            await trio.sleep(30)
            assert one.knows() == {two.peer_id: "node2"}
            assert two.knows() == {one.peer_id: "node1"}

    async def test_an_idle_node_describes_itself_seldom(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.node(), await swarm.node()
        await one.transport.connect(two.address)
        await trio.sleep(10)
        before = one.described
        await trio.sleep(600)
        assert one.described - before <= 11

    async def test_a_node_that_cannot_look_says_what_it_said_last(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one = await swarm.node()
        said = one.membership.own().record

        def failing() -> NodeRecord:
            raise LocalError("a manifest is damaged")

        one.membership._describe = failing  # type: ignore[method-assign]
        one.membership.announce_soon()
        await trio.sleep(300)
        assert replace(one.membership.own().record, issued_ms=said.issued_ms) == said

    @pytest.mark.parametrize("years", [-30, -1 / 365 / 24, 1 / 365 / 24, 30])
    async def test_a_wrong_clock_is_named_on_both_sides(self, swarm: Swarm, autojump_clock: Clock, years: float) -> None:
        one, other, off = await swarm.node(), await swarm.node(), await swarm.node(skew_ms=int(years * 365 * 86_400_000))
        await one.transport.connect(other.address)
        await until(lambda: len(one.knows()) == 1, 5)
        await off.transport.connect(one.address)
        with pytest.raises(VerificationError) as here:
            await one.membership.refresh(off.peer_id)
        assert ("expired" if years < 0 else "from the future") in here.value.cause
        assert here.value.fix == "Set the clock of that node: 1 other node agrees with the one here"
        with pytest.raises(VerificationError) as there:
            await off.membership.refresh(one.peer_id)
        assert ("from the future" if years < 0 else "expired") in there.value.cause
        assert "this one first" in there.value.fix
        assert off.knows() == {}
        assert one.knows() == {other.peer_id: "node2"}
        # Set right, it is a member within the minute.
        off.skew_ms = 0
        off.membership.announce_soon()
        await until(lambda: off.peer_id in one.knows() and one.peer_id in off.knows(), 200)


class TestConvergence:
    async def joined(self, swarm: Swarm, count: int) -> list[Node]:
        """All over one that everybody knows."""
        nodes = [await swarm.node() for _ in range(count)]
        for node in nodes[1:]:
            await node.transport.connect(nodes[0].address)
        await until(lambda: all(len(node.knows()) == count - 1 for node in nodes), 60)
        return nodes

    async def test_who_joins_knows_everybody_and_is_known_within_seconds(self, swarm: Swarm, autojump_clock: Clock) -> None:
        nodes = await self.joined(swarm, 40)
        await trio.sleep(200)
        new = await swarm.node()
        await new.transport.connect(nodes[7].address)
        await until(lambda: all(new.peer_id in node.knows() for node in nodes), 5)
        await until(lambda: len(new.knows()) == 40, 10)

    @pytest.mark.parametrize("minutes", [1, 6, 60])
    async def test_after_a_partition_everybody_knows_everybody_within_half_a_minute(
        self, swarm: Swarm, autojump_clock: Clock, minutes: int
    ) -> None:
        nodes = await self.joined(swarm, 12)
        everyone = {node.peer_id for node in nodes}
        left, right = nodes[:5], nodes[5:]
        swarm.network.partition([[node.peer_id for node in left], [node.peer_id for node in right]])
        await trio.sleep(60 * minutes)
        if minutes > 10:  # records live as long
            assert all(len(node.knows()) <= 4 for node in left)
            assert all(len(node.knows()) <= 6 for node in right)
        swarm.network.heal()
        await until(lambda: all(node.knows().keys() | {node.peer_id} == everyone for node in nodes), 30)

    async def test_an_idle_swarm_says_little(self, swarm: Swarm, autojump_clock: Clock) -> None:
        nodes = await self.joined(swarm, 12)
        said: list[int] = []
        for node in nodes:
            real = node.transport.publish

            async def publish(topic: str, data: bytes, real: Callable[[str, bytes], Awaitable[None]] = real) -> None:
                said.append(len(data))
                await real(topic, data)

            node.transport.publish = publish  # type: ignore[method-assign]
        await trio.sleep(1200)
        assert 12 * 9 <= len(said) <= 12 * 11
        assert max(said) <= 1024

    async def test_one_that_leaves_in_order_is_known_to_leave_at_once_and_dropped_with_its_connection(
        self, swarm: Swarm, autojump_clock: Clock
    ) -> None:
        nodes = await self.joined(swarm, 6)
        await trio.sleep(30)
        nodes[3].leaving = 1
        nodes[3].membership.announce_soon()

        def leaving(node: Node) -> bool:
            return any(record.peer_id == nodes[3].peer_id and record.leaving for record in node.membership.records())

        await until(lambda: all(leaving(node) for node in nodes if node is not nodes[3]), 3)
        swarm.network.crash(nodes[3].peer_id)
        await until(lambda: nodes[3].peer_id not in nodes[0].knows(), 3)

    async def test_every_node_leaving_at_once_leaves_one_that_knows_nobody_and_runs_on(
        self, swarm: Swarm, autojump_clock: Clock
    ) -> None:
        nodes = await self.joined(swarm, 10)
        for node in nodes[1:]:
            swarm.network.crash(node.peer_id)
        await until(lambda: not nodes[0].knows(), 60)
        await trio.sleep(7200)
        new = await swarm.node()
        await new.transport.connect(nodes[0].address)
        await until(lambda: nodes[0].knows().keys() == {new.peer_id}, 5)


class TestHostile:
    async def test_gossip_speaks_only_for_its_publisher(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, victim = await swarm.node(), await swarm.node()
        liar, identity = await swarm.transport()
        await liar.connect(one.address)
        stolen = victim.membership.own()
        future = replace(stolen.record, node=identity.public_key, issued_ms=one.now_ms() + 10**9)
        for signed in (stolen, SignedNodeRecord.sign(future, identity), SignedNodeRecord(future, bytes(64))):
            await liar.publish(TOPIC, GOSSIP.pack(Told(signed)))
        await trio.sleep(5)
        assert one.knows() == {}

    async def test_strangers_by_the_thousand_make_nobody_shout(self, swarm: Swarm, autojump_clock: Clock) -> None:
        """Each new name is a reason to publish; thousands of them are none to do it more often than every second."""
        one = await swarm.node()
        said: list[float] = []
        real = one.transport.publish

        async def publish(topic: str, data: bytes) -> None:
            said.append(trio.current_time())
            await real(topic, data)

        one.transport.publish = publish  # type: ignore[method-assign]
        spammer, _ = await swarm.transport()
        await spammer.connect(one.address)
        for number in range(1000, 1600):
            name = Identity(number.to_bytes(32, "big"))
            record = node_record(name.public_key, issued_ms=one.now_ms())
            message = Message(name.peer_id, GOSSIP.pack(Told(SignedNodeRecord.sign(record, name))))
            one.transport.subscribers.deliver(TOPIC, message)
            await trio.sleep(0.05)
        assert len(one.knows()) == 600
        assert len(said) <= 32
        assert len(one.membership._lost) <= membership_module.LOST_MAX

    async def test_a_record_of_another_node_is_refused(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, victim = await swarm.node(), await swarm.node()
        stolen = victim.membership.own()

        async def steal(stream: Stream) -> None:
            await stream.receive()
            await stream.send(stolen.to_bytes())
            await stream.send(Introductions(()).to_bytes())

        thief = await swarm.hostile(steal)
        await one.transport.connect(thief.addresses[0])
        with pytest.raises(VerificationError, match="another node") as caught:
            await one.membership.refresh(thief.peer_id)
        assert caught.value.peer == thief.peer_id
        assert one.knows() == {}

    @pytest.mark.parametrize(
        ("frames", "error"),
        [
            ([b""], MalformedError),
            ([b"\xff" * 50], MalformedError),
            ([bytes(40_000)], PeerError),
            ([], UnreachableError),
            ([b"record"], UnreachableError),
            ([b"record", b"\x80"], MalformedError),
        ],
    )
    async def test_garbage_leads_to_an_error_that_names_the_peer(
        self, swarm: Swarm, autojump_clock: Clock, frames: list[bytes], error: type[NexusError]
    ) -> None:
        one = await swarm.node()

        async def answer(stream: Stream) -> None:
            stream._protocol = replace(NODE, frame_max=1 << 20)  # type: ignore[attr-defined]
            for frame in frames:
                await stream.send(record if frame == b"record" else frame)

        peer = await swarm.hostile(answer)
        record = b""
        template = node_record(identity_of(2).public_key, issued_ms=one.now_ms())
        record = SignedNodeRecord.sign(template, identity_of(2)).to_bytes()
        await one.transport.connect(peer.addresses[0])
        with pytest.raises(error) as caught:
            await one.membership.refresh(peer.peer_id)
        assert isinstance(caught.value, PeerError)
        assert caught.value.peer == peer.peer_id

    async def test_a_peer_that_stalls_costs_its_deadline_and_no_more(self, swarm: Swarm, autojump_clock: Clock) -> None:
        async def stall(stream: Stream) -> None:
            await trio.sleep_forever()

        one, two, peer = await swarm.node(), await swarm.node(), await swarm.hostile(stall)
        await one.transport.connect(peer.addresses[0])
        await one.transport.connect(two.address)
        with trio.fail_after(membership_module.EXCHANGE_TIMEOUT_S + 1), pytest.raises(TimedOutError):
            await one.membership.refresh(peer.peer_id)
        assert one.knows() == {two.peer_id: "node2"}

    async def test_a_dialler_that_stalls_or_lies_ends_its_own_stream_only(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.node(), await swarm.node()
        transport, _ = await swarm.transport()
        await transport.connect(one.address)
        for frames in ([], [b"garbage"], [two.membership.own().to_bytes()]):
            stream = await transport.open_stream(one.peer_id, NODE)
            for frame in frames:
                await stream.send(frame)
            with trio.fail_after(60), pytest.raises((UnreachableError, TimedOutError)):
                await stream.receive()
        await two.transport.connect(one.address)
        await until(lambda: one.knows() == {two.peer_id: "node2"}, 20)

    async def test_introductions_to_nobody_are_tried_once_each_and_bounded(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one = await swarm.node()
        rng = random.Random(1)
        template = node_record(identity_of(2).public_key, name="liar")

        async def introduce_ghosts(stream: Stream) -> None:
            await stream.receive()
            ghosts = [
                Introduction(Identity(rng.randbytes(32)).public_key, ("/ip4/10.9.9.9/tcp/4001",)) for _ in range(INTRODUCTIONS_MAX)
            ]
            record = replace(template, issued_ms=one.now_ms())
            await stream.send(SignedNodeRecord.sign(record, identity_of(2)).to_bytes())
            await stream.send(Introductions(tuple(ghosts)).to_bytes())

        liar = await swarm.hostile(introduce_ghosts)
        await one.transport.connect(liar.addresses[0])
        for _ in range(100):
            await one.membership.refresh(liar.peer_id)
        assert len(one.membership._strangers) <= membership_module.STRANGERS_MAX
        await trio.sleep(400)
        assert one.knows() == {liar.peer_id: "liar"}
        assert len(one.membership._table._members) < 300

    async def test_gossip_spam_makes_no_storm_of_questions(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one = await swarm.node()
        asked: list[float] = []

        async def count(stream: Stream) -> None:
            asked.append(trio.current_time())
            await trio.sleep_forever()

        spammer = await swarm.hostile(count)
        await spammer.connect(one.address)
        for number in range(200):
            await spammer.publish(TOPIC, GOSSIP.pack(News(2**53 - number)))
            await spammer.publish(TOPIC, b"\xff" * 900)
            await trio.sleep(0.1)
        assert len(asked) <= 5


class TestAnnouncing:
    async def test_a_model_is_found_by_its_key_as_soon_as_somebody_is_there(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.node(), await swarm.node()
        one.models = (holding("nano", MODEL, (0, 4)), holding("empty", b"e" * 32))
        one.membership.announce_soon()
        await trio.sleep(30)
        assert await two.transport.find_providers(provider_key(MODEL)) == []
        await one.transport.connect(two.address)
        await trio.sleep(3)
        assert [peer.peer_id for peer in await two.transport.find_providers(provider_key(MODEL))] == [one.peer_id]
        assert await two.transport.find_providers(provider_key(b"e" * 32)) == []

    async def test_it_is_renewed_before_it_expires_and_not_after_the_model_is_gone(
        self, swarm: Swarm, autojump_clock: Clock
    ) -> None:
        one, two = await swarm.node(), await swarm.node()
        one.models = (holding("nano", MODEL, (0, 4)),)
        one.membership.announce_soon()
        await one.transport.connect(two.address)
        lifetime_s = swarm.network.provider_lifetime_s
        await trio.sleep(5)
        for _ in range(4):
            await trio.sleep(lifetime_s / 2)
            assert len(await two.transport.find_providers(provider_key(MODEL))) == 1
        one.models = ()
        one.membership.announce_soon()
        await until(lambda: not any(record.models for record in two.membership.records()), 10)
        await trio.sleep(lifetime_s + 5)
        assert await two.transport.find_providers(provider_key(MODEL)) == []

    async def test_many_models_are_announced_one_by_one(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, two = await swarm.node(), await swarm.node()
        one.models = tuple(holding(f"m{number}", bytes([number]) * 32, (0, 1)) for number in range(20))
        one.membership.announce_soon()
        at_s: list[float] = []
        real = one.transport.provide

        async def provide(key: bytes) -> None:
            at_s.append(trio.current_time())
            await real(key)

        monkeypatch.setattr(one.transport, "provide", provide)
        await one.transport.connect(two.address)
        await trio.sleep(60)
        assert len(at_s) == 20
        assert all(later - earlier >= 1 for earlier, later in pairwise(at_s))

    async def test_a_dht_that_fails_is_tried_again(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, two = await swarm.node(), await swarm.node()
        one.models = (holding("nano", MODEL, (0, 4)),)
        one.membership.announce_soon()
        real, calls = one.transport.provide, []

        async def provide(key: bytes) -> None:
            calls.append(key)
            if len(calls) == 1:
                raise UnreachableError("nobody keeps it")
            if len(calls) == 2:
                await trio.sleep_forever()
            await real(key)

        monkeypatch.setattr(one.transport, "provide", provide)
        await one.transport.connect(two.address)
        await trio.sleep(120)
        assert len(calls) == 3
        assert len(await two.transport.find_providers(provider_key(MODEL))) == 1

    async def test_discovery_gets_the_records_of_providers_and_skips_dead_ones(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two, dead = await swarm.node(), await swarm.node(), await swarm.node()
        for node in (two, dead):
            await node.transport.provide(provider_key(MODEL))
        swarm.network.crash(dead.peer_id)
        await one.membership.discover(MODEL)
        assert one.knows() == {two.peer_id: "node2"}

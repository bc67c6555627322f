"""Who may write and who may read, and that others learn nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from nexus.core.errors import NexusError, NotAllowedError, NotFoundError, RefusedError
from nexus.core.record import Record
from nexus.memory import collection as rules
from nexus.memory.block import parse_id
from nexus.memory.collection import Charter, SignedCharter
from nexus.memory.item_set import Item, ItemSet
from nexus.memory.reconcile import Reconciliation
from nexus.memory.sealing import deliver
from nexus.memory.sync_messages import MESSAGES as SYNC_MESSAGES
from nexus.memory.sync_messages import Open, Refuse, Tell, Want
from nexus.network.simulated import SimulatedNetwork, SimulatedTransport
from nexus.node.memory.asking import Asking
from nexus.node.memory.finding import collection_key, members_key, name_key
from nexus.node.memory.syncing import SYNC
from tests.node.memory.memory_swarm import Clock, Node, Swarm, search_ask, until, until_same


async def said(transport: SimulatedTransport, peer_id: str, message: Record) -> Record:
    stream = await transport.open_stream(peer_id, SYNC)
    await stream.send(SYNC_MESSAGES.pack(message))
    answer = SYNC_MESSAGES.unpack(await stream.receive())
    await stream.close()
    return answer


async def everything(transport: SimulatedTransport, peer_id: str, charter: Charter, blocks: list[bytes]) -> list[object]:
    """What a peer answers to every question about a collection."""
    asking = Asking(transport)
    found: list[object] = [
        await asking.collections(peer_id, name=charter.name),
        await asking.collections(peer_id, ids=[charter.id]),
        await asking.blocks(peer_id, blocks),
        await asking.receipts(peer_id, blocks),
    ]
    try:
        found.append(await asking.search(peer_id, search_ask(charter.id)))
    except RefusedError as error:
        found.append(error.cause.partition(": ")[2])
    view = ItemSet().view(bytes(16))
    query = Reconciliation(view).query()
    assert query is not None
    for message in (
        Open(charter.id, bytes(16), 0, query),
        Want(charter.id, tuple(blocks)),
        Tell.of(charter.id, [Item(charter.issued_ms, b"x" * 32)]),
    ):
        found.append(await said(transport, peer_id, message))
    return found


class TestWriters:
    async def test_only_those_named_write(self, swarm: Swarm, autojump_clock: Clock) -> None:
        owner, writer, reader = await swarm.nodes(3)
        charter = await owner.create("journal", "writers", [writer.peer_id])
        for node in (writer, reader):
            await node.follow("journal", owner)
        await writer.add("allowed", "journal")
        with pytest.raises(NotAllowedError, match="may not write"):
            await reader.add("not allowed", "journal")
        await until_same(charter, owner, writer, reader, size=1)

    async def test_blocks_of_others_are_declined_without_blame_for_who_has_an_older_charter(
        self, swarm: Swarm, autojump_clock: Clock
    ) -> None:
        owner, writer, late = await swarm.nodes(3)
        charter = await owner.create("journal", "writers", [writer.peer_id])
        for node in (writer, late):
            await node.follow("journal", owner)
        await writer.add("before", "journal")
        await until_same(charter, owner, writer, late, size=1)
        swarm.network.partition([[owner.peer_id], [writer.peer_id, late.peer_id]])
        await trio.sleep(10)
        await owner.memory.grant("journal", writer.peer_id, write=True, revoke=True)
        await trio.sleep(1)
        refused = await writer.add("after", "journal")
        await until(lambda: late.knows(refused))
        swarm.network.heal()
        await owner.connect(writer, late)
        # Whoever gets the newer charter drops it again: in the end all have the same.
        await until_same(charter, owner, writer, late, size=1, within_s=300)
        for node in (owner, late):
            assert not node.knows(refused)
            assert node.memory._syncing.standing(writer.peer_id).value == "good"

    async def test_changes_of_a_charter_at_once_are_all_in_it(self, swarm: Swarm, autojump_clock: Clock) -> None:
        owner, *others = await swarm.nodes(3)
        charter = await owner.create("journal", "writers")
        charters = owner.memory._charters
        # Both begin with the same charter.
        for other in others:
            charters.grant(charter, other.identity.public_key, write=True)
        assert {writer.key for writer in owner.charter("journal").writers} == {other.identity.public_key for other in others}
        assert owner.charter("journal").revision == charter.revision + 2

    async def test_an_older_charter_changes_nothing(self, swarm: Swarm, autojump_clock: Clock) -> None:
        owner, other = await swarm.nodes(2)
        old = await owner.create("journal", "writers", [other.peer_id])
        old_signed = owner.memory._charters.signed(old.id)
        assert old_signed is not None
        await other.follow("journal", owner)
        await owner.memory.grant("journal", other.peer_id, write=True, revoke=True)
        await until(lambda: other.charter("journal").revision == old.revision + 1)
        assert not other.memory._charters.take(old_signed)
        await other.memory._syncing.told([old_signed.to_bytes()], ())
        assert other.charter("journal").revision == old.revision + 1

    async def test_of_what_is_looked_into_the_newest_charter_is_kept(self, swarm: Swarm, autojump_clock: Clock) -> None:
        owner, other = await swarm.nodes(2)
        charter = await owner.create("journal", "writers")
        old = owner.memory._charters.signed(charter.id)
        changed = owner.memory._charters.grant(charter, other.identity.public_key, write=True)
        new = owner.memory._charters.signed(charter.id)
        assert old is not None
        assert new is not None
        for signed in (old, new, old):
            other.memory._charters.note([signed.to_bytes()], [charter.id])
        assert other.memory._charters.find(charter.id) == changed

    async def test_of_two_charters_of_one_revision_all_take_the_same(self, swarm: Swarm, autojump_clock: Clock) -> None:
        owner, one, two = await swarm.nodes(3)
        charter = await owner.create("journal", "writers")
        first, second = (
            SignedCharter.sign(
                rules.grant(charter, node.identity.public_key, write=True, issued_ms=charter.issued_ms), owner.identity
            )
            for node in (one, two)
        )
        for node, order in ((one, (first, second)), (two, (second, first))):
            await node.follow("journal", owner)
            for signed in order:
                node.memory._charters.take(signed)
        assert one.charter("journal") == two.charter("journal")


class TestPrivate:
    async def test_members_read_and_others_see_sealed_bytes_only(self, swarm: Swarm, autojump_clock: Clock) -> None:
        owner, member = await swarm.nodes(2)
        charter = await owner.create("diary", "private", [member.peer_id])
        await member.follow("diary", owner)
        block = await owner.add("my secret", "diary", title="a title", tags=("tag",))
        await until_same(charter, owner, member, size=1)
        assert await member.texts() == {"my secret"}
        stored = member.store.get(parse_id(block))
        assert stored is not None
        assert b"secret" not in stored.data
        assert b"title" not in stored.data
        assert [hit.block.text for hit in (await member.search("my secret", "diary")).hits] == ["my secret"]
        await member.add("mine too", "diary")
        await until_same(charter, owner, member, size=2)
        assert await owner.texts() == {"my secret", "mine too"}

    async def test_blocks_that_come_before_their_key_are_read_once_it_is_there(self, swarm: Swarm, autojump_clock: Clock) -> None:
        owner, one, two = await swarm.nodes(3)
        charter = await owner.create("diary", "private", [one.peer_id, two.peer_id])
        await owner.add("early", "diary")
        await one.follow("diary", owner)
        await until_same(charter, owner, one, size=1)
        # The third meets the second first: it has the charter and blocks, and keys come from the owner alone.
        swarm.network.partition([[owner.peer_id], [one.peer_id, two.peer_id]])
        await trio.sleep(10)
        await two.follow("diary", one)
        await until_same(charter, one, two, size=1)
        assert await two.texts() == {""}
        with pytest.raises(NotFoundError, match="key"):
            await two.add("not yet", "diary")
        swarm.network.heal()
        await two.connect(owner)
        await until(lambda: bool(two.memory._charters.keys(charter.id)), 200)
        assert await two.texts() == {"early"}
        assert [hit.block.text for hit in (await two.search("early", "diary")).hits] == ["early"]

    async def test_one_who_is_no_member_gets_nothing_by_any_question(self, swarm: Swarm, autojump_clock: Clock) -> None:
        owner, member = await swarm.nodes(2)
        charter = await owner.create("diary", "private", [member.peer_id])
        await member.follow("diary", owner)
        block = await owner.add("my secret", "diary")
        await until_same(charter, owner, member, size=1)
        await trio.sleep(20)  # attested as well
        stranger = await swarm.stranger()
        unknown = replace(charter, name="nothing of that name")
        for node in (owner, member):
            await stranger.connect(node.transport.addresses[0])
            answers = await everything(stranger, node.peer_id, charter, [parse_id(block)])
            assert answers == await everything(stranger, node.peer_id, unknown, [b"y" * 32])
            assert sum(isinstance(answer, Refuse) for answer in answers) == 3
            with pytest.raises(NotFoundError):
                await swarm_find(stranger, node)
        outsider = await swarm.node()
        await outsider.connect(owner, member)
        with pytest.raises(NotFoundError):
            await outsider.follow("diary", owner)
        with pytest.raises(NotFoundError):
            await outsider.memory.get(block, network=True)
        # Nor by the name of a collection that it may read.
        public = await owner.create("public")
        answer = await said(stranger, owner.peer_id, Want(public.id, (parse_id(block),)))
        assert answer.missing == (parse_id(block),)  # type: ignore[attr-defined]
        assert not answer.batches  # type: ignore[attr-defined]

    async def test_what_a_stranger_hands_in_is_answered_alike(self, swarm: Swarm, autojump_clock: Clock) -> None:
        """By a key for a collection that it only guesses a stranger does not learn whether it is here."""
        owner = await swarm.node()
        charter = await owner.create("main", "private")
        stranger = await swarm.stranger()
        await stranger.connect(owner.transport.addresses[0])
        asking = Asking(stranger)
        someone = swarm.identity()
        for collection in (charter.id, b"n" * 32):
            for epoch, member in ((1, owner.identity.public_key), (2, owner.identity.public_key), (2, someone.public_key)):
                grant = deliver(collection, epoch, member, b"k" * 32, someone).to_bytes()
                await asking.tell(owner.peer_id, (), (grant,))

    async def test_for_a_stranger_no_set_is_read_and_no_work_is_counted(self, swarm: Swarm, autojump_clock: Clock) -> None:
        """How long an answer takes would tell whether it is here, and how large it is."""
        owner = await swarm.node()
        charter = await owner.create("main", "private")
        stranger = await swarm.stranger()
        await stranger.connect(owner.transport.addresses[0])
        query = Reconciliation(ItemSet().view(bytes(16))).query()
        assert query is not None
        assert isinstance(await said(stranger, owner.peer_id, Open(charter.id, bytes(16), 0, query)), Refuse)
        assert charter.id not in owner.memory._syncing._sets
        assert not owner.memory._syncing._comparisons._buckets

    async def test_nothing_of_it_is_published_or_announced(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        published: list[str] = []
        gossip = SimulatedNetwork.gossip

        def listen(self: SimulatedNetwork, publisher: SimulatedTransport, topic: str, data: bytes) -> None:
            published.append(topic)
            gossip(self, publisher, topic, data)

        monkeypatch.setattr(SimulatedNetwork, "gossip", listen)
        owner, member = await swarm.nodes(2)
        private = await owner.create("diary", "private", [member.peer_id])
        public = await owner.create("open")
        await member.follow("diary", owner)
        await owner.add("hidden", "diary")
        await owner.add("shown", "open")
        await until_same(private, owner, member, size=1)
        await trio.sleep(30)
        assert published
        assert all(public.id.hex() in topic for topic in published)
        assert not any(private.id.hex() in topic for topic in (*owner.transport.subscribers._queues,))
        (key,) = owner.memory._charters.keys(private.id).values()
        announced = owner.memory.announced()
        assert {collection_key(public.id), name_key("open"), members_key(private.id, key)} < set(announced)
        # Its id follows from the owner's key and a name that may be guessed.
        assert not {collection_key(private.id), name_key("diary")} & set(announced)
        assert len(announced) == 4  # and the one public block
        assert members_key(private.id, key) in member.memory.announced()

    async def test_whoever_is_taken_out_gets_no_new_key(self, swarm: Swarm, autojump_clock: Clock) -> None:
        owner, stays, goes = await swarm.nodes(3)
        charter = await owner.create("diary", "private", [stays.peer_id, goes.peer_id])
        for node in (stays, goes):
            await node.follow("diary", owner)
        await owner.add("for all", "diary")
        await until_same(charter, owner, stays, goes, size=1)
        await owner.memory.grant("diary", goes.peer_id, write=True, revoke=True)
        await owner.memory.grant("diary", goes.peer_id, write=False, revoke=True)
        await until(lambda: set(stays.memory._charters.keys(charter.id)) == {1, 2})
        later = await owner.add("for two", "diary")
        await until_same(charter, owner, stays, size=2)
        assert await stays.texts() == {"for all", "for two"}
        await trio.sleep(200)
        assert set(goes.memory._charters.keys(charter.id)) == {1}
        assert not goes.knows(later)
        with pytest.raises(NexusError):
            await goes.add("still here", "diary")
        answers = await everything(goes.transport, stays.peer_id, charter, [parse_id(later)])
        assert answers == await everything(goes.transport, stays.peer_id, replace(charter, name="other"), [b"y" * 32])

    async def test_bad_keys_of_one_peer_do_not_keep_a_member_out(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        owner, member, liar = await swarm.nodes(3)
        charter = await owner.create("diary", "private", [member.peer_id, liar.peer_id])
        await liar.follow("diary", owner)
        bad = deliver(charter.id, 1, member.identity.public_key, b"k" * 32, liar.identity).to_bytes()
        monkeypatch.setattr(liar.memory._charters, "grants_for", lambda collection, peer: [bad, b"no grant"])
        await member.memory.subscribe("diary", None)
        await until(lambda: bool(member.memory._charters.keys(charter.id)), 200)
        await owner.add("read", "diary")
        await until_same(charter, owner, member, size=1)
        assert await member.texts() == {"read"}

    async def test_good_charters_beside_bad_keys_have_their_effect(self, swarm: Swarm, autojump_clock: Clock) -> None:
        owner, member = await swarm.nodes(2)
        charter = await owner.create("journal", "writers", [member.peer_id])
        await member.follow("journal", owner)
        block = await member.add("to be dropped", "journal")
        await until_same(charter, owner, member, size=1)
        newer = rules.revoke(charter, member.identity.public_key, issued_ms=owner.now_ms(), since_ms=0)
        signed = SignedCharter.sign(newer, owner.identity)
        private = await owner.create("diary", "private", [member.peer_id])
        await member.follow("diary", owner)
        bad = deliver(private.id, 7, member.identity.public_key, b"k" * 32, member.identity).to_bytes()
        with pytest.raises(NexusError):
            await member.memory._syncing.take_charters([signed.to_bytes()], [bad], "", [charter.id])
        assert member.charter("journal").revision == newer.revision
        assert not member.knows(block)


async def swarm_find(transport: SimulatedTransport, node: Node) -> None:
    answer = await Asking(transport).collections(node.peer_id, name="diary")
    if not answer.charters:
        raise NotFoundError("nothing")

"""Peers that send bad blocks, or too many, and what it costs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import trio

from nexus.core.errors import NexusError, PeerError, RefusedError
from nexus.core.keys import Identity
from nexus.memory.batch import SignedBatch
from nexus.memory.block import block_id
from nexus.memory.collection import Charter
from nexus.memory.item_set import Item
from nexus.memory.sync import Load, Loaded
from nexus.memory.sync_messages import BATCHES_BYTES_MAX, News
from nexus.network.transport import Message
from nexus.node.memory.asking import Asking
from nexus.node.memory.syncing import SYNC
from tests.node.memory.memory_swarm import Clock, Node, Swarm, batch_of, block_of, search_ask, until, until_same

Forge = Callable[[Node, Charter, list[Loaded]], list[Loaded]]


def loaded(batch: SignedBatch) -> Loaded:
    return Loaded(batch.to_bytes(), tuple(map(block_id, batch.blocks)))


def forged_author(node: Node, charter: Charter, found: list[Loaded]) -> list[Loaded]:
    """The same blocks, signed by another."""
    return [
        loaded(SignedBatch(replace(batch.proof, signature=bytes(64)), batch.blocks))
        for batch in (SignedBatch.from_bytes(each.batch) for each in found)
    ]


def flipped_bits(node: Node, charter: Charter, found: list[Loaded]) -> list[Loaded]:
    return [Loaded(each.batch[:-1] + bytes([each.batch[-1] ^ 1]), each.ids) for each in found]


def garbage(node: Node, charter: Charter, found: list[Loaded]) -> list[Loaded]:
    return [Loaded(b"garbage", each.ids) for each in found]


def not_asked_for(node: Node, charter: Charter, found: list[Loaded]) -> list[Loaded]:
    others = batch_of(node.identity, block_of(node.identity, charter.id, "pushed", node.now_ms()))
    return [*found, loaded(others)]


def other_collection(node: Node, charter: Charter, found: list[Loaded]) -> list[Loaded]:
    other = batch_of(node.identity, block_of(node.identity, b"o" * 32, "elsewhere", node.now_ms()))
    return [Loaded(other.to_bytes(), tuple(identifier for each in found for identifier in each.ids))]


def wrong_sky(node: Node, charter: Charter, found: list[Loaded]) -> list[Loaded]:
    """Set by `lie`: the block itself has the sky of another hour."""
    return found


def nothing(node: Node, charter: Charter, found: list[Loaded]) -> list[Loaded]:
    """An answer without a block, and without saying that it is missing."""
    return [Loaded(b"x" * 2_000_000, each.ids) for each in found]


def lie(node: Node, charter: Charter, forge: Forge) -> None:
    syncing = node.memory._syncing
    honest = syncing._load

    def load(asked: Load) -> list[Loaded]:
        return forge(node, charter, honest(asked))

    syncing._load = load  # type: ignore[method-assign]


class TestBadBlocks:
    @pytest.mark.parametrize("forge", [forged_author, flipped_bits, garbage, not_asked_for, other_collection, wrong_sky])
    async def test_who_sends_bad_blocks_is_demoted_then_dropped_and_not_served(
        self, swarm: Swarm, autojump_clock: Clock, forge: Forge
    ) -> None:
        one, liar = await swarm.nodes(2)
        charter = await one.create("open")
        await liar.follow("open", one)
        if forge is wrong_sky:
            now_ms = liar.now_ms()
            stamp = liar.memory._writing._stamp(charter, now_ms - 3_600_000)
            batch = batch_of(liar.identity, block_of(liar.identity, charter.id, "at another time", now_ms, sky=stamp))
            liar.memory._accepting._check_sky = lambda times, stamps: np.ones(len(stamps), bool)
            await liar.memory._accepting.take([batch], b"")
        else:
            await liar.write(charter.id, "a", "b")
        lie(liar, charter, forge)
        standing = one.memory._syncing.standing
        assert standing(liar.peer_id).value == "good"
        await until(lambda: standing(liar.peer_id).value == "demoted", 60)
        await until(lambda: standing(liar.peer_id).value == "dropped", 900)
        assert await one.texts() <= {"a", "b"}
        if forge is not not_asked_for:
            assert not one.ids(charter)
        assert (await one.pair(liar)).state == "dropped"
        asking = Asking(liar.transport)
        with pytest.raises(PeerError):
            await asking.collections(one.peer_id, ids=[charter.id])
        # Others go on.
        third = await swarm.node()
        await third.connect(one)
        await third.follow("open", one)
        await third.add("honest", "open")
        await until(lambda: _has(one, "honest"))
        if forge is garbage:  # in the end it gets another chance
            await until(lambda: standing(liar.peer_id).value != "dropped", 1200)

    async def test_an_answer_with_nothing_in_it_ends_the_session(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, liar = await swarm.nodes(2)
        charter = await one.create("open")
        await liar.follow("open", one)
        await liar.write(charter.id, "a")
        lie(liar, charter, nothing)
        await trio.sleep(60)
        assert not one.ids(charter)
        await one.add("mine", "open")
        await until(lambda: _has(liar, "mine"))

    async def test_malformed_messages_count_as_well(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one = await swarm.node()
        await one.create("open")
        stranger = await swarm.stranger()
        await stranger.connect(one.transport.addresses[0])
        for _ in range(3):
            stream = await stranger.open_stream(one.peer_id, SYNC)
            await stream.send(b"garbage")
            with pytest.raises((NexusError, trio.EndOfChannel)):
                await stream.receive()
        assert one.memory._syncing.standing(stranger.peer_id).value == "dropped"


class TestNews:
    async def test_strangers_who_publish_do_not_take_the_places_of_peers(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.nodes(2)
        charter = await one.create("open")
        await two.follow("open", one)
        await one.add("first", "open")
        await until_same(charter, one, two, size=1)
        for number in range(20):
            publisher = Identity((10**6 + number).to_bytes(32, "big")).peer_id
            news = News.of(charter.id, [Item(one.now_ms(), number.to_bytes(32, "big"))])
            one.memory._syncing._gossip._take(charter.id, Message(publisher, news.to_bytes()))
        assert {status.peer for status, _, _ in one.memory._syncing.status()} == {two.peer_id}
        three = await swarm.node()
        await three.connect(one)
        await three.follow("open", one)
        await three.add("after", "open")
        await until_same(charter, one, two, three, size=2)

    async def test_news_that_leads_to_nothing_is_listened_to_a_few_times(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, liar = await swarm.nodes(2)
        charter = await one.create("open")
        await liar.follow("open", one)
        await trio.sleep(10)
        begun = 0
        run_session = one.memory._syncing._run_session

        async def counted(start: object) -> None:
            nonlocal begun
            begun += 1
            await run_session(start)  # type: ignore[arg-type]

        one.memory._syncing._run_session = counted  # type: ignore[method-assign]
        for number in range(200):
            news = News.of(charter.id, [Item(one.now_ms(), number.to_bytes(32, "big"))])
            await liar.transport.publish(f"nexus/memory/1/{charter.id.hex()}", news.to_bytes())
            await liar.transport.publish(f"nexus/memory/1/{charter.id.hex()}", b"garbage")
            await trio.sleep(0.5)
        assert begun < 30

    async def test_a_peer_that_tells_and_leaves_is_not_thought_to_be_there(self, swarm: Swarm, autojump_clock: Clock) -> None:
        """Between two looks at who is connected."""
        one = await swarm.node()
        charter = await one.create("open")
        await one.memory._syncing._loaded_set(charter.id)
        two = await swarm.node()
        await trio.sleep(1.2 - trio.current_time() % 1)
        await two.connect(one)
        one.memory._syncing._hear(two.peer_id, charter.id, [Item(one.now_ms(), b"i" * 32)], 0)
        assert one.memory._syncing.peers_of(charter.id) == [two.peer_id]
        await two.stop()
        await until(lambda: not one.memory._syncing.peers_of(charter.id), 10)


class TestTooMuch:
    async def test_an_author_over_its_quota_is_declined_while_others_go_on(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one = await swarm.node(author_max_bytes=20_000)
        greedy, modest = await swarm.node(), await swarm.node()
        await greedy.connect(one)
        await modest.connect(one, greedy)
        charter = await one.create("open")
        for node in (greedy, modest):
            await node.follow("open", one)
        for number in range(40):
            await greedy.write(charter.id, f"{number} " + "x" * 1000)
        await modest.add("modest", "open")
        await until(lambda: _has(one, "modest"))
        await trio.sleep(60)
        texts = await one.texts()
        assert 5 < len(texts) < 20
        assert one.memory._syncing.standing(greedy.peer_id).value == "good"
        assert one.store.stats().size < 30_000

    async def test_a_flood_is_read_at_its_pace(self, swarm: Swarm, autojump_clock: Clock) -> None:
        slow = await swarm.node(blocks_per_peer_s=1)
        flooder = await swarm.node()
        await flooder.connect(slow)
        charter = await slow.create("open")
        await flooder.follow("open", slow)
        for part in range(4):
            await flooder.write(charter.id, *(f"{part} {number}" for number in range(100)))
        began_s = trio.current_time()
        await until(lambda: len(slow.ids(charter)) >= 400, 2000)
        # A minute's worth at once, the rest as it is allowed; what is being read is finished.
        assert trio.current_time() - began_s > 60

    async def test_searches_and_tellings_are_counted_by_peer(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one = await swarm.node()
        charter = await one.create("open")
        await one.add("secret", "open")
        stranger, other = await swarm.stranger(), await swarm.stranger()
        for transport in (stranger, other):
            await transport.connect(one.transport.addresses[0])
        asking = Asking(stranger)
        for _ in range(50):
            assert await asking.search(one.peer_id, search_ask(charter.id))

        async def much() -> None:
            for _ in range(50):
                await asking.search(one.peer_id, search_ask(charter.id))

        with pytest.raises(RefusedError, match="too many searches"):
            await much()
        assert await Asking(other).search(one.peer_id, search_ask(charter.id))

    async def test_blocks_scattered_over_a_large_batch_fit_in_an_answer(self, swarm: Swarm, autojump_clock: Clock) -> None:
        """The proof of some large blocks of many does not make them too many for a message, and so never sent."""
        one, two = await swarm.nodes(2)
        charter = await one.create("large")
        author = swarm.identity()
        blocks = [block_of(author, charter.id, f"{number} " + "x" * 3900, one.now_ms()) for number in range(1024)]
        batch = batch_of(author, *blocks)
        await one.memory._accepting.take([batch], b"")
        ids = list(map(block_id, batch.blocks))
        await two.follow("large", one)
        wanted = tuple(ids[0::4])
        found = one.memory._syncing._load(Load(charter.id, wanted))
        assert found
        assert all(len(each.batch) <= BATCHES_BYTES_MAX for each in found)
        stranger = await swarm.stranger()
        await stranger.connect(one.transport.addresses[0])
        got = await Asking(stranger).blocks(one.peer_id, wanted)
        assert sum(len(each.blocks) for each in got) > 200


async def _has(node: Node, text: str) -> bool:
    return text in await node.texts()

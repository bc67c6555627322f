"""Collections are the same on all nodes that follow them, whatever happens in between."""

from __future__ import annotations

from itertools import pairwise

import trio

from nexus.memory.block import TOMBSTONE, Block, parse_id
from nexus.storage.memory.records import State
from tests.node.memory.memory_swarm import Clock, Swarm, batch_of, until, until_same


class TestTheSameEverywhere:
    async def test_what_one_writes_the_other_has_seconds_later(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.nodes(2)
        charter = await one.create("birds")
        await one.add("A wren sings.", "birds")
        await two.follow("birds", one)
        await until_same(charter, one, two, size=1, within_s=5)
        began_s = trio.current_time()
        await two.add("An owl hoots.", "birds")
        await one.add("A rook caws.", "birds")
        await until_same(charter, one, two, size=3, within_s=10)
        assert trio.current_time() - began_s < 10
        assert await one.texts() == await two.texts() == {"A wren sings.", "An owl hoots.", "A rook caws."}
        assert (await two.views())[0].author in (one.peer_id, two.peer_id)

    async def test_blocks_reach_those_who_are_not_connected_with_their_author(self, swarm: Swarm, autojump_clock: Clock) -> None:
        nodes = [await swarm.node() for _ in range(4)]
        charter = await nodes[0].create("chain")
        for before, after in pairwise(nodes):
            await after.connect(before)
            await after.follow("chain", before)
        await nodes[0].write(charter.id, *map(str, range(20)))
        await until_same(charter, *nodes, size=20)

    async def test_a_partition_heals_to_identical_sets(self, swarm: Swarm, autojump_clock: Clock) -> None:
        nodes = await swarm.nodes(3)
        charter = await nodes[0].create("split")
        for node in nodes[1:]:
            await node.follow("split", nodes[0])
        first = await nodes[0].add("common", "split")
        await until_same(charter, *nodes, size=1)
        swarm.network.partition([[nodes[0].peer_id, nodes[1].peer_id], [nodes[2].peer_id]])
        for number, node in enumerate(nodes):
            await node.add(f"of {number} alone", "split")
        later = await nodes[0].add("of 0, later", "split", replaces=first)
        await trio.sleep(60)
        assert not nodes[2].knows(later)
        assert nodes[0].ids(charter) == nodes[1].ids(charter) != nodes[2].ids(charter)
        swarm.network.heal()
        await nodes[2].connect(*nodes[:2])
        await until_same(charter, *nodes, size=5)
        answers = [await node.search("common", "split", k=10) for node in nodes]
        assert len({tuple((hit.block.id, hit.score) for hit in answer.hits) for answer in answers}) == 1
        assert len(answers[0].hits) == 4

    async def test_a_restart_keeps_subscriptions_and_keys(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.nodes(2)
        charter = await one.create("diary", "private", [two.peer_id])
        await two.follow("diary", one)
        await one.add("before", "diary")
        await until_same(charter, one, two, size=1)
        await two.stop()
        await one.add("meanwhile", "diary")
        await trio.sleep(600)
        await two.start()
        assert two.charter("diary") == charter
        assert two.memory._charters.follows(charter.id)
        assert await two.texts() == {"before"}
        await two.connect(one)
        await until_same(charter, one, two, size=2)
        assert await two.texts() == {"before", "meanwhile"}

    async def test_thousands_of_blocks_arrive_in_order_of_nothing(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.nodes(2)
        charter = await one.create("many")
        for part in range(3):
            await one.write(charter.id, *(f"{part} {number}" for number in range(300)))
        await two.follow("many", one)
        await until_same(charter, one, two, size=900)
        status = await two.pair(one)
        assert (status.state, status.received, status.refused) == ("in sync", 900, 0)


class TestVersions:
    async def test_a_later_version_is_shown_everywhere(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.nodes(2)
        charter = await one.create("notes")
        await two.follow("notes", one)
        first = await one.add("draft", "notes")
        await until_same(charter, one, two, size=1)
        await one.add("final", "notes", replaces=first)
        await until_same(charter, one, two, size=2)
        assert await one.texts() == await two.texts() == {"final"}

    async def test_concurrent_versions_are_resolved_alike(self, swarm: Swarm, autojump_clock: Clock) -> None:
        nodes = await swarm.nodes(3)
        charter = await nodes[0].create("notes", "writers", [node.peer_id for node in nodes[1:]])
        for node in nodes[1:]:
            await node.follow("notes", nodes[0])
        first = await nodes[0].add("draft", "notes")
        await until_same(charter, *nodes, size=1)
        swarm.network.partition([[node.peer_id] for node in nodes])
        for number, node in enumerate(nodes):
            await node.add(f"version {number}", "notes", replaces=first)
        swarm.network.heal()
        for node in nodes[1:]:
            await node.connect(nodes[0])
        await until_same(charter, *nodes, size=4, within_s=60)
        shown = [await node.memory.get(first, network=False) for node in nodes]
        assert len({(view.winner, view.heads) for view in shown}) == 1
        assert len(shown[0].heads) == 3
        assert {view.state for view in shown} == {"superseded"}
        # A version over all of them ends the conflict.
        await nodes[1].add("agreed", "notes", replaces=shown[0].winner)
        await until_same(charter, *nodes, size=5)
        assert [await node.texts() for node in nodes] == [{"agreed"}] * 3

    async def test_what_is_removed_goes_with_every_earlier_version(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.nodes(2)
        charter = await one.create("notes")
        first = await one.add("one", "notes")
        await two.follow("notes", one)
        await until_same(charter, one, two, size=1)
        await two.stop()
        second = await one.add("two", "notes", replaces=first)
        third = await one.add("three", "notes", replaces=second)
        assert set(await one.memory.remove(third)) == {first, second, third}
        await two.start()
        await two.connect(one)
        # The node that saw only the first, and never those between, loses it too.
        await until_same(charter, one, two, size=1)
        assert await one.texts() == await two.texts() == set()

    async def test_what_a_tombstone_takes_away_is_not_fetched_again(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two, three = await swarm.nodes(3)
        charter = await one.create("notes")
        await two.follow("notes", one)
        await three.follow("notes", one)
        gone = await one.add("regretted", "notes")
        await one.add("kept", "notes")
        await until_same(charter, one, two, three, size=2)
        await three.stop()
        assert await one.memory.remove(gone) == (gone,)
        await until(lambda: parse_id(gone) not in two.ids(charter) and len(two.ids(charter)) == 2)
        assert await two.texts() == {"kept"}
        assert two.store.get(parse_id(gone)).state is State.REMOVED  # type: ignore[union-attr]
        # One that has missed it still has the block, offers it, and nobody takes it back.
        await three.start()
        await three.connect(one, two)
        await until(lambda: parse_id(gone) not in three.ids(charter))
        await trio.sleep(60)
        await until_same(charter, one, two, three, size=2)
        for node in (one, two, three):
            assert node.store.get(parse_id(gone)).data == b""  # type: ignore[union-attr]
            assert (await node.memory.get(gone, network=True)).state == "removed"

    async def test_a_tombstone_of_somebody_else_takes_nothing_away(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.nodes(2)
        charter = await one.create("notes")
        await two.follow("notes", one)
        kept = await one.add("mine", "notes")
        await until_same(charter, one, two, size=1)
        block = Block(TOMBSTONE, charter.id, two.identity.public_key, two.now_ms(), parents=parse_id(kept))
        await two.memory._accepting.own(batch_of(two.identity, block), [None])
        await until_same(charter, one, two, size=2)
        assert await one.texts() == await two.texts() == {"mine"}


class TestTime:
    async def test_a_block_from_the_future_is_declined_and_taken_later(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one = await swarm.node(skew_ms=300_000)
        two = await swarm.node()
        await two.connect(one)
        charter = await one.create("ahead")
        await two.follow("ahead", one)
        early = await one.add("from tomorrow", "ahead")
        await trio.sleep(60)
        assert not two.knows(early)
        assert (await two.pair(one)).state == "behind"
        await until_same(charter, one, two, size=1, within_s=600)
        assert two.memory._syncing.standing(one.peer_id).value == "good"

    async def test_what_has_expired_leaves_all_sets(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.nodes(2)
        charter = await one.create("news")
        await two.follow("news", one)
        short = await one.add("today's", "news", ttl_s=40.0)
        await one.add("for good", "news")
        await until_same(charter, one, two, size=2)
        await trio.sleep(60)
        await until_same(charter, one, two, size=1, within_s=10)
        assert await one.texts() == await two.texts() == {"for good"}
        assert (await two.memory.get(short, network=True)).state == "expired"
        await trio.sleep(30)
        assert (await two.pair(one)).state == "in sync"

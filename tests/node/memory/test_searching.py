"""Searches and single blocks over the network: merged, checked, and said to be partial where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import trio

from nexus.core.errors import LocalError, NotFoundError, UsageError
from nexus.memory.batch import SignedBatch
from nexus.memory.block import parse_id
from nexus.node.memory.api import Filters, SearchRequest
from nexus.node.memory.asking import ASK
from nexus.node.memory.messages import MESSAGES, Blocks, SearchAsk
from tests.node.memory.memory_swarm import Clock, Node, Swarm, batch_of, block_of, search_ask, until_same


async def two_that_know_each_other(swarm: Swarm) -> tuple[Node, Node]:
    """Both follow "open"; the second stops exchanging after it has met the first."""
    one, two = await swarm.nodes(2)
    charter = await one.create("open")
    await two.follow("open", one)
    await one.add("common ground", "open")
    await until_same(charter, one, two, size=1)
    return one, two


def found(view: object) -> set[str]:
    return {hit.block.text for hit in view.hits}  # type: ignore[attr-defined]


class TestSearch:
    async def test_a_collection_that_is_followed_by_others_only_is_searched_there(
        self, swarm: Swarm, autojump_clock: Clock
    ) -> None:
        one, two = await swarm.nodes(2)
        await one.create("open")
        await one.add("over there", "open")
        view = await two.search("over there", "open", network=True)
        assert found(view) == {"over there"}
        assert view.complete
        assert view.hits[0].found_at == one.peer_id
        assert view.hits[0].similarity == pytest.approx(1, abs=0.02)
        assert not await two.views()

    async def test_what_peers_have_and_what_is_here_makes_one_list(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await two_that_know_each_other(swarm)
        charter = one.charter("open")
        two.memory._syncing._schedule.remove(charter.id, one.peer_id)
        one.memory._syncing._schedule.remove(charter.id, two.peer_id)
        await one.write(charter.id, "only there")
        two.memory._syncing._schedule.add(one.peer_id, charter.id, trio.current_time() + 1e6)
        view = await two.search("only there", "open", network=True)
        assert {"only there", "common ground"} <= found(view)
        assert [hit.score for hit in view.hits] == sorted((hit.score for hit in view.hits), reverse=True)
        assert [(peer.peer_id, peer.outcome) for peer in view.asked] == [(one.peer_id, "answered")]
        # What came is kept where the collection is followed.
        assert "only there" in await two.texts()

    async def test_a_peer_that_does_not_answer_makes_it_partial(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, two = await two_that_know_each_other(swarm)

        async def silent(ask: SearchAsk) -> Sequence[bytes]:
            await trio.sleep_forever()
            return []

        monkeypatch.setattr(one.memory._answering, "_search", silent)
        began_s = trio.current_time()
        view = await two.search("common ground", "open", network=True, deadline_s=3.0)
        assert trio.current_time() - began_s < 10
        assert found(view) == {"common ground"}
        assert not view.complete
        assert [peer.outcome for peer in view.asked] == ["no answer in time"]

    @pytest.mark.parametrize("kind", ["forged", "elsewhere", "garbage", "foreign"])
    async def test_forged_and_wrong_blocks_are_refused(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        one, two = await two_that_know_each_other(swarm)
        charter = one.charter("open")
        good = batch_of(one.identity, block_of(one.identity, charter.id, "pushed", one.now_ms()))
        answers = {
            "forged": SignedBatch(replace(good.proof, signature=bytes(64)), good.blocks).to_bytes(),
            "elsewhere": batch_of(one.identity, block_of(one.identity, b"o" * 32, "pushed", one.now_ms())).to_bytes(),
            "garbage": b"garbage",
            "foreign": batch_of(one.identity, block_of(one.identity, charter.id, "pushed", one.now_ms() + 10**9)).to_bytes(),
        }

        async def answer(ask: object, peer_id: str) -> Blocks:
            return Blocks((answers[kind],))

        monkeypatch.setattr(one.memory._answering, "_answer", answer)
        view = await two.search("pushed", "open", network=True)
        assert found(view) == {"common ground"}
        assert "pushed" not in await two.texts()
        (heard,) = view.asked
        assert heard.hits == 0
        assert two.memory._syncing.standing(one.peer_id).value == ("good" if kind == "foreign" else "demoted")

    async def test_what_was_taken_away_here_is_not_shown_because_a_peer_still_has_it(
        self, swarm: Swarm, autojump_clock: Clock
    ) -> None:
        one, two = await two_that_know_each_other(swarm)
        charter = one.charter("open")
        block = await one.add("regretted", "open")
        await until_same(charter, one, two, size=2)
        batches = two.store.batches([parse_id(block)], 10**6)
        await one.memory.remove(block)

        async def answer(ask: object, peer_id: str) -> Blocks:
            return Blocks(tuple(batch.to_bytes() for batch in batches))

        two.memory._answering._answer = answer  # type: ignore[method-assign, assignment]
        view = await one.search("regretted", "open", network=True)
        assert found(view) == {"common ground"}

    async def test_what_cannot_be_asked_is_the_users_fault(self, swarm: Swarm, autojump_clock: Clock) -> None:
        _, two = await two_that_know_each_other(swarm)
        with pytest.raises(UsageError, match="longer"):
            await two.search("x" * 5000, "open", network=True, hybrid=True)
        many = Filters(("open",), tags=tuple(map(str, range(100))))
        with pytest.raises(UsageError, match="filters"):
            await two.memory.search(SearchRequest("x", many, network=True))

    async def test_with_a_full_store_what_is_found_is_shown(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, two = await two_that_know_each_other(swarm)

        def full(*_: object) -> list[bytes]:
            raise LocalError("the disk is full")

        monkeypatch.setattr(two.store, "put", full)
        await one.write(one.charter("open").id, "only there")
        view = await two.search("only there", "open", network=True)
        assert "only there" in found(view)
        assert two.memory._syncing.standing(one.peer_id).value == "good"

    async def test_a_dropped_peer_is_not_answered(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await two_that_know_each_other(swarm)
        for _ in range(3):
            one.memory._syncing.offend(two.peer_id)
        view = await two.search("common ground", "open", network=True)
        assert not view.complete


class TestGet:
    async def test_a_block_of_an_unknown_collection_is_found_and_shown_and_not_kept(
        self, swarm: Swarm, autojump_clock: Clock
    ) -> None:
        one, two = await swarm.nodes(2)
        await one.create("open")
        block = await one.add("over there", "open")
        view = await two.memory.get(block, network=True)
        assert (view.text, view.collection, view.author) == ("over there", "open", one.peer_id)
        assert not two.knows(block)
        with pytest.raises(NotFoundError):
            await two.memory.get(block, network=False)

    async def test_a_peer_with_a_forged_proof_does_not_hide_it(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nodes = await swarm.nodes(3)
        charter = await nodes[0].create("open")
        block = await nodes[0].add("over there", "open")
        liar, asker = nodes[1:]
        await liar.follow("open", nodes[0])
        await until_same(charter, nodes[0], liar, size=1)
        (batch,) = nodes[0].store.batches([parse_id(block)], 10**6)
        forged = SignedBatch(replace(batch.proof, signature=bytes(64)), batch.blocks)
        honest = nodes[0].memory._answering._answer

        async def late(ask: object, peer_id: str) -> object:
            await trio.sleep(1)
            return await honest(ask, peer_id)  # type: ignore[arg-type]

        async def lying(ask: object, peer_id: str) -> Blocks:
            return Blocks((forged.to_bytes(),))

        monkeypatch.setattr(nodes[0].memory._answering, "_answer", late)
        monkeypatch.setattr(liar.memory._answering, "_answer", lying)
        assert (await asker.memory.get(block, network=True)).text == "over there"

    async def test_a_slow_peer_does_not_keep_a_user_waiting_for_what_is_here(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, two = await two_that_know_each_other(swarm)
        block = (await two.views())[0].id

        async def never(ask: object, peer_id: str) -> object:
            await trio.sleep_forever()
            return None

        monkeypatch.setattr(one.memory._answering, "_answer", never)
        began_s = trio.current_time()
        assert (await two.memory.get(block, network=False)).text == "common ground"
        assert trio.current_time() - began_s < 5

    async def test_this_nodes_paths_are_told_to_nobody(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, _ = await two_that_know_each_other(swarm)

        def damaged(*_: object) -> object:
            raise LocalError("/home/somebody/memory.db cannot be read")

        monkeypatch.setattr(one.store, "get_many", damaged)
        stranger = await swarm.stranger()
        await stranger.connect(one.transport.addresses[0])
        stream = await stranger.open_stream(one.peer_id, ASK)
        await stream.send(MESSAGES.pack(search_ask(one.charter("open").id)))
        answer = MESSAGES.unpack(await stream.receive())
        assert "home" not in answer.reason  # type: ignore[attr-defined]

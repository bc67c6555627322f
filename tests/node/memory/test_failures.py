"""What fails on this machine ends no background task, blames no peer, and is made good once it can be."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import trio

from nexus.core.encoding import encode
from nexus.core.errors import (
    CapacityError,
    LocalError,
    MalformedError,
    NexusError,
    RefusedError,
    UsageError,
    VerificationError,
)
from nexus.memory import collection as rules
from nexus.memory.block import MAP, Block, parse_id
from nexus.memory.collection import SignedCharter
from nexus.memory.item_set import Item
from nexus.memory.space_map import fit_map
from nexus.node.memory.asking import Asking
from nexus.storage.memory import documents
from tests.node.memory.memory_swarm import (
    DIMENSION,
    Clock,
    Embeds,
    Node,
    Swarm,
    batch_of,
    block_of,
    search_ask,
    until,
    until_same,
)


def failing(error: NexusError) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


class TestDisk:
    async def test_a_full_disk_ends_the_session_and_blames_nobody(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, two = await swarm.nodes(2)
        charter = await one.create("open")
        await two.follow("open", one)
        with monkeypatch.context() as full:
            full.setattr(two.store, "put", failing(LocalError("the disk is full")))
            await one.add("waits", "open")
            await trio.sleep(30)
            status = await two.pair(one)
            assert (status.state, status.reason) == ("failing", "the disk is full")
            assert two.memory._syncing.standing(one.peer_id).value == "good"
            with pytest.raises(LocalError):
                await two.add("neither", "open")
        await until_same(charter, one, two, size=1, within_s=120)
        assert await two.texts() == {"waits"}

    async def test_what_was_stored_before_the_disk_was_full_is_in_the_set(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = await swarm.node()
        two = await swarm.node(author_max_bytes=6000)
        await two.connect(one)
        charter = await one.create("open")
        await two.follow("open", one)
        put = two.store.put

        def some(arrivals: Any, rule: Any) -> list[bytes]:
            # With everybody's blocks together over a quota each goes by itself; the second meets a full disk.
            if two.store.stats().size:
                raise LocalError("the disk is full")
            return put(arrivals, rule)

        with monkeypatch.context() as full:
            full.setattr(two.store, "put", some)
            for number in range(3):
                await one.write(charter.id, f"{number} " + "x" * 2500)
            await until(lambda: two.store.stats().size > 0, 60)
            await trio.sleep(3)
            assert len(two.ids(charter)) == 1

    @pytest.mark.parametrize("error", [LocalError("the disk fails"), CapacityError("no room")])
    @pytest.mark.parametrize(
        "method",
        [
            "items",
            "maintain",
            "expire",
            "get_many",
            "put_document",
            "put_receipts",
            "receipts",
            "documents",
            "resolve",
            "batches",
            "known",
            "unread",
        ],
    )
    async def test_no_failure_ends_the_service(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch, method: str, error: NexusError
    ) -> None:
        one, two = await swarm.nodes(2, witness_every_s=3.0)
        charter = await one.create("open", "writers", [two.peer_id])
        await two.follow("open", one)
        await one.add("first", "open")
        await until_same(charter, one, two, size=1)
        with monkeypatch.context() as failure:
            failure.setattr(two.store, method, failing(error))
            two.memory._syncing.changed(charter.id)
            await one.add("expires", "open", ttl_s=1.0)
            await one.add("second", "open")
            gone = await one.add("goes", "open")
            await one.memory.remove(gone)
            stranger = swarm.identity()
            await one.memory.grant("open", stranger.peer_id, write=True, revoke=False)
            await trio.sleep(20)
        # All of it goes on afterwards.
        await until(lambda: _texts(one, two), 400)
        assert two.memory._syncing.standing(one.peer_id).value == "good"
        await two.add("third", "open")
        await until(lambda: _texts(one, two), 60)
        await until(lambda: two.charter("open").revision == 1, 300)
        issued = (await two.memory.witness()).issued
        await one.add("fourth", "open")
        await until(lambda: two.memory._witnessing.issued > issued, 60)

    async def test_a_charter_that_could_not_take_effect_does_so_later(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        owner, writer = await swarm.nodes(2)
        charter = await owner.create("journal", "writers", [writer.peer_id])
        await writer.follow("journal", owner)
        block = await writer.add("to be dropped", "journal")
        await until_same(charter, owner, writer, size=1)
        signed = SignedCharter.sign(
            rules.revoke(charter, writer.identity.public_key, issued_ms=owner.now_ms(), since_ms=0), owner.identity
        )
        with monkeypatch.context() as failure:
            failure.setattr(writer.store, "resolve", failing(LocalError("the disk fails")))
            failure.setattr(writer.store, "get_many", failing(LocalError("the disk fails")))
            await writer.memory._syncing.take_charters([signed.to_bytes()], (), "", [charter.id])
        assert writer.knows(block)
        await until(lambda: not writer.knows(block), 60)


class TestSets:
    async def test_a_collection_that_is_given_up_while_it_is_read_ends_nothing(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = await swarm.node()
        charter = await one.create("open")
        await one.add("a", "open")
        await one.memory._syncing._loaded_set(charter.id)
        items = one.store.items

        def meanwhile(collection: bytes) -> Any:
            one.memory._charters.unfollow(collection)
            one.memory._syncing.unfollowed(collection)
            return items(collection)

        with monkeypatch.context() as patch:
            patch.setattr(one.store, "items", meanwhile)
            one.memory._syncing.changed(charter.id)
            await trio.sleep(5)
        assert charter.id not in one.memory._syncing._sets
        await one.memory.subscribe("open", None)
        await until(lambda: len(one.ids(charter)) == 1, 10)

    async def test_while_a_set_is_read_again_the_earlier_one_stands(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = await swarm.node()
        charter = await one.create("open")
        block = await one.add("a", "open")
        syncing = one.memory._syncing
        await syncing._loaded_set(charter.id)
        seen: list[int] = []
        items = one.store.items

        def watched(collection: bytes) -> Any:
            found = list(items(collection))
            seen.append(len(one.ids(charter)))
            # Stored after it was read: in the new set as well.
            syncing.added(charter.id, [Item(one.now_ms(), b"n" * 32)])
            return iter(found)

        monkeypatch.setattr(one.store, "items", watched)
        syncing.changed(charter.id)
        await trio.sleep(3)
        assert seen == [1]
        assert one.ids(charter) == {parse_id(block), b"n" * 32}


class TestDamage:
    @pytest.mark.parametrize("kind", ["charter", "followed", "epoch-key", "key-grant", "own-attestation", "attestation"])
    @pytest.mark.parametrize("change", ["data = x'00'", "hash = x'00'"])
    async def test_a_damaged_row_does_not_keep_a_node_from_starting(
        self, swarm: Swarm, autojump_clock: Clock, kind: str, change: str
    ) -> None:
        owner, member = await swarm.nodes(2, witness_every_s=3.0)
        charter = await owner.create("diary", "private", [member.peer_id])
        await member.follow("diary", owner)
        await owner.add("a", "diary")
        await until_same(charter, owner, member, size=1)
        await member.add("b", "diary")
        await trio.sleep(20)
        for node in (owner, member):
            await node.stop()
            with sqlite3.connect(node.path / "memory.db") as database:
                database.execute(f"UPDATE document SET {change} WHERE kind = ?", (kind,))
            database.close()
        for node in (member, owner):
            await node.start()
        await owner.connect(member)
        if kind in ("charter", "key-grant", "own-attestation", "attestation"):
            assert {"a", "b"} <= await owner.texts()
        if kind == "own-attestation":
            await member.add("c", "diary")
            await until(lambda: owner.memory._witnessing.last is not None, 60)
        if kind == "epoch-key":
            # A member's key comes again from the owner that kept what it sealed to it.
            await until(lambda: bool(member.memory._charters.keys(charter.id)), 200)

    async def test_a_lost_charter_comes_again_from_others(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.nodes(2)
        charter = await one.create("open")
        await two.follow("open", one)
        await one.add("a", "open")
        await until_same(charter, one, two, size=1)
        await one.stop()
        with sqlite3.connect(one.path / "memory.db") as database:
            database.execute("UPDATE document SET data = x'00' WHERE kind = 'charter'")
        database.close()
        await one.start()
        assert one.memory._charters.find(charter.id) is None
        await one.connect(two)
        await until(lambda: one.memory._charters.find(charter.id) == charter, 200)
        await two.add("b", "open")
        await until_same(charter, one, two, size=2, within_s=200)

    async def test_documents_that_are_replaced_need_no_more_room(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = await swarm.node()
        await one.create("open")
        one.store.put_document("a", b"k", b"first")
        held = sum(len(one.store.documents(kind)) for kind in ("charter", "followed", "a"))
        monkeypatch.setattr(documents, "DOCUMENTS_MAX", held)
        one.store.put_document("a", b"k", b"second")
        with pytest.raises(CapacityError):
            one.store.put_document("a", b"k2", b"third")


class TestHostileContent:
    async def test_a_map_that_does_not_fit_its_model_ends_no_search(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one = await swarm.node()
        charter = await one.create("open")
        rng = np.random.default_rng(1)
        wrong = rng.normal(size=(400, DIMENSION // 2)).astype(np.float32)
        wrong /= np.linalg.norm(wrong, axis=1, keepdims=True)
        target = b"t" * 32
        space_map = fit_map(Embeds.fingerprint, target, wrong, wrong)
        assert space_map.may_answer
        author = swarm.identity()
        parts = [
            Block(MAP, charter.id, author.public_key, one.now_ms(), title="map", part=number, data=part)
            for number, part in enumerate(space_map.to_parts())
        ]
        block = block_of(author, charter.id, "a text", one.now_ms())
        other = block._replace(vectors=(block.vectors[0]._replace(fingerprint=target, codes=block.vectors[0].codes),))
        await one.memory._accepting.take([batch_of(author, *parts), batch_of(author, other)], b"")
        view = await one.search("a text", "open", hybrid=True)
        assert [hit.block.text for hit in view.hits] == ["a text"]

    async def test_full_text_queries_from_peers_are_words_and_nothing_else(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one = await swarm.node()
        charter = await one.create("open")
        await one.add("plain words", "open")
        stranger = await swarm.stranger()
        await stranger.connect(one.transport.addresses[0])
        asking = Asking(stranger)
        for query in ("plain OR (", "title:plain*", "NEAR(plain words)", "'; DROP TABLE block; -- plain", "\u0000plain", "-plain"):
            assert await asking.search(one.peer_id, replace(search_ask(charter.id), query=query))
        for query in ('"', "^", "* OR *", "title:"):
            with suppress(RefusedError):
                assert not await asking.search(one.peer_id, replace(search_ask(charter.id), query=query))
        assert await one.texts() == {"plain words"}

    async def test_an_import_takes_nothing_that_does_not_hold(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.nodes(2)
        charter = await one.create("open")
        await one.add("a", "open")
        parts = [part.content async for part in one.memory.export(["open"])]
        signed = one.memory._charters.signed(charter.id)
        assert signed is not None
        forged = SignedCharter(rules.create(one.identity.public_key, "other", rules.PUBLIC, 0), signed.signature)
        for content, error in (
            (b"garbage", MalformedError),
            (b"", MalformedError),
            (encode((3, b"")), MalformedError),
            (encode((1, b"charter")), MalformedError),
            (encode((1, forged.to_bytes())), VerificationError),
            (encode((2, b"batch")), MalformedError),
            (b"x" * (3 << 20), UsageError),
        ):
            with pytest.raises(error):
                await two.memory.import_part(content)
        assert (await two.memory.import_part(parts[1])).refused == 1
        await two.memory.import_part(parts[0])
        assert (await two.memory.import_part(parts[1])).new == 1
        assert (await two.memory.import_part(parts[1])).known == 1
        assert await two.texts("open") == {"a"}

    async def test_an_imported_newer_charter_has_its_effect(self, swarm: Swarm, autojump_clock: Clock) -> None:
        owner, writer = await swarm.nodes(2)
        charter = await owner.create("journal", "writers", [writer.peer_id])
        await writer.follow("journal", owner)
        block = await writer.add("to be dropped", "journal")
        newer = rules.revoke(charter, writer.identity.public_key, issued_ms=owner.now_ms(), since_ms=0)
        await writer.memory.import_part(encode((1, SignedCharter.sign(newer, owner.identity).to_bytes())))
        assert not writer.knows(block)


async def _texts(one: Node, two: Node) -> bool:
    shown = await one.texts()
    return shown == await two.texts() and "second" in shown

"""Witnesses bound when a block was made, and strangers cannot take their place."""

from __future__ import annotations

import pytest
import trio

from nexus.core.keys import Identity
from nexus.memory.block import parse_id
from nexus.memory.bracket import Grade, SignedAttestation, receipts
from nexus.node.memory import witnessing as witnessing_module
from nexus.node.memory.api import Filters
from nexus.node.memory.messages import BlockReceipt
from tests.node.memory.memory_swarm import Clock, Node, Swarm, until, until_same


def strangers_receipts(block: str, count: int, now_ms: int) -> tuple[BlockReceipt, ...]:
    found = []
    for number in range(count):
        signed = SignedAttestation.sign(Identity((5000 + number).to_bytes(32, "big")), [parse_id(block)], now_ms, None)
        (receipt,) = receipts(signed, [parse_id(block)])
        found.append(BlockReceipt(parse_id(block), receipt.to_bytes()))
    return tuple(found)


async def grade(node: Node, block: str) -> tuple[str, int]:
    view = await node.memory.get(block, network=False)
    return view.grade, view.witnesses


class TestReceipts:
    async def test_a_block_is_consistent_then_bounded(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.nodes(2, witnesses=1)
        charter = await one.create("open")
        await two.follow("open", one)
        first = await two.add("before it", "open")
        await until_same(charter, one, two, size=1)
        block = await one.add("to be bounded", "open")
        early = await one.memory.listed(Filters(), 10)
        assert {view.grade for view in early} <= {"consistent", "bounded below"}

        async def bounded() -> bool:
            return await grade(one, block) == (Grade.BOUNDED.label, 1)

        await until(bounded, 120)
        view = await one.memory.get(block, network=False)
        assert view.not_before_ms is not None
        assert view.not_after_ms is not None
        assert view.not_before_ms <= view.created_ms <= view.not_after_ms
        assert (await two.memory.witness()).issued >= 1
        assert (await grade(two, first))[1] <= 1

    async def test_only_trusted_witnesses_count_and_strangers_take_no_room(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trusted = Identity((2).to_bytes(32, "big"))
        one = await swarm.node(trusted_witnesses=(trusted.peer_id,))
        two = await swarm.node()
        assert two.peer_id == trusted.peer_id
        stranger = await swarm.node()
        await two.connect(one)
        await stranger.connect(one, two)
        charter = await one.create("open")
        await stranger.follow("open", one)
        block = await one.add("attested by strangers", "open")
        await until_same(charter, one, stranger, size=1)
        fakes = strangers_receipts(block, 20, one.now_ms())

        async def many(ids: object) -> tuple[BlockReceipt, ...]:
            return fakes

        monkeypatch.setattr(stranger.memory._answering, "_attested", many)
        await trio.sleep(60)
        assert (await grade(one, block))[1] == 0
        await two.follow("open", one)

        async def counted() -> bool:
            return (await grade(one, block))[1] == 1

        await until(counted, 300)

    async def test_receipts_that_do_not_hold_are_not_kept(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, liar = await swarm.nodes(2, witness_every_s=0.0)
        charter = await one.create("open")
        await liar.follow("open", one)
        block, other = await one.add("a", "open"), await one.add("b", "open")
        await until_same(charter, one, liar, size=2)
        good = strangers_receipts(other, 1, one.now_ms())[0]
        future = strangers_receipts(block, 1, one.now_ms() + 10**9)[0]
        for bad in (
            BlockReceipt(parse_id(block), good.receipt),
            BlockReceipt(parse_id(block), b"garbage"),
            BlockReceipt(b"x" * 32, good.receipt),
            future,
        ):

            async def attested(ids: object, bad: BlockReceipt = bad) -> tuple[BlockReceipt, ...]:
                return (bad,)

            monkeypatch.setattr(liar.memory._answering, "_attested", attested)
            await trio.sleep(20)
            assert (await grade(one, block))[1] == 0
            assert not one.store.receipts(parse_id(block))

    async def test_the_newest_attestations_are_known_however_many_there_were(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(witnessing_module, "SEEN_MAX", 4)
        one, two = await swarm.nodes(2)
        await one.create("open")
        await two.follow("open", one)
        block = await one.add("a", "open")
        witnessing = one.memory._witnessing
        for number in range(8):
            receipt = strangers_receipts(block, number + 1, one.now_ms())[-1]

            async def answer(peer_id: str, ids: object, receipt: BlockReceipt = receipt) -> tuple[BlockReceipt, ...]:
                return (receipt,)

            monkeypatch.setattr(witnessing._asking, "receipts", answer)
            await trio.sleep(1)
            await witnessing.ask_peer(two.peer_id, [parse_id(block)])
        assert len(witnessing._seen) == 4
        assert len(one.store.documents("attestation")) == 4
        newest = max(anchor.at_ms for anchor in witnessing._seen.values())
        assert witnessing._seen[witnessing.newest_attestations(1)[0]].at_ms == newest
        assert newest > one.now_ms() - 3000
